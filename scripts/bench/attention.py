"""Attention implementations of the image tower side by side, over batch sizes, with a plot of the speed-ups.

Blocks of the tower are alike, so a few of them (`--layers`) show the ratios of the whole. Random weights, the same for
all; outputs are compared before anything is timed. Contestants take turns; the numbers are medians. On a GPU:

    python scripts/bench/attention.py --device cuda --preset siglip-so400m-patch14-384 --layers 27 --dtype float16
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
from pathlib import Path

import torch
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig as StockConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel as StockModel

from common import in_turn, machine
from siglip_hf import SiglipConfig, SiglipVisionModel

# Names of the contestants, in the order of the plot; speed-ups are over the first.
STOCK = "stock, eager"


def build(options: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """The same tower under each attention implementation that this machine has."""
    torch.manual_seed(0)
    config = SiglipConfig.from_preset(options.preset).vision_config
    config.num_hidden_layers = options.layers
    dtype = getattr(torch, options.dtype)
    implementations = ["eager", "sdpa"]
    if options.device.startswith("cuda") and importlib.util.find_spec("flash_attn"):
        implementations.append("flash_attention_2")
    known = StockConfig().to_dict()
    stock_config = StockConfig(**{key: value for key, value in config.to_dict().items() if key in known})
    # A copy of the configuration for each, since it holds the name of the implementation.
    towers: dict[str, torch.nn.Module] = {
        f"siglip_hf, {name}": SiglipVisionModel._from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=name
        )
        for name in implementations
    }
    for name in ("eager", "sdpa"):
        towers[f"stock, {name}"] = StockModel._from_config(
            copy.deepcopy(stock_config), dtype=dtype, attn_implementation=name
        )
    first = next(iter(towers.values()))
    for name, tower in towers.items():
        tower.eval().to(options.device)
        # The pooling head's names differ between the two packages; the blocks, which are timed, are the same.
        tower.load_state_dict(first.state_dict(), strict=name.startswith("siglip_hf"))
    return {STOCK: towers.pop(STOCK), "stock, sdpa": towers.pop("stock, sdpa"), **towers}


def tokens(tower: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Image tokens, (B, N, D)."""
    return tower(pixels).last_hidden_state


@torch.inference_mode()
def measure(towers: dict[str, torch.nn.Module], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per picture of each contestant, for each batch size."""
    side = SiglipConfig.from_preset(options.preset).vision_config.image_size
    per_picture: dict[str, list[float]] = {name: [] for name in towers}
    for batch_size in options.batch_sizes:
        pixels = torch.randn(batch_size, 3, side, side, device=options.device, dtype=getattr(torch, options.dtype))
        expected = tokens(towers[STOCK], pixels).float()
        for name, tower in towers.items():
            error = (tokens(tower, pixels).float() - expected).abs().max().item()
            if error > options.tolerance:
                raise SystemExit(f"{name} differs from {STOCK} by {error:.2g}, more than {options.tolerance:.2g}")
        calls = {name: functools.partial(tokens, tower, pixels) for name, tower in towers.items()}
        for name, spent in in_turn(calls, options.rounds, device=options.device).items():
            per_picture[name].append(spent / batch_size)
    return per_picture


def plot(per_picture: dict[str, list[float]], options: argparse.Namespace, path: Path) -> None:
    """Draws milliseconds per picture and speed-ups over the batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, ratios) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    places = range(len(options.batch_sizes))
    base = per_picture[STOCK]
    for name, values in per_picture.items():
        style = {"marker": "o", "label": name, "linestyle": "--" if name.startswith("stock") else "-"}
        times.plot(places, [1000 * value for value in values], **style)
        ratios.plot(places, [first / value for first, value in zip(base, values, strict=True)], **style)
    times.set(ylabel="ms per picture", ylim=(0, None))
    ratios.set(ylabel=f"times as fast as {STOCK}", ylim=(0, None))
    for axes in (times, ratios):
        axes.set_xticks(list(places), [str(size) for size in options.batch_sizes])
        axes.set(xlabel="batch size")
        axes.grid(alpha=0.3)
    times.legend()
    figure.suptitle(f"{options.preset}, image tower, blocks: {options.layers}, {options.dtype}")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parses the options, measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="siglip-base-patch16-384")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the tower; 12 are all of base")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tolerance", type=float, default=0.1, help="largest difference of tokens that is let pass")
    parser.add_argument("--plot", type=Path, help="picture file to draw")
    options = parser.parse_args()

    per_picture = measure(build(options), options)
    print(f"machine: {machine(options.device)}")
    print(f"{options.preset}, image tower, blocks: {options.layers}, {options.dtype}, median of {options.rounds}")
    print(f"{'ms per picture':28}" + "".join(f"{f'batch {size}':>12}" for size in options.batch_sizes))
    for name, values in per_picture.items():
        print(f"{name:28}" + "".join(f"{1000 * value:12.1f}" for value in values))
    if options.plot:
        plot(per_picture, options, options.plot)
    best = min((name for name in per_picture if name.startswith("siglip_hf")), key=lambda name: per_picture[name][-1])
    print(f"ratio, {best} over {STOCK}: {per_picture[STOCK][-1] / per_picture[best][-1]:.2f}x")


if __name__ == "__main__":
    main()
