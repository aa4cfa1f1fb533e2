"""Pictures in: files, URLs, bytes, PIL images, arrays and tensors become upright RGB pictures of 8 bits per channel.

Written once, for both image processors, the pipeline, the command line and search. Decoding, the pixel limit and alpha
compositing are Pillow's; 16-bit samples are rescaled as the PNG specification (third edition, 13.12) asks.
"""

from __future__ import annotations

import base64
import binascii
import functools
import http.client
import io
import os
import string
import struct
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

from siglip_hf.files import MOST_BYTES, check_regular_file, read_regular_file
from siglip_hf.parallel import PIXELS
from siglip_hf.preprocessing.sequences import as_list

#: Above this many pixels a JPEG is decoded at a reduced size (libjpeg scales by 1/2, 1/4 or 1/8 while decoding), and
#: what must be converted or turned is reduced first. Cameras in ordinary use stay below it, so their pictures are
#: decoded in full and give stock's numbers.
LARGE_PIXELS = 50_000_000

# Conversions take up to four times a picture's memory; so they are done in strips of about this many pixels.
_STRIP_PIXELS = 1_000_000

#: How many times larger than the result, along each side, a reduced decode must at least be.
DRAFT_MARGIN = 4

DEFAULT_TIMEOUT = 30.0  # seconds to wait for a URL

# A float picture resized or blended in float32 may leave 0..1 by a rounding error; more than this is a mistake.
_FLOAT_SLACK = 1e-4

# Pillow's memory comes in blocks of 16 MB, which the C library keeps for the thread that asked for them, so that each
# thread would keep the memory of its largest picture. Blocks of more than 32 MB go back to the system at once.
if "PILLOW_BLOCK_SIZE" not in os.environ:
    Image.core.set_block_size(64 * 2**20)

_BASE64 = frozenset(string.ascii_letters + string.digits + "+/=\r\n")
_EXIF_ORIENTATION = 0x0112
#: Endings of the files that are taken for pictures in a folder.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")


class PictureError(OSError, ValueError):
    """One picture cannot be used. A batch job may catch this, count it and go on with the next picture.

    It is an `OSError` and a `ValueError` at once, because a caller can rarely tell a broken file from a wrong one.

    Attributes:
        reason: what is wrong, without the name of the picture.
        source: the picture in words: its path, its URL, or what kind of object it is.
        index: its place in the flattened batch, or None if it was given alone.
    """

    def __init__(self, reason: str, source: str | None = None, index: int | None = None):
        place = "picture" if index is None else f"picture {index}"
        super().__init__(f"{place} ({source}): {reason}" if source is not None else reason)
        self.reason, self.source, self.index = reason, source, index


class Picture(NamedTuple):
    """A picture as the image processors take it.

    Attributes:
        pixels: a loaded PIL image, or an array (height, width, channels); what the source was closest to, so that no
            copy is made before it is needed. RGB and uint8 unless the caller of `read_picture` asked otherwise.
        unit_range: the source held floats in 0..1. It matters only when `do_rescale=False`: then such a picture stays
            in 0..1, and all others stay in 0..255.
    """

    pixels: Image.Image | np.ndarray
    unit_range: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if isinstance(self.pixels, Image.Image):
            return self.pixels.height, self.pixels.width
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def holds_floats(self) -> bool:
        """Whether the pixels were left as floats (`keep_floats`) instead of being rounded to 8 bits."""
        return not isinstance(self.pixels, Image.Image) and self.pixels.dtype.kind == "f"

    def to_pil(self) -> Image.Image:
        """The picture as a PIL image."""
        if isinstance(self.pixels, Image.Image):
            return self.pixels
        return _array_to_pil(self.pixels)

    def to_array(self) -> np.ndarray:
        """The picture as a writable, contiguous array (height, width, channels)."""
        if isinstance(self.pixels, Image.Image):
            array = np.array(self.pixels)
            return array[:, :, None] if array.ndim == 2 else array
        return np.require(self.pixels, requirements=["C", "W"])


def load_picture(
    source: Any,
    *,
    input_data_format: str | ChannelDimension | None = None,
    draft_to: int | None = None,
    timeout: float | None = DEFAULT_TIMEOUT,
) -> Image.Image:
    """One picture from anything, as an upright PIL image of mode RGB.

    - **Where from**: a path (`str` or `Path`), an http(s) URL, a `data:` URI or a base64 string, `bytes`, an open
      binary file, a dict with `bytes` or `path` (an undecoded image of `datasets`), a PIL image of any mode, a NumPy
      array, a torch tensor on any device, or anything else that offers `__array__`.
    - **Orientation**: the EXIF tag is applied to all of them, also to a PIL image that still carries it.
    - **Transparency**: composited on white, whether it is an alpha channel or a transparent colour.
    - **Arrays**: (height, width), (height, width, C) or (C, height, width) with C 1, 3 or 4. uint8 is taken as it is
      and uint16 scaled from 0..65535; other integers must lie in 0..255. Floats lie in 0..1 (then scaled) or in 0..255,
      and are rounded to 8 bits. bool, NaN and infinity are refused.
    - **Size**: Pillow's pixel limit holds (a warning above `PIL.Image.MAX_IMAGE_PIXELS`, an error above twice that). A
      JPEG of more than `LARGE_PIXELS` is decoded at 1/2, 1/4 or 1/8 of its size if `draft_to` allows it.

    Args:
        source: the picture.
        input_data_format: "channels_first" or "channels_last" for arrays; inferred from the shape if None.
        draft_to: longest side, in pixels, of what the picture will be resized to. A large JPEG is then decoded no
            smaller than `DRAFT_MARGIN` times that. None decodes every picture in full.
        timeout: seconds to wait for a URL; None waits forever.

    Returns:
        A loaded PIL image of mode RGB. It may be `source` itself if that needs no change.

    Raises:
        PictureError: (an `OSError` and a `ValueError`) naming the picture and what is wrong with it.
    """
    return read_picture(source, input_data_format=input_data_format, draft_to=draft_to, timeout=timeout).to_pil()


def load_pictures(images: Any, **options: Any) -> list[Image.Image]:
    """All pictures of a batch, flattened, as upright PIL images of mode RGB.

    Args:
        images: one picture, a batched array (N, ...), or lists, tuples and iterators of these in any nesting.
        options: as in `load_picture`.

    Raises:
        PictureError: for the first picture that cannot be used; its message and `index` say which.
        ValueError: if there is no picture at all.
    """
    return [read().to_pil() for read in iter_pictures(images, **options)]


def iter_pictures(images: Any, **options: Any) -> Iterator[Callable[[], Picture]]:
    """The pictures of a batch, each as a function that reads it, so that the batch need not lie in memory decoded.

    Args:
        images: one picture or many; see `load_pictures`.
        **options: those of `read_picture`.

    Yields:
        Functions that may be called in threads. They raise `PictureError`, with the index, for what cannot be read.

    Raises:
        ValueError: if there are none.
    """
    sources = list(_flatten(images, options.get("keep_floats", False)))
    if not sources:
        raise ValueError(f"No pictures given: got an empty {type(images).__name__}. Pass at least one picture.")

    for index, source in enumerate(sources):
        read = functools.partial(read_picture, source, index=index if len(sources) > 1 else None, **options)
        # Objects may be one and the same, or share a file, which two threads must not read at once.
        if not isinstance(source, str | os.PathLike | bytes):
            read = functools.partial(read_picture, read())
        yield read


def read_picture(
    source: Any,
    *,
    input_data_format: str | ChannelDimension | None = None,
    draft_to: int | None = None,
    timeout: float | None = DEFAULT_TIMEOUT,
    convert_rgb: bool = True,
    keep_floats: bool = False,
    index: int | None = None,
) -> Picture:
    """As `load_picture`, without converting between PIL images and arrays.

    Args:
        source: the picture; see `load_picture`.
        input_data_format: as in `load_picture`.
        draft_to: as in `load_picture`.
        timeout: as in `load_picture`.
        convert_rgb: if False, pictures keep their 1 (L), 3 (RGB) or 4 (RGBA) channels, and other PIL modes are refused.
        keep_floats: if True, float arrays stay floats of any finite value: pixels that the caller has prepared already.
        index: place in the batch, for the message of an error.

    Raises:
        PictureError: naming the picture and what is wrong with it.
    """
    layout = None if input_data_format is None else ChannelDimension(input_data_format)
    try:
        if isinstance(source, Picture):
            return source
        if isinstance(source, Image.Image):
            return _from_pil(source, convert_rgb)
        array = _as_array(source)
        if array is not None:
            return _from_array(array, layout, convert_rgb, keep_floats)
        # Multi-frame formats keep their file open until they are closed; the pixels outlive that.
        with _open(_as_file(source, timeout), draft_to) as image:
            PIXELS.hold(image.width * image.height)
            if draft_to is not None and _is_costly(image, convert_rgb):
                return _reduced(image, draft_to)
            return _from_pil(image, convert_rgb)
    except (ValueError, OSError) as error:
        raise PictureError(_reason(error), _describe(source), index) from error


def read_bytes(source: Any, *, timeout: float | None = DEFAULT_TIMEOUT) -> bytes:
    """The content of a picture's file, undecoded.

    Args:
        source: a path, a URL, a `data:` URI, a base64 string, bytes, an open binary file, or a dict with `bytes` or
            `path`; see `load_picture`.
        timeout: seconds to wait for a URL; None waits forever.

    Raises:
        PictureError: naming the picture and why it cannot be read.
    """
    try:
        file = _as_file(source, timeout)
        return read_regular_file(file) if isinstance(file, str) else file.read()
    except (ValueError, OSError) as error:
        raise PictureError(_reason(error), _describe(source)) from error


def looks_like_picture_source(text: str) -> bool:
    """Whether a string names a picture or else says words: a URL, a data URI, base64, an existing file, or a
    file name that ends as pictures' do."""
    if text.startswith(("http://", "https://", "data:")):
        return True
    if len(text) >= 64 and _BASE64.issuperset(text[:256]):
        return True
    return text.lower().endswith(PICTURE_SUFFIXES) or (_exists(text) and os.path.isfile(text))


def _flatten(images: Any, keep_floats: bool) -> Iterator[Any]:
    """Single pictures out of any nesting of sequences (see `as_list`) and batched arrays."""
    items = as_list(images)
    if items is not None:
        for item in items:
            yield from _flatten(item, keep_floats)
    elif getattr(images, "ndim", None) == 4 and (batch := _as_array(images)) is not None:
        # Floats get one scale for the whole batch: a nearly black picture among floats in 0..255 is not in 0..1.
        if batch.dtype.kind == "f" and batch.size and not keep_floats and 1 + _FLOAT_SLACK < batch.max() <= 255:
            batch, _ = _to_eight_bits(batch)
        yield from batch
    else:
        yield images


def _as_array(source: Any) -> np.ndarray | None:
    """The source as an array on the CPU, or None if it is not an array."""
    if isinstance(source, np.ndarray):
        return source
    if isinstance(source, torch.Tensor):
        tensor = source.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    # NumPy's own strings, out of an array of paths, say that they are arrays.
    return np.asarray(source) if hasattr(source, "__array__") and not isinstance(source, str | bytes) else None


def _as_file(source: Any, timeout: float | None) -> str | io.BytesIO | Any:
    """A path or a binary file that Pillow can open."""
    if isinstance(source, dict):
        content = source.get("bytes")
        source = source.get("path") if content is None else content
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    if isinstance(source, str):
        return _from_string(source, timeout)
    if hasattr(source, "read"):
        return source
    raise ValueError(
        f"a {type(source).__name__} is not a picture; pass a PIL image, an array, a tensor, a path, a URL, bytes or "
        "an open binary file"
    )


def _from_string(text: str, timeout: float | None) -> str | io.BytesIO:
    """A string is a URL, a data URI, a path, or base64, in this order."""
    if text.startswith(("http://", "https://")):
        return io.BytesIO(_download(text, timeout))
    is_uri = text.startswith("data:")
    if not is_uri and _exists(text):
        return text
    missing = "its data are not base64" if is_uri else "no such file or folder, and neither a URL nor base64 data"
    try:
        content = base64.b64decode(text.partition(",")[2] if is_uri else "".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(missing) from error
    if not is_uri and not _is_identified(content):  # many a name happens to be base64
        raise ValueError(missing)
    return io.BytesIO(content)


def _is_identified(content: bytes) -> bool:
    """Whether the bytes begin as a picture does; it may be broken nevertheless."""
    try:
        Image.open(io.BytesIO(content)).close()
    except UnidentifiedImageError:
        return False
    except Exception:  # a broken header of a known format
        return True
    return True


def _download(url: str, timeout: float | None) -> bytes:
    try:
        # Some servers refuse the name that Python gives itself.
        request = urllib.request.Request(url, headers={"User-Agent": "siglip-hf"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            content = response.read(MOST_BYTES + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(f"the download failed: {error}") from error
    if len(content) > MOST_BYTES:
        raise OSError(f"it has more than {MOST_BYTES:,} bytes, which is the most that is read")
    return content


def _exists(text: str) -> bool:
    try:
        return os.path.exists(text)
    except ValueError:  # an embedded null character
        return False


def _open(file: Any, draft_to: int | None) -> Image.Image:
    """Opens a file, to be decoded by the first use; a very large JPEG at a reduced size."""
    if isinstance(file, str):
        if not _exists(file):
            raise OSError("no such file or folder")
        check_regular_file(file)
    try:
        image = Image.open(file)
        if draft_to is not None and image.width * image.height > LARGE_PIXELS and isinstance(image, JpegImageFile):
            # The same length for both sides, because the orientation is applied after decoding.
            image.draft(None, (DRAFT_MARGIN * draft_to, DRAFT_MARGIN * draft_to))
    except UnidentifiedImageError as error:
        raise OSError("not a picture in a format that Pillow can read") from error
    except Exception as error:  # a broken header makes Pillow raise nearly anything; the pixel limit has its own class
        raise OSError(f"{type(error).__name__}: {error}") from error
    return image


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # as in `_open`
        raise OSError(f"{type(error).__name__}: {error}") from error


def _from_pil(image: Image.Image, convert_rgb: bool, turn: bool = True) -> Picture:
    _load(image)
    image = _upright(image) if turn else image
    unit_range = False
    if image.mode == "F" or image.mode.startswith("I"):  # 32-bit float, 32-bit and 16-bit integer: one channel
        array = np.asarray(image)
        # Pillow reads 16-bit grey files as 32-bit integers in some formats and versions.
        if image.mode == "I" and (image.format in ("PNG", "PPM") or array.max() > 255) and array.min() >= 0:
            if array.max() > 65535:
                raise ValueError(f"mode I holds {array.max()}; more than 16 bits per pixel have no known scale")
            array = array.astype(np.uint16)
        array, unit_range = _to_eight_bits(array)
        image = Image.fromarray(array)
    if convert_rgb:
        image = _to_rgb(image)
    elif image.mode not in ("L", "RGB", "RGBA"):
        raise ValueError(f"mode {image.mode} has no meaning with do_convert_rgb=False; convert it to L, RGB or RGBA")
    return Picture(image, unit_range)


def _is_costly(image: Image.Image, convert_rgb: bool) -> bool:
    """Whether a picture is very large and would lie in memory twice, because it must be converted or turned."""
    if not convert_rgb or image.width * image.height <= LARGE_PIXELS or image.mode in ("F", "I"):
        return False
    return image.mode not in ("RGB", "L") or image.has_transparency_data or _orientation(image) != 1


def reduction(size: tuple[int, int], draft_to: int) -> int:
    """How many times smaller a very large picture may be made before it is resized.

    Args:
        size: width and height in pixels.
        draft_to: the longer side that it will be resized to.
    """
    return min(max(min(size) // (DRAFT_MARGIN * draft_to), 1), 8)  # 8 as for a JPEG


def _reduced(image: Image.Image, draft_to: int) -> Picture:
    """An RGB picture reduced by a whole number, to no less than a JPEG would be; strip by strip."""
    _load(image)
    factor = reduction(image.size, draft_to)
    width, height = (-(-side // factor) for side in image.size)
    reduced = Image.new("RGB", (width, height))
    rows = max(_STRIP_PIXELS // image.width // factor, 1) * factor
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        reduced.paste(_from_pil(strip, True, turn=False).to_pil().reduce(factor), (0, top // factor))
    reduced.getexif().update(image.getexif())
    return Picture(_upright(reduced))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1  # metadata that cannot be read say nothing about the orientation


def _upright(image: Image.Image) -> Image.Image:
    try:
        # Asked first, because exif_transpose copies an image that needs no turning.
        return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return image  # metadata that cannot be read say nothing about the orientation


def _to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB, on white where the image is transparent."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    rows = max(_STRIP_PIXELS // image.width, 1)
    if image.height > rows:
        whole = Image.new("RGB", image.size)
        for top in range(0, image.height, rows):
            whole.paste(_to_rgb(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
        return whole
    if image.has_transparency_data or image.mode in ("La", "RGBa"):
        if image.mode == "La":  # premultiplied alpha has one way out only
            image = image.convert("LA")
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_array(array: np.ndarray, layout: ChannelDimension | None, convert_rgb: bool, keep_floats: bool) -> Picture:
    array = _channels_last(array, layout)  # (height, width, C)
    unit_range = False
    if keep_floats and array.dtype.kind == "f":
        _refuse_non_finite(array)
    else:
        array, unit_range = _to_eight_bits(array)
    if convert_rgb and array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    elif convert_rgb and array.shape[2] == 4:
        if array.dtype == np.uint8:
            return Picture(_to_rgb(_array_to_pil(array)), unit_range)
        alpha = array[:, :, 3:]
        if alpha.min() < 0 or array.max() > 1:
            raise ValueError(f"floats with an alpha channel must lie in 0..1, got up to {array.max():.4g}")
        array = array[:, :, :3] * alpha + (1 - alpha)
    return Picture(array, unit_range)


def _channels_last(array: np.ndarray, layout: ChannelDimension | None) -> np.ndarray:
    if array.size == 0:
        raise ValueError(f"shape {array.shape} has no pixels")
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        raise ValueError(f"shape {array.shape} is not that of a picture: (H, W), (H, W, C) or (C, H, W)")
    if layout is None:
        try:
            layout = infer_channel_dimension_format(array, num_channels=(1, 3, 4))
        except ValueError as error:
            raise ValueError(f"shape {array.shape} has no axis of 1, 3 or 4 channels at its start or end") from error
    array = np.moveaxis(array, 0, -1) if layout == ChannelDimension.FIRST else array
    if array.shape[2] not in (1, 3, 4):
        raise ValueError(f"{array.shape[2]} channels with input_data_format={layout.value!r}; expected 1, 3 or 4")
    return array


def _to_eight_bits(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """The array as uint8 in 0..255, and whether it held floats in 0..1."""
    kind = array.dtype.kind
    if array.dtype == np.uint8:
        return array, False
    if kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8), False
    if kind not in "iuf":
        hint = "; multiply a mask by 255 and convert it to uint8" if kind == "b" else ""
        raise ValueError(f"dtype {array.dtype} is not that of a picture{hint}")
    _refuse_non_finite(array)
    low, high = array.min(), array.max()
    if kind in "iu":
        if low < 0 or high > 255:
            raise ValueError(f"{array.dtype} values in {low}..{high}; expected 0..255, or uint16 for 16-bit pictures")
        return array.astype(np.uint8), False
    if low < -_FLOAT_SLACK or high > 255:
        raise ValueError(
            f"float values in {low:.4g}..{high:.4g}; expected 0..1 or 0..255. Undo any normalization, or pass "
            "do_resize=False, do_rescale=False, do_normalize=False if the pixels are prepared already"
        )
    unit_range = bool(high <= 1 + _FLOAT_SLACK)
    scaled = array.astype(np.float32) * 255 if unit_range else array
    return np.rint(scaled).clip(0, 255).astype(np.uint8), unit_range


def _refuse_non_finite(array: np.ndarray) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("it holds NaN or infinity")


def _array_to_pil(array: np.ndarray) -> Image.Image:
    """(height, width, C) uint8 as a PIL image of mode L, RGB or RGBA."""
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array))


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, PictureError) else str(error) or type(error).__name__


def _describe(source: Any) -> str:
    """The source in a few words, for an error."""
    if isinstance(source, dict):
        return _describe(source.get("path") or source.get("bytes"))
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        return repr(text) if len(text) <= 200 else repr(text[:40]) + f"... of {len(text)} characters"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes"
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "")
        return repr(name) if name else f"PIL image of mode {source.mode}"
    if hasattr(source, "shape"):
        return f"array of shape {tuple(source.shape)} and dtype {source.dtype}"
    return repr(getattr(source, "name", None) or type(source).__name__)
