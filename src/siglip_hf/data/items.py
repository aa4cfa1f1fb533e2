"""What there is to embed in a source, item by item, and the loop that embeds items: on this machine or in an actor."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from siglip_hf.data.shards import TarMember
from siglip_hf.data.sources import DatasetCell, Record, Source
from siglip_hf.data.store import tar_path
from siglip_hf.files import read_regular_file, sha256
from siglip_hf.preprocessing.image_intake import LARGE_PIXELS, load_picture, read_bytes

if TYPE_CHECKING:
    from siglip_hf.data.embedder import SiglipEmbedder

Batch = tuple[list[dict[str, Any]], np.ndarray]


class Item(NamedTuple):
    """What becomes a row: a picture, or one text of a record.

    Attributes:
        id: the row's id.
        record: where it comes from.
        text: the text; None for a picture.
    """

    id: str
    record: Record
    text: str | None = None

    def stamp(self) -> str | None:
        """What changes when the content does, without reading it; None if nothing tells."""
        image = self.record.image
        if self.text is not None:
            return sha256([self.text.encode()])[:16]
        if isinstance(image, DatasetCell):
            return getattr(image.dataset, "_fingerprint", None)
        try:
            if self.record.error is not None:
                return None
            if isinstance(image, TarMember):
                return f"{image.size}@{image.offset}:{os.stat(image.path).st_mtime_ns}"
            if self.record.path is None:  # a URL
                return None
            stat = os.stat(self.record.path)
        except (OSError, ValueError):  # reading says what is wrong
            return None
        return f"{stat.st_size}:{stat.st_mtime_ns}"

    def content(self) -> Any:
        """The bytes of the file or of the text, or an array.

        Raises:
            OSError: if they cannot be read, are not those of a regular file, or are too many.
            ValueError: if the source holds no usable record here.
        """
        if self.text is not None:
            return self.text.encode()
        if self.record.path is not None and self.record.error is None:
            return read_regular_file(self.record.path)
        value = self.record.read()
        is_encoded = isinstance(value, str | bytes | dict)
        return read_bytes(value) if is_encoded else np.asarray(value)

    def sha256(self) -> str | None:
        """Hash of the content; None if it cannot be read."""
        try:
            return _sha256(self.content())
        except (OSError, ValueError):
            return None

    def row(self) -> dict[str, Any]:
        """The row of a text without its embedding; with an error if the source holds none here."""
        if self.text is None:
            return {"id": self.id, "error": self.record.error}
        return {"id": self.id, "stamp": self.stamp(), "sha256": self.sha256(), "text": self.text}

    def read(self, draft_to: int | None) -> tuple[dict[str, Any], Image.Image | None]:
        """The row without its embedding, and the picture; None if it is broken, then the row has the error."""
        image = self.record.image
        path = tar_path(image) if isinstance(image, TarMember) else image if isinstance(image, str) else None
        row: dict[str, Any] = {
            "id": self.id,
            "path": os.path.abspath(self.record.path) if self.record.path is not None else path,
            "stamp": self.stamp(),  # before reading: what is written meanwhile makes a difference next time
        }
        try:
            content = self.content()
            row["sha256"] = _sha256(content)
            picture = load_picture(content, draft_to=draft_to)
        except (OSError, ValueError) as error:
            row["error"] = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
            return row, None
        row["width"], row["height"] = _full_size(content, picture)
        return row, picture


def embed_items(embedder: SiglipEmbedder, items: Sequence[Item]) -> Iterator[Batch]:
    """Rows and embeddings, a batch at a time, in the order of the items."""
    size = embedder.batch_size
    if any(item.text is not None for item in items):
        batches = (items[start : start + size] for start in range(0, len(items), size))
        yield from embedder.encode_texts_ahead(
            ([item.row() for item in batch], [item.text for item in batch if item.text is not None])
            for batch in batches
        )
        return

    draft_to = embedder.draft_to

    def prepare(chunk: Sequence[Item]) -> tuple[list[dict[str, Any]], Any]:
        rows: list[dict[str, Any]] = []

        def pictures() -> Iterator[Image.Image]:
            for item in chunk:
                row, picture = item.read(draft_to)
                rows.append(row)
                if picture is not None:
                    yield picture
                    del picture  # or it would lie in memory beside the next one

        inputs = embedder.prepare_images(pictures())
        return rows, inputs

    for chunks, embeddings in embedder.encode_ahead(items, prepare):
        yield [row for rows in chunks for row in rows], embeddings


def items_of(source: Source, kind: str) -> list[Item]:
    """What there is to embed in a source: its pictures, or the captions of its records, each one.

    Raises:
        ValueError: if two have the same id.
    """
    items = []
    for record in source:
        if kind == "image" or record.error is not None:
            items.append(Item(record.id, record))
        else:
            many = len(record.captions) > 1
            items += [
                Item(f"{record.id}#{n}" if many else record.id, record, text) for n, text in enumerate(record.captions)
            ]
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(
                f"{source.name}: two entries are called {item.id!r}; embed their folders into one folder each."
            )
        seen.add(item.id)
    return items


def _sha256(content: Any) -> str:
    return sha256([content if isinstance(content, bytes) else np.ascontiguousarray(content)])


def _full_size(content: Any, picture: Image.Image) -> tuple[int, int]:
    """Width and height before any reduction while decoding, upright."""
    if not isinstance(content, bytes):
        return picture.size
    if picture.width * picture.height * 64 <= LARGE_PIXELS:  # even an eighth of a side of a large one is more
        return picture.size
    with Image.open(io.BytesIO(content)) as header:
        width, height = header.size
    if (width > height) != (picture.width > picture.height):  # turned by its EXIF tag
        width, height = height, width
    return width, height
