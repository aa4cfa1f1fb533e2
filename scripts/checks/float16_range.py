"""Is float16 wide enough for the image tower? The largest number that any layer gives, for weights of several kinds.

No published weights are needed: the shapes are real, the weights random, as the configuration initializes them or with
heavy tails as trained ones have. Computed in float32, on a CPU in a minute: float16 holds up to 65,504.

    python scripts/checks/float16_range.py [PRESET] [--layers N]
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import siglip_hf

KINDS = (
    "as initialized",
    "Student's t, 3 degrees of freedom",
    "the same, and 1% of the norms' gains 20 times as large",
)


@torch.no_grad()
def make(tower: nn.Module, kind: str) -> None:
    """Changes the weights of the blocks from the first kind to another, each keeping its standard deviation."""
    torch.manual_seed(0)
    for part in tower.modules():
        if kind != KINDS[0] and isinstance(part, nn.Linear):
            # t with 3 degrees of freedom: normal over the root of a third of a sum of three squares; its deviation is
            # the root of 3.
            squares = torch.randn(3, *part.weight.shape).square_().mean(dim=0)
            tails = torch.randn_like(part.weight) / squares.sqrt_()
            part.weight.copy_(tails * (part.weight.std() / 3**0.5))
        if kind == KINDS[2] and isinstance(part, nn.LayerNorm):
            part.weight[torch.randperm(len(part.weight))[: max(1, len(part.weight) // 100)]] *= 20


@torch.inference_mode()
def largest(tower: nn.Module, pixels: torch.Tensor) -> tuple[float, str]:
    """The largest number that a layer gives, and which layer."""
    found: dict[str, float] = {}

    def note(name: str) -> None:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor):
                found[name] = output.abs().max().item()

        tower.get_submodule(name).register_forward_hook(hook)

    for name, _ in tower.named_modules():
        if name:
            note(name)
    tower(pixels)
    name = max(found, key=lambda key: found[key])
    return found[name], name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="siglip-so400m-patch14-384")
    parser.add_argument("--layers", type=int, help="fewer blocks than the preset has")
    options = parser.parse_args()
    config = siglip_hf.SiglipConfig.from_preset(options.preset).vision_config
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    pixels = torch.rand(1, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    print(f"{options.preset}, {config.num_hidden_layers} blocks")
    for kind in KINDS:
        torch.manual_seed(0)
        tower = siglip_hf.SiglipVisionModel(config).eval()
        make(tower, kind)
        value, name = largest(tower, pixels)
        print(
            f"{kind}: {value:.0f} at {name}, {value / torch.finfo(torch.float16).max:.2%} of float16's range",
            flush=True,
        )


if __name__ == "__main__":
    main()
