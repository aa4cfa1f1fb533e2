"""huggingface_hub: its savers, and models of one's own that hold one of ours and use its mixin."""

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin, load_torch_model, save_torch_model

from . import families


@pytest.mark.parametrize("name", families.CLASSES)
@pytest.mark.parametrize("dtype", families.DTYPES, ids=str)
def test_save_torch_model(name, dtype, folder_of, tmp_path):
    model = families.model_class(name).from_pretrained(folder_of(name, dtype), dtype=dtype)
    save_torch_model(model, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    fresh = families.make(name, seed=1).to(dtype)
    load_torch_model(fresh, tmp_path, strict=True)
    families.assert_same_weights(fresh, model)


class Wrapped(torch.nn.Module, PyTorchModelHubMixin):
    """What people build: a backbone by its name, and a layer of their own."""

    def __init__(self, name: str, folder: str, outputs: int = 2):
        super().__init__()
        self.backbone = families.model_class(name).from_pretrained(folder)
        self.own = torch.nn.Linear(64, outputs)


@pytest.mark.parametrize("name", families.CLASSES)
def test_model_hub_mixin(name, folder_of, tmp_path):
    model = Wrapped(name, str(folder_of(name)))
    for parameter in model.backbone.parameters():  # so that the backbone's folder does not hold them
        parameter.data += 1
    model.save_pretrained(tmp_path)
    families.assert_same_weights(Wrapped.from_pretrained(tmp_path), model)
