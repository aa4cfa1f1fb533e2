"""Damage: of embeddings on disk it is named and mended; a bad source file is a row with an error."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from embed_runs import Killed, by_id, files, flip
from siglip_hf.data.store import EmbeddingStore, EmbeddingWriter, Manifest

pytest.importorskip("pyarrow")


def test_damage_is_named_and_mended(embed, photos, tmp_path):
    out = tmp_path / "emb"
    embed(photos, out)
    before = by_id(out)
    part = out / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"part-00001\.parquet is missing or damaged"):
        EmbeddingStore.open(out)
    assert embed(photos, out).done == 4
    assert by_id(out).keys() == before.keys()
    (out / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format version 99"):
        EmbeddingStore.open(out)
    with pytest.raises(ValueError, match="holds no embeddings"):
        EmbeddingStore.open(photos)


def test_any_flipped_bit_is_found(embed, photos, tmp_path):
    out = tmp_path / "emb"
    embed(photos, out)
    for file in sorted(out.glob("[!.]*")):
        size = 8 * file.stat().st_size
        for place in range(0, size, 17 if file.name == "manifest.json" else 997):
            flip(file, place)
            with pytest.raises(ValueError, match=f"{file.name} is (missing or )?damaged"):
                EmbeddingStore.open(out)
            flip(file, place)
    assert len(EmbeddingStore.open(out)) == 9


def test_a_damaged_part_is_made_anew_and_named(embed, photos, tmp_path):
    out = tmp_path / "emb"
    embed(photos, out)
    before = by_id(out)
    for name in ("part-00000.parquet", "part-00001.parquet"):
        rows = Manifest.read(out).parts[name]
        flip(out / name, 4 * (out / name).stat().st_size)
        result = embed(photos, out)
        assert (result.done, result.damaged) == (rows, [name])
        found = by_id(out)
        assert all(np.array_equal(found[id_], vector) for id_, vector in before.items())
    missing = max(out.glob("part-*.parquet"))
    missing.unlink()
    assert embed(photos, out).damaged == [missing.name]
    assert embed(photos, out).damaged == []


def test_a_damaged_batch_of_a_killed_run_is_made_anew(embed, photos, tmp_path, monkeypatch):
    embed(photos, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingWriter, "_fold", lambda writer: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            embed(photos, tmp_path / "emb")
    batches = sorted((tmp_path / "emb").glob("batch-*.parquet"))
    assert len(batches) == 2
    flip(batches[1], 800)
    result = embed(photos, tmp_path / "emb")
    assert (result.kept, result.done, result.damaged) == (3, 7, [batches[1].name])
    assert by_id(tmp_path / "emb").keys() == by_id(tmp_path / "whole").keys()


def test_a_folder_without_checksums_is_read_and_gets_them(embed, photos, tmp_path):
    out = tmp_path / "emb"
    embed(photos, out)
    before, whole = by_id(out), files(out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest = {name: value for name, value in manifest.items() if name not in ("checksum", "checksums")}
    (out / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    store = EmbeddingStore.open(out)
    assert not store.has_checksums
    assert len(store) == 9
    result = embed(photos, out)
    assert (result.done, result.kept, result.damaged) == (0, 10, [])
    assert files(out) == whole
    assert EmbeddingStore.open(out).has_checksums
    assert all(np.array_equal(vector, before[id_]) for id_, vector in by_id(out).items())


def test_only_regular_files_are_read(embed, photos, tmp_path):
    os.mkfifo(photos / "a" / "fifo.jpg")
    (photos / "a" / "nothing.jpg").symlink_to(tmp_path / "gone.jpg")
    (photos / "a" / "zero.jpg").symlink_to("/dev/zero")
    (photos / "a" / "folder.jpg").mkdir()
    errors = dict(embed(photos, tmp_path / "emb").errors)
    assert errors.keys() == {"a/2.jpg", "a/fifo.jpg", "a/nothing.jpg", "a/zero.jpg"}
    assert errors["a/fifo.jpg"] == errors["a/zero.jpg"] == "it is a FIFO, socket or device, not a file"
    assert errors["a/nothing.jpg"] == "No such file or directory"
    table = tmp_path / "table.csv"
    table.write_text("path\nphotos/a/fifo.jpg\n/dev/zero\nphotos/a\nphotos/a/0.jpg\n")
    errors = dict(embed(table, tmp_path / "emb2").errors)
    assert errors == {
        "photos/a/fifo.jpg": "it is a FIFO, socket or device, not a file",
        "/dev/zero": "it is a FIFO, socket or device, not a file",
        "photos/a": "it is a folder, not a file",
    }


def test_names_that_are_not_unicode_are_rows_with_an_error(embed, photos, tmp_path):
    shutil.copy(photos / "a" / "0.jpg", os.fsencode(photos / "a") + b"/caf\xe9.jpg")
    errors = dict(embed(photos, tmp_path / "emb").errors)
    assert errors.keys() == {"a/2.jpg", "a/caf\\udce9.jpg"}
    assert errors["a/caf\\udce9.jpg"] == "its name is not Unicode text: 'a/caf\\udce9.jpg'"
    (tmp_path / "table.jsonl").write_text(
        '{"image": "photos/a/0.jpg"}\n{"image": "photos/\\ud800.jpg"}\n{"image": "photos/\\u0000.jpg"}\n{\n'
    )
    result = embed(tmp_path / "table.jsonl", tmp_path / "emb2")
    errors = dict(result.errors)
    assert errors.keys() == {"photos/\\ud800.jpg", "photos/\\x00.jpg", "table:3"}
    assert errors["table:3"].startswith("line 4 is not JSON")
    assert embed(tmp_path / "table.jsonl", tmp_path / "emb2").kept == 4
    (tmp_path / "texts.jsonl").write_text('{"text": "a cat"}\n{"text": "a \\udc00"}\n{"text": "a \\u0000"}\n')
    result = embed(tmp_path / "texts.jsonl", tmp_path / "emb3")
    assert [id_ for id_, _ in result.errors] == ["texts:1", "texts:2"]
    assert EmbeddingStore.open(tmp_path / "emb3").rows(["text"])["text"].to_pylist() == ["a cat"]


def test_a_damaged_shard_is_a_row_with_an_error(embed, photos, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in ("a/0.jpg", "b/1.jpg"):
            tar.add(photos / name, Path(name).name)
            boundary = tar.offset
        tar.add(photos / "b" / "3.jpg", "3.jpg")
    content = (tmp_path / "shard.tar").read_bytes()
    (tmp_path / "shard.tar").write_bytes(content[:boundary])
    result = embed(tmp_path / "shard.tar", tmp_path / "emb")
    assert by_id(tmp_path / "emb").keys() == {"0", "1"}
    ((id_, error),) = result.errors
    assert id_ == "shard.tar"
    assert error.endswith(f"shard.tar is damaged or cut off after {boundary:,} bytes: its end is missing")
    (tmp_path / "shard.tar").write_bytes(content)
    result = embed(tmp_path / "shard.tar", tmp_path / "emb")
    assert (result.done, result.removed, result.errors) == (1, 1, [])
