"""Conversion of original checkpoints: same embeddings as the original forward pass, and errors that name everything."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.models.siglip import modeling_siglip as stock_siglip
from transformers.models.siglip2 import modeling_siglip2 as stock_siglip2
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import big_vision_reference as reference
from siglip_hf import PRESETS, SiglipConfig, SiglipModel
from siglip_hf.cli.main import main
from siglip_hf.integrations.big_vision import _preset_fields, _read_tree, _rules, convert_big_vision
from siglip_hf.integrations.checkpoint_files import _span
from siglip_hf.models.configuration_siglip2 import NAFLEX_PRESETS, Siglip2Config

SIZES = reference.Sizes()
NAFLEX = reference.Sizes(naflex=True)


@pytest.fixture(scope="module")
def params():
    return reference.random_params(SIZES)


def write(path, params):
    reference.save(path, params)
    return path


def inputs(seed=1, batch=4):
    rng = np.random.default_rng(seed)
    side = SIZES.patch * SIZES.grid
    pictures = rng.standard_normal((batch, side, side, 3)).astype(np.float32)
    return pictures, rng.integers(0, SIZES.vocabulary, (batch + 1, SIZES.length))


def train_vocabulary(folder, name, pieces=SIZES.vocabulary, **options):
    words = ["a", "photo", "of", "the", "cat", "dog", "bird", "horse", "fish", "tree", "house", "car"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i:] + words[:i]) for i in range(len(words))] * 8),
        model_prefix=str(folder / name),
        vocab_size=pieces,
        minloglevel=2,
        **options,
    )
    return folder / f"{name}.model"


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", ["ours", "stock"])
def test_embeddings_and_logits_are_those_of_the_original(tmp_path, params, scan, family):
    file = write(tmp_path / "original.npz", reference.scanned(params) if scan else params)
    result = convert_big_vision(file, tmp_path / "out")
    assert (result.preset, result.num_tensors) == (None, len(params))
    assert result.num_parameters == sum(value.size for value in params.values())

    model_class = SiglipModel if family == "ours" else stock_siglip.SiglipModel
    model, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    pictures, ids = inputs()
    with torch.no_grad():
        output = model.eval()(
            input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(pictures.transpose(0, 3, 1, 2))
        )
    images, texts = reference.encode_image(params, pictures, SIZES.patch), reference.encode_text(params, ids)
    # The embeddings differ from one another by far more than the tolerance, so that equality means something.
    assert np.abs(images[0] - images[1]).max() > 0.01
    assert np.abs(texts[0] - texts[1]).max() > 0.01
    np.testing.assert_allclose(output.image_embeds, images, atol=1e-4)
    np.testing.assert_allclose(output.text_embeds, texts, atol=1e-4)
    np.testing.assert_allclose(output.logits_per_image, reference.logits(params, images, texts), atol=1e-4)


@pytest.mark.parametrize("grid", [(3, 3), (2, 4), (4, 2)], ids=str)
def test_naflex_checkpoints_become_siglip2_checkpoints(tmp_path, grid, monkeypatch):
    params = reference.random_params(NAFLEX)
    file = write(tmp_path / "original.npz", reference.scanned(params))
    assert convert_big_vision(file, tmp_path / "out").preset is None
    config = Siglip2Config.from_pretrained(tmp_path / "out")
    monkeypatch.setitem(
        NAFLEX_PRESETS,
        "tiny-naflex",
        (
            {key: getattr(config.text_config, key) for key in PRESETS["siglip2-base-patch16-256"][0]},
            {key: getattr(config.vision_config, key) for key in NAFLEX_PRESETS["siglip2-base-patch16-naflex"][1]},
        ),
    )
    for i, preset in enumerate([None, "google/tiny-naflex"]):
        assert convert_big_vision(file, tmp_path / str(i), preset=preset).preset.endswith("tiny-naflex")
        assert (tmp_path / str(i) / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()
    model, info = stock_siglip2.Siglip2Model.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    rows, columns = grid
    pictures = np.random.default_rng(1).standard_normal((2, rows * 4, columns * 4, 3)).astype(np.float32)
    patches = pictures.reshape(2, rows, 4, columns, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, rows * columns, -1)
    with torch.no_grad():
        output = model.eval().get_image_features(
            pixel_values=torch.from_numpy(patches),
            pixel_attention_mask=torch.ones(2, rows * columns),
            spatial_shapes=torch.tensor([grid, grid]),
        )
    embeds = torch.nn.functional.normalize(output.pooler_output, dim=-1)
    np.testing.assert_allclose(embeds, reference.encode_image(params, pictures, 4), atol=1e-4)
    processor = Siglip2ImageProcessorPil.from_pretrained(tmp_path / "out")
    assert (processor.patch_size, processor.max_num_patches, processor.resample) == (4, 9, 2)


def test_a_configuration_is_made_from_shapes(tmp_path, params):
    convert_big_vision(write(tmp_path / "original.npz", params), tmp_path / "out")
    config = AutoModel.from_pretrained(tmp_path / "out").config
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads) == (
        16,
        36,
        2,
        2,
    )
    assert (text.vocab_size, text.max_position_embeddings, text.projection_size) == (30, 7, 24)
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (24, 40, 3)
    assert (vision.num_attention_heads, vision.patch_size, vision.image_size) == (3, 4, 12)
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 12, "width": 12}
    assert processor["resample"] == 3


def test_a_published_checkpoint_is_recognised_by_its_shapes(tmp_path, params, monkeypatch):
    names = [*PRESETS, *NAFLEX_PRESETS]
    assert all(_preset_fields(a) != _preset_fields(b) for a in names for b in names if a != b)
    # A picture size that is no multiple of the patch size, as in so400m-patch14-384, is known to the preset only.
    tower = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    text = {"hidden_size": 16, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 30, "max_position_embeddings": 7, "projection_size": 24}
    monkeypatch.setitem(PRESETS, "tiny-patch4-14", (text, tower | {"patch_size": 4, "image_size": 14}))
    file = write(tmp_path / "original.npz", params)
    for i, preset in enumerate([None, "tiny-patch4-14"]):
        assert convert_big_vision(file, tmp_path / str(i), preset=preset).preset == "tiny-patch4-14"
        assert AutoModel.from_pretrained(tmp_path / str(i)).config.vision_config.image_size == 14
    with pytest.raises(ValueError, match=r"no preset 'tiny-patch4'; the nearest are \['tiny-patch4-14'"):
        convert_big_vision(file, tmp_path / "out", preset="tiny-patch4")


def test_every_tensor_of_every_preset_has_one_source():
    with torch.device("meta"):
        for name in ("siglip-base-patch16-224", "siglip-so400m-patch14-384", "siglip2-giant-opt-patch16-256"):
            config = SiglipConfig.from_preset(name)
            rules = _rules(config)
            sources = [source for rule in rules for source in rule.sources]
            assert len(sources) == len(set(sources))
            expected = {key: tuple(value.shape) for key, value in stock_siglip.SiglipModel(config).state_dict().items()}
            made = {}
            for rule in rules:
                parts = [rule.convert(torch.empty(rule.shape)) for _ in rule.sources]
                made[rule.target] = tuple(torch.cat(parts).shape)
            assert made == expected


def test_what_is_missing_left_over_or_misshapen_is_named_at_once(tmp_path, params):
    broken = {name: value for name, value in params.items() if "encoderblock_1/LayerNorm_0" not in name}
    del broken["img/MAPHead_0/probe"]
    broken["img/head/kernel"] = np.zeros((24, 24), np.float32)
    broken["txt/head/bias"] = np.zeros(5, np.float32)
    with pytest.raises(ValueError, match="does not fit") as raised:
        convert_big_vision(write(tmp_path / "original.npz", broken), tmp_path / "out")
    message = str(raised.value)
    assert "img/Transformer/encoderblock_1/LayerNorm_0/scale" in message
    assert "txt/Encoder_0/encoderblock_1/LayerNorm_0/bias" in message
    assert "img/MAPHead_0/probe" in message
    assert "left over: img/head/kernel" in message
    assert "txt/head/bias (5,) instead of (24,)" in message
    assert not (tmp_path / "out").exists()


def test_a_preset_of_another_size_is_refused_with_every_difference(tmp_path, params):
    with pytest.raises(ValueError, match="does not fit siglip-base-patch16-224") as raised:
        convert_big_vision(write(tmp_path / "o.npz", params), tmp_path / "out", preset="siglip-base-patch16-224")
    message = str(raised.value)
    assert "missing: " in message
    assert "img/Transformer/encoderblock_{3-11}/LayerNorm_0/scale" in message
    assert "img/pos_embedding (1, 9, 24) instead of (1, 196, 768)" in message


def test_damaged_archives_are_named(tmp_path, params):
    """Bits flipped anywhere, and archives cut off: a checkpoint or one ValueError, whatever numpy and zipfile raise."""
    whole = write(tmp_path / "original.npz", params).read_bytes()
    random, refused = np.random.default_rng(0), []
    for trial in range(60):
        content = bytearray(whole)
        if trial % 3 == 0:
            content = content[: random.integers(len(content))]
        else:
            # Most of the bytes are weights; the headers and the directory are what a reader stumbles over.
            for place in (random.integers(200), len(content) - 1 - random.integers(2000)):
                content[place] ^= 1 << random.integers(8)
        damaged = tmp_path / "damaged.npz"
        damaged.write_bytes(content)
        try:
            _read_tree(damaged)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert all("damaged.npz" in message for message in refused)


def test_a_declared_shape_takes_no_memory(tmp_path):
    """A header of a few bytes may declare 10^12 numbers."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        archive.writestr("params/t.npy", header.getvalue() + bytes(64))
    with pytest.raises(ValueError, match=r"large\.npz is damaged: params/t\.npy .*1000000000000.* than its \d+"):
        convert_big_vision(tmp_path / "large.npz", tmp_path / "out")


def test_what_is_no_checkpoint_is_refused(tmp_path, params):
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "single.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    for name, message in (
        ("text.npz", "is no .npz"),
        ("single.npy", "a single array"),
        ("other.npz", "has no img/emb"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_big_vision(tmp_path / name, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        convert_big_vision(tmp_path / "absent.npz", tmp_path / "out")
    with pytest.raises(ValueError, match="twice"):
        convert_big_vision(write(tmp_path / "twice.npz", params | reference.scanned(params)), tmp_path / "out")
    flat = params | {"img/pos_embedding": params["img/pos_embedding"][:, :8]}
    with pytest.raises(ValueError, match="8 positions, which is no square"):
        convert_big_vision(write(tmp_path / "flat.npz", flat), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16], ids=str)
def test_weights_are_saved_in_the_dtype_asked_for(tmp_path, params, dtype):
    convert_big_vision(write(tmp_path / "original.npz", params), tmp_path / "out", dtype=dtype)
    model = SiglipModel.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == (torch.float16 if dtype == "float16" else dtype)
    expected = torch.from_numpy(params["txt/head/kernel"]).T.to(model.dtype)
    assert torch.equal(model.text_model.head.weight, expected)


def test_bfloat16_originals_are_read_and_values_too_large_refused(tmp_path, params):
    half = {name: torch.from_numpy(value).bfloat16() for name, value in params.items()}
    raw = {name: value.view(torch.int16).numpy().view("V2") for name, value in half.items()}
    convert_big_vision(write(tmp_path / "half.npz", raw), tmp_path / "out")
    weight = SiglipModel.from_pretrained(tmp_path / "out").text_model.head.weight
    assert torch.equal(weight, half["txt/head/kernel"].float().T)

    large = params | {"txt/head/kernel": np.full_like(params["txt/head/kernel"], 1e6)}
    with pytest.raises(ValueError, match=r"txt/head/kernel cannot be saved in torch\.float16: .* 1e\+06"):
        convert_big_vision(write(tmp_path / "large.npz", large), tmp_path / "large", dtype="float16")
    with pytest.raises(ValueError, match="dtype='int8' cannot be saved"):
        convert_big_vision(tmp_path / "large.npz", tmp_path / "large", dtype="int8")


def test_an_earlier_output_is_replaced_only_if_told(tmp_path, params):
    file = write(tmp_path / "original.npz", params)
    convert_big_vision(file, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="out is not empty"):
        convert_big_vision(file, tmp_path / "out")
    (tmp_path / "out" / "stale.bin").touch()
    convert_big_vision(file, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "out" / "stale.bin").exists()

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert_big_vision(file, tmp_path / "home", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["home", "original.npz", "out"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, params, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(SiglipModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_big_vision(write(tmp_path / "original.npz", params), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["original.npz"]


def test_the_tokenizer_is_taken_along(tmp_path, params):
    file = write(tmp_path / "original.npz", params)
    vocabulary = train_vocabulary(tmp_path, "c4", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    convert_big_vision(file, tmp_path / "out", tokenizer=vocabulary)
    assert (tmp_path / "out" / "spiece.model").read_bytes() == vocabulary.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    expected = [*pieces.encode("a cat"), 1]
    ids = tokenizer("A cat.", padding="max_length", truncation=True)["input_ids"]
    assert ids == (expected + [1] * 7)[:7]

    other = train_vocabulary(tmp_path, "other", pieces=28)
    with pytest.raises(ValueError, match="has 28 pieces, but the checkpoint embeds 30"):
        convert_big_vision(file, tmp_path / "again", tokenizer=other)
    with pytest.raises(ValueError, match="is no SentencePiece model"):
        convert_big_vision(file, tmp_path / "again", tokenizer=file)
    with pytest.raises(ValueError, match="is no file"):
        convert_big_vision(file, tmp_path / "again", tokenizer=tmp_path / "absent.model")


def test_the_tokenizer_of_siglip2_lowercases_and_ends_in_eos(tmp_path):
    options = {"model_type": "bpe", "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>"}
    options |= {"eos_piece": "<eos>", "bos_piece": "<bos>", "user_defined_symbols": ["<mask>", "<table>"]}
    options |= {"byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    vocabulary = train_vocabulary(tmp_path, "gemma", pieces=310, normalization_rule_name="identity", **options)
    params = reference.random_params(reference.Sizes(naflex=True, vocabulary=310))
    convert_big_vision(write(tmp_path / "original.npz", params), tmp_path / "out", tokenizer=vocabulary)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    expected = [*pieces.encode("a <table> photo, cat"), 1]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("A <table> Photo, CAT", padding="max_length", max_length=20)
    assert len(expected) < 20
    assert ids["input_ids"] == expected + [0] * (20 - len(expected))


def test_the_command_line_converts(tmp_path, params, capsys):
    file = write(tmp_path / "original.npz", params)
    assert main(["convert", str(file), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert "big_vision to transformers, 0.0 million parameters" in told
    assert "of no published checkpoint; 108 tensors" in told
    assert SiglipModel.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    for arguments, message in (
        ([str(file), str(tmp_path / "out")], "out is not empty; give another folder, or overwrite=True (--overwrite)"),
        ([str(tmp_path / "no.npz"), str(tmp_path / "new")], "no.npz"),
        ([str(file), str(tmp_path / "new"), "--preset", "siglip-xl"], "no preset 'siglip-xl'; the nearest are"),
    ):
        assert main(["convert", *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("siglip-hf: ")]
        assert message in line
    assert main(["convert", str(file), str(tmp_path / "out"), "--overwrite"]) == 0


def test_the_snippets_of_the_page_run(tmp_path, params, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "converting.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    snippets = [snippet for snippet in snippets if "webli" in snippet or "siglip-base" in snippet]
    assert len(snippets) == 2
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "webli_en_b16_224.npz", params)
    train_vocabulary(tmp_path, "c4_en", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    names: dict = {}
    for snippet in snippets:
        exec(snippet, names)
    assert names["result"].num_tensors == len(params)
    ids = torch.tensor([names["tokenizer"]("a cat", padding="max_length", truncation=True)["input_ids"]])
    with torch.no_grad():
        texts = names["model"].eval().encode_text(ids)
    np.testing.assert_allclose(texts, reference.encode_text(params, ids.numpy()), atol=1e-4)


def test_block_numbers_are_joined():
    assert _span([3]) == "3"
    assert _span([2, 0, 1, 5, 7, 8]) == "{0-2,5,7-8}"
