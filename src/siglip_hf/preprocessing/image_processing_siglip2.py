"""Pictures to patches for SigLIP 2 NaFlex, with Pillow: the aspect ratio is kept, and a budget of patches is filled.

Source: "SigLIP 2", https://arxiv.org/abs/2502.14786, section 2.4.2. The defaults are those of the published
checkpoints: bilinear, antialiased, in 8 bits. They stand here once, also for `Siglip2ImageProcessorFast`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs

from siglip_hf.parallel import PIXELS, in_threads
from siglip_hf.preprocessing.image_intake import Picture, iter_pictures
from siglip_hf.preprocessing.image_processing_siglip import (
    SiglipImageProcessor,
    SiglipImageProcessorBase,
    pillow_filter,
    value_scale,
)
from siglip_hf.preprocessing.image_tensors import resize_with_pillow


@functools.lru_cache(maxsize=4096)
def naflex_size(height: int, width: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    """The size that a picture is resized to: the largest of its aspect ratio that the budget of patches allows.

    Both sides are rounded up to whole patches. The scale is found by bisection to 1e-5, as in the original code: the
    checkpoints were trained on sizes of that rounding. It is at most 100, so tiny pictures may fill less.

    Args:
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        patch_size: Side of a patch in pixels.
        max_num_patches: The budget.

    Returns:
        `(height, width)` in pixels, multiples of `patch_size`, of at most `max_num_patches` patches.
    """
    precision = 1e-5
    low, high = precision / 10, 100.0

    def patches(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / patch_size)), max(1, math.ceil(width * scale / patch_size))

    while high - low >= precision:
        scale = (low + high) / 2
        if math.prod(patches(scale)) <= max_num_patches:
            low = scale
        else:
            high = scale
    rows, columns = patches(low)
    return rows * patch_size, columns * patch_size


class Siglip2ImageProcessorKwargs(ImagesKwargs, total=False):
    """Arguments beyond those of every image processor; see `Siglip2ImageProcessor`."""

    patch_size: int
    max_num_patches: int | list[int]


class Siglip2ImageProcessorBase(SiglipImageProcessorBase):
    """Defaults, arguments and budgets that both image processors share; a subclass supplies `_preprocess`."""

    size = None  # type: ignore[assignment]
    resample = PILImageResampling.BILINEAR
    patch_size = 16
    max_num_patches = 256

    valid_kwargs = Siglip2ImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_attention_mask", "spatial_shapes"]  # noqa: RUF012

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """One picture, or any nesting of pictures, as patches.

        An argument that is missing takes the value that the processor was made with. A switch (`do_...`) that is None
        is off, as in stock; any other argument that is None counts as missing.

        Args:
            images: What `siglip_hf.preprocessing.image_intake.load_pictures` takes: paths, URLs, bytes, files, PIL
                images of any mode, arrays, tensors, and lists of these.
            patch_size: Side of a patch in pixels; the model's.
            max_num_patches: Budget of patches N: pictures are resized to fill it and padded to it. A list gives each
                picture its own budget, and pads to the largest.
            do_resize: Resize to the budget. Without it, sides must be multiples of `patch_size`, within the budget.
            resample: Filter, one of `PIL.Image.Resampling`.
            do_rescale, rescale_factor, do_normalize, image_mean, image_std: As in `SiglipImageProcessor`.
            do_convert_rgb: If False, pictures keep 1, 3 or 4 channels.
            input_data_format: "channels_first" or "channels_last" for arrays; inferred from the shape if None.
            return_tensors: "pt" for torch tensors, "np" for arrays, None for lists with one entry per picture.
            device: Where a torch result is made.

        Returns:
            A `BatchFeature` with `pixel_values` (B, N, patch_size * patch_size * 3) float32, padded with zeros,
            `pixel_attention_mask` (B, N), 1 for patches and 0 for padding, and `spatial_shapes` (B, 2): the rows and
            columns of patches.

        Raises:
            PictureError: (a `ValueError` and an `OSError`) naming the picture that cannot be used.
            ValueError: For an empty batch, a misspelled argument, or a value that an argument cannot have.
        """
        return super().preprocess(images, **kwargs)

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:  # type: ignore[override]
        for name in ("do_center_crop", "do_pad"):
            if kwargs.get(name):
                raise ValueError(f"{name}=True: a NaFlex picture is neither cropped nor padded to a size; leave it out")
        budgets = kwargs["max_num_patches"]
        budgets = [budgets] if isinstance(budgets, int) else budgets
        if kwargs["patch_size"] < 1 or not budgets or min(budgets) < 1:
            raise ValueError(
                f"patch_size ({kwargs['patch_size']}) and max_num_patches ({kwargs['max_num_patches']}) must be at "
                "least 1"
            )
        super()._validate_preprocess_kwargs(**kwargs)

    def _result_pixels(self, size: Any = None, **kwargs: Any) -> int:
        return kwargs["patch_size"] ** 2 * largest_budget(kwargs["max_num_patches"])

    def _prepare_image_like_inputs(  # type: ignore[override]
        self,
        images: Any,
        *,
        do_resize: bool,
        do_rescale: bool,
        do_convert_rgb: bool,
        patch_size: int,
        max_num_patches: int | Sequence[int],
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> Iterable[Callable[[], Picture]]:
        return iter_pictures(
            images,
            input_data_format=input_data_format,
            # A draft keeps both sides above a multiple of this, so the side of a square picture does for all.
            draft_to=patch_size * math.ceil(math.sqrt(largest_budget(max_num_patches))) if do_resize else None,
            convert_rgb=do_convert_rgb,
            keep_floats=not (do_resize or do_rescale),
        )


def with_budgets(
    pictures: Iterable[Callable[[], Picture]], max_num_patches: int | Sequence[int]
) -> Iterator[tuple[Callable[[], Picture], int]]:
    """Each picture, to be read, with its budget of patches.

    Raises:
        ValueError: If there are not as many budgets as pictures.
    """
    count = 0
    for count, picture in enumerate(pictures, start=1):
        if isinstance(max_num_patches, int):
            yield picture, max_num_patches
        elif count <= len(max_num_patches):
            yield picture, max_num_patches[count - 1]
        else:
            raise ValueError(f"more pictures than the {len(max_num_patches)} budgets of max_num_patches; give one each")
    if not isinstance(max_num_patches, int) and count != len(max_num_patches):
        raise ValueError(f"max_num_patches has {len(max_num_patches)} budgets for {count} pictures; give one each")


def size_within(picture: Picture, budget: int, do_resize: bool, patch_size: int) -> tuple[int, int]:
    """The (height, width) in pixels that a picture is to have.

    Raises:
        ValueError: If a picture that must not be resized does not fit.
    """
    height, width = picture.size
    if do_resize:
        return naflex_size(height, width, patch_size, budget)
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"a picture of {height}x{width} pixels does not consist of patches of {patch_size}x{patch_size}; "
            "leave do_resize on, or resize it"
        )
    if (patches := height * width // patch_size**2) > budget:
        raise ValueError(f"a picture of {height}x{width} pixels has {patches} patches; max_num_patches={budget}")
    return height, width


def channels_of_batch(channels: Iterable[int]) -> int:
    """The number of channels that all pictures of a batch have.

    Raises:
        ValueError: If they differ.
    """
    found = set(channels)
    if len(found) > 1:
        raise ValueError(f"pictures of {sorted(found)} channels cannot share a batch; leave do_convert_rgb on")
    return found.pop()


def largest_budget(max_num_patches: int | Sequence[int]) -> int:
    """The number of patches N that a batch is padded to."""
    return max_num_patches if isinstance(max_num_patches, int) else max(max_num_patches)


class Siglip2ImageProcessor(Siglip2ImageProcessorBase, SiglipImageProcessor):
    """Turns pictures into patches with Pillow, bit for bit as `Siglip2ImageProcessorPil` of transformers does.

    The two differ where that class goes wrong: on grayscale, transparent, 16-bit and float pictures; see
    `siglip_hf.preprocessing.image_intake.load_picture`. It runs on the CPU; for a GPU, or for speed, see
    `Siglip2ImageProcessorFast`.

    The arguments of `preprocess` are also those of the constructor, where they set the defaults.

    Examples:
        >>> from siglip_hf import Siglip2ImageProcessor
        >>> processor = Siglip2ImageProcessor(max_num_patches=256)
        >>> inputs = processor("drawings/cat.png", return_tensors="pt")
        >>> inputs["pixel_values"].shape, inputs["spatial_shapes"].tolist()  # 16 x 16 patches of 16 x 16 pixels
        (torch.Size([1, 256, 768]), [[16, 16]])
    """

    def _preprocess(  # type: ignore[override]
        self,
        images: Iterable[Callable[[], Picture]],
        do_resize: bool,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        patch_size: int,
        max_num_patches: int | Sequence[int],
        return_tensors: str | None,
        device: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if device is not None and str(device) != "cpu":
            raise ValueError(f"device={str(device)!r}: Pillow works on the CPU. Use Siglip2ImageProcessorFast instead.")

        @PIXELS.bounded()
        def patches_of(entry: tuple[Callable[[], Picture], int]) -> tuple[np.ndarray, tuple[int, int], float]:
            read, budget = entry
            picture = read()
            height, width = size_within(picture, budget, do_resize, patch_size)
            scale = value_scale(picture, do_rescale, rescale_factor)
            if do_resize:
                picture = resize_with_pillow(picture, (height, width), pillow_filter(resample))
            rows, columns = height // patch_size, width // patch_size
            pixels = picture.to_array().reshape(rows, patch_size, columns, patch_size, -1)
            patches = np.ascontiguousarray(pixels.swapaxes(1, 2))  # (rows, columns, p, p, C)
            return patches.reshape(rows * columns, patch_size**2, -1), (rows, columns), scale

        pieces = list(in_threads(patches_of, with_budgets(images, max_num_patches)))
        channels = channels_of_batch(patches.shape[2] for patches, _, _ in pieces)
        as_they_are = not do_normalize and all(scale == 1 for _, _, scale in pieces)
        values = np.empty(
            (len(pieces), largest_budget(max_num_patches), patch_size**2 * channels),
            np.result_type(*(patches.dtype for patches, _, _ in pieces)) if as_they_are else np.float32,
        )  # (B, N, p * p * C)
        for (patches, _, scale), row in zip(pieces, values, strict=True):
            filled = row[: len(patches)].reshape(patches.shape)
            if as_they_are:
                filled[:] = patches
            elif patches.dtype == np.uint8:
                # Only 256 values go through the arithmetic; the pixels look up its results.
                levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (channels, 1, 256))
                table = self._finish(levels, scale, do_normalize, image_mean, image_std)[:, 0]
                _look_up(table.astype(values.dtype), patches, filled)
            else:
                planes = self._finish(np.moveaxis(patches, -1, 0), scale, do_normalize, image_mean, image_std)
                filled[:] = np.moveaxis(planes, 0, -1)
            row[len(patches) :] = 0
        shapes = np.array([shape for _, shape, _ in pieces])  # (B, 2)
        mask = (np.arange(values.shape[1]) < shapes.prod(axis=1, keepdims=True)).astype(np.int32)  # (B, N)
        data: dict[str, Any] = {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        if return_tensors is None:
            data = {name: list(value) for name, value in data.items()}
        return BatchFeature(data=data, tensor_type=return_tensors)


def _look_up(table: np.ndarray, patches: np.ndarray, out: np.ndarray) -> None:
    """`table` (C, 256) at uint8 `patches` (n, p * p, C), into `out`."""
    # "clip" needs no buffer; uint8 cannot leave 0..255.
    if (table == table[0]).all():
        np.take(table[0], patches, out=out, mode="clip")
        return
    for channel, levels in enumerate(table):
        out[..., channel] = levels.take(patches[..., channel], mode="clip")


#: transformers' own name for the class that works with Pillow.
Siglip2ImageProcessorPil = Siglip2ImageProcessor

__all__ = ["Siglip2ImageProcessor", "Siglip2ImageProcessorPil", "naflex_size"]
