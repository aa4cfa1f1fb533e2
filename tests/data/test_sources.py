"""Pictures, captions and labels from each kind of place, and what is said of those that hold none."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from siglip_hf.data.sources import Record, Source, open_source
from siglip_hf.preprocessing.image_intake import PictureError

datasets = pytest.importorskip("datasets")


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)
    return path


def picture_bytes(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "PNG")
    return file.getvalue()


def colour_of(record: Record) -> tuple[int, ...]:
    return record.load_picture().getpixel((0, 0))


def test_a_folder_of_class_folders(tmp_path):
    picture(tmp_path / "cat" / "b.png")
    picture(tmp_path / "cat" / "a.jpg")
    picture(tmp_path / "dog" / "deep" / "c.png")
    (tmp_path / "bird").mkdir()
    source = open_source(tmp_path)
    assert [(r.id, r.label) for r in source] == [("cat/a.jpg", "cat"), ("cat/b.png", "cat"), ("dog/deep/c.png", "dog")]
    assert source.classes() == ["cat", "dog"]
    assert source.unused == ["bird: a folder without pictures"]
    assert source[0].path == str(tmp_path / "cat" / "a.jpg")


def test_captions_beside_the_pictures(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("a red square\n\nein rotes Quadrat\n", encoding="utf-8")
    source = open_source(tmp_path)
    assert source[0].captions == ("a red square", "ein rotes Quadrat")
    with_captions = source.require("image", "captions")
    assert [r.id for r in with_captions] == ["a.png"]
    assert with_captions.unused == ["b.png: no captions"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_tables(tmp_path, suffix):
    picture(tmp_path / "p" / "a.png", "red")
    picture(tmp_path / "p" / "b.png", "blue")
    rows = [{"file_name": "p/a.png", "caption": "red, all of it"}, {"file_name": "p/b.png", "caption": "blue"}]
    path = tmp_path / f"table.{suffix}"
    if suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        comma = "," if suffix == "csv" else "\t"
        path.write_text("\n".join(comma.join(f'"{v}"' for v in row) for row in [rows[0], *map(dict.values, rows)]))
    source = open_source(path)
    assert [(r.id, r.captions) for r in source] == [("p/a.png", ("red, all of it",)), ("p/b.png", ("blue",))]
    assert colour_of(source[1]) == (0, 0, 255)


def test_named_columns_lists_and_empty_rows(tmp_path):
    rows = [{"pic": "a.png", "says": ["one", " two ", ""], "kind": 3}, {"pic": "", "says": None, "kind": None}]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = open_source(path, image_column="pic", caption_column="says", label_column="kind")
    assert [(r.captions, r.label) for r in source] == [(("one", "two"), "3")]
    assert source.unused == ["t:1: an empty row"]
    with pytest.raises(ValueError, match=r"has no column 'caption'; it has pic, says, kind"):
        open_source(path, caption_column="caption")
    with pytest.raises(ValueError, match=r"known by its name; it has pic, says, kind. Give .* --image-column NAME"):
        open_source(path)


def test_an_imagefolder_reads_its_metadata(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,hello\n")
    assert [(r.id, r.captions) for r in open_source(tmp_path)] == [("a.png", ("hello",))]


def test_datasets_in_memory_and_on_disk(tmp_path):
    data = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": picture_bytes("red"), "path": None}, {"bytes": picture_bytes("lime"), "path": None}],
            "label": [1, 0],
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}),
    )
    source = open_source(data)
    assert [r.label for r in source] == ["dog", "cat"]
    assert colour_of(source[1]) == (0, 255, 0)
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "d"))
    saved = open_source(tmp_path / "d", split="test")
    assert [colour_of(r) for r in saved] == [(0, 255, 0)]
    assert colour_of(pickle.loads(pickle.dumps(saved[0]))) == (0, 255, 0)  # as it goes to a worker process
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, test"):
        open_source(tmp_path / "d", split="dev")


@pytest.mark.parametrize(
    ("file", "text"), [("state.json", "{}"), ("dataset_info.json", "[]"), ("state.json", "[" * 9999)]
)
def test_a_damaged_dataset_is_named(tmp_path, file, text):
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "d"))
    (tmp_path / "d" / file).write_text(text)
    with pytest.raises(ValueError, match=r"d cannot be read: \w+"):
        open_source(str(tmp_path / "d"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read: \w+"):
        open_source(str(tmp_path / "a.parquet"))


def test_tar_shards(tmp_path):
    def shard(name: str, members: dict[str, bytes]) -> None:
        with tarfile.open(tmp_path / name, "w") as archive:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))

    shard(
        "s-0.tar",
        {"x/1.png": picture_bytes("red"), "x/1.txt": b"red", "x/2.png": picture_bytes("blue"), "x/2.cls": b"7"},
    )
    shard("s-1.tar", {"3.json": b'{"caption": ["blau", "blue"], "label": "sky"}', "3.seg.png": picture_bytes("blue")})
    source = open_source(str(tmp_path / "s-*.tar"))
    assert [(r.id, r.captions, r.label) for r in source] == [
        ("s-0.tar/x/1", ("red",), None),
        ("s-0.tar/x/2", (), "7"),
        ("s-1.tar/3", ("blau", "blue"), "sky"),
    ]
    assert colour_of(pickle.loads(pickle.dumps(source[1]))) == (0, 0, 255)
    (tmp_path / "broken.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"broken\.tar is not an uncompressed tar file"):
        open_source(tmp_path / "broken.tar")


def test_texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("a cat\n\na dog\n", encoding="utf-8")
    assert [(r.id, r.captions, r.image) for r in open_source(path)] == [
        ("0", ("a cat",), None),
        ("2", ("a dog",), None),
    ]


def test_globs_files_and_urls(tmp_path):
    one = picture(tmp_path / "a.png")
    assert [r.path for r in open_source(str(tmp_path / "*.png"))] == [str(one)]
    both = open_source([str(one), "https://example.com/b.png"])
    assert [r.path for r in both] == [str(one), None]
    assert isinstance(both[1:], Source)
    assert len(both[1:]) == 1


def test_empty_and_unknown(tmp_path):
    with pytest.raises(ValueError, match="is empty: it holds no picture and no text"):
        open_source(tmp_path)
    (tmp_path / "empty.csv").write_text("file_name,caption\n")
    with pytest.raises(ValueError, match=r"empty\.csv is empty"):
        open_source(tmp_path / "empty.csv")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_source(tmp_path / "nothing.csv")
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(ValueError, match="no known kind of source"):
        open_source(tmp_path / "a.docx")
    (tmp_path / "bad.jsonl").write_text('{"image": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl: line 1 is not JSON"):
        open_source(tmp_path / "bad.jsonl")
    for name in ("a.tar.gz", "a.tgz"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match="is a compressed tar file"):
            open_source(tmp_path / name)
    picture(tmp_path / "only" / "a.png")
    with pytest.raises(ValueError, match="none of 1 entries has a picture and a caption"):
        open_source(tmp_path / "only").require("image", "captions")


def test_a_broken_picture_names_its_record(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    (record,) = open_source(tmp_path)
    with pytest.raises(PictureError, match=r"a\.png.*not a picture in a format that Pillow can read"):
        record.load_picture()


# --- valid data that is easily misread


def test_line_ends_that_are_none(tmp_path):
    caption = "one\u2028two\x85three\x0bfour\x1cfive"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": caption}, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text(caption + "\r\nnext\rlast", encoding="utf-8", newline="")
    picture(tmp_path / "folder" / "a.png")
    (tmp_path / "folder" / "a.txt").write_text(caption + "\n\nnext", encoding="utf-8")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.png", picture_bytes("red"))
        add(tar, "a.txt", (caption + "\nnext").encode())
    assert open_source(tmp_path / "a.jsonl")[0].captions == (caption,)
    assert [record.captions for record in open_source(tmp_path / "a.txt")] == [(caption,), ("next",), ("last",)]
    assert open_source(tmp_path / "folder")[0].captions == (caption, "next")
    assert open_source(tmp_path / "a.tar")[0].captions == (caption, "next")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    texts = {
        "a.csv": "text,label\na cat,pet\n",
        "a.tsv": "text\tlabel\na cat\tpet\n",
        "a.jsonl": '{"text": "a cat", "label": "pet"}\n',
        "a.json": '[{"text": "a cat", "label": "pet"}]',
        "a.txt": "a cat\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        (record,) = open_source(tmp_path / name)
        assert (record.captions, record.label) == (("a cat",), None if name == "a.txt" else "pet"), name
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.txt", "b.json", "a.cls"):
            text = '{"caption": "a cat"}' if name == "b.json" else "a cat"
            add(tar, name, text.encode("utf-8-sig"))
    assert [(record.captions, record.label) for record in open_source(tmp_path / "a.tar")] == [
        (("a cat",), "a cat"),
        (("a cat",), None),
    ]


def test_long_cells_and_rows(tmp_path):
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f"text,label\n{long},pet,one cell too many\n")
    assert open_source(tmp_path / "a.csv")[0].captions == (long,)


# --- one bad entry costs only itself


def add(tar, name, content):
    """Puts a member into a tar file."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.json", b'{"caption": ', "the .json of b cannot be read: Expecting value"),
        ("b.json", b"[1]", "the .json of b must hold an object"),
        ("b.json", b"[" * 100_000, "the .json of b cannot be read: it is nested too deeply"),
        ("b.json", b'{"caption": "\xff"}', "the .json of b cannot be read: "),
        ("b.json", b'{"caption": "\\ud800"}', "its caption is not Unicode text"),
        ("b.txt", b"\xff", "the .txt of b cannot be read: "),
        ("b.cls", b"\xff", "the .cls of b cannot be read: "),
        ("b.cls", b"a\0b", "its label is not Unicode text"),
    ],
)
def test_a_malformed_member(tmp_path, name, content, message):
    with tarfile.open(tmp_path / "shard-7.tar", "w") as tar:
        add(tar, "a.png", picture_bytes("red"))
        add(tar, "b.png", picture_bytes("blue"))
        add(tar, name, content)
        add(tar, "c.png", picture_bytes("green"))
    good, bad, last = open_source(tmp_path / "shard-7.tar")
    assert (good.id, good.error, last.id, last.error) == ("a", None, "c", None)
    assert (bad.id, bad.image) == ("b", None)
    assert message in bad.error
    assert "shard-7.tar: " in bad.error or "Unicode" in bad.error
    with pytest.raises(PictureError, match="b"):
        bad.load_picture()
    kept = open_source(tmp_path / "shard-7.tar").require("image")
    assert [record.id for record in kept] == ["a", "c"]
    assert kept.unused == [f"b: {bad.error}"]


def test_a_name_in_a_tar_that_is_not_unicode(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "a.png", picture_bytes("red"))
        add(tar, "caf\udce9.png", picture_bytes("red"))
    good, bad = open_source(tmp_path / "a.tar")
    assert (good.error, bad.id) == (None, "caf\\udce9")
    assert "its name is not Unicode text" in bad.error


def test_a_damaged_header_in_a_tar_is_not_its_end(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        places = []
        for number in range(3):
            places.append(tar.offset)
            add(tar, f"{number}.png", picture_bytes("red"))
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[places[1] + 100] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    first, damage = open_source(tmp_path / "a.tar")
    assert (first.id, damage.id) == ("0", "a.tar")
    assert f"cut off after {places[1]:,} bytes" in damage.error
    content[places[1] + 100] ^= 1
    for size in (places[1], places[1] + 100, places[1] + 522, places[2], places[2] + 522):
        (tmp_path / "b.tar").write_bytes(content[:size])
        assert open_source(tmp_path / "b.tar")[-1].id == "b.tar", size


def test_captions_beside_a_picture_that_are_no_text(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / "folder" / f"{name}.png")
    (tmp_path / "folder" / "b.txt").write_bytes(b"\xff\xfe")
    good, bad = open_source(tmp_path / "folder")
    assert (good.error, bad.id) == (None, "b.png")
    assert bad.error.startswith("its captions cannot be read: ")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_nested_too_deeply(tmp_path, name):
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=rf"{name}.*not JSON: it is nested too deeply"):
        open_source(tmp_path / name)
