"""`siglip-hf evaluate`: what it prints, what it leaves out, and its exit codes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from siglip_hf.cli.common import EMBEDDED
from siglip_hf.cli.main import main
from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.data.sources import open_source
from siglip_hf.evaluation import evaluate, with_truth
from siglip_hf.inference.prompt_templates import template_set
from tiny_checkpoint import write_tiny_checkpoint

CLASSES = ("bird", "cat", "dog", "fish", "horse", "red_house")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def run(checkpoint, monkeypatch, capsys):
    """Runs `siglip-hf evaluate` with the tiny checkpoint: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "120")

    def run_line(*arguments):
        code = main(["evaluate", *map(str, arguments), "--model", str(checkpoint), "--device", "cpu"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.replace(EMBEDDED, "")

    return run_line


@pytest.fixture
def folders(tmp_path):
    """Two pictures for each of six classes."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def captioned(folders):
    """A table of these pictures, with two captions each."""
    paths = sorted(folders.rglob("*.png"))
    rows = [{"image": str(path), "caption": [f"a photo of {path.parent.name}", path.parent.name]} for path in paths]
    table = folders.parent / "captions.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    return table


def test_tables_of_labels(run, folders, checkpoint):
    code, out, err = run(folders)
    assert (code, err) == (0, "")
    found = evaluate(SiglipEmbedder(checkpoint, device="cpu", dtype="float32"), open_source(folders)).zero_shot
    assert 'zero-shot accuracy: 12 pictures, 6 labels, "This is a photo of {}."' in out
    for name, value in (("top-1", found.top(1)), ("top-5", found.top(5)), ("mean per class", found.mean_per_class)):
        assert name in out
        assert f"{value:.1%}" in out
    low, high = found.interval(1)
    assert f"top-1 for pictures of this kind is {low:.1%} to {high:.1%}" in out
    first_cells = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert first_cells[:6] == [row.label for row in found.per_class()]
    assert "red house" in out
    assert "retrieval" not in out


def test_json_is_what_the_function_finds(run, folders, captioned, checkpoint):
    embedder = SiglipEmbedder(checkpoint, device="cpu", dtype="float32")
    code, out, _ = run(folders, "--json", "--templates", "imagenet7")
    expected = evaluate(embedder, open_source(folders), templates=template_set("imagenet7")).as_dict()
    assert code == 0
    assert json.loads(out) == {"source": str(folders), "model": str(checkpoint), **expected}
    assert expected["zero_shot"]["top_1"] != expected["zero_shot"]["top_5"]
    code, out, _ = run(captioned, "--json", "--batch-size", "5")
    assert json.loads(out)["retrieval"] == pytest.approx(
        evaluate(embedder, open_source(captioned)).as_dict()["retrieval"]
    )


def test_table_of_retrieval(run, captioned):
    code, out, err = run(captioned)
    assert (code, err) == (0, "")
    assert "retrieval: 12 pictures, 24 captions" in out
    assert [name for name in ("recall@1", "recall@5", "recall@10") if name in out] == [
        "recall@1",
        "recall@5",
        "recall@10",
    ]
    assert "zero-shot" not in out


def test_labels_from_files(run, folders, tmp_path, checkpoint):
    truth = {f"{i}.png": name for i, name in enumerate(["cat", "dog"])}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "labels.txt").write_text("dog\ncat\nmoon\n")
    code, out, _ = run(folders, "--truth", tmp_path / "truth.json", "--labels-file", tmp_path / "labels.txt", "--json")
    assert code == 0
    embedder = SiglipEmbedder(checkpoint, device="cpu", dtype="float32")
    source = with_truth(open_source(folders), truth)
    expected = evaluate(embedder, source, labels=["dog", "cat", "moon"]).as_dict()["zero_shot"]
    assert json.loads(out)["zero_shot"] == expected
    assert {row["label"]: row["pictures"] for row in expected["classes"]} == {"cat": 6, "dog": 6}


def test_what_is_left_out_is_named_and_counted(run, folders):
    (folders / "cat" / "0.png").write_bytes(b"broken")
    Image.new("RGB", (8, 8)).save(folders / "loose.png")
    code, out, err = run(folders)
    assert code == 1
    assert "11 pictures" in out
    lines = err.splitlines()
    assert lines[0].startswith("skipped cat/0.png: ")
    assert lines[1:] == ["not used: loose.png: no label", "1 of 12 pictures skipped", "1 entry not used"]


def test_the_confusion_picture(run, folders, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, err = run(folders, "--confusion", tmp_path / "confusion.png")
    assert (code, err) == (0, f"confusion picture: {tmp_path / 'confusion.png'}\n")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "rank"], "task='rank' is unknown"),
        (["--task", "retrieve"], "none of 12 entries has a caption"),
        (["--templates", "imagenet", "--template", "a {}"], "--templates and --template are both given"),
        (["--templates", "imagnet"], "there is no set of templates 'imagnet'"),
        (["--template", "a photo"], "the template 'a photo' has no single '{}'"),
        (["--label-column", "class"], "no column 'class'"),
        (["--confusion", "x.docx"], "no picture format has this ending"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--labels-file", "nowhere.txt"], "'nowhere.txt' cannot be read: No such file or directory\n"),
    ],
)
def test_mistakes_are_told_in_one_line(run, folders, options, said):
    code, out, err = run(folders, *options)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize("command", ["evaluate", "learn"])
def test_the_confusion_picture_replaces_none_of_the_pictures(folders, tmp_path, command, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("pyarrow")
    picture = folders / "cat" / "0.png"
    before = picture.read_bytes()
    options = ["--out", str(tmp_path / "head")] if command == "learn" else []
    assert main([command, str(folders), "--confusion", str(picture), *options]) == 2
    assert "it is one of the pictures to read" in capsys.readouterr().err
    assert picture.read_bytes() == before


def test_no_confusion_without_labels(run, captioned, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, err = run(captioned, "--confusion", tmp_path / "x.png")
    assert code == 2
    assert "has no labels to confuse" in err


def test_no_such_place(run, tmp_path):
    code, _, err = run(tmp_path / "nowhere")
    assert code == 2
    assert "no such file or folder" in err
    (tmp_path / "empty").mkdir()
    code, _, err = run(tmp_path / "empty")
    assert code == 2
    assert "is empty" in err
