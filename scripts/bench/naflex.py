"""NaFlex side by side with stock: image processor, forward of a mixed batch, and the share of the position resize.

Targets: processor at least 3x stock's, forward at least 1.3x by packing, positions under 1 % of the forward. Each
picture of `SIZES` has a budget of as many patches as it has pixels for, up to `--budget`: enlarging a thumbnail adds
nothing but cost. Stock's processor knows one budget per call, so the processors are compared at one; both models get
the same padded batch of mixed budgets, which ours packs. Outputs are compared before anything is timed. Contestants
take turns; the numbers are medians.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from PIL import Image
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig as StockConfig
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel as StockModel

from common import in_turn, machine, noise_picture
from siglip_hf import (
    NAFLEX_PRESETS,
    Siglip2ImageProcessor,
    Siglip2ImageProcessorFast,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)
from siglip_hf.models.naflex import resized_positions

# Height and width in pixels: photographs, a panorama, an upright strip, documents, thumbnails.
SIZES = (
    (480, 640),
    (427, 640),
    (640, 427),
    (256, 1024),
    (1000, 120),
    (500, 375),
    (1200, 900),
    (240, 320),
    (224, 224),
    (300, 200),
    (120, 160),
    (96, 128),
    (64, 64),
    (48, 48),
    (375, 500),
    (160, 90),
)


def bench_processors(pictures: list[Image.Image], budget: int, rounds: int) -> None:
    """Pictures to patches with one budget, as stock can."""
    stock, slow, fast = Siglip2ImageProcessorPil(), Siglip2ImageProcessor(), Siglip2ImageProcessorFast()
    options = {"max_num_patches": budget, "return_tensors": "pt"}
    reference = stock(pictures, **options)["pixel_values"]
    assert torch.equal(slow(pictures, **options)["pixel_values"], reference)
    assert (fast(pictures, **options)["pixel_values"] - reference).abs().max() < 1.001 / 127.5
    times = in_turn(
        {
            "stock": lambda: stock(pictures, **options),
            "slow": lambda: slow(pictures, **options),
            "fast": lambda: fast(pictures, **options),
        },
        rounds,
        warm_up=2,
    )
    per_picture = {name: seconds / len(pictures) * 1000 for name, seconds in times.items()}
    print(f"\nprocessor, budget {budget}, ms per picture")
    print(f"  stock (Pillow) {per_picture['stock']:.2f}, ours (Pillow) {per_picture['slow']:.2f}, ", end="")
    print(f"ours (torch) {per_picture['fast']:.2f}")
    print(f"  ratios {times['stock'] / times['slow']:.2f}x (Pillow), {times['stock'] / times['fast']:.2f}x (torch)")


@torch.no_grad()
def bench_forward(pictures: list[Image.Image], budget: int, layers: int, rounds: int) -> None:
    """A mixed batch through the vision tower of base width, and the part of it that resizes positions."""
    fields = NAFLEX_PRESETS["siglip2-base-patch16-naflex"][1] | {"num_hidden_layers": layers}
    torch.manual_seed(0)
    ours = Siglip2VisionModel(Siglip2VisionConfig(**fields)).eval()
    stock = StockModel(StockConfig(**fields)).eval()
    state = ours.state_dict()
    for kind in ("weight", "bias"):
        parts = [state.pop(f"head.attention.{name}_proj.{kind}") for name in "qkv"]
        state[f"head.attention.in_proj_{kind}"] = torch.cat(parts)
    stock.load_state_dict(state)

    budgets = [min(budget, math.ceil(height / 16) * math.ceil(width / 16)) for height, width in SIZES]
    inputs = dict(Siglip2ImageProcessorFast()(pictures, max_num_patches=budgets, return_tensors="pt"))
    expected = stock(**inputs).pooler_output
    for packed in (False, True):
        assert (ours(**inputs, packed=packed).pooler_output - expected).abs().max() < 1e-4
    length = inputs["pixel_values"].shape[1]
    shapes = inputs["spatial_shapes"][:, None].expand(-1, length, -1)
    embeddings, stock_embeddings = ours.embeddings, stock.embeddings
    table = stock_embeddings.position_embedding.weight.view(16, 16, -1)
    patch_ids = torch.arange(length).expand(len(pictures), -1) % inputs["spatial_shapes"].prod(dim=1, keepdim=True)

    def our_positions() -> torch.Tensor:
        return resized_positions(embeddings.position_embedding.weight, (16, 16), shapes, patch_ids)

    def stock_positions() -> torch.Tensor:
        return stock_embeddings.resize_positional_embeddings(table, inputs["spatial_shapes"], length)

    times = in_turn(
        {
            "stock": lambda: stock(**inputs),
            "padded": lambda: ours(**inputs),
            "packed": lambda: ours(**inputs, packed=True),
        },
        rounds,
        warm_up=1,
    )
    resize = in_turn({"stock": stock_positions, "ours": our_positions}, 10 * rounds, warm_up=2)
    patches = int(inputs["pixel_attention_mask"].sum())
    whole = 12 / layers  # the forward of the whole model, of which positions are a part
    print(f"\nforward, base width, {layers} of 12 blocks, {len(pictures)} pictures of {min(budgets)} to {max(budgets)}")
    print(f"  patches: {patches}, {patches / (length * len(pictures)):.0%} of the padded batch; seconds")
    print(f"  stock {times['stock']:.2f}, ours padded {times['padded']:.2f}, ours packed {times['packed']:.2f}")
    print(f"  positions: stock {resize['stock'] * 1000:.1f} ms, ours {resize['ours'] * 1000:.1f} ms, ", end="")
    print(f"{resize['ours'] / (times['padded'] * whole):.2%} of a padded forward of 12 blocks")
    print(f"  ratio {times['stock'] / times['padded']:.2f}x (padded), {times['stock'] / times['packed']:.2f}x (packed)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", type=int, default=1024, help="patches of a picture, at most")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model of base width; 12 are the whole")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch; stock's processor has one"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    rng = np.random.default_rng(0)
    pictures = [noise_picture(rng, width, height) for height, width in SIZES]
    for budget in (256, options.budget):
        bench_processors(pictures, budget, options.rounds)
    bench_forward(pictures, options.budget, options.layers, options.rounds)


if __name__ == "__main__":
    main()
