"""The hint at a missing optional dependency can be typed anywhere: it names packages, not an extra of a checkout."""

import pytest

from siglip_hf.extras import missing, packages_of


def test_an_extra_is_named_by_its_packages():
    assert str(missing("the pages need gradio", "apps")).startswith("the pages need gradio: pip install gradio ")
    assert {"faiss-cpu", "pyarrow"} <= set(packages_of("search"))


def test_included_extras_are_spelled_out():
    assert set(packages_of("search")) < set(packages_of("apps"))
    assert not [package for package in packages_of("dev") if package.startswith("siglip-hf")]


def test_several_extras_name_a_package_once():
    words = str(missing("this needs Ray", "ray", "search")).split()
    assert len(words) == len(set(words))
    assert '"ray[data]"' in words


def test_an_unknown_extra_is_named():
    with pytest.raises(ValueError, match="no extra 'traning'"):
        packages_of("traning")
