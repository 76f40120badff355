from qlora_kit.commands.show_data import main

raise SystemExit(main())
