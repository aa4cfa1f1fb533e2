"""Pictures to patches for SigLIP 2 NaFlex with torch alone: antialiased resizing of 8-bit memory, on the CPU or a GPU.

Same defaults, arguments and budgets as `Siglip2ImageProcessor`; torchvision is neither imported nor needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature

from siglip_hf.parallel import PIXELS, in_threads
from siglip_hf.preprocessing.image_intake import Picture
from siglip_hf.preprocessing.image_processing_siglip import pillow_filter, value_scale
from siglip_hf.preprocessing.image_processing_siglip2 import (
    Siglip2ImageProcessorBase,
    channels_of_batch,
    largest_budget,
    size_within,
    with_budgets,
)
from siglip_hf.preprocessing.image_processing_siglip_fast import SiglipImageProcessorFast
from siglip_hf.preprocessing.image_tensors import (
    Parcel,
    common_dtype,
    divide_and_shift,
    division_and_shift,
    empty,
    put,
    resize,
    scaled_there,
    to_tensor,
)


class Siglip2ImageProcessorFast(Siglip2ImageProcessorBase, SiglipImageProcessorFast):
    """Turns pictures into patches with torch, several times faster than Pillow and on any device.

    It differs from `Siglip2ImageProcessor` in the resizing only, by at most one level of 255; for where, and for
    `device` and `return_tensors`, see `SiglipImageProcessorFast`. Only `pixel_values` goes to the device: the mask and
    the shapes stay on the CPU, as in transformers, where a model can read them without waiting for the device.

    Examples:
        >>> from siglip_hf import Siglip2ImageProcessorFast
        >>> processor = Siglip2ImageProcessorFast(max_num_patches=256)
        >>> processor("drawings/cat.png", return_tensors="pt", max_num_patches=64)["spatial_shapes"].tolist()
        [[8, 8]]
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
        return_tensors: Any,
        device: torch.device,
        **kwargs: Any,
    ) -> BatchFeature:
        @PIXELS.bounded()
        def resized(entry: tuple[Callable[[], Picture], int]) -> tuple[torch.Tensor, float]:
            read, budget = entry
            picture = read()
            size = size_within(picture, budget, do_resize, patch_size)
            pixels = resize(picture, size, pillow_filter(resample)) if do_resize else to_tensor(picture)
            return pixels, value_scale(picture, do_rescale, rescale_factor)

        entries = with_budgets(images, max_num_patches)
        pixels, scales = map(list, zip(*in_threads(resized, entries), strict=True))  # (C, height, width) each
        channels = channels_of_batch(item.shape[0] for item in pixels)
        as_they_are = not do_normalize and all(scale == 1 for scale in scales)
        length, area = largest_budget(max_num_patches), patch_size**2
        shape = (len(pixels), length, area * channels)  # (B, N, p * p * C)
        mean, std = (image_mean, image_std) if do_normalize else (0.0, 1.0)
        factors = [division_and_shift(scale, mean, std, channels) for scale in scales]
        grids = [(item.shape[1] // patch_size, item.shape[2] // patch_size) for item in pixels]
        spatial_shapes = torch.tensor(grids)  # (B, 2)
        counts = spatial_shapes.prod(dim=1, keepdim=True)  # (B, 1)

        def fill(into: torch.Tensor, scale_here: bool) -> None:
            def fill_one(number: int) -> None:
                rows, columns = grids[number]
                item, filled = pixels[number], into[number, : rows * columns]  # (n, p * p * C)
                lines = item.permute(1, 2, 0).contiguous().view(rows, patch_size, columns, patch_size, channels)
                put(lines.transpose(1, 2), into=filled.view(rows, columns, patch_size, patch_size, channels))
                if scale_here:
                    # As long as a patch: a vector is quicker to apply than a channel at a time.
                    divide_and_shift(filled, *(np.tile(values, area) for values in factors[number]))
                put(into.new_zeros(()), into=into[number, rows * columns :])

            list(in_threads(fill_one, range(len(pixels))))

        kept = common_dtype(pixels)
        if device.type == "cpu":
            values = empty(shape, kept if as_they_are else torch.float32)
            fill(values, not as_they_are)
        else:
            travels = kept if as_they_are or kept == torch.uint8 else torch.float32
            small = [((2, len(pixels), 1, 1, channels), torch.float32), ((len(pixels), 1, 1), torch.int64)]
            parcel = Parcel([(shape, travels), *small], device)
            fill(parcel.parts[0], False)
            put(torch.from_numpy(np.stack(factors, axis=1)).view(small[0][0]), into=parcel.parts[1])
            put(counts[..., None], into=parcel.parts[2])
            values, scaling, counts_there = parcel.send()
            if not as_they_are:
                values = scaled_there(values.view(*shape[:2], area, channels), scaling).view(shape)
                values.masked_fill_(torch.arange(length, device=device)[:, None] >= counts_there, 0)
        mask = (torch.arange(length) < counts).int()  # (B, N)
        data: dict[str, Any] = {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": spatial_shapes}
        if return_tensors is None:
            return BatchFeature(data={name: list(value) for name, value in data.items()})
        if str(getattr(return_tensors, "value", return_tensors)) == "np":
            data = {name: value.cpu().numpy() for name, value in data.items()}
        return BatchFeature(data=data, tensor_type=return_tensors)


__all__ = ["Siglip2ImageProcessorFast"]
