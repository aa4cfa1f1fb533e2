"""Train the embedded checkpoint: a small SigLIP, from nothing, on the pictures of build_pictures.py.

Usage: python scripts/checkpoints/train_default.py [--data data/pictures] [--run runs/default] [--minutes 200]

State is saved as it goes: start it again with the same --run and it goes on. More pictures of the same concepts may be
built in between. The learning curve is RUN/learning_curve.jsonl. The held-out styles and the held-out concepts'
pictures are never read.
"""

from __future__ import annotations

import argparse
import sys

import torch

from drawings.teacher import embed_names, whitened
from recipe import stages
from recipe.captions import TEXT_LENGTH, Captions, Encoder, build_vocabulary
from recipe.export import export
from recipe.run import Run, for_training
from recipe.start import add_options, read_data, train
from siglip_hf import SiglipConfig, SiglipModel

WIDTH = 192
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 3}
#: Stages with their shares of the minutes. The first two run side by side.
TOWERS = {stages.words: 0.21, stages.pictures: 0.58}
TOGETHER = {stages.locked: 0.12, stages.joint: 0.3}


def make_config(vocab_size: int) -> SiglipConfig:
    """A 64-pixel, 6 + 4 block SigLIP of about 7 million parameters."""
    text = SHAPE | {"num_hidden_layers": 4, "vocab_size": vocab_size, "max_position_embeddings": TEXT_LENGTH}
    vision = SHAPE | {"num_hidden_layers": 6, "image_size": 64, "patch_size": 16}
    return SiglipConfig(text_config=text, vision_config=vision)


def prepare(arguments: argparse.Namespace) -> Run:
    """Read the pictures, make the vocabulary, a new model and the concepts' vectors."""
    data, folder = read_data(arguments), arguments.run
    captions = Captions(data.concepts)
    vocabulary = folder / "spiece.model"
    if not vocabulary.exists():
        build_vocabulary(captions, vocabulary)
    encoder = Encoder(vocabulary)
    torch.manual_seed(arguments.seed)
    model = SiglipModel(make_config(encoder.pieces.get_piece_size()))
    run = Run(
        model=for_training(model).to(arguments.device),
        concepts=data.concepts,
        captions=captions,
        encoder=encoder,
        train=data.train,
        validation=data.validation,
        probe=data.probe,
        folder=folder,
        seed=arguments.seed,
        every=arguments.every,
    )
    meanings = whitened(embed_names(data.concepts, folder / "meanings.npy")) if arguments.teacher else None
    stages.place_concepts(run, meanings)
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "runs/default", 200)
    parser.add_argument("--no-teacher", dest="teacher", action="store_false", help="place concepts by captions only")
    arguments = parser.parse_args()
    try:
        run = train(prepare, TOWERS, TOGETHER, arguments)
    except (FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stages.calibrate(run, stages.embed_pictures(run, run.validation))
    export(run.model, run.folder / "spiece.model", arguments.out or run.folder / "checkpoint")
    return 0


if __name__ == "__main__":
    sys.exit(main())
