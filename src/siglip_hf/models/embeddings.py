"""Inputs as tokens with learned positions: patches of a picture of fixed size, and token ids of a text.

Shapes: B batch, N patches, L text tokens, D width.
"""

# Without postponed annotations: transformers reads the class from that of `config`.
import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from siglip_hf.models.base import SiglipPreTrainedModel
from siglip_hf.models.configuration_siglip import SiglipTextConfig, SiglipVisionConfig, as_pair

logger = logging.get_logger(__name__)


def resize_position_embedding(positions: torch.Tensor, grid: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """Resizes learned positions of one patch grid to another (bicubic, in float32, as transformers does).

    Args:
        positions: (rows * columns, D) of `grid`.
        grid: Rows and columns the positions were learned for.
        target: Rows and columns wanted.

    Returns:
        (target rows * target columns, D), in the dtype of `positions`.
    """
    image = positions.reshape(1, *grid, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    image = nn.functional.interpolate(image.float(), size=target, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)


class SiglipVisionEmbeddings(SiglipPreTrainedModel):
    """Patches of a picture as tokens with positions.

    A model of its own in transformers' eyes, so that the conversion of its checkpoint tensors (positions of another
    picture size) applies to this package's class only.
    """

    config: SiglipVisionConfig  # type: ignore[assignment]
    supports_gradient_checkpointing = False  # it has no blocks to recompute; the tower has

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        config = self.config
        self.embed_dim, self.image_size, self.patch_size = config.hidden_size, config.image_size, config.patch_size
        patch_size = as_pair(config.patch_size)
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size, padding="valid"
        )
        self.num_patches = self.num_positions = math.prod(config.patch_grid)
        self.position_embedding = nn.Embedding(self.num_positions, config.hidden_size)
        self.position_ids = nn.Buffer(torch.arange(self.num_positions).expand((1, -1)), persistent=False)
        self.post_init()

    def fill_new_parameters(self) -> None:
        """Gives what no checkpoint has filled its initial values."""
        init.normal_(self.position_embedding.weight, std=self.config.hidden_size**-0.5)
        # Not part of any checkpoint, so they have to be made again where a model was built without memory.
        init.copy_(self.position_ids, torch.arange(self.position_ids.shape[-1]).expand((1, -1)))

    def interpolate_pos_encoding(self, grid: tuple[int, int]) -> torch.Tensor:
        """Returns positions (1, rows * columns, D) for another grid of patches."""
        # By a call: an offloaded layer's weight is only there while it runs.
        positions = self.position_embedding(self.position_ids)[0]  # (N, D)
        return resize_position_embedding(positions, self.config.patch_grid, grid).unsqueeze(0)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Maps pixels (B, C, height, width) to tokens (B, N, D).

        Raises:
            ValueError: If the picture is not as large as the model expects, and interpolation was not asked for.
        """
        height, width = pixel_values.shape[-2:]
        patch_height, patch_width = as_pair(self.config.patch_size)
        grid = height // patch_height, width // patch_width
        tracing = torch.jit.is_tracing() or torch.compiler.is_exporting()
        if not interpolate_pos_encoding and not tracing and grid != self.config.patch_grid:
            raise ValueError(
                f"the picture is {height}x{width} pixels, which makes {grid[0]}x{grid[1]} patches, but this model "
                f"expects {'x'.join(map(str, as_pair(self.config.image_size)))} pixels "
                f"({'x'.join(map(str, self.config.patch_grid))} patches); resize it, or pass "
                "interpolate_pos_encoding=True"
            )
        if not tracing and (height % patch_height or width % patch_width):
            self._warn_about_cut_off_pixels(height, width)
        dtype = self.patch_embedding.bias.dtype  # type: ignore[union-attr]  # it is made with a bias
        patches = self.patch_embedding(pixel_values.to(dtype))  # (B, D, rows, columns)
        tokens = patches.flatten(2).transpose(1, 2)  # (B, N, D)
        # A traced model must also interpolate where the example happened to have the usual size.
        if interpolate_pos_encoding and (tracing or grid != self.config.patch_grid):
            return tokens + self.interpolate_pos_encoding(grid)
        return tokens + self.position_embedding(self.position_ids)

    def _warn_about_cut_off_pixels(self, height: int, width: int) -> None:
        # Some published models are trained so: 384 pixels are not a multiple of patches of 14.
        if (height, width) != as_pair(self.config.image_size):
            logger.warning_once(
                f"the picture is {height}x{width} pixels, which patches of {self.config.patch_size} do not fill: the "
                "rest at the lower and right edge is cut off. Resize it with the model's image processor"
            )


class SiglipTextEmbeddings(nn.Module):
    """Token ids as vectors with positions."""

    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.position_ids = nn.Buffer(torch.arange(config.max_position_embeddings).expand((1, -1)), persistent=False)

    def fill_new_parameters(self) -> None:
        """Gives what no checkpoint has filled its initial values."""
        # Not part of any checkpoint, so they have to be made again where a model was built without memory.
        init.copy_(self.position_ids, torch.arange(self.position_ids.shape[-1]).expand((1, -1)))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Maps token ids (B, L) to (B, L, D).

        Raises:
            ValueError: If the text is longer than the model's positions.
        """
        length, limit = input_ids.shape[-1], self.position_embedding.num_embeddings
        if length > limit:
            raise ValueError(
                f"the text has {length} tokens, but this model has max_position_embeddings={limit}; tokenize with "
                f"truncation=True, max_length={limit}"
            )
        if position_ids is None:
            position_ids = self.position_ids[:, :length]
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)
