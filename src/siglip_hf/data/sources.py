"""Where pictures, captions and labels come from: folders, tables, tar shards, datasets and lists of texts, read alike.

A source is a sequence of records that say where a picture is without opening it, so that it can be shuffled, split and
sent to worker processes. Training, evaluation and search all read through `open_source`.
"""

from __future__ import annotations

import csv
import glob
import io
import os
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload
from urllib.parse import urlsplit
from urllib.request import url2pathname

from siglip_hf.data.shards import DamagedShard, TarMember, tar_groups
from siglip_hf.extras import missing
from siglip_hf.files import first_line, parse_json, read_text, text_lines
from siglip_hf.preprocessing.image_intake import PICTURE_SUFFIXES, load_picture

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

# Column names that data sets in use have, most telling first.
IMAGE_COLUMNS = ("image", "image_path", "file_name", "filepath", "path", "file", "img", "picture", "image_url", "url")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "sentences", "description", "prompt")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category")

_TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as `datasets` has them in an imagefolder


@dataclass(frozen=True)
class DatasetCell:
    """A picture in a row of a `datasets.Dataset`; the column is kept undecoded there."""

    dataset: Dataset = field(repr=False)
    row: int
    column: str

    def read(self) -> Any:
        """What the dataset holds in this cell: a path, bytes, or both in a dict."""
        return self.dataset[self.row][self.column]


@dataclass(frozen=True)
class Record:
    """One picture, one text, or a picture with its texts.

    Attributes:
        id: unique within its source and the same each time it is opened: a path relative to the folder, the number of
            a row, or the name inside a tar file.
        image: path or URL, or where else the picture lies; None for a bare text.
        captions: texts that describe it; empty if none are known.
        label: name of its class, or None.
        error: why the entry of the source cannot be used; it has no picture and no text then.
    """

    id: str
    image: str | TarMember | DatasetCell | None = None
    captions: tuple[str, ...] = ()
    label: str | None = None
    error: str | None = None

    @property
    def path(self) -> str | None:
        """The file that holds the picture, or None if it is no file of its own."""
        return self.image if isinstance(self.image, str) and "://" not in self.image else None

    def read(self) -> Any:
        """The picture as `load_picture` takes it: a path, a URL, bytes, or what a dataset holds.

        Raises:
            ValueError: for a bare text, and for an entry that cannot be used.
            OSError: if the file cannot be read.
        """
        if self.error is not None:
            raise ValueError(self.error)
        if self.image is None:
            raise ValueError(f"{self.id}: this record has no picture")
        return self.image if isinstance(self.image, str) else self.image.read()

    def load_picture(self, draft_to: int | None = None) -> Image.Image:
        """The picture, upright, as RGB.

        Raises:
            PictureError: naming the record and what is wrong with its picture.
        """
        from siglip_hf.preprocessing.image_intake import PictureError

        try:
            return load_picture(self.read(), draft_to=draft_to)
        except (OSError, ValueError) as error:
            raise PictureError(getattr(error, "reason", None) or str(error), self.id) from error


class Source(Sequence[Record]):
    """Records in a fixed order.

    Attributes:
        name: what it was opened from.
        records: the records.
        unused: what was left out and why, a line each.
    """

    def __init__(self, name: str, records: Sequence[Record], unused: Sequence[str] = ()) -> None:
        self.name, self.records, self.unused = name, records, list(unused)

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Source: ...
    def __getitem__(self, index: int | slice) -> Record | Source:
        if isinstance(index, slice):
            return Source(self.name, self.records[index], self.unused)
        return self.records[index]

    def another(self, generator: random.Random) -> Record:
        """A record drawn at random, in place of one that is broken."""
        return self[generator.randrange(len(self))]

    def classes(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted({record.label for record in self if record.label is not None})

    def require(self, *parts: str, keep_broken: bool = False) -> Source:
        """The records that have all of `parts` ("image", "captions", "label"); the others are listed in `unused`.

        Args:
            parts: what is needed.
            keep_broken: keep the records that have an error in place of these.

        Raises:
            ValueError: if no record has them.
        """
        missing = {record.id: [part for part in parts if not getattr(record, part)] for record in self}
        kept = [record for record in self if not missing[record.id] or (keep_broken and record.error is not None)]
        if not kept:
            wanted = " and ".join({"captions": "a caption", "label": "a label", "image": "a picture"}[p] for p in parts)
            raise ValueError(
                f"{self.name}: none of {len(self)} entries has {wanted}. Captions and labels come from columns of a "
                "table (one with another name is given as with --image-column NAME, or image_column= in Python), a "
                "metadata.csv beside the pictures, a .txt file beside each picture, or class folders."
            )
        dropped = [
            f"{record.id}: {record.error or 'no ' + ' and no '.join(missing[record.id])}"
            for record in self
            if missing[record.id] and not (keep_broken and record.error is not None)
        ]
        return Source(self.name, kept, [*self.unused, *dropped])


def open_source(
    data: str | os.PathLike[str] | Iterable[str] | Dataset,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    split: str = "train",
) -> Source:
    """Records from nearly anything that holds pictures or texts.

    - **Folder**: all pictures below it. A `metadata.csv`, `.jsonl` or `.parquet` (an "imagefolder" of `datasets`) gives
      captions and labels; else a `.txt` beside a picture holds its captions, a line each, and the first folder level
      its label. A folder written by `Dataset.save_to_disk` is opened as such.
    - **Glob or picture files**: as `siglip-hf classify` takes them.
    - **Table** (`.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`): a row each. Paths are relative to the table's folder. A
      caption cell may hold a list. Parquet may hold the encoded pictures themselves.
    - **Tar shards** (`.tar`, globs of them; WebDataset): files that share a name up to the first dot are one record;
      `.txt` (captions), `.json` (caption and label fields), `.cls` (label).
    - **Text file** (`.txt`): a text each line.
    - **Dataset**: a `datasets.Dataset`, or a `DatasetDict`, of which `split` is taken.

    An entry that cannot be used (a line that is not JSON, a name that is not Unicode, a shard that is cut off) becomes
    a record with an `error`; the others are as they would be without it.

    Args:
        data: the source, or several paths.
        image_column: column with the pictures; by default the first of `IMAGE_COLUMNS` that is there.
        caption_column: column with the captions; by default the first of `CAPTION_COLUMNS`.
        label_column: column with the class; by default the first of `LABEL_COLUMNS`.
        split: split of a `DatasetDict`.

    Raises:
        ValueError: if it is empty, has no such column, or is of no known kind.
        FileNotFoundError: if there is no such file.
    """
    columns = Columns(image_column, caption_column, label_column)
    if hasattr(data, "column_names"):
        if not hasattr(data, "__len__"):
            raise ValueError(
                "A streaming dataset has no length and no rows to go back to; it can be trained on. For all else, load "
                "it without streaming=True."
            )
        return _from_dataset(data, columns, split, "the dataset")
    paths = [os.fspath(data)] if isinstance(data, str | os.PathLike) else [os.fspath(path) for path in data]
    name = paths[0] if len(paths) == 1 else f"{len(paths)} sources"
    if not paths:
        raise ValueError("no source given: pass a folder, a table, tar shards, a text file or a dataset.")
    paths = [match for path in paths for match in expand(path)]
    suffixes = {_suffix(path) for path in paths}
    if packed := next((path for path in paths if path.lower().endswith(_PACKED_SUFFIXES)), None):
        raise ValueError(
            f"{packed} is a compressed tar file, and its pictures cannot be read one by one. Decompress it to a .tar "
            "file, or unpack it into a folder."
        )
    if suffixes == {".tar"}:
        records = [record for path in paths for record in _from_tar(path, columns, len(paths) > 1)]
        return _named(name, records)
    if len(paths) > 1:
        return _named(name, [Record(path, path) for path in find_pictures(paths)])
    (path,) = paths
    if os.path.isdir(path):
        return _from_folder(Path(path), columns, split)
    if "://" in path or _suffix(path) in PICTURE_SUFFIXES:
        return _named(name, [Record(path, path)])
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file or folder")
    if _suffix(path) in _TABLE_SUFFIXES:
        return _from_table(Path(path), columns)
    if _suffix(path) == ".txt":
        lines = text_lines(read_text(path))
        return _named(name, [Record(str(i), captions=(line.strip(),)) for i, line in enumerate(lines) if line.strip()])
    raise ValueError(
        f"{path}: no known kind of source; pass a folder, a glob, a table ({', '.join(_TABLE_SUFFIXES)}), .tar shards, "
        "or a .txt file of texts"
    )


def find_pictures(sources: Iterable[str]) -> list[str]:
    """Paths and URLs of pictures, each once: a folder stands for the pictures anywhere below it, in order of name.

    A file is taken whatever its name, and so is a path that does not exist; reading it says what is wrong. Patterns
    with `*`, `?` and `[...]` are expanded, `**` through folders.

    Raises:
        ValueError: if there is not one picture.
    """
    sources = list(sources)
    found: list[str] = []
    for source in sources:
        for match in expand(source):
            found += map(str, _pictures_below(Path(match))) if os.path.isdir(match) else [match]
    if not found:
        raise ValueError(f"no pictures found in {', '.join(sources)}")
    return list(dict.fromkeys(found))


def expand(source: str) -> list[str]:
    """What a pattern matches, sorted; the source itself if it is none or matches nothing.

    Args:
        source: a path, a URL or a pattern such as "shards/*.tar".
    """
    if glob.has_magic(source) and not os.path.exists(source) and "://" not in source:
        return sorted(glob.glob(source, recursive=True)) or [source]
    return [source]


def _pictures_below(folder: Path) -> list[Path]:
    # A link to nothing, or a FIFO, that is called like a picture is taken too: reading it says what is wrong.
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and not path.is_dir())


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _named(name: str, records: Sequence[Record], unused: Sequence[str] = ()) -> Source:
    if not records:
        raise ValueError(f"{name} is empty: it holds no picture and no text.")
    return Source(name, [checked(record) for record in records], unused)


def checked(record: Record) -> Record:
    """The record, or one with an error if a name or text of it cannot be stored: it has half characters, or NUL.

    Half characters (lone surrogates) stand for bytes of a file's name that are not UTF-8, or come out of JSON escapes.
    """
    place = record.image.path if isinstance(record.image, TarMember) else record.image
    texts = {"name": record.id, "path": place, "label": record.label, "caption": "".join(record.captions)}
    for what, text in texts.items():
        if isinstance(text, str) and _printable(text) != text:
            return Record(_printable(record.id), error=f"its {what} is not Unicode text: {text[:100]!a}")
    return record if record.error is None else replace(record, error=_printable(record.error))


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


class Columns(NamedTuple):
    """Names that the caller gave; None stands for the usual ones."""

    image: str | None
    caption: str | None
    label: str | None

    def among(self, present: Sequence[str], name: str) -> Columns:
        """The columns to read of a table.

        Args:
            present: names of the table's columns.
            name: of the table, for the error.

        Raises:
            ValueError: if a column that was asked for is not there.
        """
        for asked in filter(None, self):
            if asked not in present:
                raise ValueError(f"{name} has no column {asked!r}; it has {', '.join(present) or 'none'}.")

        def choose(given: str | None, usual: Sequence[str]) -> str | None:
            return given or next((column for column in usual if column in present), None)

        chosen = Columns(
            choose(self.image, IMAGE_COLUMNS),
            choose(self.caption, CAPTION_COLUMNS),
            choose(self.label, LABEL_COLUMNS),
        )
        if chosen.image is None and chosen.caption is None:
            raise ValueError(
                f"{name} has no column of pictures or texts that is known by its name; it has {', '.join(present)}. "
                "Give their names, as with --image-column NAME, or image_column= in Python."
            )
        return chosen


def _texts(value: Any) -> tuple[str, ...]:
    """Captions out of a cell: a string, or a list of them; empty ones are dropped."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(text for text in (str(v).strip() for v in values if v is not None) if text)


def _label(value: Any) -> str | None:
    return None if value is None or not str(value).strip() else str(value).strip()


def _from_folder(folder: Path, columns: Columns, split: str) -> Source:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return _from_dataset(_opened(import_datasets().load_from_disk, folder), columns, split, str(folder))
    for metadata in _METADATA_FILES:
        if (folder / metadata).is_file():
            return _from_table(folder / metadata, columns)
    asked = next(filter(None, columns), None)
    if asked is not None:
        raise ValueError(f"{folder} has no column {asked!r}: it is a plain folder of pictures without a metadata file.")
    records, unused = [], []
    for path in _pictures_below(folder):
        relative = path.relative_to(folder)
        beside = path.with_suffix(".txt")
        label = relative.parts[0] if len(relative.parts) > 1 else None
        try:
            captions = _texts(text_lines(read_text(beside))) if beside.exists() else ()
            records.append(Record(relative.as_posix(), str(path), captions, label))
        except (OSError, ValueError) as error:
            records.append(Record(relative.as_posix(), label=label, error=f"its captions cannot be read: {error}"))
    labels = {record.label for record in records}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and records and child.name not in labels and not child.name.startswith("."):
            unused.append(f"{child.name}: a folder without pictures")
    return _named(str(folder), records, unused)


def _from_table(path: Path, columns: Columns) -> Source:
    if path.suffix.lower() == ".parquet":
        data = _opened(import_datasets().Dataset.from_parquet, path)
        return _from_dataset(data, columns, "train", str(path), path.parent)
    rows = list(_rows(path))
    present = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    if not rows:
        raise ValueError(f"{path} is empty: it holds no picture and no text.")
    if not present:
        raise ValueError(f"{path}: {next((row for row in rows if isinstance(row, str)), 'no row has a column')}")
    chosen = columns.among(present, str(path))
    return _from_rows(str(path), rows, chosen, lambda row: cell_place(row.get(chosen.image), path.parent), path.stem)


def _rows(path: Path) -> Iterator[dict[str, Any] | str]:
    """Rows of a CSV, TSV, JSONL or JSON file; in place of one that cannot be read, what is wrong with it.

    Raises:
        ValueError: if the file as a whole cannot be read.
    """
    text = read_text(path)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        # The limit of a cell is the process's; a cell cannot be longer than the file. (2^31 - 1 is the most anywhere.)
        csv.field_size_limit(min(max(csv.field_size_limit(), len(text)), 2**31 - 1))
        # Python 3.10 stops at a NUL; half a character is refused for its row alone.
        lines = io.StringIO(text.replace("\0", "\ud800"), newline="")
        try:
            for row in csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ","):
                row.pop(None, None)  # cells beyond the last column
                yield row
        except csv.Error as error:
            raise ValueError(f"{path} cannot be read as a table: {error}") from error
    elif suffix == ".json":
        try:
            rows = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} must hold a list of objects, a row each.")
        yield from rows
    else:
        yield from filter(None, (json_row(number, line) for number, line in enumerate(text_lines(text), 1)))


def json_row(number: int, line: str) -> dict[str, Any] | str | None:
    """The row in a line of a JSONL file, or what is wrong with it; None if it is blank or null.

    Args:
        number: of the line, for what is wrong with it.
        line: its text.
    """
    try:
        entry: Any = parse_json(line) if line.strip() else None
    except ValueError as error:
        return f"line {number} is not JSON: {error}"
    return entry if entry is None or isinstance(entry, dict) else f"line {number} must hold an object, a row each"


def cell_place(value: Any, folder: Path) -> str | None:
    """The path or URL that a cell names; None if it is empty.

    Args:
        value: the cell.
        folder: of its table, where relative paths begin.
    """
    if value is None or not str(value).strip():
        return None
    if (text := str(value).strip()).startswith("file://"):
        return url2pathname(urlsplit(text).path)
    return text if "://" in text or os.path.isabs(text) else str(folder / text)


def _from_rows(
    name: str, rows: Iterable[Mapping[str, Any] | str], columns: Columns, image: Callable[[Any], Any], stem: str
) -> Source:
    records, unused, seen = [], [], set[str]()
    for number, row in enumerate(rows):
        if isinstance(row, str):
            records.append(Record(f"{stem}:{number}", error=row))
            continue
        record = row_record(row, columns, image, f"{stem}:{number}", seen)
        if record is None:
            unused.append(f"{stem}:{number}: an empty row")
            continue
        seen.add(record.id)
        records.append(record)
    return _named(name, records, unused)


def row_record(
    row: Mapping[str, Any], columns: Columns, image: Callable[[Any], Any], id_: str, taken: Collection[str] = ()
) -> Record | None:
    """The record of a row, or None if it holds neither a picture nor a text.

    Args:
        row: Cells by column.
        columns: Those to read.
        image: The picture of a row, as in `Record.image`.
        id_: For a row whose picture is not named, or named as one of `taken`.
        taken: Ids of other rows.
    """
    place = image(row) if columns.image else None
    captions = _texts(row.get(columns.caption)) if columns.caption else ()
    if place is None and not captions:
        return None
    label = _label(row.get(columns.label)) if columns.label else None
    given = row.get(columns.image) if columns.image else None
    return Record(given if isinstance(given, str) and given and given not in taken else id_, place, captions, label)


def import_datasets() -> Any:
    """The package `datasets`.

    Raises:
        ImportError: if it is missing, with what to type.
    """
    try:
        import datasets
    except ImportError as error:
        raise missing("reading this needs `datasets`", "search") from error
    return datasets


def _opened(read: Callable[[str], Any], place: Path) -> Any:
    """What `datasets` reads from a place.

    Raises:
        ValueError: naming it, if it is damaged.
    """
    try:
        return read(str(place))
    except Exception as error:  # KeyError, TypeError, ...: what the damage happens to hit
        raise ValueError(f"{place} cannot be read: {type(error).__name__}: {first_line(error)}") from error


def _from_dataset(data: Any, columns: Columns, split: str, name: str, folder: Path | None = None) -> Source:
    datasets = import_datasets()
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(data)}.")
        data = data[split]
    chosen = columns.among(data.column_names, name)
    features = data.features
    embedded = chosen.image is not None and not _is_string(features[chosen.image])
    if embedded and isinstance(features[chosen.image], datasets.Image):
        data = data.cast_column(chosen.image, datasets.Image(decode=False))
    texts = data.select_columns([c for c in chosen if c is not None and not (embedded and c == chosen.image)] or [])
    rows: Iterable[dict[str, Any]] = texts if len(texts.column_names) else ({} for _ in range(len(data)))
    to_label = getattr(features.get(chosen.label), "int2str", None) if chosen.label else None

    def with_names() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows):
            if to_label is not None and chosen.label and row[chosen.label] is not None:
                row = row | {chosen.label: to_label(row[chosen.label])}
            yield row | {"\0row": number}

    def image(row: Mapping[str, Any]) -> Any:
        if embedded:
            return DatasetCell(data, row["\0row"], chosen.image or "")
        return cell_place(row[chosen.image or ""], folder or Path())

    return _from_rows(name, with_names(), chosen, image, "row")


def _is_string(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _from_tar(path: str, columns: Columns, several: bool) -> Iterator[Record]:
    """Records of a WebDataset shard; members of one record may lie apart."""
    groups: dict[str, dict[str, TarMember]] = {}
    damage = None
    try:
        for key, parts in tar_groups(path):
            groups.setdefault(key, {}).update(parts)
    except DamagedShard as error:
        damage = Record(Path(path).name, error=str(error))
    yield from filter(None, (tar_record(path, key, parts, columns, several) for key, parts in groups.items()))
    if damage is not None:
        yield damage


def tar_record(path: str, key: str, parts: Mapping[str, TarMember], columns: Columns, several: bool) -> Record | None:
    """The record of members that belong together, or None if they hold neither a picture nor a text.

    Args:
        path: of the shard.
        key: what the members' names have in common.
        parts: the members by extension.
        columns: of a member `.json`.
        several: whether the source has other shards, so that the record's id needs the shard's name.
    """
    id_ = f"{os.path.basename(path)}/{key}" if several else key
    try:
        record = _from_members(id_, parts, columns)
    except ValueError as error:
        record = Record(id_, error=f"{os.path.basename(path)}: {error}")
    return record if record.image is not None or record.captions or record.error is not None else None


def _from_members(id_: str, parts: Mapping[str, TarMember], columns: Columns) -> Record:
    """The record of members by their extensions.

    Raises:
        ValueError: if one of those with texts cannot be read; the message names it.
    """

    def parse(extension: str, parser: Callable[[bytes], Any], default: Any) -> Any:
        try:
            return parser(parts[extension].read()) if extension in parts else default
        except (OSError, ValueError) as error:
            raise ValueError(f"the .{extension} of {id_} cannot be read: {error}") from error

    def decode(content: bytes) -> str:
        return content.decode("utf-8-sig")

    picture = next((part for ext, part in parts.items() if f".{ext.rpartition('.')[2]}" in PICTURE_SUFFIXES), None)
    fields = parse("json", parse_json, {})
    if not isinstance(fields, dict):
        raise ValueError(f"the .json of {id_} must hold an object")
    caption = next((fields[name] for name in (columns.caption, *CAPTION_COLUMNS) if name and name in fields), None)
    label = next((fields[name] for name in (columns.label, *LABEL_COLUMNS) if name and name in fields), None)
    text = parse("txt", decode, None)
    captions = _texts(caption if text is None else text_lines(text))
    return Record(id_, picture, captions, _label(parse("cls", decode, label)))
