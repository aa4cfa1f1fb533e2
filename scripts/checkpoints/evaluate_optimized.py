"""What `siglip_hf.optimize` costs in accuracy: the embedded checkpoint's evaluation, plain, in bfloat16 and in int8.

Usage: python scripts/checkpoints/evaluate_optimized.py [--data data/pictures]

The measures are those of evaluate_default.py, on the pictures of build_pictures.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import siglip_hf
from evaluate_default import Evaluator, evaluate
from recipe.pictures import read_concepts

KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.bfloat16, "int8": True},
}
MEASURES = ("10-way, seen concepts", "10-way, unseen concepts", "top-1 of all plain concepts")


class _InFloat32:
    """A model whose embeddings are float32 again, as the measures compute with them."""

    def __init__(self, model: Any):
        self.model = model
        self.logit_scale, self.logit_bias = model.logit_scale.float(), model.logit_bias.float()

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(pixel_values).float()

    def encode_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(input_ids).float()


def main() -> None:
    """Evaluates three times and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/pictures"), help="what build_pictures.py wrote")
    options = parser.parse_args()
    evaluator = Evaluator(siglip_hf.default_checkpoint(), read_concepts(options.data))
    results = {"float32": evaluate(evaluator, options.data)[0]}
    for kind, arguments in KINDS.items():
        evaluator = Evaluator(siglip_hf.default_checkpoint(), evaluator.concepts)
        report = siglip_hf.optimize(evaluator.model, **arguments).optimization
        assert report.packed_blocks, report.notes
        evaluator.model = _InFloat32(evaluator.model)  # type: ignore[assignment]
        results[kind] = evaluate(evaluator, options.data)[0]
        print(f"{kind}: least cosine of the probe {report.cosine:.5f}")
    table = Table("percent", *results)
    for style in results["float32"]:
        for measure in (name for name in MEASURES if name in results["float32"][style]):
            table.add_row(f"{style}: {measure}", *(f"{result[style][measure]:.1f}" for result in results.values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
