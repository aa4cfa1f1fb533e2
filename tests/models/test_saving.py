"""No two parameters share storage after any way of loading, and a raw state dict has the names of the parameters.

`tests/peers` has the savers of other libraries, which drop or refuse tensors that share storage.
"""

import copy
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from torch import nn

from peers import families


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
    other = families.make(type(model).__name__, seed=1)
    other.load_state_dict(published_state_dict(model, folder))
    return other


def by_assigning(model: Any, folder: Path) -> Any:
    other = families.make(type(model).__name__, seed=1)
    other.load_state_dict(published_state_dict(model, folder), assign=True)
    return other


def by_assigning_its_own_names(model: Any, folder: Path) -> Any:
    other = families.make(type(model).__name__, seed=1)
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
@pytest.mark.parametrize("name", families.CLASSES)
def test_no_two_parameters_share_storage(name, loader, tmp_path):
    model = families.make(name)
    loaded = loader(model, tmp_path)
    assert_same_weights(loaded, model.state_dict())
    families.assert_nothing_shared(loaded)


@pytest.mark.parametrize("name", families.CLASSES)
def test_from_pretrained_reads_what_other_savers_wrote(name, tmp_path):
    """A raw state dict has the names of the parameters, a published file those of the checkpoints: both are read."""
    model = families.make(name)
    huggingface_hub.save_torch_model(model, tmp_path)
    model.config.save_pretrained(tmp_path)
    assert "head.attention.in_proj_weight" not in " ".join(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_weights(loaded, model.state_dict())
    families.assert_same(families.outputs_of(loaded, name), families.outputs_of(model, name))


@pytest.mark.parametrize("name", ["SiglipModel", "SiglipVisionModel", "Siglip2Model", "Siglip2VisionModel"])
def test_names_of_a_raw_state_dict_are_those_of_the_parameters(name):
    """What distributed checkpoints, moving averages and loading in place rely on; see docs/sharding.md."""
    model = families.make(name)
    assert list(model.state_dict()) == [key for key, _ in model.named_parameters()]
