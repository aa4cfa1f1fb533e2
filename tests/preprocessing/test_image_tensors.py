"""The fast image processors against the installed Pillow: within 1 of 255 for pictures of any shape."""

import numpy as np
import pytest
from PIL import Image

from siglip_hf import Siglip2ImageProcessor, Siglip2ImageProcessorFast, SiglipImageProcessor, SiglipImageProcessorFast

RAW = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
# Pillow goes through the columns first where a picture is more than 100 times as high as wide.
TALL = [(101, 1), (100, 1), (405, 4), (400, 4), (1000, 3), (3000, 7), (2000, 20), (2001, 20)]
SHAPES = [
    *TALL,
    *((width, height) for height, width in TALL),
    (1, 1),
    (2, 300),
    (300, 2),
    (40, 60),
    (57, 33),
    (640, 480),
]
TARGETS = [(16, 16), (32, 8), (8, 32), (1, 1), (64, 64), (99, 3), (150, 150)]
MODES = ["RGB", "L", "RGBA", "LA", "P", "CMYK", "I;16"]


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(height * 7919 + width)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise[rng.random((height, width)) < 0.4] = rng.choice([0, 255])  # full contrast, where the errors are largest
    image = Image.fromarray(noise)
    if mode == "I;16":
        return Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(noise[:, :, 1]))
    return image.convert(mode)


def distance(fast, slow, image: Image.Image, **options) -> int:
    one, other = (each(image, **RAW, **options)["pixel_values"].astype(int) for each in (fast, slow))
    assert one.shape == other.shape
    return int(np.abs(one - other).max())


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("target", TARGETS)
def test_any_shape_and_target(target, resample):
    fast, slow = SiglipImageProcessorFast(), SiglipImageProcessor()
    options = {"size": {"height": target[0], "width": target[1]}, "resample": resample}
    apart = {shape: distance(fast, slow, picture(*shape), **options) for shape in SHAPES}
    assert max(apart.values()) <= 1, apart


@pytest.mark.parametrize("mode", MODES)
def test_any_mode(mode):
    fast, slow = SiglipImageProcessorFast(size={"height": 24, "width": 24}), SiglipImageProcessor()
    for shape in SHAPES[::3]:
        assert distance(fast, slow, picture(*shape, mode), size={"height": 24, "width": 24}) <= 1, shape


@pytest.mark.parametrize("budget", [1, 9, 64, 256])
def test_any_shape_as_patches(budget):
    fast, slow = Siglip2ImageProcessorFast(patch_size=4), Siglip2ImageProcessor(patch_size=4)
    apart = {shape: distance(fast, slow, picture(*shape), max_num_patches=budget) for shape in SHAPES}
    assert max(apart.values()) <= 1, apart


def test_shapes_drawn_at_random():
    rng = np.random.default_rng(0)
    fast, slow = SiglipImageProcessorFast(), SiglipImageProcessor()
    for _ in range(150):
        shape = tuple(np.exp(rng.uniform(0, 6.5, 2)).astype(int))
        target = tuple(np.exp(rng.uniform(0, 4.5, 2)).astype(int))
        size = {"height": int(target[0]), "width": int(target[1])}
        assert distance(fast, slow, picture(*map(int, shape)), size=size) <= 1, (shape, target)
