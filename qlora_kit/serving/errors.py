"""Errors as the OpenAI API says them: `{"error": {"message", "type", "param", "code"}}`.

What a client is told is about its own request. Faults of the server have a text that names no path
and no part of the program; the whole of them is in the server's log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_kit.errors import (
    ConfigError,
    DataError,
    NumericError,
    UnsafeInputError,
    excerpt,
)
from qlora_kit.process.out_of_memory import is_out_of_memory

INVALID, BUSY, BROKEN = "invalid_request_error", "rate_limit_error", "server_error"
"""The API's types of errors that are used here."""
LEFT = 499
"""The status, in the log alone, of a request whose client has left."""
RETRY = {"retry-after": "1"}
"""Seconds after which a client may ask a full server again."""


class ApiError(Exception):
    """What a request is answered with in place of what it asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
        self._type, self._param, self._code = type, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The API's error object."""
        said = {"type": self._type, "param": self._param, "code": self._code}
        return {"error": {"message": self.message, **said}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that asks for what there is not."""
    return ApiError(400, message, param=param, code=code)


def no_model(name: str, known: list[str]) -> ApiError:
    """A request to a model that is not here."""
    return ApiError(
        404,
        f"the model {excerpt(name)!r} does not exist; there are {excerpt(', '.join(known), 300)}",
        param="model",
        code="model_not_found",
    )


def no_adapters() -> ApiError:
    """A server that anybody on the machine may ask lets nobody name a directory to read."""
    return ApiError(
        403,
        "adapters are added and removed where the server was started with an API key: "
        "QLORA_KIT_API_KEY, or --api_key",
        code="needs_api_key",
    )


def left() -> ApiError:
    """What nobody reads: the client has left."""
    return ApiError(LEFT, "the client left", code="client_left")


def taken(name: str, why: str) -> ApiError:
    """A name that another model has."""
    return ApiError(409, f"{excerpt(name)!r} {why}", param="name", code="name_taken")


def no_path() -> ApiError:
    """A request to what the server does not have."""
    return ApiError(404, "there is no such path, or not with this method", code="not_found")


def too_large(limit: int) -> ApiError:
    """A body that is not read."""
    return ApiError(
        413,
        f"the body is larger than {limit} bytes; send less text",
        code="request_too_large",
    )


def queue_full(waiting: int) -> ApiError:
    """A request beyond what may wait."""
    message = f"{waiting} requests wait already, which is the server's limit; send it again later"
    return ApiError(429, message, type=BUSY, code="queue_full", headers=RETRY)


def closing() -> ApiError:
    """A request to a server that ends."""
    return ApiError(503, "the server is shutting down", type=BROKEN, code="shutting_down")


def from_error(error: Exception) -> ApiError:
    """What a request is told of an error that it ran into.

    What a prompt does wrong is the client's to know; what is wrong with files is the server's.
    """
    if isinstance(error, ApiError):
        return error
    if is_out_of_memory(error):
        return ApiError(
            503,
            "the server's memory is full; send the request again later, or a shorter one",
            type=BROKEN,
            code="out_of_memory",
            headers=RETRY,
        )
    if isinstance(error, UnsafeInputError):
        return invalid("the chat template was stopped on these messages", "messages")
    if isinstance(error, (ConfigError, DataError)):
        return invalid(excerpt(error.problem, 400))
    if isinstance(error, NumericError):
        message = "the model's numbers are not finite on this prompt"
        return ApiError(500, message, type=BROKEN, code="not_finite")
    message = "the server failed on this request; its log says how"
    return ApiError(500, message, type=BROKEN, code="internal")
