"""Class embeddings kept on disk, in a folder that many processes share: a label is encoded once in a machine's life.

One SQLite database, since that locks, survives kills and updates in place. A row is found by the hash of everything
that it depends on, so that no other model or template can ever get it, and carries a checksum.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from siglip_hf.files import in_turn, sha256
from siglip_hf.inference.optimize.packed import GivenUp

logger = logging.get_logger(__name__)

#: Bound on the file; at E = 768 it holds about 300,000 classes.
DEFAULT_MAX_BYTES = 2**30

_FILE = "labels.sqlite"
_TABLE = "CREATE TABLE IF NOT EXISTS rows (key TEXT PRIMARY KEY, row BLOB, checksum TEXT, used INTEGER) WITHOUT ROWID"
_AT_ONCE = 500  # keys in one question; SQLite has a bound
_STALE = 3600  # seconds after which the time of the last use is written again
_PATIENCE = 30.0  # seconds to wait for other processes
# Any change of what a tokenizer does with letters, signs, scripts or spaces should show in one of these.
_PROBES = (
    "A Photo, of the_cat's {DOG}!",
    "Ünï  cöde",
    "고양이 猫",
    "кот قطة 😀",
    "0123456789",
    "&lt;b&gt;",
    " a\tb\nc ",
)

# Packages whose layers are told by their tensors and the configuration.
_KNOWN_LAYERS = ("torch.nn.", "siglip_hf.models.", "siglip_hf.inference.optimize.", "transformers.activations")

Result = TypeVar("Result")


class LabelStore:
    """Rows by key, the least recently used out first.

    A disk that is full or a database that stays locked costs the rows, not the caller: it is told in a warning. A
    damaged row is taken for missing, and a damaged database is started again.

    Attributes:
        folder: where it is.
        max_bytes: bound on the file.
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        """Opens a folder, or makes it.

        Raises:
            ValueError: if it cannot be made or written to, or the bound is not above 0.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} must be at least 1.")
        self.folder, self.max_bytes = Path(folder), max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"the label bank {str(folder)!r} cannot be made: {error}") from error
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"the label bank {str(folder)!r} cannot be written to.")

    def get(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """The rows that are there: float32 (E,) by key."""

        def read(database: sqlite3.Connection) -> dict[str, np.ndarray]:
            found: dict[str, np.ndarray] = {}
            now = int(time.time())
            for some in _parts(keys):
                places = ",".join("?" * len(some))
                rows = database.execute(f"SELECT key, row, checksum, used FROM rows WHERE key IN ({places})", some)
                stale = []
                for key, row, checksum, used in rows.fetchall():
                    # A damaged cell may be of any type.
                    if isinstance(key, str) and isinstance(row, bytes) and _checksum(key, row) == checksum:
                        found[key] = np.frombuffer(row, np.float32)
                        stale += [key] if not isinstance(used, int) or used < now - _STALE else []
                database.executemany("UPDATE rows SET used = ? WHERE key = ?", [(now, key) for key in stale])
            return found

        return self._do(read) or {}

    def put(self, rows: Mapping[str, np.ndarray]) -> None:
        """Keeps rows, float32 (E,) by key."""

        def write(database: sqlite3.Connection) -> None:
            now = int(time.time())
            contents = ((key, np.ascontiguousarray(row, np.float32).tobytes()) for key, row in rows.items())
            values = [(key, content, _checksum(key, content), now) for key, content in contents]
            database.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)", values)
            while _used_bytes(database) > self.max_bytes:
                (count,) = database.execute("SELECT COUNT(*) FROM rows").fetchone()
                oldest = "SELECT key FROM rows ORDER BY used, key LIMIT ?"
                database.execute(f"DELETE FROM rows WHERE key IN ({oldest})", [max(count // 10, 1)])
                if count <= 1:
                    break

        self._do(write)

    def _do(self, work: Callable[[sqlite3.Connection], Result]) -> Result | None:
        """The result of one transaction; None if it cannot be done now."""
        for _ in range(2):
            try:
                with self._database() as database:
                    return work(database)
            except sqlite3.DatabaseError as error:
                if _is_sound(error):
                    logger.warning(f"the label bank {self.folder} cannot be used now: {error}")
                    return None
                logger.warning(f"the label bank {self.folder} is damaged and started again: {error}")
            try:
                self._begin_anew()
            except OSError as error:
                logger.warning(f"the label bank {self.folder} cannot be started again: {error}")
                return None
        return None

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction; a kept one would belong to one thread and outlive a fork."""
        database = sqlite3.connect(self.folder / _FILE, timeout=_PATIENCE)
        try:
            # What a crash of the machine may cost is a cache; what it may leave is found by checksums.
            database.execute("PRAGMA synchronous = OFF")
            with database:
                database.execute(_TABLE)
                yield database
        finally:
            database.close()

    def _begin_anew(self) -> None:
        with in_turn(self.folder / ".lock"):
            try:
                with self._database() as database:
                    database.execute("SELECT key, row, checksum, used FROM rows LIMIT 1")
                    if database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
                        return  # another process was faster
            except sqlite3.DatabaseError as error:
                if _is_sound(error):
                    return
            for end in ("", "-journal"):
                (self.folder / (_FILE + end)).unlink(missing_ok=True)


def _is_sound(error: sqlite3.DatabaseError) -> bool:
    """Whether an error says nothing about the file: locked for long, a full disk, no right to write."""
    return any(word in str(error) for word in ("locked", "full", "readonly", "unable to open"))


def text_side_digest(model: Any, tokenizer: Any) -> str | None:
    """What tells the embeddings of a model and tokenizer from those of any other, as SHA-256.

    Args:
        model: a model with a `text_model`, plain or optimized.
        tokenizer: its tokenizer.

    Returns:
        The digest of the text tower's weights as they compute, its configuration, and what the tokenizer does; None if
        that does not tell it all: weights that are not in memory (offload), layers of other packages (an adapter may be
        switched off and keep its weights), ONNX.
    """
    if not all(type(module).__module__.startswith(_KNOWN_LAYERS) for module in model.text_model.modules()):
        return None
    tensors = dict(_weights(model.text_model))
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        return None
    settings = f"{type(model).__name__} {model.config.text_config.to_json_string()}"
    vocabulary = repr(sorted(tokenizer.get_vocab().items()))
    form = {"padding": "max_length", "truncation": True, "max_length": model.config.text_config.max_position_embeddings}
    probes = repr([tokenizer(text, **form)["input_ids"] for text in _PROBES])
    names = repr([(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()])
    words = [part.encode("utf-8", "surrogatepass") for part in (settings, vocabulary, probes, names)]
    return sha256([*words, *(_bytes(tensor) for tensor in tensors.values())])


def _weights(tower: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in tower.named_modules():
        own: Any = module._parameters
        own = own.tensors(module) if isinstance(own, GivenUp) else own
        own = {**own, **module._buffers}
        yield from ((f"{name}.{own_name}", tensor) for own_name, tensor in own.items() if tensor is not None)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _checksum(key: str, row: bytes) -> str:
    return sha256([key.encode(), row])[:16]


def _used_bytes(database: sqlite3.Connection) -> int:
    pages, free, size = (
        database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def _parts(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    return (keys[start : start + _AT_ONCE] for start in range(0, len(keys), _AT_ONCE))
