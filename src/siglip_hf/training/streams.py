"""Pairs drawn from a stream: shuffled, split over processes and workers, and taken up again in the middle of a shard.

The draws of a run are dealt out to lanes, a chunk to each in turn: as many lanes as there were readers (processes times
workers) when the run began, and chunks of a micro-batch, so that each reader has a lane for itself. What a lane yields
follows from the settings of the run and the shards alone; any process can read any lane from any place that is known.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from torch.utils.data import Dataset

from siglip_hf.data.sources import Record
from siglip_hf.data.streams import Stream, open_stream
from siglip_hf.training.pairs import Draw, Place, pair_of, stable_number

# A lane that finds nothing in so many passes over its shards will not find anything.
_MOST_EMPTY_EPOCHS = 100
# A broken picture is replaced by one of the first so many records of a shard.
_REPLACEMENTS = 100


class StreamedPairs:
    """The pairs of a stream: what `training_pairs` is for a source.

    Attributes:
        name: Of the stream.
        stream: The stream.
        unused: Nothing; what is left out is found on the way.
    """

    unused: Sequence[str] = ()

    def __init__(self, data: Any):
        self.stream: Stream = open_stream(data)
        self.name = self.stream.name

    def __iter__(self) -> Iterator[Record]:
        """All pairs, in the order of the shards."""
        return (pair for record in self.stream if not isinstance(pair := pair_of(record), str))

    def another(self, generator: random.Random) -> Record:
        """A record drawn at random, in place of one that is broken."""
        records = self.stream.records(generator.randrange(len(self.stream.shards)))
        found = deque(islice(records, 1 + generator.randrange(_REPLACEMENTS)), maxlen=1)
        if not found:
            return Record("a shard without records", error="it is empty")
        record = found[0][1]
        pair = pair_of(record)
        return Record(record.id, error=pair) if isinstance(pair, str) else pair


class StreamDraws(Dataset[Draw]):
    """The draws of a run, by number. They are cheap in rising order; each process that asks has readers of its own.

    An epoch of a lane is its part of the shards, in an order drawn anew each time: whole shards, and an equal share of
    each of those that are left over. The records of a block are shuffled among themselves.

    Args:
        pairs: What to draw from.
        seed: Of the order.
        block: Records of a block.
        lanes: Parts into which the stream is split.
        chunk: Draws that follow each other in one lane.

    Raises:
        ValueError: If a block has no record; while drawing, if no shard of a lane has a pair.

    Attributes:
        places: By lane, where the last draw that was used can be taken up; the user of the draws keeps it.
    """

    def __init__(self, pairs: StreamedPairs, seed: int, block: int, lanes: int, chunk: int):
        if block < 1:
            raise ValueError(f"A stream needs a buffer of at least 1 pair to shuffle in, not {block}.")
        self.pairs, self.seed, self.block, self.lanes, self.chunk = pairs, seed, block, lanes, chunk
        self.places: dict[int, Place] = {}
        self._readers: dict[int, tuple[int, Iterator[Draw]]] = {}
        self._unused: dict[str, str] = {}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes, as JSON has it."""
        places = {str(lane): list(place) for lane, place in self.places.items()}
        return {"lanes": self.lanes, "chunk": self.chunk, "places": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Splits the stream as the run that had this state, and knows its places."""
        self.lanes, self.chunk, self._readers = state["lanes"], state["chunk"], {}
        self.places = {int(lane): tuple(place) for lane, place in state["places"].items()}

    def __getitem__(self, number: int) -> Draw:
        turn, within = divmod(number, self.chunk)
        round_, lane = divmod(turn, self.lanes)
        wanted = round_ * self.chunk + within
        reached, draws = self._readers.get(lane, (math.inf, iter(())))
        if wanted < reached:
            place = self.places.get(lane, (0, 0, 0, 0))
            place = place if place[0] <= wanted else (0, 0, 0, 0)
            reached, draws = place[0], self._draws(lane, place)
        draw = next(islice(draws, wanted - int(reached), None))
        self._readers[lane] = wanted + 1, draws
        unused, self._unused = list(self._unused.items()), {}
        return draw._replace(number=number, unused=unused)

    def _draws(self, lane: int, place: Place) -> Iterator[Draw]:
        drawn, *start = place
        for _, epoch in groupby(self._walk(lane, *start), key=lambda found: found[0][0]):
            while block := list(islice(epoch, self.block)):
                place = (drawn, *block[0][0])
                drawn += len(block)
                random.Random(stable_number("block", self.seed, lane, place)).shuffle(block)
                while block:  # a record leaves memory when it is used
                    yield Draw(block.pop()[1], 0, place=(lane, place))

    def _walk(self, lane: int, epoch: int, part: int, first: int) -> Iterator[tuple[tuple[int, int, int], Record]]:
        """The pairs of a lane from a place on, each with its place, epoch after epoch."""
        empty = 0
        while empty < _MOST_EMPTY_EPOCHS:
            empty += 1
            for number, (shard, start, step) in enumerate(self._parts(lane, epoch)[part:], part):
                for place, record in self.pairs.stream.records(shard, first or start, step):
                    pair = pair_of(record)
                    if isinstance(pair, str):
                        self._unused[record.id] = pair
                    else:
                        empty = 0
                        yield (epoch, number, place), pair
                first = 0
            epoch, part = epoch + 1, 0
        reasons = [f"; {id_}: {reason}" for id_, reason in self._unused.items()]
        raise ValueError(f"{self.pairs.name}: no picture with a caption in its shards{''.join(reasons[:1])}")

    def _parts(self, lane: int, epoch: int) -> list[tuple[int, int, int]]:
        """Shards that a lane reads in an epoch, each from which record on and in which steps."""
        order = list(range(len(self.pairs.stream.shards)))
        random.Random(stable_number("shards", self.seed, epoch)).shuffle(order)
        whole = len(order) - len(order) % self.lanes
        share = self.lanes // math.gcd(len(order), self.lanes)  # so that the others make as many parts for each lane
        parts = [(shard, 0, 1) for shard in order[:whole]]
        for turn, shard in enumerate(order[whole:], epoch):  # turned, or one lane would always get the shorter parts
            parts += [(shard, (start + turn) % share, share) for start in range(share)]
        return parts[lane :: self.lanes]
