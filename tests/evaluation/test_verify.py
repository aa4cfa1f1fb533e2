"""`siglip_hf.verify`: stock and ours in processes of their own; a wrong weight, id or score is found."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import json_shapes
import siglip_hf
from siglip_hf.cli.main import main
from siglip_hf.evaluation import verify as module
from tiny import TEXT, VISION
from tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="module")
def result(original):
    return siglip_hf.verify(original, [Image.radial_gradient("L"), Image.linear_gradient("L")], labels=["cat", "a dog"])


def test_both_sides_are_what_they_say(result):
    stock, ours = result.sides["stock"], result.sides["siglip_hf"]
    assert [path.split(".")[0] for path in stock["classes"]] == ["transformers"] * 3
    assert [path.split(".")[0] for path in ours["classes"]] == ["siglip_hf"] * 3
    for side in (stock, ours):
        assert side["seconds"].keys() == {"load", "pictures", "texts", "forward"}
        assert min(side["seconds"].values()) > 0
        assert side["peak_memory"] is None or side["peak_memory"] > side["memory_before"] > 0


def test_the_same_numbers(result):
    assert result.ok
    assert result.verdict.startswith("SAME: ")
    shapes = {row.name: row.shape for row in result.comparisons}
    assert shapes == {
        "token ids": (2, 16),
        "pixel values": (2, 3, 32, 32),
        "image embeddings": (2, 32),
        "text embeddings": (2, 32),
        "logits": (2, 2),
        "scores": (2, 2),
    }
    assert {row.name for row in result.comparisons if row.difference == 0} >= {"token ids", "pixel values"}
    printed = json.loads(json.dumps(result.as_dict()))
    assert printed["ok"] is True
    assert json_shapes.keys(printed) == json_shapes.keys(json_shapes.shown("verify"))  # docs/command_line.md


def test_a_broken_weight_is_found(original, tmp_path, capfd):
    """One number of the pooling head is wrong: pictures differ, texts do not, and the exit code is 1."""
    broken = tmp_path / "broken"
    shutil.copytree(original, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["vision_model.head.attention.in_proj_weight"][70, 3] += 0.5  # a row of the values
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    Image.radial_gradient("L").save(tmp_path / "picture.png")
    command = ["verify", str(broken), str(tmp_path / "picture.png"), "--reference", str(original), "--json"]
    assert main(command) == 1
    report = json.loads(capfd.readouterr().out)
    found = {row["name"]: row["ok"] for row in report["comparisons"]}
    assert max(row["allowed"] for row in report["comparisons"] if row["name"] == "scores") < 1e-5  # all near 0
    assert found == {
        "token ids": True,
        "pixel values": True,
        "image embeddings": False,
        "text embeddings": True,
        "logits": False,
        "scores": False,
    }
    assert report["verdict"].startswith("DIFFERENT: image embeddings differ by 0.")


def test_random_weights_of_a_preset(monkeypatch, capsys):
    """All parameters are random, biases and norms too; nothing is fetched, and the table ends in the verdict."""
    text = {key: value for key, value in TEXT.items() if not key.endswith("token_id")} | {"projection_size": 32}
    monkeypatch.setitem(siglip_hf.PRESETS, "siglip-tiny", (text, VISION))
    assert main(["verify", "--random", "siglip-tiny", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "random siglip-tiny, bfloat16" in printed
    assert "4 x 3 x 32 x 32" in printed
    assert printed.strip().splitlines()[-1].startswith("SAME: random siglip-tiny gives stock's numbers in bfloat16")


def test_random_weights_leave_no_default_values(monkeypatch, tmp_path):
    text = {key: value for key, value in TEXT.items() if not key.endswith("token_id")} | {"projection_size": 32}
    monkeypatch.setitem(siglip_hf.PRESETS, "siglip-tiny", (text, VISION))
    state = torch.get_rng_state()
    tensors = load_file(module.write_random("siglip-tiny", tmp_path) / "model.safetensors")
    torch.testing.assert_close(torch.get_rng_state(), state)
    assert [name for name, tensor in tensors.items() if tensor.numel() > 1 and tensor.std() == 0] == []


def test_a_command_writes_random_weights_under_published_names(tmp_path):
    """In a process of a command, where nothing is registered yet; else stock's pooling head would stay random."""
    code = (
        "import sys, siglip_hf_command\n"
        "siglip_hf_command.is_parsing = True\n"
        "from siglip_hf.models import configuration_siglip as c\n"
        f"c.PRESETS['siglip-tiny'] = {(TEXT | {'projection_size': 32}, VISION)!r}\n"
        "from siglip_hf.evaluation.verify import write_random\n"
        "from pathlib import Path\n"
        "write_random('siglip-tiny', Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "vision_model.head.attention.in_proj_weight" in names
    assert not [name for name in names if "head.attention.q_proj" in name]


def sides(stock_score: float, our_score: float, our_ids: int = 1) -> list[dict[str, torch.Tensor]]:
    """What two sides give for the published example."""
    return [
        {
            "published/logits_per_image": torch.tensor([[score, 0.0, 0.0]]).logit(),
            "published/input_ids": torch.full((3, 4), ids),
        }
        for score, ids in ((stock_score, 1), (our_score, our_ids))
    ]


@pytest.mark.parametrize(
    ("stock", "ours", "ids", "ok"),
    [
        (0.1979, 0.1978, 1, True),
        (0.1979, 0.31, 1, False),
        (0.1979, 0.31, 2, True),  # other ids, since SigLIP 2's text is lowercased: stock is held to the page
        (0.31, 0.1979, 2, False),
    ],
)
def test_published_scores(stock, ours, ids, ok):
    found, row = module._published("siglip-base-patch16-224", *sides(stock, ours, ids))
    assert row.ok is ok
    assert found["printed"] == 0.1979
    assert found["siglip_hf"] == pytest.approx(ours)
    assert "printed 0.1979" in row.note


def test_the_published_example_is_asked_for(original, tmp_path):
    """A user who has the picture gives it under its name; without it, a note says what is missing."""
    config = module._joint_config(str(original))
    picture = tmp_path / "000000039769.jpg"
    Image.new("RGB", (64, 48), "red").save(picture)
    named = "google/siglip-base-patch16-224"
    cases, notes = module._cases(config, str(original), named, [str(picture)], None, False, tmp_path)
    assert cases["published"]["texts"][0] == "This is a photo of 2 cats."
    assert notes == []
    cases, _ = module._cases(config, str(original), "my/own", [str(picture)], None, False, tmp_path)
    assert cases.keys() == {"yours"}


def test_labels_are_read_as_words_on_both_sides(original, tmp_path):
    """`_` is a space in a label here, and stock deletes it: the texts compared are the same, and a note says so."""
    config = module._joint_config(str(original))
    cases, notes = module._cases(config, "folder", "own", None, "hot_air_balloon, cat", False, tmp_path)
    assert cases["yours"]["texts"] == ["This is a photo of hot air balloon.", "This is a photo of cat."]
    assert len(notes) == 1
    assert "'hot_air_balloon' as 'hot air balloon'" in notes[0]


def row_of(stock_logit: float, our_logit: float, dtype: str) -> module.Comparison:
    stock, ours = ({"yours/logits_per_image": torch.tensor([[logit]])} for logit in (stock_logit, our_logit))
    return module._compare(stock, ours, dtype, 100.0)[-1]


@pytest.mark.parametrize("logit", [-30.0, -16.0, -2.0, 0.0, 5.0])
@pytest.mark.parametrize("dtype", module.TOLERANCE)
def test_scores_allow_what_logits_do(logit, dtype):
    """Rounding passes at any score, also near 0; ten times as much does not, where a score can show it."""
    allowed = module.TOLERANCE[dtype] * 100
    assert row_of(logit, logit + 0.9 * allowed, dtype).ok
    if dtype == "float32":
        assert not row_of(logit, logit + 10 * allowed, dtype).ok


def test_a_picture_out_of_reach_is_said(original, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PUBLISHED_PICTURE", str(tmp_path / "nowhere.jpg"))
    config = module._joint_config(str(original))
    cases, notes = module._cases(config, "folder", "siglip-base-patch16-224", None, None, False, tmp_path)
    assert cases.keys() == {"yours"}
    assert "nowhere.jpg" in notes[0]


def test_what_has_no_meaning_is_different():
    assert module._difference(torch.zeros(2, 3), torch.zeros(3, 2)) == float("inf")
    assert module._difference(torch.tensor([1.0]), torch.tensor([float("nan")])) == float("inf")
    assert module._difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "int8"),
        ({"random": "siglip-base-patch16-224", "model": "folder"}, "random"),
        ({"random": "siglip-bass-patch16-224"}, "siglip-base-patch16-224"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        siglip_hf.verify(**arguments)


def test_a_side_that_fails_says_why(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(OSError, match="siglip_hf failed on"):
        siglip_hf.verify(tmp_path)
