"""The pipeline: stock's contract, stock's numbers, and none of stock's silences."""

from __future__ import annotations

import copy
import http.server
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoTokenizer, pipeline
from transformers.pipelines.pt_utils import KeyDataset
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline as StockPipeline

import siglip_hf
from siglip_hf.inference.pipeline import SiglipZeroShotImageClassificationPipeline
from siglip_hf.preprocessing.image_intake import PictureError
from tiny_checkpoint import TEXT_LENGTH, write_tiny_checkpoint

TASK = "zero-shot-image-classification"
LABELS = ["cat", "dog", "a red bird", "house"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def shared(folder):
    return pipeline(TASK, model=str(folder), device="cpu")


@pytest.fixture
def pipe(shared):
    """A pipeline with an empty label bank on shared weights."""
    return SiglipZeroShotImageClassificationPipeline(
        model=shared.model,
        tokenizer=shared.tokenizer,
        image_processor=shared.image_processor,
        task=TASK,
        device="cpu",
        optimize=False,  # whose probe would be counted too
    )


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(5)]


@pytest.fixture
def text_forwards(pipe):
    """The number of texts in each forward of the text tower."""
    sizes = []
    hook = pipe.model.text_model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    yield sizes
    hook.remove()


def scores(results):
    return {result["label"]: result["score"] for result in results}


def joint_logits(pipe, picture, labels, template="This is a photo of {}."):
    """(C,) by the joint forward of the model, without any bank."""
    texts = [template.format(label) for label in labels]
    input_ids = pipe.tokenizer(
        texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
    )["input_ids"]
    pixel_values = pipe.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return pipe.model(input_ids=input_ids, pixel_values=pixel_values).logits_per_image[0]


# --- which class


def test_pipeline_gives_this_class_for_siglip(shared):
    assert type(shared) is SiglipZeroShotImageClassificationPipeline
    assert isinstance(shared, StockPipeline)
    assert type(shared.model) is siglip_hf.SiglipModel


def tiny_clip():
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = [*"abcdefghijklmnopqrstuvwxyz.", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz.")]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(letters), "eos_token_id": len(letters) + 1, "pad_token_id": len(letters) + 1}
    config = CLIPConfig(
        text_config={**tower, **ends, "vocab_size": len(vocab), "max_position_embeddings": 77},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    torch.manual_seed(0)
    return {
        "model": CLIPModel(config).eval(),
        "tokenizer": CLIPTokenizer(vocab=vocab, merges=[]),
        "image_processor": CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False),
    }


def test_other_models_get_the_stock_pipeline_and_its_results(pictures):
    parts = tiny_clip()
    made = pipeline(TASK, device="cpu", **parts)
    assert type(made) is StockPipeline
    stock = StockPipeline(task=TASK, device="cpu", **parts)
    assert made(pictures, candidate_labels=LABELS) == stock(pictures, candidate_labels=LABELS)
    assert sum(scores(made(pictures[0], candidate_labels=LABELS)).values()) == pytest.approx(1)


def test_a_stock_siglip_model_gets_the_stock_pipeline(shared):
    from transformers.models.siglip.configuration_siglip import SiglipConfig
    from transformers.models.siglip.modeling_siglip import SiglipModel

    model = SiglipModel(SiglipConfig(**shared.model.config.to_dict()))
    made = pipeline(TASK, model=model, tokenizer=shared.tokenizer, image_processor=shared.image_processor, device="cpu")
    assert type(made) is StockPipeline


def test_it_can_be_copied_and_pickled(pipe, pictures):
    expected = pipe(pictures[0], LABELS)
    for twin in (copy.copy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert type(twin) is SiglipZeroShotImageClassificationPipeline
        assert scores(twin(pictures[0], LABELS)) == pytest.approx(scores(expected), abs=1e-7)


# --- numbers


def test_scores_are_those_of_the_joint_forward(pipe, pictures):
    for picture in pictures[:2]:
        results = pipe(picture, candidate_labels=LABELS)
        expected = joint_logits(pipe, picture, LABELS).sigmoid()
        assert scores(results) == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)), abs=1e-6)
        assert [r["score"] for r in results] == sorted((r["score"] for r in results), reverse=True)
        assert all(list(result) == ["score", "label"] for result in results)


def test_cached_scores_equal_uncached_ones(pipe, pictures):
    first = pipe(pictures[0], LABELS)
    assert pipe.label_bank.texts_encoded == len(LABELS)
    again = pipe(pictures[0], LABELS)
    pipe.label_bank.clear()
    uncached = pipe(pictures[0], LABELS)
    assert pipe.label_bank.texts_encoded == 2 * len(LABELS)
    assert scores(again) == pytest.approx(scores(uncached), abs=1e-6)
    assert first == again


def test_stock_pipeline_on_the_same_weights_agrees(folder, pipe, pictures):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.siglip.modeling_siglip import SiglipModel
    from transformers.models.siglip.tokenization_siglip import SiglipTokenizer

    # max_length=64 is a constant of the stock pipeline; this checkpoint's length has to be forced on its tokenizer.
    class Tokenizer(SiglipTokenizer):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **{**kwargs, "max_length": TEXT_LENGTH})

    stock = StockPipeline(
        model=SiglipModel.from_pretrained(folder).eval(),
        tokenizer=Tokenizer.from_pretrained(folder, model_input_names=["input_ids"]),
        image_processor=SiglipImageProcessorPil.from_pretrained(folder),
        task=TASK,
        device="cpu",
    )
    ours, theirs = (p(pictures, candidate_labels=LABELS) for p in (pipe, stock))
    for one, other in zip(ours, theirs, strict=True):
        # The image processors may differ by one grey level.
        assert scores(one) == pytest.approx(scores(other), rel=0.02)
        assert [r["label"] for r in one] == [r["label"] for r in other]


def test_every_score_by_name(pipe, pictures):
    logits = joint_logits(pipe, pictures[0], LABELS)
    expected = {
        "none": logits,
        "logit": logits,
        "sigmoid": logits.sigmoid(),
        "softmax": logits.softmax(-1),
        "cosine": (logits - pipe.model.logit_bias.detach()) / pipe.model.logit_scale.detach().exp(),
    }
    for name, values in expected.items():
        results = pipe(pictures[0], LABELS, function_to_apply=name)
        assert scores(results) == pytest.approx(dict(zip(LABELS, values.tolist(), strict=True)), abs=1e-5), name
        assert [r["score"] for r in results] == sorted((r["score"] for r in results), reverse=True)

    named = pipe(pictures[0], LABELS, named_scores=True, function_to_apply="softmax")
    for result in named:
        assert result["score"] == result["softmax"]
        assert list(result) == ["score", "label", "cosine", "logit", "sigmoid", "softmax"]
        i = LABELS.index(result["label"])
        for name in ("cosine", "logit", "sigmoid", "softmax"):
            assert result[name] == pytest.approx(expected[name][i].item(), abs=1e-5)
    assert sum(result["softmax"] for result in named) == pytest.approx(1)


def test_transformers_names_of_functions_are_accepted(pipe, pictures):
    from transformers.pipelines.text_classification import ClassificationFunction

    for function in ClassificationFunction:
        by_name = pipe(pictures[0], LABELS, function_to_apply=function.value)
        assert pipe(pictures[0], LABELS, function_to_apply=function) == by_name


def test_order_survives_a_saturated_sigmoid(pipe, pictures):
    bias = pipe.model.logit_bias
    before = bias.detach().clone()
    expected = [r["label"] for r in pipe(pictures[0], LABELS, function_to_apply="cosine")]
    try:
        bias.data.fill_(500.0)
        saturated = pipe(pictures[0], LABELS)
    finally:
        bias.data.copy_(before)
    assert {r["score"] for r in saturated} == {1.0}
    assert [r["label"] for r in saturated] == expected


def test_bfloat16(folder, pipe, pictures):
    half = pipeline(TASK, model=str(folder), dtype=torch.bfloat16, device="cpu")
    assert half.dtype == torch.bfloat16
    cosines = [scores(p(pictures[0], LABELS, function_to_apply="cosine")) for p in (half, pipe)]
    assert cosines[0] == pytest.approx(cosines[1], abs=0.02)


def test_replaced_model_is_noticed(folder, pipe, pictures):
    before = scores(pipe(pictures[0], LABELS, function_to_apply="cosine"))
    pipe.model = siglip_hf.SiglipModel(pipe.model.config).eval()
    after = scores(pipe(pictures[0], LABELS, function_to_apply="cosine"))
    assert pipe.label_bank.texts_encoded == len(LABELS)
    assert before != pytest.approx(after, abs=1e-3)


# --- work: text once, pictures once, the joint forward never


def test_known_labels_cost_no_text(pipe, pictures, text_forwards, monkeypatch):
    monkeypatch.setattr(pipe.model, "forward", lambda *args, **kwargs: pytest.fail("the joint forward was called"))
    many = [f"label {i}" for i in range(150)]
    pipe(pictures, candidate_labels=many)
    assert sum(text_forwards) == 150
    assert max(text_forwards) <= pipe.label_bank.chunk_size
    pipe(pictures[0], candidate_labels=many)
    pipe(pictures, candidate_labels=many[::-1], batch_size=2)
    pipe(pictures[0], candidate_labels=many[10:20])
    assert sum(text_forwards) == 150
    pipe(pictures[0], candidate_labels=[*many, "new"])
    assert sum(text_forwards) == 151


def test_each_picture_is_processed_once(pipe, pictures, monkeypatch):
    images = []
    inner = type(pipe.image_processor).preprocess
    monkeypatch.setattr(
        type(pipe.image_processor),
        "preprocess",
        lambda self, images_, **kwargs: images.extend(images_) or inner(self, images_, **kwargs),
    )
    pipe(pictures, candidate_labels=LABELS, batch_size=2)
    assert len(images) == len(pictures)


# --- labels, templates, options (STOCK.md, "pipeline")


def test_labels_in_one_string(pipe, pictures):
    assert scores(pipe(pictures[0], candidate_labels="cat, dog")) == scores(pipe(pictures[0], ["cat", "dog"]))
    assert set(scores(pipe(pictures[0], candidate_labels="cat, dog"))) == {"cat", "dog"}


def test_a_label_given_twice_counts_once(pipe, pictures):
    once, twice = (pipe(pictures[0], labels, function_to_apply="softmax") for labels in ("cat,dog", "cat,dog,cat"))
    assert once == twice


@pytest.mark.parametrize("labels", [[], "", ["cat", ""], [1]])
def test_empty_labels_are_refused(pipe, pictures, labels):
    with pytest.raises(ValueError, match="candidate_labels"):
        pipe(pictures[0], candidate_labels=labels)


def test_missing_labels_or_pictures_are_named(pipe, pictures):
    with pytest.raises(ValueError, match="no candidate_labels"):
        pipe(pictures[0])
    with pytest.raises(ValueError, match="no picture"):
        pipe(candidate_labels=LABELS)
    with pytest.raises(ValueError, match="both image and images"):
        pipe(pictures[0], LABELS, images=pictures)


def test_template(pipe, pictures):
    results = pipe(pictures[0], LABELS, hypothesis_template="a drawing of {}", function_to_apply="logit")
    expected = joint_logits(pipe, pictures[0], LABELS, "a drawing of {}")
    assert scores(results) == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)), abs=1e-5)
    whole = pipe(pictures[0], [f"a drawing of {label}" for label in LABELS], hypothesis_template="{}")
    assert sorted(scores(whole).values()) == pytest.approx(
        sorted(scores(pipe(pictures[0], LABELS, hypothesis_template="a drawing of {}")).values())
    )


def test_a_template_without_a_place_for_the_label_is_refused(pipe, pictures):
    with pytest.raises(ValueError, match=r"'a photo'.*'\{\}'"):
        pipe(pictures[0], LABELS, hypothesis_template="a photo")


def test_several_templates_average(pipe, pictures):
    templates = ["a photo of {}", "a drawing of {}", "{}"]
    cosines = scores(pipe(pictures[0], LABELS, hypothesis_template=templates, function_to_apply="cosine"))
    pixel_values = pipe.image_processor(images=[pictures[0]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        image = pipe.model.encode_image(pixel_values)[0]
        for label in LABELS:
            texts = [template.format(label) for template in templates]
            ids = pipe.tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")["input_ids"]
            mean = pipe.model.encode_text(ids).mean(0)
            assert cosines[label] == pytest.approx((image @ (mean / mean.norm())).item(), abs=1e-6)


def test_top_k(pipe, pictures):
    full = pipe(pictures[0], LABELS, function_to_apply="softmax")
    assert pipe(pictures[0], LABELS, top_k=2, function_to_apply="softmax") == full[:2]
    assert pipe(pictures[0], LABELS, top_k=99, function_to_apply="softmax") == full
    for top_k in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=f"top_k={top_k!r}"):
            pipe(pictures[0], LABELS, top_k=top_k)


def test_tokenizer_arguments_are_obeyed(pipe, pictures, monkeypatch):
    lengths = []
    inner = pipe.model.encode_text
    monkeypatch.setattr(pipe.model, "encode_text", lambda ids: lengths.append(ids.shape[1]) or inner(ids))
    default = pipe(pictures[0], LABELS)
    changed = pipe(pictures[0], LABELS, tokenizer_kwargs={"max_length": 4})
    assert lengths == [TEXT_LENGTH, 4]
    assert scores(default) != pytest.approx(scores(changed), rel=1e-3)
    assert pipe(pictures[0], LABELS) == default
    with pytest.raises(ValueError, match="tokenizer_kwargs"):
        pipe(pictures[0], LABELS, tokenizer_kwargs="max_length")


def test_unknown_arguments_are_refused_by_name(pipe, pictures, folder):
    with pytest.raises(ValueError, match=r"topk=3.*did you mean top_k"):
        pipe(pictures[0], LABELS, topk=3)
    with pytest.raises(ValueError, match=r"hypothesis_templates=.*did you mean hypothesis_template"):
        pipe(pictures[0], LABELS, hypothesis_templates="a {}")
    with pytest.raises(ValueError, match=r"zzz=1 is not an argument.*candidate_labels, "):
        pipe([], LABELS, zzz=1)
    with pytest.raises(ValueError, match=r"multi_label=True"):
        pipeline(
            TASK, model=pipe.model, tokenizer=pipe.tokenizer, image_processor=pipe.image_processor, multi_label=True
        )
    with pytest.raises(ValueError, match=r"function_to_apply='tanh'.*softmax"):
        pipe(pictures[0], LABELS, function_to_apply="tanh")


def test_loading_arguments_pass(folder):
    made = pipeline(TASK, model=str(folder), device="cpu", local_files_only=True, dtype="float32", batch_size=2)
    assert made.dtype == torch.float32


def test_options_at_construction_are_defaults(folder, pictures):
    made = pipeline(TASK, model=str(folder), device="cpu", candidate_labels="cat, dog, house", top_k=1)
    assert len(made(pictures[0])) == 1
    assert len(made(pictures[0], top_k=None)) == 3
    assert {r["label"] for r in made(pictures[0], LABELS, top_k=9)} == set(LABELS)
    assert len(made(pictures)) == len(pictures)


def test_none_means_the_default(pipe, pictures):
    nones = dict.fromkeys(("hypothesis_template", "tokenizer_kwargs", "function_to_apply", "top_k", "timeout"))
    assert pipe(pictures[0], LABELS, **nones) == pipe(pictures[0], LABELS)


# --- pictures of every kind, one or many


def encoded(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_every_kind_of_picture(pipe, pictures, tmp_path):
    picture = pictures[0]
    array = np.asarray(picture)
    file = tmp_path / "picture.png"
    file.write_bytes(encoded(picture))
    expected = pipe(picture, LABELS)
    with file.open("rb") as handle:
        for source in (
            str(file),
            file,
            file.read_bytes(),
            bytearray(file.read_bytes()),
            io.BytesIO(file.read_bytes()),
            handle,
            array,
            array.transpose(2, 0, 1),
            array.astype(np.float32) / 255,
            torch.from_numpy(array.copy()),
            torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255,
        ):
            assert pipe(source, LABELS) == expected, type(source)
    assert pipe(images=picture, candidate_labels=LABELS) == expected


@pytest.fixture
def server(pictures, monkeypatch):
    """The first picture under `/picture.png`; `/silent.png` never answers."""
    content, closing = encoded(pictures[0]), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/silent.png":
                closing.wait()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        closing.set()
        server.shutdown()


def test_url(pipe, pictures, server):
    assert pipe(f"{server}/picture.png", LABELS, timeout=20) == pipe(pictures[0], LABELS)


def test_timeout(pipe, server):
    with pytest.raises(PictureError, match=r"silent\.png.*timed out"):
        pipe(f"{server}/silent.png", LABELS, timeout=0.2)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_many_pictures(pipe, pictures, batch_size):
    expected = [pipe(picture, LABELS) for picture in pictures]

    def same(results):
        return [scores(r) for r in results] == [pytest.approx(scores(r), abs=1e-6) for r in expected]

    batch = np.stack([np.asarray(picture) for picture in pictures])
    for source in (pictures, tuple(pictures), batch, torch.from_numpy(batch).permute(0, 3, 1, 2)):
        results = pipe(source, LABELS, batch_size=batch_size)
        assert isinstance(results, list)
        assert same(results)


class Pictures(Dataset):
    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return {"image": self.pictures[i]}


def test_data_sets_and_workers(pipe, pictures):
    expected = [pipe(picture, LABELS) for picture in pictures]
    data = KeyDataset(Pictures(pictures), "image")
    for options in ({}, {"batch_size": 2}, {"batch_size": 2, "num_workers": 1}):
        results = pipe(data, LABELS, **options)
        assert not isinstance(results, list)
        assert [scores(r) for r in results] == [pytest.approx(scores(r), abs=1e-6) for r in expected]


def test_generators_are_read_as_they_go(pipe, pictures):
    read = []

    def stream():
        for i, picture in enumerate(pictures):
            read.append(i)
            yield picture

    results = pipe(stream(), LABELS)
    first = next(iter(results))
    assert scores(first) == scores(pipe(pictures[0], LABELS))
    assert len(read) < len(pictures)
    assert len(list(pipe(iter(pictures), LABELS, batch_size=2))) == len(pictures)


def test_no_pictures_give_no_results(pipe):
    assert pipe([], LABELS) == []
    assert list(pipe(iter([]), LABELS)) == []


def test_bad_options_are_refused_before_any_picture_is_read(pipe):
    with pytest.raises(ValueError, match="top_k"):
        pipe(iter([pytest.fail]), LABELS, top_k=0)
    with pytest.raises(ValueError, match="candidate_labels"):
        pipe("no such file.png", [""])


def test_a_wrong_file_is_named(pipe, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(encoded(pictures[0])[:100])
    with pytest.raises(PictureError, match=r"broken\.png"):
        pipe([pictures[0], str(broken)], LABELS)


def test_a_foreign_tokenizer_is_refused(tmp_path):
    """A tokenizer of another vocabulary would give wrong scores without an error."""
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    foreign = AutoTokenizer.from_pretrained(siglip_hf.default_checkpoint())
    with pytest.raises(ValueError, match=rf"tokenizer has {len(foreign)} tokens.*vocab_size is \d+"):
        pipeline("zero-shot-image-classification", model=str(folder), tokenizer=foreign)
