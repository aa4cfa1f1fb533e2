"""What tests of embedding runs look at, and how they break things."""

from __future__ import annotations

from siglip_hf.data.store import EmbeddingStore


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def by_id(folder):
    store = EmbeddingStore.open(folder)
    return dict(zip(store.rows(["id"])["id"].to_pylist(), store.vectors(), strict=True))


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test takes it."""


def flip(file, place):
    """Turns one bit."""
    content = bytearray(file.read_bytes())
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
