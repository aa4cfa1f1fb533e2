"""Every source, mode, dtype and shape of a picture gives the same RGB pixels, and every bad one a clear error."""

import base64
import functools
import http.server
import io
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from siglip_hf.files import MOST_BYTES
from siglip_hf.preprocessing import image_intake
from siglip_hf.preprocessing.image_intake import (
    PictureError,
    iter_pictures,
    load_picture,
    load_pictures,
    looks_like_picture_source,
    read_bytes,
    read_picture,
)

H, W = 6, 9


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


@pytest.fixture
def png(pixels):
    return encode(Image.fromarray(pixels))


def encode(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def rotated_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it upright"
    return exif


def rgb(source, **options):
    image = load_picture(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- where from


def test_all_kinds_of_files_give_the_same_pixels(pixels, png, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png)
    encoded = base64.b64encode(png).decode()
    wrapped = "\n".join(encoded[i : i + 76] for i in range(0, len(encoded), 76))
    sources = [path, str(path), png, bytearray(png), memoryview(png), io.BytesIO(png), encoded, wrapped]
    sources += [f"data:image/png;base64,{encoded}", {"bytes": png, "path": None}, {"bytes": None, "path": str(path)}]
    for source in sources:
        np.testing.assert_array_equal(rgb(source), pixels)
    with path.open("rb") as file:
        np.testing.assert_array_equal(rgb(file), pixels)


def test_url(pixels, png, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            return None

    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        np.testing.assert_array_equal(rgb(f"{base}/a.png", timeout=5), pixels)
        with pytest.raises(PictureError, match=r"missing\.png.*404"):
            load_picture(f"{base}/missing.png", timeout=5)
        monkeypatch.setattr(image_intake, "MOST_BYTES", len(png) - 1)
        with pytest.raises(PictureError, match="the most that is read"):
            load_picture(f"{base}/a.png", timeout=5)
        server.shutdown()
    for url in ("http://127.0.0.1:1/a.png", "http://[", "http://a b/c.png"):
        with pytest.raises(PictureError, match="the download failed"):
            load_picture(url, timeout=5)


def test_an_rgb_image_is_not_copied(pixels):
    image = Image.fromarray(pixels)
    assert load_picture(image) is image


def test_anything_with_an_array_interface(pixels):
    class Wrapped:
        def __array__(self, dtype=None, copy=None):
            return pixels

    np.testing.assert_array_equal(rgb(Wrapped()), pixels)


# ---- modes of PIL


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_convert_as_pillow_does(pixels, mode):
    image = Image.fromarray(pixels).convert(mode)
    np.testing.assert_array_equal(rgb(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa", "PA"])
def test_a_fully_transparent_picture_is_white(mode):
    if mode == "PA":
        image = Image.new("P", (W, H), 3)
        image.putalpha(0)
    else:
        image = Image.new("RGBA", (W, H), (200, 10, 10, 0)).convert("LA" if mode == "La" else "RGBA").convert(mode)
    assert image.mode == mode
    assert (rgb(image) == 255).all()


def test_alpha_is_composited_on_white_the_same_way_from_every_source(pixels, tmp_path):
    alpha = np.random.default_rng(1).integers(0, 256, (H, W, 1), dtype=np.uint8)
    rgba = np.concatenate([pixels, alpha], axis=2)
    weight = alpha / 255
    expected = np.round(weight * pixels + (1 - weight) * 255).astype(np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(rgba).save(path)
    sources = [path, Image.fromarray(rgba), rgba, rgba.transpose(2, 0, 1), torch.from_numpy(rgba), path.read_bytes()]
    for source in sources:
        np.testing.assert_array_equal(rgb(source), expected)
    floats = (rgba / 255).astype(np.float32)
    np.testing.assert_array_equal(rgb(floats), expected)


def test_a_transparent_colour_of_a_palette_or_of_rgb_is_white():
    palette = Image.new("P", (W, H), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 1
    assert (rgb(palette) == 255).all()
    keyed = Image.new("RGB", (W, H), (7, 8, 9))
    keyed.info["transparency"] = (7, 8, 9)
    assert (rgb(keyed) == 255).all()


def test_sixteen_bits_are_scaled_to_eight():
    grey = np.linspace(0, 65535, H * W).astype(np.uint16).reshape(H, W)
    expected = np.repeat(np.rint(grey / 257).astype(np.uint8)[:, :, None], 3, axis=2)
    assert expected.min() == 0
    assert expected.max() == 255
    image = Image.fromarray(grey)
    assert image.mode.startswith("I;16")
    for source in [image, encode(image), encode(image, "TIFF"), grey, grey.astype(">u2"), torch.from_numpy(grey)]:
        np.testing.assert_array_equal(rgb(source), expected)
    np.testing.assert_array_equal(rgb(Image.fromarray(grey.astype(np.int32))), expected)  # mode I


def test_float_mode_and_integer_mode():
    ramp = np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)
    expected = np.rint(ramp * 255).astype(np.uint8)
    np.testing.assert_array_equal(rgb(Image.fromarray(ramp))[:, :, 0], expected)
    np.testing.assert_array_equal(rgb(Image.fromarray(expected.astype(np.int32)))[:, :, 1], expected)
    with pytest.raises(PictureError, match="mode I holds 70000"):
        load_picture(Image.fromarray(np.full((H, W), 70000, np.int32)))


# ---- arrays and tensors


@pytest.mark.parametrize("as_tensor", [False, True])
def test_layouts(pixels, as_tensor):
    convert = torch.from_numpy if as_tensor else np.asarray
    for array in (pixels, np.ascontiguousarray(pixels.transpose(2, 0, 1))):
        np.testing.assert_array_equal(rgb(convert(array)), pixels)
    grey = pixels[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    for array in (grey, grey[:, :, None], grey[None]):
        np.testing.assert_array_equal(rgb(convert(np.ascontiguousarray(array))), expected)


def test_input_data_format_settles_ambiguous_shapes():
    array = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    np.testing.assert_array_equal(rgb(array, input_data_format="channels_last"), array)
    np.testing.assert_array_equal(rgb(array, input_data_format="channels_first"), array.transpose(1, 2, 0))
    with pytest.raises(ValueError, match="sideways"):
        load_picture(array, input_data_format="sideways")
    with pytest.raises(PictureError, match=r"9 channels with input_data_format='channels_last'"):
        load_picture(np.zeros((3, 6, 9), np.uint8), input_data_format="channels_last")


def test_strided_and_read_only_arrays(pixels):
    flipped = pixels[:, ::-1]
    np.testing.assert_array_equal(rgb(flipped), np.ascontiguousarray(flipped))
    locked = pixels.copy()
    locked.flags.writeable = False
    writable = read_picture(locked).to_array()
    np.testing.assert_array_equal(writable, pixels)
    assert writable.flags.writeable


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, torch.bfloat16, torch.float32])
def test_floats_in_0_1_are_recognised(pixels, dtype):
    unit = pixels / 255
    array = torch.from_numpy(unit).to(dtype) if isinstance(dtype, torch.dtype) else unit.astype(dtype)
    rounding = 1 if dtype in (np.float16, torch.bfloat16) else 0
    assert np.abs(rgb(array).astype(int) - pixels).max() <= rounding
    assert read_picture(array).unit_range


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.int32, np.int64, np.uint32])
def test_numbers_in_0_255_are_taken_as_they_are(pixels, dtype):
    np.testing.assert_array_equal(rgb(pixels.astype(dtype)), pixels)
    assert not read_picture(pixels.astype(dtype)).unit_range


def test_a_tensor_that_needs_gradients(pixels):
    tensor = (torch.from_numpy(pixels) / 255).requires_grad_()
    np.testing.assert_array_equal(rgb(tensor), pixels)


def test_a_batch_of_floats_has_one_scale(pixels):
    batch = np.stack([np.ones((H, W, 3)), pixels.astype(float)])  # the first alone would look like pure white in 0..1
    dark, bright = load_pictures(batch)
    assert (np.asarray(dark) == 1).all()
    np.testing.assert_array_equal(np.asarray(bright), pixels)
    assert (rgb(batch[0]) == 255).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((H, W, 3), bool), "dtype bool.*mask by 255"),
        (torch.zeros(3, H, W, dtype=torch.bool), "dtype bool"),
        (np.zeros((H, W, 3), complex), "dtype complex128"),
        (np.full((H, W, 3), np.nan), "NaN or infinity"),
        (np.full((H, W, 3), np.inf, np.float32), "NaN or infinity"),
        (torch.full((3, H, W), float("nan")), "NaN or infinity"),
        (np.full((H, W, 3), -1.0), r"float values in -1\.\.-1"),
        (np.full((H, W, 3), 300.0), "expected 0..1 or 0..255"),
        (np.full((H, W, 3), 256), r"int64 values in 256\.\.256"),
        (np.full((H, W, 3), -1, np.int8), r"int8 values in -1\.\.-1"),
        (np.zeros((0, W, 3), np.uint8), "no pixels"),
        (np.zeros((H, W, 5), np.uint8), r"\(6, 9, 5\) has no axis of 1, 3 or 4 channels"),
        (np.zeros(7, np.uint8), r"shape \(7,\)"),
        (np.array(["a.png", "b.png"]), "not that of a picture"),
    ],
)
def test_arrays_that_are_no_pictures(array, message):
    with pytest.raises(PictureError, match=message):
        load_picture(array)


# ---- orientation


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied_to_files_and_to_open_images(image_format):
    left_is_white = Image.fromarray(np.repeat(np.array([[255, 0]], np.uint8).repeat(16, 1), 16, 0))  # 16 x 32
    content = encode(left_is_white, image_format, exif=rotated_exif())
    for source in (content, Image.open(io.BytesIO(content))):
        upright = rgb(source)
        assert upright.shape == (32, 16, 3)
        assert upright[:12].min() > 200  # what was left is now above
        assert upright[20:].max() < 55


def test_unreadable_metadata_do_not_spoil_a_picture(pixels):
    image = Image.fromarray(pixels)
    image.info["exif"] = b"Exif\x00\x00garbage"
    np.testing.assert_array_equal(rgb(image), pixels)


# ---- size


def test_pixel_limit_is_pillows(png, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W - 1)
    with pytest.warns(Image.DecompressionBombWarning):
        load_picture(png)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W // 2 - 1)
    with pytest.raises(PictureError, match="DecompressionBombError"):
        load_picture(png)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_picture(png).size == (W, H)


def test_a_large_jpeg_is_decoded_at_a_reduced_size():
    side = 7200  # 52 megapixels
    content = encode(Image.new("L", (side, side), 77), "JPEG")
    assert side * side > image_intake.LARGE_PIXELS
    reduced = read_picture(content, draft_to=224)
    assert reduced.size == (side // 8, side // 8)
    assert min(reduced.size) >= 224 * image_intake.DRAFT_MARGIN
    assert (reduced.to_array() == 77).all()


def test_a_draft_leaves_enough_detail_and_ordinary_pictures_alone(monkeypatch):
    content = encode(Image.new("RGB", (1600, 800)), "JPEG")
    assert read_picture(content, draft_to=100).size == (800, 1600)  # not large
    monkeypatch.setattr(image_intake, "LARGE_PIXELS", 1_000_000)
    assert read_picture(content, draft_to=100).size == (400, 800)  # 1/2; 1/4 would be below 4 x 100
    assert read_picture(content, draft_to=300).size == (800, 1600)
    assert read_picture(content).size == (800, 1600)
    assert read_picture(encode(Image.new("RGB", (1600, 800))), draft_to=100).size == (800, 1600)  # PNG has no draft


# ---- errors and batches


def test_nesting_is_flattened_in_order(pixels):
    shades = [np.full((H, W, 3), value, np.uint8) for value in range(6)]
    nested = [shades[0], [shades[1], (Image.fromarray(shades[2]),)], np.stack(shades[3:5]), iter([shades[5]])]
    assert [np.asarray(image)[0, 0, 0] for image in load_pictures(nested)] == [0, 1, 2, 3, 4, 5]
    assert len(load_pictures(torch.zeros(4, 3, H, W))) == 4
    assert len(load_pictures(shades[0])) == 1


@pytest.mark.parametrize("empty", [[], (), [[], []], np.zeros((0, H, W, 3), np.uint8), iter([])])
def test_an_empty_batch_is_refused(empty):
    with pytest.raises(ValueError, match="No pictures given"):
        load_pictures(empty)


def test_the_broken_file_of_a_batch_is_named(png, tmp_path):
    good, cut, text = tmp_path / "good.png", tmp_path / "cut.png", tmp_path / "text.jpg"
    good.write_bytes(png)
    cut.write_bytes(png[: len(png) // 2])
    text.write_text("not a picture")
    for bad, reason in ((cut, "truncated|OSError|SyntaxError"), (text, "not a picture in a format")):
        with pytest.raises(PictureError, match=reason) as caught:
            load_pictures([good, good, bad])
        assert caught.value.index == 2
        assert str(bad) in str(caught.value)
        assert str(caught.value).startswith("picture 2 ")
        assert isinstance(caught.value, OSError)
        assert isinstance(caught.value, ValueError)
        assert caught.value.__cause__ is not None


def test_a_cut_file_is_found_when_pillow_has_only_opened_it(png):
    with pytest.raises(PictureError, match=r"truncated|OSError"):
        load_picture(Image.open(io.BytesIO(png[: len(png) // 2])))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", "'missing.png'.*no such file"),
        (None, "NoneType is not a picture"),
        (7, "a int is not a picture"),
        ({"label": 3}, "NoneType is not a picture"),
        (b"", "not a picture in a format"),
        ("data:image/png;base64,###", "not base64"),
        ("nul\0byte", "no such file"),
    ],
)
def test_sources_that_are_no_pictures(source, message):
    with pytest.raises(PictureError, match=message):
        load_picture(source)


def test_missing_paths_and_folders(tmp_path):
    with pytest.raises(PictureError, match="no such file"):
        load_picture(tmp_path / "missing.jpg")
    with pytest.raises(PictureError, match="it is a folder"):
        load_picture(tmp_path)


def test_errors_survive_pickling():
    import pickle

    error = PictureError("it is broken", "'a.png'", 3)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "picture 3 ('a.png'): it is broken"
    assert (again.reason, again.source, again.index) == ("it is broken", "'a.png'", 3)


# ---- options of the processors


def test_channels_can_be_kept(pixels):
    rgba = np.dstack([pixels, pixels[:, :, :1]])
    for source, channels in ((pixels[:, :, 0], 1), (pixels, 3), (rgba, 4), (Image.fromarray(rgba), 4)):
        assert read_picture(source, convert_rgb=False).to_array().shape == (H, W, channels)
    with pytest.raises(PictureError, match="mode CMYK"):
        read_picture(Image.new("CMYK", (W, H)), convert_rgb=False)


def test_prepared_floats_can_be_kept():
    prepared = np.random.default_rng(0).normal(size=(H, W, 3)).astype(np.float32)
    picture = read_picture(prepared, keep_floats=True)
    assert picture.holds_floats
    np.testing.assert_array_equal(picture.to_array(), prepared)
    batch = [read() for read in iter_pictures(np.stack([prepared, prepared * 200]), keep_floats=True)]
    np.testing.assert_array_equal(batch[1].to_array(), prepared * 200)
    with pytest.raises(PictureError, match="NaN"):
        read_picture(prepared * np.nan, keep_floats=True)


def test_no_warning_on_the_way(pixels, png):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (pixels, png, Image.fromarray(pixels), torch.from_numpy(pixels)):
            load_picture(source)


@pytest.mark.parametrize("text", ["https://a.b/c", "data:image/png;base64,AA", "x.JPG", __file__, "A" * 100])
def test_strings_that_name_pictures(text):
    assert looks_like_picture_source(text)


@pytest.mark.parametrize("text", ["a cat", "cat", "", "a photo of a dog. " * 10, "http is a protocol"])
def test_strings_that_say_words(text):
    assert not looks_like_picture_source(text)


# ---- what is no picture's file


@pytest.fixture
def special(tmp_path):
    """A FIFO, a device, a folder and a file that is too large (it has a hole), by name."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "large", "wb") as file:
        file.truncate(MOST_BYTES + 1)
    names = {name: str(tmp_path / name) for name in ("fifo", "folder", "large")}
    return {**names, "device": "/dev/zero"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no FIFOs")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fifo", "FIFO, socket or device"),
        ("device", "FIFO, socket or device"),
        ("folder", "folder"),
        ("large", "bytes"),
    ],
)
@pytest.mark.parametrize("read", [load_picture, read_bytes])
def test_only_regular_files_of_a_bounded_size_are_read(special, name, message, read):
    for source in (special[name], Path(special[name]), {"path": special[name]}):
        with pytest.raises(PictureError, match=message):
            read(source)


@pytest.mark.parametrize("name", ["pictures", "imgs", "holidays", "abcd" * 30, "missing.png", "no/such/folder"])
@pytest.mark.parametrize("read", [load_picture, read_bytes])
def test_a_missing_name_that_happens_to_be_base64(name, read):
    with pytest.raises(PictureError, match="no such file or folder"):
        read(name)


def test_base64_of_a_picture_is_read_and_a_broken_one_named():
    file = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(file, "PNG")
    assert load_picture(base64.b64encode(file.getvalue()).decode()).size == (5, 4)
    with pytest.raises(PictureError, match=r"(?i)trunc|incomplete|broken"):
        load_picture(base64.b64encode(file.getvalue()[:45]).decode())
