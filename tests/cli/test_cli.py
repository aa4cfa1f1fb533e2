"""The command line: what it prints, what it skips, and its exit codes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import siglip_hf
import siglip_hf.loading
from siglip_hf.cli import examine as doctor
from siglip_hf.cli.common import EMBEDDED
from siglip_hf.cli.main import main
from siglip_hf.inference.classify import classify_files
from siglip_hf.parallel import PIXELS
from tiny_checkpoint import write_tiny_checkpoint

LABELS = "cat, dog, a red bird"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def run(checkpoint, monkeypatch, capsys):
    """Runs a command line with the tiny checkpoint as the embedded one: (exit code, stdout, stderr)."""
    monkeypatch.setattr(siglip_hf, "default_checkpoint", lambda: str(checkpoint))
    monkeypatch.setattr("siglip_hf.data.embedder.default_checkpoint", lambda: str(checkpoint))
    monkeypatch.setenv("COLUMNS", "200")

    def run_line(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.replace(EMBEDDED, "")

    return run_line


@pytest.fixture
def folder(tmp_path):
    """Three pictures in two folders, and a file that is none."""
    rng = np.random.default_rng(0)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deep/er/c.webp"):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def names(out):
    return [entry["source"].rsplit("/", 1)[-1] for entry in json.loads(out)]


def test_json_holds_the_scores_of_the_pipeline(run, folder, checkpoint):
    code, out, err = run("classify", folder / "b.png", "--labels", LABELS, "--top", 2, "--json", "--no-fast")
    assert (code, err) == (0, "")
    (entry,) = json.loads(out)
    pipe = siglip_hf.inference.classify.load_classifier(str(checkpoint), "cpu")
    expected = pipe(str(folder / "b.png"), LABELS, named_scores=True, top_k=2)
    assert entry["source"] == str(folder / "b.png")
    assert entry["labels"] == [
        {name: pytest.approx(value, abs=1e-6) for name, value in row.items() if name != "score"} for row in expected
    ]
    assert list(entry["labels"][0]) == ["label", "cosine", "logit", "sigmoid", "softmax"]


def test_scores_are_those_of_the_optimized_model_by_default(run, folder, checkpoint):
    code, out, _ = run("classify", folder / "b.png", "--labels", LABELS, "--json")
    assert code == 0
    pipe = siglip_hf.inference.classify.load_classifier(str(checkpoint), "cpu", fast=True)
    assert pipe.model.optimization.notes
    expected = pipe(str(folder / "b.png"), LABELS, function_to_apply="cosine")
    got = [(row["label"], pytest.approx(row["cosine"], abs=1e-6)) for row in json.loads(out)[0]["labels"]]
    assert [(row["label"], row["score"]) for row in expected] == got


def test_a_table_for_each_picture(run, folder):
    code, out, err = run("classify", folder / "b.png", folder / "a.JPG", "--labels", LABELS)
    assert (code, err) == (0, "")
    for name in ("b.png", "a.JPG"):
        assert out.count(name) == 1
    for name in ("cosine", "logit", "sigmoid", "softmax", "a red bird", "cat", "dog"):
        assert out.count(name) == 2, name
    assert out.index("b.png") < out.index("a.JPG")


def test_folders_globs_and_repetitions(run, folder, monkeypatch):
    for sources, expected in (
        ([folder], ["a.JPG", "b.png", "c.webp"]),
        ([folder / "deep"], ["c.webp"]),
        ([folder / "*.png"], ["b.png"]),
        ([folder / "**" / "*.webp"], ["c.webp"]),
        ([folder / "b.png", folder, folder / "b.png"], ["b.png", "a.JPG", "c.webp"]),
    ):
        code, out, _ = run("classify", *sources, "--labels", LABELS, "--json", "--batch-size", 2)
        assert (code, names(out)) == (0, expected)


def test_a_broken_file_is_reported_and_skipped(run, folder):
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:200])
    code, out, err = run("classify", folder, folder / "missing.png", "--labels", LABELS, "--json")
    assert code == 1
    assert names(out) == ["a.JPG", "b.png", "c.webp", "missing.png"]
    broken = {entry["source"]: entry for entry in json.loads(out) if "error" in entry}
    assert set(broken) == {str(folder / "b.png"), str(folder / "missing.png")}
    assert all("labels" not in entry and entry["error"] for entry in broken.values())
    lines = err.splitlines()
    assert [line.split(": ")[0] for line in lines[:2]] == [f"skipped {source}" for source in broken]
    assert lines[2] == "2 of 4 pictures skipped"

    code, out, err = run("classify", folder / "b.png", "--labels", LABELS)
    assert (code, out) == (1, "")
    assert "1 of 1 picture skipped" in err


def test_labels_file_and_templates(run, folder):
    file = folder / "labels.txt"
    file.write_text("cat\n\n  a dog, brown \ncat\n")
    code, out, _ = run("classify", folder / "b.png", "--labels-file", file, "--json")
    assert code == 0
    assert sorted(row["label"] for row in json.loads(out)[0]["labels"]) == ["a dog, brown", "cat"]

    scores = []
    for templates in (["a {}"], ["the {}"], ["a {}", "the {}"]):
        options = [part for template in templates for part in ("--template", template)]
        _, out, _ = run("classify", folder / "b.png", "--labels", "cat", "--json", *options)
        scores.append(json.loads(out)[0]["labels"][0]["cosine"])
    assert len(set(scores)) == 3


def test_truth_gives_labels_and_accuracy(run, folder, tmp_path):
    _, out, _ = run("classify", folder, "--labels", LABELS, "--json", "--top", 1)
    best = {entry["source"].rsplit("/", 1)[-1]: entry["labels"][0]["label"] for entry in json.loads(out)}
    wrong = next(label for label in ("cat", "dog") if label != best["b.png"])
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"a.JPG": best["a.JPG"], "b.png": wrong, "unused.png": "a red bird"}))
    code, out, _ = run("classify", folder, "--labels", LABELS, "--truth", truth)
    assert code == 0
    assert out.splitlines()[-1] == "1 of 2 best labels are right (50.0%)"
    code, out, _ = run("classify", folder, "--truth", truth, "--json")
    assert {row["label"] for row in json.loads(out)[0]["labels"]} == {best["a.JPG"], wrong, "a red bird"}
    assert [entry.get("truth") for entry in json.loads(out)] == [best["a.JPG"], wrong, None]


def test_a_sheet_never_replaces_one_of_the_pictures(run, folder):
    before = (folder / "b.png").read_bytes()
    (folder / "link.png").symlink_to(folder / "b.png")
    for sheet in ("b.png", "link.png"):
        code, _, err = run("classify", folder / "b.png", "--labels", LABELS, "--sheet", folder / sheet)
        assert (code, "it is one of the pictures to read" in err) == (2, True)
    assert (folder / "b.png").read_bytes() == before


def test_a_picture_that_is_gone_when_the_sheet_is_drawn(run, folder, monkeypatch):
    score = classify_files
    monkeypatch.setattr(
        "siglip_hf.inference.classify.classify_files",
        lambda *args, **options: (score(*args, **options), (folder / "b.png").unlink())[0],
    )
    code, out, err = run("classify", folder, "--labels", LABELS, "--sheet", folder / "sheet.png", "--json")
    assert (code, len(json.loads(out))) == (1, 3)
    assert f"not on the sheet: {folder / 'b.png'}: no such file or folder" in err
    assert Image.open(folder / "sheet.png").width > 2 * 200


def test_sheet(run, folder):
    file = folder / "sheet.png"
    (folder / "b.png").write_bytes(b"broken")
    code, _, err = run("classify", folder, "--labels", LABELS, "--sheet", file)
    assert code == 1
    assert f"contact sheet: {file}" in err
    with Image.open(file) as sheet:
        assert sheet.width > 2 * 200  # the two pictures that could be read


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no labels"),
        (["--labels", " , "], "hold no label"),
        (["--labels", "a", "--labels-file", "labels.txt"], "labels file 'labels.txt' cannot be read"),
        (["--labels-file", "labels.json"], "goes to --truth"),
        (["--labels", "a", "--template", "photo"], "'photo' has no single '{}'"),
        (["--labels", "a", "--top", "0"], "--top"),
        (["--labels", "a", "--model", "no/such/folder/at all"], "cannot load 'no/such/folder/at all'"),
        (["--labels", "a", "--sheet", "sheet.xyz"], "no picture format has this ending"),
        (["--labels", "a", "--sheet", "no folder/sheet.png"], "there is no folder"),
        (["--labels", "a", "--truth", "truth.json"], "'truth.json' cannot be read"),
        (["--labels", "a", "--lable", "b"], "--lable"),
        (["--labels", "a", "--device", "abacus"], "abacus"),
        (["--labels", "a \udcff"], "cannot be a label: the character at place 2 is not valid Unicode"),
        (["--labels", "a", "--template", "\udcff {}"], "cannot be a template"),
        (["--labels", "a", "--template", "{.foo}"], "has no single '{}'"),
        (["--labels", "a", "--template", "{:>50000000}"], "has no single '{}'"),
        (["--labels", "a", "--truth", "deep.json"], "nested too deeply"),
        (["--labels", "a", "--sheet", "sheet.svg"], "no picture format has this ending"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    (folder / "deep.json").write_text("[" * 100_000)
    code, out, err = run("classify", folder / "b.png", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("siglip-hf: ")
    assert err.count("\n") == 1


def test_more_wrong_usage(run, tmp_path):
    for arguments, message in (
        (["classify", "--labels", "a"], "IMAGE"),
        (["classify", tmp_path, "--labels", "a"], "no pictures found"),
        (["no-such-command"], "no-such-command"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err
        assert err.count("\n") == 1


def test_a_model_that_is_no_siglip_is_refused(run, folder, tmp_path):
    from transformers import BertConfig

    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path / "bert")
    code, _, err = run("classify", folder / "b.png", "--labels", "a", "--model", tmp_path / "bert")
    assert code == 2
    assert "bert" in err
    assert err.count("\n") == 1


def test_commands_say_that_they_use_the_embedded_checkpoint(run, folder, capsys, checkpoint, monkeypatch):
    """One line on stderr, at the start of the work, and none where a model is given."""
    (folder / "cat").mkdir()
    for name in ("b.png", "d.png"):
        shutil.copy(folder / "b.png", folder / "cat" / name)
    pictures = folder / "cat"
    for line in (
        ["classify", pictures, "--labels", "cat"],
        ["embed", pictures, "--out", folder / "emb"],
        ["evaluate", pictures, "--task", "classify", "--truth", folder / "truth.json"],
        ["index", pictures, "--out", folder / "idx"],
    ):
        if line[0] == "index" and not importlib.util.find_spec("faiss"):
            continue
        (folder / "truth.json").write_text('{"b.png": "cat", "d.png": "dog"}')
        for model, count in (([], 1), (["--model", checkpoint], 0)):
            shutil.rmtree(folder / "emb", ignore_errors=True)
            overwrite = ["--overwrite"] if line[0] == "index" and model else []
            assert main([str(word) for word in (*line, *model, *overwrite)]) == 0, line
            assert capsys.readouterr().err.count(EMBEDDED) == count, line
    if importlib.util.find_spec("faiss"):
        assert main(["index", str(folder / "idx.embeddings"), "--out", str(folder / "other")]) == 0
        assert EMBEDDED not in capsys.readouterr().err  # the vectors are there; no model is chosen


def test_version_and_help_load_no_torch():
    script = (
        "import sys\nfrom siglip_hf_command import main\n"
        "code = main(sys.argv[1:])\nassert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\nsys.exit(code)"
    )
    for arguments, expected in ((["--version"], f"siglip-hf {siglip_hf.__version__}\n"), (["--help"], "classify")):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


@pytest.mark.parametrize("line", [["classify", "--labels", LABELS], ["embed", "--out", "o"], ["index", "--out", "o"]])
def test_larger_pictures_than_max_pixels_are_skipped(run, tmp_path, monkeypatch, line):
    if line[0] == "index":
        pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for side in (20, 30):
        Image.new("RGB", (side, side), "red").save(f"pictures/{side}.png")
    code, _, err = run(line[0], "pictures", *line[1:], "--max-pixels", 400)
    assert code == 1
    assert "30.png: it has 900 pixels, more than the 400 that were allowed" in err.replace("pictures/", "")
    assert "20.png" not in err
    assert PIXELS.largest is None, "the limit holds for the command only"
    shutil.rmtree("o", ignore_errors=True)
    shutil.rmtree("o.embeddings", ignore_errors=True)
    assert run(line[0], "pictures", *line[1:])[0] == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluate_train_and_search_skip_larger_pictures_too(run, tmp_path, monkeypatch, workers):
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    for side in (20, 30, 31):
        Path("classes", f"c{side}").mkdir(parents=True)
        Image.new("RGB", (side, side), "red").save(f"classes/c{side}/{side}.png")
    limit = ("--max-pixels", 900)
    too_large = "c31/31.png: it has 961 pixels, more than the 900 that were allowed"
    if workers == 0:
        assert run("index", "classes", "--out", "idx")[0] == 0
        code, _, err = run("evaluate", "classes", *limit)
        assert (code, too_large in err) == (1, True), err
        code, _, err = run("search", "idx", "--image", "classes/c31/31.png", *limit)
        assert (code, "it has 961 pixels" in err) == (2, True)
        code, _, err = run("search", "idx", "red", "--sheet", "sheet.png", *limit)
        assert (code, f"not on the sheet: {too_large}" in err, "20.png" in err) == (1, True, False)
        code, _, err = run("verify", siglip_hf.default_checkpoint(), "classes/c31/31.png", *limit)
        assert (code, "it has 961 pixels" in err) == (2, True)
    train = ("train", "classes", "--out", f"run{workers}", "--steps", 1, "--batch-size", 3, "--cpu")
    code, _, err = run(*train, "--workers", workers, *limit)
    assert (code, too_large in err, "20.png" in err) == (1, True, False)
    assert PIXELS.largest is None


def test_files_of_labels_and_truth_with_a_byte_order_mark_and_other_line_ends(run, folder, tmp_path):
    labels = tmp_path / "labels.list"
    labels.write_bytes("\ufeffa\u2028b\r\na\x85b\rcat\n".encode())
    truth = tmp_path / "truth.json"
    truth.write_bytes("\ufeff".encode() + json.dumps({"b.png": "a\u2028b"}, ensure_ascii=False).encode())
    code, out, err = run(
        "classify", folder / "b.png", "--labels-file", labels, "--truth", truth, "--json", "--template", "{}"
    )
    assert (code, err) == (0, "")
    (entry,) = json.loads(out)
    assert {row["label"] for row in entry["labels"]} == {"a\u2028b", "a\x85b", "cat"}
    assert entry["truth"] == "a\u2028b"
    code, out, err = run("classify", folder / "b.png", "--truth", truth, "--json")
    assert [row["label"] for row in json.loads(out)[0]["labels"]] == ["a\u2028b"]


@pytest.mark.parametrize("naflex", [False, True])
def test_a_file_name_that_is_not_utf8_costs_only_itself(run, folder, monkeypatch, naflex):
    """Pictures are read by such a name; a table of rows has no place for it, so that it becomes an error there."""
    pytest.importorskip("faiss")
    monkeypatch.chdir(folder)
    model = ("--model", siglip_hf.naflex_checkpoint()) if naflex else ()
    name = os.fsdecode(b"caf\xe9.png")
    for kind in ("one", "two"):
        Path("data", kind).mkdir(parents=True)
        for number in range(2):
            shutil.copy("b.png", f"data/{kind}/{number}.png")
    shutil.copy("a.JPG", f"data/one/{name}")
    error = "one/caf\\udce9.png: its name is not Unicode text: 'one/caf\\udce9.png'"
    code, out, _ = run("classify", f"data/one/{name}", "--labels", "a", "--json", "--sheet", "sheet.png", *model)
    assert (code, json.loads(out)[0]["source"]) == (0, f"data/one/{name}")
    Path("sheet.png").unlink()
    for line in (
        ("embed", "data", "--out", "emb"),
        ("index", "data", "--out", "idx"),
        ("evaluate", "data"),
        ("learn", "data", "--out", "head"),
        ("train", "data", "--out", "run", "--steps", 1, "--cpu"),
    ):
        if naflex and line[0] in ("learn", "train"):
            continue
        code, out, err = run(*line, *model)
        assert (code, error in err.replace("\n", " ")) == (1, True), (line, err)
    assert run("duplicates", "idx")[0] == 0
    assert run("search", "idx", "--image", f"data/one/{name}")[0] == 0
    for line in (("search", "idx", "\udce9"), ("search", "idx", "a", "--not", "\udce9")):
        code, _, err = run(*line)
        assert (code, "not valid Unicode" in err, err.count("\n")) == (2, True, 1)
    for line in (("embed", "data", "--out", "\udce9"), ("index", "data", "--out", "\udce9"), ("search", "\udce9", "a")):
        code, _, err = run(*line, *(model if line[0] != "search" else ()))
        assert (code, "\\udce9" in err, err.count("\n")) == (2, True, 1)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "utf-16"])
@pytest.mark.parametrize(
    "line",
    [
        ["classify", "b.png", "--labels-file", "F"],
        ["classify", "b.png", "--truth", "F"],
        ["evaluate", ".", "--labels-file", "F"],
        ["evaluate", ".", "--truth", "F"],
        ["search", "idx", "--queries", "F"],
        ["clusters", "idx", "--words", "F"],
        ["train", "deep", "--out", "run", "--config", "F"],
        ["embed", "F.csv", "--out", "emb"],
        ["embed", "F.jsonl", "--out", "emb"],
        ["train", "F.txt", "--out", "run"],
        ["index", "F.json", "--out", "idx"],
    ],
)
def test_a_file_that_is_no_text_file_is_named(run, folder, monkeypatch, line, kind):
    monkeypatch.chdir(folder)
    line = [word.replace("F", "given", 1) if word.startswith("F") else word for word in line]
    given = Path(next(word for word in line if word.startswith("given")))
    if kind == "fifo":
        os.mkfifo(given)
    elif kind == "device":
        given.symlink_to("/dev/zero")
    elif kind == "folder":
        given.mkdir()
    else:
        given.write_bytes("cat".encode("utf-16"))
    code, _, err = run(*line)
    assert code == 2
    (message,) = err.splitlines()
    assert str(given) in message
    assert "not your mistake" not in message


def test_max_pixels_is_not_for_ray(run, folder):
    code, _, err = run("embed", folder, "--out", folder / "o", "--engine", "ray", "--max-pixels", 400)
    assert code == 2
    assert err.startswith("siglip-hf: --max-pixels holds in this process, not in Ray's")


@pytest.mark.parametrize("command", [["classify", "--labels", LABELS], ["embed", "--out", "o"], ["evaluate"]])
def test_a_model_of_nan_is_one_error(run, checkpoint, folder, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["logit_scale"].fill_(float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "cat").mkdir()
    shutil.copy(folder / "b.png", tmp_path / "cat")
    source = tmp_path if command[0] == "evaluate" else folder / "b.png"
    code, out, err = run(command[0], source, *command[1:], "--model", model)
    assert (code, out) == (2, "")
    assert err == (
        f"siglip-hf: cannot load '{model}': the weight logit_scale is not finite (NaN or infinite), "
        "so all scores would be NaN.\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("command", [["classify", "--labels", LABELS], ["embed", "--out", "o"], ["evaluate"]])
def test_a_device_that_is_not_there_is_one_error(run, folder, monkeypatch, command):
    monkeypatch.chdir(folder)
    code, out, err = run(command[0], folder, *command[1:], "--device", "cuda")
    assert (code, out) == (2, "")
    assert err.startswith("siglip-hf: device='cuda' cannot be used: ")
    assert err.count("\n") == 1


@pytest.fixture
def quick_doctor(monkeypatch):
    """Without flex attention, which compiles for a minute."""
    quick = ("eager", "sdpa", "flash_attention_2")
    attention = doctor.attention
    monkeypatch.setattr(doctor, "attention", lambda: attention(quick))


def test_doctor_reports_what_is_there(run, quick_doctor, checkpoint):
    code, out, err = run("doctor", "--json")
    report = json.loads(out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["siglip-hf"] == siglip_hf.__version__
    assert report["hardware"]["torch_threads"] == torch.get_num_threads()
    assert report["hardware"]["devices"][-1] == "cpu"
    assert report["registered"]["AutoModel"]["siglip"] == "siglip_hf.models.modeling_siglip.SiglipModel"
    assert report["registered"]["pipeline"]["zero-shot-image-classification"].startswith("siglip_hf.")
    assert report["registered"]["AutoModel"]["siglip2"] == "siglip_hf.models.modeling_siglip2.Siglip2Model"
    assert "siglip2" in report["registered"]["AutoProcessor"]
    assert {"search", "train", "apps"} <= set(report["extras"])
    assert not {"dev", "docs", "peers", "bench", "data"} & set(report["extras"])
    assert report["attention"]["eager"]["works"]
    assert report["attention"]["sdpa"]["works"]
    assert report["attention"]["sdpa"]["difference"] < 1e-4
    assert report["speed"]["threads"] == torch.get_num_threads()
    assert report["speed"]["dtype"] in ("float32", "bfloat16")
    assert report["speed"]["notes"]
    folders = {"siglip": Path(checkpoint), "siglip2 (NaFlex)": Path(siglip_hf.loading.naflex_checkpoint())}
    assert report["checkpoints"] == {
        kind: {"path": str(folder), "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())}
        for kind, folder in folders.items()
    }
    assert (code, report["problems"], err) == (0, [], "")


def test_doctor_prints_sections(run, quick_doctor, checkpoint):
    code, out, _ = run("doctor")
    assert (code, out.splitlines()[0]) == (0, "all well")
    for text in (
        "versions",
        "AutoModel ",
        "siglip2: Siglip2Model",
        "siglip-hf[search]",
        "sdpa",
        "works on",
        "optimize",
    ):
        assert text in out, text
    for path in (str(checkpoint), siglip_hf.loading.naflex_checkpoint()):
        assert path in out


@pytest.mark.parametrize("columns", [40, 80])
def test_doctor_breaks_lines_between_words_only(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    long = "/a/very/long/path/" + 9 * "of-words-without-spaces/"
    report = {
        "versions": {"torch": "2.0", "platform": "Linux-6.1-with-glibc2.36"},
        "hardware": {"cpu": " ".join(f"word{i}" for i in range(40)), "devices": ["cuda:0 X, 80 GiB", "cpu"]},
        "registered": {"AutoModelForZeroShotImageClassification": {"siglip2": "siglip_hf.m.A, other.place.B"}},
        "extras": {"search": {"faiss-cpu": None, "pyarrow": "21.0"}},
        "attention": {"sdpa": {"works": False, "device": "cpu", "dtype": "float32", "reason": f"[no] {long}"}},
        "speed": {"dtype": "float32", "packed_blocks": 0, "notes": ["one reason", "another reason"]},
        "checkpoints": {"siglip": {"path": long, "bytes": 1_000_000}, "siglip2": {"path": None, "reason": "gone"}},
        "problems": ["sdpa attention does not work, reinstall torch: [no] kernel"],
    }
    monkeypatch.setattr(doctor, "examine", lambda: report)
    code, out, err = run("doctor")
    assert (code, err) == (1, f"problem: {report['problems'][0]}\n")
    assert " ".join(out.split()).startswith(f"to do: {report['problems'][0]} versions ")
    assert all(len(line) <= columns or len(line.split()) <= 2 for line in out.splitlines())
    words = set(out.split())
    assert {long, "Linux-6.1-with-glibc2.36", "siglip-hf[search]", "faiss-cpu", "other.place.B", "A,"} <= words
    assert {f"word{i}" for i in range(40)} <= words


def test_doctor_names_problems(run, quick_doctor, monkeypatch):
    def missing():
        raise OSError("it is gone")

    monkeypatch.setattr(siglip_hf.loading, "naflex_checkpoint", missing)
    monkeypatch.setattr(doctor, "registered", lambda: {"AutoModel": {"siglip": "transformers.SiglipModel"}})
    code, out, err = run("doctor", "--json")
    assert code == 1
    expected = [
        "AutoModel gives transformers.SiglipModel for siglip: another plugin has replaced it; "
        "import siglip_hf after that one",
        "no embedded checkpoint of siglip2 (NaFlex), reinstall siglip-hf: OSError: it is gone",
    ]
    assert json.loads(out)["problems"] == expected
    assert err.splitlines() == [f"problem: {problem}" for problem in expected]


def test_attention_that_gives_other_numbers_does_not_work(monkeypatch):
    embeds = doctor._tiny_embeds
    wrong = {"sdpa": 1.0}
    monkeypatch.setattr(doctor, "_tiny_embeds", lambda name, *rest: embeds("eager", *rest) + wrong.get(name, 0.0))
    report = doctor.attention(("eager", "sdpa"))
    assert report["eager"]["works"]
    assert not report["sdpa"]["works"]
    assert "differs from eager" in report["sdpa"]["reason"]
