"""Pillow's memory is read in place where it is in one piece; the tensors are the same as those from a copy."""

import numpy as np
import pytest
import torch
from PIL import Image

from siglip_hf import Siglip2ImageProcessorFast, SiglipImageProcessorFast
from siglip_hf.preprocessing import image_tensors
from siglip_hf.preprocessing.image_intake import Picture
from siglip_hf.preprocessing.pillow_memory import shared_pixels


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (71, 93, 3), dtype=np.uint8)


def test_the_pixels_are_those_of_the_picture(values):
    picture = Image.fromarray(values)
    pixels = shared_pixels(picture)
    assert pixels.shape == (71, 93, 4)
    assert np.array_equal(pixels[..., :3], values)
    part = shared_pixels(picture.crop((5, 7, 60, 40)))
    assert np.array_equal(part[..., :3], values[7:40, 5:60])


def test_nothing_is_copied(values):
    picture = Image.fromarray(values)
    pixels = shared_pixels(picture)
    picture.putpixel((2, 1), (10, 20, 30))
    assert pixels[1, 2, :3].tolist() == [10, 20, 30]


def test_the_memory_outlives_the_picture(values):
    pixels = [shared_pixels(Image.fromarray(values))[1:] for _ in range(20)]
    others = [Image.new("RGB", (93, 71), "red") for _ in range(20)]  # would take the memory if it were free
    assert len(others) == 20
    assert all(np.array_equal(view[..., :3], values[1:]) for view in pixels)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I", "F", "1", "LA", "P", "YCbCr"])
def test_other_modes_are_left_alone(values, mode):
    assert shared_pixels(Image.new(mode, (5, 5))) is None


def test_memory_with_gaps_or_in_several_blocks_is_left_alone(values):
    block = Image.core.get_block_size()
    try:
        Image.core.set_block_size(4096)
        in_blocks = Image.fromarray(values)
    finally:
        Image.core.set_block_size(block)
    assert shared_pixels(in_blocks) is None
    try:
        Image.core.set_alignment(64)
        with_gaps = Image.fromarray(values)
        assert shared_pixels(with_gaps) is None
    finally:
        Image.core.set_alignment(1)


def test_an_older_pillow_is_asked_for_a_copy(values, monkeypatch):
    monkeypatch.delattr(Image.Image, "__arrow_c_array__")
    assert shared_pixels(Image.fromarray(values)) is None


@pytest.mark.parametrize("size", [(93, 71), (640, 427), (200, 900), (8, 8)])
def test_processors_give_the_same_as_from_a_copy(size, monkeypatch):
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    processors = (SiglipImageProcessorFast(size={"height": 32, "width": 48}), Siglip2ImageProcessorFast())
    read = []
    monkeypatch.setattr(image_tensors, "shared_pixels", lambda image: read.append(image) or shared_pixels(image))
    shared = [processor(Image.fromarray(noise), return_tensors="pt").pixel_values for processor in processors]
    assert len(read) == 2
    monkeypatch.setattr(image_tensors, "shared_pixels", lambda image: None)
    copied = [processor(Image.fromarray(noise), return_tensors="pt").pixel_values for processor in processors]
    assert all(map(torch.equal, shared, copied))


def test_a_picture_is_not_changed(values):
    picture = Image.fromarray(values)
    image_tensors.resize(Picture(picture), (16, 16), Image.Resampling.BICUBIC).zero_()
    SiglipImageProcessorFast(size={"height": 71, "width": 93})(picture, return_tensors="pt").pixel_values.zero_()
    SiglipImageProcessorFast(do_resize=False)(picture, return_tensors="pt").pixel_values.zero_()
    assert np.array_equal(np.asarray(picture), values)
