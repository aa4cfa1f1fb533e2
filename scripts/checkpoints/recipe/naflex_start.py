"""A NaFlex model that begins as good as a square one: its image tower is the square one's, on patches for pixels.

The text tower starts new, with a smaller vocabulary: that of the embedded checkpoint takes more than half of its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import siglip_hf
from siglip_hf.models.naflex import resized_positions

from .captions import Captions
from .pictures import PictureSet, plain_pixels
from .run import autocast

TEXT_LENGTH = 64  # of every published SigLIP 2
SHORT_LENGTH = 16  # of texts in training; nearly all captions are shorter
VOCABULARY_SIZE = 10_000  # ten languages
GRID = 8  # rows and columns of the learned positions
BUDGET = GRID * GRID


class ShortTextModel(siglip_hf.Siglip2Model):
    """A NaFlex model that reads texts of 16 tokens as it would read them padded to 64, in a quarter of the time.

    Padding differs by position only. With one position vector for the last 49 places, all padding there is alike in
    every layer: one token stands for it, which attention counts 49 times.
    """

    def encode_text(self, input_ids: Tensor, *, normalize: bool = True) -> Tensor:  # type: ignore[override]
        """Embeds texts (B, SHORT_LENGTH) whose last token is padding: (B, E)."""
        tower = self.text_model
        places = torch.tensor([[*range(SHORT_LENGTH - 1), TEXT_LENGTH - 1]], device=input_ids.device)
        states = tower.embeddings(input_ids, places)  # (B, L, D)
        counts = torch.zeros(1, 1, SHORT_LENGTH, SHORT_LENGTH, device=states.device)
        counts[..., -1] = math.log(TEXT_LENGTH - SHORT_LENGTH + 1)
        states = tower.final_layer_norm(tower.encoder(states, counts.to(states.dtype)))
        embeds = tower.head(states[:, -1])
        return F.normalize(embeds, dim=-1) if normalize else embeds

    @torch.no_grad()
    def finished(self) -> siglip_hf.Siglip2Model:
        """The same as an ordinary model, for texts of 64 tokens."""
        model = siglip_hf.Siglip2Model(self.config)
        model.load_state_dict(self.state_dict())
        positions = model.text_model.embeddings.position_embedding.weight
        positions[SHORT_LENGTH - 1 :] = positions[-1].clone()
        return model.eval()


def make_config(square: siglip_hf.SiglipConfig) -> siglip_hf.Siglip2Config:
    """The square model's image tower, and a text tower of 2 narrow blocks, which fits in half the space."""
    vision = square.vision_config
    width = vision.hidden_size
    text = {"vocab_size": VOCABULARY_SIZE, "max_position_embeddings": TEXT_LENGTH, "pad_token_id": 0, "eos_token_id": 1}
    text |= {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    text |= {"num_attention_heads": vision.num_attention_heads, "projection_size": width}
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    naflex = {name: getattr(vision, name) for name in fields} | {"num_patches": GRID * GRID}
    return siglip_hf.Siglip2Config(text_config=text, vision_config=naflex)


def enlarged_positions(table: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Positions (side * side, D) that give `table` (rows * columns, D) again where they are resized to its grid."""
    count = side * side
    larger = resized_positions(table, grid, torch.tensor([side, side]).expand(count, 2), torch.arange(count))
    places = torch.arange(len(table))
    back = resized_positions(torch.eye(count), (side, side), torch.tensor(grid).expand(len(table), 2), places)
    return larger + torch.linalg.pinv(back) @ (table - back @ larger)


@torch.no_grad()
def start_from(square: siglip_hf.SiglipModel) -> ShortTextModel:
    """A NaFlex model whose image tower computes what the square model's does on pictures of its size."""
    model = ShortTextModel(make_config(square.config))
    states = square.vision_model.state_dict()
    patches = states.pop("embeddings.patch_embedding.weight")  # (D, C, p, p)
    states["embeddings.patch_embedding.weight"] = patches.permute(0, 2, 3, 1).flatten(1)  # (D, p * p * C)
    name = "embeddings.position_embedding.weight"
    states[name] = enlarged_positions(states[name], square.config.vision_config.patch_grid, GRID)
    model.vision_model.load_state_dict(states)
    model.logit_scale.copy_(square.logit_scale)
    model.logit_bias.copy_(square.logit_bias)
    return model


@torch.no_grad()
def concept_table(
    square: siglip_hf.SiglipModel,
    encode_ids: Callable[[list[str]], Tensor],
    concepts: list[dict[str, Any]],
    captions: Captions,
    train: PictureSet,
) -> Tensor:
    """A unit vector (C, E) per concept, which both towers then learn to find.

    It is the mean of the square model's embeddings of the concept's training pictures; where none may be seen, that of
    its labels.
    """
    device = square.logit_scale.device
    vectors = torch.zeros(len(concepts), square.config.vision_config.hidden_size, device=device)
    with autocast(device):
        for start in range(0, len(train), 256):
            part = train.pixels[start : start + 256].to(device)
            embeds = square.encode_image(plain_pixels(part, square.config.vision_config.image_size)).float()
            vectors.index_add_(0, train.concept[start : start + 256], embeds)
        for number, concept in enumerate(concepts):
            if concept["split"] != "train":
                labels = [captions.texts[text].words for text in captions.labels[number]]
                vectors[number] = square.encode_text(encode_ids(labels).to(device)).float().mean(0)
    return F.normalize(vectors, dim=-1)
