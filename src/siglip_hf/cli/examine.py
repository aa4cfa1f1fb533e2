"""What `siglip-hf doctor` tells: versions, hardware, what is registered, and which attention implementations work here.

Nothing is guessed: registrations are read from transformers' own tables, and attention is tried on a tiny model.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import siglip_hf
from siglip_hf import loading
from siglip_hf.files import first_line

CORE_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "accelerate",
    "huggingface-hub",
    "pillow",
    "numpy",
)
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2")

# Instructions that matrix products in bfloat16 and int8 profit from.
_CPU_FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimddp", "bf16", "i8mm", "sve", "sve2"),
)
# How far attention on the device may be from eager's: rounding in the dtype it is tried in.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}

_TASK = "zero-shot-image-classification"
_MODEL_TYPES = (
    *("siglip", "siglip_text_model", "siglip_vision_model"),
    *("siglip2", "siglip2_text_model", "siglip2_vision_model"),
)
# Extras of those who work on this package, not of those who use it.
_DEVELOPERS_EXTRAS = ("bench", "data", "dev", "docs", "peers")
_AUTO_TABLES = {
    "AutoModel": ("modeling_auto", "MODEL_MAPPING"),
    "AutoModelForZeroShotImageClassification": ("modeling_auto", "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING"),
    "AutoModelForImageClassification": ("modeling_auto", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    "AutoTokenizer": ("tokenization_auto", "TOKENIZER_MAPPING"),
    "AutoImageProcessor": ("image_processing_auto", "IMAGE_PROCESSOR_MAPPING"),
    "AutoProcessor": ("processing_auto", "PROCESSOR_MAPPING"),
}


def examine() -> dict[str, Any]:
    """Everything below under one roof, ready for JSON; `problems` lists what keeps the package from working."""
    report = {
        "versions": versions(),
        "hardware": hardware(),
        "registered": registered(),
        "extras": extras(),
        "attention": attention(),
        "speed": speed(),
        "checkpoints": checkpoints(),
    }
    return {**report, "problems": problems(report)}


def versions() -> dict[str, str | None]:
    """This package, Python and the packages it stands on; None for what is not installed."""
    import torch

    from siglip_hf import __version__

    found = {"siglip-hf": __version__, "python": platform.python_version(), "platform": platform.platform()}
    # torch itself tells its build (2.13.0+cu130), which the metadata of some registries' packages leaves out.
    return {**found, **{name: _version(name) for name in CORE_PACKAGES}, "torch": torch.__version__}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """Devices that torch sees, the CPU with the instructions that matter, and threads."""
    import torch

    devices = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(f"cuda:{i} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        devices.append("mps")
    if torch.xpu.is_available():
        devices += [f"xpu:{i} {torch.xpu.get_device_name(i)}" for i in range(torch.xpu.device_count())]
    cpuinfo = _cpuinfo()
    flags = (cpuinfo.get("flags") or cpuinfo.get("Features") or "").split()
    return {
        "devices": [*devices, "cpu"],
        "cpu": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": [feature for feature in _CPU_FEATURES if feature in flags],
        "onednn": torch.backends.mkldnn.is_available(),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    pairs = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def registered() -> dict[str, dict[str, str]]:
    """What each Auto class and the pipeline give for SigLIP: {"AutoModel": {"siglip": "module.Class"}}."""
    from siglip_hf.registration import register

    register()
    auto = "transformers.models.auto"
    configs = importlib.import_module(f"{auto}.configuration_auto").CONFIG_MAPPING
    table: dict[str, dict[str, str]] = {"AutoConfig": {kind: _path(configs[kind]) for kind in _MODEL_TYPES}}
    for auto_class, (module, name) in _AUTO_TABLES.items():
        mapping = getattr(importlib.import_module(f"{auto}.{module}"), name)
        rows = {kind: mapping[configs[kind]] for kind in _MODEL_TYPES if configs[kind] in mapping}
        table[auto_class] = {kind: _path(value) for kind, value in rows.items()}
    implementation = importlib.import_module("transformers.pipelines").check_task(_TASK)[1]["impl"]
    table["pipeline"] = {_TASK: _path(implementation)}
    return table


def _path(value: Any) -> str:
    """The dotted path of a class, or of several (slow and fast); names alone, which load nothing, are left out."""
    if isinstance(value, dict):
        value = tuple(item for item in value.values() if not isinstance(item, str))
    if isinstance(value, tuple | list):
        return ", ".join(_path(item) for item in value if item is not None)
    return value if isinstance(value, str) else f"{value.__module__}.{value.__qualname__}"


def extras() -> dict[str, dict[str, str | None]]:
    """Versions of what each extra for users asks for, {"search": {"faiss-cpu": "1.9.0"}}; None: not installed."""
    from packaging.requirements import Requirement

    metadata = importlib.metadata.metadata("siglip-hf")
    requirements = [Requirement(line) for line in importlib.metadata.requires("siglip-hf") or []]
    return {
        extra: {
            requirement.name: _version(requirement.name)
            for requirement in requirements
            if requirement.marker is not None
            and requirement.marker.evaluate({"extra": extra})
            and not requirement.marker.evaluate({"extra": ""})
        }
        for extra in metadata.get_all("Provides-Extra") or []
        if extra not in _DEVELOPERS_EXTRAS
    }


def attention(implementations: tuple[str, ...] = ATTENTION_IMPLEMENTATIONS) -> dict[str, dict[str, Any]]:
    """Runs a tiny SigLIP under each implementation and compares it with eager attention.

    Returns:
        {"sdpa": {"works": True, "device": "cpu", "dtype": "float32", "difference": 1e-8}}, or with `reason` for what
        does not work.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # flash attention takes half precision only
    reference = _tiny_embeds("eager", device, dtype)
    found = {}
    for name in implementations:
        entry: dict[str, Any] = {"works": True, "device": device, "dtype": str(dtype).removeprefix("torch.")}
        try:
            with _silence():
                difference = (_tiny_embeds(name, device, dtype) - reference).abs().max().item()
            entry["difference"] = difference
            if not difference <= _TOLERANCE[entry["dtype"]]:
                entry.update(works=False, reason=f"differs from eager attention by {difference:.1e}")
        except Exception as error:  # whatever goes wrong is the finding
            entry.update(works=False, reason=_one_line(error))
        found[name] = entry
    return found


def _tiny_embeds(implementation: str, device: str, dtype: Any) -> Any:
    """Image and text embeddings (2 + 2, E) in float32 of a model that is the same every time."""
    import torch

    from siglip_hf import SiglipConfig, SiglipModel

    # Heads of 16: the least that flex attention's kernels take.
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**tower, "vocab_size": 32, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = SiglipModel._from_config(config, attn_implementation=implementation).to(device, dtype).eval()
        pixel_values = torch.rand(2, 3, 32, 32).to(device, dtype)
        input_ids = torch.arange(32).reshape(2, 16).to(device)
        return torch.cat([model.encode_image(pixel_values), model.encode_text(input_ids)]).float().cpu()


def speed() -> dict[str, Any]:
    """What `siglip_hf.optimize` chooses here for the embedded checkpoint, and why; `reason` if it cannot be tried.

    Returns:
        The fields of `Optimization`: dtype, threads, packed_blocks, cosine, notes.
    """
    import dataclasses

    from siglip_hf.inference.optimize.optimization import optimize

    try:
        with _silence():
            return dataclasses.asdict(optimize(loading.load_model(loading.default_checkpoint())).optimization)
    except Exception as error:  # whatever goes wrong is the finding
        return {"reason": _one_line(error)}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No output from libraries that complain about what is being tried."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


def checkpoints() -> dict[str, dict[str, Any]]:
    """The embedded checkpoints: folder and size in bytes of each, or `reason` if it is not there."""
    return {
        "siglip": _checkpoint(siglip_hf.default_checkpoint),
        "siglip2 (NaFlex)": _checkpoint(loading.naflex_checkpoint),
    }


def _checkpoint(find: Callable[[], str]) -> dict[str, Any]:
    try:
        folder = Path(find())
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json")
    except (OSError, ValueError) as error:
        return {"path": None, "reason": _one_line(error)}
    return {"path": str(folder), "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())}


def problems(report: dict[str, Any]) -> list[str]:
    """What is wrong and what to do; empty if all is well. A missing extra or an attention kernel is no problem."""
    found = [
        f"{name} is not installed: pip install {name}"
        for name, version in report["versions"].items()
        if version is None
    ]
    for auto_class, rows in report["registered"].items():
        found += [
            f"{auto_class} gives {path} for {kind}: another plugin has replaced it; import siglip_hf after that one"
            for kind, path in rows.items()
            if not all(part.startswith("siglip_hf.") for part in path.split(", "))
        ]
    found += [
        f"{name} attention does not work, reinstall torch: {report['attention'][name]['reason']}"
        for name in ("eager", "sdpa")
        if not report["attention"][name]["works"]
    ]
    found += [
        f"no embedded checkpoint of {kind}, reinstall siglip-hf: {entry['reason']}"
        for kind, entry in report["checkpoints"].items()
        if entry["path"] is None
    ]
    return found
