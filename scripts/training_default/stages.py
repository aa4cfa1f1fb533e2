"""The stages of scripts/train_default.py.

A small SigLIP trained from nothing on few pairs stays long on the plateau where all pairs look alike. Three things
lead off it: every concept as a negative at each step, one tower at a time, and Muon for the matrices (Jordan et al.,
2024).

1. table: a vector per concept, so placed that concepts with common captions lie near each other.
2. words and pictures, side by side: each tower alone learns to find its concepts in the locked table.
3. locked: the text tower is tuned against the locked image tower (LiT, Zhai et al. 2022; images are embedded once).
4. joint: both towers with the package's sigmoid loss, which also sets scale and bias.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from siglip_hf.models.modeling_siglip import SiglipModel
from siglip_hf.training.cached import cached_backward

from .captions import Captions, Encoder
from .pictures import Augmenter, PictureSet, plain_pixels

console = Console()


@dataclass
class Run:
    """What all stages share: data, model, and where state and the learning curve are kept."""

    model: SiglipModel
    concepts: list[dict[str, Any]]
    captions: Captions
    encoder: Encoder
    train: PictureSet
    validation: PictureSet
    folder: Path
    seed: int = 0
    table: Tensor | None = None
    started: float = field(default_factory=time.time)

    @property
    def image_size(self) -> int:
        return self.model.config.vision_config.image_size

    def trained_concepts(self) -> Tensor:
        """(C,) bool: the concepts whose pictures may be seen."""
        return torch.tensor([concept["split"] == "train" for concept in self.concepts])

    def log(self, stage: str, samples: int, **values: float) -> None:
        """Append a line to the learning curve and show it."""
        line = {"stage": stage, "samples": samples, "seconds": round(time.time() - self.started, 1)}
        line |= {name: round(value, 4) for name, value in values.items()}
        with (self.folder / "learning_curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        console.print("  ".join(f"{name} {value}" for name, value in line.items()), highlight=False)


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices, roughly, of (K, rows, columns), by Newton-Schulz iteration."""
    transposed = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if transposed else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Muon that treats all matrices of one shape as one batch, which on a CPU takes a tenth of torch.optim.Muon's time.

    Args:
        parameters: Matrices.
        lr: Learning rate on the scale of AdamW's: an update has a root mean square of 0.2 lr.
        weight_decay: Decoupled weight decay.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, members in by_shape.items():
                updates = []
                for parameter in members:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(momentum, group["momentum"]))
                directions = orthogonalized(torch.stack(updates))
                for parameter, direction in zip(members, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


class Optimizers:
    """Muon for the matrices inside the blocks, AdamW for all else, one schedule for both.

    Args:
        modules: Modules to train.
        others: Further parameters for AdamW.
        muon_lr: Peak learning rate of Muon.
        adamw_lr: Peak learning rate of AdamW.
        weight_decay: On matrices only.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        others: list[nn.Parameter],
        *,
        muon_lr: float = 2e-3,
        adamw_lr: float = 1e-3,
        weight_decay: float = 0.05,
    ) -> None:
        named = [(name, p) for module in modules for name, p in module.named_parameters()]
        matrices = [p for name, p in named if p.ndim == 2 and ("layers" in name or "head" in name)]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.parameters = [p for _, p in named] + others
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim <= 1] + others, "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
            torch.optim.AdamW(groups, lr=adamw_lr, betas=(0.9, 0.98)),
        ]
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, loss: Tensor | None, progress: float) -> None:
        """One step; `progress` in 0..1 through the stage sets the rate: warm-up, constant, linear to zero.

        Args:
            loss: To be differentiated; None if the gradients are there already.
            progress: See above.
        """
        if loss is not None:
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        factor = min(1.0, progress / 0.02 + 0.02, (1.0 - progress) / 0.45)
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * max(factor, 0.0)
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


@dataclass
class Progress:
    """Counts samples through a stage, logs the mean loss, and keeps state on disk so that a stage can go on.

    A stage that is started again with another total goes on at the matching point of the schedule.
    """

    run: Run
    stage: str
    total: int
    modules: dict[str, Any]
    every: int = 60  # seconds between lines of the learning curve
    check: Callable[[], dict[str, float]] = dict

    def steps(self, batch: int) -> Iterator[tuple[float, Callable[[Tensor], None]]]:
        """Yield (progress in 0..1, a function that takes the step's loss) until `total` samples are done."""
        losses: list[float] = []

        def take(loss: Tensor) -> None:
            losses.append(float(loss.detach()))

        done, last = self._resume(), time.time()
        logged = done
        while done < self.total:
            yield done / self.total, take
            done += batch
            now = time.time()
            if now - last > self.every or done >= self.total:
                speed = (done - logged) / (now - last)
                self.run.log(self.stage, done, loss=sum(losses) / len(losses), per_second=speed, **self.check())
                losses.clear()
                last, logged = time.time(), done
                self._save(done)

    @property
    def _path(self) -> Path:
        return self.run.folder / f"{self.stage}.state.pt"

    def _resume(self) -> int:
        if not self._path.exists():
            return 0
        state = torch.load(self._path, weights_only=False)
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        console.print(f"{self.stage}: going on after {state['samples']} samples")
        return state["samples"]

    def _save(self, samples: int) -> None:
        state = {name: module.state_dict() for name, module in self.modules.items()}
        partial = self._path.with_suffix(".partial")
        torch.save(state | {"samples": samples}, partial)
        partial.replace(self._path)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def positive_and_negative(logits: Tensor, targets: Tensor) -> Tensor:
    """Sigmoid loss of a whole table: all pairs summed per row. logits and targets (B, C)."""
    return -F.logsigmoid(torch.where(targets, logits, -logits)).sum(1).mean()


def several_positives(logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax loss with equal weight on each of a row's positives. logits (B, C), targets (B, C) bool."""
    weights = targets / targets.sum(1, keepdim=True).clamp(min=1)
    return -(weights * logits.log_softmax(1)).sum(1).mean()


def sample_texts(run: Run, concepts: list[int], source: random.Random, label_share: float) -> tuple[Tensor, Tensor]:
    """Draw one prompt per concept.

    Returns:
        Ids (B, L) and the concepts (B, C) bool that each prompt belongs to.
    """
    numbers = []
    for concept in concepts:
        pool = run.captions.labels if source.random() < label_share else run.captions.tags
        numbers.append(source.choice(pool[concept] or run.captions.labels[concept]))
    prompts = [run.captions.prompt(number, source) for number in numbers]
    return run.encoder(prompts), run.captions.belongs[numbers]


class Scale(nn.Module):
    """A temperature and a bias of a stage's own: exp(t) * cosine + b."""

    def __init__(self, temperature: float, bias: float) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, cosines: Tensor) -> Tensor:
        return self.log_temperature.clamp(max=math.log(50.0)).exp() * cosines + self.bias


def place_concepts(run: Run, steps: int = 400) -> None:
    """Stage 1. Sets `run.table` (C, E): unit vectors whose cosines follow the concepts' common captions.

    Captions are weighted by rarity (tf-idf), so that a common tag brings two concepts near each other and a label,
    which one concept has alone, sets it apart. All concepts take part: these are words, no pictures.
    """
    path = run.folder / "table.pt"
    if path.exists():
        run.table = torch.load(path)
        return
    belongs = run.captions.belongs.float()  # (T, C)
    weighted = belongs * torch.log(len(run.concepts) / belongs.sum(1, keepdim=True))
    weighted = F.normalize(weighted, dim=0)
    wanted = weighted.T @ weighted  # (C, C)
    generator = torch.Generator().manual_seed(run.seed)
    table = torch.randn(len(run.concepts), run.model.config.vision_config.hidden_size, generator=generator)
    table.requires_grad_(True)
    optimizer = torch.optim.Adam([table], lr=3e-2)
    for step in range(steps):
        unit = F.normalize(table, dim=-1)
        loss = (unit @ unit.T - wanted).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / steps)
        optimizer.step()
    run.table = F.normalize(table.detach(), dim=-1)
    torch.save(run.table, path)
    run.log("table", steps, loss=loss.item())


def words(run: Run, total: int, batch: int = 192) -> None:
    """Stage 2, text. The text tower finds the concepts of a caption in the locked table."""
    assert run.table is not None
    table = run.table
    text, scale = run.model.text_model, Scale(15.0, -8.0)
    optimizers = Optimizers([text], [*scale.parameters()], muon_lr=4e-3, adamw_lr=3e-3, weight_decay=0.01)
    modules = {"text": text, "scale": scale, "optimizers": optimizers}
    source = random.Random(run.seed)

    def check() -> dict[str, float]:
        return text_to_table(run, table)

    for progress, took in Progress(run, "words", total, modules, check=check).steps(batch):
        concepts = source.choices(range(len(run.concepts)), k=batch)
        ids, belongs = sample_texts(run, concepts, source, label_share=0.7)
        with autocast():
            embeds = run.model.encode_text(ids)
        logits = scale(embeds.float() @ table.T)  # (B, C)
        loss = positive_and_negative(logits, belongs) + several_positives(logits, belongs)
        optimizers.step(loss, progress)
        took(loss)


@torch.no_grad()
def embed_texts(run: Run, texts: list[str], batch: int = 512) -> Tensor:
    """Unit embeddings (T, E) of texts."""
    parts = []
    for start in range(0, len(texts), batch):
        with autocast():
            parts.append(run.model.encode_text(run.encoder(texts[start : start + batch])).float())
    return torch.cat(parts)


def text_to_table(run: Run, table: Tensor) -> dict[str, float]:
    """How often a label finds its concept in the table, by language."""
    result = {}
    for language in [name for name in ("en", "de", "ko") if name in run.concepts[0]["captions"]]:
        labels = [concept["captions"][language]["label"].lower() for concept in run.concepts]
        found = (embed_texts(run, labels) @ table.T).argmax(1)
        result[language] = (found == torch.arange(len(labels))).float().mean().item()
    return result


@torch.no_grad()
def embed_pictures(run: Run, pictures: PictureSet, batch: int = 256) -> Tensor:
    """Unit embeddings (N, E) of unaugmented pictures."""
    parts = []
    for start in range(0, len(pictures), batch):
        with autocast():
            pixels = plain_pixels(pictures.pixels[start : start + batch], run.image_size)
            parts.append(run.model.encode_image(pixels).float())
    return torch.cat(parts)


def tag_table(run: Run) -> tuple[Tensor, Tensor]:
    """English tags of several trained concepts: the means of their concepts (T, E), and membership (T, C) bool."""
    assert run.table is not None
    belongs = run.captions.belongs & run.trained_concepts()
    counts = belongs.sum(1)
    numbers = [i for i, text in enumerate(run.captions.texts) if text.language == "en" and counts[i] > 1]
    belongs = belongs[numbers]
    return F.normalize(belongs.float() @ run.table, dim=-1), belongs


def pictures(run: Run, total: int, batch: int = 128) -> None:
    """Stage 2, pictures. The image tower finds a picture's concept in the locked table, and its tags.

    Only trained concepts are in that table, so that nothing pushes pictures away from the others. A tag's vector is the
    mean of its concepts'.
    """
    assert run.table is not None
    trained = run.trained_concepts()
    table = run.table[trained]
    column = torch.cumsum(trained, 0) - 1  # concept -> column of the smaller table
    tags, belongs = tag_table(run)
    scale, tag_scale = Scale(12.0, 0.0), Scale(10.0, -6.0)
    vision = run.model.vision_model
    others = [*scale.parameters(), *tag_scale.parameters()]
    optimizers = Optimizers([vision], others, muon_lr=5e-3, adamw_lr=1.5e-3)
    modules = {"vision": vision, "scale": scale, "tag_scale": tag_scale, "optimizers": optimizers}
    generator = torch.Generator().manual_seed(run.seed)
    augment = Augmenter(run.image_size, generator)
    order: list[int] = []

    def check() -> dict[str, float]:
        found = (embed_pictures(run, run.validation) @ table.T).argmax(1)
        return {"validation_top1": (found == column[run.validation.concept]).float().mean().item()}

    for progress, took in Progress(run, "pictures", total, modules, check=check).steps(batch):
        while len(order) < batch:
            order += torch.randperm(len(run.train), generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        strength = min(1.0, 0.2 + 0.9 * progress)  # mild first, or it learns nothing for long
        pixels = augment(run.train.pixels[chosen], run.train.mirrored[chosen], strength)
        with autocast():
            embeds = run.model.encode_image(pixels).float()
        concept = run.train.concept[chosen]
        naming = F.cross_entropy(scale(embeds @ table.T), column[concept], label_smoothing=0.05)
        tagging = positive_and_negative(tag_scale(embeds @ tags.T), belongs[:, concept].T)
        loss = naming + 0.05 * tagging
        optimizers.step(loss, progress)
        took(naming)


def locked(run: Run, total: int, batch: int = 192) -> None:
    """Stage 3. Text tower alone, against the embeddings of training pictures; unseen concepts keep their vector."""
    assert run.table is not None
    images = embed_pictures(run, run.train)
    trained = run.trained_concepts()
    width = images.shape[1]
    sums = torch.zeros(len(run.concepts), width).index_add_(0, run.train.concept, images)
    # A concept's vector is now the mean of its pictures; where none may be seen, the words' own.
    run.table = torch.where(trained[:, None], F.normalize(sums, dim=-1), run.table)
    text, scale = run.model.text_model, Scale(15.0, -8.0)
    optimizers = Optimizers([text], [*scale.parameters()], muon_lr=4e-3, adamw_lr=3e-3, weight_decay=0.01)
    modules = {"text": text, "scale": scale, "optimizers": optimizers}
    source = random.Random(run.seed + 1)
    for progress, took in Progress(run, "locked", total, modules, check=lambda: validate(run)).steps(batch):
        concepts = source.choices(range(len(run.concepts)), k=batch)
        ids, belongs = sample_texts(run, concepts, source, label_share=0.7)
        with autocast():
            embeds = run.model.encode_text(ids).float()
        logits = scale(embeds @ run.table.T)
        sample = torch.tensor(source.sample(range(len(images)), 2048))
        picture_logits = scale(embeds @ images[sample].T)
        loss = positive_and_negative(logits, belongs) + several_positives(logits, belongs)
        loss = loss + positive_and_negative(picture_logits, belongs[:, run.train.concept[sample]])
        optimizers.step(loss, progress)
        took(loss)


def joint(run: Run, total: int, batch: int = 768, micro_batch: int = 192) -> None:
    """Stage 4. Both towers on picture-label pairs with the package's loss, in large batches by cached accumulation.

    Scale and bias start near where they end.
    """
    model = run.model
    with torch.no_grad():
        if not (run.folder / "joint.state.pt").exists():
            model.logit_scale.fill_(math.log(20.0))
            model.logit_bias.fill_(-10.0)
    others = [model.logit_scale, model.logit_bias]
    towers = [model.vision_model, model.text_model]
    optimizers = Optimizers(towers, [], muon_lr=1e-3, adamw_lr=4e-4, weight_decay=0.0)
    rate = 1e-1  # scale and bias have far to go, the towers hardly
    calibration = torch.optim.Adam(others, lr=rate)
    generator = torch.Generator().manual_seed(run.seed + 2)
    augment, source = Augmenter(run.image_size, generator), random.Random(run.seed + 2)
    modules: dict[str, Any] = {"model": model, "optimizers": optimizers, "calibration": calibration}

    def inputs(chosen: Tensor) -> dict[str, Tensor]:
        ids, _ = sample_texts(run, run.train.concept[chosen].tolist(), source, label_share=1.0)
        return {"pixel_values": augment(run.train.pixels[chosen], run.train.mirrored[chosen], 0.7), "input_ids": ids}

    for progress, took in Progress(run, "joint", total, modules, check=lambda: validate(run)).steps(batch):
        chosen = torch.randint(len(run.train), (batch,), generator=generator)
        with autocast():
            micro_batches = [inputs(part) for part in chosen.split(micro_batch)]
            result = cached_backward(model, micro_batches, positives=run.train.concept[chosen])
        optimizers.step(None, progress)
        for group in calibration.param_groups:
            group["lr"] = rate * (1.0 - progress)
        calibration.step()
        calibration.zero_grad()
        took(result.loss)


def validate(run: Run) -> dict[str, float]:
    """Top-1 of validation pictures over the English labels of all concepts."""
    labels = embed_texts(run, [concept["label"].lower() for concept in run.concepts])
    found = (embed_pictures(run, run.validation) @ labels.T).argmax(1)
    return {"validation_top1": (found == run.validation.concept).float().mean().item()}
