"""Weights of open_clip, timm and single files, in and out; tests/peers/test_layouts.py asks the libraries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

import siglip_hf
from siglip_hf import SiglipConfig, SiglipModel, SiglipVisionModel, convert_weights
from siglip_hf.cli.main import main
from siglip_hf.integrations.layouts import HEADS, TIMM_TOWERS, from_own, of_open_clip_name, recognise, rules
from tiny_checkpoint import write_tiny_checkpoint

CHECKPOINTS = {"siglip": siglip_hf.default_checkpoint, "naflex": siglip_hf.naflex_checkpoint}
TIMM = {"model_args": {"embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8, "act_layer": "gelu_tanh"}}
# What open_clip 3.3 and timm 1.0.31 name the tensors of a tower of one block, with their shapes at width 32.
TIMM_NAMES = {
    "pos_embed": (1, 16, 32),
    "patch_embed.proj.weight": (32, 3, 8, 8),
    "blocks.1.attn.qkv.weight": (96, 32),
    "blocks.1.attn.proj.bias": (32,),
    "blocks.1.norm2.weight": (32,),
    "blocks.1.mlp.fc1.weight": (64, 32),
    "norm.bias": (32,),
    "attn_pool.latent": (1, 1, 32),
    "attn_pool.q.weight": (32, 32),
    "attn_pool.kv.weight": (64, 32),
    "attn_pool.kv.bias": (64,),
    "attn_pool.proj.weight": (32, 32),
    "attn_pool.norm.weight": (32,),
    "attn_pool.mlp.fc2.weight": (32, 64),
}
OPEN_CLIP_NAMES = {
    "logit_scale": (),
    "logit_bias": (),
    "text.positional_embedding": (16, 32),
    "text.transformer.resblocks.1.ln_1.weight": (32,),
    "text.transformer.resblocks.1.attn.in_proj_weight": (96, 32),
    "text.transformer.resblocks.1.attn.out_proj.weight": (32, 32),
    "text.transformer.resblocks.1.mlp.c_fc.weight": (64, 32),
    "text.transformer.resblocks.1.mlp.c_proj.bias": (32,),
    "text.ln_final.weight": (32,),
    "text.text_projection.weight": (32, 32),
    "text.text_projection.bias": (32,),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(tiny):
    return SiglipModel.from_pretrained(tiny).eval()


def of_layout(model, layout):
    """Another library's tensors of a model."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    if layout == "timm":
        state = {name.removeprefix("vision_model."): value for name, value in state.items() if "vision_model" in name}
        return from_own(state, rules(layout, model.config.vision_config))
    return from_own(state, rules(layout, model.config))


def write(folder, tensors, file="model.safetensors", config=None, name="config.json"):
    folder.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / file)
    else:
        torch.save(tensors, folder / file)
    if config is not None:
        (folder / name).write_text(json.dumps(config))
    return folder


def timm_folder(folder, model, **changes):
    return write(
        folder, of_layout(model, "timm"), config={"architecture": "vit_base_patch16_siglip_224", **TIMM} | changes
    )


def open_clip_config(model, **vision):
    text = model.config.text_config
    return {
        "model_cfg": {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "timm_model_name": "vit_base_patch16_siglip_224"}
            | {"timm_pool": "map", "timm_proj": "none"}
            | vision,
            "text_cfg": {"context_length": 16, "vocab_size": text.vocab_size, "width": 32, "heads": 2, "layers": 2}
            | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
            | {"act_kwargs": {"approximate": "tanh"}},
        },
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear"},
    }


def same(folder, model, prefix=""):
    """Whether a folder of transformers holds exactly the weights of a model."""
    found = AutoModel.from_pretrained(folder).state_dict()
    state = model.state_dict()
    return all(torch.equal(value, state[prefix + name]) for name, value in found.items())


@pytest.mark.parametrize(("layout", "names"), [("timm", TIMM_NAMES), ("open_clip", OPEN_CLIP_NAMES)])
def test_names_and_shapes_are_those_of_the_libraries(model, layout, names):
    tensors = of_layout(model, layout)
    assert {name: tuple(tensors[name].shape) for name in names} == names
    assert recognise(tensors) == layout
    if layout == "open_clip":
        assert {f"visual.trunk.{name}" for name in TIMM_NAMES} <= set(tensors)
    qkv = tensors["blocks.1.attn.qkv.weight" if layout == "timm" else "visual.trunk.blocks.1.attn.qkv.weight"]
    projections = model.vision_model.encoder.layers[1].self_attn
    expected = torch.cat([projections.q_proj.weight, projections.k_proj.weight, projections.v_proj.weight])
    assert torch.equal(qkv, expected)


def test_an_image_tower_of_timm_comes_in(model, tmp_path):
    result = convert_weights(timm_folder(tmp_path / "timm", model), tmp_path / "out")
    assert result.source == "timm"
    assert result.notes == ["configuration from vit_base_patch16_siglip_224", "GELU: tanh in the image tower"]
    tower = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert isinstance(tower, SiglipVisionModel)
    assert same(tmp_path / "out", model, "vision_model.")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels).pooler_output, model.vision_model(pixels).pooler_output)


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_both_towers_of_open_clip_come_in_with_their_settings(model, tiny, tmp_path, monkeypatch, file):
    from siglip_hf.integrations import layouts

    # A tower of timm's of tiny size, since open_clip takes them by name only.
    monkeypatch.setitem(layouts.TIMM_TOWERS, "vit_tiny", (32, 8, 32, "gelu"))
    monkeypatch.setitem(layouts.HEADS, 32, 2)
    config = open_clip_config(model, timm_model_name="vit_tiny")
    folder = write(tmp_path / "in", of_layout(model, "open_clip"), file, config, "open_clip_config.json")
    (folder / "spiece.model").write_bytes((tiny / "spiece.model").read_bytes())
    result = convert_weights(folder, tmp_path / "out")
    assert "GELU: exact in the image tower, tanh in the text tower" in result.notes
    assert "tokenizer: spiece.model" in result.notes
    out = AutoModel.from_pretrained(tmp_path / "out")
    assert (out.config.vision_config.hidden_act, out.config.text_config.hidden_act) == ("gelu", "gelu_pytorch_tanh")
    assert same(tmp_path / "out", model)
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (settings["image_mean"], settings["resample"]) == ([0.4, 0.5, 0.6], 2)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(["a cat"])["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(tiny)(["a cat"])["input_ids"]


def test_a_text_projection_without_a_bias_gets_zeros(model, tmp_path, monkeypatch):
    from siglip_hf.integrations import layouts

    monkeypatch.setitem(layouts.HEADS, 32, 2)
    tensors = of_layout(model, "open_clip")
    weight = tensors.pop("text.text_projection.weight")
    tensors["text.text_projection"] = weight.T  # open_clip multiplies by it from the right
    del tensors["text.text_projection.bias"]
    write(tmp_path / "in", tensors, "open_clip_model.safetensors")
    notes = convert_weights(tmp_path / "in", tmp_path / "out").notes
    head = AutoModel.from_pretrained(tmp_path / "out").text_model.head
    assert torch.equal(head.weight, weight)
    assert not head.bias.any()
    assert "its text projection has no bias: zeros are written" in notes


def test_a_vision_tower_in_one_file_comes_in(tmp_path):
    source = load_file(siglip_hf.default_checkpoint() + "/model.safetensors")
    tower = {name: value for name, value in source.items() if name.startswith("vision_model.")}
    file = write(tmp_path / "in", tower, "sigclip_vision_tiny.safetensors") / "sigclip_vision_tiny.safetensors"
    with pytest.raises(ValueError, match=r"number of heads .*width 192.*--preset"):
        convert_weights(file, tmp_path / "out")
    config = json.loads(Path(siglip_hf.default_checkpoint(), "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    convert_weights(file, tmp_path / "out")
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert len(back) == len(tower)
    assert all(
        torch.equal(value, tower[name if name in tower else f"vision_model.{name}"]) for name, value in back.items()
    )


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, None),
        (lambda state: {f"model._orig_mod.{name}": value for name, value in state.items()}, None),
        (
            lambda state: (
                {name: value + 1 for name, value in state.items()}
                | {f"ema.{name}": value for name, value in state.items()}
            ),
            "the averaged weights (ema.*) are taken",
        ),
        (
            lambda state: {"model": {name: value + 1 for name, value in state.items()}, "state_dict_ema": state},
            "the averaged weights (state_dict_ema) are taken",
        ),
    ],
)
def test_weights_are_found_where_training_scripts_put_them(model, tmp_path, wrap, note):
    folder = timm_folder(tmp_path / "in", model)
    torch.save(wrap(of_layout(model, "timm")), folder / "checkpoint.pt")
    result = convert_weights(folder / "checkpoint.pt", tmp_path / "out")
    assert same(tmp_path / "out", model, "vision_model.")
    assert note is None or note in result.notes


@pytest.mark.parametrize("scaled", [False, True])
def test_weights_of_8_bits_are_taken_in_full(model, tmp_path, scaled):
    tensors = of_layout(model, "timm")
    expected, cast = dict(tensors), dict(tensors)
    for name in [name for name in tensors if "mlp.fc1.weight" in name]:
        scale = torch.tensor(0.25) if scaled else torch.tensor(1.0)
        cast[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        expected[name] = (cast[name].float() * scale).bfloat16()
        if scaled:
            cast[name.removesuffix(".weight") + ".scale_weight"] = scale
    cast |= {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} if scaled else {}
    folder = timm_folder(tmp_path / "in", model)
    save_file(cast, folder / "model.safetensors")
    result = convert_weights(folder, tmp_path / "out")
    assert any(note.startswith(f"{4 if scaled else 3} tensors were of 8 bits") for note in result.notes)
    found = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(found["encoder.layers.0.mlp.fc1.weight"], expected["blocks.0.mlp.fc1.weight"].float())


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_out_to_timm_and_back_is_exact(family, tmp_path):
    source = CHECKPOINTS[family]()
    result = convert_weights(source, tmp_path / "timm", to="timm")
    convert_weights(tmp_path / "timm", tmp_path / "back")
    before, after = load_file(source + "/model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert result.parameters == sum(value.numel() for value in after.values())
    assert len(after) == sum(name.startswith("vision_model.") for name in before)
    for name, value in after.items():
        assert torch.equal(value, before[name if name in before else f"vision_model.{name}"]), name
    wanted = AutoConfig.from_pretrained(source).vision_config
    found = AutoConfig.from_pretrained(tmp_path / "back")
    different = {name for name in type(wanted).__dataclass_fields__ if getattr(found, name) != getattr(wanted, name)}
    assert different <= {"architectures", "dtype", "transformers_version"}


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_out_to_big_vision_and_back_is_exact(family, tmp_path):
    source = CHECKPOINTS[family]()
    convert_weights(source, tmp_path / "original.npz", to="big_vision")
    with np.load(tmp_path / "original.npz") as tree:
        assert tree["params/img/Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"].ndim == 3
    convert_weights(tmp_path / "original.npz", tmp_path / "back", dtype="float16")
    before, after = load_file(source + "/model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_out_to_open_clip_only_what_it_has_a_name_for(tmp_path):
    with pytest.raises(ValueError, match=r"none has width 192, patches of 16, pictures of 64.*to='timm'"):
        convert_weights(siglip_hf.default_checkpoint(), tmp_path / "out", to="open_clip")
    with pytest.raises(ValueError, match="no two-tower NaFlex"):
        convert_weights(siglip_hf.naflex_checkpoint(), tmp_path / "out", to="open_clip")


def test_names_of_open_clip_say_what_its_files_say():
    told = of_open_clip_name("ViT-gopt-16-SigLIP2-384")
    assert (told.vision["hidden_size"], told.vision["image_size"], told.vision["hidden_act"]) == (
        1536,
        384,
        "gelu_pytorch_tanh",
    )
    assert told.text == {"hidden_size": 1152, "num_attention_heads": 16, "hidden_act": "gelu_pytorch_tanh"}
    assert of_open_clip_name("ViT-B-16-SigLIP2").vision["hidden_act"] == "gelu"  # as open_clip computes it
    assert of_open_clip_name("ViT-B-16-SigLIP-i18n-256").text["hidden_act"] == "gelu"
    for wrong in ("ViT-B-16", "ViT-B-14-SigLIP", "ViT-H-16-SigLIP2"):
        with pytest.raises(ValueError, match=f"'{wrong}' is no SigLIP of open_clip"):
            of_open_clip_name(wrong)


def test_what_does_not_fit_is_named(model, tmp_path):
    tensors = of_layout(model, "timm")
    del tensors["blocks.1.norm1.weight"]
    tensors["blocks.0.ls1.gamma"] = torch.zeros(32)
    tensors["norm.bias"] = torch.zeros(31)
    config = {"architecture": "vit_base_patch16_siglip_224", **TIMM}
    folder = write(tmp_path / "in", tensors, config=config)
    with pytest.raises(ValueError, match="does not fit") as caught:
        convert_weights(folder, tmp_path / "out")
    for part in (
        "missing: blocks.1.norm1.weight",
        "left over: blocks.0.ls1.gamma",
        "norm.bias (31,) instead of (32,)",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": TIMM["model_args"] | {"embed_dim": 48}}, "hidden_size 32 instead of 48"),
        ({"model_args": TIMM["model_args"] | {"img_size": 64}}, "16 positions, 4 x 4, and .* 64 pixels"),
        ({"architecture": "vit_base_patch16_clip_224"}, "none of timm's SigLIP towers"),
    ],
)
def test_a_configuration_that_the_shapes_contradict_is_refused(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        convert_weights(timm_folder(tmp_path / "in", model, **changes), tmp_path / "out")


def test_a_clip_model_of_open_clip_is_refused(model, tmp_path):
    config = open_clip_config(model, timm_pool="avg")
    folder = write(
        tmp_path / "in", of_layout(model, "open_clip"), "open_clip_model.safetensors", config, "open_clip_config.json"
    )
    with pytest.raises(ValueError, match="another model than SigLIP: timm_pool='avg'"):
        convert_weights(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"visual.conv1.weight": torch.zeros(2)}, "holds no SigLIP .*visual.conv1.weight"),
        (torch.zeros(2), "holds a Tensor"),
        (b"no pickle", "cannot be read as weights alone"),
    ],
)
def test_what_is_no_siglip_is_refused_in_one_line(tmp_path, content, message, capsys):
    file = tmp_path / "model.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        convert_weights(file, tmp_path / "out")
    assert main(["convert", str(file), "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def places(value, path=()):
    """Where everything in a JSON value stands."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def with_value(content, place, value):
    """A copy of a JSON value with another one somewhere; the place is taken out for `...`."""
    if not place:
        return value
    copy = json.loads(json.dumps(content))
    *way, last = place
    inner = copy
    for key in way:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return copy


@pytest.mark.parametrize("layout", ["open_clip", "timm"])
def test_any_damage_of_a_configuration_file_is_named(model, tmp_path, monkeypatch, layout):
    class Written(Exception):
        pass

    def written(*args, **kwargs):
        raise Written("all is well")

    monkeypatch.setattr("siglip_hf.integrations.convert.new_folder", written)
    monkeypatch.setitem(TIMM_TOWERS, "vit_base_patch16_siglip_224", (32, 8, 32, "gelu_pytorch_tanh"))
    monkeypatch.setitem(HEADS, 32, 2)
    tensors = {name: value.clone() for name, value in of_layout(model, layout).items()}
    monkeypatch.setattr("siglip_hf.integrations.convert._read", lambda file: (dict(tensors), []))
    vision = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {
        "open_clip": open_clip_config(model),
        "timm": {"architecture": "vit_base_patch16_siglip_224", **TIMM, "pretrained_cfg": vision},
    }[layout]
    name = "open_clip_config.json" if layout == "open_clip" else "config.json"
    write(tmp_path, {"a": torch.zeros(1)}, config=config, name=name)
    with pytest.raises(Written):
        convert_weights(tmp_path, tmp_path / "out")
    tried = named = 0
    for place in places(config):
        for value in (..., None, "x", -1, [], {}):
            if value is ... and not place:
                continue
            (tmp_path / name).write_text(json.dumps(with_value(config, place, value)))
            tried += 1
            with pytest.raises((Written, ValueError), match=r"\w") as caught:
                convert_weights(tmp_path, tmp_path / "out")
            named += caught.type is not Written
    assert named > tried // 3
    for text in ("", "{", "[" * 100_000, "\ud800"):
        (tmp_path / name).write_text(text, errors="surrogatepass")
        with pytest.raises(ValueError, match=name):
            convert_weights(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("layout", ["open_clip", "timm", "transformers"])
def test_any_tensor_that_is_missing_or_of_another_shape_is_named(model, tmp_path, monkeypatch, layout):
    whole = {name: value.clone() for name, value in of_layout(model, layout).items()}
    found = {}
    monkeypatch.setattr("siglip_hf.integrations.convert._read", lambda file: (dict(found), []))
    write(tmp_path, {"a": torch.zeros(1)})
    if layout == "open_clip":  # as it is without a bias
        whole["text.text_projection"] = torch.zeros(32, 32)
    for name, value in whole.items():
        for changed in (None, torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(2, 2), value.unsqueeze(-1)):
            found.clear()
            found.update({**whole, name: changed} if changed is not None else {**whole})
            if changed is None:
                del found[name]
            with pytest.raises(ValueError, match=r"\w"):
                convert_weights(tmp_path, tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(model, tmp_path):
    folder = timm_folder(tmp_path / "in", model)
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"the weight post_layernorm\.bias is not finite"):
        convert_weights(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_text_are_refused(tmp_path):
    torch.save({1: torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds no SigLIP"):
        convert_weights(tmp_path / "model.pt", tmp_path / "out")


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        convert_weights(tmp_path / "model.pt", tmp_path / "out")
    assert not (tmp_path / "made").exists()


def test_the_command_converts_both_ways(tmp_path, capsys):
    line = ["convert", siglip_hf.default_checkpoint(), "--to", "timm", "--out", str(tmp_path / "timm")]
    assert main(line) == 0
    assert "transformers to timm, 3.3 million parameters" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "timm"), "--out", str(tmp_path / "back")]) == 0
    assert "GELU: tanh in the image tower" in capsys.readouterr().out
    assert main(line) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*line[:-1], str(tmp_path / "x"), "--to", "clip"]) == 2
    assert "to='clip' is unknown" in capsys.readouterr().err


def test_lone_files_of_published_shapes_need_no_configuration():
    """Of the shapes alone: no weights are made."""
    from siglip_hf.integrations.layouts import completed, shapes_of

    config = SiglipConfig.from_preset("siglip2-base-patch16-384")
    with torch.device("meta"):
        model = SiglipModel(config)
    found = completed(shapes_of(of_layout(model, "open_clip"), "open_clip"), None, "file")
    assert found.vision["image_size"] == 384
    assert (found.vision["hidden_act"], found.text["hidden_act"]) == ("gelu", "gelu_pytorch_tanh")
    assert (found.vision["num_attention_heads"], found.text["num_attention_heads"]) == (12, 12)
