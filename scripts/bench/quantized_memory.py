"""Memory of the weights with 4-bit linear layers, stock transformers against this package, per published shape.

The models are made without memory (on PyTorch's meta device) and their bytes counted as bitsandbytes stores them: half
a byte per weight of a quantized layer and 4 bytes of scale per 64 of them, 2 bytes (bfloat16) for all else. Stock
leaves the attention of the pooling head as it is: it has no plain `nn.Linear` there.

    python scripts/bench/quantized_memory.py [PRESET ...]
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from transformers.models.siglip import SiglipConfig as StockConfig
from transformers.models.siglip.modeling_siglip import SiglipModel as StockModel

import siglip_hf

DEFAULT = ["siglip-base-patch16-224", "siglip-so400m-patch14-384"]


def four_bit_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of all weights, and of those in `vision_model.head` alone."""
    quantized = {id(m.weight) for m in model.modules() if type(m) is nn.Linear}
    total = head = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() // 2 + parameter.numel() // 16 if id(parameter) in quantized else 2 * parameter.numel()
        total += size
        head += size if name.startswith("vision_model.head.") else 0
    return total, head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=DEFAULT)
    print("| preset | bfloat16 | 4 bits, stock | 4 bits, siglip_hf | pooling head, stock | pooling head, siglip_hf |")
    print("|---|---|---|---|---|---|")
    for name in parser.parse_args().presets:
        config = siglip_hf.SiglipConfig.from_preset(name)
        with torch.device("meta"):
            stock = StockModel(StockConfig(**config.to_dict()))
            ours = siglip_hf.SiglipModel(config)
        plain = 2 * sum(parameter.numel() for parameter in ours.parameters())
        (stock_total, stock_head), (total, head) = four_bit_bytes(stock), four_bit_bytes(ours)
        cells = (plain, stock_total, total, stock_head, head)
        print(f"| {name} | " + " | ".join(f"{cell / 1e6:.1f} MB" for cell in cells) + " |")


if __name__ == "__main__":
    main()
