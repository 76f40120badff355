from qlora_kit.commands.serve import main

raise SystemExit(main())
