"""What all stages of a training share: data, model, the learning curve, state on disk, and fast image towers."""

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

import siglip_hf

from .captions import Captions, Encoder
from .pictures import PictureSet

console = Console(highlight=False)


@dataclass
class Run:
    """What all stages share.

    Attributes:
        model: The model in training.
        concepts: Those of the emoji, then those that icons alone have drawn.
        captions: All texts.
        encoder: Texts to ids.
        train: Pictures to train on.
        validation: Pictures of the same hands and concepts, never trained on.
        probe: Icons of concepts of which no picture is trained on: they steer what is done for unseen concepts.
        folder: Where state and the learning curve are kept.
        seed: Of everything drawn at random.
        table: (C, E) unit vectors of the concepts, once a stage has made them.
        every: Seconds between lines of the learning curve, at which state is saved too.
    """

    model: Any
    concepts: list[dict[str, Any]]
    captions: Captions
    encoder: Encoder
    train: PictureSet
    validation: PictureSet
    probe: PictureSet
    folder: Path
    seed: int = 0
    table: Tensor | None = None
    every: float = 60.0
    started: float = field(default_factory=time.time)

    @property
    def image_size(self) -> int:
        return self.model.config.vision_config.image_size

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def emoji_count(self) -> int:
        """How many of the concepts are emoji's; these come first."""
        return sum(concept["group"] != "icons" for concept in self.concepts)

    def trained_concepts(self) -> Tensor:
        """(C,) bool: the concepts whose pictures may be seen."""
        return torch.tensor([concept["split"] == "train" for concept in self.concepts])

    def log(self, stage: str, samples: int, **values: float) -> None:
        """Append a line to the learning curve and show it."""
        line = {"stage": stage, "samples": samples, "seconds": round(time.time() - self.started, 1)}
        line |= {name: round(value, 4) for name, value in values.items()}
        with (self.folder / "learning_curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        console.print("  ".join(f"{name} {value}" for name, value in line.items()), soft_wrap=True)


def clock(device: torch.device) -> float:
    """Seconds of work: of a CPU, those that this process was given, so that a busy machine trains no less."""
    return time.perf_counter() if device.type == "cuda" else time.process_time() / torch.get_num_threads()


@dataclass
class Progress:
    """Takes a stage through its budget of time, logs the mean loss, and keeps state on disk so that it can go on.

    Attributes:
        run: The training.
        stage: Name.
        budget: Seconds of work (`clock`); a stage started again with another budget goes on at the matching point.
        modules: What has a state to keep.
        generators: Reseeded where the stage goes on, so that it does not see the same samples again.
        check: Measures of the learning curve.
    """

    run: Run
    stage: str
    budget: float
    modules: dict[str, Any]
    generators: tuple[torch.Generator | random.Random, ...] = ()
    check: Callable[[], dict[str, float]] = dict

    def steps(self, batch: int) -> Iterator[tuple[float, Callable[[Tensor], None]]]:
        """Yield (progress in 0..1, a function that takes the step's loss) until the budget is spent."""
        losses: list[Tensor] = []

        def take(loss: Tensor) -> None:
            losses.append(loss.detach())

        samples, spent = self._resume()
        began, logged, last = clock(self.run.device) - spent, samples, time.time()
        work = spent
        while spent < self.budget:
            yield spent / self.budget, take
            samples += batch
            spent = clock(self.run.device) - began
            if time.time() - last > self.run.every or spent >= self.budget:
                speed = (samples - logged) / (spent - work)
                loss = float(torch.stack(losses).mean())
                self._save(samples, spent)
                self.run.log(self.stage, samples, loss=loss, work=spent, per_second=speed, **self.check())
                losses.clear()
                began = clock(self.run.device) - spent  # checks are not counted
                last, logged, work = time.time(), samples, spent

    @property
    def _path(self) -> Path:
        return self.run.folder / f"{self.stage}.state.pt"

    def _resume(self) -> tuple[int, float]:
        if not self._path.exists():
            return 0, 0.0
        state = torch.load(self._path, weights_only=False, map_location=self.run.device)
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        for generator in self.generators:
            seed = self.run.seed + 1_000_003 * state["samples"]
            generator.seed(seed) if isinstance(generator, random.Random) else generator.manual_seed(seed)
        console.print(f"{self.stage}: going on after {state['samples']} samples")
        return state["samples"], state["spent"]

    def _save(self, samples: int, spent: float) -> None:
        state = {name: module.state_dict() for name, module in self.modules.items()}
        partial = self._path.with_suffix(".partial")
        torch.save(state | {"samples": samples, "spent": spent}, partial)
        partial.replace(self._path)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


class _Patches(nn.Conv2d):
    """The patch embedding as one product: on a CPU the gradient of a convolution takes ten times as long."""

    def forward(self, input: Tensor) -> Tensor:
        side = self.kernel_size[0]
        rows, columns = input.shape[2] // side, input.shape[3] // side
        patches = input.unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 1, 3, 5)
        embeds = F.linear(patches.flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)  # (B, N, D)
        return embeds.mT.unflatten(2, (rows, columns))


def for_training(model: Any) -> Any:
    """Makes the model's steps cheap on a CPU: twice as many pictures a second at 16 tokens. Weights stay as they are.

    PyTorch's fused attention takes longer for the gradient of short sequences than plain products.
    """
    for module in model.modules():
        if type(module) is siglip_hf.SiglipVisionModel:  # NaFlex has a product already
            module.embeddings.patch_embedding.__class__ = _Patches
    model.set_attn_implementation("eager")
    return model


class Scale(nn.Module):
    """A temperature and a bias of a stage's own: exp(t) * cosine + b."""

    def __init__(self, temperature: float, bias: float) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, cosines: Tensor) -> Tensor:
        return self.log_temperature.clamp(max=math.log(50.0)).exp() * cosines + self.bias


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
    return run.encoder(prompts).to(run.device), run.captions.belongs[numbers].to(run.device)


@torch.no_grad()
def embed_texts(run: Run, texts: list[str], batch: int = 512) -> Tensor:
    """Unit embeddings (T, E) of texts."""
    parts = []
    for start in range(0, len(texts), batch):
        with autocast(run.device):
            parts.append(run.model.encode_text(run.encoder(texts[start : start + batch]).to(run.device)).float())
    return torch.cat(parts)


def tag_table(run: Run) -> tuple[Tensor, Tensor]:
    """English tags of several trained concepts: the means of their concepts (T, E), and membership (T, C) bool."""
    assert run.table is not None
    belongs = run.captions.belongs & run.trained_concepts()
    counts = belongs.sum(1)
    numbers = [i for i, text in enumerate(run.captions.texts) if text.language == "en" and counts[i] > 1]
    belongs = belongs[numbers].to(run.device)
    return F.normalize(belongs.float() @ run.table, dim=-1), belongs


def ten_way(images: Tensor, classes: Tensor, concept: Tensor, draws: int = 5) -> float:
    """Share of pictures (N, E) whose own class of (C, E) beats nine others among those that occur in `concept` (N,).

    NaN without pictures.
    """
    if len(concept) == 0:
        return math.nan
    pool = concept.unique()
    scores = (images @ classes[pool].T).cpu()
    own = torch.searchsorted(pool, concept).cpu()
    generator = torch.Generator("cpu").manual_seed(0)
    right = 0.0
    for _ in range(draws):
        order = torch.rand(scores.shape, generator=generator, device="cpu").scatter_(1, own[:, None], -1.0)
        others = scores.gather(1, order.topk(9, dim=1).indices)
        right += (scores.gather(1, own[:, None]) > others).all(1).float().mean().item()
    return right / draws
