"""Configurations of SigLIP 2 NaFlex: pictures in their own aspect ratio, with a budget of patches instead of a size.

Source: "SigLIP 2", https://arxiv.org/abs/2502.14786, section 2.4.2. The checkpoints of fixed resolution have SigLIP's
configurations. Field names and defaults are those of the published `config.json` files.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from siglip_hf.models.configuration_siglip import (
    PRESETS,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
    _SiglipTowerConfig,
)


@strict
class Siglip2TextConfig(SiglipTextConfig):
    """Configuration of the text tower: SigLIP's, field by field.

    Examples:
        >>> from siglip_hf import Siglip2TextConfig
        >>> Siglip2TextConfig(vocab_size=256_000).max_position_embeddings
        64
    """

    model_type = "siglip2_text_model"


@strict
class Siglip2VisionConfig(_SiglipTowerConfig):
    """Configuration of the NaFlex vision tower.

    Args:
        hidden_size: Width D of the Transformer, and of the image embedding.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Number of Transformer blocks.
        num_attention_heads: Number of heads H; D must be a multiple of it.
        num_channels: Channels of the picture.
        patch_size: Side of a patch in pixels.
        num_patches: Positions learned, a square grid of them; they are resized to each picture's grid. It does not
            bound the number of patches of a picture: that is `max_num_patches` of the image processor.
        hidden_act: Activation of the MLP.
        layer_norm_eps: Epsilon of the layer norms.
        attention_dropout: Dropout probability of the attention weights, in training only.
        vision_use_head: Whether the tower ends in the attention-pooling head.

    Examples:
        >>> from siglip_hf import Siglip2VisionConfig
        >>> Siglip2VisionConfig().num_patches  # learned positions, resized to the grid of each picture
        256
    """

    model_type = "siglip2_vision_model"
    base_config_key = "vision_config"

    num_channels: int = 3
    patch_size: int = 16
    vision_use_head: bool = True
    num_patches: int = 256

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of the learned positions."""
        side = math.isqrt(self.num_patches)
        return side, side

    @property
    def patch_values(self) -> int:
        """Numbers P in a patch: pixels times channels."""
        return self.patch_size**2 * self.num_channels

    def check(self) -> None:
        """As of the base class; the patches too.

        Raises:
            ValueError: If the values cannot make a model; the message names them.
        """
        super().check()
        if self.num_channels < 1:
            raise ValueError(f"num_channels must be at least 1, got {self.num_channels}")
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}")
        if self.num_patches < 1 or math.prod(self.patch_grid) != self.num_patches:
            raise ValueError(f"num_patches must be a square number (of a square grid), got {self.num_patches}")


@strict
class Siglip2Config(SiglipConfig):
    """Configuration of the two-tower NaFlex model.

    Args:
        text_config: Configuration of the text tower, or its fields as a dict.
        vision_config: Configuration of the vision tower, or its fields as a dict.
        initializer_factor: Factor on the initial scale of a new classification layer.

    Examples:
        >>> from siglip_hf import Siglip2Config
        >>> Siglip2Config(text_config={"num_hidden_layers": 2}).text_config.num_hidden_layers
        2
    """

    model_type = "siglip2"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": Siglip2TextConfig, "vision_config": Siglip2VisionConfig}

    @classmethod
    def from_preset(cls, name: str, **kwargs: Any) -> Siglip2Config:
        """Makes the configuration of a published NaFlex checkpoint without the network.

        Args:
            name: A key of `NAFLEX_PRESETS`; a leading `"google/"` is ignored.
            **kwargs: Further fields of `Siglip2Config`.

        Raises:
            ValueError: If there is no such preset; the message names those there are.
        """
        key = name.removeprefix("google/")
        if key not in NAFLEX_PRESETS:
            hint = "; it has a fixed resolution, see SiglipConfig.from_preset" if key in PRESETS else ""
            raise ValueError(f"no NaFlex preset {name!r}{hint}. There are {sorted(NAFLEX_PRESETS)}")
        text, vision = NAFLEX_PRESETS[key]
        return cls(text_config=dict(text), vision_config=dict(vision), **kwargs)


def _naflex(fixed: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A fixed-resolution preset of 256 patches with its picture size taken out."""
    text, vision = PRESETS[fixed]
    grid = SiglipVisionConfig(**vision).patch_grid
    vision = {key: value for key, value in vision.items() if key != "image_size"} | {"num_patches": math.prod(grid)}
    return dict(text), vision


# Published checkpoint -> (fields of the text configuration, fields of the vision configuration).
# https://huggingface.co/collections/google/siglip2
NAFLEX_PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "siglip2-base-patch16-naflex": _naflex("siglip2-base-patch16-256"),
    "siglip2-so400m-patch16-naflex": _naflex("siglip2-so400m-patch16-256"),
}

__all__ = ["NAFLEX_PRESETS", "Siglip2Config", "Siglip2TextConfig", "Siglip2VisionConfig"]
