from qlora_kit.commands.quantize import main

raise SystemExit(main())
