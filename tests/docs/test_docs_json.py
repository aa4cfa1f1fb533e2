"""docs/command_line.md shows what `--json` prints: every command that has it, with the keys that it prints."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import typer
from PIL import Image

from json_shapes import PAGE, SECTION, keys, section, shown
from siglip_hf.apps.page import demo_folder
from siglip_hf.cli import main as cli
from siglip_hf.evaluation import evaluate
from siglip_hf.search import SiglipEmbedder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the page: the drawings, and what its commands make one after the other."""
    pytest.importorskip("faiss")
    made = tmp_path_factory.mktemp("page")
    shutil.copytree(demo_folder(), made / "drawings")
    for name in ("cat", "key"):
        (made / "classes" / name).mkdir(parents=True)
        for angle in (0, 8, 16):
            turned = Image.open(demo_folder() / f"{name}.png").convert("RGBA").rotate(angle)
            turned.save(made / "classes" / name / f"{angle}.png")
    return made


def test_every_command_with_json_is_on_the_page():
    commands = typer.main.get_command(cli.app).commands
    with_json = {name for name, command in commands.items() if any("--json" in p.opts for p in command.params)}
    assert {name for name, _ in SECTION.findall(PAGE.read_text())} == with_json


@pytest.mark.parametrize("command", ["classify", "search", "duplicates", "clusters", "evaluate", "learn"])
def test_keys_are_those_printed(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"^```bash\n(.*?)^```", section(command), re.DOTALL | re.MULTILINE)
    if command in ("duplicates", "clusters") and not (folder / "drawings.idx").exists():
        assert cli.main(["index", "drawings", "--out", "drawings.idx"]) == 0
    for line in code.splitlines():
        capsys.readouterr()
        if not ((folder / "drawings.idx").exists() and " index " in line):
            assert cli.main(shlex.split(line)[1:]) == 0
    assert keys(json.loads(capsys.readouterr().out)) == keys(shown(command))


def test_recall_has_the_keys_that_the_page_names(tmp_path):
    for name in ("cat", "key"):
        shutil.copy(demo_folder() / f"{name}.png", tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,caption\ncat.png,a cat\nkey.png,a key\n")
    from siglip_hf.data.sources import open_source

    found = evaluate(SiglipEmbedder(dtype="float32"), open_source(str(tmp_path))).as_dict()["retrieval"]
    assert all(f"`{re.sub('[0-9]+$', 'K', key)}`" in section("evaluate") for key in found)


def test_doctor_is_a_table_of_its_keys(monkeypatch):
    from siglip_hf.cli import examine

    attention = examine.attention
    monkeypatch.setattr(examine, "attention", lambda: attention(("eager", "sdpa")))  # flex attention compiles
    named = re.findall(r"^\| `(\w+)` \|", section("doctor"), re.MULTILINE)
    assert named == list(examine.examine())


def test_keys_say_where_they_stand():
    assert keys([{"a": {"b": 1}}, {"c": [{"d": 2}]}]) == {"[].a", "[].a.b", "[].c", "[].c[].d"}
