"""FSDP2: every weight is read in its own module's call, so any choice of sharded modules gives the same numbers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from peers import families


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """One process: parameters are sharded tensors all the same, outside of their modules' calls."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def every_layer(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module is not model and module._parameters]


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


def attentions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("Attention")]


def nothing_else(model: nn.Module) -> list[nn.Module]:
    return []


@pytest.mark.parametrize("units", [every_layer, blocks, attentions, nothing_else])
@pytest.mark.parametrize("name", families.CLASSES)
def test_any_modules_can_be_sharded(name, units, mesh):
    model, expected = families.make(name), families.outputs_of(families.make(name), name)
    for module in reversed(units(model)):  # from the inside out
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters())
    families.assert_rounds_alike(families.outputs_of(model, name), expected, torch.float32)
    output = model(**families.inputs_of(name), return_dict=True)
    sum(output[key].square().sum() for key in families.OUTPUTS if output.get(key) is not None).backward()
    unused = ("vision_model.head.",) if "Classification" in name else ()
    missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert [key for key in missing if not key.startswith(unused)] == []


@pytest.mark.parametrize("units", [every_layer, blocks])
@pytest.mark.parametrize("name", ["SiglipModel", "Siglip2Model"])
@torch.no_grad()
def test_a_sharded_model_encodes(name, units, mesh):
    model, reference = families.make(name), families.make(name)
    for module in reversed(units(model)):  # from the inside out
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)
    inputs = families.inputs_of(name)
    texts = inputs.pop("input_ids")
    torch.testing.assert_close(model.encode_text(texts), reference.encode_text(texts), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_image(**inputs), reference.encode_image(**inputs), atol=1e-5, rtol=0)
