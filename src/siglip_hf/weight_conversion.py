"""Conversion of checkpoint tensors that transformers has no operation for."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps


class ResizePositions(ConversionOps):
    """Resizes learned positions to the configured picture size, where it differs from the checkpoint's.

    The checkpoint's patch grid is taken to be square, as it is in every published checkpoint.
    """

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        model: torch.nn.Module,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        """Maps the checkpoint's (N', D) to the model's (N, D); the same tensor where N' = N.

        Raises:
            ValueError: If N' is not a square number, so that its grid is unknown.
        """
        from siglip_hf.modeling_siglip import SiglipVisionEmbeddings, resize_position_embedding

        tensors = next(iter(input_dict.values()))
        positions = tensors[0] if isinstance(tensors, list) else tensors
        embeddings = model.get_submodule(full_layer_name.removesuffix(".position_embedding.weight"))
        if isinstance(embeddings, SiglipVisionEmbeddings) and len(positions) != embeddings.num_positions:
            side = math.isqrt(len(positions))
            if side * side != len(positions):
                raise ValueError(
                    f"the checkpoint has {len(positions)} positions, not a square grid, and the model has "
                    f"{embeddings.num_positions}; load it with its own image_size and use "
                    "interpolate_pos_encoding=True"
                )
            positions = resize_position_embedding(positions, (side, side), embeddings.config.patch_grid)
        return {target_patterns[0]: positions}

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving keeps the model's own size."""
        return self
