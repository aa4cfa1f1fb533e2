"""Train the embedded NaFlex checkpoint on the pictures of build_pictures.py, from the square checkpoint's eyes.

Usage: python scripts/checkpoints/train_naflex.py [--data data/pictures] [--run runs/naflex] [--square FOLDER]

State is saved as it goes: start it again with the same --run and it goes on. The learning curve is
RUN/learning_curve.jsonl. The held-out styles and the held-out concepts' pictures are never read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

import siglip_hf
from recipe import naflex_stages, stages
from recipe.captions import TEMPLATES, Captions
from recipe.naflex_start import BUDGET, SHORT_LENGTH, TEXT_LENGTH, VOCABULARY_SIZE, concept_table, start_from
from recipe.naflex_vocabulary import Encoder, gemma_tokenizer
from recipe.run import Run, for_training
from recipe.start import add_options, read_data, train

#: Stages with their shares of the minutes. The first two run side by side.
TOWERS = {stages.words: 0.75, naflex_stages.canvases: 0.75}
TOGETHER = {naflex_stages.joint: 0.25}


def prepare(arguments: argparse.Namespace) -> Run:
    """Read the pictures, make the vocabulary and the concepts' vectors, and start the model."""
    data, folder = read_data(arguments), arguments.run
    captions = Captions(data.concepts)
    vocabulary = folder / "tokenizer.json"
    if not vocabulary.exists():
        texts = [text.words for text in captions.texts]
        texts += [template.format(text.words) for text in captions.texts[::5] for template in TEMPLATES[text.language]]
        gemma_tokenizer(texts, VOCABULARY_SIZE).save(str(vocabulary))
    torch.manual_seed(arguments.seed)
    square = siglip_hf.SiglipModel.from_pretrained(arguments.square, dtype=torch.float32).eval()
    run = Run(
        model=for_training(start_from(square)).to(arguments.device),
        concepts=data.concepts,
        captions=captions,
        encoder=Encoder(vocabulary, SHORT_LENGTH),
        train=data.train,
        validation=data.validation,
        probe=data.probe,
        folder=folder,
        seed=arguments.seed,
        every=arguments.every,
    )
    path = folder / "table.pt"
    if not path.exists():
        tokenizer = siglip_hf.SiglipTokenizer.from_pretrained(arguments.square)
        torch.save(
            concept_table(
                square.to(arguments.device),
                lambda texts: tokenizer(texts, return_tensors="pt")["input_ids"],
                data.concepts,
                captions,
                data.train,
            ),
            path,
        )
    run.table = torch.load(path, map_location=arguments.device)
    return run


def export(run: Run, out: Path) -> None:
    """Save model, tokenizer and image processor to `out`, half precision, in the published format.

    Raises:
        RuntimeError: The model reads padded texts otherwise than it did in training.
    """
    tokenizer = siglip_hf.Siglip2Tokenizer(
        tokenizer_object=Tokenizer.from_file(str(run.folder / "tokenizer.json")), model_max_length=TEXT_LENGTH
    )
    run.model.cpu()
    model = run.model.finished()
    sample = ["a photo of a cat", "Flagge: Österreich", "une fusée", "고양이", ""]
    with torch.no_grad(), torch.device("cpu"):
        embeds = model.encode_text(tokenizer(sample, return_tensors="pt")["input_ids"])
        if not torch.allclose(embeds, run.model.encode_text(run.encoder(sample)), atol=1e-4):
            raise RuntimeError("texts of 64 tokens and the short ones of the training get different embeddings")
    tokenizer.save_pretrained(out)
    patch_size = model.config.vision_config.patch_size
    siglip_hf.Siglip2ImageProcessor(patch_size=patch_size, max_num_patches=BUDGET).save_pretrained(out)
    model.half().save_pretrained(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "runs/naflex", 40)
    parser.add_argument("--square", default=siglip_hf.default_checkpoint(), help="checkpoint to start from")
    arguments = parser.parse_args()
    try:
        run = train(prepare, TOWERS, TOGETHER, arguments)
        grids = naflex_stages.VALIDATION_GRIDS.values()
        stages.calibrate(run, *(naflex_stages.embed_canvases(run, run.validation, grid) for grid in grids))
        export(run, arguments.out or run.folder / "checkpoint")
    except (FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
