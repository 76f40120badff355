"""What a server takes beside the model, before any weight is read: packages, and its socket."""

from __future__ import annotations

import importlib.util
import socket

from qlora_kit.config.commands import is_loopback
from qlora_kit.errors import ConfigError, ResourceError

BACKLOG = 256
"""Connections that the system keeps until they are taken."""


def check_extras() -> None:
    """Refuse to serve where a package for it is missing. Errors: `ConfigError`."""
    packages = ("fastapi", "uvicorn")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"not installed: {', '.join(missing)}", "pip install 'qlora-kit[serve]'")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on an address, port 0 on any free one. Errors: `ResourceError`."""
    try:
        (family, *_, address), *_ = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        if is_loopback(host) and not is_loopback(str(address[0])):
            raise ResourceError(
                f"--host {host} is {address[0]} here, which other machines reach",
                "give 127.0.0.1, or correct the name in the system's list of hosts",
            )
        # By its number, for asyncio sends at once on sockets of this protocol alone: others wait
        # 40 ms for what else may come, with every piece of an answer.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise ResourceError(
            f"--host {host} --port {port}: {said}", "give another --port or --host"
        ) from error


def url_of(listener: socket.socket) -> str:
    """The address of what listens."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
