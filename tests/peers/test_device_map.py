"""accelerate: models spread over memory and disk give the outputs of the whole model."""

import json

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification

import siglip_hf

from . import tiny

EVERY_CLASS = [
    siglip_hf.SiglipModel,
    siglip_hf.SiglipTextModel,
    siglip_hf.SiglipVisionModel,
    siglip_hf.SiglipForImageClassification,
]


def inputs_of(model_class: type) -> dict[str, torch.Tensor]:
    inputs = tiny.inputs()
    if model_class is siglip_hf.SiglipTextModel:
        del inputs["pixel_values"]
    elif model_class is not siglip_hf.SiglipModel:
        del inputs["input_ids"]
    return inputs


def assert_same_outputs(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    inputs = inputs_of(type(reference))
    with torch.no_grad():
        output, expected = model(**inputs, return_dict=True), reference(**inputs, return_dict=True)
    for name in ("logits_per_image", "image_embeds", "text_embeds", "pooler_output", "last_hidden_state", "logits"):
        assert (name in output) == (name in expected)
        if name in expected:
            torch.testing.assert_close(output[name], expected[name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=[False, True], ids=["one file", "shards"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    tiny.joint_model().save_pretrained(folder, max_shard_size="100KB" if request.param else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == request.param
    return folder


@pytest.fixture(scope="module")
def classifier_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    tiny.classifier().save_pretrained(folder)
    return folder


PER_MODULE = {
    "logit_scale": "cpu",
    "logit_bias": "cpu",
    "text_model": "cpu",
    "vision_model.embeddings": "cpu",
    "vision_model.encoder.layers.0": "disk",
    "vision_model.encoder.layers.1": "cpu",
    "vision_model.post_layernorm": "disk",
    "vision_model.head": "disk",
}


@pytest.mark.parametrize(
    ("device_map", "expected_devices"),
    [
        ("auto", {"cpu"}),
        ("cpu", {"cpu"}),
        ("sequential", {"cpu"}),
        ({"": "disk"}, {"disk"}),
        (PER_MODULE, {"cpu", "disk"}),
        (
            {"logit_scale": "cpu", "logit_bias": "cpu", "text_model": "disk", "vision_model": "cpu"},
            {"cpu", "disk"},
        ),
    ],
    ids=["auto", "cpu", "sequential", "all on disk", "per module", "a tower on disk"],
)
def test_device_map(checkpoint, tmp_path, device_map, expected_devices):
    model = AutoModel.from_pretrained(checkpoint, device_map=device_map, offload_folder=tmp_path)
    assert set(getattr(model, "hf_device_map", {"": "cpu"}).values()) == expected_devices
    offloaded = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
    assert bool(offloaded) == ("disk" in expected_devices)
    assert_same_outputs(model, tiny.joint_model())


@pytest.mark.parametrize("device_map", ["auto", "sequential", "balanced"])
def test_max_memory_forces_a_part_to_disk(checkpoint, tmp_path, device_map):
    limit = tiny.joint_model().get_memory_footprint() // 2
    model = AutoModel.from_pretrained(
        checkpoint, device_map=device_map, max_memory={"cpu": limit}, offload_folder=tmp_path
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    in_memory = sum(p.numel() * 4 for p in model.parameters() if p.device.type != "meta")
    assert 0 < in_memory <= limit
    assert_same_outputs(model, tiny.joint_model())


@pytest.mark.parametrize("model_class", EVERY_CLASS)
def test_no_layer_is_split(model_class, checkpoint, classifier_checkpoint, tmp_path):
    """However small the memory, a residual block, the embeddings and the pooling head stay in one place each."""
    folder = classifier_checkpoint if model_class is siglip_hf.SiglipForImageClassification else checkpoint
    reference = model_class.from_pretrained(folder)
    together = set(reference._no_split_modules)
    blocks = [name for name, module in reference.named_modules() if type(module).__name__ in together]
    assert len([name for name in blocks if ".layers." in f".{name}"]) in (2, 4)
    footprint = reference.get_memory_footprint()
    for part in (0.3, 0.5, 0.7, 0.9):
        memory = {"cpu": int(footprint * part)}
        model = model_class.from_pretrained(folder, device_map="auto", max_memory=memory, offload_folder=tmp_path)
        assert "disk" in model.hf_device_map.values()
        inside = [key for key in model.hf_device_map for block in blocks if key.startswith(f"{block}.")]
        assert inside == []
        assert_same_outputs(model, reference)


@pytest.mark.parametrize("model_class", EVERY_CLASS)
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offload_of_a_model_in_memory(model_class, offload, checkpoint, classifier_checkpoint, tmp_path):
    folder = classifier_checkpoint if model_class is siglip_hf.SiglipForImageClassification else checkpoint
    reference = model_class.from_pretrained(folder)
    model = model_class.from_pretrained(folder)
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert_same_outputs(model, reference)


def test_offloaded_models_encode(checkpoint, tmp_path):
    model = AutoModel.from_pretrained(checkpoint, device_map={"": "disk"}, offload_folder=tmp_path)
    reference = tiny.joint_model()
    with torch.no_grad():
        for output, expected in (
            (model.encode_image(tiny.pictures()), reference.encode_image(tiny.pictures())),
            (model.encode_text(tiny.texts()), reference.encode_text(tiny.texts())),
            (
                model.encode_image(tiny.pictures(height=48, width=40), interpolate_pos_encoding=True),
                reference.encode_image(tiny.pictures(height=48, width=40), interpolate_pos_encoding=True),
            ),
        ):
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_shard_size", ["1GB", "200KB"])
def test_an_offloaded_model_is_saved_whole(checkpoint, tmp_path, max_shard_size):
    model = AutoModel.from_pretrained(checkpoint, device_map=PER_MODULE, offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    tensors = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        tensors |= load_file(file)
    assert "vision_model.head.attention.in_proj_weight" in tensors
    assert not [name for name in tensors if "head.attention.q_proj" in name]
    index = tmp_path / "saved" / "model.safetensors.index.json"
    if index.exists():
        # transformers keeps the names from before the conversion in this index, too; those in the files must be there.
        assert tensors.keys() <= json.loads(index.read_text())["weight_map"].keys()
    assert_same_outputs(AutoModel.from_pretrained(tmp_path / "saved"), tiny.joint_model())


def test_a_new_classifier_on_an_offloaded_tower(checkpoint, tmp_path):
    """A layer that no file holds gets its first values in memory, while the tower stays on disk."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(
        checkpoint, num_labels=3, device_map={"vision_model": "disk", "classifier": "cpu"}, offload_folder=tmp_path
    )
    reference = tiny.classifier()
    reference.classifier.load_state_dict(model.classifier.state_dict())
    state = tiny.joint_model().vision_model.state_dict()
    reference.vision_model.load_state_dict(state)
    assert_same_outputs(model, reference)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: pytest -m gpu tests/peers")
def test_two_gpus(checkpoint):
    footprint = tiny.joint_model().get_memory_footprint()
    model = AutoModel.from_pretrained(
        checkpoint, device_map="auto", max_memory={0: int(footprint * 0.6), 1: int(footprint * 0.8)}
    )
    assert set(model.hf_device_map.values()) == {0, 1}
    with torch.no_grad():
        output = model(**{key: value.to(0) for key, value in tiny.inputs().items()})
        expected = tiny.joint_model()(**tiny.inputs())
    torch.testing.assert_close(output.logits_per_image.cpu(), expected.logits_per_image, rtol=1e-4, atol=1e-4)
