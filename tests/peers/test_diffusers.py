"""diffusers: Flux Redux takes a SigLIP tower and its image processor; the pipeline is saved and loaded again."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import siglip_hf

from . import families, tiny

diffusers = pytest.importorskip("diffusers")


def library_and_class(part) -> tuple[str, str]:
    """What `model_index.json` holds for a part of a pipeline."""
    from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple

    return _fetch_class_library_tuple(part)


def redux(tower: torch.nn.Module, processor) -> "diffusers.FluxPriorReduxPipeline":
    """The published pipeline with a tiny tower; it needs no text encoders for a picture without a prompt."""
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    torch.manual_seed(0)
    embedder = ReduxImageEncoder(redux_dim=64, txt_in_features=4096)  # T5's width, which the pipeline fills up to
    pipeline = diffusers.FluxPriorReduxPipeline(tower, processor, embedder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PICTURE = Image.radial_gradient("L").resize((40, 24))


@pytest.fixture(scope="module")
def folder(folder_of, tmp_path_factory):
    """A pipeline of ours, saved; with what it gives for a picture."""
    tower = siglip_hf.SiglipVisionModel.from_pretrained(folder_of("SiglipVisionModel"))
    pipeline = redux(tower, siglip_hf.SiglipImageProcessor(size={"height": 32, "width": 32}))
    path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(path)
    return path, pipeline(PICTURE).prompt_embeds


@pytest.mark.parametrize("ours", [False, True])
def test_save_and_load(folder, ours):
    """Whoever wants this package's classes passes them, as with a published pipeline; stock's give the same numbers."""
    path, expected = folder
    parts = {}
    if ours:
        parts["image_encoder"] = siglip_hf.SiglipVisionModel.from_pretrained(path, subfolder="image_encoder")
        parts["feature_extractor"] = siglip_hf.SiglipImageProcessor.from_pretrained(path, subfolder="feature_extractor")
    loaded = diffusers.FluxPriorReduxPipeline.from_pretrained(path, **parts)
    loaded.set_progress_bar_config(disable=True)
    for part in (loaded.image_encoder, loaded.feature_extractor):
        assert type(part).__module__.startswith("siglip_hf." if ours else "transformers.")
    torch.testing.assert_close(loaded(PICTURE).prompt_embeds, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", families.CLASSES)
def test_models_are_found_in_transformers(name):
    """diffusers' own look-up, for every class; the class itself stays what it is, for pickle and for `repr`."""
    model = families.make(name)
    assert library_and_class(model) == ("transformers", name)
    assert type(model).__module__.startswith("siglip_hf.")
    assert type(pickle.loads(pickle.dumps(model))) is type(model)
    assert library_and_class(copy.deepcopy(model)) == ("transformers", name)


@pytest.mark.parametrize("checkpoint", [siglip_hf.default_checkpoint, siglip_hf.naflex_checkpoint])
def test_processors_are_found_in_transformers(checkpoint, tmp_path):
    processor = transformers.AutoProcessor.from_pretrained(checkpoint())
    fast = transformers.AutoImageProcessor.from_pretrained(checkpoint(), backend="torchvision")
    for part in (processor, processor.tokenizer, processor.image_processor, fast):
        library, name = library_and_class(part)
        assert library == "transformers"
        assert hasattr(transformers, name)
        assert type(part).__module__.startswith("siglip_hf.")
        part.save_pretrained(tmp_path)
        assert "__module__" not in repr(part)
    assert not [file for file in tmp_path.rglob("*.json") if "__module__" in file.read_text()]


def test_a_subclass_from_elsewhere_keeps_its_module():
    class Own(siglip_hf.SiglipImageProcessor):
        pass

    assert library_and_class(Own()) == (__name__, "Own")


def test_loads_without_this_package(folder):
    """Stock classes, in a process that cannot import this package: the index has to name transformers."""
    path, expected = folder
    PICTURE.save(path / "picture.png")
    printed = tiny.run_without_siglip_hf(
        "import json, sys, diffusers\n"
        "from PIL import Image\n"
        "pipeline = diffusers.FluxPriorReduxPipeline.from_pretrained(sys.argv[1])\n"
        "embeds = pipeline(Image.open(sys.argv[1] + '/picture.png')).prompt_embeds\n"
        "print(json.dumps([type(pipeline.image_encoder).__module__, embeds.tolist()]))",
        path,
    )
    kind, found = json.loads(printed.splitlines()[-1])
    assert kind == "transformers.models.siglip.modeling_siglip"
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)


def test_what_is_written(folder):
    """The published layout: transformers' class names in the index, the tower under its published names."""
    path, _ = folder
    index = json.loads((path / "model_index.json").read_text())
    assert index["image_encoder"] == ["transformers", "SiglipVisionModel"]
    assert index["feature_extractor"][0] == "transformers"
    stored = load_file(path / "image_encoder" / "model.safetensors")
    assert any(name.endswith("head.attention.in_proj_weight") for name in stored)


def test_offload_of_the_pipeline(folder_of):
    """`enable_model_cpu_offload` needs an accelerator; the hooks beneath it are accelerate's."""
    tower = siglip_hf.SiglipVisionModel.from_pretrained(folder_of("SiglipVisionModel"))
    expected = families.outputs_of(tower, "SiglipVisionModel")
    from accelerate import cpu_offload_with_hook

    tower, hook = cpu_offload_with_hook(tower, execution_device="cpu")
    families.assert_same(families.outputs_of(tower, "SiglipVisionModel"), expected, atol=1e-5)
    hook.remove()
