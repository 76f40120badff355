from qlora_kit.commands.export import main

raise SystemExit(main())
