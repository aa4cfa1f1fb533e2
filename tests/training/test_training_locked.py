"""Frozen parts, and image embeddings that are computed once."""

import shutil

import numpy as np
import pytest
import torch

import siglip_hf
from siglip_hf.data.sources import open_source
from siglip_hf.training import ImageStore, freeze, store_images
from siglip_hf.training.pairs import training_pairs
from tiny_checkpoint import write_tiny_checkpoint
from training_data import largest_difference, make_trainer, weights, write_two_captions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def data(tmp_path):
    return write_two_captions(tmp_path / "pictures", count=7)


@pytest.fixture
def model(checkpoint):
    return siglip_hf.SiglipModel.from_pretrained(checkpoint)


@pytest.fixture
def processor(checkpoint):
    return siglip_hf.SiglipProcessor.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("parts", "frozen"),
    [
        ("image", lambda name: name.startswith("vision_model.")),
        (["text"], lambda name: name.startswith("text_model.")),
        ("image:1", lambda name: name.startswith(("vision_model.embeddings.", "vision_model.encoder.layers.0."))),
        (
            ["text:2", "logit_*"],
            lambda name: name.startswith(("text_model.embeddings.", "text_model.encoder.", "logit")),
        ),
        ("vision_model.head.*", lambda name: name.startswith("vision_model.head.")),
    ],
)
def test_freeze(model, parts, frozen):
    expected = [name for name, _ in model.named_parameters() if frozen(name)]
    assert freeze(model, parts) == expected
    assert expected
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == expected


def test_freeze_names_mistakes(model):
    with pytest.raises(ValueError, match="'vision' matches no parameter"):
        freeze(model, "vision")
    with pytest.raises(ValueError, match="between 1 and 2"):
        freeze(model, "image:3")
    with pytest.raises(ValueError, match="between 1 and 2"):
        freeze(model, "text:all")
    with pytest.raises(ValueError, match="nothing would be left"):
        freeze(model, ["image", "text", "logit_*"])
    assert all(value.requires_grad for value in model.parameters())


def test_a_store_holds_the_embeddings(model, processor, data, tmp_path):
    source = open_source(data)
    done = []
    store = store_images(model, processor, source, tmp_path / "store", batch_size=3, on_progress=done.append)
    assert done == [3, 6, 7]
    files = [record.image for record in source]
    with torch.no_grad():
        expected = model.encode_image(processor(images=files, return_tensors="pt")["pixel_values"])
    for record, row in zip(source, expected, strict=True):
        torch.testing.assert_close(store.read(record), row, rtol=0, atol=1e-5)
    assert len(store) == 7
    assert isinstance(store.embeddings, np.memmap)
    again = store_images(model, processor, source, tmp_path / "store", on_progress=done.append)
    assert done == [3, 6, 7]  # nothing is computed twice
    assert np.array_equal(again.embeddings, store.embeddings)
    assert model.training is False


@pytest.mark.parametrize("accumulation", [1, 2])
def test_text_only_epochs_are_those_of_a_frozen_tower(checkpoint, data, tmp_path, accumulation):
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}

    def locked():
        model = siglip_hf.SiglipModel.from_pretrained(checkpoint)
        freeze(model, "image")
        return model

    expected = make_trainer(checkpoint, data, tmp_path / "a", model=locked(), **options)
    expected.train()
    model = locked()
    processor = siglip_hf.SiglipProcessor.from_pretrained(checkpoint)
    store = store_images(model, processor, training_pairs(data), tmp_path / "store")
    calls = []
    model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    trainer = make_trainer(checkpoint, data, tmp_path / "b", model=model, store=store, **options)
    trainer.train()
    assert calls == []
    assert largest_difference(weights(trainer), weights(expected)) < 1e-5
    start = siglip_hf.SiglipModel.from_pretrained(checkpoint)
    assert (
        largest_difference(dict(model.vision_model.named_parameters()), dict(start.vision_model.named_parameters()))
        == 0
    )
    assert largest_difference(dict(model.text_model.named_parameters()), dict(start.text_model.named_parameters())) > 0


def test_an_interrupted_store_is_continued(model, processor, data, tmp_path):
    source = open_source(data)
    whole = store_images(model, processor, source, tmp_path / "whole", batch_size=2)

    def stop(done):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_images(model, processor, source, tmp_path / "store", batch_size=2, on_progress=stop)
    with pytest.raises(ValueError, match="is not finished"):
        ImageStore(tmp_path / "store")
    done = []
    store = store_images(model, processor, source, tmp_path / "store", batch_size=2, on_progress=done.append)
    assert done == [6, 7]
    np.testing.assert_allclose(store.embeddings, whole.embeddings, atol=1e-6)
    assert store.manifest == whole.manifest


def test_a_stale_store_is_refused(model, processor, data, tmp_path, checkpoint):
    source, folder = open_source(data), tmp_path / "store"
    store_images(model, processor, source, folder)
    with torch.no_grad():
        model.vision_model.head.probe += 1e-3
    with pytest.raises(ValueError, match="another image tower; remove it"):
        store_images(model, processor, source, folder)
    with torch.no_grad():
        model.text_model.head.weight += 1  # texts have no part in it
    model.vision_model.load_state_dict(siglip_hf.SiglipModel.from_pretrained(checkpoint).vision_model.state_dict())
    store_images(model, processor, source, folder)
    before = ImageStore(folder)
    first, second = open_source(data)[:2]
    shutil.copy(data / first.id, data / second.id)
    with pytest.raises(ValueError, match="another source"):
        before.check(model, processor, open_source(data))
    done = []
    after = store_images(model, processor, open_source(data), folder, on_progress=done.append)
    assert done == [7]  # one of seven
    torch.testing.assert_close(after.read(second), before.read(first))
    shutil.copy(data / open_source(data)[2].id, data / second.id)
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    with pytest.raises(ValueError, match="another image processor and source"):
        ImageStore(folder).check(model, processor, open_source(data))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        store_images(model, processor, source, tmp_path / "other")


def test_a_damaged_store_is_made_anew(model, processor, data, tmp_path):
    source, folder = open_source(data), tmp_path / "store"
    whole = store_images(model, processor, source, folder)
    (part,) = folder.glob("part-*.parquet")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match=r"part-00000\.parquet is missing or damaged"):
        ImageStore(folder)
    assert np.array_equal(store_images(model, processor, source, folder).embeddings, whole.embeddings)


def test_broken_pictures_are_left_out_of_training(checkpoint, model, processor, data, tmp_path):
    (data / "cat.png").write_bytes(b"nothing")
    source = training_pairs(data)
    store = store_images(model, processor, source, tmp_path / "store")
    assert set(store.broken) == {"cat.png"}
    freeze(model, "image")
    trainer = make_trainer(checkpoint, data, tmp_path, model=model, store=store)
    trainer.train()
    assert set(trainer.broken) == {"cat.png"}


def test_a_store_needs_a_locked_tower_and_no_augmentation(checkpoint, model, processor, data, tmp_path):
    store = store_images(model, processor, training_pairs(data), tmp_path / "store")
    with pytest.raises(ValueError, match=r'vision_model.* would be trained.*freeze\(model, "image"\)'):
        make_trainer(checkpoint, data, tmp_path, model=model, store=store)
    freeze(model, "image")
    with pytest.raises(ValueError, match="cannot be augmented"):
        make_trainer(checkpoint, data, tmp_path, model=model, store=store, augment=["flip"])
