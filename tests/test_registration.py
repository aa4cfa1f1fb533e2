"""After `import siglip_hf` every Auto class gives our classes for SigLIP, and stock's for everything else."""

import subprocess
import sys
import textwrap

import pytest
import torch

import siglip_hf
from tiny_checkpoint import write_tiny_checkpoint


def run_python(code: str, *arguments: str) -> str:
    """Runs code in a fresh interpreter, as a user's first lines, and returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("hub") / "tiny-siglip"))


def test_import_loads_no_heavy_module():
    loaded = run_python("""
        import sys, transformers
        before = set(sys.modules)
        import siglip_hf
        print(sorted(set(sys.modules) - before), "torch" in sys.modules)
    """)
    modules, torch_loaded = loaded.rsplit(" ", 1)
    assert torch_loaded == "False"
    ours = [name for name in eval(modules) if name.startswith(("siglip_hf", "torch", "transformers"))]
    assert ours == ["siglip_hf", "siglip_hf._version", "siglip_hf.registration"]


ORDERS = {
    "ours first": "import siglip_hf; from transformers import AutoModel",
    "transformers first": "from transformers import AutoModel, AutoProcessor, pipeline; import siglip_hf",
    "twice": "import siglip_hf, importlib; importlib.reload(siglip_hf); import siglip_hf",
    "a module of ours first": "import siglip_hf.models.layers",
    "our tokenizer first": "from siglip_hf.preprocessing.tokenization_siglip import SiglipTokenizer",
    "a stock model first": "import transformers.models.siglip.modeling_siglip; import siglip_hf",
    "a stock model after": "import siglip_hf; import transformers.models.siglip.modeling_siglip",
    "another model": "import siglip_hf; from transformers import BertModel",
}


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_imports(order, checkpoint):
    names = run_python(
        ORDERS[order]
        + textwrap.dedent("""
            import sys
            from transformers import AutoConfig, AutoModel, AutoProcessor
            loaded = [auto.from_pretrained(sys.argv[1]) for auto in (AutoConfig, AutoModel, AutoProcessor)]
            print(*(type(one).__module__ for one in loaded))
        """),
        checkpoint,
    )
    assert names.split() == [
        "siglip_hf.models.configuration_siglip",
        "siglip_hf.models.modeling_siglip",
        "siglip_hf.preprocessing.processing_siglip",
    ]


@pytest.mark.parametrize(
    ("auto", "kwargs", "expected"),
    [
        ("AutoConfig", {}, "SiglipConfig"),
        ("AutoModel", {}, "SiglipModel"),
        ("AutoModelForZeroShotImageClassification", {}, "SiglipModel"),
        ("AutoModelForImageClassification", {}, "SiglipForImageClassification"),
        ("AutoTokenizer", {}, "SiglipTokenizerFast"),
        ("AutoImageProcessor", {"backend": "pil"}, "SiglipImageProcessor"),
        ("AutoImageProcessor", {"backend": "torchvision"}, "SiglipImageProcessorFast"),
        ("AutoImageProcessor", {"use_fast": True}, "SiglipImageProcessorFast"),
        ("AutoImageProcessor", {"use_fast": False}, "SiglipImageProcessor"),
        ("AutoProcessor", {}, "SiglipProcessor"),
    ],
)
def test_auto_classes(auto, kwargs, expected, checkpoint):
    import transformers

    loaded = getattr(transformers, auto).from_pretrained(checkpoint, **kwargs)
    assert type(loaded) is getattr(siglip_hf, expected)


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_auto_model_of_a_single_tower(tower, checkpoint, tmp_path):
    from transformers import AutoModel

    cls = {"text": siglip_hf.SiglipTextModel, "vision": siglip_hf.SiglipVisionModel}[tower]
    cls.from_pretrained(checkpoint).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is cls


def test_vision_only_checkpoint_makes_an_image_classifier(checkpoint, tmp_path):
    from transformers import AutoModelForImageClassification

    tower = siglip_hf.SiglipVisionModel.from_pretrained(checkpoint)
    tower.save_pretrained(tmp_path)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5)
    pixels = torch.zeros(1, 3, 32, 32)
    want = classifier.classifier(tower(pixels).last_hidden_state.mean(1))
    torch.testing.assert_close(classifier(pixels).logits, want)
    assert want.shape == (1, 5)


def test_pipeline_is_ours(checkpoint):
    from transformers import pipeline

    classify = pipeline("zero-shot-image-classification", model=checkpoint)
    assert type(classify).__module__ == "siglip_hf.inference.pipeline"
    assert type(classify.model) is siglip_hf.SiglipModel


def tiny_bert():
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )


def tiny_vit():
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    )


def tiny_clip():
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPModel(
        CLIPConfig(text_config={**tower, "vocab_size": 30, "eos_token_id": 2, "bos_token_id": 1}, vision_config=tower)
    )


@pytest.mark.parametrize("make", [tiny_bert, tiny_vit, tiny_clip])
def test_other_models_are_untouched(make, tmp_path):
    from transformers import AutoModel

    model = make()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter)


def test_stock_classes_load_as_without_the_import(checkpoint):
    """Our checkpoint conversions must not reach stock models in the same process."""
    from transformers.models.siglip import modeling_siglip as stock

    for name in ("SiglipModel", "SiglipVisionModel", "SiglipTextModel"):
        model, info = getattr(stock, name).from_pretrained(checkpoint, output_loading_info=True)
        assert info["missing_keys"] == set(), name
        assert type(model).__module__ == stock.__name__


def test_public_names_resolve():
    for name in siglip_hf.__all__:
        assert getattr(siglip_hf, name) is not None
    assert set(siglip_hf.__all__) <= set(dir(siglip_hf))
    with pytest.raises(AttributeError, match="no attribute 'SiglipModell'"):
        siglip_hf.SiglipModell  # noqa: B018
