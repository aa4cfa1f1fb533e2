"""Train the embedded checkpoint: a small SigLIP, from nothing, on the pictures of scripts/build_pictures.py.

Usage: python scripts/train_default.py [--data data/pictures] [--run runs/default] [--out runs/default/checkpoint]

About 75 minutes on 2 idle cores. State is saved each minute: start it again with the same --run and it goes on. The
learning curve is RUN/learning_curve.jsonl. The held-out styles and the held-out concepts' pictures are never read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from siglip_hf.models.configuration_siglip import SiglipConfig
from siglip_hf.models.modeling_siglip import SiglipModel
from training_default import stages
from training_default.captions import TEXT_LENGTH, Captions, Encoder, build_vocabulary
from training_default.export import export
from training_default.pictures import read_concepts, read_pictures, read_styles

WIDTH = 192
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 3}


def make_config(vocab_size: int) -> SiglipConfig:
    """A 64-pixel, 6 + 4 block SigLIP of about 7 million parameters."""
    text = SHAPE | {"num_hidden_layers": 4, "vocab_size": vocab_size, "max_position_embeddings": TEXT_LENGTH}
    vision = SHAPE | {"num_hidden_layers": 6, "image_size": 64, "patch_size": 16}
    return SiglipConfig(text_config=text, vision_config=vision)


def prepare(data: Path, folder: Path, seed: int) -> stages.Run:
    """Read the pictures, make the vocabulary and a new model."""
    concepts = read_concepts(data)
    captions = Captions(concepts)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "spiece.model"
    if not vocabulary.exists():
        build_vocabulary(captions, vocabulary)
    encoder = Encoder(vocabulary)
    pictures, validation = read_pictures(data, read_styles(data, "train"), concepts)
    seen = torch.tensor([concept["split"] == "train" for concept in concepts])[pictures.concept]
    torch.manual_seed(seed)
    model = SiglipModel(make_config(encoder.pieces.get_piece_size()))
    run = stages.Run(
        model=model,
        concepts=concepts,
        captions=captions,
        encoder=encoder,
        train=pictures.select(seen & ~validation),
        validation=pictures.select(seen & validation),
        folder=folder,
        seed=seed,
    )
    stages.place_concepts(run)
    return run


def train_tower(name: str, arguments: argparse.Namespace) -> None:
    """Run one of the two stages that do not need each other."""
    torch.set_num_threads(1 if name == "words" else 2)  # words is done long before
    getattr(stages, name)(prepare(arguments.data, arguments.run, arguments.seed), getattr(arguments, name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/pictures"), help="what build_pictures.py wrote")
    parser.add_argument("--run", type=Path, default=Path("runs/default"), help="folder of state and learning curve")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint (default: RUN/checkpoint)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--words", type=int, default=150_000, help="texts of stage 1 (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=620_000, help="pictures of stage 2 (default: %(default)s)")
    parser.add_argument("--locked", type=int, default=350_000, help="texts of stage 3 (default: %(default)s)")
    parser.add_argument("--joint", type=int, default=92_160, help="pairs of stage 4 (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        run = prepare(arguments.data, arguments.run, arguments.seed)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stages.console.print(
        f"{len(run.train)} pictures to train on, {len(run.validation)} to validate, {len(run.captions.texts)} texts, "
        f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.1f} million parameters"
    )
    # Each tower alone, in a process of its own; here their last state is then only read back.
    towers = torch.multiprocessing.get_context("spawn")
    workers = [towers.Process(target=train_tower, args=(name, arguments)) for name in ("words", "pictures")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        return 1
    for name in ("words", "pictures"):
        getattr(stages, name)(run, getattr(arguments, name))
    stages.locked(run, arguments.locked)
    stages.joint(run, arguments.joint)
    export(run.model, run.folder / "spiece.model", arguments.out or run.folder / "checkpoint")
    return 0


if __name__ == "__main__":
    sys.exit(main())
