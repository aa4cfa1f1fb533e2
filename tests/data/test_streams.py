"""Sources that are never listed: shards read from any place, what is broken in them, and memory."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import tracemalloc
from collections import deque

import pytest
from PIL import Image

from siglip_hf.data.shards import TarMember, tar_groups
from siglip_hf.data.sources import open_source
from siglip_hf.data.streams import open_stream

datasets = pytest.importorskip("datasets")


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def picture_bytes(number):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def pairs(first, count):
    """Members of pairs: a picture with its number as colour, and a caption."""
    for number in range(first, first + count):
        yield f"{number:03}.png", picture_bytes(number)
        yield f"{number:03}.txt", f"pair {number}".encode()


def numbers(found):
    return [int(record.captions[0].split()[1]) for _, record in found]


def test_tar_shards_are_read_as_a_list_of_them(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"s-{shard}.tar", pairs(10 * shard, 5))
    stream = pickle.loads(pickle.dumps(open_stream(str(tmp_path / "s-*.tar"))))
    assert stream.shards == ["s-0.tar", "s-1.tar", "s-2.tar"]
    assert list(stream) == list(open_source(str(tmp_path / "s-*.tar")))
    assert numbers(stream.records(1)) == [10, 11, 12, 13, 14]
    assert list(stream.records(1, 1, 2)) == [(1, list(stream)[6]), (3, list(stream)[8])]
    assert list(stream)[6].load_picture().getpixel((0, 0)) == (11, 0, 0)
    assert list(stream.records(0, 5)) == []


def test_what_is_broken_in_shards_is_named_and_the_rest_read(tmp_path):
    members = [*pairs(0, 2), ("002.json", b"[1]"), ("002.png", picture_bytes(2)), ("folder/note.md", b""), *pairs(3, 2)]
    write_tar(tmp_path / "a.tar", members)
    whole = write_tar(tmp_path / "b.tar", pairs(5, 3)).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: 4 * 1024 + 100])
    (tmp_path / "c.tar").write_bytes(b"no tar file" * 100)
    write_tar(tmp_path / "d.tar", pairs(8, 1))
    stream = open_stream(str(tmp_path / "?.tar"))
    found = list(stream)
    assert [record.captions[0] for record in found if record.error is None] == [
        f"pair {n}" for n in (0, 1, 3, 4, 5, 6, 8)
    ]
    errors = {record.id: record.error for record in found if record.error is not None}
    assert errors.keys() == {"a.tar/002", "b.tar", "c.tar"}
    assert "the .json of a.tar/002 must hold an object" in errors["a.tar/002"]
    assert "read until record 1" in errors["b.tar"]
    assert "b.tar is damaged or cut off after 4,096 bytes" in errors["b.tar"]
    assert "c.tar is not an uncompressed tar file" in errors["c.tar"]
    assert [place for place, _ in stream.records(0)] == [0, 1, 2, 4, 5], "what is no record keeps its place"
    (tmp_path / "d.tar").unlink()
    ((_, gone),) = stream.records(3)
    assert "d.tar: no such file" in gone.error


def test_memory_does_not_grow_with_the_shard(tmp_path):
    def peak(count):
        write_tar(
            tmp_path / "s.tar", ((f"{number:06}.{end}", b"text") for number in range(count) for end in ("png", "txt"))
        )
        stream = open_stream(tmp_path / "s.tar")
        tracemalloc.start()
        deque(stream, maxlen=0)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)  # what is made once
    assert peak(1500) < 150_000, "its headers alone would take 3 MB, the records of a list 1 MB"


def test_members_are_found_by_their_headers(tmp_path):
    path = str(write_tar(tmp_path / "s.tar", [("a/x.tar.png", b"12"), ("a/x.TXT", b"345"), ("y.png", b"")]))
    assert list(tar_groups(path)) == [
        ("a/x", {"tar.png": TarMember(path, 512, 2), "txt": TarMember(path, 1536, 3)}),
        ("y", {"png": TarMember(path, 2560, 0)}),
    ]


@pytest.fixture
def table(tmp_path):
    """Rows with encoded pictures and the names of classes, in three files."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": [datasets.Value("string")],
            "label": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    for shard in range(3):
        rows = [
            {"image": {"bytes": picture_bytes(n), "path": None}, "caption": [f"pair {n}"], "label": n % 2}
            for n in range(10 * shard, 10 * shard + 5)
        ]
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(tmp_path / f"t-{shard}.parquet")
    return tmp_path / "t-*.parquet"


def test_tables_are_streamed(table):
    for stream in (
        open_stream(str(table)),
        open_stream(datasets.load_dataset("parquet", data_files=str(table), split="train", streaming=True)),
    ):
        assert len(stream.shards) == 3
        assert numbers(stream.records(1)) == [10, 11, 12, 13, 14]
        assert [place for place, _ in stream.records(1, 1, 2)] == [1, 3]
        assert numbers(stream.records(1, 1, 2)) == [11, 13]
        record = list(stream)[7]
        assert (record.id, record.captions, record.label) == ("shard-1:2", ("pair 12",), "a")
        assert record.load_picture().getpixel((0, 0)) == (12, 0, 0)
        assert "PNG" not in repr(record)


def test_lines_that_name_their_pictures(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture_bytes(number))
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"pair {number}"}).encode() for number in range(3)]
    lines[1:1] = [b"", b'{"file_name": "no end', b'{"file_name": "0.png", "text": "\xff"}', b"{}"]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    stream = open_stream(tmp_path / "rows.jsonl")
    found = [record for record in stream if record.error is None]
    assert [record.path for record in found] == [str(tmp_path / f"{number}.png") for number in range(3)]
    assert [record.captions for record in found] == [("pair 0",), ("pair 1",), ("pair 2",)]
    broken, not_text = [record for record in stream if record.error is not None]
    assert (broken.id, not_text.id) == ("rows.jsonl:2", "0.png")
    assert "line 3 is not JSON" in broken.error
    assert "its caption is not Unicode text" in not_text.error
    assert [place for place, _ in stream.records(0, 1, 2)] == [3, 5]


def test_rows_that_a_generator_makes():
    def rows(shards):
        for shard in shards:
            for number in range(2):
                yield {"jpg": Image.new("RGB", (4, 4), (10 * shard + number, 0, 0)), "txt": f"pair {number}"}

    data = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1]})
    stream = open_stream(data, image_column="jpg", caption_column="txt")
    assert stream.shards == ["shard-0", "shard-1"]
    assert [record.load_picture().getpixel((0, 0))[0] for record in stream] == [0, 1, 10, 11]
    with pytest.raises(ValueError, match="it can be trained on"):
        open_source(data)
    with pytest.raises(ValueError, match="the dataset has no column 'img'; it has jpg, txt"):
        open_stream(data, image_column="img")


def test_what_cannot_be_streamed(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(0, 1))
    for data in (tmp_path, tmp_path / "a.csv", [tmp_path / "a.tar", tmp_path / "b.csv"], tmp_path / "a.tar.gz"):
        with pytest.raises(ValueError, match=r"cannot be streamed; give files of one kind: \.tar"):
            open_stream(data)
    with pytest.raises(FileNotFoundError, match=r"none\.tar: no such file"):
        open_stream([tmp_path / "a.tar", tmp_path / "none.tar"])
