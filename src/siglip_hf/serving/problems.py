"""Errors as problem details (RFC 9457), with the member `error` in which OpenAI's clients look for the message."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from http import HTTPStatus

from pydantic_core import to_json

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):
    """A request that is answered with an error.

    Attributes:
        status: the status of HTTP.
        detail: one sentence for the client.
        headers: further headers of the answer.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})

    def body(self) -> bytes:
        """The answer, as JSON."""
        title = HTTPStatus(self.status).phrase
        error = {"message": self.detail, "type": title.lower().replace(" ", "_"), "param": None, "code": None}
        return to_json(
            {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail, "error": error}
        )


def too_busy(detail: str, seconds: int) -> Problem:
    """Too many requests; they may come again after so many seconds."""
    return Problem(429, detail, {"Retry-After": str(seconds)})


@contextlib.contextmanager
def users_mistakes() -> Iterator[None]:
    """What the block refuses was asked for wrongly, and the sentence of the library is the answer."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Problem(400, str(error)) from error
