"""The indexes of `/v1/search`: opened at the start, opened again when a folder is replaced, asked by the towers."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siglip_hf.search.index import MANIFEST
from siglip_hf.search.query import Hit, Query, SearchIndex
from siglip_hf.serving.towers import Picture, Towers

logger = logging.getLogger(__name__)

#: Seconds after which a folder is looked at again.
LOOK_AGAIN = 1.0


class Indexes:
    """Indexes by name, all of one model.

    Attributes:
        names: their names.
    """

    def __init__(self, folders: Mapping[str, str], towers: Towers) -> None:
        """Opens all.

        Raises:
            OSError: if one is not there.
            ValueError: if one is damaged or belongs to another model.
        """
        self.names = list(folders)
        self._folders, self._towers = dict(folders), towers
        self._marks = {name: _mark(folder) for name, folder in folders.items()}
        self._open = {name: self._opened(name) for name in folders}
        self._looked = dict.fromkeys(folders, time.monotonic())
        self._loading = asyncio.Lock()

    def all(self) -> dict[str, SearchIndex]:
        """The indexes that are open, by name."""
        return dict(self._open)

    async def search(
        self,
        name: str,
        text: str | None,
        picture: Picture | None,
        not_text: str | None,
        k: int,
        pattern: str | None,
        client: str,
    ) -> list[Hit]:
        """The k best rows of an index; see `SearchIndex.search`.

        Args:
            name: one of `names`.
            text: what it should show.
            picture: a picture that it should be like.
            not_text: what it should not show.
            k: how many.
            pattern: which ids count.
            client: who asks.
        """
        await self._look_again(name)
        index = self._open[name]
        texts = list(dict.fromkeys(some for some in (text, not_text) if some))
        rows = await self._towers.embed([*texts, *([picture] if picture else [])], client)
        vectors = {some: row.vector for some, row in zip(texts, rows, strict=False)}
        query = Query(text, picture and "a picture", not_text)
        image = rows[-1].vector if picture else None
        (hits,) = await self._towers.in_thread(
            lambda: index.search_embedded([query], vectors, [image], k=k, path_filter=pattern)
        )
        return hits

    async def _look_again(self, name: str) -> None:
        """Opens an index again if its folder was replaced; one that cannot be opened leaves the old one in use."""
        if time.monotonic() - self._looked[name] < LOOK_AGAIN:
            return
        self._looked[name] = time.monotonic()
        async with self._loading:
            mark = _mark(self._folders[name])
            if mark is None or mark == self._marks[name]:
                return
            try:
                self._open[name] = await self._towers.in_thread(self._opened, name)
            except (OSError, ValueError) as error:
                logger.error("index %s was replaced, and what is there cannot be used: %s", name, error)
            else:
                logger.info("index %s was replaced and opened again", name)
            self._marks[name] = mark

    def _opened(self, name: str) -> SearchIndex:
        return SearchIndex.open(self._folders[name], embedder=self._towers.embedder)


def _mark(folder: str) -> Any:
    """What changes when an index is replaced or brought up to date; None while it is being replaced."""
    try:
        found = os.stat(Path(folder) / MANIFEST)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
