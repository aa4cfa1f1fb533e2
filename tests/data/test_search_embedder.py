"""`SiglipEmbedder`: arrays from pictures and texts, in order, equal to the model's own."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import siglip_hf
from siglip_hf import SiglipEmbedder
from siglip_hf.data import embedder as embedder_module
from siglip_hf.data.sources import open_source
from siglip_hf.preprocessing.image_intake import PictureError
from tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def embedder(checkpoint):
    return SiglipEmbedder(checkpoint, device="cpu", dtype="float32", batch_size=4, fast=False, workers=3)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)) for i in range(21)]


@pytest.fixture(scope="module")
def expected(checkpoint, pictures):
    model = siglip_hf.SiglipModel.from_pretrained(checkpoint)
    processor = siglip_hf.SiglipImageProcessorFast.from_pretrained(checkpoint)
    with torch.no_grad():
        return model.encode_image(processor(images=pictures, return_tensors="pt").pixel_values).numpy()


def test_pictures_in_order(embedder, pictures, expected, tmp_path):
    embeds = embedder.embed_images(pictures)
    assert embeds.dtype == np.float32
    np.testing.assert_allclose(embeds, expected, atol=1e-5)
    np.testing.assert_allclose(embedder.embed_images(iter(pictures)), expected, atol=1e-5)
    np.testing.assert_allclose(embedder.embed_images(np.asarray(pictures[0])), expected[:1], atol=1e-5)
    for number, picture in enumerate(pictures[:3]):
        picture.save(tmp_path / f"{number}.png")
    for source in (tmp_path, str(tmp_path / "*.png"), open_source(tmp_path), sorted(tmp_path.iterdir())):
        np.testing.assert_allclose(embedder.embed_images(source), expected[:3], atol=1e-5)
    np.testing.assert_allclose(embedder.embed_images(tmp_path / "1.png"), expected[1:2], atol=1e-5)
    assert embedder.embed_images([]).shape == (0, embedder.dimension)


def test_few_decoded_pixels_are_held(embedder, pictures, expected, monkeypatch):
    monkeypatch.setattr(embedder_module, "_HELD_PIXELS", 1500)
    np.testing.assert_allclose(embedder.embed_images(pictures), expected, atol=1e-5)


def test_threads_of_torch_are_as_before(embedder, pictures):
    before = torch.get_num_threads()
    embedder.embed_images(pictures)
    assert torch.get_num_threads() == before


def test_a_broken_picture_is_named(embedder, pictures, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    with pytest.raises(PictureError, match=r"b\.png.*not a picture"):
        embedder.embed_images(tmp_path)


def test_texts(embedder, checkpoint):
    texts = ["the cat", "A Dog", "a red bird in the house", "fish", "sun", "moon"]
    processor = siglip_hf.SiglipProcessor.from_pretrained(checkpoint)
    model = siglip_hf.SiglipModel.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = model.encode_text(processor(text=texts, return_tensors="pt").input_ids).numpy()
    np.testing.assert_allclose(embedder.embed_texts(texts), expected, atol=1e-5)
    np.testing.assert_allclose(embedder.embed_texts("the cat"), expected[:1], atol=1e-5)
    assert embedder.embed_texts([]).shape == (0, embedder.dimension)
    for wrong, named in (
        ([""], r"texts\[0\]: '' of type str"),
        (["a", None], r"texts\[1\]: None of type NoneType"),
        (["a", "b", float("nan")], r"texts\[2\]: nan of type float"),
        (b"a", r"texts\[0\]: b'a' of type bytes"),
        (["a", "b\ud800"], r"cannot be a text \(texts\[1\]\): the character"),
    ):
        with pytest.raises(ValueError, match=named):
            embedder.embed_texts(wrong)


def test_probability_is_the_model_s(embedder, pictures):
    texts = ["the cat", "a dog"]
    cosines = embedder.embed_images(pictures) @ embedder.embed_texts(texts).T
    with torch.no_grad():
        inputs = embedder.processor(text=texts, images=pictures, return_tensors="pt")
        logits = embedder.model(**inputs).logits_per_image
    np.testing.assert_allclose(embedder.probability(cosines), logits.sigmoid().numpy(), atol=1e-4)


def test_fast_is_the_same_up_to_rounding(checkpoint, pictures, expected):
    fast = SiglipEmbedder(checkpoint, device="cpu", dtype="float32")
    assert fast.model.optimization.dtype == "float32"
    np.testing.assert_allclose(fast.embed_images(pictures), expected, atol=2e-5)
    assert 0 < fast.probability(np.zeros((1, 2)))[0, 0] < 1


@pytest.mark.parametrize("fast", [True, False])
def test_sixteen_bits(checkpoint, pictures, expected, fast):
    half = SiglipEmbedder(checkpoint, device="cpu", dtype=torch.bfloat16, fast=fast)
    assert hasattr(half.model, "optimization") == fast
    embeds = half.embed_images(pictures)
    assert (half.dtype, half.model.dtype, embeds.dtype) == (torch.bfloat16, torch.bfloat16, np.float32)
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-6)
    assert (embeds * expected).sum(axis=1).min() > 0.99


@pytest.mark.parametrize("has_it", [True, False])
def test_bfloat16_where_the_processor_has_it(checkpoint, monkeypatch, has_it):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert SiglipEmbedder(checkpoint, device="cpu", fast=False).dtype == (torch.bfloat16 if has_it else torch.float32)


def test_the_weights_have_a_name_of_their_own(embedder, checkpoint, tmp_path):
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert SiglipEmbedder(moved, device="cpu").model_sha256 == embedder.model_sha256
    sharded = tmp_path / "sharded"
    shutil.copytree(checkpoint, sharded)
    (sharded / "model.safetensors").unlink()
    siglip_hf.SiglipModel.from_pretrained(checkpoint).save_pretrained(sharded, max_shard_size="50KB")
    shards = set(json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 1
    first = SiglipEmbedder(sharded, device="cpu").model_sha256
    assert first == SiglipEmbedder(shutil.copytree(sharded, tmp_path / "again"), device="cpu").model_sha256
    assert first != embedder.model_sha256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no/such/folder"}, "cannot load 'no/such/folder'"),
        ({"dtype": "int8"}, "dtype='int8' must be"),
        ({"device": "abacus"}, "device='abacus' cannot be used"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_wrong_options(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        SiglipEmbedder(**{"model": checkpoint} | options)


def test_a_model_that_is_no_siglip(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is a BertModel, not a SigLIP model"):
        SiglipEmbedder(tmp_path)


def test_a_thread_that_starts_while_another_embeds_keeps_its_torch_threads(checkpoint, pictures, monkeypatch):
    embedder = SiglipEmbedder(checkpoint, device="cpu", batch_size=10, fast=False, workers=2)
    prepare, inside, beside = embedder.prepare_images, set(), set()

    def prepare_and_look(pictures):
        inside.add(torch.get_num_threads())
        with ThreadPoolExecutor(1) as another:
            beside.add(another.submit(torch.get_num_threads).result())
        return prepare(pictures)

    monkeypatch.setattr(embedder, "prepare_images", prepare_and_look)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        embedder.embed_images(pictures)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert (inside, beside) == ({1}, {3})


def test_half_a_character_is_no_text(embedder):
    with pytest.raises(ValueError, match=r"'a \\udcff' cannot be a text \(texts\[1\]\): the character at place 2"):
        embedder.embed_texts(["a cat", "a \udcff"])
