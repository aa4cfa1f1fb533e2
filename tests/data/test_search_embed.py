"""`siglip-hf embed`: what lands on disk, what a second run does, and what happens when things go wrong."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import siglip_hf
from embed_runs import Killed, by_id, files, flip
from siglip_hf.cli.common import EMBEDDED
from siglip_hf.cli.main import main
from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.data.store import EmbeddingStore, EmbeddingWriter, Manifest, picture_at
from siglip_hf.preprocessing.image_intake import load_picture
from tiny_checkpoint import TEXT_LENGTH

pytest.importorskip("pyarrow")


def test_rows_hold_what_the_model_gives(embed, checkpoint, pictures, tmp_path):
    result = embed(pictures, tmp_path / "emb", dtype="float32", store_dtype="float32", fast=False)
    ids = [*(f"a/{n}.jpg" for n in (0, 4, 6, 8)), *(f"b/{n}.jpg" for n in (1, 3, 5, 7, 9))]
    assert (result.done, result.kept, result.removed) == (10, 0, 0)
    assert [id_ for id_, _ in result.errors] == ["a/2.jpg"]
    assert "truncated" in result.errors[0][1].lower()

    store = EmbeddingStore.open(tmp_path / "emb")
    assert len(store) == 9
    rows = store.rows().to_pylist()
    assert [row["id"] for row in rows] == ids
    for row in rows:
        file = pictures / row["id"]
        assert row["path"] == str(file)
        assert picture_at(row["path"]) == str(file)
        assert (row["width"], row["height"]) == Image.open(file).size
        assert row["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert row["text"] is None

    model = siglip_hf.SiglipModel.from_pretrained(checkpoint)
    processor = siglip_hf.SiglipImageProcessorFast.from_pretrained(checkpoint)
    with torch.no_grad():
        pixels = processor(images=[load_picture(pictures / id_) for id_ in ids], return_tensors="pt").pixel_values
        expected = model.encode_image(pixels).numpy()
    np.testing.assert_allclose(store.vectors(), expected, atol=1e-5)

    manifest = store.manifest
    assert (manifest.kind, manifest.dimension, manifest.dtype, manifest.normalized) == ("image", 32, "float32", True)
    assert (manifest.model, manifest.compute_dtype) == (str(checkpoint), "float32")
    assert manifest.model_sha256 == hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert manifest.preprocessing["size"] == {"height": 32, "width": 32}
    assert manifest.parts == {"part-00000.parquet": 6, "part-00001.parquet": 4}


def test_half_the_bytes_keep_the_directions(embed, pictures, tmp_path):
    import pyarrow.parquet as parquet

    embed(pictures, tmp_path / "half")
    embed(pictures, tmp_path / "full", store_dtype="float32")
    half, full = (EmbeddingStore.open(tmp_path / name).vectors() for name in ("half", "full"))
    assert half.dtype == full.dtype == np.float32
    np.testing.assert_allclose(half, full, atol=5e-4)
    np.testing.assert_allclose(np.linalg.norm(full, axis=1), 1, atol=1e-6)
    schema = parquet.read_schema(tmp_path / "half" / "part-00000.parquet")
    assert str(schema.field("embedding").type) == "fixed_size_list<element: halffloat>[32]"


def test_batches_of_the_store_pair_rows_with_vectors(embed, pictures, tmp_path):
    embed(pictures, tmp_path / "emb")
    store = EmbeddingStore.open(tmp_path / "emb")
    batches = [(table["id"].to_pylist(), vectors) for table, vectors in store.iter_batches(["id"])]
    assert [len(ids) for ids, _ in batches] == [5, 4]  # the broken one is in the first part
    expected = by_id(tmp_path / "emb")
    for ids, vectors in batches:
        np.testing.assert_array_equal(vectors, [expected[id_] for id_ in ids])


def stop_after(monkeypatch, steps):
    """Ends the run before the next file gets its name, or is removed, once `steps` of these have happened."""
    left = [steps]

    def counted(function):
        def count(*arguments, **options):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return function(*arguments, **options)

        return count

    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


def test_stopped_anywhere_it_ends_like_an_unbroken_run(embed, photos, tmp_path, monkeypatch):
    embed(photos, tmp_path / "whole")
    out = tmp_path / "emb"
    for steps in range(20):
        shutil.rmtree(out, ignore_errors=True)
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            try:
                embed(photos, out)
                break
            except Killed:
                pass
        with pytest.raises(ValueError, match=r"is not finished|holds no embeddings"):
            EmbeddingStore.open(out)
        embed(photos, out)
        assert files(out) == files(tmp_path / "whole"), steps
    assert steps > 8  # files written and removed in a whole run: so many moments were tried


def test_stopped_updates_end_like_unbroken_ones(embed, photos, tmp_path, monkeypatch):
    embed(photos, tmp_path / "before")

    def change():
        (photos / "a" / "0.jpg").unlink()
        shutil.copy(photos / "b" / "9.jpg", photos / "b" / "1.jpg")
        Image.new("RGB", (9, 9), "red").save(photos / "a" / "new.png")

    change()
    whole = Path(shutil.copytree(tmp_path / "before", tmp_path / "whole"))
    result = embed(photos, whole)
    assert (result.done, result.kept, result.removed) == (2, 8, 1)
    out = tmp_path / "emb"
    for steps in range(20):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "before", out)
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            try:
                embed(photos, out)
                break
            except Killed:
                pass
        embed(photos, out)
        assert files(out) == files(whole), steps
    assert steps > 4


def test_a_second_run_does_nothing(embed, photos, tmp_path, monkeypatch):
    embed(photos, tmp_path / "emb")
    before = files(tmp_path / "emb")
    monkeypatch.setattr(SiglipEmbedder, "encode_images", lambda *_: pytest.fail("embedded again"))
    result = embed(photos, tmp_path / "emb")
    assert (result.done, result.kept, result.removed) == (0, 10, 0)
    assert files(tmp_path / "emb") == before


def test_nothing_that_is_on_disk_is_done_again(embed, photos, tmp_path, monkeypatch):
    embed(photos, tmp_path / "whole")
    append, appended = EmbeddingWriter.append, []

    def append_twice(writer, rows, embeddings):
        if len(appended) == 2:
            raise Killed
        append(writer, rows, embeddings)
        appended.append([row["id"] for row in rows])

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingWriter, "append", append_twice)
        with pytest.raises(Killed):
            embed(photos, tmp_path / "emb")
    result = embed(photos, tmp_path / "emb")
    assert (result.kept, result.done) == (6, 4)
    assert files(tmp_path / "emb") == files(tmp_path / "whole")


def test_changes_are_noticed(embed, photos, tmp_path):
    out = tmp_path / "emb"
    embed(photos, out)
    before = by_id(out)

    changed, touched, gone, mended = (photos / name for name in ("a/0.jpg", "a/4.jpg", "b/9.jpg", "a/2.jpg"))
    times = changed.stat()
    Image.new("RGB", (40, 30), "blue").save(changed)
    os.utime(touched, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    gone.unlink()
    Image.new("RGB", (40, 30), "green").save(mended)
    Image.new("RGB", (40, 30), "yellow").save(photos / "b" / "10.jpg")
    result = embed(photos, out)
    assert (result.done, result.kept, result.removed, result.errors) == (3, 7, 1, [])

    after = by_id(out)
    assert after.keys() == before.keys() - {"b/9.jpg"} | {"a/2.jpg", "b/10.jpg"}
    for id_ in after.keys() & before.keys():
        assert np.array_equal(after[id_], before[id_]) == (id_ != "a/0.jpg"), id_
    fresh = tmp_path / "fresh"
    embed(photos, fresh)
    for id_, vector in by_id(fresh).items():
        assert after[id_] @ vector > 0.999, id_
    assert embed(photos, out).done == 0  # the touched file's new time is remembered


def test_files_that_cannot_be_read_are_tried_again(embed, photos, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("path\nphotos/a/0.jpg\nphotos/a/missing.jpg\nphotos/a\n")
    result = embed(table, tmp_path / "emb")
    assert dict(result.errors).keys() == {"photos/a/missing.jpg", "photos/a"}
    assert dict(result.errors)["photos/a/missing.jpg"] == "No such file or directory"
    assert embed(table, tmp_path / "emb").done == 0
    shutil.copy(photos / "a" / "0.jpg", photos / "a" / "missing.jpg")
    result = embed(table, tmp_path / "emb")
    assert (result.done, dict(result.errors).keys()) == (1, {"photos/a"})
    found = by_id(tmp_path / "emb")
    np.testing.assert_allclose(found["photos/a/missing.jpg"], found["photos/a/0.jpg"], atol=1e-2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_forbidden_files(embed, photos, tmp_path):
    (photos / "a" / "0.jpg").chmod(0)
    assert dict(embed(photos, tmp_path / "emb").errors)["a/0.jpg"] == "Permission denied"


def test_a_huge_jpeg_is_an_error_and_costs_no_memory(embed, photos, tmp_path):
    file = photos / "huge.jpg"
    Image.new("RGB", (64, 64)).save(file)
    content = file.read_bytes()
    frame = content.index(b"\xff\xc0")  # start of frame: length, precision, height, width
    size = (20_000).to_bytes(2, "big")
    file.write_bytes(content[: frame + 5] + size + size + content[frame + 9 :])
    with Image.open(photos / "a" / "0.jpg") as small:
        assert small.size == (40, 30)
    errors = dict(embed(photos, tmp_path / "emb").errors)
    assert "400000000 pixels" in errors["huge.jpg"]


def test_a_large_jpeg_keeps_its_size_though_it_is_decoded_smaller(embed, tmp_path):
    (tmp_path / "large").mkdir()
    file = tmp_path / "large" / "x.jpg"
    tag = Image.Exif()
    tag[0x0112] = 6  # to be turned by 90 degrees
    Image.new("L", (9000, 6000), 128).save(file, exif=tag)
    embed(tmp_path / "large", tmp_path / "emb")
    (row,) = EmbeddingStore.open(tmp_path / "emb").rows().to_pylist()
    assert (row["width"], row["height"]) == (6000, 9000)


def test_the_disk_is_full(embed, photos, tmp_path, monkeypatch):
    embed(photos, tmp_path / "whole")
    out, write_bytes = tmp_path / "emb", Path.write_bytes
    for room in range(10):  # files, the manifest among them
        shutil.rmtree(out, ignore_errors=True)
        left = [room]

        def write(path, content, left=left):
            if not left[0]:
                write_bytes(path, b"half a fi")
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
            return write_bytes(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", write)
            with pytest.raises(OSError, match=r"No space left on device.*what was done before is safe") as caught:
                embed(photos, out)
        assert caught.value.errno == errno.ENOSPC
        assert not list(out.glob(".*.partial"))
        embed(photos, out)
        assert files(out) == files(tmp_path / "whole"), room


def test_one_run_at_a_time(embed, photos, tmp_path):
    embed(photos, tmp_path / "emb")
    message = r"another run is writing to .*emb"
    with (
        EmbeddingWriter(tmp_path / "emb", Manifest.read(tmp_path / "emb")),
        pytest.raises(OSError, match=message),
    ):
        embed(photos, tmp_path / "emb")
    assert embed(photos, tmp_path / "emb").kept == 10


def test_what_does_not_fit_is_refused(embed, checkpoint, photos, tmp_path):
    out = tmp_path / "emb"
    embed(photos, out)
    before = files(out)
    with pytest.raises(ValueError, match="dtype='float16', not 'float32'"):
        embed(photos, out, store_dtype="float32")
    with pytest.raises(ValueError, match=r"compute_dtype=.*, not 'float16'"):
        embed(photos, out, dtype="float16")
    with pytest.raises(ValueError, match=r"the weights of .*, not those of .*siglip-hf-pictures-64"):
        embed(photos, out, model=siglip_hf.default_checkpoint())
    shutil.copytree(photos / "a", tmp_path / "other" / "c")
    with pytest.raises(ValueError, match="holds 10 rows, and none of them is in this source"):
        embed(tmp_path / "other", out)
    assert files(out) == before
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert embed(photos, out, model=moved).kept == 10  # the same weights elsewhere

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no embeddings"):
        embed(photos, tmp_path / "full")
    with pytest.raises(ValueError, match="is a file"):
        embed(photos, tmp_path / "full" / "diary.txt")


def test_nothing_to_embed(embed, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("no picture")
    for folder in ("empty", "notes"):
        with pytest.raises(ValueError, match="is empty: it holds no picture"):
            embed(tmp_path / folder, tmp_path / "emb")
    with pytest.raises(FileNotFoundError, match="no such file"):
        embed(tmp_path / "missing", tmp_path / "emb")
    assert not (tmp_path / "emb").exists()


def test_texts(embed, checkpoint, tmp_path):
    lines = ["the cat", "a small dog", "the cat"]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    embed(tmp_path / "captions.txt", tmp_path / "emb", dtype="float32", store_dtype="float32", fast=False)
    store = EmbeddingStore.open(tmp_path / "emb")
    rows = store.rows().to_pylist()
    assert [row["text"] for row in rows] == lines
    assert [row["sha256"] for row in rows] == [hashlib.sha256(line.encode()).hexdigest() for line in lines]
    assert store.manifest.kind == "text"
    assert store.manifest.preprocessing["max_length"] == TEXT_LENGTH
    processor = siglip_hf.SiglipProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        ids = processor(text=lines, return_tensors="pt").input_ids
        expected = siglip_hf.SiglipModel.from_pretrained(checkpoint).encode_text(ids).numpy()
    np.testing.assert_allclose(store.vectors(), expected, atol=1e-5)

    (tmp_path / "captions.txt").write_text("\n".join([lines[0], "a big dog", lines[2]]))
    result = embed(tmp_path / "captions.txt", tmp_path / "emb", fast=False, store_dtype="float32")
    assert (result.done, result.kept) == (1, 2)
    with pytest.raises(ValueError, match="kind='text', not 'image'"):
        embed("src/siglip_hf/apps/pictures", tmp_path / "emb", store_dtype="float32")


def test_pictures_and_captions_of_one_table(embed, photos, tmp_path):
    with open(tmp_path / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["image", "caption"], [f"file://{photos}/a/0.jpg", "one"], ["photos/b/1.jpg", "two"], ["", "three"]]
        )
    (tmp_path / "table.jsonl").write_text(json.dumps({"image": "photos/a/0.jpg", "caption": ["one", "two"]}))
    result = embed(tmp_path / "table.csv", tmp_path / "pictures")
    paths = EmbeddingStore.open(tmp_path / "pictures").rows(["path"])["path"].to_pylist()
    assert paths == [str(photos / "a" / "0.jpg"), str(photos / "b" / "1.jpg")]
    assert result.unused == ["table:2: no image"]
    embed(tmp_path / "table.csv", tmp_path / "texts", kind="text")
    assert EmbeddingStore.open(tmp_path / "texts").rows(["text"])["text"].to_pylist() == ["one", "two", "three"]
    embed(tmp_path / "table.jsonl", tmp_path / "several", kind="text")
    rows = EmbeddingStore.open(tmp_path / "several").rows(["id", "text"]).to_pylist()
    assert [(row["id"], row["text"]) for row in rows] == [("photos/a/0.jpg#0", "one"), ("photos/a/0.jpg#1", "two")]


def test_globs_and_several_folders(embed, photos, tmp_path):
    embed([str(photos / "a"), str(photos / "b" / "*.jpg")], tmp_path / "emb")
    assert by_id(tmp_path / "emb").keys() == {str(file) for file in photos.glob("*/*.jpg") if file.name != "2.jpg"}


def test_tar_shards_and_datasets(embed, photos, tmp_path):
    datasets = pytest.importorskip("datasets")
    chosen = [photos / "a" / "0.jpg", photos / "b" / "1.jpg"]
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in chosen:
            tar.add(file, file.name)
    data = datasets.Dataset.from_dict({"image": list(map(str, chosen))}).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "dataset")
    embed(photos, tmp_path / "files")
    expected = list(by_id(tmp_path / "files").values())
    for name in ("shard.tar", "dataset"):
        out = tmp_path / f"{name}.emb"
        embed(tmp_path / name, out)
        store = EmbeddingStore.open(out)
        np.testing.assert_allclose(store.vectors(), [expected[0], expected[4]], atol=1e-2, err_msg=name)
        assert store.rows(["sha256"])["sha256"].to_pylist() == [
            hashlib.sha256(file.read_bytes()).hexdigest() for file in chosen
        ]
        assert embed(tmp_path / name, out).done == 0
    paths = EmbeddingStore.open(tmp_path / "shard.tar.emb").rows(["path"])["path"].to_pylist()
    assert [picture_at(path) for path in paths] == [file.read_bytes() for file in chosen]


def test_two_entries_of_one_name(embed, photos, tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        with tarfile.open(tmp_path / folder / "shard.tar", "w") as tar:
            tar.add(photos / "a" / "0.jpg", "0.jpg")
    with pytest.raises(ValueError, match=r"two entries are called 'shard\.tar/0'"):
        embed([str(tmp_path / folder / "shard.tar") for folder in ("x", "y")], tmp_path / "emb")


def test_naflex(embed, photos, tmp_path):
    from tiny_siglip2 import write_naflex

    write_naflex(tmp_path / "naflex")
    embed(photos, tmp_path / "emb", model=tmp_path / "naflex", dtype="float32", store_dtype="float32", fast=False)
    store = EmbeddingStore.open(tmp_path / "emb")
    model = siglip_hf.Siglip2Model.from_pretrained(tmp_path / "naflex")
    paths = store.rows(["path"])["path"].to_pylist()
    with torch.no_grad():
        expected = model.encode_image(paths, max_num_patches=256).numpy()
    np.testing.assert_allclose(store.vectors(), expected, atol=1e-4)
    assert store.manifest.preprocessing["max_num_patches"] == 256


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command(capsys, checkpoint, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(siglip_hf, "default_checkpoint", lambda: str(checkpoint))
    monkeypatch.setattr("siglip_hf.data.embedder.default_checkpoint", lambda: str(checkpoint))
    out = tmp_path / "emb"
    code, text, errors = run(capsys, "embed", photos, "--out", out)
    assert code == 1
    assert text.startswith(f"{out}: 9 pictures of 32 numbers; 10 done at ")
    assert text.endswith("/s, 0 kept, 0 removed\n")
    assert errors.startswith(EMBEDDED)
    assert errors.splitlines()[1].startswith("skipped a/2.jpg: ")
    assert errors.splitlines()[-1] == "1 of 10 skipped"
    (photos / "a" / "2.jpg").unlink()
    flip(out / "part-00000.parquet", 800)
    code, text, errors = run(capsys, "embed", photos, "--out", out)
    assert (code, errors) == (0, f"{EMBEDDED}{out}: part-00000.parquet was damaged; its rows have been rebuilt\n")
    code, text, errors = run(capsys, "embed", photos, "--out", out)
    assert (code, text, errors) == (0, f"{out}: 9 pictures of 32 numbers; 0 done, 9 kept, 0 removed\n", EMBEDDED)

    for arguments, message in (
        ([photos, "--out", out, "--model", "no/such/folder"], "cannot load 'no/such/folder'"),
        ([photos, "--out", out, "--dtype", "int7"], "dtype='int7'"),
        ([photos, "--out", out, "--device", "abacus"], "abacus"),
        ([photos, "--out", out, "--engine", "steam"], "engine='steam'"),
        ([photos, "--out", out, "--address", "auto"], "--engine ray"),
        ([photos, "--out", out, "--kind", "sound"], "kind='sound'"),
        ([photos, "--out", out, "--store-dtype", "int8"], "store_dtype='int8'"),
        ([photos, "--out", photos], "is not empty and holds no embeddings"),
        ([photos], "--out"),
    ):
        code, text, errors = run(capsys, "embed", *arguments)
        assert (code, text) == (2, ""), arguments
        assert message in errors
        assert errors.count("\n") == 1


def test_two_commands_at_once(capsys, checkpoint, photos, tmp_path):
    out = tmp_path / "emb"
    run(capsys, "embed", photos, "--out", out, "--model", checkpoint)
    with EmbeddingWriter(out, Manifest.read(out)):
        code, text, errors = run(capsys, "embed", photos, "--out", out, "--model", checkpoint)
    assert (code, text) == (2, "")
    assert "is writing to" in errors
    assert errors.count("\n") == 1
