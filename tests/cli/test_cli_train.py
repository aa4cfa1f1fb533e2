"""`siglip-hf train` from data to checkpoint, its errors, and a run that is killed in the middle."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import siglip_hf
from embed_runs import flip
from siglip_hf.cli.main import main
from siglip_hf.files import check_folder, only_run
from siglip_hf.training.run import run_training
from siglip_hf.training.settings import TrainSettings
from siglip_hf.training.trainer import SiglipTrainer
from tiny_checkpoint import write_tiny_checkpoint
from training_data import largest_difference, write_captioned, write_two_captions

QUICK = ["--cpu", "--batch-size", "4", "--micro-batch", "2", "--learning-rate", "1e-3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def data(tmp_path):
    return write_captioned(tmp_path / "pictures", count=8)


def train(data, output, checkpoint, *options):
    return main(["train", str(data), "--output", str(output), "--model", str(checkpoint), *QUICK, *map(str, options)])


def error_of(capsys):
    """Our one line on stderr; libraries may have said something there when they were imported."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("siglip-hf: ")]
    return line


def weights(folder):
    return dict(siglip_hf.SiglipModel.from_pretrained(folder).named_parameters())


def test_from_pictures_to_a_checkpoint(data, checkpoint, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(data, output, checkpoint, "--steps", 4, "--eval-every", 2, "--scale-learning-rate", 0.01) == 0
    printed = capsys.readouterr().out
    assert "8 pairs, 4 steps of 4" in printed
    assert "image to text recall@1" in printed
    assert "8 training pairs; 0 skipped" in printed
    assert Image.open(output / "loss.png").size == (840, 480)
    report = json.loads((output / "report.json").read_text())
    assert (report["pairs"], report["batch_size"], report["steps"], report["resumed_from"]) == (8, 4, 4, 0)
    assert len([entry for entry in report["history"] if "loss" in entry]) == 4
    assert report["before"].keys() == report["after"].keys() >= {"loss", "text_to_image_recall_at_5"}
    assert report["before"]["loss"] != report["after"]["loss"]
    assert largest_difference(weights(output), weights(checkpoint)) > 1e-4
    assert [path.name for path in output.glob(".*")] == [".lock"]
    # The folder is a checkpoint for all else.
    picture = str(next(iter(data.glob("*.png"))))
    assert main(["classify", picture, "--labels", "cat, dog", "--model", str(output)]) == 0
    # Called again, there is nothing to do; with other settings, it is refused.
    assert train(data, output, checkpoint, "--steps", 4, "--eval-every", 2, "--scale-learning-rate", 0.01) == 0
    assert "finished before" in capsys.readouterr().out
    assert train(data, output, checkpoint, "--steps", 5, "--eval-every", 2, "--scale-learning-rate", 0.01) == 2
    assert "other settings (steps 4 -> 5)" in error_of(capsys)


def test_killed_it_goes_on_and_ends_with_the_same_weights(data, checkpoint, tmp_path, capsys):
    options = ["--steps", "8", "--save-every", "1", "--augment", "crop,flip", "--keep", "2"]
    assert train(data, tmp_path / "unbroken", checkpoint, *options) == 0
    output = tmp_path / "killed"
    command = ["train", str(data), "--output", str(output), "--model", str(checkpoint), *QUICK, *options]
    code = "import sys; from siglip_hf.cli.main import main; sys.exit(main(sys.argv[1:]))"
    # Bit for bit, with as many threads: another number of them adds in another order.
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", code, *command], stdout=subprocess.DEVNULL, env=threads)
    while not (output / "checkpoint-3").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "report.json").exists()
    # As if it had been killed while it wrote the next one.
    (output / ".unfinished" / "checkpoint-9").mkdir(parents=True)
    (output / ".unfinished" / "checkpoint-9" / "model.safetensors").write_bytes(b"half")
    capsys.readouterr()
    assert train(data, output, checkpoint, *options) == 0
    assert "resumed at step " in capsys.readouterr().out
    assert largest_difference(weights(output), weights(tmp_path / "unbroken")) == 0
    found, expected = (
        {
            entry["step"]: entry["loss"]
            for entry in json.loads((folder / "report.json").read_text())["history"]
            if "loss" in entry
        }
        for folder in (output, tmp_path / "unbroken")
    )
    assert found == expected
    assert not (output / ".unfinished").exists()


def test_broken_pictures_and_bad_captions_are_counted(data, checkpoint, tmp_path, capsys):
    (data / "cat.png").write_bytes(b"nothing")
    with (data / "metadata.csv").open("a", newline="") as file:
        csv.writer(file).writerows([["missing.png", "a dog"], ["dog.png", "..."], ["frog.png", ""]])
    assert train(data, tmp_path / "run", checkpoint, "--steps", 3, "--hold-out", 3) == 1
    printed = capsys.readouterr()
    assert "3 held out" in printed.out
    skipped = json.loads((tmp_path / "run" / "report.json").read_text())["skipped"]
    assert "without words" in str(skipped)
    assert "no caption" in str(skipped)
    assert any(line.startswith(("cat.png: not a picture", "missing.png: no such file")) for line in skipped)
    assert f"{len(skipped)} skipped" in printed.out
    assert printed.err.count("skipped ") == len(skipped)


def test_class_folders_and_a_configuration_file(checkpoint, tmp_path, capsys):
    for name, color in (("red cat", "red"), ("blue car", "blue")):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (32, 32), color).save(tmp_path / "classes" / name / f"{index}.png")
    config = tmp_path / "train.yaml"
    config.write_text(
        f"data: {tmp_path / 'classes'}\noutput: {tmp_path / 'run'}\nmodel: {checkpoint}\n"
        "template: ['a {}', 'the {}']\nlearning-rate: 1e-3\nsteps: 5\nbatch_size: 4\ncpu: true\nfreeze: [image]\n"
        f"image_store: {tmp_path / 'store'}\n"
    )
    assert main(["train", "--config", str(config), "--steps", "2"]) == 0
    assert "6 pairs, 2 steps of 4" in capsys.readouterr().out
    found, before = weights(tmp_path / "run"), weights(checkpoint)
    changed = {name.partition(".")[0] for name in found if not torch.equal(found[name], before[name])}
    assert changed == {"text_model", "logit_scale", "logit_bias"}
    assert (tmp_path / "store" / "manifest.json").exists()
    (tmp_path / "classes" / "empty class").mkdir()
    assert train(tmp_path / "classes", tmp_path / "other", checkpoint) == 2
    assert "no pictures in empty class" in error_of(capsys)


def test_lora(data, checkpoint, tmp_path):
    pytest.importorskip("peft")
    assert train(data, tmp_path / "run", checkpoint, "--steps", 2, "--lora", 2, "--freeze", "image") == 0
    found, before = weights(tmp_path / "run"), weights(checkpoint)
    changed = {name for name in found if not torch.allclose(found[name], before[name], atol=1e-7)}
    assert changed
    assert all(name.startswith("text_model.") and "self_attn" in name for name in changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--caption-column", "words"], "no column 'words'"),
        (["--freeze", "head"], "'head' matches no parameter"),
        (["--augment", "blur"], "augment=blur is not known"),
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--precision", "int8"], "precision='int8' is not known"),
        (["--hold-out", "8"], "hold_out=8 leaves nothing to train on"),
        (["--image-store", "store"], "needs a frozen image tower"),
        (["--model", "no/such/model"], "cannot load 'no/such/model'"),
        (["--fsdp"], "there is one; start several with torchrun"),
        (["--template", "no place"], "no single '{}'"),
        (["--learning-rate", "nan"], "learning_rate=nan must be above 0"),
        (["--workers", "-1"], "workers=-1 must not be negative"),
    ],
)
def test_mistakes_are_one_line(data, checkpoint, tmp_path, capsys, options, message):
    assert train(data, tmp_path / "run", checkpoint, *options) == 2
    assert message in error_of(capsys)


NUMBERS = [item.name for item in dataclasses.fields(TrainSettings) if re.search(r"\[(int|float)\b", str(item.type))]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_cannot_be_are_one_line(tmp_path, capsys, name):
    """On the command line and in a file, before anything is read or written."""
    config = tmp_path / "config.json"
    option = f"--{name.replace('_', '-')}"
    lines = [([option, value], None) for value in ("-1", "nan")]
    lines += [(["--config", str(config)], value) for value in (10**20, [1])]
    for line, value in lines:
        config.write_text(json.dumps({name: value}))
        assert main(["train", "missing.csv", "--out", str(tmp_path / "run"), *line]) == 2
        said = error_of(capsys)
        assert name in said.replace("-", "_"), (line, value, said)
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be(checkpoint, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert train(tmp_path / "empty", tmp_path / "run", checkpoint) == 2
    assert "is empty" in error_of(capsys)
    assert train(tmp_path / "none", tmp_path / "run", checkpoint) == 2
    assert "no such file or folder" in error_of(capsys)
    assert main(["train", "--output", str(tmp_path / "run")]) == 2
    assert "Missing argument 'DATA'. See siglip-hf train --help" in error_of(capsys)
    assert main(["train", str(tmp_path / "empty")]) == 2
    assert "Missing option '--out'" in error_of(capsys)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    assert train(tmp_path / "pictures", tmp_path / "run", checkpoint) == 2
    assert "has a picture and a caption" in error_of(capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    write_two_captions(tmp_path / "two", 3)
    assert train(tmp_path / "two", tmp_path / "full", checkpoint) == 2
    assert "no training run" in error_of(capsys)
    assert (tmp_path / "full" / "letter.txt").exists()


def test_configuration_files(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("siglip_hf.training.run.run_training", lambda settings, on_progress: given.append(settings))
    path = tmp_path / "a.json"
    path.write_text(
        '\ufeff{"data": "x", "output": "y", "learning-rate": 1, "freeze": "image", "cpu": true, "steps": 3}'
    )
    assert main(["train", "--config", str(path), "--steps", "5", "--augment", "crop, flip", "--augment", "color"]) == 0
    (settings,) = given
    assert (settings.data, settings.output, settings.learning_rate) == (["x"], "y", 1.0)
    assert (settings.freeze, settings.cpu, settings.fsdp, settings.steps) == (["image"], True, False, 5)
    assert settings.augment == ["crop", "flip", "color"]
    # What is not given is as in Python.
    assert settings == TrainSettings(
        ["x"], "y", learning_rate=1.0, freeze=["image"], cpu=True, steps=5, augment=["crop", "flip", "color"]
    )
    path.write_text('{"data": ["x", "z"], "freeze": ["image"], "steps": null}')
    assert main(["train", "w", "--output", "y", "--config", str(path), "--freeze", "text"]) == 0
    assert (given[1].data, given[1].freeze, given[1].steps) == (["w"], ["text"], None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"data": "x", "output": "y", "rate": 1}', "rate is not known"),
        ("a.json", '{"data": "x", "output": "y", "config": "z"}', "config is not known"),
        ("a.json", '{"data": "x", "output": "y", "steps": "many"}', "Invalid value for '--steps'"),
        ("a.json", '{"data": "x", "output": "y", "steps": true}', "Invalid value for '--steps'"),
        ("a.json", '{"data": "x", "output": "y", "steps": 2.5}', "Invalid value for '--steps'"),
        ("a.json", '{"data": "x", "output": "y", "steps": [2]}', "steps takes one value"),
        ("a.json", '{"data": "x", "output": "y", "model": {"a": 1}}', "model takes one value"),
        ("a.json", '{"data": [["x"]], "output": "y"}', "data takes values"),
        ("a.json", '{"data": "x", "output": "y", "cpu": "perhaps"}', "Invalid value for '--cpu'"),
        ("a.json", '{"output": "y"}', "Missing argument 'DATA'"),
        ("a.json", "[1]", "names and values"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", "\udcff", "is not JSON"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yaml", "[" * 100_000, "nested too deeply"),
        ("a.yaml", '{"a": ' * 100_000, "nested too deeply"),
        ("a.yaml", "1: 2", "names and values"),
        ("a.yaml", "\x01", "is not YAML"),
        ("a.yaml", "", "names and values"),
    ],
)
def test_wrong_configuration_files_are_one_line(tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    assert main(["train", "--config", str(tmp_path / name)]) == 2
    assert message in error_of(capsys)


def test_a_configuration_file_that_is_not_there(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in error_of(capsys)


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


# Each step, and each file or folder that a run puts into its place, is a point at which it may be killed.
POINTS = [(f"step {step}", 1) for step in (1, 2, 3)] + [("move", count) for count in range(1, 30)] + [("evaluate", 2)]


@pytest.mark.parametrize("points", [POINTS[::4], pytest.param(POINTS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_killed_anywhere_it_ends_with_the_same_weights(points, data, checkpoint, tmp_path, monkeypatch):
    """Three steps with a checkpoint after the second and the last; an epoch has two, so that the end is inside one."""
    settings = {"steps": 3, "save_every": 2, "batch_size": 4, "micro_batch": 2, "learning_rate": 1e-3, "cpu": True}

    def run(output, point=None, wanted=0):
        seen = []

        def count(name):
            seen.append(name)
            if name == point and seen.count(name) == wanted:
                raise Killed

        def counted(name, function):
            def call(*args, **kwargs):
                count(name)
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted("move", os.replace))
            patch.setattr(Path, "replace", counted("move", Path.replace))
            patch.setattr(SiglipTrainer, "evaluate", counted("evaluate", SiglipTrainer.evaluate))
            report = run_training(
                TrainSettings([str(data)], str(output), model=str(checkpoint), **settings),
                on_progress=lambda what, done, total: count(f"step {done}") if what == "training" else None,
            )
        return report, seen

    whole, seen = run(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    moves = seen.count("move")
    assert 8 < moves < 30
    for point, wanted in points:
        if point == "move" and wanted > moves:
            continue
        output = tmp_path / f"{point} {wanted}"
        with pytest.raises(Killed):
            run(output, point, wanted)
        report, _ = run(output)
        assert largest_difference(weights(output), expected) == 0, (point, wanted)
        losses = [[(entry["step"], entry["loss"]) for entry in r.history if "loss" in entry] for r in (report, whole)]
        assert losses[0] == losses[1], (point, wanted)
        assert (report.after["loss"], report.before["loss"]) == (whole.after["loss"], whole.before["loss"])
        assert sorted(path.name for path in output.iterdir()) == files, (point, wanted)


def test_a_damaged_checkpoint_is_named_and_an_older_one_used(data, checkpoint, tmp_path, monkeypatch, capsys):
    options = ("--steps", 4, "--save-every", 1, "--keep", 3)
    assert train(data, tmp_path / "whole", checkpoint, *options) == 0
    output = tmp_path / "run"
    step = SiglipTrainer.training_step

    def killed_at_the_last(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SiglipTrainer, "training_step", killed_at_the_last)
        with pytest.raises(Killed):
            train(data, output, checkpoint, *options)
    newest = output / "checkpoint-3"
    sealed = {path.name for path in newest.iterdir() if path.is_file()}
    assert sealed >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    for name in sealed:  # a bit in the middle of each file
        content = (newest / name).read_bytes()
        flip(newest / name, 4 * len(content))
        with pytest.raises(ValueError, match=f"{re.escape(name)} is damaged"):
            check_folder(newest)
        (newest / name).write_bytes(content)

    flip(newest / "optimizer.pt", 8000)
    kept = shutil.copytree(output, tmp_path / "kept")
    capsys.readouterr()
    assert train(data, output, checkpoint, *options) == 0
    printed = capsys.readouterr()
    damage = "checkpoint-3/optimizer.pt is damaged: its checksum is not that of its content"
    assert f"{damage}; an older checkpoint was used" in printed.err
    assert "resumed at step 2" in printed.out
    assert largest_difference(weights(output), weights(tmp_path / "whole")) == 0
    assert sorted(path.name for path in output.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]

    for number in (1, 2):
        flip(kept / f"checkpoint-{number}" / "rng_state.pth", 800)
    assert train(data, kept, checkpoint, *options) == 2
    line = error_of(capsys)
    assert all(f"checkpoint-{number}/" in line for number in (1, 2, 3))
    assert "No older checkpoint is there" in line
    assert len(list(kept.glob("checkpoint-*"))) == 3, "nothing is removed"
    trainer = SiglipTrainer.__new__(SiglipTrainer)
    with pytest.raises(ValueError, match=r"checkpoint-1/rng_state.pth is damaged"):
        trainer._load_from_checkpoint(str(kept / "checkpoint-1"))


def test_two_runs_at_one_output(data, checkpoint, tmp_path, capsys):
    output = tmp_path / "run"
    with only_run(output):
        assert train(data, output, checkpoint, "--steps", 2) == 2
        assert "another run is writing to" in error_of(capsys)
        assert [path.name for path in output.iterdir()] == [".lock"]
    assert train(data, output, checkpoint, "--steps", 2) == 0


def test_interrupted_it_says_that_a_rerun_goes_on(data, checkpoint, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(SiglipTrainer, "training_step", interrupt)
    assert train(data, tmp_path / "run", checkpoint, "--steps", 2) == 130
    assert error_of(capsys) == "siglip-hf: stopped; the same command goes on where this stopped"
    monkeypatch.undo()
    assert train(data, tmp_path / "run", checkpoint, "--steps", 2) == 0


def test_a_damaged_folder_is_named(data, checkpoint, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(data, output, checkpoint, "--steps", 1) == 0
    for name in ("report.json", "settings.json"):
        whole = (output / name).read_text()
        for text in (whole.replace("1", "2", 1), "[]", "{", '"x"'):
            (output / name).write_text(text)
            capsys.readouterr()
            assert train(data, output, checkpoint, "--steps", 1) == 2
            assert f"{name} is damaged" in error_of(capsys)
        (output / name).write_text(whole)
