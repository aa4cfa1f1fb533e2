"""Runs the Python snippets of README.md and docs/, and the commands in their shell blocks, so that they stay true.

The snippets of a page share their names, in order. A snippet after the line `<!-- no-run -->` is not run: it needs the
network, a GPU or much time. Published names stand for the embedded checkpoint here, or, where that is of another kind,
for a tiny one of the kind; so do original weights and pictures.
"""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from PIL import Image

import big_vision_reference
import siglip_hf
from siglip_hf.cli import main
from tiny_gemma import write_gemma_tokenizer
from tiny_siglip2 import NAFLEX_VISION

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"(?P<mark><!-- no-run -->\s*)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
# What a page needs beyond the package's own dependencies.
NEEDS = {
    "export": ["onnx", "onnxscript", "onnxruntime"],
    "lora": ["bitsandbytes", "peft"],
    "quantization": ["bitsandbytes", "torchao"],
}


def snippets(page: Path) -> list[tuple[int, str]]:
    """Line number and code of each snippet that is to be run."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start("code")), match["code"])
        for match in SNIPPET.finditer(text)
        if not match["mark"]
    ]


def commands(page: Path) -> list[str]:
    """The command lines of this package in the shell blocks of a page."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.startswith("siglip-hf ")]


WITH_SNIPPETS = [page for page in PAGES if snippets(page)]


def write_pictures(folder: Path) -> None:
    """The pictures that pages name."""
    for file in (FIXTURES / "pictures").glob("*.png"):
        shutil.copy(file, folder)
    for name, size in (("panorama.png", (240, 60)), ("page.png", (120, 170)), ("thumbnail.png", (40, 40))):
        Image.open(FIXTURES / "pictures" / "cat.png").resize(size).save(folder / name)


def write_original_weights(folder: Path) -> None:
    """Weights in the original's format, tiny and random, and a vocabulary of their size."""
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(FIXTURES / "spiece.model")).vocab_size()
    params = big_vision_reference.random_params(big_vision_reference.Sizes(vocabulary=vocabulary))
    big_vision_reference.save(folder / "webli_en_b16_224.npz", params)
    shutil.copy(FIXTURES / "spiece.model", folder / "c4_en.model")


def write_naflex(folder: Path) -> None:
    """A tiny NaFlex repository."""
    write_gemma_tokenizer(folder, tokenizer_class="GemmaTokenizer")
    text = {key: NAFLEX_VISION[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    text |= {"vocab_size": len(siglip_hf.Siglip2Tokenizer.from_pretrained(folder)), "pad_token_id": 0}
    config = siglip_hf.Siglip2Config(text_config=text, vision_config=dict(NAFLEX_VISION))
    siglip_hf.Siglip2Model(config).save_pretrained(folder)
    siglip_hf.Siglip2ImageProcessor(patch_size=8).save_pretrained(folder)


def test_there_are_snippets():
    names = {page.stem for page in WITH_SNIPPETS}
    assert {"README", "converting", "export", "lora", "quantization", "sharding", "vision_language_models"} <= names


def set_the_scene(page: Path, folder: Path, monkeypatch) -> Callable[[str], str]:
    """Puts what a page names into a folder, goes there, and returns what turns published names into local ones."""
    (folder / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(folder)
    write_pictures(folder)
    (folder / "photos").mkdir()
    shutil.copy(FIXTURES / "pictures" / "cat.png", folder / "photos")
    text = page.read_text()
    if "naflex" in text:
        write_naflex(folder / "naflex")
    if ".npz" in text:
        write_original_weights(folder)

    def local(code: str) -> str:
        code = re.sub(r"google/siglip[\w-]*naflex", str(folder / "naflex"), code)
        return re.sub(r"google/siglip[\w-]*", siglip_hf.default_checkpoint(), code)

    return local


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package)
    local = set_the_scene(page, tmp_path, monkeypatch)
    names: dict = {"__name__": "__main__"}
    for line, code in snippets(page):
        code = local(code)
        # Blank lines in front, so that a traceback names the page's own lines.
        exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_commands_run(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package)
    local = set_the_scene(page, tmp_path, monkeypatch)
    for command in commands(page):
        assert main(shlex.split(local(command))[1:]) == 0, command


def test_there_are_commands():
    assert {"converting", "export"} <= {page.stem for page in PAGES if commands(page)}
