from qlora_kit.commands.runs import main

raise SystemExit(main())
