from qlora_kit.commands.evaluate import main

raise SystemExit(main())
