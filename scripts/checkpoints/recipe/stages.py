"""The stages of scripts/checkpoints/train_default.py.

A small SigLIP trained from nothing on few pairs stays long on the plateau where all pairs look alike. Three things
lead off it: every concept as a negative at each step, one tower at a time, and Muon for the matrices (Jordan et al.,
2024).

1. table: a vector per concept, so placed that concepts with common captions lie near each other, and those that a
   sentence encoder finds alike.
2. words and pictures, side by side: each tower alone learns to find its concepts in the locked table.
3. locked: the text tower is tuned against the locked image tower (LiT, Zhai et al. 2022; images are embedded once).
4. joint: both towers with the package's sigmoid loss.
5. calibrate: scale and bias on the validation pictures, so that a score of 0.5 means even odds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_hf.training.cached import cached_backward

from .optim import Optimizers
from .pictures import Augmenter, Drawn, PictureSet, plain_pixels
from .run import (
    Progress,
    Run,
    Scale,
    autocast,
    embed_texts,
    positive_and_negative,
    sample_texts,
    several_positives,
    tag_table,
    ten_way,
)


def place_concepts(run: Run, meanings: np.ndarray | None, steps: int = 60) -> None:
    """Stage 1. Sets `run.table` (C, E): unit vectors whose cosines follow common captions and meanings.

    Captions are weighted by rarity (tf-idf), so that a common tag brings two concepts near each other and a label,
    which one concept has alone, sets it apart. All concepts take part: these are words, no pictures.

    Args:
        run: The training.
        meanings: (C, M) unit vectors of a sentence encoder; half of each cosine is theirs. None leaves them out.
        steps: Of gradient descent, from the best cosines without the bound to unit vectors.
    """
    path = run.folder / "table.pt"
    if path.exists():
        run.table = torch.load(path, map_location=run.device)
        return
    torch.manual_seed(run.seed)
    belongs = run.captions.belongs.float()  # (T, C)
    weighted = F.normalize(belongs * torch.log(len(run.concepts) / belongs.sum(1, keepdim=True)), dim=0)
    wanted = torch.sparse.mm(weighted.T.to_sparse(), weighted)  # (C, C)
    if meanings is not None:
        vectors = torch.as_tensor(meanings, dtype=torch.float32, device=wanted.device)
        wanted = (wanted + vectors @ vectors.T) / 2
    wanted = wanted.to(run.device)
    width = run.model.config.vision_config.hidden_size
    directions, strengths, _ = torch.svd_lowrank(wanted, q=min(width, len(wanted)), niter=4)
    table = F.pad(directions * strengths.sqrt(), (0, width - directions.shape[1])).requires_grad_(True)
    optimizer = torch.optim.Adam([table], lr=1e-2)
    for step in range(steps):
        unit = F.normalize(table, dim=-1)
        loss = (unit @ unit.T - wanted).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.step()
    run.table = F.normalize(table.detach(), dim=-1)
    torch.save(run.table, path)
    run.log("table", steps, loss=loss.item())


def words(run: Run, seconds: float, batch: int = 192) -> None:
    """Stage 2, text. The text tower finds the concepts of a caption in the locked table."""
    assert run.table is not None
    table = run.table
    text, scale = run.model.text_model, Scale(15.0, -8.0)
    optimizers = Optimizers([text], [*scale.parameters()], muon_lr=4e-3, adamw_lr=3e-3, weight_decay=0.01)
    modules = {"text": text, "scale": scale, "optimizers": optimizers}
    source = random.Random(run.seed)
    # Emoji have names in ten languages, icons one: drawn alike, each name of an icon would come ten times as often.
    weights = [len(labels) for labels in run.captions.labels]

    def check() -> dict[str, float]:
        return text_to_table(run, table)

    for progress, took in Progress(run, "words", seconds, modules, (source,), check).steps(batch):
        concepts = source.choices(range(len(run.concepts)), weights, k=batch)
        ids, belongs = sample_texts(run, concepts, source, label_share=0.7)
        with autocast(run.device):
            embeds = run.model.encode_text(ids)
        logits = scale(embeds.float() @ table.T)  # (B, C)
        loss = positive_and_negative(logits, belongs) + several_positives(logits, belongs)
        optimizers.step(loss, progress)
        took(loss)


def text_to_table(run: Run, table: Tensor) -> dict[str, float]:
    """How often an emoji's label finds its concept in the table, by language."""
    result = {}
    concepts = run.concepts[: run.emoji_count]
    for language in [name for name in ("en", "de", "ko") if name in concepts[0]["captions"]]:
        labels = [concept["captions"][language]["label"].lower() for concept in concepts]
        found = (embed_texts(run, labels) @ table[: len(labels)].T).argmax(1)
        result[language] = (found == torch.arange(len(labels), device=found.device)).float().mean().item()
    return result


@torch.no_grad()
def embed_pictures(run: Run, pictures: PictureSet, batch: int = 256) -> Tensor:
    """Unit embeddings (N, E) of unaugmented pictures."""
    parts = [torch.zeros(0, run.model.config.vision_config.hidden_size)]
    for start in range(0, len(pictures), batch):
        with autocast(run.device):
            pixels = plain_pixels(pictures.pixels[start : start + batch].to(run.device), run.image_size)
            parts.append(run.model.encode_image(pixels).float())
    return torch.cat(parts)


def name_pictures(
    run: Run,
    stage: str,
    seconds: float,
    draw: Callable[[Tensor, float], Drawn],
    check: Callable[[Tensor, Tensor], dict[str, float]],
    *,
    generator: torch.Generator,
    batch: int,
    temperature: float,
    muon_lr: float,
    adamw_lr: float,
) -> None:
    """The image tower finds the concepts of a picture, one or two, in the locked table, and their tags.

    Only trained concepts are in that table, so that nothing pushes pictures away from the others. A tag's vector is the
    mean of its concepts'.

    Args:
        run: The training.
        stage: Name.
        seconds: Budget of work.
        draw: Numbers of pictures (B,) and the progress in 0..1 -> the pictures to train on.
        check: The table of trained concepts and the column in it of each concept -> measures of the learning curve.
        generator: That `draw` uses too.
        batch: Pictures of a step.
        temperature: Of the naming at first.
        muon_lr: Peak rate of the matrices.
        adamw_lr: Peak rate of all else.
    """
    assert run.table is not None
    trained = run.trained_concepts().to(run.device)
    table = run.table[trained]
    column = torch.cumsum(trained, 0) - 1  # concept -> column of the smaller table
    tags, belongs = tag_table(run)
    scale, tag_scale = Scale(temperature, 0.0), Scale(10.0, -6.0)
    vision = run.model.vision_model
    others = [*scale.parameters(), *tag_scale.parameters()]
    optimizers = Optimizers([vision], others, muon_lr=muon_lr, adamw_lr=adamw_lr)
    modules = {"vision": vision, "scale": scale, "tag_scale": tag_scale, "optimizers": optimizers}
    progresses = Progress(run, stage, seconds, modules, (generator,), lambda: check(table, column))
    for progress, took in progresses.steps(batch):
        drawn = draw(run.train.draw(batch, generator), progress)
        with autocast(run.device):
            embeds = run.model.encode_image(**drawn.inputs).float()
        first, second = column[drawn.first], column[drawn.second]
        targets = (F.one_hot(first, len(table)) + F.one_hot(second, len(table))) / 2  # (B, C)
        naming = F.cross_entropy(scale(embeds @ table.T), targets, label_smoothing=0.05)
        both = belongs[:, drawn.first] | belongs[:, drawn.second]  # (T, B)
        tagging = positive_and_negative(tag_scale(embeds @ tags.T), both.T)
        optimizers.step(naming + 0.05 * tagging, progress)
        took(naming)


def pictures(run: Run, seconds: float) -> None:
    """Stage 2, pictures. The image tower finds a picture's concept in the locked table."""
    generator = torch.Generator(run.device).manual_seed(run.seed)
    augment = Augmenter(run.image_size, generator)

    def draw(chosen: Tensor, progress: float) -> Drawn:
        # Mild first, or it learns nothing for long.
        pixels = augment(run.train, chosen, min(1.0, 0.2 + 0.9 * progress))
        return Drawn({"pixel_values": pixels}, run.train.concept[chosen], run.train.concept[chosen])

    def check(table: Tensor, column: Tensor) -> dict[str, float]:
        assert run.table is not None
        found = (embed_pictures(run, run.validation) @ table.T).argmax(1)
        right = found == column[run.validation.concept]
        probed = ten_way(embed_pictures(run, run.probe), run.table, run.probe.concept)
        return {"validation_top1": right.float().mean().item(), "probe_10way": probed}

    rates = {"temperature": 12.0, "muon_lr": 5e-3, "adamw_lr": 1.5e-3}
    name_pictures(run, "pictures", seconds, draw, check, generator=generator, batch=128, **rates)


def locked(run: Run, seconds: float, batch: int = 192) -> None:
    """Stage 3. Text tower alone, against the embeddings of training pictures; unseen concepts keep their vector."""
    assert run.table is not None
    images = embed_pictures(run, run.train)
    trained = run.trained_concepts().to(run.device)
    sums = torch.zeros_like(run.table).index_add_(0, run.train.concept, images)
    # A concept's vector is now the mean of its pictures; where none may be seen, the words' own.
    run.table = torch.where(trained[:, None], F.normalize(sums, dim=-1), run.table)
    text, scale = run.model.text_model, Scale(15.0, -8.0)
    optimizers = Optimizers([text], [*scale.parameters()], muon_lr=4e-3, adamw_lr=3e-3, weight_decay=0.01)
    modules = {"text": text, "scale": scale, "optimizers": optimizers}
    source = random.Random(run.seed + 1)
    weights = [len(labels) for labels in run.captions.labels]
    for progress, took in Progress(run, "locked", seconds, modules, (source,), lambda: validate(run)).steps(batch):
        concepts = source.choices(range(len(run.concepts)), weights, k=batch)
        ids, belongs = sample_texts(run, concepts, source, label_share=0.7)
        with autocast(run.device):
            embeds = run.model.encode_text(ids).float()
        logits = scale(embeds @ run.table.T)
        sample = torch.tensor(source.sample(range(len(images)), min(2048, len(images))))
        picture_logits = scale(embeds @ images[sample].T)
        loss = positive_and_negative(logits, belongs) + several_positives(logits, belongs)
        loss = loss + positive_and_negative(picture_logits, belongs[:, run.train.concept[sample]])
        optimizers.step(loss, progress)
        took(loss)


def train_together(
    run: Run,
    seconds: float,
    backward: Callable[[Tensor], Tensor],
    check: Callable[[], dict[str, float]],
    generators: tuple[torch.Generator, random.Random],
    *,
    batch: int,
    muon_lr: float,
    adamw_lr: float,
    calibration_lr: float,
) -> None:
    """Both towers on pictures and captions with the package's loss.

    Args:
        run: The training.
        seconds: Budget of work.
        backward: Numbers of pictures (B,) -> their loss, whose gradients it has added.
        check: Measures of the learning curve.
        generators: Of everything drawn at random; the first draws the pictures.
        batch: Pictures of a step.
        muon_lr: Peak rate of the matrices.
        adamw_lr: Peak rate of all else.
        calibration_lr: Rate of scale and bias, which have far to go where the towers hardly have.
    """
    model = run.model
    optimizers = Optimizers(
        [model.vision_model, model.text_model], [], muon_lr=muon_lr, adamw_lr=adamw_lr, weight_decay=0.0
    )
    calibration = torch.optim.Adam([model.logit_scale, model.logit_bias], lr=calibration_lr)
    modules: dict[str, Any] = {"model": model, "optimizers": optimizers, "calibration": calibration}
    for progress, took in Progress(run, "joint", seconds, modules, generators, check).steps(batch):
        loss = backward(run.train.draw(batch, generators[0]))
        optimizers.step(None, progress)
        for group in calibration.param_groups:
            group["lr"] = calibration_lr * (1.0 - progress)
        calibration.step()
        calibration.zero_grad()
        took(loss)


def joint(run: Run, seconds: float, micro_batch: int = 192) -> None:
    """Stage 4. Both towers on picture-label pairs, in large batches by cached accumulation.

    Scale and bias start near where they end.
    """
    with torch.no_grad():
        run.model.logit_scale.fill_(math.log(20.0))
        run.model.logit_bias.fill_(-10.0)
    generator, source = torch.Generator(run.device).manual_seed(run.seed + 2), random.Random(run.seed + 2)
    augment = Augmenter(run.image_size, generator)

    def inputs(chosen: Tensor) -> dict[str, Tensor]:
        ids, _ = sample_texts(run, run.train.concept[chosen].tolist(), source, label_share=1.0)
        return {"pixel_values": augment(run.train, chosen, 0.7), "input_ids": ids}

    def backward(chosen: Tensor) -> Tensor:
        with autocast(run.device):
            micro_batches = [inputs(part) for part in chosen.split(micro_batch)]
            return cached_backward(run.model, micro_batches, positives=run.train.concept[chosen]).loss

    rates = {"muon_lr": 1e-3, "adamw_lr": 4e-4, "calibration_lr": 1e-1}
    train_together(run, seconds, backward, lambda: validate(run), (generator, source), batch=768, **rates)


def validate(run: Run) -> dict[str, float]:
    """Top-1 of validation pictures over the English labels of all emoji, and of the probe's ten ways."""
    labels = embed_texts(run, [concept["label"].lower() for concept in run.concepts])
    emoji = run.validation.concept < run.emoji_count
    images = embed_pictures(run, run.validation)
    found = (images[emoji] @ labels[: run.emoji_count].T).argmax(1)
    probed = ten_way(embed_pictures(run, run.probe), labels, run.probe.concept)
    right = found == run.validation.concept[emoji]
    return {"validation_top1": right.float().mean().item(), "probe_10way": probed}


def calibrate(run: Run, *images: Tensor) -> None:
    """Stage 5. Scale and bias by logistic regression: right and random wrong labels of validation pictures, even odds.

    The model's ranking stays as it is; its scores become readable.

    Args:
        run: The training.
        images: (N, E) unit embeddings of the validation pictures, once or in several shapes.
    """
    labels = embed_texts(run, [concept["label"].lower() for concept in run.concepts])
    cosines = torch.cat(images) @ labels.T  # (N, C) once or more
    own = F.one_hot(run.validation.concept, len(labels)).bool().repeat(len(images), 1)
    right, wrong = cosines[own], cosines[~own]
    scale, bias = (p.detach().clone().requires_grad_(True) for p in (run.model.logit_scale, run.model.logit_bias))
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits_right, logits_wrong = (scale.exp() * cosines + bias for cosines in (right, wrong))
        value = -F.logsigmoid(logits_right).mean() - F.logsigmoid(-logits_wrong).mean()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        run.model.logit_scale.copy_(scale)
        run.model.logit_bias.copy_(bias)
    run.log("calibrate", len(right), loss=loss().item(), scale=scale.exp().item(), bias=bias.item())
