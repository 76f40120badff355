"""The socket of a server, opened before any weight is read."""

from __future__ import annotations

import socket

from qlora_kit.errors import ResourceError

BACKLOG = 256
"""Connections that the system keeps until they are taken."""


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on an address, port 0 on any free one. Errors: `ResourceError`."""
    try:
        (family, *_, address), *_ = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise ResourceError(
            f"--host {host} --port {port}: {said}", "give another --port or --host"
        ) from error


def url_of(listener: socket.socket) -> str:
    """The address of what listens."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
