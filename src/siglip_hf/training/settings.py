"""What a training run depends on, from a command line or a file."""

from __future__ import annotations

import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Names of schedules, and what transformers calls them.
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass
class TrainSettings:
    """Everything a run depends on; the names are those of the command's options.

    Attributes:
        data: What `open_source` takes; several paths are taken together.
        output: Folder of the run. It gets the trained checkpoint, `loss.png`, `report.json` and `checkpoint-N`.
        model: A SigLIP checkpoint; the embedded one if None.
        eval_data: Pictures with captions on which recall is measured, as `data`.
        hold_out: Pictures of `data` that are not trained on, for the same purpose.
        image_column: See `open_source`; so `caption_column`, `label_column` and `split`.
        template: Texts with `{}` for labels, where there are no captions.
        captions: "random" or "first".
        augment: Any of "crop", "flip", "color".
        epochs: Passes over the data.
        steps: Optimizer steps; takes the place of `epochs`.
        batch_size: Pairs in the loss of one step, over all processes.
        micro_batch: Pairs in one forward and backward; a larger batch is split, and its loss stays exact.
        learning_rate: Peak, after the warm-up.
        scale_learning_rate: That of temperature and bias; the same if None.
        weight_decay: Of the kernels of linear and convolutional layers.
        warmup: Share of the steps in which the learning rate rises.
        schedule: "cosine", "linear" or "constant", after the warm-up.
        precision: "float32", or "bfloat16" or "float16" for mixed precision.
        gradient_checkpointing: Compute blocks again in backward, for less memory.
        compile: Run the model through torch.compile.
        fsdp: Shard the model over the processes (FSDP2).
        freeze: See `siglip_hf.training.freeze`.
        lora: Rank of LoRA adapters on all attention projections; 0 trains the weights themselves.
        image_store: Folder for embeddings of a frozen image tower, computed once; see `store_images`.
        seed: Of order, captions, augmentation and dropout.
        eval_every: Steps between measurements; only at start and end if None.
        save_every: Steps between checkpoints; a tenth of the run if None.
        keep: Checkpoints kept.
        log_every: Steps between points of the plot.
        workers: Processes that read pictures; by default 4 on an accelerator, and on a CPU none beside this one.
        cpu: Leave accelerators alone.
    """

    data: list[str]
    output: str
    model: str | None = None
    eval_data: list[str] = field(default_factory=list)
    hold_out: int = 0
    image_column: str | None = None
    caption_column: str | None = None
    label_column: str | None = None
    split: str = "train"
    template: list[str] = field(default_factory=list)
    captions: str = "random"
    augment: list[str] = field(default_factory=list)
    epochs: float = 10.0
    steps: int | None = None
    batch_size: int = 256
    micro_batch: int = 32
    learning_rate: float = 3e-5
    scale_learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: str = "cosine"
    precision: str = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    freeze: list[str] = field(default_factory=list)
    lora: int = 0
    image_store: str | None = None
    seed: int = 0
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    log_every: int = 1
    workers: int | None = None
    cpu: bool = False

    @classmethod
    def read(cls, values: Mapping[str, Any], origin: str = "the settings") -> TrainSettings:
        """Settings from names and values, as in a file.

        Raises:
            ValueError: For a name that is not known, a value of another type, and what is missing.
        """
        types = typing.get_type_hints(cls)
        values = {name.replace("-", "_"): value for name, value in values.items()}
        unknown = [name for name in values if name not in types]
        if unknown:
            raise ValueError(f"{origin}: {', '.join(unknown)} is not known; there are {', '.join(types)}.")
        for name in ("data", "output"):
            if not values.get(name):
                raise ValueError(f"{origin}: no {name} given.")
        return cls(**{name: _typed(name, value, types[name], origin) for name, value in values.items()})

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
            ValueError: naming the setting and its value.
        """
        for name in ("epochs", "batch_size", "micro_batch", "learning_rate", "keep", "log_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        for name in ("steps", "eval_every", "save_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("hold_out", "lora", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be a share of the steps, from 0 to below 1.")
        if self.precision not in _PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is not known; choose among {', '.join(_PRECISIONS)}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is not known; choose among {', '.join(SCHEDULES)}.")
        if self.eval_data and self.hold_out:
            raise ValueError("eval_data and hold_out are both given; pass one of them.")
        if self.image_store and self.lora:
            raise ValueError("image_store needs an image tower that stays as it is; LoRA changes it. Leave out one.")


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Names and values of a YAML or JSON file.

    Raises:
        ValueError: If it holds something else.
        ImportError: If it is YAML, and PyYAML is not installed.
    """
    text = Path(path).read_text(encoding="utf-8")
    if str(path).endswith(".json"):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    else:
        try:
            import yaml
        except ImportError as error:
            raise ImportError('a YAML file needs PyYAML: pip install "siglip-hf[train]", or use JSON') from error
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} must hold names and values of settings.")
    return values


def _typed(name: str, value: Any, kind: Any, origin: str) -> Any:
    """A value of a file as the type of its setting."""
    if typing.get_origin(kind) is list:
        return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        (kind,) = (option for option in typing.get_args(kind) if option is not type(None))
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5 as text
        except ValueError:
            pass
    if type(value) is not kind:
        raise ValueError(f"{origin}: {name}={value!r} should be of type {kind.__name__}.")
    return value
