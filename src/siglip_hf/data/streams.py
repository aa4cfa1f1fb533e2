"""Sources that are read from front to back and never listed: tar shards and tables of any number and size.

A `Stream` knows the names of its shards and reads one of them from any place. Who draws from it, in what order, and
where it goes on after a kill is up to the reader; see `siglip_hf.training.streams`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siglip_hf.data.shards import tar_groups
from siglip_hf.data.sources import (
    Columns,
    Record,
    cell_place,
    checked,
    expand,
    import_datasets,
    json_row,
    row_record,
    tar_record,
)

if TYPE_CHECKING:
    from datasets import IterableDataset

_SUFFIXES = (".tar", ".jsonl", ".parquet")
# Rows of a table in memory at a time, and those of a JSONL file among which its columns are looked for.
_ROWS, _ROWS_WITH_COLUMNS = 16, 100


@dataclass(frozen=True)
class Held:
    """A picture in memory, as a row of a stream has it: bytes, a dict with bytes or a path, or a PIL image."""

    content: Any = field(repr=False)

    def read(self) -> Any:
        """The content."""
        return self.content


class Stream:
    """Records in shards, each in a fixed order.

    Attributes:
        name: What it was opened from.
        shards: Names of the shards.
        stamp: What tells it from other data: names and sizes, if they are files.
    """

    name: str
    shards: Sequence[str]
    stamp: str

    def records(self, shard: int, first: int = 0, step: int = 1) -> Iterator[tuple[int, Record]]:
        """Every `step`-th record of a shard from place `first` on, with its place.

        What cannot be read is a record with an `error`, and so is the rest of a shard that is damaged, cut off or gone.
        Places without picture and text are passed over.

        Args:
            shard: number of the shard.
            first: place of the first record.
            step: from one record to the next.
        """
        place = first
        try:
            for place, record in self._read(shard, first, step):
                if record is not None:
                    yield place, checked(record)
        except (OSError, ValueError) as error:  # one shard of many; pyarrow's errors are among these
            reason = str(error).partition("\n")[0]
            yield place, checked(Record(self.shards[shard], error=f"read until record {place}: {reason}"))

    def _read(self, shard: int, first: int, step: int) -> Iterator[tuple[int, Record | None]]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Record]:
        """All records, in the order of the shards."""
        return (record for shard in range(len(self.shards)) for _, record in self.records(shard))


class _TarStream(Stream):
    """WebDataset shards. A record holds the place of its picture, which is read when it is needed."""

    def __init__(self, name: str, paths: Sequence[str], columns: Columns):
        self.name, self.paths, self.columns = name, paths, columns
        self.shards, self.stamp = [Path(path).name for path in paths], _stamp(paths)

    def _read(self, shard: int, first: int, step: int) -> Iterator[tuple[int, Record | None]]:
        path, several = self.paths[shard], len(self.paths) > 1
        for number, (key, parts) in islice(enumerate(tar_groups(path)), first, None, step):
            yield number, tar_record(path, key, parts, self.columns, several)


class _LineStream(Stream):
    """JSONL files, a row in each line, which name their pictures."""

    def __init__(self, name: str, paths: Sequence[str], columns: Columns):
        self.name, self.paths, self.folder = name, paths, Path(paths[0]).parent
        self.shards, self.stamp = [Path(path).name for path in paths], _stamp(paths)
        rows = [row for _, row in islice(self._rows(0), _ROWS_WITH_COLUMNS) if isinstance(row, dict)]
        self.columns = columns.among(list(dict.fromkeys(column for row in rows for column in row)), name)

    def _rows(self, shard: int, first: int = 0, step: int = 1) -> Iterator[tuple[int, dict[str, Any] | str | None]]:
        # What is not UTF-8 is found in the row that has it.
        with open(self.paths[shard], encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in islice(enumerate(file), first, None, step):
                yield number, json_row(number + 1, line)

    def _read(self, shard: int, first: int, step: int) -> Iterator[tuple[int, Record | None]]:
        for number, row in self._rows(shard, first, step):
            id_ = f"{self.shards[shard]}:{number}"
            if isinstance(row, dict):
                yield number, row_record(row, self.columns, self._image, id_)
            else:
                yield number, None if row is None else Record(id_, error=row)

    def _image(self, row: Any) -> str | None:
        return cell_place(row.get(self.columns.image), self.folder)


class _DatasetStream(Stream):
    """A `datasets.IterableDataset`; a record holds its picture, undecoded."""

    def __init__(self, data: IterableDataset, columns: Columns, name: str, folder: Path, stamp: str = ""):
        image = import_datasets().Image
        present = data.column_names or list(next(iter(data.iter(1)), {}))
        self.columns = columns.among(present, name)
        features = data.features or {}
        if isinstance(features.get(self.columns.image), image):
            data = data.cast_column(self.columns.image, image(decode=False))
        self._label = getattr(features.get(self.columns.label), "int2str", None)
        self._data = data.select_columns([column for column in self.columns if column is not None])
        self.name, self.folder = name, folder
        self.shards = [f"shard-{number}" for number in range(data.num_shards)]
        self.stamp = stamp or f"{len(self.shards)} {present}"

    def _read(self, shard: int, first: int, step: int) -> Iterator[tuple[int, Record | None]]:
        rows = self._data.shard(len(self.shards), shard).skip(first)
        for number, row in islice(enumerate(_rows(rows), first), 0, None, step):
            column = self.columns.label
            if self._label is not None and column is not None and row[column] is not None:
                row[column] = self._label(row[column])
            yield number, row_record(row, self.columns, self._image, f"{self.shards[shard]}:{number}")

    def _image(self, row: Any) -> Any:
        value = row[self.columns.image]
        return cell_place(value, self.folder) if isinstance(value, str) or value is None else Held(value)


def _rows(data: IterableDataset) -> Iterator[dict[str, Any]]:
    # In batches: iterated over row by row, a dataset deals its shards out to the workers of a DataLoader by itself.
    for batch in data.iter(_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _stamp(paths: Iterable[str]) -> str:
    return repr([(Path(path).name, os.path.getsize(path)) for path in paths])


def is_streamed(data: Any) -> bool:
    """Whether this is a `Stream`, or a dataset of `datasets` that is one."""
    return isinstance(data, Stream) or (hasattr(data, "column_names") and not hasattr(data, "__len__"))


def open_stream(
    data: str | os.PathLike[str] | Iterable[str] | IterableDataset | Stream,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
) -> Stream:
    """Tar shards (WebDataset) or tables to be read from front to back.

    Args:
        data: Paths and globs of `.tar` files, of `.jsonl` files, or of `.parquet` files, which `datasets` reads; or an
            `IterableDataset` of it. Pictures are encoded in a table, or named from the folder of the first table (of a
            dataset, from the current folder).
        image_column: As for `open_source`.
        caption_column: As for `open_source`.
        label_column: As for `open_source`.

    Raises:
        ValueError: If it is of another kind, or has no such column.
        FileNotFoundError: If a shard is not there.
    """
    if isinstance(data, Stream):
        return data
    columns = Columns(image_column, caption_column, label_column)
    if is_streamed(data):
        return _DatasetStream(data, columns, "the dataset", Path())  # type: ignore[arg-type]
    given = [os.fspath(data)] if isinstance(data, str | os.PathLike) else [os.fspath(path) for path in data]  # type: ignore[union-attr]
    name = given[0] if len(given) == 1 else f"{len(given)} sources"
    paths = [match for path in given for match in expand(path)]
    suffixes = {os.path.splitext(path)[1].lower() for path in paths}
    suffix = next(iter(suffixes), "")
    if len(suffixes) != 1 or suffix not in _SUFFIXES:
        raise ValueError(
            f"{name} cannot be streamed; give files of one kind: {', '.join(_SUFFIXES)}. Without stream, others can be "
            "read too."
        )
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file or folder'}")
    if suffix != ".parquet":
        return (_TarStream if suffix == ".tar" else _LineStream)(name, paths, columns)
    rows = import_datasets().load_dataset("parquet", data_files=paths, split="train", streaming=True)
    return _DatasetStream(rows, columns, name, Path(paths[0]).parent, _stamp(paths))
