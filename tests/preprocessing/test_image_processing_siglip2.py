"""NaFlex image processors against stock, with any pictures, budgets and patch sizes."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil as StockProcessor,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from siglip_hf import Siglip2ImageProcessor, Siglip2ImageProcessorFast
from siglip_hf.preprocessing.image_processing_siglip2 import naflex_size

OURS = (Siglip2ImageProcessor, Siglip2ImageProcessorFast)
SIZES = ((240, 320), (333, 100), (1, 4000), (4000, 1), (33, 7), (256, 256), (1, 1), (9, 500))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth picture with some noise."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(rows / 9), np.cos(columns / 13), np.sin((rows + columns) / 21)], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    return Image.fromarray((128 + 90 * waves + noise).clip(0, 255).astype(np.uint8))


PICTURES = [picture(*size) for size in SIZES]


def test_sizes_are_stocks():
    numbers = random.Random(0)
    for _ in range(500):
        height, width = (int(10 ** numbers.uniform(0, 4.5)) for _ in range(2))
        patch_size, budget = numbers.choice([8, 14, 16, 32]), numbers.choice([1, 4, 60, 256, 1024])
        size = naflex_size(height, width, patch_size, budget)
        assert size == get_image_size_for_max_num_patches(height, width, patch_size, budget)
        assert size[0] % patch_size == size[1] % patch_size == 0
        assert 1 <= size[0] * size[1] // patch_size**2 <= budget


@pytest.mark.parametrize("options", [{}, {"patch_size": 14, "max_num_patches": 100}, {"do_normalize": False}])
def test_pillow_processor_equals_stock_bit_for_bit(options):
    expected = StockProcessor(**options)(PICTURES, return_tensors="pt")
    actual = Siglip2ImageProcessor(**options)(PICTURES, return_tensors="pt")
    assert set(actual) == set(expected) == {"pixel_values", "pixel_attention_mask", "spatial_shapes"}
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("options", [{}, {"patch_size": 14, "max_num_patches": 100}, {"resample": 3}])
def test_fast_processor_is_within_one_level_of_it(options):
    expected = Siglip2ImageProcessor(**options)(PICTURES, return_tensors="pt")
    actual = Siglip2ImageProcessorFast(**options)(PICTURES, return_tensors="pt")
    levels = (actual["pixel_values"] - expected["pixel_values"]).abs() * 127.5
    assert levels.max() < 1.001
    assert (levels > 0.5).float().mean() < 0.01
    for name in ("pixel_attention_mask", "spatial_shapes"):
        assert torch.equal(actual[name], expected[name])
        assert actual[name].dtype == expected[name].dtype


@pytest.mark.parametrize("processor_class", OURS)
def test_patches_are_cut_row_by_row(processor_class):
    pixels = np.arange(32 * 48 * 3, dtype=np.uint32).reshape(32, 48, 3) % 251
    inputs = processor_class(do_resize=False, do_rescale=False, do_normalize=False)(
        pixels.astype(np.uint8), return_tensors="np"
    )
    assert inputs["spatial_shapes"].tolist() == [[2, 3]]
    assert inputs["pixel_attention_mask"].sum() == 6
    patches = inputs["pixel_values"][0]
    for row in range(2):
        for column in range(3):
            expected = pixels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert (patches[3 * row + column] == expected.reshape(-1)).all()
    assert (patches[6:] == 0).all()


@pytest.mark.parametrize("processor_class", OURS)
def test_whole_numbers_beside_others_do_not_round_them(processor_class):
    fractions = np.random.default_rng(0).random((32, 48, 3), dtype=np.float32) * 255
    raw = processor_class(do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=False)
    both = raw([np.zeros((16, 16, 3), np.uint8), fractions], return_tensors="pt")["pixel_values"]
    assert torch.equal(both[1], raw(fractions, return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize("processor_class", OURS)
@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode_work(processor_class, mode):
    # A published file says null, with which stock fails on them.
    processor = processor_class(do_convert_rgb=None)
    image = picture(30, 50)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    inputs = processor(image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 256, 768)
    assert inputs["pixel_values"].abs().max() <= 1
    reference = image.convert("L").convert("RGB") if mode in ("L", "LA", "1") else None
    if reference is not None:
        assert torch.equal(inputs["pixel_values"], processor(reference, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("processor_class", OURS)
def test_what_a_transparent_picture_hides_is_white(processor_class):
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    inputs = processor_class()(image, return_tensors="pt")
    assert (inputs["pixel_values"][inputs["pixel_attention_mask"].bool()] == 1).all()


@pytest.mark.parametrize("processor_class", OURS)
def test_saved_patch_size_and_budget_are_obeyed(processor_class, tmp_path):
    processor_class(patch_size=14, max_num_patches=1024).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (saved["patch_size"], saved["max_num_patches"]) == (14, 1024)
    processor = processor_class.from_pretrained(tmp_path)
    inputs = processor(PICTURES[0], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 1024, 14 * 14 * 3)
    assert inputs["spatial_shapes"].prod() > 900
    assert processor(PICTURES[0], max_num_patches=64, return_tensors="pt")["pixel_values"].shape == (1, 64, 588)


@pytest.mark.parametrize("processor_class", OURS)
def test_each_picture_may_have_its_own_budget(processor_class):
    processor = processor_class()
    budgets = [64, 256, 1, 16]
    together = processor(PICTURES[:4], max_num_patches=budgets, return_tensors="pt")
    assert together["pixel_values"].shape == (4, 256, 768)
    for index, budget in enumerate(budgets):
        alone = processor(PICTURES[index], max_num_patches=budget, return_tensors="pt")
        assert torch.equal(together["pixel_values"][index, :budget], alone["pixel_values"][0])
        assert torch.equal(together["spatial_shapes"][index], alone["spatial_shapes"][0])
        assert together["pixel_attention_mask"][index].sum() == alone["pixel_attention_mask"].sum()


@pytest.mark.parametrize("processor_class", OURS)
def test_types_of_results(processor_class):
    processor = processor_class(max_num_patches=16)
    arrays, lists = processor(PICTURES[:2], return_tensors="np"), processor(PICTURES[:2])
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    assert arrays["pixel_values"].dtype == np.float32
    assert isinstance(lists["pixel_values"], list)
    assert np.array_equal(np.asarray(lists["pixel_values"][1]), arrays["pixel_values"][1])
    as_floats = processor(np.asarray(PICTURES[0]) / np.float32(255), return_tensors="np")
    assert np.allclose(as_floats["pixel_values"], arrays["pixel_values"][:1], atol=1e-6)


def test_auto_image_processor_uses_ours(tmp_path):
    config = {"image_processor_type": "Siglip2ImageProcessor", "do_convert_rgb": None, "patch_size": 16}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) in OURS
    assert type(AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)) is Siglip2ImageProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path, use_fast=True)) is Siglip2ImageProcessorFast


@pytest.mark.parametrize("processor_class", OURS)
def test_mistakes_are_refused(processor_class):
    processor = processor_class()
    with pytest.raises(ValueError, match=r"max_num_patches \(0\) must be at least 1"):
        processor(PICTURES[0], max_num_patches=0)
    with pytest.raises(ValueError, match=r"patch_size \(0\)"):
        processor(PICTURES[0], patch_size=0)
    with pytest.raises(ValueError, match="more pictures than the 1 budgets"):
        processor(PICTURES[:2], max_num_patches=[16])
    with pytest.raises(ValueError, match="3 budgets for 2 pictures"):
        processor(PICTURES[:2], max_num_patches=[16, 16, 16])
    with pytest.raises(ValueError, match="240x320 pixels has 300 patches; max_num_patches=256"):
        processor(PICTURES[0], do_resize=False)
    with pytest.raises(ValueError, match="33x7 pixels does not consist of patches of 16x16"):
        processor(PICTURES[4], do_resize=False)
    with pytest.raises(ValueError, match="does not know the argument"):
        processor(PICTURES[0], max_patches=4)
    with pytest.raises(ValueError, match="do_center_crop=True"):
        processor(PICTURES[0], do_center_crop=True)
    with pytest.raises(ValueError, match="No pictures given"):
        processor([])


@pytest.mark.parametrize("processor_class", OURS)
@pytest.mark.parametrize(
    ("options", "message"),
    [({"image_std": [0, 0, 0]}, "cannot be divided by"), ({"max_num_patches": 10**7}, "2,560,000,000 pixels")],
)
def test_settings_that_cannot_be_are_named_when_they_are_used(processor_class, options, message):
    with pytest.raises(ValueError, match=message):
        processor_class(**options)(np.zeros((9, 9, 3), np.uint8))
