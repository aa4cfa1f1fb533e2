"""What the models return. Fields that do not apply are None.

Shapes: B batch, N patches, L text tokens, D width, H heads, E embedding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class SiglipPoolingOutput(BaseModelOutputWithPooling):
    """Output of the vision tower.

    Attributes:
        last_hidden_state: (B, N, D), after the final layer norm.
        pooler_output: (B, D) of the attention-pooling head, not normalized; None without a head.
        hidden_states: One (B, N, D) per block, and the first block's input; `hidden_states[-1]` is the last block's
            output before the final layer norm.
        attentions: One (B, H, N, N) per block.
        cross_attentions: What the pooling head looks at: one (B, H, 1, N), with `output_attentions=True`.
    """

    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class SiglipOutput(ModelOutput):
    """Output of `SiglipModel`. What belongs to a tower that got no input is None.

    Attributes:
        loss: Scalar sigmoid loss, with `return_loss=True`.
        logits_per_image: (images, texts); `sigmoid` of them are the probabilities that a text describes an image.
        logits_per_text: (texts, images), their transpose.
        text_embeds: (texts, E), L2-normalized.
        image_embeds: (images, E), L2-normalized.
        text_model_output: Output of the text tower.
        vision_model_output: Output of the vision tower.
        pooler_output: (B, E), not normalized, of the tower that ran; None where both did. `pool=True` of
            transformers' image-feature-extraction pipeline returns it.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: SiglipPoolingOutput | None = None
    pooler_output: torch.Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns all fields that are set, towers' outputs as tuples too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())
