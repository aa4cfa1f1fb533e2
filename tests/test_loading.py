"""One loader for all: what it loads is what the Auto classes load, and what is wrong ends in one clear ValueError."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

import siglip_hf
from siglip_hf.apps.scorers import load_scorer
from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.inference.classify import load_classifier
from siglip_hf.loading import default_checkpoint, load_checkpoint, load_model, naflex_checkpoint, pick_device
from tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.mark.parametrize("checkpoint", [default_checkpoint(), naflex_checkpoint()])
@pytest.mark.parametrize("fast", [False, True])
def test_loads_what_the_auto_classes_load(checkpoint, fast):
    model, processor = load_checkpoint(checkpoint, dtype="float32", fast_pictures=fast)
    other = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    assert type(model) is type(other)
    assert not model.training
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    assert type(processor) is type(AutoProcessor.from_pretrained(checkpoint))
    assert type(processor.image_processor).__name__.endswith("Fast") == fast


def test_the_embedded_checkpoint_is_the_default():
    model, _ = load_checkpoint()
    assert model.config.to_dict() == load_model(default_checkpoint()).config.to_dict()
    assert model.dtype == torch.float16  # that of the files


# --- damage ---------------------------------------------------------------------------------------------------------


def edit(file: str, **values) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for key, value in values.items():
            *parents, last = key.split("__")
            inner = content
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
        (folder / file).write_text(json.dumps(content))

    return change


def change_weights(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled_code(folder: Path) -> None:
    """A pickle that would run code if it were read as one."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print))


def write(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content)


BIAS = "text_model.final_layer_norm.bias"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN weights": (change_weights(lambda t: t[BIAS].__setitem__(3, torch.nan)), f"{BIAS} is not finite"),
    "infinite weights": (change_weights(lambda t: t[BIAS].__setitem__(0, torch.inf)), f"{BIAS} is not finite"),
    "NaN temperature": (change_weights(lambda t: t["logit_scale"].fill_(torch.nan)), "logit_scale is not finite"),
    "missing weights": (change_weights(lambda t: t.pop(BIAS)), f"lack 1 weights, {BIAS} among them"),
    "weights of another width": (change_weights(lambda t: t.update({BIAS: torch.zeros(7)})), "mismatch"),
    "truncated weights": (truncate, "SafetensorError"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "a pickle": (pickled_code, "npickl|weights_only"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "a configuration that is no JSON": (write("config.json", b"{"), "config.json|JSON"),
    "a configuration that is a list": (write("config.json", b"[1]"), "model"),
    "an empty configuration": (write("config.json", b""), "config.json|JSON"),
    "a configuration that is binary": (write("config.json", bytes(range(256))), "config.json|codec"),
    "width as a word": (edit("config.json", text_config__hidden_size="wide"), "hidden_size .* got 'wide'"),
    "towers as a list": (edit("config.json", vision_config=[1, 2]), "list"),
    "no such activation": (edit("config.json", vision_config__hidden_act="nonsense"), "no hidden_act 'nonsense'"),
    "negative depth": (edit("config.json", text_config__num_hidden_layers=-1), "num_hidden_layers must be"),
    "heads that do not divide": (edit("config.json", text_config__num_attention_heads=5), "multiple of"),
    "preprocessor of 30,000": (
        edit("preprocessor_config.json", size={"height": 30_000, "width": 30_000}),
        "size is .*30000.*model's image_size is 32",
    ),
    "image_std of zeros": (edit("preprocessor_config.json", image_std=[0, 0, 0]), r"image_std .*\(0, 0, 0\)"),
    "image_std as words": (edit("preprocessor_config.json", image_std="half"), "image_std"),
    "NaN in image_mean": (edit("preprocessor_config.json", image_mean=[0.5, float("nan"), 0.5]), "image_mean"),
    "rescale_factor of 0": (edit("preprocessor_config.json", rescale_factor=0), "rescale_factor .* 0"),
    "no preprocessor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "image processor|preprocessor"),
    "no vocabulary": (lambda folder: (folder / "spiece.model").unlink(), "."),
    "a vocabulary that is none": (write("spiece.model", b"nonsense"), "."),
    "a token that is not in the vocabulary": (
        edit("tokenizer_config.json", eos_token="<os>"),
        "eos_token '<os>' is number 48, but the model's vocab_size is 48",
    ),
    "another text length": (edit("tokenizer_config.json", model_max_length=7), "model_max_length is 7"),
    "a tokenizer configuration that is a list": (write("tokenizer_config.json", b"[]"), "."),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_error_for_all(damage, folder):
    """`classify`, `embed` and the apps agree on what a loadable folder is."""
    change, message = DAMAGE[damage]
    change(folder)
    errors = set()
    for load in (load_classifier, lambda name: SiglipEmbedder(name, dtype="float32", fast=False), load_scorer):
        with pytest.raises(ValueError, match=rf"(?s)^cannot load '{folder}': .*({message})") as raised:
            load(str(folder))
        errors.add(str(raised.value))
    assert len(errors) == 1
    assert "\n" not in errors.pop()


def test_naflex_settings_that_cannot_be(tmp_path):
    folder = Path(shutil.copytree(naflex_checkpoint(), tmp_path / "naflex"))
    edit("preprocessor_config.json", patch_size=30_000)(folder)
    with pytest.raises(ValueError, match=r"cannot load .*patch_size is 30000"):
        load_checkpoint(folder)


def test_other_models_are_named(tmp_path):
    load_model(default_checkpoint()).vision_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is a SiglipVisionModel, not a SigLIP model with both towers"):
        load_checkpoint(tmp_path)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["./nonexist", "../nonexist", "/nowhere/model", "a/b/c", "~/model", "C:\\models\\one", ""]
)
def test_what_can_only_be_a_path(name):
    with pytest.raises(ValueError, match="no such folder"):
        load_checkpoint(name)


def test_a_missing_folder_beside_others_is_no_hub_name(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^cannot load 'runs/latest': no such folder\.$"):
        load_checkpoint("runs/latest")


def test_a_file_is_no_folder(folder):
    with pytest.raises(ValueError, match="it is a file; give the folder"):
        load_checkpoint(folder / "model.safetensors")


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_name_that_cannot_be_fetched(offline, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(AutoModel, "from_pretrained", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ValueError, match="cannot load 'google/siglip-none'") as raised:
        load_checkpoint("google/siglip-none")
    message = str(raised.value)
    assert ("HF_HUB_OFFLINE is set" in message) == offline
    assert ("We couldn't connect to the hub." in message) != offline
    assert "siglip_hf.default_checkpoint()" in message


def test_folders_ask_nothing_of_the_network_and_set_no_variable(folder, monkeypatch):
    """HF_HUB_OFFLINE, set late, changes nothing here and goes on to child processes."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked = []
    original = AutoModel.from_pretrained
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *a, **k: asked.append(k) or original(*a, **k))
    load_checkpoint(folder)
    SiglipEmbedder(folder, fast=False)
    import os

    assert "HF_HUB_OFFLINE" not in os.environ
    assert [options["local_files_only"] for options in asked] == [True, True]


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "gpu", "meta"):
        with pytest.raises(ValueError, match=f"device='{name}' cannot be used"):
            pick_device(name)
    with pytest.raises(ValueError, match="device='cuda:99' cannot be used"):
        load_classifier(default_checkpoint(), "cuda:99")


def test_classifier_and_pipeline_agree(folder):
    from transformers import pipeline

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    ours = load_classifier(str(folder), "cpu")
    other = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    assert ours(picture, candidate_labels="cat, dog") == other(picture, candidate_labels="cat, dog")
    assert type(ours.image_processor) is type(other.image_processor)
    assert type(ours) is type(other)
    assert siglip_hf.default_checkpoint() == default_checkpoint()
