"""`python -m qlora_kit NAME ...` is `qlora-kit NAME ...`."""

from qlora_kit.commands.main import main

raise SystemExit(main(None))
