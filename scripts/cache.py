from qlora_kit.commands.cache import main

raise SystemExit(main())
