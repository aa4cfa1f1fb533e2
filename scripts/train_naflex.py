"""Train the embedded NaFlex checkpoint on the pictures of scripts/build_pictures.py, from the square checkpoint's eyes.

Usage: python scripts/train_naflex.py [--data data/pictures] [--run runs/naflex] [--out runs/naflex/checkpoint]

About 10 minutes on 2 idle cores. State is saved each minute: start it again with the same --run and it goes on. The
learning curve is RUN/learning_curve.jsonl. The held-out styles and the held-out concepts' pictures are never read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

import siglip_hf
from training_default.captions import TEMPLATES, Captions
from training_default.pictures import read_concepts, read_pictures, read_styles
from training_default.stages import Run, console, words
from training_naflex import stages
from training_naflex.start import BUDGET, SHORT_LENGTH, TEXT_LENGTH, VOCABULARY_SIZE, concept_table, start_from
from training_naflex.vocabulary import Encoder, gemma_tokenizer

#: The stages that train one tower each.
TOWERS = {"canvases": stages.canvases, "words": words}


def prepare(data: Path, folder: Path, square_folder: str, seed: int) -> Run:
    """Read the pictures, make the vocabulary and the concepts' vectors, and start the model."""
    concepts = read_concepts(data)
    for concept in concepts:
        kept = {language: caption for language, caption in concept["captions"].items() if language in stages.JOINED}
        concept["captions"] = kept
    captions = Captions(concepts)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "tokenizer.json"
    if not vocabulary.exists():
        texts = [text.words for text in captions.texts]
        texts += [template.format(text.words) for text in captions.texts[::5] for template in TEMPLATES[text.language]]
        gemma_tokenizer(texts, VOCABULARY_SIZE).save(str(vocabulary))
    pictures, validation = read_pictures(data, read_styles(data, "train"), concepts)
    seen = torch.tensor([concept["split"] == "train" for concept in concepts])[pictures.concept]
    torch.manual_seed(seed)
    square = siglip_hf.SiglipModel.from_pretrained(square_folder, dtype=torch.float32).eval()
    run = Run(
        model=start_from(square),  # type: ignore[arg-type]
        concepts=concepts,
        captions=captions,
        encoder=Encoder(vocabulary, SHORT_LENGTH),  # type: ignore[arg-type]
        train=pictures.select(seen & ~validation),
        validation=pictures.select(seen & validation),
        folder=folder,
        seed=seed,
    )
    path = folder / "table.pt"
    if not path.exists():
        tokenizer = siglip_hf.SiglipTokenizer.from_pretrained(square_folder)
        torch.save(
            concept_table(
                square,
                lambda texts: tokenizer(texts, return_tensors="pt")["input_ids"],
                concepts,
                captions,
                run.train,
            ),
            path,
        )
    run.table = torch.load(path)
    return run


def train_tower(name: str, arguments: argparse.Namespace) -> None:
    """Run one of the two stages that do not need each other."""
    torch.set_num_threads(1)
    run = prepare(arguments.data, arguments.run, arguments.square, arguments.seed)
    TOWERS[name](run, getattr(arguments, name))


def export(run: Run, out: Path) -> None:
    """Save model, tokenizer and image processor to `out`, half precision, in the published format.

    Raises:
        RuntimeError: The model reads padded texts otherwise than it did in training.
    """
    tokenizer = siglip_hf.Siglip2Tokenizer(
        tokenizer_object=Tokenizer.from_file(str(run.folder / "tokenizer.json")), model_max_length=TEXT_LENGTH
    )
    model = run.model.finished()
    sample = ["a photo of a cat", "Flagge: Österreich", "une fusée", ""]
    with torch.no_grad():
        embeds = model.encode_text(tokenizer(sample, return_tensors="pt")["input_ids"])
        if not torch.allclose(embeds, run.model.encode_text(run.encoder(sample)), atol=1e-4):
            raise RuntimeError("texts of 64 tokens and the short ones of the training get different embeddings")
    tokenizer.save_pretrained(out)
    patch_size = model.config.vision_config.patch_size
    siglip_hf.Siglip2ImageProcessor(patch_size=patch_size, max_num_patches=BUDGET).save_pretrained(out)
    model.half().save_pretrained(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/pictures"), help="what build_pictures.py wrote")
    parser.add_argument("--run", type=Path, default=Path("runs/naflex"), help="folder of state and learning curve")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint (default: RUN/checkpoint)")
    parser.add_argument("--square", default=siglip_hf.default_checkpoint(), help="checkpoint to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--canvases", type=int, default=33_000, help="pictures of stage 1 (default: %(default)s)")
    parser.add_argument("--words", type=int, default=220_000, help="texts of stage 1 (default: %(default)s)")
    parser.add_argument("--joint", type=int, default=15_000, help="pairs of stage 2 (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        run = prepare(arguments.data, arguments.run, arguments.square, arguments.seed)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(
        f"{len(run.train)} pictures to train on, {len(run.validation)} to validate, {len(run.captions.texts)} texts, "
        f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} million parameters"
    )
    # Each tower alone, in a process of its own; here their last state is then only read back.
    towers = torch.multiprocessing.get_context("spawn")
    workers = [towers.Process(target=train_tower, args=(name, arguments)) for name in TOWERS]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        return 1
    for name, stage in TOWERS.items():
        stage(run, getattr(arguments, name))
    stages.joint(run, arguments.joint)
    export(run, arguments.out or run.folder / "checkpoint")
    return 0


if __name__ == "__main__":
    sys.exit(main())
