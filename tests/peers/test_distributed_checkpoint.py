"""torch.distributed.checkpoint, in one process: what is saved is loaded into a model with other weights."""

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from . import families


@pytest.mark.parametrize("name", families.CLASSES)
@pytest.mark.parametrize("dtype", families.DTYPES, ids=str)
def test_save_and_load(name, dtype, folder_of, tmp_path):
    model = families.model_class(name).from_pretrained(folder_of(name, dtype), dtype=dtype)
    checkpoint.save(get_model_state_dict(model), checkpoint_id=tmp_path / "saved", no_dist=True)
    fresh = families.make(name, seed=1).to(dtype)
    state = get_model_state_dict(fresh)
    checkpoint.load(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    missing = set_model_state_dict(fresh, state)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    families.assert_same_weights(fresh, model)


@pytest.mark.parametrize("name", families.CLASSES)
def test_plain_state_dict(name, folder_of, tmp_path):
    """`torch.save` of a state_dict, the oldest way of all."""
    model = families.model_class(name).from_pretrained(folder_of(name))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    fresh = families.make(name, seed=1)
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt"), strict=True)
    families.assert_same_weights(fresh, model)
