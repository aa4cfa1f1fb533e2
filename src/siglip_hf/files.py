"""Files that are whole or not there: one lock, one way to write a file or a folder, one checksum, one JSON reader."""

from __future__ import annotations

import errno
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BLOCK = 1 << 22
#: Bytes of the largest file that is read whole: a picture of 179 million pixels with 16 bits a channel, uncompressed.
MOST_BYTES = 1 << 30

#: In a folder of `seal_folder`: the checksums of its other files.
CHECKSUMS_FILE = "checksums.json"

_ABANDONED = 3600  # seconds in which whoever writes a file writes something
_NUMBERS = itertools.count()

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, or the largest file allowed


def sha256(parts: Iterable[Any]) -> str:
    """SHA-256 of some bytes (or other buffers) after each other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sha256_of_files(paths: Iterable[str | os.PathLike[str]]) -> str:
    """SHA-256 of the contents of files after each other.

    Raises:
        OSError: if one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: if it is not JSON, not UTF-8, or nested deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_regular_file(path: str | os.PathLike[str], most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        OSError: see `check_regular_file`; or if it cannot be read.
    """
    check_regular_file(path, most)
    with open(path, "rb") as file:
        return file.read(most + 1)[:most]


def check_regular_file(path: str | os.PathLike[str], most: int = MOST_BYTES) -> None:
    """Makes sure that a file can be read to its end; of a FIFO or a device, reading might never end.

    Raises:
        OSError: if it is missing, a folder, a FIFO or a device, or larger than `most` bytes.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"it is a {'folder' if stat.S_ISDIR(found.st_mode) else 'FIFO, socket or device'}, not a file")
    if found.st_size > most:
        raise OSError(f"it has {found.st_size:,} bytes; at most {most:,} are read")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        OSError: see `read_regular_file`; it names the file.
        ValueError: naming the file, if it is not UTF-8.
    """
    try:
        return read_regular_file(path).decode("utf-8-sig")
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def text_lines(text: str) -> list[str]:
    """The lines of a text, which end with a line feed, a carriage return, or both.

    `str.splitlines` would also split at characters that belong to a caption, such as U+2028.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def first_line(error: Exception) -> str:
    """The first line of what an error says; the name of its class if it says nothing."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


@contextmanager
def in_turn(lock: str | os.PathLike[str]) -> Iterator[None]:
    """Waits until no other process is within such a block; `lock` is the file to lock, in a folder that is there."""
    from filelock import FileLock

    with FileLock(lock):
        yield


@contextmanager
def only_run(folder: str | os.PathLike[str], lock: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Holds the right to write to a folder until the block ends, or the process does.

    Args:
        folder: what is written; named in the error.
        lock: the file to lock; ".lock" inside the folder by default, which is made if it is missing. It stays.

    Raises:
        OSError: if another run holds it, or the file cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = Path(folder, ".lock") if lock is None else Path(lock)
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise OSError(f"another run is writing to {folder}; wait for it to end, or give another folder.") from error
    try:
        yield
    finally:
        held.release()


@contextmanager
def new_file(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """Gives a path to write to, beside `path`; the file takes its place when the block ends without an error.

    Two that write one file at once do not meet: the file is that of the one that ends last. What a process that was
    killed left behind is removed by a later one, when it is an hour old.

    Args:
        path: the place. Whatever is there stays as it is until the new file is whole.
        sync: have the content on the disk before; without it, a crash of the machine may leave a damaged file.

    Yields:
        The path to write to. It is removed if the block raises.

    Raises:
        OSError: naming the folder, for example if the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{next(_NUMBERS)}.partial")
    try:
        with name_full_disk(path.parent):
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    left.unlink(missing_ok=True)
            yield partial
            if sync:
                with open(partial, "rb+") as file:
                    os.fsync(file.fileno())
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], content: Any, *, indent: int | None = 1) -> None:
    """Writes a JSON file, whole or not at all.

    Raises:
        OSError: see `new_file`.
    """
    with new_file(path) as partial:
        partial.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def write_sealed_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes a JSON object with one more field, `checksum`, by which `read_sealed_json` finds any damage.

    Raises:
        OSError: see `new_file`.
    """
    text = json.dumps({**content, "checksum": ""}, ensure_ascii=False, indent=1) + "\n"
    head, tail = text.rsplit('""', 1)
    with new_file(path) as partial:
        partial.write_bytes(f'{head}"{sha256([text.encode()])}"{tail}'.encode())


def read_sealed_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that `write_sealed_json` wrote, `checksum` included; one without a checksum is not verified.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no JSON object, or not as it was written.
    """
    text = read_regular_file(path).decode("utf-8")
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("it does not hold an object")
    if "checksum" in content:
        checksum = str(content["checksum"])
        head, _, tail = text.rpartition(f'"{checksum}"')
        if sha256([f'{head}""{tail}'.encode()]) != checksum:
            raise ValueError("its checksum is not that of its content")
    return content


def seal_folder(folder: str | os.PathLike[str]) -> None:
    """Writes down the checksum of every file of a folder, by which `check_folder` finds any damage.

    Raises:
        OSError: if a file cannot be read or written.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != CHECKSUMS_FILE)
    sums = {path.relative_to(folder).as_posix(): sha256_of_files([path]) for path in files}
    write_sealed_json(Path(folder, CHECKSUMS_FILE), {"files": sums})


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Makes sure that the files of a folder are as `seal_folder` found them; one that was not sealed is not verified.

    Raises:
        ValueError: naming the first file that is missing, cannot be read, or has changed.
    """
    file = Path(folder, CHECKSUMS_FILE)
    if not file.exists():
        return
    try:
        content = read_sealed_json(file)
        if not isinstance(content.get("files"), dict) or "checksum" not in content:
            raise ValueError("it does not hold checksums")
        for name, expected in content["files"].items():
            file = Path(folder, name)
            if sha256_of_files([file]) != expected:
                raise ValueError("its checksum is not that of its content")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {getattr(error, 'strerror', None) or error}") from error


def check_output_folder(folder: str | os.PathLike[str], *, overwrite: bool, marker: str) -> None:
    """Refuses a folder that `new_folder` would refuse; call it before work that takes long.

    Raises:
        ValueError: If something stands at the path that may not be replaced; the message names it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to write to")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise ValueError(
                f"{folder} is not empty; give another folder, or overwrite=True (--overwrite) to replace it"
            )
        if not (folder / marker).is_file():
            # The folder is replaced as a whole, and this one may hold anything: a mistyped path must not cost a home.
            raise ValueError(f"{folder} has no {marker}, so this package did not write it; give another folder")


@contextmanager
def new_folder(folder: str | os.PathLike[str], *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Gives a temporary folder to write to; it takes the place of `folder` when the block ends without an error.

    One process at a time writes to a folder: the lock lies beside it, as the folder is replaced as a whole. What a
    process that was killed has left is put right first.

    Args:
        folder: The place. It may be missing or an empty folder; its parents are made.
        overwrite: Replace a folder that is not empty, all files in it, provided it holds `marker`.
        marker: Name of a file by which an earlier output is recognised.

    Yields:
        The folder to write to, beside `folder` on the same disk. It is removed if the block raises.

    Raises:
        ValueError: See `check_output_folder`.
        OSError: naming the folder, for example if the disk is full, or another run writes there.
    """
    folder = Path(folder).absolute()
    with only_run(folder, folder.with_name(f".{folder.name}.lock")):
        _clear_remains(folder)
        with _replaced(folder, overwrite, marker) as partial:
            yield partial


@contextmanager
def _replaced(folder: Path, overwrite: bool, marker: str) -> Iterator[Path]:
    check_output_folder(folder, overwrite=overwrite, marker=marker)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    try:
        with name_full_disk(folder.parent):
            partial.mkdir()
            yield partial
            check_output_folder(folder, overwrite=overwrite, marker=marker)  # someone may have written meanwhile
            if folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _clear_remains(folder: Path) -> None:
    """Finishes or removes what `new_folder` left when its process was killed."""
    for kept in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.replaced-*")):
        if folder.exists():
            shutil.rmtree(kept)
        else:
            kept.rename(folder)
    for partial in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        shutil.rmtree(partial)


@contextmanager
def name_full_disk(folder: Path) -> Iterator[None]:
    """An error of the system that the disk is full gets the folder's name and what to do.

    Raises:
        OSError: in its place.
    """
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number not in _FULL:
            raise
        raise OSError(
            number,
            f"cannot write to {folder} ({os.strerror(number)}); what was done before is safe. Make room, and run "
            "the same command again: it goes on from there.",
        ) from error


def _error_number(error: Exception) -> int | None:
    """The system's number of an error; libraries in other languages tell it in words at best."""
    if isinstance(error, OSError):
        return error.errno
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # Rust's, such as safetensors'
        return int(found[1])
    # torch.save: a part was not written, or only some of its bytes.
    torch_says = ("PytorchStreamWriter failed", "inline_container.cc")
    return errno.ENOSPC if any(words in str(error) for words in torch_says) else None
