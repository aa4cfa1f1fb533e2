"""Conversion of published checkpoints' tensors to this package's parameters and back; `registration` reads it."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    log_conversion_errors,
)

from siglip_hf.models.embeddings import SiglipVisionEmbeddings, resize_position_embedding


class ProjectionsConverter(WeightConverter):
    """Turns one packed tensor into several layers' tensors, each of which a quantizer then takes for itself.

    Many of transformers' quantizers quantize the first tensor of such a conversion and lose the others.
    """

    def convert(
        self,
        layer_name: str,
        model: torch.nn.Module | None = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, torch.Tensor]:
        """Maps the collected tensors to `{parameter name: tensor}`; empty where the quantizer has set the parameter."""
        quantize, self.quantization_operation = self.quantization_operation, None
        tensors = super().convert(layer_name, model, config, hf_quantizer, loading_info)
        if quantize is None:
            return tensors
        quantized: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if not hf_quantizer.param_needs_quantization(model, name):
                quantized[name] = tensor
                continue
            with log_conversion_errors(name, loading_info, (1, name), quantize):
                quantized |= quantize.convert(
                    {name: tensor},
                    source_patterns=self.source_patterns,
                    target_patterns=self.target_patterns,
                    full_layer_name=name,
                    model=model,
                    config=config,
                    missing_keys=loading_info.missing_keys,
                )
        return quantized


class SplitProjections(Chunk):
    """Splits a packed projection along its rows; saving packs it again, unless it has been quantized."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Maps the packed tensor to its parts, each with memory of its own: savers drop tensors that share it."""
        parts = super().convert(input_dict, *args, **kwargs)  # type: ignore[type-var]
        return {name: part.clone() for name, part in parts.items()}  # type: ignore[attr-defined]

    @property
    def reverse_op(self) -> ConversionOps:
        """The operation for saving."""
        return MergeProjections(dim=self.dim)


class MergeProjections(Concatenate):
    """Packs the tensors of several projections into one, where that is possible.

    Quantized weights, and the statistics that belong to them, are not rows of one matrix: they keep the names of
    their own layers, and load under them.
    """

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        **kwargs,
    ) -> dict[str, Any]:
        """Maps the projections' tensors to the packed one, or to themselves under their full names."""
        tensors = {source: value[0] if isinstance(value, list) else value for source, value in input_dict.items()}
        (target,) = target_patterns
        if not (full_layer_name.endswith(target) and all(_is_plain(tensor) for tensor in tensors.values())):
            return {full_layer_name.replace(target, source): tensor for source, tensor in tensors.items()}
        if len(tensors) < len(source_patterns):  # transformers converts each shard of an offloaded model by itself
            raise ValueError(f"{full_layer_name} consists of {source_patterns}, got {sorted(tensors)} only")
        return super().convert(input_dict, source_patterns, target_patterns)  # type: ignore[call-arg, type-var]

    @property
    def reverse_op(self) -> ConversionOps:
        """The operation for loading."""
        return SplitProjections(dim=self.dim)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether this is a bias or a square matrix of ordinary numbers; packed low-bit weights have other shapes."""
    ordinary = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return ordinary and tensor.shape[0] == tensor.shape[-1]


class ResizePositions(ConversionOps):
    """Resizes learned positions to the configured picture size, where it differs from the checkpoint's.

    The checkpoint's patch grid is taken to be square, as it is in every published checkpoint.
    """

    @torch.no_grad()
    def convert(  # type: ignore[override]
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
        """The operation for saving."""
        return KeepPositions()


class KeepPositions(ConversionOps):
    """Saves the positions of a model in the model's own size."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict[str, torch.Tensor]:
        """Maps (N, D) to itself."""
        tensors = next(iter(input_dict.values()))
        return {target_patterns[0]: tensors[0] if isinstance(tensors, list) else tensors}

    @property
    def reverse_op(self) -> ConversionOps:
        """The operation for loading."""
        return ResizePositions()


def _packed_projections() -> list[WeightConverter | WeightRenaming]:
    """The pooling head's `in_proj_weight` (3 D, D) and `in_proj_bias` (3 D,) to three linear layers each."""
    return [
        ProjectionsConverter(
            f"attention.in_proj_{kind}",
            [f"attention.{projection}_proj.{kind}" for projection in "qkv"],
            operations=[SplitProjections(dim=0)],
        )
        for kind in ("weight", "bias")
    ]


# Class of a submodule -> conversions of its tensors. The names are this package's own (stock has no model of these
# names), so that stock models in the same process load as before.
WEIGHT_CONVERSIONS: dict[str, list[WeightConverter | WeightRenaming]] = {
    "SiglipAttentionPoolingHead": _packed_projections(),
    "Siglip2AttentionPoolingHead": _packed_projections(),
    "SiglipVisionEmbeddings": [
        WeightConverter("position_embedding.weight", "position_embedding.weight", operations=[ResizePositions()])
    ],
}
