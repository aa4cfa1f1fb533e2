"""How open_clip, timm and transformers name the tensors of a SigLIP, and what their configuration files say of it.

All hold the same numbers in the same order; they differ in names, in what is packed into one tensor, and in the shape
of positions and scalars. A rule therefore says which of our parameters, one behind the other, make a tensor of theirs.

Sources: open_clip's `CustomTextCLIP` and its model_configs, timm's `vision_transformer.py` and `naflexvit.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from siglip_hf.integrations.checkpoint_files import GEMMA_VOCABULARY, abridged

Tensors = Mapping[str, torch.Tensor]

# Width of a tower -> its heads, in every published checkpoint.
HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}

# timm's image towers of SigLIP: size, patch and picture. The ones it computes with the tanh GELU of the original code;
# the others it computes with the exact one.
_TANH = {("base", 32): (256,), ("large", 16): (512,), ("so400m", 16): (256, 384, 512), ("giantopt", 16): (256, 384)}
_EXACT = {("base", 16): (224, 256, 384, 512), ("large", 16): (256, 384), ("so400m", 14): (224, 378, 384)}
_WIDTHS = {"base": 768, "large": 1024, "so400m": 1152, "giantopt": 1536}
ACTIVATIONS = {True: "gelu_pytorch_tanh", False: "gelu"}
#: timm's name -> (width, patch, picture, activation).
TIMM_TOWERS = {
    f"vit_{size}_patch{patch}_siglip_{side}": (_WIDTHS[size], patch, side, ACTIVATIONS[table is _TANH])
    for table in (_TANH, _EXACT)
    for (size, patch), sides in table.items()
    for side in sides
}


@dataclass
class Described:
    """What is known of a checkpoint apart from its tensors.

    Attributes:
        vision, text: fields of the towers' configurations.
        pictures: settings of the image processor.
        source: where it comes from, for the user.
    """

    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=dict)
    source: str = "the shapes of the tensors"


@dataclass(frozen=True)
class Rule:
    """A tensor of another layout.

    Attributes:
        other: its name there.
        own: our parameters that it holds, one behind the other along the first axis.
        shape: its shape there; None: that of ours, joined.
    """

    other: str
    own: tuple[str, ...]
    shape: tuple[int, ...] | None = None


def rules(layout: str, config: Any) -> list[Rule]:
    """A rule for each tensor.

    Args:
        layout: "open_clip", "timm" or "transformers".
        config: of the model, or of the image tower alone.
    """
    vision = getattr(config, "vision_config", config)
    joint = vision is not config
    # An image tower alone has the prefix in the published files as well, but not in our own class.
    own = "vision_model." if joint else ""
    if layout == "transformers":
        found = _tower_of_transformers("vision_model.", own, vision, "post_layernorm")
        found += _same(f"{own}embeddings.", "vision_model.embeddings.", _EMBEDDINGS)
    else:
        found = _tower_of_timm("visual.trunk." if layout == "open_clip" else "", own, vision)
    if not joint:
        return found
    if layout == "transformers":
        found += _tower_of_transformers("text_model.", "text_model.", config.text_config, "final_layer_norm")
        text = ("token_embedding.weight", "position_embedding.weight")
        found += _same("text_model.embeddings.", "text_model.embeddings.", text)
        found += _same("text_model.", "text_model.", _layer("head"))
        return [*found, Rule("logit_scale", ("logit_scale",)), Rule("logit_bias", ("logit_bias",))]
    return found + _text_of_open_clip(config.text_config)


def into_own(tensors: Tensors, wanted: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]], name: str) -> dict:
    """Our parameters of another layout's tensors.

    Args:
        tensors: what was read.
        wanted: as `rules` gives them.
        shapes: of our parameters.
        name: of the file, for errors.

    Raises:
        ValueError: naming all tensors that are missing, left over or of a wrong shape.
    """
    expected = {
        rule.other: _joined([shapes[own] for own in rule.own]) if rule.shape is None else rule.shape for rule in wanted
    }
    problems = []
    if missing := [other for other in expected if other not in tensors]:
        problems.append(f"missing: {abridged(missing)}")
    if leftover := [other for other in tensors if other not in expected]:
        problems.append(f"left over: {abridged(leftover)}")
    wrong = [
        f"{other} {tuple(tensors[other].shape)} instead of {shape}"
        for other, shape in expected.items()
        if other in tensors and tuple(tensors[other].shape) != shape
    ]
    if wrong:
        problems.append(f"of a wrong shape: {abridged(wrong)}")
    if problems:
        raise ValueError(f"{name} does not fit; {'; '.join(problems)}")
    found: dict[str, torch.Tensor] = {}
    for rule in wanted:
        sizes = [shapes[own] for own in rule.own]
        parts = tensors[rule.other].reshape(-1).split([math.prod(size) for size in sizes])
        # Memory of its own for each: savers drop tensors that share it.
        found.update((own, part.reshape(size).clone()) for own, part, size in zip(rule.own, parts, sizes, strict=True))
    return found


def from_own(state: Tensors, wanted: Iterable[Rule]) -> dict[str, torch.Tensor]:
    """Another layout's tensors of our parameters; arguments as of `into_own`."""
    found = {}
    for rule in wanted:
        parts = [state[own] for own in rule.own]
        shape = rule.shape if rule.shape is not None else _joined([tuple(part.shape) for part in parts])
        found[rule.other] = torch.cat([part.reshape(-1) for part in parts]).reshape(shape)
    return found


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _layer(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


_EMBEDDINGS = (*_layer("patch_embedding"), "position_embedding.weight")


def _same(own: str, other: str, names: Iterable[str]) -> list[Rule]:
    return [Rule(f"{other}{name}", (f"{own}{name}",)) for name in names]


def _renamed(own: str, other: str, names: Mapping[str, Any]) -> list[Rule]:
    """Rules of layers: their name there -> ours, or several of ours that are packed."""
    return [
        Rule(
            f"{other}{there}.{kind}", tuple(f"{own}{one}.{kind}" for one in ([ours] if isinstance(ours, str) else ours))
        )
        for there, ours in names.items()
        for kind in ("weight", "bias")
    ]


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_POOLING = ("attention.q_proj", "attention.k_proj", "attention.v_proj")


def _tower_of_transformers(other: str, own: str, config: Any, norm: str) -> list[Rule]:
    found = _same(own, other, _layer(norm))
    for block in range(config.num_hidden_layers):
        place = f"encoder.layers.{block}."
        names = (*_QKV, "self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
        found += _same(own + place, other + place, (kind for name in names for kind in _layer(name)))
    if getattr(config, "vision_use_head", False):
        found.append(Rule(f"{other}head.probe", (f"{own}head.probe",)))
        found += [
            Rule(f"{other}head.attention.in_proj_{kind}", tuple(f"{own}head.{name}.{kind}" for name in _POOLING))
            for kind in ("weight", "bias")
        ]
        pooling = ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
        found += _same(f"{own}head.", f"{other}head.", (kind for name in pooling for kind in _layer(name)))
    return found


def _tower_of_timm(other: str, own: str, config: Any) -> list[Rule]:
    naflex = config.model_type.startswith("siglip2")
    rows, columns = config.patch_grid
    place = (1, rows, columns, config.hidden_size) if naflex else (1, rows * columns, config.hidden_size)
    embeddings, projection = ("embeds.", "embeds.proj") if naflex else ("", "patch_embed.proj")
    found = [Rule(f"{other}{embeddings}pos_embed", (f"{own}embeddings.position_embedding.weight",), place)]
    found += _renamed(own, other, {projection: "embeddings.patch_embedding", "norm": "post_layernorm"})
    for block in range(config.num_hidden_layers):
        names = {
            "norm1": "layer_norm1",
            "attn.qkv": _QKV,
            "attn.proj": "self_attn.out_proj",
            "norm2": "layer_norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }
        found += _renamed(f"{own}encoder.layers.{block}.", f"{other}blocks.{block}.", names)
    if config.vision_use_head:
        found.append(Rule(f"{other}attn_pool.latent", (f"{own}head.probe",)))
        names = {
            "q": _POOLING[0],
            "kv": _POOLING[1:],
            "proj": "attention.out_proj",
            "norm": "layernorm",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }
        found += _renamed(f"{own}head.", f"{other}attn_pool.", names)
    return found


def _text_of_open_clip(config: Any) -> list[Rule]:
    found = [
        Rule("logit_scale", ("logit_scale",), ()),
        Rule("logit_bias", ("logit_bias",), ()),
        Rule("text.token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
        Rule("text.positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        *_renamed("text_model.", "text.", {"ln_final": "final_layer_norm", "text_projection": "head"}),
    ]
    for block in range(config.num_hidden_layers):
        own, other = f"text_model.encoder.layers.{block}.", f"text.transformer.resblocks.{block}."
        names = {
            "ln_1": "layer_norm1",
            "attn.out_proj": "self_attn.out_proj",
            "ln_2": "layer_norm2",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        }
        found += _renamed(own, other, names)
        found += [
            Rule(f"{other}attn.in_proj_{kind}", tuple(f"{own}{name}.{kind}" for name in _QKV))
            for kind in ("weight", "bias")
        ]
    return found


# --- Recognition ---


def recognise(tensors: Tensors) -> str | None:
    """The layout of tensors: "open_clip", "timm" or "transformers"; None if it is none of a SigLIP."""
    if "visual.trunk.attn_pool.latent" in tensors:
        return "open_clip"
    if "blocks.0.attn.qkv.weight" in tensors and (
        "patch_embed.proj.weight" in tensors or "embeds.proj.weight" in tensors
    ):
        return "timm"
    return "transformers" if "vision_model.embeddings.patch_embedding.weight" in tensors else None


def shapes_of(tensors: Tensors, layout: str) -> Described:
    """The fields of the configuration that the tensors' shapes tell."""
    names = {
        "open_clip": ("visual.trunk.patch_embed.proj", "visual.trunk.pos_embed", "visual.trunk.blocks"),
        "timm": ("patch_embed.proj", "pos_embed", "blocks"),
        "transformers": (
            "vision_model.embeddings.patch_embedding",
            "vision_model.embeddings.position_embedding.weight",
            "vision_model.encoder.layers",
        ),
    }
    projection, positions, blocks = names[layout]
    if layout == "timm" and "embeds.proj.weight" in tensors:
        projection, positions = "embeds.proj", "embeds.pos_embed"
    kernel = tensors[f"{projection}.weight"]
    count = tensors[positions].numel() // kernel.shape[0]
    vision = {
        "hidden_size": kernel.shape[0],
        "intermediate_size": tensors[f"{blocks}.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(tensors, blocks),
        "vision_use_head": any("attn_pool." in name or "vision_model.head." in name for name in tensors),
    }
    if kernel.ndim == 2:  # NaFlex: patches come flattened
        vision |= {"num_patches": count, "patch_size": math.isqrt(kernel.shape[1] // 3)}
    else:
        vision |= {"patch_size": kernel.shape[-1], "num_channels": kernel.shape[1], "positions": count}
    text: dict[str, Any] = {}
    if layout == "open_clip":
        place, inner = "text.transformer.resblocks", "mlp.c_fc.weight"
        embedding, length = "text.token_embedding.weight", "text.positional_embedding"
        head = "text.text_projection.weight"
    else:
        place, inner = "text_model.encoder.layers", "mlp.fc1.weight"
        embedding, length = (f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position"))
        head = "text_model.head.weight"
    if layout == "open_clip" or embedding in tensors:
        if lacking := [name for name in (embedding, length, head, f"{place}.0.{inner}") if name not in tensors]:
            raise ValueError(f"this is no SigLIP: it has no {', '.join(lacking)}")
        text = {
            "vocab_size": tensors[embedding].shape[0],
            "hidden_size": tensors[embedding].shape[1],
            "max_position_embeddings": tensors[length].shape[0],
            "intermediate_size": tensors[f"{place}.0.{inner}"].shape[0],
            "num_hidden_layers": _count(tensors, place),
            "projection_size": tensors[head].shape[0],
        }
    return Described(vision, text)


def _count(tensors: Tensors, blocks: str) -> int:
    pattern = re.compile(rf"{re.escape(blocks)}\.(\d+)\.")
    return 1 + max(int(match[1]) for name in tensors if (match := pattern.match(name)))


# --- What names and configuration files say ---


def of_timm_name(name: str) -> Described:
    """What timm's name of an image tower says; a tag behind a dot is ignored.

    Raises:
        ValueError: If it is none of SigLIP with an attention-pooling head.
    """
    key = name.removeprefix("timm/").partition(".")[0]
    if match := re.fullmatch(r"naflexvit_(base|so400m)_patch16_siglip", key):
        width = _WIDTHS[match[1]]
        vision = {
            "hidden_size": width,
            "patch_size": 16,
            "num_attention_heads": HEADS[width],
            "hidden_act": ACTIVATIONS[True],
        }
        return Described(vision, source=key)
    if key not in TIMM_TOWERS:
        raise ValueError(f"{name!r} is none of timm's SigLIP towers with a pooling head: {', '.join(TIMM_TOWERS)}")
    width, patch, side, act = TIMM_TOWERS[key]
    vision = {"hidden_size": width, "patch_size": patch, "image_size": side}
    return Described(vision | {"num_attention_heads": HEADS[width], "hidden_act": act}, source=key)


def of_timm_config(config: Mapping[str, Any]) -> Described:
    """What the `config.json` of a timm repository says."""
    given = dict(config.get("model_args") or {})
    described = of_timm_name(config["architecture"])
    fields = {"embed_dim": "hidden_size", "num_heads": "num_attention_heads", "patch_size": "patch_size"}
    described.vision |= {ours: given[theirs] for theirs, ours in fields.items() if theirs in given}
    side = given.get("img_size", dict(config.get("pretrained_cfg") or {}).get("input_size", [0, 0, 0])[-1])
    if side and "image_size" in described.vision:
        described.vision["image_size"] = side if isinstance(side, int) else side[0]
    if "act_layer" in given:
        described.vision["hidden_act"] = ACTIVATIONS["tanh" in given["act_layer"]]
    described.pictures = _pictures(config.get("pretrained_cfg") or {})
    return described


def of_open_clip_name(name: str) -> Described:
    """What a name such as "ViT-B-16-SigLIP2-256" says.

    Raises:
        ValueError: If open_clip has no SigLIP of this name.
    """
    match = re.fullmatch(r"ViT-(B|L|SO400M|gopt)-(\d+)-SigLIP(2?)(?:-i18n)?(?:-(\d+))?", name.removeprefix("timm/"))
    size = {"B": "base", "L": "large", "SO400M": "so400m", "gopt": "giantopt"}[match[1]] if match else ""
    tower = f"vit_{size}_patch{match[2]}_siglip_{match[4] or 224}" if match else ""
    if match is None or tower not in TIMM_TOWERS:
        raise ValueError(f"{name!r} is no SigLIP of open_clip; its names are like ViT-B-16-SigLIP2-256")
    width = _WIDTHS["so400m" if size == "giantopt" else size]
    text = {"hidden_size": width, "num_attention_heads": HEADS[width], "hidden_act": ACTIVATIONS[bool(match[3])]}
    return Described(of_timm_name(tower).vision, text, source=name)


def of_open_clip_config(config: Mapping[str, Any]) -> Described:
    """What an `open_clip_config.json` says.

    Raises:
        ValueError: If it is no SigLIP's.
    """
    model = config.get("model_cfg", config)
    vision, text = dict(model.get("vision_cfg") or {}), dict(model.get("text_cfg") or {})
    odd = [
        f"{name}={settings.get(name)!r}"
        for settings, name, value in (
            (vision, "timm_pool", "map"),
            (vision, "timm_proj", "none"),
            (text, "no_causal_mask", True),
            (text, "pool_type", "last"),
        )
        if settings.get(name) != value
    ]
    if odd:
        raise ValueError(f"open_clip_config.json is that of another model than SigLIP: {', '.join(odd)}")
    described = of_timm_name(vision["timm_model_name"])
    described.vision["image_size"] = vision["image_size"]
    described.text = {
        "hidden_size": text["width"],
        "num_attention_heads": text["heads"],
        "num_hidden_layers": text["layers"],
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["context_length"],
        "hidden_act": ACTIVATIONS[dict(text.get("act_kwargs") or {}).get("approximate") == "tanh"],
        "layer_norm_eps": dict(text.get("norm_kwargs") or {}).get("eps", 1e-5),
    }
    described.pictures = _pictures(config.get("preprocess_cfg") or {})
    described.source = "open_clip_config.json"
    return described


def _pictures(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of our image processor that timm's or open_clip's name."""
    found: dict[str, Any] = {f"image_{name}": list(settings[name]) for name in ("mean", "std") if name in settings}
    resample = {"bilinear": 2, "bicubic": 3}.get(settings.get("interpolation", ""))
    return found | ({} if resample is None else {"resample": resample})


def completed(seen: Described, told: Described | None, name: str) -> Described:
    """The fields of a configuration, of the tensors' shapes and of what a name or a file says.

    Args:
        seen: what `shapes_of` found.
        told: what the source says; None if it says nothing.
        name: of the file, for errors.

    Raises:
        ValueError: If the two contradict each other, or the number of heads is known from neither.
    """
    told = told or Described()
    result = Described(dict(seen.vision), dict(seen.text), dict(told.pictures), told.source)
    for tower in ("vision", "text"):
        fields, others = getattr(result, tower), getattr(told, tower)
        if not fields:
            continue
        wrong = [
            f"{key} {fields[key]} instead of {others[key]}"
            for key in fields
            if others.get(key, fields[key]) != fields[key]
        ]
        if wrong:
            raise ValueError(f"{name} is not what {told.source} says; its {tower} tower has {', '.join(wrong)}")
        fields |= others
        if "num_attention_heads" not in fields:
            if fields["hidden_size"] not in HEADS:
                raise ValueError(
                    f"{name}: the number of heads of the {tower} tower (width {fields['hidden_size']}) does not follow "
                    "from its tensors; keep the configuration file beside it, or name it with preset (--preset)"
                )
            fields["num_attention_heads"] = HEADS[fields["hidden_size"]]
    _complete_vision(result, name)
    if result.text:
        result.text.setdefault("hidden_act", ACTIVATIONS[result.text["vocab_size"] == GEMMA_VOCABULARY])
    return result


def _complete_vision(result: Described, name: str) -> None:
    vision = result.vision
    count = vision.pop("positions", None)
    if count is None:
        vision.setdefault("hidden_act", ACTIVATIONS[True])
        return
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{name} has {count} positions, which is no square grid of patches")
    patch, width = vision["patch_size"], vision["hidden_size"]
    vision.setdefault("image_size", side * patch)
    if vision["image_size"] // patch != side:
        raise ValueError(
            f"{name} has {count} positions, {side} x {side}, and {result.source} says {vision['image_size']} pixels "
            f"with patches of {patch}"
        )
    known = (one[3] for one in TIMM_TOWERS.values() if one[0] == width and one[1] == patch and one[2] // patch == side)
    vision.setdefault("hidden_act", next(known, ACTIVATIONS[True]))
