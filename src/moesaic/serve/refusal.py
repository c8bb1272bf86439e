"""What a client is told when it is not served: a status, a sentence, and OpenAI's words for the kind of fault."""

from __future__ import annotations

from typing import Any

from moesaic.core.errors import MoesaicError

BAD, NO_KEY, FOREIGN, UNKNOWN, SLOW, TOO_LARGE, NOT_JSON, MISDIRECTED = 400, 401, 403, 404, 408, 413, 415, 421
BUSY, GONE, FAILED, STOPPING = 429, 499, 500, 503

_KINDS = {NO_KEY: "authentication_error", FOREIGN: "permission_error", BUSY: "rate_limit_error"}


class RefusedError(MoesaicError):
    """A request that is not served, or an answer that broke off.

    Args:
        status: of HTTP.
        message: one sentence, or two, for whoever sent the request.
        field: of the request that it is about.
        code: a word for programs, as OpenAI's service has them.
        wait_s: when to try again, in seconds; None where that would not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        field: str | None = None,
        code: str | None = None,
        wait_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.field = field
        self.code = code
        self.wait_s = wait_s

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        fault = "invalid_request_error" if self.status < FAILED else "server_error"
        kind = _KINDS.get(self.status, fault)
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP wants said beside the body."""
        headers = {} if self.wait_s is None else {"Retry-After": str(self.wait_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == NO_KEY else {})
