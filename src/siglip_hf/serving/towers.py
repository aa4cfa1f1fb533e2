"""Both towers of a model, behind a lane each: texts and pictures of many requests become embeddings in batches."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.parallel import one_torch_thread
from siglip_hf.preprocessing.image_intake import PictureError, load_picture, read_bytes
from siglip_hf.serving.batching import Lane
from siglip_hf.serving.settings import Settings

#: Formats that are decoded for strangers.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


@dataclass(frozen=True)
class Picture:
    """A picture of a request.

    Attributes:
        content: its file, or a data URI with it.
        index: its place in the request, for the message if it is broken.
    """

    content: bytes | str
    index: int = 0


class Embedding(NamedTuple):
    """What a tower made of a text or picture.

    Attributes:
        vector: float32 (D,), of length 1.
        tokens: tokens of the text without padding; 0 for a picture.
    """

    vector: np.ndarray
    tokens: int = 0


class Towers:
    """A model that many requests share.

    Attributes:
        embedder: the model.
        pictures: the lane of the image tower.
        texts: the lane of the text tower.
    """

    def __init__(
        self,
        embedder: SiglipEmbedder,
        settings: Settings,
        on_batch: Callable[[str, int, float], None] = lambda name, size, seconds: None,
    ) -> None:
        """Puts a model behind two lanes.

        Args:
            embedder: the model.
            settings: batch size, wait and limits.
            on_batch: called with "pictures" or "texts", the size and the seconds of each batch.
        """
        self.embedder = embedder
        self._most_pixels = settings.limits.pixels
        tokenizer = embedder.processor.tokenizer
        self._pad_id, self._is_pad_end = tokenizer.pad_token_id, tokenizer.pad_token_id == tokenizer.eos_token_id
        # One thread, as a tower uses all cores or the whole accelerator: two batches at once would only be slower.
        self._computer = ThreadPoolExecutor(1, "siglip-tower")
        self._decoders = ThreadPoolExecutor(embedder.workers, "siglip-decode", initializer=one_torch_thread)
        shared: dict[str, Any] = {
            "batch_size": embedder.batch_size,
            "wait": settings.wait,
            "capacity": settings.limits.queued,
            "on_batch": on_batch,
        }
        self.pictures = Lane(
            "pictures",
            self._encode_pictures,
            self._computer,
            prepare=self._prepare_picture,
            preparers=self._decoders,
            **shared,
        )
        self.texts = Lane("texts", self._encode_texts, self._computer, **shared)

    def close(self) -> None:
        """Ends the threads, when they have done what they do."""
        self._computer.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)

    async def embed(self, items: Sequence[str | Picture], client: str = "") -> list[Embedding]:
        """Embeddings of texts and pictures, in their order.

        Args:
            items: strings, and pictures.
            client: who asks; clients take turns.

        Raises:
            PictureError: for the first picture that cannot be read, with its place.
            Problem: if too much waits already.
        """
        places: dict[Lane, list[int]] = {self.texts: [], self.pictures: []}
        for place, item in enumerate(items):
            places[self.pictures if isinstance(item, Picture) else self.texts].append(place)
        results: list[Any] = [None] * len(items)

        async def through(lane: Lane) -> None:
            rows = await lane.submit([items[place] for place in places[lane]], client)
            for place, row in zip(places[lane], rows, strict=True):
                results[place] = row

        try:
            async with asyncio.TaskGroup() as group:  # what one lane refuses, the other need not do
                for lane in places:
                    group.create_task(through(lane))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return results

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function that takes long, called where pictures are decoded."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function, *arguments)

    def _prepare_picture(self, picture: Picture) -> dict[str, torch.Tensor]:
        try:
            content = picture.content if isinstance(picture.content, bytes) else read_bytes(picture.content)
            _check_header(content, self._most_pixels)
            inputs = self.embedder.prepare_images(_decoded(content, self.embedder.draft_to))
        except PictureError as error:
            raise PictureError(error.reason, "as it was sent", picture.index) from error
        assert inputs is not None
        return inputs

    @staticmethod
    def _joined(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([item[name] for item in items]) for name in items[0]}

    def _encode_pictures(self, items: list[dict[str, torch.Tensor]]) -> list[Embedding]:
        return [Embedding(row) for row in self.embedder.encode_images(self._joined(items))]

    def _encode_texts(self, texts: list[str]) -> list[Embedding]:
        input_ids = self.embedder.prepare_texts(texts)  # (B, L)
        places = torch.arange(1, input_ids.shape[1] + 1)
        tokens = (places * (input_ids != self._pad_id)).amax(dim=1)  # up to the last that is no padding
        if self._is_pad_end:  # SigLIP pads with the token that ends a text, and one of those counts
            tokens = (tokens + 1).clamp(max=input_ids.shape[1])
        rows = self.embedder.encode_ids(input_ids)
        return [Embedding(row, count) for row, count in zip(rows, tokens.tolist(), strict=True)]


def _decoded(content: bytes, draft_to: int | None) -> Iterator[Image.Image]:
    """The picture, decoded when it is asked for: then its pixels count among those that are held."""
    yield load_picture(content, draft_to=draft_to)


def _check_header(content: bytes, most: int) -> None:
    """Refuses by its header a picture of too many pixels, or of an odd format; the decoder refuses what has none."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            (width, height), form = image.size, image.format
    except Exception:  # a broken header makes Pillow raise nearly anything, and the decoder has the words for it
        return
    if form not in FORMATS:  # Pillow knows many more, and hands some to other programs
        raise PictureError(f"the format {form} is not taken; send a JPEG, PNG or WebP")
    if width * height > most:
        raise PictureError(f"it has {width} x {height} pixels; at most {most / 1e6:g} million are taken")
