"""Weights from the layout of any library that has a SigLIP to a folder of transformers, and from there to theirs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from siglip_hf.files import check_output_folder, first_line, new_file, new_folder, parse_json, read_text, write_json
from siglip_hf.integrations.big_vision import convert_big_vision, to_big_vision
from siglip_hf.integrations.checkpoint_files import (
    check_vocabulary,
    checked_dtype,
    is_siglip2,
    write_image_processor,
    write_tokenizer,
)
from siglip_hf.integrations.layouts import (
    ACTIVATIONS,
    TIMM_TOWERS,
    Described,
    completed,
    from_own,
    into_own,
    of_open_clip_config,
    of_open_clip_name,
    of_timm_config,
    of_timm_name,
    recognise,
    rules,
    shapes_of,
)
from siglip_hf.loading import check_pixel_scaling, check_weights, from_checkpoint, load_model
from siglip_hf.models.configuration_siglip import PRESETS, SiglipConfig, SiglipVisionConfig
from siglip_hf.models.configuration_siglip2 import NAFLEX_PRESETS, Siglip2Config, Siglip2VisionConfig
from siglip_hf.models.modeling_siglip import SiglipModel, SiglipVisionModel
from siglip_hf.models.modeling_siglip2 import Siglip2Model, Siglip2VisionModel
from siglip_hf.registration import register

LAYOUTS = ("open_clip", "timm", "big_vision")

# Files of weights in a folder, the one to take first.
_WEIGHTS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
# Where training scripts put the weights in a dict, and what they put before names; averaged weights first.
_AVERAGED = ("state_dict_ema", "model_ema", "ema")
_NESTED = (*_AVERAGED, "state_dict", "model_state_dict", "model")
_AVERAGED_PREFIXES = ("ema_model.", "ema.", "model_ema.")
_PREFIXES = ("module.", "_orig_mod.", "model.", "clip.")
# Numbers that stand beside weights of 8 bits, by which these are to be multiplied.
_SCALES = (".scale_weight", ".weight_scale")


@dataclass
class ConvertedWeights:
    """What `convert_weights` did.

    Attributes:
        path: what was written.
        source: the layout that was recognised: "open_clip", "timm", "transformers" or "big_vision".
        parameters: how many numbers the model has.
        notes: what was chosen or left out, and why, a line each.
    """

    path: Path
    source: str
    parameters: int = 0
    notes: list[str] = field(default_factory=list)


def convert_weights(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str | None = None,
    preset: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
) -> ConvertedWeights:
    """Converts SigLIP weights of any library to a folder for `from_pretrained`, or with `to` to another library's.

    It recognises open_clip's and timm's checkpoints, image towers in one file as programs for making pictures use them,
    and the original code's `.npz`: in `.safetensors`, `.bin`, `.pt` or `.pth` (read with `weights_only`) or in a folder
    with its configuration. Averaged weights (EMA) are taken where there are some; weights in 8 bits are multiplied by
    their scales.

    Args:
        source: a file or a folder; with `to` also the name of a checkpoint of transformers.
        out: the folder to write, or for "big_vision" the `.npz` file.
        to: "open_clip", "timm" (the image tower) or "big_vision"; None writes transformers' layout.
        preset: name of the model where no configuration lies beside the file: open_clip's ("ViT-B-16-SigLIP2-256"),
            timm's ("vit_base_patch16_siglip_224") or a key of `PRESETS`. By default it follows from the shapes.
        tokenizer: the SentencePiece file that belongs to the model. By default what lies in the source's folder.
        dtype: of the result; the source's own by default, bfloat16 for 8 bits.
        overwrite: replace what is there.

    Raises:
        ValueError: for a file that is no SigLIP, tensors that are missing, left over or of a wrong shape (all named at
            once), a configuration that the shapes contradict, and what the other library has no form for.
        OSError: if a file cannot be read or written.
    """
    if to is not None and to not in LAYOUTS:
        raise ValueError(f"to={to!r} is unknown; give one of {', '.join(LAYOUTS)}, or none for transformers.")
    source, out = Path(source), Path(out)
    if to is not None:
        return _write_other(source, out, to, dtype, overwrite)
    if source.suffix == ".npz":
        done = convert_big_vision(
            source, out, preset=preset, tokenizer=tokenizer, dtype=dtype or torch.float32, overwrite=overwrite
        )
        name = done.preset or "the shapes are those of no published checkpoint"
        return ConvertedWeights(done.folder, "big_vision", done.num_parameters, [f"{name}; {done.num_tensors} tensors"])

    check_output_folder(out, overwrite=overwrite, marker="config.json")
    file = _weights_of(source)
    tensors, notes = _read(file)
    layout = recognise(tensors)
    if layout is None:
        raise ValueError(
            f"{file} holds no SigLIP of open_clip, timm or transformers; its first tensors are "
            f"{', '.join(list(tensors)[:5])}"
        )
    with _one_sentence(file):
        if (projection := tensors.pop("text.text_projection", None)) is not None:  # open_clip's form without a bias
            notes.append("its text projection has no bias: zeros are written")
            tensors["text.text_projection.weight"] = projection.T.contiguous()
            tensors["text.text_projection.bias"] = projection.new_zeros(projection.shape[1])
        config, described = _configuration(tensors, layout, file, preset, notes)
        joint = hasattr(config, "text_config")
        vocabulary = _vocabulary(file.parent, tokenizer) if joint else None
        if vocabulary is not None:
            check_vocabulary(vocabulary, config)
        check_pixel_scaling(SimpleNamespace(**described.pictures))
        model = _model(tensors, layout, config, file, dtype)
    check_weights(str(file), model)
    with new_folder(out, overwrite=overwrite, marker="config.json") as folder:
        model.save_pretrained(folder)
        write_image_processor(folder, config, **described.pictures)
        if vocabulary is not None:
            write_tokenizer(folder, vocabulary, config)
    acts = {"image": getattr(config, "vision_config", config).hidden_act}
    acts |= {"text": config.text_config.hidden_act} if joint else {}
    notes.append("GELU: " + ", ".join(f"{_gelu(act)} in the {tower} tower" for tower, act in acts.items()))
    if joint:
        text = "no tokenizer: give its SentencePiece file as tokenizer (--tokenizer)"
        notes.append(f"tokenizer: {vocabulary.name}" if vocabulary is not None else text)
    return ConvertedWeights(out, layout, sum(value.numel() for value in model.state_dict().values()), notes)


def _model(
    tensors: dict[str, torch.Tensor], layout: str, config: Any, file: Path, dtype: torch.dtype | str | None
) -> Any:
    """The model of a configuration, with another layout's tensors."""
    naflex = config.model_type.startswith("siglip2")
    kind: Any = SiglipVisionModel, Siglip2VisionModel
    if hasattr(config, "text_config"):
        kind = SiglipModel, Siglip2Model
    register()
    with torch.device("meta"):
        model = kind[naflex](config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = into_own(tensors, rules(layout, config), shapes, str(file))
    chosen = checked_dtype(dtype) if dtype is not None else _common_dtype(state)
    model.load_state_dict({name: value.to(chosen) for name, value in state.items()}, assign=True)
    model.config.dtype = chosen
    return model


@contextlib.contextmanager
def _one_sentence(file: Path) -> Iterator[None]:
    """What a damaged file happens to hit becomes an error that names it.

    Raises:
        ValueError: in place of KeyError, TypeError, ...
    """
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        beside = f"{file}, or the configuration beside it, is damaged"
        raise ValueError(f"{beside}: {type(error).__name__}: {first_line(error)}") from error


def _gelu(act: str) -> str:
    return {"gelu": "exact", "gelu_pytorch_tanh": "tanh"}.get(act, act)


# --- Reading ---


def _weights_of(source: Path) -> Path:
    if not source.is_dir():
        return source
    for name in _WEIGHTS:
        if (source / name).is_file():
            return source / name
    raise ValueError(f"{source} holds none of {', '.join(_WEIGHTS)}")


def _read(file: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of a model by their bare names, and what was left out."""
    notes: list[str] = []
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content: Any = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    else:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # what a damaged or hostile pickle happens to raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{file} cannot be read as weights alone: {reason}") from error
    while inner := next(
        (name for name in _NESTED if isinstance(content, Mapping) and _is_state(content.get(name))), None
    ):
        if inner in _AVERAGED:
            notes.append(f"the averaged weights ({inner}) are taken")
        content = content[inner]
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, not tensors by their names")
    tensors = {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    prefix = next((one for one in _AVERAGED_PREFIXES if any(name.startswith(one) for name in tensors)), None)
    if prefix is not None:
        notes.append(f"the averaged weights ({prefix}*) are taken")
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    while prefix := next((one for one in _PREFIXES if tensors and all(name.startswith(one) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    tensors = {name: value for name, value in tensors.items() if not name.endswith(".position_ids")}
    return _in_full(tensors, notes), notes


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(one, torch.Tensor | Mapping) for one in value.values())


def _in_full(tensors: dict[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    """Weights in 8 bits as bfloat16 at least, times their scales."""
    eight = [name for name, value in tensors.items() if value.dtype.itemsize == 1 and value.is_floating_point()]
    if not eight:
        return tensors
    scaled = 0
    result = dict(tensors)
    for name in eight:
        value = tensors[name].to(torch.float32)
        for ending in _SCALES:
            if (scale := result.pop(name.removesuffix(".weight") + ending, None)) is not None:
                value = value * scale.to(torch.float32)
                scaled += 1
        result[name] = value.to(torch.bfloat16)
    beside = [name for name in result if name == "scaled_fp8" or name.endswith((".scale_input", ".input_scale"))]
    for name in beside:
        del result[name]
    notes.append(f"{len(eight)} tensors were of 8 bits, {scaled} of them with a scale")
    return result


def _common_dtype(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    """float32 if any tensor is, else that of the most numbers."""
    numbers: dict[torch.dtype, int] = {}
    for value in state.values():
        numbers[value.dtype] = numbers.get(value.dtype, 0) + value.numel()
    wide = torch.float32 in numbers or torch.float64 in numbers
    return torch.float32 if wide else max(numbers, key=lambda dtype: numbers[dtype])


def _configuration(
    tensors: dict[str, torch.Tensor], layout: str, file: Path, preset: str | None, notes: list[str]
) -> tuple[Any, Described]:
    beside = {name: file.parent / name for name in ("open_clip_config.json", "config.json")}
    read = {name: _read_object(path) for name, path in beside.items() if path.is_file()}
    told: Described | None = None
    if preset is not None:
        told = _of_preset(preset)
    elif layout == "open_clip" and "open_clip_config.json" in read:
        told = of_open_clip_config(read["open_clip_config.json"])
    elif layout == "timm" and "architecture" in read.get("config.json", {}):
        told = of_timm_config(read["config.json"])
    elif layout == "transformers":
        if str(read.get("config.json", {}).get("model_type", "")).startswith("siglip"):
            from transformers import AutoConfig

            config = from_checkpoint(AutoConfig, file.parent)
            has_text = "text_model.head.weight" in tensors
            return (config if has_text else getattr(config, "vision_config", config)), Described(source="config.json")
        # Published files of this layout come with the tanh of the original code.
        act = {"hidden_act": ACTIVATIONS[True]}
        told = Described(dict(act), dict(act))
    found = completed(shapes_of(tensors, layout), told, str(file))
    naflex = "num_patches" in found.vision
    if found.text:
        config = (Siglip2Config if naflex else SiglipConfig)(text_config=found.text, vision_config=found.vision)
    else:
        config = (Siglip2VisionConfig if naflex else SiglipVisionConfig)(**found.vision)
    notes.append(f"configuration from {found.source}")
    return config, found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it does not hold an object")
    return content


def _of_preset(name: str) -> Described:
    key = name.removeprefix("google/")
    if key in PRESETS or key in NAFLEX_PRESETS:
        config = (SiglipConfig if key in PRESETS else Siglip2Config).from_preset(key)
        text, vision = (tower.to_dict() for tower in (config.text_config, config.vision_config))
        keep = ("hidden_size", "num_attention_heads", "hidden_act", "image_size", "patch_size")
        return Described(
            {name: vision[name] for name in keep if name in vision},
            {name: text[name] for name in (*keep, "vocab_size", "max_position_embeddings") if name in text},
            source=key,
        )
    return of_open_clip_name(name) if "SigLIP" in name else of_timm_name(name)


def _vocabulary(folder: Path, tokenizer: str | os.PathLike[str] | None) -> Path | None:
    if tokenizer is not None:
        return Path(tokenizer)
    return next((folder / name for name in ("spiece.model", "tokenizer.model") if (folder / name).is_file()), None)


# --- Writing ---


def _write_other(
    source: Path, out: Path, to: str, dtype: torch.dtype | str | None, overwrite: bool
) -> ConvertedWeights:
    model = load_model(source)
    if dtype is not None:
        model.to(checked_dtype(dtype))
    state = {name: value.detach() for name, value in model.state_dict().items()}
    result = ConvertedWeights(out, "transformers")
    if to == "big_vision":
        if out.suffix != ".npz":
            raise ValueError(f"{out} must end in .npz, as the original code's checkpoints do")
        if out.exists() and not overwrite:
            raise ValueError(f"{out} is there; give another file, or overwrite=True (--overwrite) to replace it")
        tree = to_big_vision(state, model.config)
        result.parameters = sum(value.numel() for value in tree.values())
        with new_file(out) as partial, open(partial, "wb") as file:
            np.savez(file, **{f"params/{name}": _as_numpy(value) for name, value in tree.items()})  # type: ignore[arg-type]
        return result
    config, name = model.config, "open_clip_model.safetensors" if to == "open_clip" else "model.safetensors"
    if to == "timm":
        config = config.vision_config
        own = "vision_model."
        state = {key.removeprefix(own): value for key, value in state.items() if key.startswith(own)}
        settings = {"config.json": _timm_config(config)}
    else:
        settings = {"open_clip_config.json": {"model_cfg": _open_clip_config(config, result.notes), **_PREPROCESS}}
    from safetensors.torch import save_file

    (marker,) = settings
    result.parameters = sum(value.numel() for value in state.values())
    with new_folder(out, overwrite=overwrite, marker=marker) as folder:
        save_file(from_own(state, rules(to, config)), folder / name, metadata={"format": "pt"})
        for file_name, content in settings.items():
            write_json(folder / file_name, content, indent=2)
        if to == "open_clip":
            _copy_tokenizer(source, folder, result.notes)
    return result


_PREPROCESS = {
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
}


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


def _timm_config(vision: Any) -> dict[str, Any]:
    """The `config.json` of a timm repository with a tower of any size."""
    naflex = vision.model_type.startswith("siglip2")
    arguments: dict[str, Any] = {
        "embed_dim": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
        "mlp_ratio": _ratio(vision),
        "patch_size": vision.patch_size,
        "act_layer": _timm_act(vision.hidden_act),
    }
    side = vision.patch_grid[0] * vision.patch_size if naflex else vision.image_size
    if naflex:
        arguments["pos_embed_grid_size"] = list(vision.patch_grid)
    else:
        arguments["img_size"] = side
    return {
        "architecture": "naflexvit_base_patch16_siglip" if naflex else "vit_base_patch16_siglip_224",
        "num_classes": 0,
        "num_features": vision.hidden_size,
        "global_pool": "map",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [vision.num_channels, side, side],
            "fixed_input_size": not naflex,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": 0,
            "first_conv": "embeds.proj" if naflex else "patch_embed.proj",
            "classifier": "head",
        },
    }


def _timm_act(act: str) -> str:
    names = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    if act not in names:
        raise ValueError(f"hidden_act={act!r} has no form in timm and open_clip; they know {' and '.join(names)}")
    return names[act]


def _ratio(tower: Any) -> float:
    """The MLP's width over the tower's, so that int(width x ratio) is the MLP's width."""
    width, inner = tower.hidden_size, tower.intermediate_size
    short = round(inner / width, 4)
    return short if int(width * short) == inner else (inner + 0.5) / width


def _open_clip_config(config: Any, notes: list[str]) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    if config.model_type != "siglip":
        raise ValueError("open_clip has no two-tower NaFlex model; give to='timm' for its image tower.")
    shape = (vision.hidden_size, vision.patch_size, vision.image_size)
    found = {name: one[3] for name, one in TIMM_TOWERS.items() if one[:3] == shape}
    depths = {768: 12, 1024: 24, 1152: 27, 1536: 40}
    if not found or vision.num_hidden_layers != depths[vision.hidden_size]:
        raise ValueError(
            f"open_clip takes its image towers by timm's names, and none has width {shape[0]}, patches of {shape[1]}, "
            f"pictures of {shape[2]} and {vision.num_hidden_layers} blocks; give to='timm' for the image tower."
        )
    _timm_act(vision.hidden_act)
    name = next((name for name, act in found.items() if act == vision.hidden_act), next(iter(found)))
    if found[name] != vision.hidden_act:
        notes.append(
            f"open_clip computes {name} with the {_gelu(found[name])} GELU, this model the {_gelu(vision.hidden_act)} "
            "one: the weights are the same, image embeddings differ by about 1e-3"
        )
    settings: dict[str, Any] = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP2-256" if is_siglip2(config) else "timm/ViT-B-16-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": _ratio(text),
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": text.layer_norm_eps},
    }
    if _timm_act(text.hidden_act) == "gelu_tanh":
        settings["act_kwargs"] = {"approximate": "tanh"}
    return {
        "embed_dim": vision.hidden_size,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": settings,
    }


def _copy_tokenizer(source: Path, folder: Path, notes: list[str]) -> None:
    from transformers import AutoTokenizer

    try:
        from_checkpoint(AutoTokenizer, source).save_pretrained(folder)
    except ValueError as error:
        notes.append(f"no tokenizer was taken along: {error}")
