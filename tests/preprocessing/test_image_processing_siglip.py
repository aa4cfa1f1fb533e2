"""The Pillow processor equals stock's bit for bit, the torch one within a level; both are right where stock is not."""

import importlib.util
import io
import itertools
import json
import sys

import numpy as np
import pytest
import torch
import transformers
from packaging import version
from PIL import Image, ImageFilter
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from siglip_hf.preprocessing import image_intake
from siglip_hf.preprocessing.image_intake import PictureError
from siglip_hf.preprocessing.image_processing_siglip import SiglipImageProcessor
from siglip_hf.preprocessing.image_processing_siglip_fast import SiglipImageProcessorFast
from siglip_hf.preprocessing.image_tensors import BOTH_FROM

BOTH = pytest.mark.parametrize("processor_class", [SiglipImageProcessor, SiglipImageProcessorFast])
LEVEL = 1 / 255 + 1e-6  # of 0..1, with room for float32
SMALL = {"height": 32, "width": 32}

PUBLISHED = {  # the keys of a published preprocessor_config.json
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def values(processor, images, **options):
    return processor(images, return_tensors="np", **options)["pixel_values"]


def encode(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


# ---- bit for bit as stock


SOURCES = {
    "rgb": Image.fromarray(noise(43, 64)),
    "1": Image.fromarray(noise(43, 64)).convert("1"),
    "L": Image.fromarray(noise(43, 64)).convert("L"),
    "P": Image.fromarray(noise(43, 64)).convert("P"),
    "LA": Image.fromarray(noise(43, 64, 4)).convert("LA"),
    "RGBA": Image.fromarray(noise(43, 64, 4)),
    "CMYK": Image.fromarray(noise(43, 64)).convert("CMYK"),
    "HWC": noise(43, 64),
    "CHW": noise(43, 64).transpose(2, 0, 1),
    "RGBA array": noise(43, 64, 4),
    "one channel": noise(43, 64, 1),
    "tensor": torch.from_numpy(noise(43, 64).transpose(2, 0, 1).copy()),
    "int64": noise(43, 64).astype(np.int64),
    "whole floats": noise(43, 64).astype(np.float32),
    "batch array": np.stack([noise(43, 64), noise(43, 64, seed=1)]),
    "list of sizes": [Image.fromarray(noise(43, 64)), Image.fromarray(noise(100, 31)), Image.fromarray(noise(8, 9))],
    "nested": [[Image.fromarray(noise(43, 64))], [Image.fromarray(noise(20, 64)), Image.fromarray(noise(5, 5))]],
}
OPTIONS = {
    "defaults": {},
    "size": {"size": {"height": 30, "width": 50}},
    "bilinear": {"resample": 2},
    "lanczos": {"resample": 1},
    "nearest": {"resample": 0},
    "no rescale": {"do_rescale": False},
    "no normalize": {"do_normalize": False},
    "raw": {"do_normalize": False, "do_rescale": False},
    "factor": {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
    "imagenet": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "crop": {"do_center_crop": True, "crop_size": {"height": 21, "width": 18}},
    "crop beyond": {"do_center_crop": True, "crop_size": {"height": 41, "width": 38}},
    "pad": {"do_pad": True, "pad_size": {"height": 40, "width": 37}},
}


# Stock before transformers 5.21 drops an alpha channel, and does not know arrays with one channel.
OLD_STOCK = version.parse(transformers.__version__) < version.parse("5.21")
UNLIKE_OLD_STOCK = {"LA", "RGBA", "RGBA array", "one channel"}


@pytest.mark.parametrize("source", [name for name in SOURCES if not (OLD_STOCK and name in UNLIKE_OLD_STOCK)])
def test_every_source_equals_stock(source):
    stock = values(SiglipImageProcessorPil(size=SMALL), SOURCES[source])
    ours = values(SiglipImageProcessor(size=SMALL), SOURCES[source])
    assert ours.dtype == stock.dtype == np.float32
    np.testing.assert_array_equal(ours, stock)
    fast = values(SiglipImageProcessorFast(size=SMALL), SOURCES[source])
    assert fast.dtype == np.float32
    assert np.abs(fast - stock).max() <= 2 * LEVEL


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_equals_stock(option):
    images = [SOURCES["rgb"], Image.fromarray(noise(100, 31))]
    options = {"size": SMALL, **OPTIONS[option]}
    stock = values(SiglipImageProcessorPil(), images, **options)
    for processor in (SiglipImageProcessor(), SiglipImageProcessor(**options)):
        ours = values(processor, images, **(options if processor.size.height == 224 else {}))
        assert ours.dtype == stock.dtype
        np.testing.assert_array_equal(ours, stock)
    fast = values(SiglipImageProcessorFast(), images, **options)
    assert fast.dtype == stock.dtype
    unit = values(SiglipImageProcessorPil(), [Image.new("RGB", (9, 9), (c,) * 3) for c in (0, 1)], **options)
    one_level = np.abs(unit[1].astype(float) - unit[0]).max()
    assert np.abs(fast.astype(float) - stock).max() <= one_level * 1.0001


@pytest.mark.parametrize(
    "size", [{"shortest_edge": 20}, {"shortest_edge": 20, "longest_edge": 25}, {"max_height": 25, "max_width": 20}, 20]
)
@pytest.mark.parametrize("shape", [(43, 64), (64, 43), (20, 20), (20, 41)])
def test_sizes_that_keep_the_aspect_ratio_equal_stock(size, shape):
    image = Image.fromarray(noise(*shape))
    stock = values(SiglipImageProcessorPil(size=size), image)
    np.testing.assert_array_equal(values(SiglipImageProcessor(size=size), image), stock)
    assert np.abs(values(SiglipImageProcessorFast(size=size), image) - stock).max() <= 2 * LEVEL


def test_without_resizing():
    image, floats = Image.fromarray(noise(20, 30)), np.random.default_rng(0).random((20, 30, 3), dtype=np.float32)
    for options, source in (({}, image), ({"do_rescale": False}, floats), ({"do_rescale": False}, floats - 0.5)):
        stock = values(SiglipImageProcessorPil(do_resize=False), source, **options)
        np.testing.assert_array_equal(values(SiglipImageProcessor(do_resize=False), source, **options), stock)
        fast = values(SiglipImageProcessorFast(do_resize=False), source, **options)
        np.testing.assert_allclose(fast, stock, atol=1e-6)
    raw = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    for processor in (SiglipImageProcessor(**raw), SiglipImageProcessorFast(**raw)):
        np.testing.assert_array_equal(values(processor, floats)[0], floats.transpose(2, 0, 1))


@pytest.mark.skipif(OLD_STOCK, reason="stock before 5.21 does not read one channel")
def test_kept_channels():
    options = {"do_convert_rgb": False, "image_mean": [0.5], "image_std": [0.5], "size": SMALL}
    grey = Image.fromarray(noise(70, 64)).convert("L")
    stock = values(SiglipImageProcessorPil(**options), grey)
    np.testing.assert_array_equal(values(SiglipImageProcessor(**options), grey), stock)
    assert np.abs(values(SiglipImageProcessorFast(**options), grey) - stock).max() <= 2 * LEVEL
    options |= {"image_mean": [0.5] * 4, "image_std": [0.5] * 4}
    rgba = noise(70, 64, 4)
    stock = values(SiglipImageProcessorPil(**options), rgba)
    np.testing.assert_array_equal(values(SiglipImageProcessor(**options), rgba), stock)
    np.testing.assert_allclose(values(SiglipImageProcessorFast(**options), rgba), stock, atol=1e-6)
    with pytest.raises(ValueError, match=r"3 values for pictures of 1 channels|must have 1 elements"):
        SiglipImageProcessorFast(do_convert_rgb=False)(grey)


# ---- the fast one against the slow one


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize(
    "shape", [(427, 640), (640, 427), (900, 130), (130, 900), (96, 96), (112, 113), (20, 7), (1, 60)]
)
def test_fast_is_within_one_level(shape, resample):
    rough = Image.fromarray((noise(*shape) > 127).astype(np.uint8) * 255)
    for image in (rough, Image.fromarray(noise(*shape)), rough.filter(ImageFilter.GaussianBlur(2))):
        options = {"size": {"height": 64, "width": 64}, "resample": resample, "do_normalize": False}
        slow, fast = values(SiglipImageProcessor(**options), image), values(SiglipImageProcessorFast(**options), image)
        assert np.abs(slow - fast).max() <= LEVEL
        assert (np.abs(slow - fast) > LEVEL / 2).mean() < 0.03


def test_who_resizes_what(monkeypatch):
    done = []
    original = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, **_: done.append((self.size, size)) or original(self, size)
    )
    large, small = int(32 * BOTH_FROM) + 1, int(32 * BOTH_FROM) - 1
    processor = SiglipImageProcessorFast(size=SMALL)
    for width, height in ((large, large), (small, large), (large, small), (8, 8)):
        processor(Image.new("RGB", (width, height)))
    # A large reduction is torch's alone. Of others Pillow does one direction: rows first, unless columns save much.
    rows_first = [((large, small), (32, small)), ((8, 8), (32, 8))]
    assert [step for step in done if step in rows_first] == rows_first
    assert done[0] == ((small, large), (32, large))
    assert len(done) == 3
    processor(Image.new("RGB", (large, large)), resample=Image.Resampling.LANCZOS)
    assert done[3] == ((large, large), (32, 32))


def test_fast_does_not_need_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it raises, as if it were not installed
    location = sys.modules[SiglipImageProcessorFast.__module__].__file__
    spec = importlib.util.spec_from_file_location("siglip_hf.fresh_copy", location)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    for resample in range(6):
        processor = fresh.SiglipImageProcessorFast(resample=resample)
        assert (processor(np.zeros((300, 500, 3), np.uint8), return_tensors="pt").pixel_values == -1).all()


def test_order_and_company_do_not_matter():
    images = [Image.fromarray(noise(h, w, seed=h)) for h, w in ((300, 200), (64, 64), (300, 200), (90, 400))]
    for processor in (SiglipImageProcessor(size=SMALL), SiglipImageProcessorFast(size=SMALL)):
        together = values(processor, images)
        for image, alone in zip(images, together, strict=True):
            np.testing.assert_array_equal(values(processor, image)[0], alone)
        np.testing.assert_array_equal(values(processor, images[::-1]), together[::-1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fast_on_a_gpu_equals_the_cpu():
    processor = SiglipImageProcessorFast()
    images = [Image.fromarray(noise(427, 640)), Image.fromarray(noise(100, 90))]
    there = processor(images, return_tensors="pt", device="cuda").pixel_values
    assert there.dtype == torch.float32
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), processor(images, return_tensors="pt").pixel_values)
    assert processor(torch.zeros(3, 50, 50, device="cuda"), return_tensors="pt").pixel_values.device.type == "cuda"


# ---- better than stock


@BOTH
@pytest.mark.parametrize("options", [{}, {"do_rescale": False}, {"do_resize": False}])
def test_floats_in_0_1_mean_the_same_as_the_8_bits_they_came_from(processor_class, options):
    array = noise(32, 32)
    processor = processor_class(size=SMALL)
    expected = values(processor, array)
    for floats in (array / 255, (array / 255).astype(np.float32), torch.from_numpy(array / 255)):
        np.testing.assert_allclose(values(processor, floats, **options), expected, atol=1e-6)
    assert expected.mean() > -0.1  # stock gives values near -1


@BOTH
def test_mixed_kinds_in_one_batch_without_rescaling(processor_class):
    array = noise(32, 32)
    processor = processor_class(size=SMALL, do_normalize=False)
    floats, bytes_ = values(processor, [array / 255, array], do_rescale=False)
    np.testing.assert_allclose(floats * 255, bytes_, atol=1e-3)
    assert bytes_.max() > 200


@BOTH
def test_sixteen_bit_pictures_stay_in_range(processor_class):
    grey = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    for source in (encode(Image.fromarray(grey)), Image.fromarray(grey), grey):
        result = values(processor_class(size=SMALL), source)
        assert result.min() == -1
        assert result.max() == 1
        np.testing.assert_allclose(result[0, 0], grey / 65535 * 2 - 1, atol=LEVEL)


@BOTH
@pytest.mark.parametrize(
    "bad", [np.ones((9, 9, 3), bool), np.full((9, 9, 3), np.nan), torch.full((3, 9, 9), torch.nan)]
)
def test_bool_and_nan_are_refused(processor_class, bad):
    with pytest.raises(PictureError, match=r"dtype bool|NaN"):
        processor_class()(bad)


@BOTH
def test_transparency_and_orientation_do_not_depend_on_the_source(processor_class, tmp_path):
    processor = processor_class(size=SMALL)
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = Image.fromarray(noise(40, 60, 4))
    turned = Image.fromarray(noise(40, 60))
    for name, image, upright in (
        ("a.png", transparent, transparent),
        ("b.png", turned, turned.rotate(-90, expand=True)),
    ):
        path = tmp_path / name
        image.save(path, exif=exif if image is turned else Image.Exif())
        expected = values(processor, upright)
        for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path)):
            np.testing.assert_array_equal(values(processor, source), expected)


@BOTH
def test_one_broken_file_is_named(processor_class, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    content = encode(Image.fromarray(noise(40, 60)))
    good.write_bytes(content)
    bad.write_bytes(content[:200])
    with pytest.raises(PictureError, match=r"picture 1 .*bad\.png") as caught:
        processor_class()([good, bad, good])
    assert caught.value.index == 1
    with pytest.raises(ValueError, match="No pictures given"):
        processor_class()([])


@BOTH
def test_a_large_jpeg_is_not_decoded_in_full(processor_class, monkeypatch):
    """12000 x 12000 pixels: 432 MB in full, 6.75 MB at the eighth of its sides."""
    content = encode(Image.new("L", (12000, 12000), 200), "JPEG")
    decoded = []
    to_rgb = image_intake._to_rgb
    monkeypatch.setattr(image_intake, "_to_rgb", lambda image: decoded.append(image.size) or to_rgb(image))
    with pytest.warns(Image.DecompressionBombWarning):  # Pillow's semantics: 144 megapixels are above its limit
        result = values(processor_class(), content)
    assert decoded[0] == (1500, 1500)  # then in strips
    assert {width for width, _ in decoded} == {1500}
    np.testing.assert_allclose(result, 200 / 127.5 - 1, atol=1e-6)


@BOTH
@pytest.mark.parametrize("threads", [1, 2])
def test_few_files_of_a_batch_lie_decoded_at_a_time(processor_class, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    events = []
    monkeypatch.setattr(image_intake, "_upright", lambda image: events.append("decoded") or image)
    original = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *a, **k: events.append("resized") or original(self, *a, **k)
    )
    processor_class(size=SMALL)([encode(Image.new("RGB", (20, 20)))] * 30)
    assert events.count("decoded") == events.count("resized") == 30
    waiting = list(itertools.accumulate(1 if event == "decoded" else -1 for event in events))
    # One by one without threads; else as many as each of the two steps, decoding and resizing, lets wait.
    assert max(waiting) <= (1 if threads == 1 else 2 * (threads + 1))


@BOTH
def test_sizes_that_are_not_square(processor_class):
    processor = processor_class(size={"height": 32, "width": 64})
    assert values(processor, noise(50, 50)).shape == (1, 3, 32, 64)
    columns = np.zeros((100, 200, 3), np.uint8)
    columns[:, 100:] = 255
    result = values(processor, columns)
    assert (result[..., :28] == -1).all()
    assert (result[..., 36:] == 1).all()


# ---- interface


@BOTH
def test_results(processor_class):
    processor = processor_class(size={"height": 16, "width": 24})
    images = [noise(20, 30), noise(50, 40)]
    tensors = processor.preprocess(images, return_tensors="pt")
    assert tensors["pixel_values"].shape == (2, 3, 16, 24)
    assert tensors.pixel_values.dtype == torch.float32
    assert tensors.pixel_values.is_contiguous()
    array = processor(images, return_tensors="np").pixel_values
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, tensors.pixel_values.numpy())
    listed = processor(images).pixel_values
    assert isinstance(listed, list)
    np.testing.assert_array_equal(np.stack([np.asarray(item) for item in listed]), array)
    last = processor(images, return_tensors="pt", data_format="channels_last").pixel_values
    np.testing.assert_array_equal(last.permute(0, 3, 1, 2).numpy(), array)
    assert processor.model_input_names == ["pixel_values"]


@BOTH
def test_none_is_off_for_a_switch_and_else_the_default(processor_class):
    processor = processor_class(size=SMALL)
    nones = dict.fromkeys(("size", "resample", "rescale_factor", "image_mean", "image_std", "device"))
    np.testing.assert_array_equal(values(processor, noise(50, 60), **nones), values(processor, noise(50, 60)))
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        off, none = (processor(noise(16, 16), return_tensors="np", **{switch: value}) for value in (False, None))
        np.testing.assert_array_equal(none.pixel_values, off.pixel_values)
    gray = Image.fromarray(noise(16, 16)[:, :, 0])
    assert processor(gray, do_convert_rgb=None, do_normalize=False, return_tensors="np").pixel_values.shape[1] == 1
    assert processor_class(size=SMALL, do_convert_rgb=None).do_convert_rgb is True


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_rezise": True}, "do_rezise; did you mean do_resize"),
        ({"size": "large"}, "size"),
        ({"size": {"height": 3}}, "height"),
        ({"size": {"min_pixels": 3, "max_pixels": 5}}, "min_pixels"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"data_format": "sideways"}, "sideways"),
        ({"return_tensors": "tf"}, "tf"),
        ({"do_pad": True, "pad_size": {"height": 3, "width": 3}}, "pad_size"),
    ],
)
def test_wrong_arguments_are_named(processor_class, options, message):
    with pytest.raises(ValueError, match=message):
        processor_class(size=SMALL)(noise(9, 9), **options)


def test_device():
    with pytest.raises(ValueError, match="SiglipImageProcessorFast"):
        SiglipImageProcessor()(noise(9, 9), device="cuda")
    assert SiglipImageProcessor()(noise(9, 9), device="cpu", return_tensors="pt").pixel_values.device.type == "cpu"
    meta = SiglipImageProcessorFast()(noise(9, 9), device="meta", return_tensors="pt").pixel_values
    assert meta.device.type == "meta"


@BOTH
def test_fetch_images_reads_strings_only(processor_class, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise(5, 6)).save(path)
    array = noise(5, 6)
    (fetched,), kept = processor_class().fetch_images([[str(path)], array])
    np.testing.assert_array_equal(np.asarray(fetched), array)
    assert kept is array


# ---- files


@BOTH
def test_loads_a_published_configuration(processor_class, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED | {"do_convert_rgb": None}))
    processor = processor_class.from_pretrained(tmp_path)
    assert dict(processor.size) == {"height": 384, "width": 384}
    assert processor.do_convert_rgb is True
    assert processor(noise(9, 9), return_tensors="pt").pixel_values.shape == (1, 3, 384, 384)
    assert processor_class.from_pretrained(tmp_path, size=SMALL).size == SMALL


@BOTH
def test_saves_for_stock_and_loads_from_stock(processor_class, tmp_path):
    options = {"size": {"height": 20, "width": 30}, "resample": 2, "image_mean": [0.1, 0.2, 0.3]}
    ours, stock = processor_class(**options), SiglipImageProcessorPil(**options)
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    written, expected = (
        json.loads((tmp_path / name / "preprocessor_config.json").read_text()) for name in ("ours", "stock")
    )
    assert written.pop("image_processor_type") == processor_class.__name__
    assert expected.pop("image_processor_type") == "SiglipImageProcessor"
    assert written == expected
    image = noise(90, 80)
    reference = values(stock, image)
    np.testing.assert_array_equal(values(SiglipImageProcessorPil.from_pretrained(tmp_path / "ours"), image), reference)
    for again in (
        processor_class.from_pretrained(tmp_path / "stock"),
        processor_class.from_pretrained(tmp_path / "ours"),
        processor_class.from_dict(ours.to_dict()),
    ):
        assert np.abs(values(again, image) - reference).max() <= 2 * LEVEL
        assert again.to_dict() == ours.to_dict()


def test_the_defaults_are_shared_and_not_shared_state():
    slow, fast = SiglipImageProcessor(), SiglipImageProcessorFast()
    theirs = SiglipImageProcessorPil().to_dict()
    assert slow.to_dict() == theirs
    assert fast.to_dict() == theirs | {"image_processor_type": "SiglipImageProcessorFast"}
    slow.size["height"] = 99
    assert SiglipImageProcessor().size["height"] == 224
    assert (slow.backend, fast.backend) == ("pil", "torch")


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_std": [0.5, 0, 0.5]}, "image_std=.* cannot be divided by"),
        ({"image_std": 0.0}, "cannot be divided by"),
        ({"image_std": [float("nan")] * 3}, "cannot be divided by"),
        ({"size": {"height": 30_000, "width": 30_000}}, "900,000,000 pixels"),
        ({"size": {"shortest_edge": 30_000}}, "900,000,000 pixels"),
    ],
)
def test_settings_that_cannot_be_are_named_when_they_are_used(processor_class, options, message):
    processor = processor_class(**options)  # other code may hold it, or correct it
    with pytest.raises(ValueError, match=message):
        processor(noise(9, 9))
