"""What the pooling head looks at: the attention of its probe over a picture's patches, as numbers and as a drawing.

The head is the MAP head of "Scaling Vision Transformers" (https://arxiv.org/abs/2106.04560): one learned query reads
all image tokens, so its attention weights say how much each patch counts in the embedding.

Shapes: B batch, N patches, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from siglip_hf.models.modeling_siglip import SiglipModel

# Dark, middle and bright end of the heat map's colours, which stay apart for colour-blind eyes and in grey.
_COLOURS = ("#150a3c", "#d64b40", "#fcffa4")


@torch.no_grad()
def pooling_attention(model: SiglipModel, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """How much of the pooling head's attention each patch gets, averaged over its heads.

    Args:
        model: a `SiglipModel` or `Siglip2Model`, or one of their vision towers.
        inputs: what the model's image processor returns, on the model's device.

    Returns:
        A tensor (rows, columns) for each of B pictures, float32 on the CPU, none negative; each sums to 1.

    Raises:
        ValueError: if the model has no pooling head.

    Examples:
        >>> import siglip_hf
        >>> model = siglip_hf.SiglipModel.from_pretrained(siglip_hf.default_checkpoint())
        >>> processor = siglip_hf.SiglipImageProcessor.from_pretrained(siglip_hf.default_checkpoint())
        >>> (attention,) = siglip_hf.pooling_attention(model, processor("drawings/cat.png", return_tensors="pt"))
        >>> attention.shape  # rows and columns of patches
        torch.Size([4, 4])
    """
    tower: Any = getattr(model, "vision_model", model)
    if not getattr(tower, "use_head", False):
        raise ValueError(f"this {type(model).__name__} has no pooling head, so there is no attention of it to show.")
    tokens = tower(**inputs, pool=False, return_dict=True).last_hidden_state  # (B, N, D)
    masks = [inputs["pixel_attention_mask"]] if "pixel_attention_mask" in inputs else []
    # Only the head is run with the implementation that returns its weights; the blocks keep theirs.
    _, weights = tower.head(tokens, *masks, attn_implementation="eager")  # (B, H, 1, N)
    mean = weights[:, :, 0].float().mean(dim=1).cpu()  # (B, N)
    if "spatial_shapes" in inputs:  # NaFlex: a grid of its own for each picture, and padding after it
        grids = [tuple(shape) for shape in inputs["spatial_shapes"].tolist()]
    else:
        height, width = inputs["pixel_values"].shape[-2:]
        patch_height, patch_width = tower.embeddings.patch_embedding.kernel_size
        grids = [(height // patch_height, width // patch_width)] * len(mean)
    return [row[: rows * columns].reshape(rows, columns) for row, (rows, columns) in zip(mean, grids, strict=True)]


def draw_heat_map(picture: Image.Image, attention: torch.Tensor, side: int = 256) -> Image.Image:
    """The picture in grey under the colours of an attention map: the brighter, the more a patch counts.

    Args:
        picture: the picture that was looked at.
        attention: (rows, columns), not negative; scaled so that the strongest patch is the brightest.
        side: longest side of the drawing in pixels.
    """
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    levels = attention / attention.max().clamp(min=torch.finfo(attention.dtype).tiny) * 255
    heat = Image.fromarray(levels.round().to(torch.uint8).numpy()).resize(size, Image.Resampling.BICUBIC)
    dark, middle, bright = _COLOURS
    colours = ImageOps.colorize(heat, black=dark, mid=middle, white=bright)
    return Image.blend(picture.convert("L").convert("RGB").resize(size, Image.Resampling.BICUBIC), colours, 0.6)
