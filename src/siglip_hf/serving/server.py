"""The process that listens: one socket, JSON lines for a log, and an end that finishes what was begun."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from pydantic_core import to_json

from siglip_hf.extras import missing
from siglip_hf.serving.door import Door
from siglip_hf.serving.settings import Settings

try:
    import uvicorn
except ImportError as _error:
    raise missing("the server needs uvicorn", "serve") from _error

_BACKLOG = 1024

logger = logging.getLogger("siglip_hf.serving")


class JsonLines(logging.Formatter):
    """A JSON object on each line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record; its attribute `entry`, a dict, is put beside the message."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "entry", {}),
        }
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return to_json(line).decode()


@contextlib.contextmanager
def log_as_json() -> Iterator[None]:
    """In the block, warnings of everyone and what the server itself says go to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.root
    before = root.handlers, root.level, logger.level, root.manager.disable
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(logging.INFO)
    logging.disable(logging.NOTSET)  # the command line wants libraries quiet
    try:
        yield
    finally:
        root.handlers, level, own_level, disabled = before
        root.setLevel(level)
        logger.setLevel(own_level)
        logging.disable(disabled)


def log_request(entry: dict[str, Any]) -> None:
    """Logs one request."""
    logger.info("request", extra={"entry": entry})


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: if the port is taken, or the address none of this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = error.strerror or "no such address"
        raise OSError(f"cannot listen on {host}, port {port}: {reason}; see --host and --port.") from error


def address_of(listening: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server, which tells the door when it ends."""

    def __init__(
        self, door: Door, seconds: float, on_ready: Callable[[], None] = lambda: None, uds: str | None = None
    ) -> None:
        """Makes a server.

        Args:
            door: the application.
            seconds: the longest time for which accepted requests are finished at the end.
            on_ready: called when requests are taken.
            uds: a socket's path to listen on, where none is given to `run`.
        """
        config = uvicorn.Config(
            door,
            uds=uds,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anyone could say to be someone else
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=int(seconds) + 1,
        )
        super().__init__(config)
        self._door, self._on_ready = door, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begins the end, on SIGTERM or Ctrl+C: nothing more is taken, what was taken is finished."""
        self._door.is_draining = True
        super().handle_exit(sig, frame)


def run(door: Door, settings: Settings, listening: socket.socket, on_ready: Callable[[], None]) -> None:
    """Runs an application on a socket until SIGTERM or Ctrl+C; the process lives on."""
    server = Server(door, settings.limits.seconds, on_ready)
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn sends itself the signal again when it is done
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
