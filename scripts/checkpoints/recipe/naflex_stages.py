"""The stages of scripts/checkpoints/train_naflex.py: the image tower on pictures of any shape, then both towers.

Both work against a locked table of concept vectors first, as in stages.py, whose `words` stage trains the text tower
here too.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from siglip_hf import sigmoid_loss

from .canvas import CanvasAugmenter, plain_canvases
from .pictures import Drawn, PictureSet
from .run import Run, autocast, embed_texts, sample_texts
from .stages import name_pictures, train_together

#: How the captions of two pictures side by side are joined, by language.
JOINED = {
    "en": ("{} and {}", "{}, {}", "{} and a {}", "a {} and a {}", "a picture of {} and {}", "{} next to {}"),
    "de": ("{} und {}", "{}, {}", "ein bild von {} und {}"),
    "fr": ("{} et {}", "{}, {}", "une image de {} et {}"),
    "es": ("{} y {}", "{}, {}", "una imagen de {} y {}"),
    "it": ("{} e {}", "{}, {}", "un'immagine di {} e {}"),
    "pt": ("{} e {}", "{}, {}", "uma imagem de {} e {}"),
    "ru": ("{} и {}", "{}, {}", "изображение {} и {}"),
    "ko": ("{}, {}", "{} 그리고 {}", "{} 옆에 {}"),
    "ja": ("{}と{}", "{}、{}", "{}と{}の絵"),
    "zh": ("{}和{}", "{}、{}", "{}和{}的图片"),
}

#: Grids that the validation pictures are seen in.
VALIDATION_GRIDS = {"square_16": (4, 4), "square_64": (8, 8), "wide_32": (4, 8)}


@torch.no_grad()
def embed_canvases(run: Run, pictures: PictureSet, grid: tuple[int, int]) -> Tensor:
    """Unit embeddings (N, E) of unaugmented pictures on canvases of a grid."""
    patch_size = run.model.config.vision_config.patch_size
    parts = []
    for start in range(0, len(pictures), 128):
        with autocast(run.device):
            inputs = plain_canvases(pictures.pixels[start : start + 128].to(run.device), grid, patch_size)
            parts.append(run.model.encode_image(**inputs, packed=False).float())
    return torch.cat(parts)


def validate(run: Run, table: Tensor, concept: Tensor) -> dict[str, float]:
    """Top-1 of validation pictures over `table` (C, E) in several grids; concept (N,) are rows of the table."""
    result = {}
    for name, grid in VALIDATION_GRIDS.items():
        found = (embed_canvases(run, run.validation, grid) @ table.T).argmax(1)
        result[name] = (found == concept).float().mean().item()
    return result


def canvases(run: Run, seconds: float) -> None:
    """The image tower finds the concepts of a picture of any shape, one or two, in the locked table."""
    generator = torch.Generator(run.device).manual_seed(run.seed)
    augment = CanvasAugmenter(run.model.config.vision_config.patch_size, generator)

    def draw(chosen: Tensor, progress: float) -> Drawn:
        return augment.batch(run.train, chosen, strength=0.8)

    def check(table: Tensor, column: Tensor) -> dict[str, float]:
        return validate(run, table, column[run.validation.concept])

    rates = {"temperature": 20.0, "muon_lr": 1e-3, "adamw_lr": 5e-4}
    name_pictures(run, "canvases", seconds, draw, check, generator=generator, batch=96, **rates)


def joined_texts(run: Run, first: Tensor, second: Tensor, source: random.Random) -> Tensor:
    """Ids (B, L) of captions that name two concepts each, in a language of both, the left or upper first."""
    prompts = []
    for pair in zip(first.tolist(), second.tolist(), strict=True):
        captions = [run.concepts[concept]["captions"] for concept in pair]
        language = source.choice([name for name in JOINED if all(name in caption for caption in captions)])
        labels = [caption[language]["label"].lower() for caption in captions]
        prompts.append(source.choice(JOINED[language]).format(*labels))
    return run.encoder(prompts).to(run.device)


def joint(run: Run, seconds: float) -> None:
    """Both towers on pictures and captions with the package's loss; pairs of pictures come with joined captions."""
    model = run.model
    generator, source = torch.Generator(run.device).manual_seed(run.seed + 2), random.Random(run.seed + 2)
    augment = CanvasAugmenter(model.config.vision_config.patch_size, generator)

    def backward(chosen: Tensor) -> Tensor:
        drawn = augment.batch(run.train, chosen, strength=0.6)
        single = drawn.first == drawn.second
        ids, _ = sample_texts(run, drawn.first.tolist(), source, label_share=1.0)
        ids = torch.where(single[:, None], ids, joined_texts(run, drawn.first, drawn.second, source))
        # Two drawings are one thing to find: neither caption alone is called right or wrong for them.
        positives = drawn.first * len(run.concepts) + drawn.second
        with autocast(run.device):
            images = model.encode_image(**drawn.inputs).float()
            texts = model.encode_text(ids).float()
        loss = sigmoid_loss(images, texts, model.logit_scale, model.logit_bias, positives=positives)
        loss.backward()
        return loss

    def check() -> dict[str, float]:
        labels = embed_texts(run, [concept["label"].lower() for concept in run.concepts])
        return validate(run, labels, run.validation.concept)

    rates = {"muon_lr": 6e-4, "adamw_lr": 3e-4, "calibration_lr": 2e-2}
    train_together(run, seconds, backward, check, (generator, source), batch=128, **rates)
