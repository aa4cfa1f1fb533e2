"""A repository of model_type siglip or siglip2 that brings code of its own, loaded with and without trust in it.

transformers prefers registered classes; so ours give way where they are told of the trust, and say so where not.
"""

import json
import logging
import shutil

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import siglip_hf

BOTH = ("siglip", "siglip2")
FOLDERS = {"siglip": siglip_hf.default_checkpoint, "siglip2": siglip_hf.naflex_checkpoint}
CODE = """
import transformers
from transformers.models.{kind} import modeling_{kind} as modeling
from transformers.models.{kind}.image_processing_pil_{kind} import {prefix}ImageProcessorPil

class OwnConfig(transformers.{prefix}Config):
    pass

class OwnModel(modeling.{prefix}Model):
    config_class = OwnConfig

class OwnClassifier(modeling.{prefix}ForImageClassification):
    config_class = OwnConfig

class OwnImageProcessor({prefix}ImageProcessorPil):
    pass

class OwnTokenizer(transformers.{prefix}Tokenizer):
    pass

class OwnProcessor(transformers.{prefix}Processor):
    pass
"""
OWN = {
    "AutoConfig": "OwnConfig",
    "AutoModel": "OwnModel",
    "AutoModelForZeroShotImageClassification": "OwnModel",
    "AutoModelForImageClassification": "OwnClassifier",
    "AutoImageProcessor": "OwnImageProcessor",
    "AutoProcessor": "OwnProcessor",
}
MODELS = (AutoModel, AutoModelForZeroShotImageClassification, AutoModelForImageClassification)


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    """Where transformers copies code to and imports it from; and warnings that are given once are given again."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    transformers.utils.logging.get_logger("transformers").warning_once.__func__.cache_clear()


def add_auto_map(file, auto_map) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map}))


@pytest.fixture(params=BOTH)
def folder(request, tmp_path):
    """An embedded checkpoint with code of its own in every Auto class."""
    kind, path = request.param, tmp_path / f"own_{request.param}"
    shutil.copytree(FOLDERS[kind](), path)
    (path / "own.py").write_text(CODE.format(kind=kind, prefix=kind.capitalize()))
    auto_map = {auto: f"own.{name}" for auto, name in OWN.items()}
    for file in ("config.json", "preprocessor_config.json"):
        add_auto_map(path / file, auto_map)
    add_auto_map(path / "tokenizer_config.json", {"AutoTokenizer": [None, "own.OwnTokenizer"]})
    return path


def warnings_of(caplog, kind: str) -> list[str]:
    return [text for text in caplog.messages if f"code of its own for {kind}," in text]


@pytest.fixture
def caplog_of_ours(caplog, monkeypatch):
    """Records of this package's loggers, which pass theirs on to transformers' handler only."""
    monkeypatch.setattr(logging.getLogger("siglip_hf"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("auto", MODELS, ids=lambda auto: auto.__name__)
def test_a_trusted_model_is_the_repositorys(auto, folder):
    model = auto.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
    assert type(model).__name__ == OWN[auto.__name__]
    assert type(model).__module__.startswith("transformers_modules.")
    assert type(model.config).__name__ == "OwnConfig"
    assert model.config._attn_implementation == "eager"
    own, ours = model.state_dict(), siglip_hf.SiglipModel if folder.name == "own_siglip" else siglip_hf.Siglip2Model
    weight = "vision_model.encoder.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(own[weight], ours.from_pretrained(folder).state_dict()[weight])


@pytest.mark.parametrize("auto", MODELS, ids=lambda auto: auto.__name__)
def test_without_trust_it_is_ours(auto, folder):
    assert type(auto.from_pretrained(folder)).__module__.startswith("siglip_hf.")
    assert type(auto.from_pretrained(folder, trust_remote_code=False)).__module__.startswith("siglip_hf.")


def test_a_class_by_name_is_that_class(folder):
    ours = siglip_hf.SiglipModel if folder.name == "own_siglip" else siglip_hf.Siglip2Model
    assert type(ours.from_pretrained(folder, trust_remote_code=True)) is ours


def test_a_subclass_of_ours_is_loaded_too(folder):
    """Repository code may stand on this package; giving way must not go round in a circle."""
    prefix = "Siglip" if folder.name == "own_siglip" else "Siglip2"
    (folder / "own.py").write_text(f"import siglip_hf\nclass OwnModel(siglip_hf.{prefix}Model):\n    pass\n")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert isinstance(model, siglip_hf.SiglipModel)


def test_processors(folder, caplog_of_ours):
    """AutoProcessor passes the trust on to a class that the files name."""
    file, prefix = folder / "preprocessor_config.json", folder.name.removeprefix("own_").capitalize()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processor_class": f"{prefix}Processor"}))
    assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)).__name__ == "OwnProcessor"
    assert type(AutoTokenizer.from_pretrained(folder, trust_remote_code=True)).__name__ == "OwnTokenizer"
    for trust in (None, False):
        for auto in (AutoProcessor, AutoTokenizer):
            found = auto.from_pretrained(folder, trust_remote_code=trust)
            assert type(found).__module__.startswith("siglip_hf.")
    assert not warnings_of(caplog_of_ours, "AutoProcessor")
    assert not warnings_of(caplog_of_ours, "AutoTokenizer")


def test_where_trust_is_not_passed_on_a_warning_names_the_class(folder, caplog_of_ours):
    """AutoConfig and AutoImageProcessor keep `trust_remote_code` to themselves, and so does AutoProcessor where only
    the model type tells the class. The way that the warning names works."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for found in (config, image_processor, processor):
        kind = next(auto for auto, name in OWN.items() if type(found).__name__.endswith(name.removeprefix("Own")))
        assert type(found).__module__.startswith("siglip_hf.")
        (warning,) = warnings_of(caplog_of_ours, kind)
        assert f"own.{OWN[kind]}" in warning
        assert type(found).__name__ in warning
        call = f"get_class_from_dynamic_module('own.{OWN[kind]}', '{folder}').from_pretrained('{folder}')"
        assert call in warning
        assert type(eval(call, {"get_class_from_dynamic_module": get_class_from_dynamic_module})).__name__ == OWN[kind]
    model = AutoModel.from_config(config, trust_remote_code=True)
    assert type(model).__module__.startswith("siglip_hf.")
    assert len(warnings_of(caplog_of_ours, "AutoModel.from_config")) == 1


def test_a_tokenizer_alone(folder, tmp_path, caplog_of_ours):
    """Without a config.json AutoTokenizer goes by the class's name, and takes ours."""
    alone = tmp_path / "tokenizer"
    shutil.copytree(folder, alone, ignore=lambda _, names: [name for name in names if name == "config.json"])
    found = AutoTokenizer.from_pretrained(alone, trust_remote_code=True)
    if type(found).__module__.startswith("siglip_hf."):
        assert len(warnings_of(caplog_of_ours, "AutoTokenizer")) == 1
    else:
        assert type(found).__name__ == "OwnTokenizer"


def test_the_pipeline(folder):
    classify = pipeline("zero-shot-image-classification", model=str(folder), trust_remote_code=True)
    assert type(classify.model).__name__ == "OwnModel"


def test_ordinary_folders_warn_of_nothing(caplog_of_ours):
    for checkpoint in FOLDERS.values():
        for auto in (AutoModel, AutoProcessor, AutoImageProcessor, AutoTokenizer):
            assert type(auto.from_pretrained(checkpoint(), trust_remote_code=True)).__module__.startswith("siglip_hf.")
    assert not warnings_of(caplog_of_ours, "Auto")
