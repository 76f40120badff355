"""The packages that a server takes, which are an extra; asked about before torch is imported."""

from __future__ import annotations

import importlib.util

from qlora_kit.errors import ConfigError

PACKAGES = ("fastapi", "uvicorn")
INSTALL = "pip install 'qlora-kit[serve]'"


def check_extras() -> None:
    """Refuse to serve where something for it is missing. Errors: `ConfigError`."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"not installed: {', '.join(missing)}", INSTALL)
