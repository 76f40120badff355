from qlora_kit.commands.plan import main

raise SystemExit(main())
