"""Our conversions against open_clip and timm themselves: their own classes, random weights, their own forward passes.

Both import torchvision without need, so that they are in no extra; `make test-layouts` installs them into a folder of
their own and runs this file, with a stand-in for torchvision.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

import siglip_hf
from bench.stand_in import import_peer
from siglip_hf import SiglipConfig, SiglipModel, convert_weights
from siglip_hf.integrations.layouts import TIMM_TOWERS, of_open_clip_config, of_open_clip_name, of_timm_name

assert AutoProcessor is not None  # transformers looks for torchvision when it is imported: before the stand-in
timm, open_clip = import_peer("timm"), import_peer("open_clip")
pytestmark = pytest.mark.skipif(
    timm is None or open_clip is None, reason="timm and open_clip are not installed: make test-layouts"
)
WITHIN = 1e-6


def unit(embeds):
    return torch.nn.functional.normalize(embeds.float(), dim=-1)


def randomized(model, seed=0):
    """Weights with which nothing vanishes, neither a bias nor a difference between two pictures."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.randn_like(value) * 0.05 + ("norm" in name and name.endswith("weight")))
    return model.eval()


def tiny_tower(**arguments):
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 48, "num_classes": 0}
    return randomized(timm.create_model("vit_base_patch16_siglip_224", **sizes | arguments)), sizes | arguments


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_a_tower_of_timm_gives_timms_own_embeddings(tmp_path, act):
    theirs, arguments = tiny_tower(act_layer=act)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_base_patch16_siglip_224", "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert_weights(tmp_path, tmp_path / "out")
    ours, pixels = AutoModel.from_pretrained(tmp_path / "out").eval(), torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        assert (unit(ours(pixels).pooler_output) - unit(theirs(pixels))).abs().max() < WITHIN


@pytest.mark.parametrize("family", ["siglip", "naflex"])
def test_timm_loads_what_we_write_and_gives_the_same_embeddings(tmp_path, family):
    source = siglip_hf.default_checkpoint() if family == "siglip" else siglip_hf.naflex_checkpoint()
    convert_weights(source, tmp_path / "timm", to="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).float().eval()
    ours = AutoModel.from_pretrained(source, dtype=torch.float32).eval().vision_model
    with torch.no_grad():
        if family == "siglip":
            pixels = torch.randn(3, 3, 64, 64)
            left, right = ours(pixels).pooler_output, theirs(pixels)
        else:
            rows, columns = 6, 9
            patches = torch.randn(2, rows * columns, ours.config.patch_values)
            places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).expand(2, -1, -1)
            valid = torch.ones(2, rows * columns, dtype=torch.bool)
            left = ours(patches, valid.int(), torch.tensor([[rows, columns]] * 2)).pooler_output
            right = theirs({"patches": patches, "patch_coord": places, "patch_valid": valid})
    assert (unit(left) - unit(right)).abs().max() < WITHIN
    kept = load_file(tmp_path / "timm" / "model.safetensors")
    assert kept.keys() == theirs.state_dict().keys()


@pytest.fixture(scope="module")
def joint():
    """open_clip's base model with few words and two blocks of text."""
    settings = json.loads(json.dumps(open_clip.get_model_config("ViT-B-16-SigLIP2-256")))
    settings["text_cfg"] |= {"layers": 2, "vocab_size": 500}
    keys = ("embed_dim", "vision_cfg", "text_cfg", "init_logit_bias")
    return randomized(open_clip.CustomTextCLIP(**{key: settings[key] for key in keys})), settings


def test_both_towers_of_open_clip_give_its_own_embeddings_and_bytes_after_a_round_trip(tmp_path, joint):
    theirs, settings = joint
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "epoch_1.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    convert_weights(tmp_path / "epoch_1.pt", tmp_path / "ours")
    ours = AutoModel.from_pretrained(tmp_path / "ours").eval()
    pixels, ids = torch.randn(2, 3, 256, 256), torch.randint(2, 500, (3, 64))
    with torch.no_grad():
        assert (ours.encode_image(pixels) - theirs.encode_image(pixels, normalize=True)).abs().max() < WITHIN
        assert (ours.encode_text(ids) - theirs.encode_text(ids, normalize=True)).abs().max() < WITHIN
    result = convert_weights(tmp_path / "ours", tmp_path / "back", to="open_clip")
    assert [note for note in result.notes if "GELU" in note] == []
    back = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in back.items())
    again = open_clip.create_model(f"local-dir:{tmp_path / 'back'}")
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_open_clip_says_where_its_gelu_differs(tmp_path):
    vision = {"image_size": 224, "patch_size": 16}
    text = {"vocab_size": 100, "num_hidden_layers": 1, "max_position_embeddings": 8}
    SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(tmp_path / "ours")
    notes = convert_weights(tmp_path / "ours", tmp_path / "out", to="open_clip").notes
    assert any("vit_base_patch16_siglip_224 with the exact GELU, this model the tanh one" in note for note in notes)


def test_the_table_of_names_is_timms_and_open_clips():
    import timm.models as models

    tanh = {}
    for name in timm.list_models("vit_*_siglip_*"):
        if "_gap_" not in name:
            with torch.device("meta"):
                tower = models.create_model(name, depth=1)
            told = of_timm_name(name).vision
            tanh[name] = "tanh" in str(tower.blocks[0].mlp.act).lower()
            assert told["hidden_act"] == ("gelu_pytorch_tanh" if tanh[name] else "gelu"), name
            assert told["image_size"] == tower.default_cfg["input_size"][-1], name
            assert (told["hidden_size"], told["num_attention_heads"]) == (
                tower.embed_dim,
                tower.blocks[0].attn.num_heads,
            )
    assert set(tanh) == set(TIMM_TOWERS)
    names = [name for name in open_clip.list_models() if name.startswith("ViT") and "SigLIP" in name]
    assert len(names) == 26
    for name in names:
        by_file, by_name = of_open_clip_config(open_clip.get_model_config(name)), of_open_clip_name(name)
        assert by_file.vision == by_name.vision, name
        assert by_name.text.items() <= by_file.text.items(), name


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-B-16-SigLIP2"])
def test_texts_are_read_as_migrating_says(name):
    """open_clip cleans texts of both families as we clean SigLIP's, but for `_`, HTML entities and broken Unicode."""
    clean = open_clip.tokenizer.get_clean_fn(open_clip.get_model_config(name)["text_cfg"]["tokenizer_kwargs"]["clean"])
    for text in ("A photo of  a Dog, isn't it?", " two\tcats\n", "caf\u00e9 \u2014 \u732b"):
        assert clean(text) == siglip_hf.canonicalize_text(text)
    for text, theirs, ours in (
        ("hot_air_balloon", "hot air balloon", "hotairballoon"),
        ("salt &amp; pepper", "salt pepper", "salt amp pepper"),
        ("caf\u00c3\u00a9", "caf\u00e9", "caf\u00e3\u00a9"),
    ):
        assert (clean(text), siglip_hf.canonicalize_text(text)) == (theirs, ours)


def test_the_two_gelus_differ_as_migrating_says():
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    exact, tanh = torch.nn.functional.gelu(x), torch.nn.functional.gelu(x, approximate="tanh")
    assert 0.0004 < (exact - tanh).abs().max() < 0.0005
