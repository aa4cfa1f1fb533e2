"""Records to the inputs of a model: pictures decoded and augmented, a caption chosen, broken pictures replaced.

Every random choice follows from the seed and the number of the draw, so that it does not depend on workers, processes,
or on where a run was interrupted.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from PIL import Image, ImageEnhance, ImageOps

from siglip_hf.data.embedder import draft_side, prepare_pictures
from siglip_hf.data.sources import Record, Source
from siglip_hf.preprocessing.image_intake import LARGE_PIXELS, PictureError, reduction
from siglip_hf.training.pairs import Draw, check_templates, picture_key, stable_number, texts_of
from siglip_hf.training.streams import StreamedPairs

#: What `augment` can do, in the order in which it is done.
AUGMENTATIONS = ("crop", "flip", "color")
#: How a caption is chosen where a picture has several.
CAPTION_CHOICES = ("random", "first")

# As a share of the picture's area, and width by height: mild, since a caption must go on being true of the crop.
_CROP_AREA, _CROP_RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
_COLOR_CHANGE = 0.2
# So many broken pictures in a row mean that something else is wrong, such as a disk that is gone.
_MOST_REPLACEMENTS = 100


class PictureEmbeddings(Protocol):
    """Embeddings of pictures that were computed before, such as an `ImageStore`."""

    def read(self, record: Record) -> torch.Tensor:
        """The embedding (E,) of a record's picture."""


class PairCollator:
    """Makes a training batch of draws.

    A picture that cannot be read is replaced by another pair of the source, drawn at random, so that all batches keep
    their size. It is named in the batch.

    Args:
        processor: A processor of this package.
        source: Where replacements come from; see `training_pairs` and `StreamedPairs`.
        seed: Of all random choices.
        augment: Any of "crop" (a random part of at least half the picture), "flip" (mirrored half of the time) and
            "color" (brightness, contrast and saturation changed by up to 20 %).
        captions: "random" chooses one of a picture's captions at each draw, "first" takes the first.
        templates: Texts with `{}` for the labels of pictures without captions.
        store: Stored embeddings that take the place of pictures.

    Raises:
        ValueError: For options that are not known, and for augmentation of stored embeddings.
    """

    def __init__(
        self,
        processor: Any,
        source: Source | StreamedPairs,
        *,
        seed: int = 0,
        augment: Sequence[str] = (),
        captions: str = "random",
        templates: str | Sequence[str] | None = None,
        store: PictureEmbeddings | None = None,
    ):
        unknown = [name for name in augment if name not in AUGMENTATIONS]
        if unknown:
            raise ValueError(f"augment={', '.join(unknown)} is not known; choose among {', '.join(AUGMENTATIONS)}.")
        if captions not in CAPTION_CHOICES:
            raise ValueError(f"captions={captions!r} is not known; choose among {', '.join(CAPTION_CHOICES)}.")
        if store is not None and augment:
            raise ValueError("Stored image embeddings cannot be augmented; leave out one of the two.")
        self.processor, self.source, self.seed, self.store = processor, source, seed, store
        self.augment, self.captions, self.templates = tuple(augment), captions, check_templates(templates)

    def __call__(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """A batch of as many pairs.

        Returns:
            The model's inputs (with a store, `image_embeds` (B, E) in place of pictures); `picture_keys` and
            `text_keys`, (B,) int64, equal for equal pictures and texts; `broken`, a list of (id, reason); of a stream
            also `lanes`, a place by lane.

        Raises:
            ValueError: If 100 pictures in a row are broken.
        """
        broken = [unused for draw in draws for unused in draw.unused]
        rest: list[tuple[str, int, str | None]] = []

        def pictures() -> Iterator[Any]:
            for draw in draws:
                picture, *others = self._example(draw, broken)
                rest.append(tuple(others))  # type: ignore[arg-type]
                yield picture
                del picture  # or it would lie in memory beside the next one

        if self.store is not None:
            images: Any = {"image_embeds": torch.stack(list(pictures()))}
        else:
            images = prepare_pictures(self.processor.image_processor, pictures())
        texts, keys, labels = zip(*rest, strict=True)
        batch: dict[str, Any] = {**self.processor(text=list(texts), return_tensors="pt"), **images}
        # Texts are alike if the model sees the same; labels are, in whatever template they come.
        text_keys = [
            stable_number("text", row) if label is None else stable_number("label", label)
            for row, label in zip(batch["input_ids"].tolist(), labels, strict=True)
        ]
        batch["picture_keys"], batch["text_keys"] = torch.tensor(keys), torch.tensor(text_keys)
        batch["broken"] = broken
        if lanes := dict(draw.place for draw in draws if draw.place is not None):
            batch["lanes"] = lanes
        return batch

    def _example(self, draw: Draw, broken: list[tuple[str, str]]) -> tuple[Any, str, int, str | None]:
        """Picture, text, key of the picture, and the label if that is where the text comes from."""
        generator = random.Random(stable_number("draw", self.seed, draw.number))
        record = draw.record
        for _ in range(_MOST_REPLACEMENTS):
            try:
                picture = self._picture(record, generator)
            except PictureError as error:
                broken.append((record.id, error.reason))
                record = self.source.another(generator)
                continue
            texts = texts_of(record, self.templates)
            text = texts[generator.randrange(len(texts))] if self.captions == "random" else texts[0]
            return picture, text, picture_key(record), None if record.captions else record.label
        raise ValueError(
            f"{self.source.name}: {_MOST_REPLACEMENTS} pictures in a row could not be read, at last "
            f"{broken[-1][0]}: {broken[-1][1]}"
        )

    def _picture(self, record: Record, generator: random.Random) -> Any:
        if self.store is not None:
            return self.store.read(record)
        side = draft_side(self.processor.image_processor)
        picture = record.load_picture(side)
        if self.augment and side and picture.width * picture.height > LARGE_PIXELS:
            picture = picture.reduce(reduction(picture.size, side))  # each change would copy all of it
        return augmented(picture, self.augment, generator)


class PictureCollator:
    """Makes a batch of the pictures of some records, for evaluation; a broken one is a blank that is marked as such."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, records: Sequence[tuple[int, Record]]) -> dict[str, Any]:
        """The model's inputs for the pictures; `places` (B,) int64 as given; `readable` (B,) bool; `broken`."""
        image_processor = self.processor.image_processor
        broken: dict[int, tuple[str, str]] = {}

        def pictures() -> Iterator[Image.Image]:
            for number, (_, record) in enumerate(records):
                try:
                    picture = record.load_picture(draft_side(image_processor))
                except PictureError as error:
                    broken[number] = (record.id, error.reason)
                    picture = Image.new("RGB", (32, 32), "gray")
                yield picture
                del picture  # or it would lie in memory beside the next one

        batch = prepare_pictures(image_processor, pictures())
        readable = torch.tensor([number not in broken for number in range(len(records))])
        places = torch.tensor([place for place, _ in records])
        return {**(batch or {}), "places": places, "readable": readable, "broken": list(broken.values())}


def augmented(picture: Image.Image, augment: Sequence[str], generator: random.Random) -> Image.Image:
    """The picture, changed at random by each of `augment`; see `PairCollator`."""
    if "crop" in augment:
        picture = picture.crop(_random_box(*picture.size, generator))
    if "flip" in augment and generator.random() < 0.5:
        picture = ImageOps.mirror(picture)
    if "color" in augment:
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            picture = change(picture).enhance(generator.uniform(1 - _COLOR_CHANGE, 1 + _COLOR_CHANGE))
    return picture


def _random_box(width: int, height: int, generator: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part; the whole if no shape fits."""
    for _ in range(10):
        area = generator.uniform(*_CROP_AREA) * width * height
        ratio = math.exp(generator.uniform(*map(math.log, _CROP_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.randint(0, width - w), generator.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height
