"""Embeddings on disk: Parquet shards with a manifest, written so that a run may be killed at any moment.

A folder of embeddings holds

- `manifest.json`: what the numbers are (see `Manifest`), whether the last run came to its end, and checksums of the
  parts and of itself;
- `part-00000.parquet`, ...: the rows, columns as in `COLUMNS`;
- while a run is going on, `batch-000000-CHECKSUM.parquet`, ...: finished batches that are not yet in a part.

Every file is written beside its place and renamed into it. A batch is safe from the moment its file has its name; when
a part is full, its batches are joined to it and removed. Killed between these two steps, a batch is in both places,
which its ids tell. Parts end where a batch ends, so that an interrupted run gives the same files as an unbroken one.
The checksum of a part is noted before the part takes its place, and that of the part before it is kept until then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from siglip_hf.data.shards import TarMember
from siglip_hf.extras import missing
from siglip_hf.files import new_file, only_run, read_sealed_json, sha256, sha256_of_files, write_sealed_json

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 2  # 1 had no checksums; it is still read
MANIFEST = "manifest.json"
#: Rows after which a part is closed: 12 MB of fp16 at 768 dimensions.
PART_ROWS = 8192
#: Columns beside `embedding`, with their Parquet types.
#:
#: - `id`: unique, and the same each time the source is opened.
#: - `path`: absolute path or URL of the picture; "x.tar?offset=1&size=2" inside a tar file; null if it has none
#:   (`picture_at` reads all of them).
#: - `width`, `height`: in pixels, upright; null for texts.
#: - `sha256`: of the file's bytes or the text's UTF-8; null if they could not be read.
#: - `stamp`: tells cheaply whether the source changed: "size:mtime" of a file, the fingerprint of a dataset, ...
#: - `text`: what was embedded, for texts.
#: - `error`: what is wrong; the embedding is null then.
COLUMNS = {
    "id": "string",
    "path": "string",
    "width": "int32",
    "height": "int32",
    "sha256": "string",
    "stamp": "string",
    "text": "string",
    "error": "string",
}

_PART = re.compile(r"part-(\d{5,})\.parquet")
_BATCH = re.compile(r"batch-(\d{6,})(?:-([0-9a-f]{16}))?\.parquet")
_TAR_MEMBER = re.compile(r"(?P<path>.+)\?offset=(?P<offset>\d+)&size=(?P<size>\d+)")


def import_pyarrow() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing("embeddings on disk need pyarrow", "search") from error
    return pyarrow, pyarrow.parquet


@dataclass(frozen=True)
class Manifest:
    """What a folder of embeddings holds.

    Attributes:
        kind: what was embedded, "image" or "text".
        model: folder or name of the checkpoint, as it was given.
        model_sha256: SHA-256 of its weights; equal for equal models wherever they lie.
        preprocessing: settings of the image processor or the tokenizer.
        dimension: D, length of an embedding.
        dtype: "float16" or "float32", of the stored numbers.
        compute_dtype: dtype of the tower.
        normalized: each embedding has length 1 (up to the rounding of `dtype`).
        part_rows: rows after which a part is closed.
        complete: the last run came to its end.
        rows: number of rows, if complete.
        errors: number of rows without an embedding among them.
        parts: rows of each part by name, if complete.
        checksums: SHA-256 of each part by name; two while it is being replaced, of the part before and after.
        format_version: of this layout.
    """

    kind: Literal["image", "text"]
    model: str
    model_sha256: str
    preprocessing: Mapping[str, Any]
    dimension: int
    dtype: Literal["float16", "float32"]
    compute_dtype: str
    normalized: bool = True
    part_rows: int = PART_ROWS
    complete: bool = False
    rows: int = 0
    errors: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)
    checksums: Mapping[str, Sequence[str]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Manifest:
        """The manifest of a folder.

        Args:
            folder: a folder of embeddings, finished or not.

        Raises:
            ValueError: if there is none, or not one that this version reads.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} holds no embeddings: there is no {MANIFEST}. `siglip-hf embed` makes them.")
        try:
            content = read_sealed_json(path)
            version = content.get("format_version")
            if version not in (1, FORMAT_VERSION):
                raise ValueError(f"it has format version {version!r}, and this package reads {FORMAT_VERSION}")
            if version != 1 and "checksum" not in content:
                raise ValueError("its checksum is missing")
            content.pop("checksum", None)
            manifest = cls(**content)
            if manifest.dtype not in ("float16", "float32") or type(manifest.dimension) is not int:
                raise ValueError(f"vectors of {manifest.dimension!r} numbers of type {manifest.dtype!r} are not known")
            if manifest.complete and sum(manifest.parts.values()) != manifest.rows:
                raise ValueError(f"its parts hold {sum(manifest.parts.values())} rows, not {manifest.rows}")
            if not all(map(_PART.fullmatch, manifest.parts)):
                raise ValueError(f"its parts are called {', '.join(manifest.parts)}")
            return manifest
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged, or no manifest of embeddings: {error}. Embed into another folder."
            ) from error

    def difference(self, other: Manifest) -> str | None:
        """In words, why rows of `other` cannot be added to a folder with this manifest; None if they can."""
        for name in ("kind", "model_sha256", "preprocessing", "dimension", "dtype", "compute_dtype", "normalized"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                if name == "model_sha256":
                    return f"the weights of {self.model}, not those of {other.model}"
                return f"{name}={mine!r}, not {theirs!r}"
        return None


class EmbeddingStore:
    """A finished folder of embeddings, for reading.

    Attributes:
        path: the folder.
        manifest: what it holds.

    Examples:
        >>> from siglip_hf.search import EmbeddingStore, embed_source
        >>> made = embed_source("drawings", "drawings.emb")
        >>> store = EmbeddingStore.open("drawings.emb")
        >>> for rows, vectors in store.iter_batches():
        ...     print(rows.num_rows, vectors.shape)
        24 (24, 192)
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @property
    def has_checksums(self) -> bool:
        """Whether damage can be found; not in folders of earlier versions, until `siglip-hf embed` has run there."""
        return self.manifest.format_version > 1

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> EmbeddingStore:
        """Opens a folder that `siglip-hf embed` wrote to its end, and compares all files with their checksums.

        Args:
            path: the folder.

        Raises:
            ValueError: if it holds no embeddings, the run that writes it has not finished, or parts are damaged.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        if not manifest.complete:
            raise ValueError(f"{path} is not finished: run `siglip-hf embed` once more, it goes on where it stopped.")
        store = cls(path, manifest)
        for name, rows in manifest.parts.items():
            sums = manifest.checksums.get(name, ()) if store.has_checksums else None
            if _checksum(path / name, sums) is None or (sums is None and _count_rows(path / name) != rows):
                raise ValueError(
                    f"{path} is damaged: {name} is missing or damaged. Run `siglip-hf embed` again to rebuild it."
                )
        return store

    def __len__(self) -> int:
        """Number of embeddings; rows with an error are not counted."""
        return self.manifest.rows - self.manifest.errors

    def iter_batches(self, columns: Sequence[str] | None = None) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """The rows that have an embedding, a part at a time.

        Args:
            columns: columns of the table; all but `embedding` and `error` by default.

        Yields:
            A table of n rows, and their embeddings (n, D) as float32.
        """
        wanted = list(columns) if columns is not None else [name for name in COLUMNS if name != "error"]
        for name in self.manifest.parts:
            table = _read(self.path / name, [*wanted, "embedding"])
            table = table.filter(table["embedding"].is_valid())
            if len(table):
                yield table.select(wanted), to_array(table["embedding"], self.manifest.dimension)

    def vectors(self) -> np.ndarray:
        """All embeddings, float32 (N, D), in the order of `rows`."""
        parts = [vectors for _, vectors in self.iter_batches([])]
        return np.concatenate(parts) if parts else np.empty((0, self.manifest.dimension), np.float32)

    def mapped_vectors(self) -> np.ndarray:
        """As `vectors`, in a file that the system may take out of memory; it is gone when the array is."""
        if not len(self):
            return self.vectors()
        with tempfile.TemporaryFile(dir=self.path) as file:
            mapped = np.memmap(file, np.float32, "w+", shape=(len(self), self.manifest.dimension))
        start = 0
        for _, vectors in self.iter_batches([]):
            mapped[start : start + len(vectors)] = vectors
            start += len(vectors)
        return mapped

    def stamps(self) -> dict[str, str | None]:
        """The stamp of each row by its id, also of those without an embedding."""
        tables = [_read(self.path / name, ["id", "stamp"]) for name in self.manifest.parts]
        return {id_: stamp for table in tables for id_, stamp in zip(*table.to_pydict().values(), strict=True)}

    def rows(self, columns: Sequence[str] | None = None) -> pa.Table:
        """A table of all rows that have an embedding, without it; `columns` as in `iter_batches`."""
        pa, _ = import_pyarrow()
        tables = [table for table, _ in self.iter_batches(columns)]
        if tables:
            return pa.concat_tables(tables)
        wanted = list(columns) if columns is not None else [name for name in COLUMNS if name != "error"]
        return _schema(self.manifest).empty_table().select(wanted)

    def errors(self) -> list[tuple[str, str]]:
        """Id and error of each row that has no embedding."""
        found: list[tuple[str, str]] = []
        for name in self.manifest.parts if self.manifest.errors else ():
            table = _read(self.path / name, ["id", "error"])
            table = table.filter(table["error"].is_valid())
            found += zip(table["id"].to_pylist(), table["error"].to_pylist(), strict=True)
        return found


def picture_at(path: str) -> str | bytes:
    """What the column `path` names, as `load_picture` takes it.

    Raises:
        OSError: if it lies in a tar file that cannot be read.
    """
    member = _TAR_MEMBER.fullmatch(path)
    if member is None or os.path.exists(path):
        return path
    return TarMember(member["path"], int(member["offset"]), int(member["size"])).read()


def tar_path(member: TarMember) -> str:
    """The inverse of `picture_at` for a file inside a tar file."""
    return f"{os.path.abspath(member.path)}?offset={member.offset}&size={member.size}"


def to_array(column: pa.ChunkedArray | pa.Array, dimension: int) -> np.ndarray:
    """A column of embeddings without nulls as float32 (n, D)."""
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    arrays = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension) for chunk in chunks]
    return np.concatenate(arrays).astype(np.float32) if arrays else np.empty((0, dimension), np.float32)


class EmbeddingWriter(contextlib.AbstractContextManager["EmbeddingWriter"]):
    """Adds rows to a folder of embeddings; one writer at a time.

    Attributes:
        path: the folder.
        manifest: as it was found, or as it was begun.
        known: stamp of each row by its id.
        unread: ids of the rows whose content could not be read.
        damaged: names of the files that were damaged or missing; they are removed, so that their rows are rebuilt.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: Manifest) -> None:
        """Begins a folder or goes on with one.

        Raises:
            ValueError: if the folder holds something else, or embeddings that these cannot be added to.
            OSError: if another process writes to it.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; give a folder to write embeddings to")
        with contextlib.ExitStack() as stack:
            stack.enter_context(only_run(self.path))
            self._open(manifest)
            self._closing = stack.pop_all()

    def _open(self, manifest: Manifest) -> None:
        for leftover in self.path.glob(".*.partial"):
            leftover.unlink()
        is_old = False
        if (self.path / MANIFEST).exists():
            self.manifest = Manifest.read(self.path)
            if difference := self.manifest.difference(manifest):
                raise ValueError(f"{self.path} holds embeddings with {difference}; give another folder, or remove it.")
            is_old = self.manifest.format_version == 1
        elif any(entry.name != ".lock" for entry in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no embeddings; give another folder.")
        else:
            self.manifest = dataclasses.replace(manifest, complete=False, rows=0, errors=0, parts={}, checksums={})
            self._save()
        self.known: dict[str, str | None] = {}
        self.unread: set[str] = set()
        self.damaged = [name for name in self.manifest.parts if not (self.path / name).exists()]
        self._files: dict[Path, list[str]] = {}  # ids of each part and batch, in order
        checksums: dict[str, list[str]] = {}
        for file in sorted(self.path.iterdir(), key=lambda file: (_BATCH.fullmatch(file.name) is not None, file.name)):
            batch = _BATCH.fullmatch(file.name)
            if batch is None and not _PART.fullmatch(file.name):
                continue
            sums = self.manifest.checksums.get(file.name, ()) if batch is None else [batch[2]] if batch[2] else None
            found = _checksum(file, None if is_old else sums)
            if found is None:
                file.unlink()
                self.damaged.append(file.name)
                continue
            table = _read(file, ["id", "stamp", "sha256"])
            ids = table["id"].to_pylist()
            if batch is not None and ids[0] in self.known:
                file.unlink()  # its part was written, and the run was killed before this
                continue
            if batch is None:
                checksums[file.name] = [found]
            self._files[file] = ids
            self.known.update(zip(ids, table["stamp"].to_pylist(), strict=True))
            self.unread.update(table.filter(table["sha256"].is_null())["id"].to_pylist())
        if self.damaged or is_old:  # so that a run that is killed now does not forget what it has found
            self._begin()
        self.manifest = dataclasses.replace(self.manifest, checksums=checksums, format_version=FORMAT_VERSION)
        if self.damaged or is_old:
            self._save()
        self._fold_if_full()  # killed after the last batch of a part had been written

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    def sha256(self, ids: Iterable[str]) -> dict[str, str | None]:
        """The stored hashes of some rows."""
        wanted, found = set(ids), {}
        for file, present in self._files.items():
            if not wanted.isdisjoint(present):
                table = _read(file, ["id", "sha256"])
                pairs = zip(table["id"].to_pylist(), table["sha256"].to_pylist(), strict=True)
                found.update({id_: value for id_, value in pairs if id_ in wanted})
        return found

    def revise(self, remove: Iterable[str], stamps: Mapping[str, str | None]) -> None:
        """Takes rows away, and sets the stamps of others. Safe to be killed in, as each file is replaced whole."""
        pa, _ = import_pyarrow()
        gone = set(remove)
        if not gone and not stamps:
            return
        self._begin()
        if any(_BATCH.fullmatch(file.name) for file in self._files):
            self._fold()
        for file, ids in list(self._files.items()):
            if gone.isdisjoint(ids) and stamps.keys().isdisjoint(ids):
                continue
            keep = [id_ not in gone for id_ in ids]
            table = _read(file).filter(pa.array(keep))
            ids = table["id"].to_pylist()
            if not ids:
                file.unlink()
                del self._files[file]
                continue
            new = [stamps.get(id_, stamp) for id_, stamp in zip(ids, table["stamp"].to_pylist(), strict=True)]
            place = table.schema.get_field_index("stamp")
            self._write_part(file, table.set_column(place, table.schema.field(place), pa.array(new, pa.string())))
            self._files[file] = ids
        for id_ in gone:
            self.known.pop(id_, None)
        self.known.update(stamps)

    def append(self, rows: Sequence[Mapping[str, Any]], embeddings: np.ndarray) -> None:
        """Adds a batch. When this returns, it outlives the process.

        Args:
            rows: values of `COLUMNS` by name, missing ones null. A row without an `error` has an embedding.
            embeddings: (n, D) of the rows without an error, in their order.

        Raises:
            OSError: if the disk is full; what was added before is safe.
        """
        if not rows:
            return
        self._begin()
        batches = [int(match[1]) for file in self._files if (match := _BATCH.fullmatch(file.name))]
        content = _to_bytes(_to_table(rows, embeddings, self.manifest))
        file = self.path / f"batch-{max(batches, default=-1) + 1:06d}-{sha256([content])[:16]}.parquet"
        # Without waiting for the disk: a crash of the machine may cost a batch, which is then made again.
        with new_file(file, sync=False) as partial:
            partial.write_bytes(content)
        self._files[file] = [row["id"] for row in rows]
        self.known.update((row["id"], row.get("stamp")) for row in rows)
        self._fold_if_full()

    def finish(self) -> Manifest:
        """Joins what is left to parts, and marks the folder as complete."""
        if any(_BATCH.fullmatch(file.name) for file in self._files):
            self._fold()
        errors = sum(_read(file, ["error"])["error"].is_valid().to_numpy().sum() for file in self._files)
        parts = {file.name: len(self._files[file]) for file in sorted(self._files)}
        checksums = {name: self.manifest.checksums[name] for name in parts}
        done = dataclasses.replace(
            self.manifest,
            complete=True,
            rows=sum(parts.values()),
            errors=int(errors),
            parts=parts,
            checksums=checksums,
        )
        if done != self.manifest:
            self.manifest = done
            self._save()
        return done

    def _open_files(self) -> dict[Path, list[str]]:
        """The last part if it is not full, and the batches."""
        parts = sorted(file for file in self._files if _PART.fullmatch(file.name))
        last = [file for file in parts[-1:] if len(self._files[file]) < self.manifest.part_rows]
        batches = sorted(file for file in self._files if _BATCH.fullmatch(file.name))
        return {file: self._files[file] for file in [*last, *batches]}

    def _fold_if_full(self) -> None:
        files = self._open_files()
        if sum(map(len, files.values())) >= self.manifest.part_rows:
            self._fold()

    def _fold(self) -> None:
        pa, _ = import_pyarrow()
        files = list(self._open_files())
        if _PART.fullmatch(files[0].name):
            part = files[0]
        else:
            numbers = [int(match[1]) for file in self._files if (match := _PART.fullmatch(file.name))]
            part = self.path / f"part-{max(numbers, default=-1) + 1:05d}.parquet"
        self._write_part(part, pa.concat_tables([_read(file) for file in files]))
        self._files[part] = [id_ for file in files for id_ in self._files[file]]
        for file in files:
            if file != part:
                file.unlink()
                del self._files[file]

    def _begin(self) -> None:
        if self.manifest.complete:
            self.manifest = dataclasses.replace(self.manifest, complete=False, rows=0, errors=0, parts={})
            self._save()

    def _write_part(self, file: Path, table: pa.Table) -> None:
        content = _to_bytes(table)
        checksums = {**self.manifest.checksums}
        new = sha256([content])
        # A run may be killed before or after the part takes its place, so both are noted.
        checksums[file.name] = [*checksums.get(file.name, ()), new]
        self.manifest = dataclasses.replace(self.manifest, checksums=checksums)
        self._save()
        with new_file(file) as partial:
            partial.write_bytes(content)
        self.manifest = dataclasses.replace(self.manifest, checksums={**checksums, file.name: [new]})

    def _save(self) -> None:
        write_sealed_json(self.path / MANIFEST, dataclasses.asdict(self.manifest))


def _schema(manifest: Manifest) -> Any:
    pa, _ = import_pyarrow()
    fields = [pa.field(name, getattr(pa, kind)()) for name, kind in COLUMNS.items()]
    numbers = {"float16": pa.float16(), "float32": pa.float32()}[manifest.dtype]
    return pa.schema([*fields, pa.field("embedding", pa.list_(numbers, manifest.dimension))])


def _to_table(rows: Sequence[Mapping[str, Any]], embeddings: np.ndarray, manifest: Manifest) -> Any:
    pa, _ = import_pyarrow()
    schema = _schema(manifest)
    is_broken = np.array([row.get("error") is not None for row in rows])
    assert embeddings.shape == (int((~is_broken).sum()), manifest.dimension), embeddings.shape
    values = np.zeros((len(rows), manifest.dimension), manifest.dtype)
    values[~is_broken] = embeddings
    columns = [pa.array([row.get(name) for row in rows], schema.field(name).type) for name in COLUMNS]
    numbers = pa.FixedSizeListArray.from_arrays(
        pa.array(values.reshape(-1)), type=schema.field("embedding").type, mask=pa.array(is_broken)
    )
    return pa.Table.from_arrays([*columns, numbers], schema=schema)


def _to_bytes(table: pa.Table) -> Any:
    pa, parquet = import_pyarrow()
    sink = pa.BufferOutputStream()
    # One chunk, one row group: the bytes depend on the rows alone.
    parquet.write_table(
        table.combine_chunks(), sink, compression="zstd", use_dictionary=False, row_group_size=len(table)
    )
    return sink.getvalue()


def _read(file: Path, columns: list[str] | None = None) -> Any:
    pa, parquet = import_pyarrow()
    try:
        # ParquetFile, because read_table takes a folder's name apart in search of partitions.
        with parquet.ParquetFile(file) as handle:
            return handle.read(columns)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} is damaged: {error}. Run `siglip-hf embed` again to rebuild it.") from error


def _count_rows(file: Path) -> int | None:
    """Rows of a part, all of it read, or None if it cannot be read."""
    try:
        return len(_read(file))
    except ValueError:
        return None


def _checksum(file: Path, right: Sequence[str] | None) -> str | None:
    """SHA-256 of a file, or None if it begins with none of `right`, or, where these are not known, cannot be read."""
    try:
        found = sha256_of_files([file])
    except OSError:
        return None
    if right is None:
        return found if _count_rows(file) is not None else None
    return found if any(found.startswith(one) for one in right) else None
