"""Image towers on a GPU: stock transformers against ours, compiled or not, and in a CUDA graph.

so400m-patch14-384 and base-patch16-224 in bfloat16, random weights (the same in both), the same pictures. All take
turns; the numbers are medians of CUDA's own clock. The product of two large matrices gives the rate that the last
column is a share of. Aims: ours at least 1.2 times stock sdpa, and at least 55% of that rate.

    python scripts/bench/gpu.py                                     # on a GPU; some minutes
    python scripts/bench/gpu.py --flash                             # with flash-attn installed: stock's flash too
    python scripts/bench/gpu.py --device cpu --layers 1 --batches 1 --rounds 1 --presets siglip-base-patch16-224
                                                                    # that the script runs; its times mean nothing
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.models.siglip.modeling_siglip import SiglipVisionModel as StockModel

import siglip_hf

PRESETS = ("siglip-base-patch16-224", "siglip-so400m-patch14-384")
STOCK = "transformers sdpa"


def seconds(run: Callable[[], Any], device: str) -> float:
    """Time of one call, by CUDA's events where there are any."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def in_turn(contenders: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of each, after three calls to warm up and compile."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(seconds(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def products_rate(device: str) -> float:
    """Floating-point operations per second of a bfloat16 product: 8192 x 8192 on a GPU."""
    side = 8192 if device != "cpu" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / in_turn({"product": lambda: left @ right}, device, 10)["product"]


def operations(config: Any) -> float:
    """Floating-point operations of the encoder's products for one picture."""
    rows, columns = config.patch_grid
    tokens, width = rows * columns, config.hidden_size
    linear = 4 * width * width + 2 * width * config.intermediate_size
    return 2.0 * config.num_hidden_layers * tokens * (linear + 2 * tokens * width)


def in_graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """The call recorded as a CUDA graph: the same kernels on the same memory, without Python between them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def contenders_of(folder: str, pixels: torch.Tensor, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Stock and ours from one folder, as calls without arguments."""

    def call(model: Any) -> Callable[[], Any]:
        return lambda: model(pixels).pooler_output

    def load(model_class: Any, attention: str) -> Any:
        model = model_class.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention)
        return model.eval().to(options.device)

    found = {}
    for attention in ("sdpa", "flash_attention_2") if options.flash else ("sdpa",):
        name = attention.partition("_")[0]
        stock, ours = load(StockModel, attention), load(siglip_hf.SiglipVisionModel, attention)
        found[f"transformers {name}"] = call(stock)
        found[f"siglip_hf {name}"] = call(ours)
    stock, ours = load(StockModel, "sdpa"), load(siglip_hf.SiglipVisionModel, "sdpa")
    if options.device != "cpu":
        found["siglip_hf sdpa, CUDA graph"] = in_graph(call(ours))
        found["transformers sdpa, compiled"] = call(torch.compile(stock, mode="max-autotune"))
        found["siglip_hf sdpa, compiled"] = call(torch.compile(ours, mode="max-autotune"))
    return found


def main() -> None:
    """Parses the options, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, help="fewer blocks than the preset has, to try the script")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--flash", action="store_true", help="flash_attention_2 too, which must be installed")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        print("there is no GPU here; --device cpu with small sizes tries the script itself")
        return
    name = torch.cuda.get_device_name() if options.device != "cpu" else "CPU"
    rate = products_rate(options.device)
    console = Console(width=120)
    console.print(f"{name}, torch {torch.__version__}; products in bfloat16: {rate / 1e12:.1f} TFLOP/s")
    with torch.inference_mode():
        for preset in options.presets:
            config = siglip_hf.SiglipConfig.from_preset(preset).vision_config
            config.num_hidden_layers = options.layers or config.num_hidden_layers
            for batch in options.batches:
                with tempfile.TemporaryDirectory() as folder:
                    siglip_hf.SiglipVisionModel(config).save_pretrained(folder)
                    side = config.image_size
                    pixels = torch.randn(batch, 3, side, side, device=options.device, dtype=torch.bfloat16)
                    times = in_turn(contenders_of(folder, pixels, options), options.device, options.rounds)
                table = Table(f"{preset}, batch {batch}", "images/s", f"/ {STOCK}", "share of the products' rate")
                for contender, spent in times.items():
                    share = batch * operations(config) / spent / rate
                    table.add_row(contender, f"{batch / spent:.1f}", f"{times[STOCK] / spent:.2f}", f"{share:.0%}")
                console.print(table)


if __name__ == "__main__":
    main()
