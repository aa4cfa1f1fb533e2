"""No two parameters share storage after any way of loading, so that every saver of the ecosystem keeps every weight."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import siglip_hf
from every_class import NAMES, inputs_of, model_of, outputs_of

# A text tower has nothing that is converted: one dtype will do.
NAMES_AND_DTYPES = [
    (name, dtype)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for name in NAMES
    if dtype == torch.float32 or not name.endswith("TextModel")
]


def assert_same_weights(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    tensors = model.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def published_state_dict(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What `save_pretrained` writes: the names of the published checkpoints."""
    model.save_pretrained(folder)
    return safetensors.torch.load_file(folder / "model.safetensors")


def from_folder(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def from_shards(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    return type(model).from_pretrained(folder)


def from_pickle(model: Any, folder: Path) -> Any:
    torch.save(published_state_dict(model, folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return type(model).from_pretrained(folder)


def from_state_dict(model: Any, folder: Path) -> Any:
    return type(model).from_pretrained(None, config=model.config, state_dict=published_state_dict(model, folder))


def by_load_state_dict(model: Any, folder: Path) -> Any:
    other = model_of(type(model).__name__, seed=1, dtype=model.dtype)
    other.load_state_dict(published_state_dict(model, folder))
    return other


def by_assigning(model: Any, folder: Path) -> Any:
    other = model_of(type(model).__name__, seed=1, dtype=model.dtype)
    other.load_state_dict(published_state_dict(model, folder), assign=True)
    return other


def by_assigning_its_own_names(model: Any, folder: Path) -> Any:
    other = model_of(type(model).__name__, seed=1, dtype=model.dtype)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return other


LOADERS = [
    from_folder,
    from_shards,
    from_pickle,
    from_state_dict,
    by_load_state_dict,
    by_assigning,
    by_assigning_its_own_names,
]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", NAMES)
def test_no_two_parameters_share_storage(name, loader, tmp_path):
    model = model_of(name)
    loaded = loader(model, tmp_path)
    assert_same_weights(loaded, model.state_dict())
    owners: dict[int, str] = {}
    for key, parameter in loaded.named_parameters(remove_duplicate=False):
        address = parameter.untyped_storage().data_ptr()
        assert owners.setdefault(address, key) == key, f"{key} and {owners[address]} share storage"
    assert len(owners) == len(loaded.state_dict())


def accelerate_save_model(model: Any, other: Any, folder: Path) -> None:
    Accelerator(cpu=True).save_model(model, folder)
    safetensors.torch.load_model(other, folder / "model.safetensors")


def accelerate_save_state(model: Any, other: Any, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(folder)
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.zero_()
    accelerator.load_state(folder)
    other.load_state_dict(accelerator.unwrap_model(prepared).state_dict())


def safetensors_save_model(model: Any, other: Any, folder: Path) -> None:
    safetensors.torch.save_model(model, folder / "model.safetensors")
    assert safetensors.torch.load_model(other, folder / "model.safetensors") == (set(), [])


def hub_save_torch_model(model: Any, other: Any, folder: Path) -> None:
    huggingface_hub.save_torch_model(model, folder)
    huggingface_hub.load_torch_model(other, folder, strict=True)


class Wrapped(nn.Module, huggingface_hub.PyTorchModelHubMixin):
    """Somebody's model around one of ours."""

    def __init__(self, name: str = ""):
        super().__init__()
        self.inner = model_of(name, seed=1)


def hub_mixin(model: Any, other: Any, folder: Path) -> None:
    wrapped = Wrapped(name=type(model).__name__)
    wrapped.inner = model
    wrapped.save_pretrained(folder)
    again = Wrapped.from_pretrained(folder)
    other.load_state_dict(again.to(other.dtype).inner.state_dict())


def distributed(model: Any, other: Any, folder: Path) -> None:
    distributed_checkpoint.save(get_model_state_dict(model), checkpoint_id=folder)
    state = get_model_state_dict(other)
    distributed_checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state)


def torch_save(model: Any, other: Any, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "weights.pt")
    other.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))


def save_pretrained(model: Any, other: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    other.load_state_dict(type(model).from_pretrained(folder).state_dict())


SAVERS: list[Callable[[Any, Any, Path], None]] = [
    accelerate_save_model,
    accelerate_save_state,
    safetensors_save_model,
    hub_save_torch_model,
    hub_mixin,
    distributed,
    torch_save,
    save_pretrained,
]


@pytest.fixture
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize(("name", "dtype"), NAMES_AND_DTYPES)
def test_every_saver_keeps_every_weight(name, saver, dtype, tmp_path, fresh_accelerator):
    model_of(name, dtype=dtype).save_pretrained(tmp_path / "published")
    model = getattr(siglip_hf, name).from_pretrained(tmp_path / "published", dtype=dtype).eval()
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    other = model_of(name, seed=1, dtype=dtype)
    saved = tmp_path / "saved"
    saved.mkdir()
    saver(model, other, saved)
    assert_same_weights(other, expected)


@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained_reads_what_other_savers_wrote(name, tmp_path):
    """A raw state dict has the names of the parameters, a published file those of the checkpoints: both are read."""
    model = model_of(name)
    huggingface_hub.save_torch_model(model, tmp_path)
    model.config.save_pretrained(tmp_path)
    assert "head.attention.in_proj_weight" not in " ".join(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_weights(loaded, model.state_dict())
    for key, value in outputs_of(model, inputs_of(name)).items():
        assert torch.equal(outputs_of(loaded.eval(), inputs_of(name))[key], value)


@pytest.mark.parametrize("name", ["SiglipModel", "SiglipVisionModel", "Siglip2Model", "Siglip2VisionModel"])
def test_names_of_a_raw_state_dict_are_those_of_the_parameters(name):
    """What distributed checkpoints, moving averages and loading in place rely on; see docs/sharding.md."""
    model = model_of(name)
    assert list(model.state_dict()) == [key for key, _ in model.named_parameters()]
