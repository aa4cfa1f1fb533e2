"""Module paths of version 0.1 go on working, with a warning that names the new path."""

import importlib

import pytest

import siglip_hf
from siglip_hf._moved import MOVED
from siglip_hf.losses.sigmoid import sigmoid_loss


@pytest.mark.parametrize("old", sorted(MOVED))
def test_the_old_path_gives_the_new_module_s_names(old):
    module = importlib.import_module(f"siglip_hf.{old}")
    new = importlib.import_module(f"siglip_hf.{MOVED[old]}")
    own = [n for n, v in vars(new).items() if getattr(v, "__module__", "") == new.__name__ and not n.startswith("_")]
    own += getattr(new, "__all__", [])
    assert own
    with pytest.warns(FutureWarning, match=f"siglip_hf.{old} has moved to {new.__name__}"):
        assert all(getattr(module, name) is getattr(new, name) for name in own)


def test_as_an_attribute_of_the_package():
    with pytest.warns(FutureWarning, match="siglip_hf.loss has moved"):
        assert siglip_hf.loss.sigmoid_loss is sigmoid_loss
