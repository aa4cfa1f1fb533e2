"""How both trainings begin: their options, the data and the two towers in processes of their own."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drawings.sources import read_json, write_json

from .pictures import PictureSet, read_concepts, read_icon_concepts, read_pictures, read_styles
from .run import Run, console

#: A stage: the run and its budget in seconds of work.
Stage = Callable[[Run, float], None]


def add_options(parser: argparse.ArgumentParser, run: str, minutes: float) -> None:
    """The options that both trainings have."""
    parser.add_argument("--data", type=Path, default=Path("data/pictures"), help="what build_pictures.py wrote")
    parser.add_argument("--run", type=Path, default=Path(run), help="folder of state and learning curve")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint (default: RUN/checkpoint)")
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="of work on idle cores, all stages together (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the image tower (default: all cores)")
    parser.add_argument("--every", type=float, default=60, help="seconds between saved states (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)


@dataclass
class Data:
    """What a training reads.

    Attributes:
        concepts: The emoji's, then those that icons alone have drawn.
        train: Pictures to train on.
        validation: Pictures of the same hands and concepts, kept back.
        probe: Icons of concepts of which no picture is trained on.
    """

    concepts: list[dict[str, Any]]
    train: PictureSet
    validation: PictureSet
    probe: PictureSet


def read_data(arguments: argparse.Namespace) -> Data:
    """Read concepts and pictures; the concepts stay those of the run's start, whatever is built later.

    Raises:
        FileNotFoundError: The set has not been built.
    """
    data, folder, device = arguments.data, arguments.run, torch.device(arguments.device)
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "concepts.json"
    if not known.exists():
        write_json(known, read_concepts(data) + read_icon_concepts(data))
    concepts = read_json(known)
    pictures, validation = read_pictures(data, read_styles(data, "train"), concepts)
    splits = [concepts[number]["split"] for number in pictures.concept.tolist()]
    seen, probed = (torch.tensor([split == name for split in splits]) for name in ("train", "probe"))
    return Data(
        concepts=concepts,
        train=pictures.select(seen & ~validation).to(device),
        validation=pictures.select(seen & validation).to(device),
        probe=pictures.select(probed).to(device),
    )


def _train_tower(prepare: Callable[[argparse.Namespace], Run], stage: Stage, seconds: float, options: Any) -> None:
    torch.set_num_threads(1 if stage.__name__ == "words" else options.threads)  # words is done long before
    torch.set_default_device(options.device)
    stage(prepare(options), seconds)


def train(
    prepare: Callable[[argparse.Namespace], Run],
    towers: dict[Stage, float],
    together: dict[Stage, float],
    arguments: argparse.Namespace,
) -> Run:
    """Run all stages: each tower alone, in a process of its own, then the stages that need both.

    Args:
        prepare: Makes the run from the options.
        towers: Stages that do not need each other, with their shares of the minutes.
        together: The other stages, in order, with theirs.
        arguments: The options.

    Raises:
        FileNotFoundError: The pictures have not been built.
        RuntimeError: A tower's process has failed.
    """
    torch.set_num_threads(arguments.threads)
    torch.set_default_device(arguments.device)
    run = prepare(arguments)
    console.print(
        f"{len(run.train)} pictures to train on, {len(run.validation)} to validate, {len(run.captions.texts)} texts, "
        f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} million parameters",
        soft_wrap=True,
    )
    minute = 60 * arguments.minutes
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_train_tower, args=(prepare, stage, share * minute, arguments))
        for stage, share in towers.items()
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError("the training of a tower has failed, see above; start it again and it goes on")
    for stage, share in (towers | together).items():  # of the towers, the last state is only read back here
        stage(run, share * minute)
    return run
