"""What a training run depends on, written once: `siglip-hf train` takes its options, their help and types from here."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from siglip_hf.extras import missing
from siglip_hf.files import parse_json, read_text

#: Names of schedules, and what transformers calls them.
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_MOST = 2**31 - 1  # of any number: counters of libraries hold no more
_PRECISIONS = ("float32", "bfloat16", "float16")


def _option(text: str) -> Any:
    return typer.Option(help=text)


@dataclass
class TrainSettings:
    """Everything a run depends on. The names are those of the options of `siglip-hf train`, which describe themselves.

    Beyond that: `epochs` does not count where `steps` is given; None stands for what the help says or for nothing;
    `data` and `eval_data` are what `open_source` takes, `freeze` what `siglip_hf.training.freeze` takes.
    """

    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA", help="A folder, a table, tar shards or a saved dataset: pictures with captions."
        ),
    ]
    output: Annotated[str, typer.Option("--out", "-o", help="Folder of the run. Run again, it goes on where it was.")]
    model: Annotated[str | None, _option("A checkpoint; without it the embedded one.")] = None
    eval_data: Annotated[list[str], _option("Pictures on which recall is measured.")] = field(default_factory=list)
    hold_out: Annotated[int, _option("So many pictures of DATA are kept to measure recall.")] = 0
    image_column: Annotated[str | None, _option("Column with the pictures.")] = None
    caption_column: Annotated[str | None, _option("Column with the captions.")] = None
    label_column: Annotated[str | None, _option("Column with the class.")] = None
    split: Annotated[str, _option("Split of a saved dataset.")] = "train"
    template: Annotated[list[str], _option("Text with {} for the label of a picture without captions.")] = field(
        default_factory=list
    )
    captions: Annotated[str, _option("random or first, of several.")] = "random"
    augment: Annotated[list[str], _option("Any of crop,flip,color.")] = field(default_factory=list)
    stream: Annotated[
        int, _option("Read shards from front to back, shuffled among so many pairs, in place of listing them all.")
    ] = 0
    max_pixels: Annotated[int | None, _option("Pixels of the largest picture that is decoded.")] = None
    epochs: Annotated[float, _option("Passes over the data.")] = 10.0
    steps: Annotated[int | None, _option("Steps, in place of epochs.")] = None
    batch_size: Annotated[int, _option("Pairs in the loss of a step, over all processes.")] = 256
    micro_batch: Annotated[int, _option("Pairs in memory at a time; the loss of a larger batch stays exact.")] = 32
    learning_rate: Annotated[float, _option("At its peak, after the warm-up.")] = 3e-5
    scale_learning_rate: Annotated[float | None, _option("Of temperature and bias; the same by default.")] = None
    weight_decay: Annotated[float, _option("Of the kernels of linear and convolutional layers.")] = 0.01
    warmup: Annotated[float, _option("Share of the steps in which the learning rate rises.")] = 0.1
    schedule: Annotated[str, _option("cosine, linear or constant, after the warm-up.")] = "cosine"
    precision: Annotated[str, _option("float32, or bfloat16 or float16 for mixed precision.")] = "float32"
    gradient_checkpointing: Annotated[bool, _option("Less memory, more time.")] = False
    compile: Annotated[bool, _option("Run the model through torch.compile.")] = False
    fsdp: Annotated[bool, _option("Shard the model over the processes.")] = False
    freeze: Annotated[list[str], _option("image, text, image:6 (its first 6 blocks), or a pattern of names.")] = field(
        default_factory=list
    )
    lora: Annotated[int, _option("Rank of LoRA adapters; 0 trains the weights themselves.")] = 0
    image_store: Annotated[str | None, _option("Folder for embeddings of a frozen image tower.")] = None
    seed: Annotated[int, _option("Of order, captions, augmentation and dropout.")] = 0
    eval_every: Annotated[int | None, _option("Steps between measurements; start and end by default.")] = None
    save_every: Annotated[int | None, _option("Steps between checkpoints; a tenth of the run by default.")] = None
    keep: Annotated[int, _option("Checkpoints kept.")] = 2
    log_every: Annotated[int, _option("Steps between points of the plot.")] = 1
    workers: Annotated[int | None, _option("Processes that read pictures; 4 beside an accelerator by default.")] = None
    cpu: Annotated[bool, _option("Leave accelerators alone.")] = False

    def __post_init__(self) -> None:
        self.augment = [name.strip() for names in self.augment for name in names.split(",") if name.strip()]

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
            ValueError: naming the setting and its value.
        """
        for name in ("epochs", "batch_size", "micro_batch", "learning_rate", "keep", "log_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        for name in ("steps", "eval_every", "save_every", "max_pixels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("hold_out", "lora", "weight_decay", "scale_learning_rate", "workers", "stream"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value > _MOST:
                raise ValueError(f"{name}={value} must be at most {_MOST:,}.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be a share of the steps, from 0 to below 1.")
        if self.precision not in _PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is not known; choose among {', '.join(_PRECISIONS)}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is not known; choose among {', '.join(SCHEDULES)}.")
        if self.eval_data and self.hold_out:
            raise ValueError("eval_data and hold_out are both given; pass one of them.")
        if self.stream and (self.steps is None or self.hold_out or self.image_store):
            raise ValueError(
                "A stream has no length, and nothing of it can be held out or stored: give steps, and eval_data in "
                "place of hold_out."
            )
        if self.image_store and self.lora:
            raise ValueError("image_store needs an image tower that stays as it is; LoRA changes it. Leave out one.")


def read_config(path: str | os.PathLike[str]) -> dict[str, str | list[str]]:
    """The options of a YAML or JSON file, as they would stand on a command line, by the names of `TrainSettings`.

    Raises:
        ValueError: If it is neither, or holds names that are not known or values of values.
        ImportError: If it is YAML, and PyYAML is not installed.
    """
    kind = "JSON" if str(path).endswith(".json") else "YAML"
    try:
        text = read_text(path)
        values = parse_json(text) if kind == "JSON" else _parse_yaml(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is not {kind}: {why}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} must hold names and values of settings.")
    lists = {item.name: str(item.type).startswith("Annotated[list") for item in dataclasses.fields(TrainSettings)}
    options: dict[str, str | list[str]] = {}
    for name, value in values.items():
        option = name.replace("-", "_")
        if option not in lists:
            raise ValueError(f"{path}: {name} is not known; there are {', '.join(lists)}.")
        items = value if isinstance(value, list) and lists[option] else [value]
        if any(isinstance(item, dict | list) for item in items):
            raise ValueError(f"{path}: {name} takes {'values' if lists[option] else 'one value'}, each without parts.")
        if value is not None:
            options[option] = [str(item) for item in items] if lists[option] else str(value)
    return options


def _parse_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise missing("a YAML file needs PyYAML, and a JSON file nothing", "train") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
