"""Checkpoints of the original code (big_vision `.npz`) as folders that transformers loads, stock or ours.

The parameter tree is that of google-research/big_vision: `models/proj/image_text/two_towers.py` (`img`, `txt`, `t`,
`b`) over `models/vit.py`, `text_transformer.py` and, for SigLIP 2 NaFlex, `naflex_vit.py`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from siglip_hf.files import check_output_folder, new_folder
from siglip_hf.integrations.checkpoint_files import (
    abridged,
    check_vocabulary,
    checked_dtype,
    write_image_processor,
    write_tokenizer,
)
from siglip_hf.models.configuration_siglip import PRESETS, SiglipConfig
from siglip_hf.models.configuration_siglip2 import NAFLEX_PRESETS, Siglip2Config
from siglip_hf.models.modeling_siglip import SiglipModel
from siglip_hf.models.modeling_siglip2 import Siglip2Model
from siglip_hf.registration import register

# The tower's encoder in the original tree.
_ENCODERS = {"img": "img/Transformer", "txt": "txt/Encoder_0"}

_Tree = Mapping[str, torch.Tensor]
_Convert = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Converted:
    """What `convert_big_vision` made.

    Attributes:
        folder: Where it is.
        preset: The published checkpoint with these shapes, or None.
        num_tensors: Number of tensors read, blocks of a scanned encoder counted one by one.
        num_parameters: Number of parameters.
    """

    folder: Path
    preset: str | None
    num_tensors: int
    num_parameters: int


@dataclass(frozen=True)
class _Rule:
    """How a tensor of the published checkpoints is made.

    Attributes:
        target: Its published name.
        sources: Names in the original tree; several are stacked along the first axis after conversion.
        shape: Shape of each source.
        convert: From a source's layout to the published one.
    """

    target: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    convert: _Convert


def convert_big_vision(
    npz_path: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    *,
    preset: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = torch.float32,
    overwrite: bool = False,
) -> Converted:
    """Converts a checkpoint of the original code to a folder for `from_pretrained`.

    Handles SigLIP and SigLIP 2 at fixed resolution (a `siglip` checkpoint) and SigLIP 2 NaFlex (a `siglip2` one), with
    blocks one by one (`encoderblock_0`, ...) or scanned (`encoderblock`, stacked along the first axis). The folder
    appears when all is written, or not at all.

    Args:
        npz_path: The `.npz` file.
        output_folder: Folder to write: weights, `config.json`, `preprocessor_config.json` and the tokenizer's files.
        preset: Name of the published checkpoint, a key of `PRESETS` or `NAFLEX_PRESETS`. Inferred from the shapes by
            default; with shapes of no published checkpoint a fitting configuration is made.
        tokenizer: Vocabulary to take along: the SentencePiece file the model was trained with. Without it the folder
            has no tokenizer.
        dtype: Type to save in: float32, float16 or bfloat16, as `torch.dtype` or by name.
        overwrite: Replace a checkpoint that is already in the folder.

    Raises:
        ValueError: For a file that is no such checkpoint (all tensors that are missing, left over or of a wrong shape
            are named at once), an unknown preset or dtype, values that `dtype` cannot hold, a tokenizer of another
            vocabulary, and a folder that is not empty.
        OSError: If a file cannot be read or written.
    """
    torch_dtype = checked_dtype(dtype)
    check_output_folder(output_folder, overwrite=overwrite, marker="config.json")
    config: Any = None if preset is None else _preset_config(preset)
    tree = _read_tree(Path(npz_path))
    if config is None:
        fields = _fields(tree)
        preset = next((name for name in (*PRESETS, *NAFLEX_PRESETS) if _preset_fields(name) == fields), None)
        config = _config(fields) if preset is None else _preset_config(preset)
    if tokenizer is not None:
        check_vocabulary(Path(tokenizer), config)

    rules = _rules(config)
    _check_tree(tree, rules, Path(npz_path), preset)
    state_dict = {rule.target: _apply(rule, tree).to(torch_dtype) for rule in rules}
    _check_finite(state_dict, tree, rules)
    register()
    model_class: Any = Siglip2Model if isinstance(config, Siglip2Config) else SiglipModel
    model = model_class.from_pretrained(None, config=config, state_dict=state_dict, dtype=torch_dtype)
    with new_folder(output_folder, overwrite=overwrite, marker="config.json") as folder:
        model.save_pretrained(folder)
        write_image_processor(folder, config)
        if tokenizer is not None:
            write_tokenizer(folder, Path(tokenizer), config)
    return Converted(
        folder=Path(output_folder),
        preset=preset,
        num_tensors=len(tree),
        num_parameters=sum(tensor.numel() for tensor in tree.values()),
    )


# --- Reading ---


def _read_tree(path: Path) -> dict[str, torch.Tensor]:
    """All tensors by their name in the tree (without "params/"), scanned blocks taken apart."""
    tree: dict[str, torch.Tensor] = {}
    for key, array in _read_arrays(path):
        name = key.removeprefix("params/")
        tensor = _to_tensor(array, name)
        scanned = "/encoderblock/" in name and tensor.ndim > 0
        parts = (
            {name.replace("/encoderblock/", f"/encoderblock_{i}/"): part for i, part in enumerate(tensor)}
            if scanned
            else {name: tensor}
        )
        if twice := sorted(parts.keys() & tree.keys()):
            raise ValueError(f"{path} holds {abridged(twice)} twice, scanned and one by one")
        tree.update(parts)
    return tree


def _read_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of an .npz file, one by one; damage is a ValueError that names the file and the array."""
    try:
        archive = np.load(path, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # BadZipFile, zlib.error, TokenError, EOFError, ...: what the damage happens to hit
        raise ValueError(f"{path} is no .npz file of the original code: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} holds a single array; give an .npz file of the original code")
    with archive:
        assert archive.zip is not None
        for entry in archive.zip.infolist():
            try:
                with archive.zip.open(entry) as file:
                    _check_declared_size(file, entry.file_size)
                with archive.zip.open(entry) as file:
                    array = np.lib.format.read_array(file, allow_pickle=False)
            except Exception as error:
                raise ValueError(f"{path} is damaged: {entry.filename} cannot be read ({error!r})") from error
            yield entry.filename.removesuffix(".npy"), array


def _check_declared_size(file: Any, size: int) -> None:
    """Compares the shape that an array declares with the bytes it has, before memory is taken for it."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"its shape {shape} in {dtype} is more than its {size} bytes")


def _to_tensor(array: np.ndarray, name: str) -> torch.Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # numpy has no name for bfloat16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {array.dtype}, not numbers")
    return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))


# --- Configuration ---


def _fields(tree: _Tree) -> dict[str, dict[str, Any]]:
    """The shapes of both towers as configuration fields, with the patch grid in place of the picture's size.

    Raises:
        ValueError: If tensors are missing, or their axes are not as many as they should be.
    """
    anchors = {"img/embedding/kernel": (2, 4), "txt/Embed_0/embedding": (2,), "txt/head/kernel": (2,)}
    for tower, encoder in _ENCODERS.items():
        anchors[f"{tower}/pos_embedding"] = (3,)
        anchors[f"{encoder}/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"] = (3,)
        anchors[f"{encoder}/encoderblock_0/MlpBlock_0/Dense_0/kernel"] = (2,)
    if missing := [name for name in anchors if name not in tree]:
        raise ValueError(
            f"this is no SigLIP checkpoint of the original code: it has no {', '.join(missing)}. Its tensors are "
            f"{abridged(tree)}"
        )
    for name, ranks in anchors.items():
        if tree[name].ndim not in ranks:
            raise ValueError(f"{name} has shape {tuple(tree[name].shape)}; it should have {ranks[-1]} axes")

    def encoder_fields(encoder: str) -> dict[str, int]:
        block = f"{encoder}/encoderblock_0"
        width, heads, _ = tree[f"{block}/MultiHeadDotProductAttention_0/query/kernel"].shape
        numbers = {int(match[1]) for name in tree if (match := re.match(rf"{encoder}/encoderblock_(\d+)/", name))}
        return {
            "hidden_size": width,
            "intermediate_size": tree[f"{block}/MlpBlock_0/Dense_0/kernel"].shape[1],
            "num_hidden_layers": max(numbers) + 1,
            "num_attention_heads": heads,
        }

    vision = encoder_fields(_ENCODERS["img"])
    kernel, positions = tree["img/embedding/kernel"].shape, tree["img/pos_embedding"].shape
    if len(kernel) == 2:  # NaFlex: patches come flattened, positions lie on a grid (rows, columns, D)
        vision |= {"num_patches": positions[0] * positions[1], "patch_size": math.isqrt(kernel[0] // 3)}
    else:
        vision |= {"num_patches": positions[1], "patch_size": kernel[0], "num_channels": kernel[2]}
    text = encoder_fields(_ENCODERS["txt"]) | {
        "vocab_size": tree["txt/Embed_0/embedding"].shape[0],
        "max_position_embeddings": tree["txt/pos_embedding"].shape[1],
        "projection_size": tree["txt/head/kernel"].shape[1],
    }
    return {"text": text, "vision": vision}


def _preset_config(name: str) -> SiglipConfig:
    naflex = name.removeprefix("google/") in NAFLEX_PRESETS
    return (Siglip2Config if naflex else SiglipConfig).from_preset(name)


def _preset_fields(name: str) -> dict[str, dict[str, Any]]:
    if name in NAFLEX_PRESETS:
        text, vision = NAFLEX_PRESETS[name]
        return {"text": text, "vision": vision}
    text, vision = PRESETS[name]
    num_patches = (vision["image_size"] // vision["patch_size"]) ** 2
    fields = {key: value for key, value in vision.items() if key != "image_size"}
    return {"text": text, "vision": fields | {"num_patches": num_patches, "num_channels": 3}}


def _config(fields: dict[str, dict[str, Any]]) -> SiglipConfig:
    """The configuration of a checkpoint that has the shapes of no preset."""
    text, vision = fields["text"], dict(fields["vision"])
    if "num_channels" not in vision:
        return Siglip2Config(text_config=text, vision_config=vision)
    num_patches = vision.pop("num_patches")
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"img/pos_embedding has {num_patches} positions, which is no square grid of patches")
    vision["image_size"] = side * vision["patch_size"]
    return SiglipConfig(text_config=text, vision_config=vision)


# --- The tree ---


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(..., D) -> (rows, D)."""
    return tensor.flatten(0, -2)


def _from_input(tensor: torch.Tensor) -> torch.Tensor:
    """A kernel (inputs, *outputs) -> a weight (outputs, inputs)."""
    return tensor.flatten(1).T


def _to_output(tensor: torch.Tensor) -> torch.Tensor:
    """A kernel (*inputs, outputs) -> a weight (outputs, inputs)."""
    return tensor.flatten(0, -2).T


def _as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _convolution(tensor: torch.Tensor) -> torch.Tensor:
    """(height, width, channels, D) -> (D, channels, height, width)."""
    return tensor.permute(3, 2, 0, 1)


def _rules(config: Any) -> list[_Rule]:
    """One rule per tensor of the published checkpoint."""
    text, vision = config.text_config, config.vision_config
    rules = [
        _Rule("logit_scale", ("t",), (1,), _as_is),  # both hold the logarithm of the temperature
        _Rule("logit_bias", ("b",), (1,), _as_is),
    ]
    rules += _encoder_rules("text_model", "txt", text, norm="final_layer_norm")
    rules += _encoder_rules("vision_model", "img", vision, norm="post_layernorm")

    width, embeddings = text.hidden_size, "text_model.embeddings"
    rules += [
        _Rule(f"{embeddings}.token_embedding.weight", ("txt/Embed_0/embedding",), (text.vocab_size, width), _as_is),
        _Rule(
            f"{embeddings}.position_embedding.weight",
            ("txt/pos_embedding",),
            (1, text.max_position_embeddings, width),
            _rows,
        ),
        *_linear_rules("text_model.head", "txt/head", width, text.projection_size),
    ]

    width, embeddings = vision.hidden_size, "vision_model.embeddings"
    patch = (vision.patch_size, vision.patch_size, vision.num_channels)
    kernel: tuple[int, ...]
    if config.model_type == "siglip":
        positions = (1, math.prod(vision.patch_grid), width)
        kernel, embed = (*patch, width), _convolution
    else:
        side = math.isqrt(vision.num_patches)
        positions = (side, side, width)
        kernel, embed = (math.prod(patch), width), _from_input
    rules += [
        _Rule(f"{embeddings}.patch_embedding.weight", ("img/embedding/kernel",), kernel, embed),
        _Rule(f"{embeddings}.patch_embedding.bias", ("img/embedding/bias",), (width,), _as_is),
        _Rule(f"{embeddings}.position_embedding.weight", ("img/pos_embedding",), positions, _rows),
    ]

    head, source = "vision_model.head", "img/MAPHead_0"
    attention = f"{source}/MultiHeadDotProductAttention_0"
    inputs = [f"{attention}/{name}" for name in ("query", "key", "value")]
    by_head = (vision.num_attention_heads, width // vision.num_attention_heads)
    rules += [
        _Rule(f"{head}.probe", (f"{source}/probe",), (1, 1, width), _as_is),
        # Published checkpoints hold the three input projections of this attention in one tensor.
        _Rule(f"{head}.attention.in_proj_weight", _named(inputs, "kernel"), (width, *by_head), _from_input),
        _Rule(f"{head}.attention.in_proj_bias", _named(inputs, "bias"), by_head, _flat),
        _Rule(f"{head}.attention.out_proj.weight", (f"{attention}/out/kernel",), (*by_head, width), _to_output),
        _Rule(f"{head}.attention.out_proj.bias", (f"{attention}/out/bias",), (width,), _as_is),
        *_norm_rules(f"{head}.layernorm", f"{source}/LayerNorm_0", width),
        *_mlp_rules(f"{head}.mlp", f"{source}/MlpBlock_0", vision),
    ]
    return rules


def _encoder_rules(target: str, tower: str, config: Any, norm: str) -> list[_Rule]:
    width, heads = config.hidden_size, config.num_attention_heads
    by_head = (heads, width // heads)
    encoder = _ENCODERS[tower]
    rules = _norm_rules(f"{target}.{norm}", f"{encoder}/encoder_norm", width)
    for i in range(config.num_hidden_layers):
        layer, block = f"{target}.encoder.layers.{i}", f"{encoder}/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for name in ("query", "key", "value"):
            projection = f"{layer}.self_attn.{name[0]}_proj"
            rules += [
                _Rule(f"{projection}.weight", (f"{attention}/{name}/kernel",), (width, *by_head), _from_input),
                _Rule(f"{projection}.bias", (f"{attention}/{name}/bias",), by_head, _flat),
            ]
        projection = f"{layer}.self_attn.out_proj"
        rules += [
            _Rule(f"{projection}.weight", (f"{attention}/out/kernel",), (*by_head, width), _to_output),
            _Rule(f"{projection}.bias", (f"{attention}/out/bias",), (width,), _as_is),
            *_norm_rules(f"{layer}.layer_norm1", f"{block}/LayerNorm_0", width),
            *_norm_rules(f"{layer}.layer_norm2", f"{block}/LayerNorm_1", width),
            *_mlp_rules(f"{layer}.mlp", f"{block}/MlpBlock_0", config),
        ]
    return rules


def _norm_rules(target: str, source: str, width: int) -> list[_Rule]:
    return [
        _Rule(f"{target}.weight", (f"{source}/scale",), (width,), _as_is),
        _Rule(f"{target}.bias", (f"{source}/bias",), (width,), _as_is),
    ]


def _mlp_rules(target: str, source: str, config: Any) -> list[_Rule]:
    width, inner = config.hidden_size, config.intermediate_size
    return [
        *_linear_rules(f"{target}.fc1", f"{source}/Dense_0", width, inner),
        *_linear_rules(f"{target}.fc2", f"{source}/Dense_1", inner, width),
    ]


def _linear_rules(target: str, source: str, inputs: int, outputs: int) -> list[_Rule]:
    return [
        _Rule(f"{target}.weight", (f"{source}/kernel",), (inputs, outputs), _from_input),
        _Rule(f"{target}.bias", (f"{source}/bias",), (outputs,), _as_is),
    ]


def _named(prefixes: Iterable[str], name: str) -> tuple[str, ...]:
    return tuple(f"{prefix}/{name}" for prefix in prefixes)


def _check_tree(tree: _Tree, rules: Iterable[_Rule], path: Path, preset: str | None) -> None:
    """Raises a ValueError that names every tensor that is missing, left over or of a wrong shape."""
    shapes = {source: rule.shape for rule in rules for source in rule.sources}
    wrong = [
        f"{name} {tuple(tree[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in tree and tuple(tree[name].shape) != shape
    ]
    leftover = [name for name in tree if name not in shapes]
    problems = []
    if missing := [name for name in shapes if name not in tree]:
        problems.append(f"missing: {abridged(missing)}")
    if leftover:
        problems.append(f"left over: {abridged(leftover)}")
    if wrong:
        problems.append(f"of a wrong shape: {abridged(wrong)}")
    if any(name.startswith("img/head/") for name in leftover):
        problems.append("(a model with a linear layer after the image tower, img/head, has no published counterpart)")
    if problems:
        raise ValueError(f"{path} does not fit {preset or 'a SigLIP model'}; {'; '.join(problems)}")


def _apply(rule: _Rule, tree: _Tree) -> torch.Tensor:
    parts = [rule.convert(tree[source]) for source in rule.sources]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()


def _check_finite(state_dict: _Tree, tree: _Tree, rules: Iterable[_Rule]) -> None:
    for rule in rules:
        if not state_dict[rule.target].isfinite().all():
            largest = max(float(tree[source].abs().max()) for source in rule.sources)
            raise ValueError(
                f"{', '.join(rule.sources)} cannot be saved in {state_dict[rule.target].dtype}: the largest absolute "
                f"value is {largest:g}. If that is a number, save in bfloat16 or float32; if not, the file is damaged"
            )


def to_big_vision(state: _Tree, config: Any) -> dict[str, torch.Tensor]:
    """The original code's tree of a model's parameters: the inverse of what `convert_big_vision` does.

    Args:
        state: parameters of a `SiglipModel` or `Siglip2Model` by their names here.
        config: of the model.

    Returns:
        Name in the tree -> tensor in the original's shape, such as (D, H, D / H) for a query's kernel.
    """
    # The pooling head's projections lie packed in the published checkpoints, which the rules are about.
    packed = dict(state)
    for kind in ("weight", "bias"):
        names = [f"vision_model.head.attention.{name}_proj.{kind}" for name in "qkv"]
        packed[f"vision_model.head.attention.in_proj_{kind}"] = torch.cat([packed.pop(name) for name in names])
    found = {}
    for rule in _rules(config):
        for name, part in zip(rule.sources, packed.pop(rule.target).chunk(len(rule.sources)), strict=True):
            if rule.convert is _convolution:
                part = part.permute(2, 3, 1, 0)
            elif rule.convert in (_from_input, _to_output):
                part = part.T
            found[name] = part.reshape(rule.shape)
    assert not packed, sorted(packed)
    return found


convert = convert_big_vision  # its name in version 0.1

__all__ = ["Converted", "convert", "convert_big_vision", "to_big_vision"]
