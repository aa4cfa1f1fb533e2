"""The steps of gpu.py: each a function that yields one row per figure, on a GPU or, with tiny shapes, on a CPU."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.siglip.configuration_siglip import SiglipConfig as StockConfig
from transformers.models.siglip.modeling_siglip import SiglipModel as StockModel
from transformers.models.siglip.modeling_siglip import SiglipVisionModel as StockVisionModel
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig as StockNaflexConfig
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel as StockNaflexModel

import siglip_hf
from common import in_turn, machine, noise_picture
from embed import write_base, write_photos
from gpu import Options, row
from naflex import SIZES
from siglip_hf.inference.optimize.compiled import CompiledBlock
from siglip_hf.inference.optimize.optimization import Optimization, compile_blocks
from siglip_hf.losses import tiles

PRESETS = ("siglip-base-patch16-224", "siglip-so400m-patch14-384")
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
Row = dict[str, Any]


def environment(options: Options) -> Iterator[Row]:
    """The machine, and the rates that the others are shares of."""
    yield row("machine", machine(options.device, ("torch", "transformers", "triton", "siglip-kernel")))
    yield row("CUDA of torch", str(torch.version.cuda))
    rates = {"products": products_rate(options), "copies": copy_rate(options)}
    Path(options.folder, "rates.json").write_text(json.dumps(rates))
    yield row("products in bfloat16", rates["products"] / 1e12, "TFLOP/s")
    yield row("copies on the device", rates["copies"] / 1e12, "TB/s")


def parity(options: Options) -> Iterator[Row]:
    """Both towers against stock with the same weights, in three dtypes; and whether float16 is wide enough."""
    for preset in PRESETS:
        ours, stock = joint_pair(joint_config(preset, options), options.device)
        config = ours.config
        side, length = config.vision_config.image_size, config.text_config.max_position_embeddings
        pixels = torch.randn(4, 3, side, side, device=options.device)
        ids = torch.randint(config.text_config.vocab_size, (4, length), device=options.device)
        with torch.inference_mode():
            exact = unit(stock, pixels, ids)
            for dtype, aim in ((torch.float32, 1 - 1e-5), (torch.bfloat16, 0.999), (torch.float16, 0.9999)):
                both = [model.to(dtype) for model in (ours, stock)]
                got, theirs = (unit(model, pixels.to(dtype), ids) for model in both)
                cosine = (got * exact).sum(dim=-1).min().item()
                name = f"{preset}, {dtype}".replace("torch.", "")
                yield row(f"{name}: least cosine to stock in float32", cosine, at_least=aim)
                yield row(f"{name}: stock's own", (theirs * exact).sum(dim=-1).min().item())
                largest = largest_activation(ours, pixels.to(dtype))
                yield row(f"{name}: largest activation", largest, at_most=torch.finfo(torch.float16).max)


def tests(options: Options) -> Iterator[Row]:
    """All tests marked `gpu`; in the rehearsal they are only collected, from one file."""
    import pytest

    root = Path(__file__).parents[2]
    os.chdir(root)
    counts: dict[str, int] = {}

    class Counter:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] = counts.get(report.outcome, 0) + 1

        def pytest_collection_finish(self, session: Any) -> None:
            counts["collected"] = len(session.items)

    arguments = ["-m", "gpu", "-q", "-p", "no:cacheprovider"]
    arguments += ["--collect-only", "tests/losses/test_loss.py"] if options.tiny else ["tests"]
    code = pytest.main(arguments, plugins=[Counter()])
    found = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    passed = int(code) == 0 and counts.get("collected", 0) > 0
    yield row("tests marked gpu", found, holds=("none failed", passed))


def loss(options: Options) -> Iterator[Row]:
    """Time and memory of the loss at 65,536 pairs against the peers, and of our three forms and other tiles."""
    from loss import FORMS, siglip_kernel_loss

    batch, repeats = (96, 1) if options.tiny else (65_536, 5)
    forms: dict[str, Callable[..., torch.Tensor]] = {"ours": siglip_hf.sigmoid_loss, **FORMS}
    if options.device != "cpu" and importlib.util.find_spec("siglip_kernel"):
        forms = {"ours": forms.pop("ours"), "siglip_kernel": siglip_kernel_loss, **forms}
    times: dict[str, float] = {}
    for name, form in forms.items():
        for found in measured_loss(name, form, batch, options, repeats, None, 0.64 if name == "ours" else None):
            yield found
            times.setdefault(name, found["value"])
        if name == "siglip_kernel" and all(isinstance(value, float) for value in times.values()):
            ratio = times["ours"] / times[name]
            yield row(f"loss, {batch:,}: ours / siglip-kernel, time", ratio, at_most=1)
    chosen = tiles._form
    for kind in ("inductor", "plain"):  # triton is what "ours" is on a GPU
        if kind == "inductor" and options.device == "cpu":
            continue
        tiles._form = lambda device, dtype, kind=kind: kind
        yield from measured_loss(f"ours, {kind}", siglip_hf.sigmoid_loss, batch, options, repeats)
    tiles._form = chosen
    for side in (32,) if options.tiny else (5632, 8192, 16384):

        def with_side(*inputs: torch.Tensor, side: int = side) -> torch.Tensor:
            return siglip_hf.sigmoid_loss(*inputs, chunk_size=side)

        yield from measured_loss(f"ours, tiles of {side}", with_side, batch, options, repeats)


def large_loss(options: Options) -> Iterator[Row]:
    """The loss at the paper's extremes."""
    for batch, repeats in ((128, 1), (160, 1)) if options.tiny else ((262_144, 2), (1_048_576, 1)):
        bounds = (10.0, 8.0) if batch == 1_048_576 else (None, None)
        yield from measured_loss("ours", siglip_hf.sigmoid_loss, batch, options, repeats, *bounds)


def measured_loss(
    name: str,
    form: Callable[..., torch.Tensor],
    batch: int,
    options: Options,
    repeats: int,
    most_seconds: float | None = None,
    most_memory: float | None = None,
) -> list[Row]:
    """Two rows, seconds and GB above the inputs; a form that does not fit or fails says so in one."""
    from loss import measure

    what = f"loss, {batch:,}: {name}"
    try:
        found = measure(form, batch, 32 if options.tiny else 768, options.device, torch.bfloat16, repeats)
    except (RuntimeError, ImportError) as error:
        return [row(what, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")]
    finally:
        if options.device != "cpu":
            torch.cuda.empty_cache()
    memory = row(f"{what}, above the inputs", found["bytes"] / 1e9, "GB", at_most=most_memory)
    return [row(what, found["seconds"], "s", at_most=most_seconds), memory]


def towers(options: Options) -> Iterator[Row]:
    """Image towers: stock, stock compiled, flash, ours plain and optimized, as share of the products' rate."""
    rate = json.loads(Path(options.folder, "rates.json").read_text())["products"]
    for preset in reversed(PRESETS):
        for batch in (1, 2) if options.tiny else (64, 1):
            yield from one_tower(preset, batch, rate, options)


def one_tower(preset: str, batch: int, rate: float, options: Options) -> Iterator[Row]:
    """One tower and batch: for each contender the rate, over stock's, and the share; the slow compilers come last."""
    config = joint_config(preset, options).vision_config
    ours, stock = vision_pair(config, options.device)
    optimized, report = copy.deepcopy(ours), Optimization("bfloat16", torch.get_num_threads())
    if options.tiny:
        CompiledBlock.backend = "eager"
    compile_blocks(optimized, torch.bfloat16, report)  # what `siglip_hf.optimize` does on a GPU
    side = config.image_size
    pixels = torch.randn(batch, 3, side, side, device=options.device, dtype=torch.bfloat16)
    contenders = {"stock sdpa": stock, "ours": ours, "ours, optimized": optimized}
    if options.device != "cpu" and importlib.util.find_spec("flash_attn"):
        for name, model in (("stock", stock), ("ours", ours)):
            flash = copy.deepcopy(model)
            flash.set_attn_implementation("flash_attention_2")
            contenders[f"{name}, flash"] = flash
    compiled = torch.compile(copy.deepcopy(stock), backend="eager" if options.tiny else "inductor", dynamic=False)
    base = None
    with torch.inference_mode():
        for group in (contenders, {"stock sdpa": stock, "stock, compiled": compiled}):
            calls = {name: lambda model=model: model(pixel_values=pixels) for name, model in group.items()}
            rounds = 1 if options.tiny else 15
            for name, spent in in_turn(calls, rounds, warm_up=3, device=options.device).items():
                if name == "stock sdpa":
                    base = spent
                    if group is not contenders:
                        continue
                assert base is not None
                what = f"{preset}, batch {batch}: {name}"
                yield row(what, batch / spent, "images/s")
                aimed = preset == PRESETS[1] and batch > 1 and name == "ours, optimized" and not options.tiny
                yield row(what, base / spent, "x stock sdpa", at_least=1.2 if aimed else None)
                share = batch * operations(config) / spent / rate
                yield row(what, share, "of the products' rate", at_least=0.55 if aimed else None)
    for note in report.notes:
        yield row(f"{preset}, batch {batch}: optimize says", note)


def naflex(options: Options) -> Iterator[Row]:
    """A mixed batch through the NaFlex tower: stock, ours padded, ours packed."""
    fields = siglip_hf.NAFLEX_PRESETS["siglip2-base-patch16-naflex"][1] | (TINY if options.tiny else {})
    ours = siglip_hf.Siglip2VisionModel(siglip_hf.Siglip2VisionConfig(**fields)).eval()
    stock = StockNaflexModel(StockNaflexConfig(**fields)).eval()
    stock.load_state_dict(stock_state(ours))
    rng = np.random.default_rng(0)
    sizes = SIZES[-4:-1] if options.tiny else SIZES
    pictures = [noise_picture(rng, width, height) for height, width in sizes]
    budgets = [min(1024, -(-height // 16) * -(-width // 16)) for height, width in sizes]
    found = siglip_hf.Siglip2ImageProcessorFast()(pictures, max_num_patches=budgets, return_tensors="pt")
    inputs = {name: value.to(options.device) for name, value in found.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    ours, stock = (model.to(options.device, torch.bfloat16) for model in (ours, stock))
    calls = {
        "stock": lambda: stock(**inputs).pooler_output,
        "ours, padded": lambda: ours(**inputs).pooler_output,
        "ours, packed": lambda: ours(**inputs, packed=True).pooler_output,
    }
    with torch.inference_mode():
        exact = calls["stock"]().float()
        for name in list(calls)[1:]:
            cosine = torch.cosine_similarity(calls[name]().float(), exact).min().item()
            yield row(f"NaFlex, {name}: least cosine to stock", cosine, at_least=0.999)
        times = in_turn(calls, 1 if options.tiny else 15, warm_up=3, device=options.device)
    for name, spent in times.items():
        yield row(f"NaFlex, {len(pictures)} pictures, {name}", len(pictures) / spent, "pictures/s")
        yield row(f"NaFlex, {len(pictures)} pictures, {name}", times["stock"] / spent, "x stock")


def folder(options: Options) -> Iterator[Row]:
    """JPEG files to embeddings, end to end, against the tower alone and the decoder alone."""
    with tempfile.TemporaryDirectory() as name:
        count = 8 if options.tiny else 4096
        write_photos(Path(name, "photos"), count, (320, 240))
        model = siglip_hf.default_checkpoint() if options.tiny else write_base(Path(name, "base"))
        embedder = siglip_hf.SiglipEmbedder(model, device=options.device, batch_size=4 if options.tiny else 256)
        files = sorted(str(file) for file in Path(name, "photos").iterdir())
        from PIL import Image

        def decoded(file: str) -> Image.Image:
            picture = Image.open(file)
            picture.load()
            return picture

        batch = embedder.prepare_images(decoded(file) for file in files[: embedder.batch_size])
        batches = -(-count // embedder.batch_size)

        def tower() -> None:
            for _ in range(batches):
                embedder.encode_images(batch)

        rates = {}
        for what, run in (("tower alone", tower), ("folder to embeddings", lambda: embedder.embed_images(files))):
            if not options.tiny:
                run()
            start = time.perf_counter()
            run()
            rates[what] = count / (time.perf_counter() - start)
            yield row(f"JPEG, {what}", rates[what], "pictures/s")
        nothing = np.zeros((embedder.batch_size, embedder.dimension), np.float32)
        embedder.encode_images = lambda inputs: nothing[: len(inputs["pixel_values"])]
        start = time.perf_counter()
        embedder.embed_images(files)
        rates["decoder alone"] = count / (time.perf_counter() - start)
        yield row("JPEG, decoder alone", rates["decoder alone"], "pictures/s")
        slower = min(("tower alone", "decoder alone"), key=lambda what: rates[what])
        share = rates["folder to embeddings"] / rates[slower]
        yield row(f"JPEG, share of the slower, {slower}", share, at_least=0.95)


def four_bit(options: Options) -> Iterator[Row]:
    """Memory and speed with 4-bit linear layers."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield row("4 bits", "bitsandbytes is not installed here")
        return
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as name:
        source = siglip_hf.default_checkpoint() if options.tiny else write_base(Path(name, "base"), text_layers=12)
        plain = siglip_hf.SiglipModel.from_pretrained(source, dtype=torch.bfloat16).to(options.device).eval()
        small = siglip_hf.SiglipModel.from_pretrained(
            source, dtype=torch.bfloat16, quantization_config=settings, device_map=options.device
        ).eval()
        side = plain.config.vision_config.image_size
        pixels = torch.randn(2 if options.tiny else 64, 3, side, side, device=options.device, dtype=torch.bfloat16)
        models = {"bfloat16": plain, "4 bits": small}
        with torch.inference_mode():
            calls = {name: lambda model=model: model.encode_image(pixels) for name, model in models.items()}
            cosine = torch.cosine_similarity(*(call().float() for call in calls.values())).min().item()
            times = in_turn(calls, 1 if options.tiny else 10, warm_up=1, device=options.device)
        yield row("4 bits: least cosine to bfloat16", cosine)
        for name, model in models.items():
            yield row(f"{name}: memory of the weights", model.get_memory_footprint() / 1e6, "MB")
            yield row(f"{name}: images", len(pixels) / times[name], "images/s")


def training(options: Options) -> Iterator[Row]:
    """Training steps of base shapes: towers under autocast, the loss, AdamW."""
    config = joint_config(PRESETS[0], options)
    model = siglip_hf.SiglipModel(config).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=options.device != "cpu")
    side, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    batch = 4 if options.tiny else 256
    pixels = torch.randn(batch, 3, side, side, device=options.device)
    ids = torch.randint(config.text_config.vocab_size, (batch, length), device=options.device)
    losses = []

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16):
            value = model(input_ids=ids, pixel_values=pixels, return_loss=True).loss
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())

    spent = in_turn({"step": step}, 2 if options.tiny else 10, warm_up=2, device=options.device)["step"]
    yield row(f"training, base-patch16-224, batch {batch}", batch / spent, "pairs/s")
    first, last = losses[0].item(), losses[-1].item()
    yield row(
        "training, loss of the first step and of the last", f"{first:.3f}, {last:.3f}", holds=("falls", last < first)
    )


def checkpoint(options: Options) -> Iterator[Row]:
    """The embedded checkpoints' training, if at least two minutes are left; the rehearsal asks for its help text."""
    script = Path(__file__).parents[1] / "checkpoints" / "make_checkpoint.py"
    minutes = (options.seconds - 60) / 60
    if not options.tiny and (minutes < 1 or importlib.util.find_spec("resvg_py") is None):
        yield row("checkpoint", "not trained: no time was left, or resvg-py is not installed")
        return
    arguments = ["--help"] if options.tiny else ["--minutes", f"{min(10, minutes):.1f}", "--device", options.device]
    subprocess.run([sys.executable, script, *arguments], check=True)
    yield row("checkpoint", "help text" if options.tiny else f"trained for {min(10, minutes):.1f} minutes, see runs/")


def products_rate(options: Options) -> float:
    """Floating-point operations per second of a bfloat16 product; its operands are larger than any cache."""
    side = 256 if options.tiny else 8192
    left, right = (torch.randn(side, side, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    spent = in_turn({"product": lambda: left @ right}, 10, warm_up=3, device=options.device)["product"]
    return 2 * side**3 / spent


def copy_rate(options: Options) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.randn(10_000 if options.tiny else 2**29, device=options.device)
    target = torch.empty_like(source)
    spent = in_turn({"copy": lambda: target.copy_(source)}, 10, warm_up=3, device=options.device)["copy"]
    return 2 * source.numel() * source.itemsize / spent


def operations(config: Any) -> float:
    """Floating-point operations of the encoder's products for one picture."""
    rows, columns = config.patch_grid
    tokens, width = rows * columns, config.hidden_size
    linear = 4 * width * width + 2 * width * config.intermediate_size
    return 2.0 * config.num_hidden_layers * tokens * (linear + 2 * tokens * width)


def joint_config(preset: str, options: Options) -> Any:
    """A preset's configuration, or one of a few numbers for the rehearsal."""
    if not options.tiny:
        return siglip_hf.SiglipConfig.from_preset(preset)
    text = TINY | {"vocab_size": 64, "max_position_embeddings": 8}
    return siglip_hf.SiglipConfig(text_config=text, vision_config=TINY | {"image_size": 32, "patch_size": 16})


def stock_state(ours: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights under stock's names: the pooling head's projections in one tensor."""
    state = ours.state_dict()
    for name in [name for name in state if ".attention.q_proj." in name and "head." in name]:
        parts = [state.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return state


def joint_pair(config: Any, device: str) -> tuple[Any, Any]:
    """Ours and stock with the same random weights, in float32."""
    with torch.device(device):
        ours, stock = siglip_hf.SiglipModel(config).eval(), StockModel(StockConfig(**config.to_dict())).eval()
    stock.load_state_dict(stock_state(ours))
    return ours, stock


def vision_pair(config: Any, device: str) -> tuple[Any, Any]:
    """The image towers likewise, in bfloat16."""
    stock_config = StockConfig(vision_config=config.to_dict()).vision_config
    with torch.device(device):
        ours, stock = siglip_hf.SiglipVisionModel(config).eval(), StockVisionModel(stock_config).eval()
    stock.load_state_dict(stock_state(ours))
    return ours.to(torch.bfloat16), stock.to(torch.bfloat16)


def unit(model: Any, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Unit embeddings of pictures and texts, in float32."""
    output = model(input_ids=ids, pixel_values=pixels)
    embeds = torch.cat([output.image_embeds, output.text_embeds]).float()
    return embeds / embeds.norm(dim=-1, keepdim=True)


def largest_activation(model: Any, pixels: torch.Tensor) -> float:
    """The largest number that any layer of the image tower gives; infinite or NaN after an overflow."""
    found: list[torch.Tensor] = []

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            found.append(output.detach().abs().max().float())

    layers = [part for part in model.vision_model.modules() if not list(part.children())]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        model.encode_image(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found).max().item()
