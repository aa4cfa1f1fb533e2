"""After `import siglip_hf` every Auto class gives our classes for SigLIP, and stock's for everything else."""

import importlib
import pkgutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

import siglip_hf
from siglip_hf import private_tables
from siglip_hf.private_tables import PRIVATE_TABLES, fill_private_tables
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


@pytest.mark.parametrize(
    ("arguments", "status"),
    [("--help", 0), ("classify --help", 0), ("--version", 0), ("classify --nonsense", 2), ("train --lora many", 2)],
)
def test_the_command_line_parses_without_torch(arguments, status):
    loaded = run_python(
        """
        import sys
        import siglip_hf_command
        try:
            status = siglip_hf_command.main()
        except SystemExit as stop:
            status = stop.code
        print(status, {"torch", "transformers", "numpy"} & set(sys.modules))
        """,
        *arguments.split(),
    )
    assert loaded.splitlines()[-1] == f"{status} set()"


def test_the_command_line_registers_before_it_loads():
    """No command ran here, so nothing is registered until something asks for a model."""
    lines = run_python("""
        import siglip_hf_command
        siglip_hf_command.is_parsing = True
        import siglip_hf
        from transformers import AutoConfig
        print(type(AutoConfig.for_model("siglip")).__module__.split(".")[0])
        from siglip_hf.loading import load_checkpoint
        print(*(type(one).__name__ for one in load_checkpoint()))
        print(type(AutoConfig.for_model("siglip")).__module__.split(".")[0])
    """).splitlines()
    assert lines == ["transformers", "SiglipModel SiglipProcessor", "siglip_hf"]


def test_no_import_hook_no_patched_loader_and_no_stock_thread():
    """Threads that import at the same time all get our classes, and the import machinery is as it was.

    So do they in a process that only imports the command's module, as `multiprocessing` does: it parses nothing.
    """
    lines = run_python("""
        import sys, threading
        import siglip_hf_command
        found = []
        def use():
            import siglip_hf
            from transformers import AutoConfig
            found.append(type(AutoConfig.for_model("siglip2")).__module__)
        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print([hook for hook in sys.meta_path if "siglip" in repr(hook)], set(found), len(found))
        import transformers.models.auto.modeling_auto as module
        print(type(module.__spec__.loader).__name__, "exec_module" in vars(module.__spec__.loader))
    """).splitlines()
    assert lines == ["[] {'siglip_hf.models.configuration_siglip2'} 4", "SourceFileLoader False"]


def test_an_import_that_failed_can_be_repeated():
    """What registration needs may be missing at first (here: a broken sentencepiece)."""
    lines = run_python("""
        import sys
        sys.modules["sentencepiece"] = None
        try:
            import siglip_hf
        except ImportError as error:
            print("ImportError", error.name)
        del sys.modules["sentencepiece"]
        import siglip_hf
        from transformers import AutoConfig
        print(type(AutoConfig.for_model("siglip")).__module__)
    """).splitlines()
    assert lines == ["ImportError sentencepiece", "siglip_hf.models.configuration_siglip"]


def test_import_from_a_zip_file(tmp_path, checkpoint):
    source = Path(siglip_hf.__file__).parent
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for file in [*source.rglob("*.py"), *source.rglob("*.pyi")]:
            archive.write(file, file.relative_to(source.parent))
    lines = run_python(
        """
        import sys
        sys.path.insert(0, sys.argv[2])
        import siglip_hf
        from transformers import AutoModel
        model = AutoModel.from_pretrained(sys.argv[1])
        print("package.zip" in siglip_hf.__file__, type(model) is siglip_hf.SiglipModel, model.training)
        """,
        checkpoint,
        str(tmp_path / "package.zip"),
    )
    assert lines == "True True False"


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


# Each takes a process of its own: the usual ones always, the others with `make test-slow`.
USUAL = {"ours first", "transformers first", "a stock model first"}


@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=[] if order in USUAL else pytest.mark.slow) for order in ORDERS]
)
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


def test_the_stub_is_the_table():
    """Type checkers read the stub as the module itself does: same names, and each is where the stub says."""
    for package in ("siglip_hf", "siglip_hf.search", "siglip_hf.training"):
        module = importlib.import_module(package)
        lines = (Path(module.__file__).parent / "__init__.pyi").read_text().splitlines()
        names = [line.split(" as ")[1] for line in lines if line.startswith("from ")]
        assert module.__all__ == names
        assert len(set(names)) == len(names) > 7
        # A module of the name would stand in its place as soon as anything imports that module.
        assert set(names) & {found.name for found in pkgutil.iter_modules(module.__path__)} == set()
        for name in names:
            assert getattr(module, name) is not None
        with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
            module.nothing  # noqa: B018


# --- the private tables ---------------------------------------------------------------------------------------------

TABLE_NAMES = [
    "TOKENIZER_MAPPING_NAMES",
    "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS",
    "PROCESSOR_MAPPING_NAMES",
    "IMAGE_PROCESSOR_MAPPING",
    "PIPELINE_REGISTRY",
]


def test_the_private_tables_are_these_and_are_there(recwarn):
    assert [table.name for table in PRIVATE_TABLES] == TABLE_NAMES
    fill_private_tables()
    assert not [one for one in recwarn if "siglip_hf" in str(one.message)]


@pytest.mark.parametrize("name", TABLE_NAMES)
@pytest.mark.parametrize("damage", ["gone", "another type"])
def test_a_table_that_moved_costs_one_warning(name, damage, monkeypatch):
    table = next(table for table in PRIVATE_TABLES if table.name == name)
    module = importlib.import_module(table.module)
    if damage == "gone":
        monkeypatch.delattr(module, name)
    else:
        monkeypatch.setattr(module, name, None)
    filled = []
    others = [one for one in PRIVATE_TABLES if one.name != name]
    watched = tuple(one._replace(fill=lambda found, one=one: filled.append(one.name)) for one in others)
    monkeypatch.setattr(private_tables, "PRIVATE_TABLES", (table, *watched))
    with pytest.warns(UserWarning, match=f"Other models are not affected.*{name}") as warned:
        fill_private_tables()
    assert len(warned) == 1
    assert filled == [one.name for one in others]


def test_all_private_names_of_transformers_are_in_one_module():
    source = Path(siglip_hf.__file__).parent
    users = {
        str(file.relative_to(source))
        for file in source.rglob("*.py")
        for name in (*TABLE_NAMES, "REGISTERED_FAST_ALIASES", "meta_path", "_LazyAutoMapping")
        if name in file.read_text()
    }
    # `doctor` reads two of them, to tell what is registered.
    assert users == {"private_tables.py", "cli/examine.py"}
