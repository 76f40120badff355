from qlora_kit.commands.finetune import main

raise SystemExit(main())
