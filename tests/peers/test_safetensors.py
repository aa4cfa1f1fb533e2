"""safetensors: `save_model` refuses or drops tensors that share memory; ours share none."""

import pytest
from safetensors import safe_open
from safetensors.torch import load_model, save_model

from . import families


@pytest.mark.parametrize("name", families.CLASSES)
@pytest.mark.parametrize("dtype", families.DTYPES, ids=str)
def test_save_and_load(name, dtype, folder_of, tmp_path):
    model = families.model_class(name).from_pretrained(folder_of(name, dtype), dtype=dtype)
    save_model(model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not file.metadata()  # it would hold the names of tensors that were dropped
    fresh = families.make(name, seed=1).to(dtype)
    assert load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    families.assert_same_weights(fresh, model)


@pytest.mark.parametrize("name", families.CLASSES)
def test_a_folder_around_it(name, folder_of, tmp_path):
    """With the configuration beside it, the file is a checkpoint."""
    model = families.model_class(name).from_pretrained(folder_of(name))
    save_model(model, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    families.assert_same_weights(families.model_class(name).from_pretrained(tmp_path), model)
