from qlora_kit.commands.generate import main

raise SystemExit(main())
