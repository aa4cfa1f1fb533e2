"""What lies in a WebDataset shard: an uncompressed tar file, whose members are found by their headers alone."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from siglip_hf.files import MOST_BYTES


class TarMember(NamedTuple):
    """A file inside an uncompressed tar file, read without reading what lies before it."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            OSError: if the tar file cannot be read, ends before, or the file is larger than `MOST_BYTES`.
        """
        if self.size > MOST_BYTES:
            raise OSError(f"it has {self.size:,} bytes; at most {MOST_BYTES:,} are read")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.path} ends inside it")
        return content


class DamagedShard(ValueError):
    """A shard that is damaged or cut off; what lies before the damage has been read."""


def tar_groups(path: str) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """Members of a WebDataset shard that follow each other and share a name up to its first dot.

    Yields:
        That name, and the members by what follows the dot. Memory does not grow with the shard.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no tar file, or a compressed one.
        DamagedShard: After the last members that can be read, if there should be more.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file or folder'}")
    damage, key, parts = None, "", dict[str, TarMember]()
    try:
        with tarfile.open(path, "r:") as archive:
            try:
                while member := archive.next():
                    archive.members.clear()  # type: ignore[attr-defined]  # or it keeps all headers that it has read
                    if not member.isfile():
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    own = f"{folder}/{stem}" if folder else stem
                    if own != key and parts:
                        yield key, parts
                        parts = {}
                    key = own
                    parts[extension.lower()] = TarMember(path, member.offset_data, member.size)
            except tarfile.TarError as error:
                damage = str(error)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not an uncompressed tar file: {error}") from error
    if parts:
        yield key, parts
    # Python takes a damaged or missing header for the end, which is really marked by blocks of zeros.
    with open(path, "rb") as file:
        file.seek(archive.offset)
        if damage is None and file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            damage = "its end is missing"
    if damage is not None:
        raise DamagedShard(f"{path} is damaged or cut off after {archive.offset:,} bytes: {damage}")
