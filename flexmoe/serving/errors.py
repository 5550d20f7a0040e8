"""What a client is told when something cannot be done: a status code and OpenAI's error object."""

from __future__ import annotations

from typing import Any

#: What clients know of an error beside its status.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "permission_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
    507: "insufficient_storage_error",
}


class ApiError(Exception):
    """The answer to a request that cannot be served.

    Args:
        status: of HTTP.
        message: a sentence.
        code: for programs.
        param: the field at fault, where it is one.
        retry_after_s: when the same may be asked again; for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The body of the response."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers of the response, beside those of its body."""
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def not_found(what: str, name: str, param: str | None = None) -> ApiError:
    """There is no such file, batch or model.

    Args:
        what: for the sentence, ``file``.
        name: as the client gave it; shown cut, as it may be anything.
    """
    code = "model_not_found" if what == "model" else "not_found"
    return ApiError(404, f"there is no {what} {name[:80]!r}", code=code, param=param or "id")


def busy(message: str, retry_after_s: int = 5) -> ApiError:
    """There is too much to do; the same may be asked again later."""
    return ApiError(429, message, code="busy", retry_after_s=retry_after_s)


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A request says something that cannot be."""
    return ApiError(400, message, code=code, param=param)


def too_large(most_bytes: int) -> ApiError:
    """A body is longer than this server takes."""
    return ApiError(413, f"the body is longer than {most_bytes} bytes, the limit here", code="too_large")
