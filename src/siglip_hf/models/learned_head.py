"""The classifier that `siglip_hf.learn` makes: a linear layer on the normalized embedding, with the classes' means."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import initialization as init


class LearnedHead(nn.Module):
    """Logits of an embedding, and how near it lies to anything that was taught.

    Its parameters have names of their own: a program without this class says that they are missing, where a layer on
    the mean of the tokens would give wrong answers in silence.
    """

    class_means: torch.Tensor

    def __init__(self, width: int, num_labels: int):
        super().__init__()
        self.linear = nn.Linear(width, num_labels)
        self.register_buffer("class_means", torch.zeros(num_labels, width))

    def fill_new_parameters(self) -> None:
        """Gives what no checkpoint has filled its initial values."""
        init.normal_(self.linear.weight, std=self.linear.in_features**-0.5)
        init.zeros_(self.linear.bias)
        init.zeros_(self.class_means)

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        """Maps embeddings (B, E) of any length to logits (B, C), whose softmax is the calibrated probability."""
        # In the layer's own dtype, which may be finer than the tower's.
        return self.linear(normalize(embeds.to(self.linear.weight.dtype), dim=-1))

    def similarity(self, embeds: torch.Tensor) -> torch.Tensor:
        """The largest cosine (B,) of embeddings (B, E) with the mean of a class."""
        unit = normalize(embeds.to(self.class_means.dtype), dim=-1)
        return (unit @ normalize(self.class_means, dim=-1).t()).amax(dim=-1)
