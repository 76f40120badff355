from qlora_kit.commands.chat import main

raise SystemExit(main())
