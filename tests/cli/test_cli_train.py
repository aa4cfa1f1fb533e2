"""`siglip-hf train` from data to checkpoint, its errors, and a run that is killed in the middle."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import siglip_hf
from siglip_hf.cli.main import main
from siglip_hf.training.settings import TrainSettings, read_config
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
    assert not list(output.glob(".*"))
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
    ],
)
def test_mistakes_are_one_line(data, checkpoint, tmp_path, capsys, options, message):
    assert train(data, tmp_path / "run", checkpoint, *options) == 2
    assert message in error_of(capsys)


def test_data_that_cannot_be(checkpoint, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert train(tmp_path / "empty", tmp_path / "run", checkpoint) == 2
    assert "is empty" in error_of(capsys)
    assert train(tmp_path / "none", tmp_path / "run", checkpoint) == 2
    assert "no such file or folder" in error_of(capsys)
    assert main(["train", "--output", str(tmp_path / "run")]) == 2
    assert "no data given" in error_of(capsys)
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


def test_configuration_files(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"data": "x", "output": "y", "learning-rate": 1, "freeze": "image"}')
    settings = TrainSettings.read(read_config(path))
    assert (settings.data, settings.learning_rate, settings.freeze) == (["x"], 1.0, ["image"])
    for text, message in (
        ('{"data": "x", "output": "y", "rate": 1}', "rate is not known"),
        ('{"data": "x", "output": "y", "steps": "many"}', "steps='many' should be of type int"),
        ('{"data": "x", "output": "y", "steps": true}', "steps=True should be of type int"),
        ('{"output": "y"}', "no data given"),
        ("[1]", "names and values"),
        ("{", "not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            TrainSettings.read(read_config(path))
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not YAML"):
        read_config(tmp_path / "a.yaml")
