"""Tries stock transformers and this package on the same tasks, and writes docs/compatibility.md.

Each side runs in a process of its own, since importing this package changes what the Auto classes load. A row ends as
"works", as "fails" (an error), or as "wrong" (no error, but not what was asked for).

    python scripts/check_compatibility.py [--output docs/compatibility.md]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SHAPE | {
    "vocab_size": 96,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VISION = SHAPE | {"image_size": 32, "patch_size": 8}
PACKAGES = ("transformers", "torch", "accelerate", "bitsandbytes", "peft", "torchao")

ROWS: list[tuple[str, str, Callable[[Any], None]]] = []


class WrongResult(Exception):
    """No error, but not what was asked for."""


def check(condition: Any, otherwise: str) -> None:
    """Raises `WrongResult` unless the condition holds."""
    if not condition:
        raise WrongResult(otherwise)


def row(area: str, title: str) -> Callable:
    """Makes a function a row of the table. It gets a `Bench`, and returns where all is well."""

    def register(function: Callable[[Any], None]) -> Callable:
        ROWS.append((area, title, function))
        return function

    return register


class Bench:
    """A tiny SigLIP with random weights, as a checkpoint and as inputs, for one row."""

    def __init__(self, folder: Path):
        import torch
        import transformers

        self.torch, self.transformers, self.folder = torch, transformers, folder
        torch.manual_seed(0)
        self.config = transformers.AutoConfig.for_model("siglip", text_config=dict(TEXT), vision_config=dict(VISION))
        self.input_ids = torch.randint(2, 96, (3, 16))
        self.pixels = torch.randn(2, 3, 32, 32)
        self.inputs = {"input_ids": self.input_ids, "pixel_values": self.pixels}
        self.checkpoint = folder / "joint"
        self.model = self.filled(transformers.AutoModel.from_config(self.config))
        self.model.save_pretrained(self.checkpoint)

    def filled(self, model: Any) -> Any:
        """The model in eval mode, with all weights random."""
        for name, parameter in model.named_parameters():
            std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "embedding" not in name else 0.3
            self.torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=std)
        return model.eval()

    def load(self, **kwargs: Any) -> Any:
        """The checkpoint through AutoModel."""
        return self.transformers.AutoModel.from_pretrained(self.checkpoint, **kwargs)

    def same(self, model: Any, tolerance: float = 1e-4) -> None:
        """Checks that a model gives the logits of the plain one."""
        with self.torch.no_grad():
            difference = model(**self.inputs).logits_per_image - self.model(**self.inputs).logits_per_image
        check(difference.abs().max() <= tolerance, f"logits differ by {difference.abs().max():.2g}")


# --- accelerate -----------------------------------------------------------------------------------------------------


@row("sharding", 'device_map="auto", half on disk')
def _(bench: Bench) -> None:
    memory = {"cpu": bench.model.get_memory_footprint() // 2}
    bench.same(bench.load(device_map="auto", max_memory=memory, offload_folder=bench.folder / "offload"))


@row("sharding", 'device_map={"": "disk"}')
def _(bench: Bench) -> None:
    bench.same(bench.load(device_map={"": "disk"}, offload_folder=bench.folder / "offload"))


@row("sharding", "pooling head alone on disk")
def _(bench: Bench) -> None:
    parts = ("embeddings", "encoder", "post_layernorm")
    device_map = {"logit_scale": "cpu", "logit_bias": "cpu", "text_model": "cpu", "vision_model.head": "disk"}
    device_map |= {f"vision_model.{part}": "cpu" for part in parts}
    bench.same(bench.load(device_map=device_map, offload_folder=bench.folder / "offload"))


@row("sharding", "cpu_offload of a model in memory")
def _(bench: Bench) -> None:
    import accelerate

    bench.same(accelerate.cpu_offload(bench.load(), execution_device="cpu"))


@row("sharding", "disk_offload, and other picture sizes")
def _(bench: Bench) -> None:
    import accelerate

    pixels = bench.torch.randn(2, 3, 48, 40)
    tower = bench.load().vision_model
    expected = tower(pixels, interpolate_pos_encoding=True).pooler_output
    accelerate.disk_offload(tower, bench.folder / "offload", execution_device="cpu")
    output = tower(pixels, interpolate_pos_encoding=True).pooler_output
    check((output - expected).abs().max() < 1e-4, "outputs differ")


# --- bitsandbytes ---------------------------------------------------------------------------------------------------


def _four_bit(bench: Bench, **kwargs: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **kwargs)


def _linear_bytes(bench: Bench, model: Any, name: str) -> bool:
    """Whether the weights below a module are stored in floating point."""
    weights = [p for n, p in model.get_submodule(name).named_parameters() if n.endswith("weight")]
    return any(p.is_floating_point() and p.ndim == 2 for p in weights)


@row("bitsandbytes", "4 bits: every linear layer, the pooling head's too")
def _(bench: Bench) -> None:
    model = bench.load(quantization_config=_four_bit(bench), device_map="auto")
    check(
        not _linear_bytes(bench, model, "vision_model.head.attention"), "the head's attention stays in full precision"
    )


@row("bitsandbytes", "4 bits: a new classifier stays as it is")
def _(bench: Bench) -> None:
    model = bench.transformers.AutoModelForImageClassification.from_pretrained(
        bench.checkpoint, quantization_config=_four_bit(bench), device_map="auto", num_labels=3
    )
    check(type(model.classifier) is bench.torch.nn.Linear, "the untrained classifier is quantized")


@row("bitsandbytes", "4 bits: saved after use on a CPU, loads equal")
def _(bench: Bench) -> None:
    model = bench.load(quantization_config=_four_bit(bench), device_map="auto")
    with bench.torch.no_grad():
        expected = model(**bench.inputs).image_embeds
        model.save_pretrained(bench.folder / "saved")
        reloaded = bench.transformers.AutoModel.from_pretrained(bench.folder / "saved", device_map="auto")
        difference = (reloaded(**bench.inputs).image_embeds - expected).abs().max()
    check(difference == 0, f"embeddings differ by {difference:.2g}")


@row("bitsandbytes", "4 bits: saved, loaded, saved again")
def _(bench: Bench) -> None:
    bench.load(quantization_config=_four_bit(bench)).save_pretrained(bench.folder / "saved")
    bench.transformers.AutoModel.from_pretrained(bench.folder / "saved").save_pretrained(bench.folder / "again")


@row("bitsandbytes", "4 bits: the width of so400m's MLP (4304) on a CPU")
def _(bench: Bench) -> None:
    config = bench.transformers.AutoConfig.for_model(
        "siglip", text_config=dict(TEXT), vision_config=VISION | {"intermediate_size": 4304}
    )
    bench.filled(bench.transformers.AutoModel.from_config(config)).save_pretrained(bench.folder / "wide")
    model = bench.transformers.AutoModel.from_pretrained(bench.folder / "wide", quantization_config=_four_bit(bench))
    with bench.torch.no_grad():
        model(**bench.inputs)


@row("bitsandbytes", "8 bits: every linear layer, loads equal")
def _(bench: Bench) -> None:
    quantization = bench.transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = bench.load(quantization_config=quantization, device_map="auto")
    with bench.torch.no_grad():
        expected = model(**bench.inputs).image_embeds
        model.save_pretrained(bench.folder / "saved")
        reloaded = bench.transformers.AutoModel.from_pretrained(bench.folder / "saved", device_map="auto")
        check((reloaded(**bench.inputs).image_embeds - expected).abs().max() == 0, "embeddings differ")
    check(
        not _linear_bytes(bench, model, "vision_model.head.attention"), "the head's attention stays in full precision"
    )


# --- PEFT -----------------------------------------------------------------------------------------------------------


def _adapted(bench: Bench, **kwargs: Any) -> Any:
    import peft

    return peft.get_peft_model(bench.load(), peft.LoraConfig(r=4, **kwargs))


def _loss(bench: Bench, model: Any) -> Any:
    return model(input_ids=bench.input_ids[:2], pixel_values=bench.pixels, return_loss=True).loss


@row("LoRA", "default target modules")
def _(bench: Bench) -> None:
    _loss(bench, _adapted(bench)).backward()


@row("LoRA", 'target_modules="all-linear": every adapter learns')
def _(bench: Bench) -> None:
    model = _adapted(bench, target_modules="all-linear")
    _loss(bench, model).backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    check(not idle, f"no gradient for {len(idle)} of them, e.g. {idle[0].split('.lora')[0] if idle else ''}")


@row("LoRA", 'modules_to_save=["logit_scale"]: trained, or refused')
def _(bench: Bench) -> None:
    try:
        options = {"target_modules": ["q_proj"], "modules_to_save": ["logit_scale"]}
        if "siglip_hf" in sys.modules:  # it has a function of its own that makes the configuration, and checks it
            sys.modules["siglip_hf"].lora_config(bench.load(), **options)
        model = _adapted(bench, **options)
    except ValueError:
        return
    check(any(p.requires_grad for n, p in model.named_parameters() if "logit_scale" in n), "ignored in silence")


# --- torchao --------------------------------------------------------------------------------------------------------


def _torchao_round_trip(bench: Bench, config: Any) -> None:
    from transformers import TorchAoConfig

    model = bench.load(quantization_config=TorchAoConfig(config))
    with bench.torch.no_grad():
        expected = model(**bench.inputs).image_embeds
        model.save_pretrained(bench.folder / "saved")
        reloaded = bench.transformers.AutoModel.from_pretrained(bench.folder / "saved")
        check((reloaded(**bench.inputs).image_embeds - expected).abs().max() == 0, "embeddings differ")


@row("torchao", "int8 weights: save and load")
def _(bench: Bench) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    _torchao_round_trip(bench, Int8WeightOnlyConfig())


@row("torchao", "int8 weights and activations: save and load")
def _(bench: Bench) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    _torchao_round_trip(bench, Int8DynamicActivationInt8WeightConfig())


@row("torchao", "int4 weights: save and load")
def _(bench: Bench) -> None:
    from torchao.quantization import IntxWeightOnlyConfig

    _torchao_round_trip(bench, IntxWeightOnlyConfig(weight_dtype=bench.torch.int4))


# --- compile, export ------------------------------------------------------------------------------------------------


@row("compile", "fullgraph, one graph for all batch sizes")
def _(bench: Bench) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    backend = CompileCounterWithBackend("eager")
    compiled = bench.torch.compile(bench.model, fullgraph=True, dynamic=True, backend=backend)
    with bench.torch.no_grad():
        for size in (5, 8, 3, 6):  # first, sizes that no other dimension has
            compiled(
                input_ids=bench.torch.ones(size, 16, dtype=int), pixel_values=bench.torch.randn(size + 1, 3, 32, 32)
            )
    check(backend.frame_count == 1, f"{backend.frame_count} graphs")


def _export(bench: Bench, dynamic: dict, **extra: Any) -> None:
    # At another text length than the usual, as an example for dynamic lengths has to be.
    inputs = {"input_ids": bench.input_ids[:, :8], "pixel_values": bench.torch.randn(2, 3, 48, 40)} | extra
    if not extra:
        inputs = dict(bench.inputs)
    program = bench.torch.export.export(bench.model, (), inputs, dynamic_shapes=dynamic).module()
    other = {"input_ids": bench.torch.ones(5, 16, dtype=int), "pixel_values": bench.torch.randn(4, 3, 32, 32)} | extra
    if extra:
        other["input_ids"], other["pixel_values"] = other["input_ids"][:, :11], bench.torch.randn(4, 3, 64, 72)
    with bench.torch.no_grad():
        difference = program(**other).logits_per_image - bench.model(**other).logits_per_image
    check(difference.abs().max() < 1e-4, "outputs differ")


@row("export", "torch.export with dynamic batch")
def _(bench: Bench) -> None:
    free = bench.torch.export.Dim.DYNAMIC
    _export(bench, {"input_ids": {0: free}, "pixel_values": {0: free}})


@row("export", "torch.export with dynamic text length, height and width")
def _(bench: Bench) -> None:
    free = bench.torch.export.Dim.DYNAMIC
    sizes = {"input_ids": {0: free, 1: free}, "pixel_values": {0: free, 2: free, 3: free}}
    _export(bench, sizes | {"interpolate_pos_encoding": None}, interpolate_pos_encoding=True)


# --- outputs --------------------------------------------------------------------------------------------------------


@row("outputs", "output_attentions under sdpa")
def _(bench: Bench) -> None:
    attentions = bench.model.vision_model(bench.pixels, output_attentions=True).attentions
    check(attentions and len(attentions) == 2, f"returns {attentions!r} in silence")


@row("outputs", "attention weights of the pooling head")
def _(bench: Bench) -> None:
    output = bench.model.vision_model(bench.pixels, output_attentions=True)
    check(output.get("cross_attentions") is not None, "not available")


@row("outputs", "from_pretrained(output_hidden_states=True)")
def _(bench: Bench) -> None:
    output = bench.load(output_hidden_states=True)(**bench.inputs)
    check(output.vision_model_output.hidden_states is not None, "does not reach the towers")


@row("outputs", "pictures without texts")
def _(bench: Bench) -> None:
    check(bench.model(pixel_values=bench.pixels).image_embeds is not None, "no embeddings")


@row("outputs", "vision_use_head=False in the joint model")
def _(bench: Bench) -> None:
    config = bench.transformers.AutoConfig.for_model(
        "siglip", text_config=dict(TEXT), vision_config=VISION | {"vision_use_head": False}
    )
    output = bench.transformers.AutoModel.from_config(config)(**bench.inputs)
    check(output.text_embeds is not None, "no text embeddings")


# --- classification -------------------------------------------------------------------------------------------------


def _classifier(bench: Bench, **kwargs: Any) -> Any:
    return bench.transformers.AutoModelForImageClassification.from_pretrained(bench.checkpoint, **kwargs)


@row("classification", "integer multi-hot labels")
def _(bench: Bench) -> None:
    model = _classifier(bench, num_labels=3, problem_type="multi_label_classification")
    model(bench.pixels, labels=bench.torch.tensor([[1, 0, 1], [0, 0, 0]])).loss.backward()


@row("classification", "num_labels=0")
def _(bench: Bench) -> None:
    _classifier(bench, num_labels=0)(bench.pixels)


@row("classification", "from a vision-only checkpoint")
def _(bench: Bench) -> None:
    bench.model.vision_model.save_pretrained(bench.checkpoint)
    tokens = bench.model.vision_model(bench.pixels).last_hidden_state
    model = _classifier(bench, num_labels=3)
    check((model(bench.pixels).logits - model.classifier(tokens.mean(1))).abs().max() < 1e-4, "weights not loaded")


@row("classification", "another picture size than the checkpoint's")
def _(bench: Bench) -> None:
    config = bench.transformers.AutoConfig.for_model(
        "siglip", text_config=dict(TEXT), vision_config=VISION | {"image_size": 64}, num_labels=3
    )
    pixels = bench.torch.randn(2, 3, 64, 64)
    model = _classifier(bench, config=config, ignore_mismatched_sizes=True)
    tokens = model.vision_model(pixels).last_hidden_state
    expected = bench.model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    check((tokens - expected).abs().max() < 1e-3, "position embeddings are random, not resized")


def run_rows() -> list[dict[str, str]]:
    """All rows in this process."""
    results = []
    for area, title, function in ROWS:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            try:
                function(Bench(Path(folder)))
                result, detail = "works", ""
            except WrongResult as error:
                result, detail = "wrong", str(error)
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                detail = f"{type(error).__name__}: {lines[0].split('. ')[0]}".replace("`", "'").strip(": ")
                result, detail = "fails", detail if len(detail) < 100 else f"{detail[:97]}..."
        results.append({"area": area, "title": title, "result": result, "detail": detail})
    return results


def run_side(side: str) -> list[dict[str, str]]:
    """All rows in a process of their own."""
    done = subprocess.run([sys.executable, __file__, "--side", side], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the {side} process failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def markdown(stock: list[dict[str, str]], ours: list[dict[str, str]]) -> str:
    """The page, with the versions and the machine it holds for."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        "# Compatibility",
        "",
        "Stock transformers and this package on the same tasks, with tiny models of random weights. *works*: as asked;",
        "*fails*: an error; *wrong*: no error, but not what was asked for.",
        "",
        f"Made by `python scripts/check_compatibility.py` on a CPU, with {versions}, "
        f"Python {platform.python_version()}.",
        "",
        "| area | task | stock | siglip_hf | what stock does |",
        "|---|---|---|---|---|",
    ]
    for theirs, own in zip(stock, ours, strict=True):
        detail = theirs["detail"].replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {own['area']} | {own['title']} | {theirs['result']} | **{own['result']}** | {detail} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "compatibility.md")
    parser.add_argument("--side", choices=["stock", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        warnings.simplefilter("ignore")
        if arguments.side == "ours":
            import siglip_hf  # noqa: F401
        print(json.dumps(run_rows()))
        return
    stock, ours = run_side("stock"), run_side("ours")
    width = max(len(entry["title"]) for entry in ours)
    for theirs, own in zip(stock, ours, strict=True):
        print(f"{own['area']:15} {own['title']:{width}} {theirs['result']:6} {own['result']:6} {own['detail']}")
    # What follows the table is written by hand.
    before = arguments.output.read_text() if arguments.output.exists() else ""
    _, heading, rest = before.partition("\n## ")
    arguments.output.write_text(markdown(stock, ours) + heading + rest)


if __name__ == "__main__":
    main()
