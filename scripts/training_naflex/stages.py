"""The stages of scripts/train_naflex.py: the image tower on pictures of any shape, then both towers.

Both work against a locked table of concept vectors first, as in training_default/stages.py, whose `words` stage trains
the text tower here too.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_hf.losses.sigmoid import sigmoid_loss
from training_default.pictures import PictureSet
from training_default.stages import (
    Optimizers,
    Progress,
    Run,
    Scale,
    autocast,
    embed_texts,
    positive_and_negative,
    sample_texts,
    tag_table,
)

from .canvas import CanvasAugmenter, plain_canvases

#: How the captions of two pictures side by side are joined, by language.
JOINED = {
    "en": ("{} and {}", "{}, {}", "{} and a {}", "a {} and a {}", "a picture of {} and {}", "{} next to {}"),
    "de": ("{} und {}", "{}, {}", "ein bild von {} und {}"),
    "fr": ("{} et {}", "{}, {}", "une image de {} et {}"),
    "es": ("{} y {}", "{}, {}", "una imagen de {} y {}"),
    "it": ("{} e {}", "{}, {}", "un'immagine di {} e {}"),
    "pt": ("{} e {}", "{}, {}", "uma imagem de {} e {}"),
}

#: Grids that the validation pictures are seen in.
VALIDATION_GRIDS = {"square_16": (4, 4), "square_64": (8, 8), "wide_32": (4, 8)}

EVERY = 120  # seconds between lines of the learning curve; validation takes a while


@torch.no_grad()
def embed_canvases(run: Run, pictures: PictureSet, grid: tuple[int, int]) -> Tensor:
    """Unit embeddings (N, E) of unaugmented pictures on canvases of a grid."""
    patch_size = run.model.config.vision_config.patch_size
    parts = []
    for part in pictures.pixels.split(128):
        with autocast():
            parts.append(run.model.encode_image(**plain_canvases(part, grid, patch_size), packed=False).float())
    return torch.cat(parts)


def validate(run: Run, table: Tensor, concept: Tensor) -> dict[str, float]:
    """Top-1 of validation pictures over `table` (C, E) in several grids; concept (N,) are rows of the table."""
    result = {}
    for name, grid in VALIDATION_GRIDS.items():
        found = (embed_canvases(run, run.validation, grid) @ table.T).argmax(1)
        result[name] = (found == concept).float().mean().item()
    return result


def canvases(run: Run, total: int, batch: int = 96) -> None:
    """The image tower finds the concepts of a picture, one or two, and their tags in the locked table."""
    assert run.table is not None
    trained = run.trained_concepts()
    table = run.table[trained]
    column = torch.cumsum(trained, 0) - 1  # concept -> column of the smaller table
    tags, belongs = tag_table(run)
    scale, tag_scale = Scale(20.0, 0.0), Scale(10.0, -6.0)
    vision = run.model.vision_model
    optimizers = Optimizers([vision], [*scale.parameters(), *tag_scale.parameters()], muon_lr=1e-3, adamw_lr=5e-4)
    modules = {"vision": vision, "scale": scale, "tag_scale": tag_scale, "optimizers": optimizers}
    generator = torch.Generator().manual_seed(run.seed)
    augment = CanvasAugmenter(run.model.config.vision_config.patch_size, generator)
    order: list[int] = []

    def check() -> dict[str, float]:
        return validate(run, table, column[run.validation.concept])

    for progress, took in Progress(run, "canvases", total, modules, every=EVERY, check=check).steps(batch):
        while len(order) < batch:
            order += torch.randperm(len(run.train), generator=generator).tolist()
        chosen, order = torch.tensor(order[:batch]), order[batch:]
        drawn = augment.batch(run.train, chosen, strength=0.8)
        with autocast():
            embeds = run.model.encode_image(**drawn.inputs, packed=False).float()
        first, second = column[drawn.first], column[drawn.second]
        targets = (F.one_hot(first, len(table)) + F.one_hot(second, len(table))) / 2  # (B, C)
        naming = F.cross_entropy(scale(embeds @ table.T), targets, label_smoothing=0.05)
        both = belongs[:, drawn.first] | belongs[:, drawn.second]  # (T, B)
        loss = naming + 0.05 * positive_and_negative(tag_scale(embeds @ tags.T), both.T)
        optimizers.step(loss, progress)
        took(naming)


def joined_texts(run: Run, first: Tensor, second: Tensor, source: random.Random) -> Tensor:
    """Ids (B, L) of captions that name two concepts each, in one language, the left or upper first."""
    prompts = []
    for pair in zip(first.tolist(), second.tolist(), strict=True):
        language = source.choice(list(JOINED))
        captions = [run.concepts[concept]["captions"][language]["label"].lower() for concept in pair]
        prompts.append(source.choice(JOINED[language]).format(*captions))
    return run.encoder(prompts)


def joint(run: Run, total: int, batch: int = 128) -> None:
    """Both towers on pictures and captions with the package's loss; pairs of pictures come with joined captions."""
    model: Any = run.model
    others = [model.logit_scale, model.logit_bias]
    optimizers = Optimizers([model.vision_model, model.text_model], [], muon_lr=6e-4, adamw_lr=3e-4, weight_decay=0.0)
    rate = 2e-2  # scale and bias may have far to go, the towers hardly
    calibration = torch.optim.Adam(others, lr=rate)
    generator = torch.Generator().manual_seed(run.seed + 2)
    augment = CanvasAugmenter(model.config.vision_config.patch_size, generator)
    source = random.Random(run.seed + 2)
    modules: dict[str, Any] = {"model": model, "optimizers": optimizers, "calibration": calibration}

    def check() -> dict[str, float]:
        labels = embed_texts(run, [concept["label"].lower() for concept in run.concepts])
        return validate(run, labels, run.validation.concept)

    for progress, took in Progress(run, "joint", total, modules, every=EVERY, check=check).steps(batch):
        chosen = torch.randint(len(run.train), (batch,), generator=generator)
        drawn = augment.batch(run.train, chosen, strength=0.6)
        single = drawn.first == drawn.second
        ids, _ = sample_texts(run, drawn.first.tolist(), source, label_share=1.0)
        ids = torch.where(single[:, None], ids, joined_texts(run, drawn.first, drawn.second, source))
        # Two drawings are one thing to find: neither caption alone is called right or wrong for them.
        positives = drawn.first * len(run.concepts) + drawn.second
        with autocast():
            images = model.encode_image(**drawn.inputs, packed=False).float()
            texts = model.encode_text(ids).float()
        with torch.autocast("cpu", enabled=False):
            loss = sigmoid_loss(images, texts, model.logit_scale, model.logit_bias, positives=positives)
        optimizers.step(loss, progress)
        for group in calibration.param_groups:
            group["lr"] = rate * (1.0 - progress)
        calibration.step()
        calibration.zero_grad()
        took(loss)
