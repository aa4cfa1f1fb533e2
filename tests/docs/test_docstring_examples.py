"""The examples in the docstrings run as they stand: each brings its imports, in a folder that holds the drawings."""

from __future__ import annotations

import doctest
import inspect
import logging
import shutil

import pytest
from test_docs_coverage import FUNCTIONS, THINGS

import siglip_hf
from siglip_hf.apps.page import demo_folder

# What an example needs beyond the package's own dependencies.
NEEDS = {
    "EmbeddingStore": ["pyarrow"],
    "SearchIndex": ["faiss", "pyarrow"],
    "SiglipTrainer": ["datasets"],
    "add_embeddings": ["datasets", "faiss"],
    "lora_config": ["peft"],
}
WITH_EXAMPLES = {
    name: thing
    for name, thing in {**THINGS, **FUNCTIONS}.items()
    if ">>>" in (thing.__dict__.get("__doc__") or thing.__doc__ or "")
}
WITHOUT = {"SiglipPreTrainedModel", "Siglip2PreTrainedModel"}  # bases that nobody makes


class Checker(doctest.OutputChecker):
    """A line that shows no output may print, as training does."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The drawings, and two of them in class folders."""
    shutil.copytree(demo_folder(), tmp_path / "drawings")
    for name in ("cat", "dog", "key", "frog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        shutil.copy(demo_folder() / f"{name}.png", tmp_path / "classes" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root.manager, "disable", logging.WARNING)
    return tmp_path


def test_every_public_class_has_an_example():
    public = {name: getattr(siglip_hf, name) for name in siglip_hf.__all__}
    classes = {name: thing for name, thing in public.items() if inspect.isclass(thing) and name not in WITHOUT}
    assert [name for name, thing in classes.items() if ">>>" not in thing.__dict__["__doc__"]] == []
    with_examples = {name.rpartition(".")[2] for name in WITH_EXAMPLES}
    assert {"SiglipTrainer", "LabelBank", "EmbeddingStore", "sigmoid_loss", "optimize"} <= with_examples


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_example_runs(name, folder, capsys):
    for package in NEEDS.get(name.rpartition(".")[2], ()):
        pytest.importorskip(package)
    (example,) = doctest.DocTestFinder(recurse=False).find(WITH_EXAMPLES[name], name, globs={}, module=False)
    runner = doctest.DocTestRunner(Checker(), optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(example)
    assert runner.failures == 0, capsys.readouterr().out


def test_a_class_shows_what_it_is_for_first():
    """The example of the model starts with embeddings, as its page does."""
    example = siglip_hf.SiglipModel.__doc__.partition("Examples:")[2]
    assert "encode_image" in example
    assert "encode_text" in example
