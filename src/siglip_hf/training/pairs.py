"""Pairs of a picture and a text: which ones a source has, in what order they are drawn, and which of them are alike."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from siglip_hf.data.sources import Record, Source, open_source
from siglip_hf.inference.label_bank import parse_templates
from siglip_hf.inference.pipeline import DEFAULT_TEMPLATE
from siglip_hf.preprocessing.text_cleaning import label_words

#: Where a lane of a stream is taken up: so many draws were made before, and the next block begins in this epoch, at
#: this part of its shards, at this record.
Place = tuple[int, int, int, int]


class Draw(NamedTuple):
    """One pair to be made.

    Attributes:
        record: What it is made of.
        number: Which draw of the run it is; all its random choices follow from that.
        unused: Id and reason of records that a stream has passed over on the way to this one.
        place: Lane of a stream, and where it can be taken up again; see `siglip_hf.training.streams`.
    """

    record: Record
    number: int
    unused: Sequence[tuple[str, str]] = ()
    place: tuple[int, Place] | None = None


def training_pairs(data: Any) -> Source:
    """The records of a source that have a picture and a text: captions, or else a label.

    Args:
        data: A `Source`, or what `open_source` takes, such as a `datasets.Dataset` or a folder.

    Returns:
        A source. Captions of nothing but punctuation or spaces are dropped, and `unused` names each record that has no
        picture or no text left.

    Raises:
        ValueError: If no pair is left, or if a class folder has no pictures while labels are all the texts there are.
    """
    source = data if isinstance(data, Source) else open_source(data)
    records, unused = [], list(source.unused)
    for record in source:
        pair = pair_of(record)
        if isinstance(pair, str):
            unused.append(f"{record.id}: {pair}")
        else:
            records.append(pair)
    if not records:
        source.require("image", "captions")  # says what a source needs, unless all captions were without words
        raise ValueError(f"{source.name}: no caption of {len(source)} entries holds a word.")
    if not any(record.captions for record in records):
        empty = [line.partition(":")[0] for line in source.unused if line.endswith("a folder without pictures")]
        if empty:
            raise ValueError(f"{source.name}: no pictures in {', '.join(empty)}. Add some, or remove the class folder.")
    return Source(source.name, records, unused)


def pair_of(record: Record) -> Record | str:
    """A record with the captions that hold a word, or why it is no pair."""
    captions = tuple(caption for caption in record.captions if _has_words(caption))
    if record.error is not None:
        return record.error
    if record.image is None:
        return "no picture"
    if not captions and record.label is None:
        return "a caption without words" if record.captions else "no caption"
    return record if captions == record.captions else replace(record, captions=captions)


def texts_of(record: Record, templates: Sequence[str]) -> tuple[str, ...]:
    """A record's captions, or its label in each template if it has none."""
    if record.captions or record.label is None:
        return record.captions
    return tuple(template.format(label_words(record.label)) for template in templates)


def check_templates(templates: str | Sequence[str] | None) -> tuple[str, ...]:
    """Templates for labels, the usual ones if none are given."""
    return parse_templates(templates or DEFAULT_TEMPLATE)


def picture_key(record: Record) -> int:
    """A 64-bit number that two records share if they hold the same picture."""
    # A picture inside a dataset is known by its row; files and members of tar files by their place.
    place = record.image if isinstance(record.image, str | tuple) else record.id
    return stable_number("picture", place)


def stable_number(*parts: object) -> int:
    """A number below 2^63 that follows from its arguments, the same in every process and version of Python."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def _has_words(caption: str) -> bool:
    """Whether anything is left without punctuation, spaces and control characters."""
    return any(unicodedata.category(character)[0] not in "PZC" for character in caption)


class PairSampler(Sampler[tuple[int, int]]):
    """Places in the source and numbers of draws, in an order that depends on seed and epoch alone.

    An epoch shows each pair at least once and consists of whole batches: the last one is filled up with pairs of
    another random order. So the batches are the same ones for any number of processes.

    Args:
        size: Number of pairs of the source.
        batch_size: Pairs of an optimizer step, over all processes and micro-batches.
        seed: Of the order.
        epoch: Tells the current epoch whenever an iteration starts, also in the middle of a run; None after its end,
            which makes the iteration empty: the Trainer would take one more step when it goes on with a finished run.
    """

    def __init__(self, size: int, batch_size: int, seed: int, epoch: Callable[[], int | None]):
        self.size, self.seed, self.epoch = size, seed, epoch
        self.steps = -(-size // batch_size)
        self.length = self.steps * batch_size

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch()
        if epoch is None:
            return
        start = epoch * self.length
        for place in range(self.length):
            around, within = divmod(place, self.size)
            if within == 0:
                generator = torch.Generator().manual_seed(stable_number("order", self.seed, epoch, around))
                order = torch.randperm(self.size, generator=generator).tolist()
            yield order[within], start + place


def positive_groups(picture_keys: Tensor, text_keys: Tensor) -> Tensor | None:
    """Numbers that tell which pairs are positives of each other, for `sigmoid_loss(positives=)`.

    Two pairs are in one group if they share the picture or the text, or are linked by pairs that do.

    Args:
        picture_keys: (B,) integers, equal for equal pictures.
        text_keys: (B,) integers, equal for equal texts.

    Returns:
        (B,) int64, the place of the first pair of each group, or None if every pair stands alone.
    """
    batch = len(picture_keys)
    groups = torch.arange(batch)
    links = [keys.unique(return_inverse=True) for keys in (picture_keys, text_keys)]
    if all(len(distinct) == batch for distinct, _ in links):
        return None
    while True:
        before = groups
        for distinct, place in links:
            lowest = torch.full((len(distinct),), batch).scatter_reduce_(0, place, groups, "amin")
            groups = lowest[place]
        if torch.equal(groups, before):
            return groups
