"""What stands between a page and its visitors: only the requests that a page makes are answered, errors in our words.

Gradio also serves descriptions of its API, monitoring and editing tools, and its errors name files and versions of the
server. A page needs none of that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

# What the browser asks for while a page is used. `/gradio_api/upload` is the one way in for files.
_ALLOWED = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|pwa_icon(/\d+)?|(assets|static|svelte)/.+)?"
    r"|/gradio_api/(app_id|theme\.css|startup-events|heartbeat/\w+|queue/(join|data)|run/\w+|cancel|reset|upload|upload_progress"
    r"|file=.+)/?"
)

# How a drawing board sends what is drawn; it is kept in memory, so that no more is taken than a board can be.
_BOARD = re.compile(r"/gradio_api/component_server/?")
MAX_BOARD = 8_000_000

_SENTENCES = {
    404: "There is nothing here.",
    413: "The file is larger than 20 MB, the most that is taken (a drawing: 8 MB).",
}
_OTHER = "This request cannot be answered."

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """An ASGI middleware: 404 for what no page asks for, and own sentences in place of every error's text.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] != "http":
            if scope["type"] != "websocket":
                await self.app(scope, receive, send)
            return
        is_board = _BOARD.fullmatch(scope["path"])
        if not (is_board or _ALLOWED.fullmatch(scope["path"])):
            await _refuse(send, 404)
            return
        if is_board and not 0 <= _length(scope) <= MAX_BOARD:
            await _refuse(send, 413)
            return
        failed = False

        async def send_unless_failed(message: Message) -> None:
            nonlocal failed
            if message["type"] == "http.response.start" and message["status"] >= 400:
                failed = True
                await _refuse(send, message["status"])
            elif not failed:
                await send(message)

        await self.app(scope, receive, send_unless_failed)


def _length(scope: Message) -> int:
    """Bytes of the body by its header, which the server holds the sender to; -1 if it does not say."""
    length = dict(scope["headers"]).get(b"content-length", b"")
    return int(length) if length.isdigit() else -1


async def _refuse(send: Send, status: int) -> None:
    body = json.dumps({"detail": _SENTENCES.get(status, _OTHER)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
