"""What a request is refused with: a status, a code, and a text that names the field, the value and what would be right."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import ClassVar


class Refusal(Exception):
    """The request is not taken, or cannot be."""

    status: ClassVar[int]
    code: ClassVar[str]
    retry_after_s: ClassVar[float | None] = None
    """Where the same request may be taken later."""

    @property
    def headers(self) -> dict[str, str]:
        """Beside the body."""
        return {} if self.retry_after_s is None else {"Retry-After": str(math.ceil(self.retry_after_s))}

    def body(self) -> dict[str, object]:
        """As it is sent."""
        error: dict[str, object] = {"code": self.code, "message": str(self)}
        if self.retry_after_s is not None:
            error["retry_after_s"] = self.retry_after_s
        return error


class BadRequest(Refusal):
    """Wrong for ever. The text is ``field: reason``."""

    status, code = 400, "bad_request"


class Unauthorized(Refusal):
    """Without the token."""

    status, code = 401, "unauthorized"


class TestsUnknown(Refusal):
    """The set of tests was never uploaded, or is forgotten: upload it and repeat."""

    __test__ = False  # not a test of pytest
    status, code = 404, "tests_unknown"


class NoSuchRoute(Refusal):
    """Nothing is served there."""

    status, code = 404, "no_such_route"


class WrongMethod(Refusal):
    """Something else is served there."""

    status, code = 405, "no_such_route"

    def __init__(self, method: str, allowed: Collection[str]) -> None:
        self._allowed = ", ".join(sorted(allowed))
        super().__init__(f"method: {method} is not served at this path; {self._allowed} is")

    @property
    def headers(self) -> dict[str, str]:
        """As HTTP wants it."""
        return {"Allow": self._allowed}


class TooSlow(Refusal):
    """The body did not arrive in time."""

    status, code = 408, "too_slow"


class IdReused(Refusal):
    """The id belongs to a request with other content."""

    status, code = 409, "id_reused"


class TooLarge(Refusal):
    """More than this service takes."""

    status, code = 413, "too_large"


class Busy(Refusal):
    """The queue is full."""

    status, code = 429, "busy"
    retry_after_s = 0.2


class Draining(Refusal):
    """No new work is taken."""

    status, code = 503, "draining"

    @property
    def headers(self) -> dict[str, str]:
        """For clients that know no other service."""
        return {"Retry-After": "1"}
