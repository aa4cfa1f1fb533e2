"""Towers on a CPU: stock transformers, open_clip, timm, ONNX Runtime and OpenVINO against ours, plain and optimized.

Base-patch16-224, random weights (the same in stock, ours and the exported models), the same inputs. All contenders
take turns, so that the machine's moods hit all alike; the numbers are medians. The limit is what the tower's products
alone would allow, at the highest rate measured here for one of them. The ratios are printed last.

    python scripts/bench/towers.py                                   # the towers; a table
    python scripts/bench/towers.py --compile --plot docs/img/towers.svg --json docs/img/towers.json
    python scripts/bench/towers.py --memory                          # peak memory of loading and of inference
    python scripts/bench/towers.py --profile                         # where the time of the optimized tower goes

Needs `pip install "siglip-hf[export]" openvino`, and open_clip and timm without their dependencies (they import
torchvision for training, for which a stand-in serves here): `pip install --no-deps open_clip_torch timm ftfy`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.models.siglip.modeling_siglip import SiglipModel as StockModel

import siglip_hf
from common import machine
from siglip_hf.inference.optimize.packed import PackedLinear
from stand_in import import_peer

PRESET = "siglip-base-patch16-224"
PEERS = ("torch", "transformers", "openvino", "onnxruntime", "open_clip_torch", "timm")
VOCABULARY = 1000  # its size costs memory, not time
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMIT = "limit of the products"
OURS, PLAIN, STOCK = "siglip_hf.optimize", "siglip_hf", "transformers sdpa"
Contender = Callable[[torch.Tensor], Any]
clock = time.perf_counter


def products_rate(dtype: torch.dtype, width: int, intermediate: int) -> float:
    """The most floating-point operations per second of one of the encoder's products, on packed weights."""
    best = 0.0
    for inputs, outputs in ((width, 3 * width), (width, width), (width, intermediate), (intermediate, width)):
        layer = torch.nn.Linear(inputs, outputs)
        packed, states = PackedLinear(layer, dtype=dtype), torch.randn(3136, inputs).to(dtype)
        times = []
        for _ in range(40):
            start = clock()
            packed(states)
            times.append(clock() - start)
        best = max(best, 2 * states.shape[0] * inputs * outputs / statistics.median(times))
    return best


def operations(config: Any, tokens: int) -> float:
    """Floating-point operations of a tower's products over all tokens: encoder with attention, patch projection."""
    width, layers = config.hidden_size, config.num_hidden_layers
    linear = 4 * width * width + 2 * width * config.intermediate_size
    patches = config.num_channels * config.patch_size**2 * width if hasattr(config, "patch_size") else 0
    return 2.0 * tokens * (layers * (linear + 2 * tokens * width) + patches)


def _pooled(module: Any) -> Contender:
    return lambda batch: module(batch).pooler_output


def torch_contenders(folder: str, tower: str, dtype: torch.dtype, compiled: bool) -> dict[str, Contender]:
    """Stock and ours, loaded from one folder."""
    encode = "encode_image" if tower == "image" else "encode_text"
    found: dict[str, Contender] = {}
    for attention in ("eager", "sdpa"):
        stock = StockModel.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
        module = stock.vision_model if tower == "image" else stock.text_model
        found[f"transformers {attention}"] = _pooled(module)
    if compiled:
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor

        inductor.freezing = True
        dynamo.recompile_limit = 64  # towers, dtypes and batch sizes share code; beyond 8 it would run uncompiled
        found["transformers, torch.compile"] = _pooled(torch.compile(module, dynamic=False))
    plain = siglip_hf.SiglipModel.from_pretrained(folder, dtype=dtype).eval()
    optimized = siglip_hf.optimize(copy.deepcopy(plain), dtype)
    assert optimized.optimization.packed_blocks, optimized.optimization.notes
    if dtype == torch.bfloat16:
        in_int8 = siglip_hf.optimize(copy.deepcopy(plain), dtype, int8=True)
        assert in_int8.optimization.packed_blocks, in_int8.optimization.notes
        found[f"{OURS}, int8"] = getattr(in_int8, encode)
    found[PLAIN] = getattr(plain, encode)
    found[OURS] = getattr(optimized, encode)
    return found


def peer_contenders(tower: str, dtype: torch.dtype) -> dict[str, Contender]:
    """open_clip and timm: the same architecture with weights of their own."""
    found: dict[str, Contender] = {}
    if (open_clip := import_peer("open_clip")) is not None:
        model = open_clip.create_model("ViT-B-16-SigLIP", pretrained=None, load_weights=False).to(dtype).eval()
        found["open_clip"] = model.encode_image if tower == "image" else model.encode_text
    if tower == "image" and (timm := import_peer("timm")) is not None:
        found["timm"] = (
            timm.create_model("vit_base_patch16_siglip_224", pretrained=False, num_classes=0).to(dtype).eval()
        )
    return found


def exported_contenders(folder: str, tower: str, dtype: torch.dtype, threads: int) -> dict[str, Contender]:
    """ONNX Runtime (float32 only: it has no bfloat16 on CPUs) and OpenVINO, on the model that `export` writes."""
    found: dict[str, Contender] = {}
    path = str(Path(folder, "onnx", "vision.onnx" if tower == "image" else "text.onnx"))
    name = "pixel_values" if tower == "image" else "input_ids"
    if dtype == torch.float32 and importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found["ONNX Runtime"] = lambda batch: session.run(None, {name: batch.numpy()})
    if importlib.util.find_spec("openvino"):
        import openvino

        hints = {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = openvino.compile_model(path, "CPU", hints)
        found["OpenVINO"] = lambda batch: compiled(
            batch.float().numpy() if batch.is_floating_point() else batch.numpy()
        )
    return found


def measure(contenders: dict[str, Contender], batch: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn, after a warm-up. What cannot do it is left out, with a line."""
    seconds: dict[str, list[float]] = {}
    with torch.inference_mode():
        for name, run in contenders.items():
            try:
                run(batch)
                seconds[name] = []
            except (RuntimeError, TypeError, ValueError) as error:
                print(f"{name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
        for _ in range(rounds):
            for name in seconds:
                start = clock()
                contenders[name](batch)
                seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def save_model(folder: str, with_onnx: bool) -> Any:
    """Writes the model with random weights, and what `export` makes of it; returns its configuration."""
    torch.manual_seed(0)
    config = siglip_hf.SiglipConfig.from_preset(PRESET)
    config.text_config.vocab_size = VOCABULARY
    config.text_config.pad_token_id = config.text_config.eos_token_id = config.text_config.bos_token_id = 1
    model = siglip_hf.SiglipModel(config).eval()
    model.save_pretrained(folder)
    if with_onnx:
        from siglip_hf.integrations.onnx import export_onnx

        export_onnx(model, Path(folder, "onnx"))
    return config


def run_towers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of {tower, dtype, batch, contender, per_second}."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = save_model(folder, with_onnx=not options.torch_only)
        for dtype_name in options.dtypes:
            dtype = DTYPES[dtype_name]
            for tower in options.towers:
                part = config.vision_config if tower == "image" else config.text_config
                tokens = 196 if tower == "image" else 64
                rate = products_rate(dtype, part.hidden_size, part.intermediate_size)
                limit = rate / operations(part, tokens)
                print(f"{tower} {dtype_name}: products at {rate / 1e9:.0f} GFLOP/s allow {limit:.1f}/s", flush=True)
                contenders = torch_contenders(folder, tower, dtype, options.compile) | peer_contenders(tower, dtype)
                if not options.torch_only:
                    contenders |= exported_contenders(folder, tower, dtype, options.threads)
                for size in options.batches:
                    if tower == "image":
                        batch = torch.randn(size, 3, 224, 224).to(dtype)
                    else:
                        batch = torch.randint(2, VOCABULARY, (size, 64))
                    times = measure(contenders, batch, options.rounds)
                    speeds = {name: size / seconds for name, seconds in times.items()} | {LIMIT: limit}
                    print(
                        tower, dtype_name, size, {name: round(speed, 2) for name, speed in speeds.items()}, flush=True
                    )
                    rows += [
                        {"tower": tower, "dtype": dtype_name, "batch": size, "contender": name, "per_second": speed}
                        for name, speed in speeds.items()
                    ]
    return rows


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Per second for each contender and batch, then ours over each of the others."""
    console = Console(width=120)
    groups = list(dict.fromkeys((row["tower"], row["dtype"]) for row in rows))
    for ratio in (False, True):
        for tower, dtype in groups:
            chosen = [row for row in rows if (row["tower"], row["dtype"]) == (tower, dtype)]
            speeds = {(row["contender"], row["batch"]): row["per_second"] for row in chosen}
            batches = list(dict.fromkeys(row["batch"] for row in chosen))
            unit = f"{OURS} is so many times as fast" if ratio else ("images/s" if tower == "image" else "texts/s")
            table = Table(f"{tower} tower, {dtype}: {unit}", *(f"batch {size}" for size in batches))
            for name in dict.fromkeys(row["contender"] for row in chosen):
                cells = []
                for size in batches:
                    speed = speeds.get((name, size))
                    if speed is not None and ratio:
                        speed = speeds[OURS, size] / speed
                    cells.append("" if speed is None else f"{speed:.2f}")
                table.add_row(name, *cells)
            console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Batch size against pictures per second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows if row["tower"] == "image"))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5.5 * len(dtypes), 4.2), squeeze=False)
    names = list(dict.fromkeys(row["contender"] for row in rows if row["tower"] == "image"))
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for index, name in enumerate(names):
            points = [
                (row["batch"], row["per_second"])
                for row in rows
                if (row["tower"], row["dtype"], row["contender"]) == ("image", dtype, name)
            ]
            if points:
                style = {"color": "black", "linestyle": ":"} if name == LIMIT else {"color": f"C{index % 10}"}
                if name == OURS:
                    style |= {"linewidth": "3"}
                axis.plot(*zip(*points, strict=True), label=name, marker=None if name == LIMIT else "o", **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({row["batch"] for row in rows}), sorted({row["batch"] for row in rows}))
        axis.set(title=f"base-patch16-224, {dtype}", xlabel="batch size", ylabel="images/s", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


_MEMORY_PROGRAM = """
import pathlib, threading, time, torch, siglip_hf
def mebibytes(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
own = []  # without the pages of mapped files, which the kernel takes back when it needs them; it keeps no peak of these
def watch():
    while True:
        own.append(mebibytes("RssAnon"))
        time.sleep(0.001)
torch.set_num_threads({threads})
siglip_hf.SiglipVisionModel._from_config(siglip_hf.SiglipVisionConfig(num_hidden_layers=1))(torch.zeros(1, 3, 224, 224))
before, own_before = mebibytes("VmHWM"), mebibytes("RssAnon")
threading.Thread(target=watch, daemon=True).start()
model = siglip_hf.SiglipModel.from_pretrained({folder!r}, dtype=torch.bfloat16).eval()
if {optimized}: siglip_hf.optimize(model, torch.bfloat16)
with torch.inference_mode(): model.encode_image(torch.zeros({batch}, 3, 224, 224, dtype=torch.bfloat16))
print(mebibytes("VmHWM") - before, max(own) - own_before)
"""


def print_memory(threads: int) -> None:
    """Peak memory above the bare process, from loading to inference in bfloat16, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, with_onnx=False)
        model = siglip_hf.SiglipModel.from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        weights = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
        config = model.config.vision_config
        table = Table(
            "peak MiB above the bare process", "weights", "activations", "own memory", "/ both", "with the mapped file"
        )
        for optimized in (False, True):
            for batch in (1, 16):
                program = _MEMORY_PROGRAM.format(threads=threads, folder=folder, optimized=optimized, batch=batch)
                output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
                resident, own = map(float, output.stdout.split()[-2:])
                # What a block has at once: its input, the normalized input, the MLP's inner states and the output.
                states = batch * 196 * (3 * config.hidden_size + config.intermediate_size) * 2 / 2**20
                states += batch * 3 * 224 * 224 * 2 / 2**20
                name = f"{OURS if optimized else PLAIN}, batch {batch}"
                share = own / (weights + states)
                table.add_row(name, *(f"{n:.0f}" for n in (weights, states, own)), f"{share:.2f}", f"{resident:.0f}")
        Console(width=120).print(table)


def print_profile(dtype: torch.dtype, batch: int) -> None:
    """The operators that take the optimized image tower's time."""
    config = siglip_hf.SiglipConfig.from_preset(PRESET)
    config.text_config.vocab_size = VOCABULARY
    model = siglip_hf.optimize(siglip_hf.SiglipModel(config).eval().vision_model, dtype)
    pixels = torch.randn(batch, 3, 224, 224).to(dtype)
    with torch.inference_mode():
        model(pixels)
        with torch.profiler.profile() as profiler:
            for _ in range(3):
                model(pixels)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    table = Table(f"operator ({str(dtype)[6:]}, batch {batch})", "ms per picture", "share")
    for event in events[:8]:
        spent = event.self_cpu_time_total
        table.add_row(event.key, f"{spent / 1000 / 3 / batch:.2f}", f"{spent / total:.1%}")
    rest = sum(event.self_cpu_time_total for event in events[8:])
    table.add_row("the rest", f"{rest / 1000 / 3 / batch:.2f}", f"{rest / total:.1%}")
    Console(width=100).print(table)


def main() -> None:
    """Parses the options, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", choices=("image", "text"), default=["image", "text"])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="also torch.compile of stock; takes minutes to compile")
    parser.add_argument("--torch-only", action="store_true", help="without ONNX Runtime and OpenVINO")
    parser.add_argument("--json", type=Path, help="write the rows here; rows there of other runs are kept")
    parser.add_argument("--plot", type=Path, help="draw batch size against images/s")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--profile", action="store_true", help="a profile instead of speed")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, and its seconds of CPU time: steady on a busy machine"
    )
    options = parser.parse_args()
    if options.cpu_time:
        global clock
        clock, options.threads = time.process_time, 1
    torch.set_num_threads(options.threads)
    print(machine(packages=PEERS))
    if options.memory:
        return print_memory(options.threads)
    if options.profile:
        for name in options.dtypes:
            print_profile(DTYPES[name], options.batches[-1])
        return None
    rows = run_towers(options)
    if options.json:
        identity = ("tower", "dtype", "batch", "contender")
        kept = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
        fresh = {tuple(row[key] for key in identity) for row in rows}
        rows = [row for row in kept if tuple(row[key] for key in identity) not in fresh] + rows
        rows.sort(key=lambda row: (row["tower"], row["dtype"], row["batch"]))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine(packages=PEERS), "rows": rows}, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)
    print_tables(rows)
    return None


if __name__ == "__main__":
    main()
