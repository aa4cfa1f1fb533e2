"""The label bank on disk: encoded once for all processes, never for another model, whole after damage, bounded."""

from __future__ import annotations

import multiprocessing
import sqlite3

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from siglip_hf.inference.label_bank import LabelBank
from siglip_hf.inference.label_store import LabelStore, text_side_digest
from siglip_hf.inference.optimize.optimization import optimize
from siglip_hf.inference.pipeline import SiglipZeroShotImageClassificationPipeline
from siglip_hf.loading import load_checkpoint
from tiny_checkpoint import write_tiny_checkpoint

LABELS, TEMPLATES = ["cat", "red_car", "big house"], ["a photo of {}.", "{}"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def loaded(checkpoint):
    return load_checkpoint(checkpoint)


def bank_of(loaded, folder, **options) -> LabelBank:
    return LabelBank(loaded[0], loaded[1].tokenizer, store=LabelStore(folder), **options)


def test_another_bank_finds_what_was_encoded(loaded, tmp_path):
    expected = LabelBank(loaded[0], loaded[1].tokenizer).class_embeddings(LABELS, TEMPLATES)
    first = bank_of(loaded, tmp_path / "bank")
    torch.testing.assert_close(first.class_embeddings(LABELS, TEMPLATES), expected, atol=0, rtol=0)
    assert first.texts_encoded == 6
    second = bank_of(loaded, tmp_path / "bank", max_bytes=0)
    torch.testing.assert_close(second.class_embeddings(LABELS[::-1], TEMPLATES), expected.flip(0), atol=0, rtol=0)
    assert second.texts_encoded == 0
    second.class_embeddings([*LABELS, "dog"], TEMPLATES)
    assert second.texts_encoded == 2


def test_template_and_weights_are_part_of_the_key(loaded, tmp_path):
    bank_of(loaded, tmp_path).class_embeddings(LABELS, TEMPLATES)
    bank = bank_of(loaded, tmp_path)
    bank.class_embeddings(LABELS, TEMPLATES[:1])
    assert bank.texts_encoded == 3
    with torch.no_grad():
        next(loaded[0].text_model.parameters()).mul_(1.01)
    bank.class_embeddings(LABELS, TEMPLATES[:1])
    assert bank.texts_encoded == 6


def test_the_digest_tells_weights_settings_tokenizers_and_int8(checkpoint):
    def digest(change=lambda model, tokenizer: None):
        model, processor = load_checkpoint(checkpoint)
        change(model, processor.tokenizer)
        return text_side_digest(model, processor.tokenizer)

    def last_weight(model, tokenizer):
        model.text_model.head.weight.data[-1, -1] += 1e-3

    def epsilon(model, tokenizer):
        model.config.text_config.layer_norm_eps = 1e-3

    def bfloat16(model, tokenizer):
        model.to(torch.bfloat16)

    def int8(model, tokenizer):
        optimize(model, torch.float32, int8=True)
        assert model.optimization.packed_blocks

    def packed_other_weight(model, tokenizer):
        model.text_model.encoder.layers[0].mlp.fc1.weight.data[-1, -1] += 1e-3
        optimize(model, torch.float32)
        assert model.optimization.packed_blocks

    changes = [last_weight, epsilon, bfloat16, int8, packed_other_weight]
    plain, *others = digest(), *map(digest, changes)
    assert plain == digest()
    assert digest(int8) == others[3]
    assert len({plain, *others}) == len(changes) + 1
    cased = AutoTokenizer.from_pretrained(checkpoint, do_lower_case=False)
    assert text_side_digest(load_checkpoint(checkpoint)[0], cased) not in (plain, *others)


def test_what_cannot_be_told_is_not_kept(loaded, tmp_path):
    """A layer of another package may hide a switch."""

    class Adapter(nn.Linear):
        pass

    model = loaded[0]
    model.text_model.adapter = Adapter(2, 2)
    assert text_side_digest(model, loaded[1].tokenizer) is None
    bank = bank_of(loaded, tmp_path)
    bank.class_embeddings(LABELS, TEMPLATES)
    assert not (tmp_path / "labels.sqlite").exists()


def test_a_damaged_row_is_missing_and_a_damaged_file_begun_anew(tmp_path):
    store = LabelStore(tmp_path)
    store.put({"a": np.ones(4), "b": np.zeros(4)})
    with sqlite3.connect(tmp_path / "labels.sqlite") as database:
        database.execute("UPDATE rows SET row = ? WHERE key = 'a'", [np.full(4, 2, np.float32).tobytes()])
    assert list(store.get(["a", "b"])) == ["b"]

    (tmp_path / "labels.sqlite").write_bytes(b"no database" * 1000)
    assert store.get(["b"]) == {}
    store.put({"b": np.ones(4)})
    assert store.get(["b"])["b"].tolist() == [1, 1, 1, 1]


def test_cells_of_another_type_are_missing(tmp_path):
    store = LabelStore(tmp_path)
    store.put({name: np.ones(4) for name in "abc"})
    with sqlite3.connect(tmp_path / "labels.sqlite") as database:
        database.execute("UPDATE rows SET row = NULL, used = NULL WHERE key = 'a'")
        database.execute("UPDATE rows SET row = 'text' WHERE key = 'b'")
        database.execute("UPDATE rows SET used = NULL WHERE key = 'c'")
    assert list(store.get(["a", "b", "c"])) == ["c"]


def cut(file):
    file.write_bytes(file.read_bytes()[:-400])


def rename_a_column(file):
    with sqlite3.connect(file) as database:
        database.execute("ALTER TABLE rows RENAME COLUMN row TO column")


@pytest.mark.parametrize("damage", [cut, rename_a_column])
def test_after_damage_rows_are_missing_never_wrong_and_soon_kept_again(tmp_path, damage):
    store, rows = LabelStore(tmp_path), {f"{number}": np.full(64, number) for number in range(100)}
    store.put(rows)
    damage(tmp_path / "labels.sqlite")
    for _ in range(3):  # damage may show when rows are written
        found = store.get(list(rows))
        assert all(np.array_equal(found[key], rows[key]) for key in found)
        store.put({key: row for key, row in rows.items() if key not in found})
    assert len(store.get(list(rows))) == len(rows)


@pytest.mark.parametrize("reason", ["database is locked", "attempt to write a readonly database"])
def test_a_bank_that_cannot_be_used_now_is_not_thrown_away(tmp_path, monkeypatch, reason):
    store = LabelStore(tmp_path)
    store.put({"a": np.ones(4)})
    connect, errors = sqlite3.connect, [sqlite3.DatabaseError("malformed"), sqlite3.OperationalError(reason)]

    def fail(*arguments, **options):
        if errors:
            raise errors.pop(0)
        return connect(*arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", fail)
    assert list(store.get(["a"])) == ["a"]


def test_the_file_is_bounded_and_the_oldest_go_first(tmp_path, monkeypatch):
    store = LabelStore(tmp_path, max_bytes=100_000)
    for number in range(30):
        monkeypatch.setattr("siglip_hf.inference.label_store.time.time", lambda now=number * 10_000: now)
        store.put({f"{number} {i}": np.full(1000, i) for i in range(4)})
        store.get(["0 0"])  # used each time
    assert (tmp_path / "labels.sqlite").stat().st_size < 130_000
    kept = store.get([f"{number} 1" for number in range(30)])
    assert 3 < len(kept) < 25
    assert sorted(kept) == sorted(f"{number} 1" for number in range(30 - len(kept), 30))
    assert list(store.get(["0 0"])) == ["0 0"]


def write_rows(folder, number):
    store = LabelStore(folder)
    for i in range(20):
        store.put({f"{number} {i}": np.full(16, i)})


def test_processes_write_at_once(tmp_path):
    """All rows of all are there afterwards, the file made by whoever came first."""
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_rows, args=(tmp_path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(LabelStore(tmp_path).get([f"{n} {i}" for n in range(4) for i in range(20)])) == 80


def test_a_disk_that_cannot_be_written_costs_no_answer(loaded, tmp_path, monkeypatch):
    bank = bank_of(loaded, tmp_path)

    def fail(*arguments, **options):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sqlite3, "connect", fail)
    assert bank.class_embeddings(LABELS, TEMPLATES).shape == (3, 32)


def test_no_folder_and_no_room_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        LabelStore(tmp_path / "file")
    with pytest.raises(ValueError, match="max_bytes=0 must be at least 1"):
        LabelStore(tmp_path, max_bytes=0)


def test_the_pipeline_takes_a_folder(loaded, tmp_path):
    def classifier():
        return SiglipZeroShotImageClassificationPipeline(
            task="zero-shot-image-classification",
            model=loaded[0],
            tokenizer=loaded[1].tokenizer,
            image_processor=loaded[1].image_processor,
            label_bank=tmp_path / "bank",
        )

    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    first, second = classifier(), classifier()
    assert first(picture, LABELS) == second(picture, LABELS)
    assert (first.label_bank.texts_encoded, second.label_bank.texts_encoded) == (3, 0)


def test_rows_that_the_caller_encodes(loaded):
    """As the server does: it asks what is missing, encodes the texts in its own batches, and hands the rows over."""
    bank, reference = (LabelBank(loaded[0], loaded[1].tokenizer) for _ in range(2))
    bank.class_embeddings(["cat"], TEMPLATES)
    missing = bank.missing(LABELS, TEMPLATES)
    assert missing == {
        "red_car": ["a photo of red car.", "red car"],
        "big house": ["a photo of big house.", "big house"],
    }
    rows = {
        label: torch.cat([reference.class_embeddings([text], ["{}"]) for text in texts])
        for label, texts in missing.items()
    }
    bank.remember(rows, TEMPLATES)
    torch.testing.assert_close(
        bank.class_embeddings(LABELS, TEMPLATES), reference.class_embeddings(LABELS, TEMPLATES), atol=1e-6, rtol=0
    )
    assert bank.texts_encoded == 2


def test_packed_weights_are_the_same_weights(checkpoint):
    model, processor = load_checkpoint(checkpoint)
    plain = text_side_digest(model, processor.tokenizer)
    optimize(model, model.dtype)
    assert model.text_model.encoder.layers[0].packed is not None
    assert text_side_digest(model, processor.tokenizer) == plain
    assert model.text_model.encoder.layers[0].packed is not None  # reading has restored nothing
