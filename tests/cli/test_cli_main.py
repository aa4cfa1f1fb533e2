"""What all commands have in common: the last catch, interruption, help, output options, and what is checked first."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

import siglip_hf
from siglip_hf.apps.page import demo_folder, demo_pictures
from siglip_hf.cli import common, main

COMMANDS = sorted(command.name or command.callback.__name__ for command in main.app.registered_commands)
NOTE = common.EMBEDDED


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run_line(*arguments):
        code = main.main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_line


@pytest.fixture
def failing(monkeypatch):
    """Lets `siglip-hf doctor` raise an error."""

    def set_error(error):
        def examine():
            raise error

        monkeypatch.setattr("siglip_hf.cli.examine.examine", examine)

    return set_error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("layers"), ["a fault in version", "not your mistake: KeyError: 'layers'", "(test_cli_main.py, line"]),
        (AssertionError(), ["not your mistake: AssertionError (test_cli_main.py"]),
        (ValueError(""), ["not your mistake: ValueError"]),
        (TypeError("x" * 5000), ["please report it with what --debug prints"]),
        (RecursionError("maximum recursion depth"), ["RecursionError"]),
        (ValueError("two\nlines"), ["siglip-hf: two lines"]),
        (UnicodeEncodeError("utf-8", "out\udce9", 3, 4, "surrogates"), ["'out\\udce9' is not valid Unicode; rename"]),
        (MemoryError(), ["not enough memory; a smaller --batch-size"]),
        (RuntimeError("CUDA out of memory. Tried"), ["not enough memory; a smaller --batch-size"]),
        (OSError(errno.ENOSPC, "No space left on device", "out.emb/part"), ["the disk of out.emb/part is full"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["the disk of ", "is full"]),
    ],
)
def test_no_error_shows_a_traceback_unless_debug_is_given(run, failing, error, words):
    failing(error)
    code, out, err = run("doctor")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("siglip-hf: ")
    assert len(err) < 1000
    for word in words:
        assert word in err
    for line in (("doctor", "--debug"), ("--debug", "doctor")):
        code, _, err = run(*line)
        assert code == 2
        assert "Traceback (most recent call last)" in err
        assert words[0] in err.splitlines()[-1]


@pytest.mark.parametrize("command", ["embed", "index", "train", "doctor", "classify"])
def test_an_interrupted_command_says_whether_it_goes_on_where_it_stopped(run, monkeypatch, command):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "app", interrupted)
    code, out, err = run(command)
    goes_on = "; the same command goes on where this stopped" if command in ("embed", "index", "train") else ""
    assert (code, out, err) == (130, "", f"siglip-hf: stopped{goes_on}\n")


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, capfd):
    def print_much(*arguments, **options):
        raise BrokenPipeError

    monkeypatch.setattr(main, "app", print_much)
    saved = os.dup(1)
    try:
        assert main.main(["doctor"]) == 1
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert capfd.readouterr().err == ""


def test_alone_it_prints_its_help(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    for command in COMMANDS:
        assert f" {command} " in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_two_examples_that_the_command_understands(run, command, monkeypatch):
    code, out, _ = run(command, "--help")
    assert code == 0
    lines = [line.strip() for line in out.partition("Examples:")[2].splitlines() if line.strip()]
    assert len(lines) >= 2
    assert len(set(lines)) == len(lines)
    click = typer.main.get_command(main.app)
    for line in lines:
        words = line.split()
        assert words[:2] == ["siglip-hf", command]
        click.commands[command].make_context(command, shlex.split(line)[2:])  # an unknown option would raise


@pytest.mark.parametrize("command", ["embed", "index", "train", "convert", "export", "demo"])
def test_outputs_have_one_name(run, command):
    _, out, _ = run(command, "--help")
    assert "--out" in out
    assert "-o " in out
    assert "--output" not in out
    assert " OUT " not in out.partition("Options")[0]


@pytest.mark.parametrize("words", [["--output", "{}"], ["--output={}"], ["--out", "{}"], ["-o", "{}"]])
def test_train_takes_the_old_word_for_its_output(run, words, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("siglip_hf.training.run.run_training", lambda settings, **_: seen.append(settings.output))
    assert run("train", str(tmp_path), *(word.format("there") for word in words))[0] == 0
    assert seen == ["there"]


@pytest.mark.parametrize("command", ["convert", "export"])
def test_the_old_place_of_the_output_still_works(run, command, monkeypatch, tmp_path):
    written = []
    result = SimpleNamespace(source="s", parameters=1, notes=[], cosines={"vision": 1.0})
    work = {"convert": "convert.convert_weights", "export": "onnx.export_onnx"}[command]
    monkeypatch.setattr(
        f"siglip_hf.integrations.{work}", lambda source, folder, **options: written.append(str(folder)) or result
    )
    for line in (["in", "old"], ["in", "--out", "new"], ["in", "-o", "short"]):
        assert run(command, *line)[0] == 0
    assert written == ["old", "new", "short"]
    for line in (["in"], ["in", "old", "--out", "new"]):
        code, _, err = run(command, *line)
        assert (code, err) == (2, "siglip-hf: give the folder to write once, as --out FOLDER.\n")


def test_counts_have_their_plural():
    assert [common.counted(n, "picture") for n in (0, 1, 2, 1200)] == [
        "0 pictures",
        "1 picture",
        "2 pictures",
        "1,200 pictures",
    ]


def test_json_is_json_in_any_encoding(monkeypatch):
    for encoding, expected in (("utf-8", "고양이 😀"), ("ascii", "\\uace0"), ("latin-1", "\\ud83d\\ude00")):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
        monkeypatch.setattr(sys, "stdout", stdout)
        common.print_json({"label": "고양이 😀", "path": "bad \udcff"})
        stdout.flush()
        text = stdout.buffer.getvalue().decode(encoding)
        assert expected in text
        assert json.loads(text) == {"label": "고양이 😀", "path": "bad \udcff"}


def test_what_the_terminal_cannot_print_ends_no_run(monkeypatch, failing):
    stderr = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stderr)
    failing(ValueError("고양이 is no label"))
    assert main.main(["doctor"]) == 2
    stderr.flush()
    assert stderr.buffer.getvalue() == b"siglip-hf: \\uace0\\uc591\\uc774 is no label\n"


def test_closed_streams_are_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert main.main(["--help"]) == 0
    assert main.main(["duplicates", str(tmp_path)]) == 2


def test_a_piped_table_never_breaks_a_path(capsys, monkeypatch):
    from rich.table import Table

    monkeypatch.delenv("COLUMNS", raising=False)
    path = "/pictures/" + "a long name " * 40 + ".png"
    table = Table()
    table.add_column("found", overflow="fold")
    table.add_row(path)
    common.console().print(table)
    assert path in capsys.readouterr().out


def test_rows_get_their_short_names_where_those_are_unique():
    def row(id_, path, text=None):
        return SimpleNamespace(id=id_, path=path, text=text)

    assert common.short_names([row("cat.png", "/a/cat.png"), row("b/dog.png", "/a/b/dog.png")]) == [
        "cat.png",
        "b/dog.png",
    ]
    assert common.short_names([row("cat.png", "/a/cat.png"), row("cat.png", "/b/cat.png")]) == [
        "/a/cat.png",
        "/b/cat.png",
    ]
    assert common.short_names([row("table:2", "/a/x.png"), row("3", None), row("4", None, "a caption")]) == [
        "/a/x.png",
        "3",
        "a caption",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sheet.svg", "no picture format"),
        ("sheet", "no picture format"),
        ("no/sheet.png", "there is no folder"),
        ("d.png", "this is a folder"),
    ],
)
def test_a_sheet_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch, name, message):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # a sheet needs none
    (tmp_path / "d.png").mkdir()
    with pytest.raises(ValueError, match=message):
        common.check_sheet(tmp_path / name)
    common.check_sheet(tmp_path / "sheet.png")


def test_the_note_about_the_embedded_checkpoint_is_printed_once_and_only_without_a_model(capsys):
    note = common.embedded_note(None)
    assert capsys.readouterr().err == ""
    note()
    note()
    assert capsys.readouterr().err == NOTE
    common.embedded_note("google/siglip2-base-patch16-224")()
    assert capsys.readouterr().err == ""


def test_the_demo_is_one_table_with_the_verdict_a_search_the_sheet_and_what_comes_next(run, tmp_path):
    code, out, err = run("demo", "--out", str(tmp_path / "sheet.png"), "--pictures", str(tmp_path / "copies"))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) < 45
    (rocket,) = [line for line in lines if line.startswith("rocket.png ")]
    assert rocket.split()[1:3] == ["rocket", "rocket"]
    assert sum(line.split(" ")[0].endswith(".png") for line in lines) == 24
    (verdict,) = [line for line in lines if "best labels are right" in line]
    card = (Path(siglip_hf.default_checkpoint()) / "README.md").read_text(encoding="utf-8")
    (right,) = re.findall(r"(\d+) get the right one", card)
    # The card's figure is that of float32; bfloat16 may turn one answer.
    assert abs(int(verdict.split()[0]) - int(right)) <= 1
    assert "with the default template" in verdict
    assert any(line.strip().startswith("une fusée: rocket.png") for line in lines)
    assert f"contact sheet: {tmp_path / 'sheet.png'}" in out
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    assert {path.name for path in (tmp_path / "copies").iterdir()} == {path.name for path in demo_folder().iterdir()}
    assert f"pictures: {tmp_path / 'copies'}" in out
    assert sum(line.startswith("  siglip-hf ") for line in lines) == 3
    copies = tmp_path / "drawings"
    copies.mkdir()
    code, out, err = run("demo", "--out", str(tmp_path / "second.png"), "--pictures", str(copies))
    assert (code, out) == (2, "")
    assert "it is there already" in err
    code, out, err = run("demo", "--out", str(tmp_path / "no folder" / "sheet.png"))
    assert (code, out) == (2, "")
    assert "there is no folder" in err


def test_the_pictures_of_the_demo_are_part_of_the_package():
    root = Path(__file__).parents[2]
    data = json.loads(re.search(r"siglip_hf = (\[.*\])", (root / "pyproject.toml").read_text())[1])
    shipped = {path for pattern in data for path in Path(siglip_hf.__file__).parent.glob(pattern)}
    assert {Path(path) for path in demo_pictures()} | {demo_folder() / "labels.json"} <= shipped
