"""Pictures to `pixel_values` with Pillow: squash to the model's size, scale to 0..1, normalize with mean and std 0.5.

The defaults are those of the published checkpoints (their `preprocessor_config.json`): bicubic, antialiased, in 8 bits,
without cropping. They and the arguments stand here once, for this class and for `SiglipImageProcessorFast`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
)
from transformers.processing_utils import ImagesKwargs

from siglip_hf.parallel import PIXELS, in_threads
from siglip_hf.preprocessing.identity import KnownAsStock, code_in_files, warn_of_own_code
from siglip_hf.preprocessing.image_intake import Picture, iter_pictures, load_picture
from siglip_hf.preprocessing.image_tensors import resize_with_pillow
from siglip_hf.preprocessing.options import check_unknown


def resized_size(size: SizeDict, height: int, width: int) -> tuple[int, int]:
    """The (height, width) that a picture of `height` x `width` pixels is resized to.

    Args:
        size: `height` and `width` (the picture is squashed to them, as SigLIP was trained), or one of the forms that
            keep the aspect ratio: `shortest_edge`, `shortest_edge` with `longest_edge`, `max_height` with `max_width`.
        height: of the picture, in pixels.
        width: of the picture, in pixels.

    Raises:
        ValueError: if `size` has none of these forms.
    """
    if size.height and size.width:
        return size.height, size.width
    if size.shortest_edge and size.longest_edge:
        return get_size_with_aspect_ratio((height, width), size.shortest_edge, size.longest_edge)
    if size.shortest_edge:
        shortest, longest = sorted((height, width))
        longest = int(size.shortest_edge * longest / shortest)
        return (longest, size.shortest_edge) if width <= height else (size.shortest_edge, longest)
    if size.max_height and size.max_width:
        return get_image_size_for_max_height_width((height, width), size.max_height, size.max_width)
    raise ValueError(
        f"size={dict(size)} cannot be used; give 'height' and 'width', 'shortest_edge' (with or without "
        "'longest_edge'), or 'max_height' and 'max_width'"
    )


def pillow_filter(resample: Any) -> PILImageResampling:
    """`resample` as Pillow's enumeration; torchvision's `InterpolationMode` is understood by its name."""
    if isinstance(resample, int):
        return PILImageResampling(resample)
    return getattr(PILImageResampling, resample.name.removesuffix("_EXACT"))


def value_scale(picture: Picture, do_rescale: bool, rescale_factor: float) -> float:
    """What the picture's values are multiplied with: without rescaling, 8 bits made of floats in 0..1 go back there."""
    if do_rescale:
        return rescale_factor
    return 1 / 255 if picture.unit_range and not picture.holds_floats else 1.0


def _values(value: Any) -> Sequence[float]:
    return [value] if isinstance(value, int | float) else value or ()


class SiglipImageProcessorBase(KnownAsStock, BaseImageProcessor):
    """Defaults, arguments and intake that both image processors share; a subclass supplies `_preprocess`."""

    do_resize = True
    size = {"height": 224, "width": 224}  # noqa: RUF012 (copied into each instance by the base class)
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    do_convert_rgb = True

    valid_kwargs = ImagesKwargs
    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(self, **kwargs: Any):
        # Some published configurations hold null, which means the default and not "off".
        given = {name: value for name, value in kwargs.items() if value is not None}
        super().__init__(**given)
        self._set_attributes(**given)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Loads the settings of a folder or repository; arguments and errors as of every image processor."""
        if kwargs.get("_from_auto"):
            files = ("processor_config.json", "preprocessor_config.json", "config.json")
            reference = code_in_files(pretrained_model_name_or_path, "AutoImageProcessor", files, kwargs)
            if reference:
                warn_of_own_code(reference, pretrained_model_name_or_path, "AutoImageProcessor", cls)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings, as `preprocessor_config.json` holds them."""
        settings = super().to_dict()
        settings.pop("__module__", None)  # see KnownAsStock
        return settings

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """One picture, or any nesting of pictures, as `pixel_values`.

        An argument that is missing takes the value that the processor was made with. A switch (`do_...`) that is None
        is off, as in stock; any other argument that is None counts as missing.

        Args:
            images: what `siglip_hf.preprocessing.image_intake.load_pictures` takes: paths, URLs, bytes, files, PIL
                images of any mode, arrays, tensors, and lists of these. It deals with orientation, transparency and
                bit depth.
            do_resize: resize to `size`.
            size: `{"height": h, "width": w}` in pixels. An int is the shortest edge, as in stock.
            resample: filter, one of `PIL.Image.Resampling`.
            do_center_crop, crop_size: cut `crop_size` out of the middle; off by default.
            do_rescale, rescale_factor: multiply the 8-bit values with `rescale_factor`. Floats in 0..1 are known as
                such: they are not scaled twice, and `do_rescale=False` leaves them in 0..1.
            do_normalize, image_mean, image_std: subtract the mean and divide by the standard deviation, per channel.
            do_pad, pad_size: append zeros below and to the right up to `pad_size`; off by default.
            do_convert_rgb: if False, pictures keep 1, 3 or 4 channels.
            input_data_format: "channels_first" or "channels_last" for arrays; inferred from the shape if None.
            data_format: that of the result, "channels_first" if None.
            return_tensors: "pt" for a torch tensor, "np" for an array, None for a list with one entry per picture.
            device: where a torch result is made.

        Returns:
            A `BatchFeature` with `pixel_values` (B, 3, height, width), float32; (B, height, width, 3) for
            `data_format="channels_last"`. With neither rescaling nor normalizing, the uint8 values themselves.

        Raises:
            PictureError: (a `ValueError` and an `OSError`) naming the picture that cannot be used.
            ValueError: for an empty batch, a misspelled argument, or a value that an argument cannot have. An unknown
                argument is ignored with a warning.
        """
        known = set(self._valid_kwargs_names)
        check_unknown(set(kwargs) - known, known, type(self).__name__)
        given: Any = {
            name: False if value is None else value
            for name, value in kwargs.items()
            if name in known and (value is not None or name.startswith("do_"))
        }
        try:
            return super().preprocess(images, **given)
        except StrictDataclassError as error:  # the base class checks types with it; it is no ValueError
            raise ValueError(str(error)) from error

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:  # type: ignore[override]
        if kwargs["do_normalize"] and not all(math.isfinite(value) and value for value in _values(kwargs["image_std"])):
            raise ValueError(f"image_std={kwargs['image_std']} cannot be divided by; no value may be 0 or infinite.")
        pixels = self._result_pixels(**kwargs) if kwargs["do_resize"] else 0
        if Image.MAX_IMAGE_PIXELS is not None and pixels > 2 * Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"pictures would become {pixels:,} pixels each, more than Pillow decodes. Correct "
                f"size={kwargs['size']} or the budget of patches."
            )
        # The base class wants a size along with do_resize; NaFlex has none.
        super()._validate_preprocess_kwargs(
            **kwargs | {"do_resize": kwargs["do_resize"] and type(self).size is not None}
        )

    def _result_pixels(self, size: SizeDict | None = None, **kwargs: Any) -> int:
        """Pixels that a square picture would have after resizing."""
        return max((side for _, side in size or () if side), default=0) ** 2

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths, URLs and base64 strings of any nesting as PIL images; everything else as it is."""
        if isinstance(image_url_or_urls, list | tuple) and not isinstance(image_url_or_urls, Picture):
            return [self.fetch_images(item) for item in image_url_or_urls]
        return load_picture(image_url_or_urls) if isinstance(image_url_or_urls, str) else image_url_or_urls

    def _prepare_image_like_inputs(  # type: ignore[override]
        self,
        images: Any,
        *,
        do_resize: bool,
        size: SizeDict,
        do_rescale: bool,
        do_convert_rgb: bool,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> Iterable[Callable[[], Picture]]:
        # To be read one by one, so that a batch of large files never lies in memory decoded.
        return iter_pictures(
            images,
            input_data_format=input_data_format,
            draft_to=max((side for _, side in size), default=None) if do_resize else None,
            convert_rgb=do_convert_rgb,
            keep_floats=not (do_resize or do_rescale),
        )


class SiglipImageProcessor(SiglipImageProcessorBase, PilBackend):
    """Turns pictures into `pixel_values` with Pillow, bit for bit as `SiglipImageProcessorPil` of transformers does.

    The two differ where that class goes wrong: floats in 0..1 are recognised, 16-bit pictures scaled, EXIF orientation
    and transparency always applied, bytes and files read, and bool and NaN refused; see
    `siglip_hf.preprocessing.image_intake.load_picture`. It runs on the CPU; for a GPU, or for speed, see
    `SiglipImageProcessorFast`.

    The arguments of `preprocess` are also those of the constructor, where they set the defaults.

    Examples:
        >>> from siglip_hf import SiglipImageProcessor
        >>> processor = SiglipImageProcessor(size={"height": 384, "width": 384})
        >>> processor(["drawings/cat.png", "drawings/key.png"], return_tensors="pt").pixel_values.shape
        torch.Size([2, 3, 384, 384])
    """

    def _preprocess(  # type: ignore[override]
        self,
        images: Iterable[Callable[[], Picture]],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        do_pad: bool,
        pad_size: SizeDict,
        return_tensors: str | None,
        data_format: str | ChannelDimension | None = None,
        device: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if device is not None and str(device) != "cpu":
            raise ValueError(f"device={str(device)!r}: Pillow works on the CPU. Use SiglipImageProcessorFast instead.")
        tables: dict[tuple[float, int], np.ndarray] = {}  # by scale and channels

        @PIXELS.bounded()
        def prepared(read: Callable[[], Picture]) -> np.ndarray:
            picture = read()
            if do_resize:
                picture = resize_with_pillow(picture, resized_size(size, *picture.size), pillow_filter(resample))
            pixels = np.moveaxis(picture.to_array(), -1, 0)  # (C, height, width)
            if do_center_crop:
                pixels = self.center_crop(pixels, crop_size)
            scale = value_scale(picture, do_rescale, rescale_factor)
            if pixels.dtype != np.uint8:
                return self._finish(pixels, scale, do_normalize, image_mean, image_std)
            if not do_normalize and scale == 1:
                return pixels
            # Only 256 values go through the arithmetic; the pixels look up its results.
            channels = pixels.shape[0]
            if (scale, channels) not in tables:
                values = np.broadcast_to(np.arange(256, dtype=np.uint8), (channels, 1, 256))
                tables[scale, channels] = self._finish(values, scale, do_normalize, image_mean, image_std)
            return _look_up(tables[scale, channels], pixels)

        results: Any = list(in_threads(prepared, images))
        if do_pad:
            results = self.pad(results, pad_size=pad_size)
        if ChannelDimension(data_format or "channels_first") == ChannelDimension.LAST:
            results = [np.moveaxis(pixels, 0, -1) for pixels in results]
        return BatchFeature(data={"pixel_values": results}, tensor_type=return_tensors)

    def _finish(self, values: np.ndarray, scale: float, do_normalize: bool, mean: Any, std: Any) -> np.ndarray:
        """The base class's own arithmetic on (C, height, width), so that every bit is stock's."""
        if scale != 1:
            values = self.rescale(values, scale)
        return self.normalize(values, mean, std) if do_normalize else values


def _look_up(table: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """`table` (C, 1, 256) at `pixels` (C, height, width), as an array in C order."""
    result = np.empty(pixels.shape, table.dtype)
    for channel, plane, out in zip(table[:, 0], pixels, result, strict=True):
        np.take(channel, plane, out=out, mode="clip")  # "clip" needs no buffer; uint8 cannot leave 0..255
    return result


#: transformers' own name for the class that works with Pillow.
SiglipImageProcessorPil = SiglipImageProcessor
