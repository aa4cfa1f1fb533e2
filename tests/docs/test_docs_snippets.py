"""Runs the Python snippets and the commands of README.md and docs/ as a reader would, so that they stay true.

A page runs from top to bottom in a folder of its own; its snippets share their names. After the line `<!-- no-run -->`
a block is only read: it needs the network, a GPU, a browser or much time. After `<!-- output -->` a block is what the
one before it prints. Published names stand for the embedded checkpoint here, or, where that is of another kind, for a
tiny one of the kind; so do original weights and pictures, and two steps of training for many. Korean pages have no code
of their own, see scripts/docs/hooks.py.

After the embedded checkpoint or its scores have changed, `UPDATE_DOCS=1 pytest tests/test_docs_snippets.py` writes what
is printed now into the pages.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import typer
from PIL import Image

import big_vision_reference
import siglip_hf
from siglip_hf.cli import main as cli
from tiny_siglip2 import write_naflex

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
PICTURES = ROOT / "src" / "siglip_hf" / "apps" / "pictures"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if not page.name.endswith(".ko.md")),
]
BLOCK = re.compile(r"^(?:<!-- (?P<mark>[\w-]+) -->\s*)?```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
# What a page needs beyond the package's own dependencies.
NEEDS = {
    "README": ["faiss"],
    "evaluation": ["matplotlib"],
    "export": ["onnx", "onnxscript", "onnxruntime"],
    "learn": ["pyarrow", "sklearn"],
    "lora": ["bitsandbytes", "peft"],
    "quantization": ["bitsandbytes", "torchao"],
    "search": ["datasets", "faiss"],
    "siglip": ["bitsandbytes"],
    "training": ["datasets", "matplotlib", "yaml"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block: the line before its first, where its text starts, its language, its text, and its mark."""

    line: int
    start: int
    kind: str
    code: str
    mark: str | None

    def commands(self) -> list[str]:
        """The commands of a shell block, a line each."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in lines if shlex.split(line, comments=True)]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            text.count("\n", 0, match.start("code")), match.start("code"), match["kind"], match["code"], match["mark"]
        )
        for match in BLOCK.finditer(text)
    ]


WITH_CODE = [page for page in PAGES if any(block.kind in ("python", "bash") for block in blocks(page))]


def write_original_weights(folder: Path) -> None:
    """Weights in the original's format, tiny and random, and a vocabulary of their size."""
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(FIXTURES / "spiece.model")).vocab_size()
    params = big_vision_reference.random_params(big_vision_reference.Sizes(vocabulary=vocabulary))
    big_vision_reference.save(folder / "webli_en_b16_224.npz", params)
    shutil.copy(FIXTURES / "spiece.model", folder / "c4_en.model")


def set_the_scene(page: Path, folder: Path) -> Callable[[str], str]:
    """Puts what a page names into a folder, and returns what turns published names into local ones."""
    for name in ("tests", "src"):
        (folder / name).symlink_to(ROOT / name)
    text = page.read_text()
    for name in ("photos", "drawings"):
        if f" {name}\n" not in text:  # else the page makes the folder itself
            shutil.copytree(PICTURES, folder / name, ignore=lambda _, names: {"README.md"} & set(names))
    for file in PICTURES.glob("*.png"):
        shutil.copy(file, folder)
    for name, size in (("panorama.png", (240, 60)), ("page.png", (120, 170)), ("thumbnail.png", (40, 40))):
        Image.open(PICTURES / "cat.png").resize(size).save(folder / name)
    if " classes/" in text:
        for kind in ("cat", "dog", "rocket"):
            (folder / "classes" / kind).mkdir(parents=True)
            for turn in (-12, -4, 4, 12):
                picture = Image.open(PICTURES / f"{kind}.png").convert("RGBA").rotate(turn)
                picture.save(folder / "classes" / kind / f"{turn}.png")
    if re.search(r"google/siglip[\w-]*naflex", text):
        write_naflex(folder / "naflex")
    if ".npz" in text:
        write_original_weights(folder)

    def local(code: str) -> str:
        code = re.sub(r"--steps=\d+", "--steps=1", code)  # of training: that it runs, not what it learns
        code = re.sub(r"https://huggingface\.co/datasets/\S+\.jpeg", str(folder / "cat.png"), code)
        code = re.sub(r"--steps[= ]\d+", "--steps 2", code)
        code = re.sub(r"google/siglip[\w-]*naflex", str(folder / "naflex"), code)
        return re.sub(r"google/siglip[\w-]*", siglip_hf.default_checkpoint(), code)

    return local


def run_command(line: str, read_only: bool) -> None:
    """Runs a command of this package or a simple one of the shell; of the others, checks that what they name exists."""
    words = shlex.split(line, comments=True)
    program, *arguments = words
    if program == "siglip-hf":
        if read_only:
            parse_command(arguments)
        else:
            assert cli.main(arguments) == 0, line
    elif program in ("cp", "echo", "mkdir", "tar"):
        if not read_only:
            subprocess.run(line, shell=True, check=True)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        named = {argument for argument in arguments if "=" not in argument}
        assert named <= set(targets), f"no such target: {line}"
    elif program == "pip":
        project = (ROOT / "pyproject.toml").read_text()
        listed = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
        extras = re.findall(r"^([\w-]+) = ", listed, re.MULTILINE)
        named = re.findall(r"^(?:siglip-hf|\.)\[([\w,-]+)\]$", "\n".join(arguments), re.MULTILINE)
        assert {extra for names in named for extra in names.split(",")} <= set(extras), line
    elif program == "python":
        script = ROOT / arguments[0]
        # Scripts of a folder share options.
        source = "".join(file.read_text() for file in {script, *script.parent.glob("*/*.py")})
        options = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
        assert [option for option in options if f'"{option}"' not in source] == [], line
    else:
        assert read_only, f"say <!-- no-run --> before a block with {program!r}, or what to check about it, here"


def parse_command(arguments: list[str]) -> None:
    """Fails for a command or an option that does not exist; runs nothing."""
    command = typer.main.get_command(cli.app)
    context = command.make_context("siglip-hf", list(arguments))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def assert_prints(printed: str, expected: str, where: str) -> None:
    """The same words, and the same numbers up to rounding on another machine."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", expected).split(), where
    for left, right in zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True):
        assert float(left) == pytest.approx(float(right), rel=0.02, abs=0.01), where


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_page_runs(page, tmp_path, monkeypatch, capsys):
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package)
    local = set_the_scene(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root.manager, "disable", logging.root.manager.disable)  # a page may change it
    names: dict = {"__name__": "__main__"}
    updated: list[tuple[Block, str]] = []
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.mark == "output":
            printed = "".join(f"{line.rstrip()}\n" for line in capsys.readouterr().out.splitlines())
            if "UPDATE_DOCS" in os.environ:
                updated.append((block, printed))
            else:
                assert_prints(printed, block.code, where)
        elif block.kind == "bash":
            capsys.readouterr()
            for line in block.commands():
                run_command(local(line), read_only=block.mark == "no-run")
        elif block.kind == "python":
            # Blank lines in front, so that a traceback names the page's own lines.
            code = compile("\n" * block.line + local(block.code), str(page), "exec")
            capsys.readouterr()
            if block.mark != "no-run":
                exec(code, names)
    text = page.read_text() if updated else ""
    for block, printed in reversed(updated):
        text = text[: block.start] + printed + text[block.start + len(block.code) :]
    if updated:
        page.write_text(text)


EMBEDDED = re.compile(r"(embedded checkpoint|checkpoint (that lies )?in the package)")


@pytest.mark.parametrize(
    "page", [page for page in WITH_CODE if page.name != "CONTRIBUTING.md"], ids=lambda page: page.stem
)
def test_page_says_that_it_runs_the_embedded_checkpoint(page):
    code = "\n".join(block.code for block in blocks(page))
    takes_a_model = r"siglip-hf (classify|embed|index|evaluate|train|app search|app compare)\b(?!.*--model)"
    if "_checkpoint()" in code or re.search(takes_a_model, code):
        assert EMBEDDED.search(" ".join(page.read_text().split()))


def test_folders_are_called_by_what_the_embedded_checkpoint_knows():
    for page in WITH_CODE:
        for block in blocks(page):
            for line in block.code.splitlines():
                if line.startswith("siglip-hf ") and "photos" in line:
                    assert "google/siglip" in line or "--onnx" in line, f"{page.name}: {line}"


def test_pages_with_code_are_found():
    names = {page.stem for page in WITH_CODE}
    assert {"README", "converting", "export", "lora", "quantization", "sharding", "vision_language_models"} <= names


def test_a_wrong_command_is_found():
    parse_command(["classify", "a.png", "--labels", "a, b", "--top", "2"])
    for wrong, named in (
        ("classify a.png --lables a", "lables"),
        ("clasify a.png", "clasify"),
        ("doctor a.png", "a.png"),
    ):
        with pytest.raises(Exception, match=named):
            parse_command(wrong.split())
    for wrong in ("make tset", "pip install siglip-hf[traning]", "python scripts/bench/loss.py --bach 3", "curl x"):
        with pytest.raises(AssertionError):
            run_command(wrong, read_only=False)
