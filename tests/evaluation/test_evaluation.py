"""Recall and accuracy against plain formulas, and their numbers on the embedded checkpoint against plain numpy."""

import io
import math
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import siglip_hf
from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.data.sources import Source, open_source
from siglip_hf.evaluation import (
    ClassAccuracy,
    ZeroShotAccuracy,
    evaluate,
    name_classes,
    retrieval_recall,
    with_truth,
    zero_shot_accuracy,
)
from siglip_hf.evaluation.confusion_picture import MAX_CLASSES, check_picture_file, draw_confusion
from siglip_hf.inference.classify import load_classifier, read_truth_file
from siglip_hf.inference.label_bank import parse_templates
from siglip_hf.inference.prompt_templates import TEMPLATE_SETS, template_set
from tiny_siglip2 import write_naflex

PICTURES = Path(__file__).parents[2] / "src" / "siglip_hf" / "apps" / "pictures"


def _dense_recall(images: np.ndarray, texts: np.ndarray, owner: np.ndarray, k: int) -> tuple[float, float]:
    """By sorting the whole matrix, without ties."""
    cosines = images @ texts.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(texts, axis=1)
    to_text = np.argsort(-cosines, axis=1)[:, :k]
    to_image = np.argsort(-cosines, axis=0)[:k]
    asked = sorted(set(owner))
    return (
        float(np.mean([any(owner[t] == i for t in to_text[i]) for i in asked])),
        float(np.mean([owner[t] in to_image[:, t] for t in range(len(texts))])),
    )


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recall_is_that_of_the_sorted_matrix(chunk_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(23, 8, generator=generator)
    owner = torch.randint(20, (61,), generator=generator)  # the last images have no text
    texts = images[owner] + 1.2 * torch.randn(61, 8, generator=generator)
    recall = retrieval_recall(images.to(dtype), texts.to(dtype), owner, (1, 3, 5), chunk_size=chunk_size)
    for k in (1, 3, 5):
        expected = _dense_recall(images.double().numpy(), texts.double().numpy(), owner.numpy(), k)
        assert (recall.image_to_text[k], recall.text_to_image[k]) == pytest.approx(expected)
    assert 0.3 < recall.text_to_image[1] < recall.text_to_image[5] < 1
    assert (recall.images, recall.texts) == (23, 61)


class _LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_is_that_of_the_embeddings_and_a_block() -> None:
    with _LargestTensor() as largest:
        retrieval_recall(torch.ones(900, 4), torch.ones(1500, 4), torch.arange(1500) % 900, chunk_size=50)
        zero_shot_accuracy(torch.ones(900, 4), torch.ones(200, 4), torch.zeros(900).long(), ["x"] * 200, chunk_size=30)
    assert largest.elements <= 1500 * 4  # the block has 2,500, the whole matrix 1,350,000


def test_embeddings_that_are_all_alike_score_chance() -> None:
    recall = retrieval_recall(torch.ones(20, 4), torch.ones(40, 4), torch.arange(40) // 2, (1, 5, 20))
    assert recall.text_to_image == pytest.approx({1: 1 / 20, 5: 5 / 20, 20: 1})
    # Two of 40 texts are right: a miss at 5 is 38/40 * 37/39 * 36/38 * 35/37 * 34/36.
    assert recall.image_to_text[1] == pytest.approx(2 / 40)
    assert recall.image_to_text[5] == pytest.approx(1 - (35 * 34) / (40 * 39))


def test_a_tie_with_one_wrong_answer_counts_half() -> None:
    images = torch.eye(3)[[0, 0, 1]]  # the first two pictures are the same
    recall = retrieval_recall(images, torch.eye(3)[[0, 1]], [0, 2], (1, 2))
    assert recall.text_to_image == {1: 0.75, 2: 1.0}
    assert recall.image_to_text == {1: 1.0, 2: 1.0}


def test_more_answers_wanted_than_there_are() -> None:
    recall = retrieval_recall(torch.eye(2), torch.eye(2), [1, 0], (1, 10))
    assert recall.text_to_image == {1: 0.0, 10: 1.0}
    assert recall.as_dict() == {
        "image_to_text_recall_at_1": 0.0,
        "image_to_text_recall_at_10": 1.0,
        "text_to_image_recall_at_1": 0.0,
        "text_to_image_recall_at_10": 1.0,
    }


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"image_embeds": torch.ones(3)}, "must be a matrix"),
        ({"image_embeds": torch.ones(0, 2)}, "must be a matrix"),
        ({"text_embeds": torch.ones(3, 5)}, "cannot be compared"),
        ({"text_embeds": torch.tensor([[1.0, torch.nan]] * 3)}, "NaN"),
        ({"image_of_text": [0, 1]}, "3 whole numbers"),
        ({"image_of_text": [0, 1, 3]}, "from 0 to 3, but there are 3 images"),
        ({"image_of_text": [0.0, 1.0, 2.0]}, "whole numbers"),
        ({"ks": ()}, "at least 1"),
        ({"ks": (0,)}, "at least 1"),
        ({"chunk_size": 0}, "at least 1"),
    ],
)
def test_recall_says_what_cannot_be(changed: dict, said: str) -> None:
    arguments = {"image_embeds": torch.ones(3, 2), "text_embeds": torch.ones(3, 2), "image_of_text": [0, 1, 2]}
    with pytest.raises(ValueError, match=said):
        retrieval_recall(**{**arguments, **changed})


def _accuracy(truth: list[int], predicted: list[list[int]], labels: str) -> ZeroShotAccuracy:
    return ZeroShotAccuracy(tuple(labels), torch.tensor(truth), torch.tensor(predicted))


def test_the_interval_holds_the_shares_that_the_pictures_do_not_speak_against() -> None:
    predicted = torch.tensor([[0, 1]] * 15 + [[1, 0]] * 9)
    accuracy = ZeroShotAccuracy(("a", "b"), torch.zeros(24).long(), predicted)
    low, high = accuracy.interval(1)
    assert (round(low, 4), round(high, 4)) == (0.4271, 0.7884)
    for share in (low, high):  # 15 of 24 is 1.96 standard deviations away from what such a share would give
        assert abs(0.625 - share) == pytest.approx(1.959964 * math.sqrt(share * (1 - share) / 24))
    assert accuracy.interval(2) == pytest.approx((0.8620, 1.0), abs=1e-4)  # all right, and still no certainty


def test_measures_of_labels() -> None:
    # Two pictures of a, both right; four of b, one right, two taken for c; one of c, taken for a. d has none.
    accuracy = _accuracy([0, 0, 1, 1, 1, 1, 2], [[0, 1], [0, 2], [1, 0], [2, 1], [2, 0], [0, 1], [0, 2]], "abcd")
    assert accuracy.top(1) == pytest.approx(3 / 7)
    assert accuracy.top(2) == pytest.approx(6 / 7)
    assert accuracy.mean_per_class == pytest.approx((1 + 1 / 4 + 0) / 3)
    assert accuracy.per_class() == [
        ClassAccuracy("c", 1, 0, "a", 1),
        ClassAccuracy("b", 4, 1, "c", 2),
        ClassAccuracy("a", 2, 2, None, 0),
    ]
    assert "top_5" not in accuracy.as_dict()


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_labels_are_those_of_the_sorted_matrix(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images, classes = torch.randn(40, 8, generator=generator), torch.randn(9, 8, generator=generator)
    truth = torch.randint(9, (40,), generator=generator)
    accuracy = zero_shot_accuracy(images, classes, truth, [f"class {i}" for i in range(9)], chunk_size=chunk_size)
    units = classes / classes.norm(dim=1, keepdim=True)
    assert accuracy.predicted.tolist() == (images @ units.T).argsort(dim=1, descending=True)[:, :5].tolist()
    assert accuracy.truth.tolist() == truth.tolist()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"class_embeds": torch.ones(1, 2), "labels": ["a"]}, "two or more"),
        ({"labels": ["a"]}, "2 classes with 1 labels"),
        ({"truth": [0, 1]}, "3 numbers of classes"),
        ({"truth": [0, 1, 2]}, "from 0 to 1"),
    ],
)
def test_labels_say_what_cannot_be(changed: dict, said: str) -> None:
    arguments = {
        "image_embeds": torch.ones(3, 2),
        "class_embeds": torch.eye(2),
        "truth": [0, 1, 1],
        "labels": ["a", "b"],
    }
    with pytest.raises(ValueError, match=said):
        zero_shot_accuracy(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("found", "given", "names", "numbers"),
    [
        (["dog", "light_bulb"], None, ["dog", "light bulb"], [0, 1]),
        (["light bulb", "light_bulb"], None, ["light bulb"], [0, 0]),
        (["Dog", "light_bulb"], ["cat", "light bulb", "dog"], ["cat", "light bulb", "dog"], [2, 1]),
        (["10", "2"], [f"line {i}" for i in range(11)], [f"line {i}" for i in range(11)], [10, 2]),
        (["7", "0"], ["0", "7"], ["0", "7"], [1, 0]),
        (["n02", "n01"], ["tench", "goldfish"], ["tench", "goldfish"], [1, 0]),
    ],
)
def test_names_of_classes(found: list, given: list | None, names: list, numbers: list) -> None:
    got_names, number_of = name_classes(found, given)
    assert (list(got_names), [number_of[label] for label in found]) == (names, numbers)


@pytest.mark.parametrize(
    ("found", "given", "said"),
    [
        (["0", "1"], None, "bare numbers"),
        (["0", "3"], ["a", "b"], "'0', '3'"),
        (["cat", "dog"], ["cat", "cow"], "1 of 2 classes are not among the 2 labels given, such as 'dog'"),
    ],
)
def test_classes_that_cannot_be_named(found: list, given: list | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        name_classes(found, given)


def test_sets_of_templates() -> None:
    assert {name: len(set(template_set(name))) for name in TEMPLATE_SETS} == {
        "default": 1,
        "label": 1,
        "photo": 1,
        "imagenet": 80,
        "imagenet7": 7,
        "cifar": 18,
    }
    assert set(template_set("imagenet7")) < set(template_set("imagenet"))
    assert template_set("cifar")[10] == "a blurry photo of the {}."
    for templates in TEMPLATE_SETS.values():
        assert parse_templates(templates) == templates
    with pytest.raises(ValueError, match="no set of templates 'imagnet'; there are default"):
        template_set("imagnet")


@pytest.fixture(scope="module")
def embedder() -> SiglipEmbedder:
    return SiglipEmbedder(device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def by_hand() -> Callable[[list[str], list[str]], np.ndarray]:
    """Cosines of pictures and texts, with the model and processor alone."""
    folder = siglip_hf.default_checkpoint()
    model = siglip_hf.SiglipModel.from_pretrained(folder).eval()
    processor = siglip_hf.SiglipProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def embed(pictures: list[str], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        inputs = processor(images=pictures, text=texts, return_tensors="pt")
        images, words = model.encode_image(inputs["pixel_values"]), model.encode_text(inputs["input_ids"])
        return images.double().numpy(), words.double().numpy()

    return embed


TRUTH = dict(list(read_truth_file(PICTURES / "labels.json").items())[:9])
FILES = [str(PICTURES / name) for name in TRUTH]


def labelled() -> Source:
    return with_truth(open_source(FILES), TRUTH)


def test_accuracy_of_the_embedded_checkpoint_is_that_of_plain_numpy(embedder, by_hand) -> None:
    templates = template_set("imagenet7")[:2]
    found = evaluate(embedder, labelled(), templates=templates)
    assert found.retrieval is None
    assert (found.pictures, found.skipped, found.unused) == (9, [], [])
    labels = sorted(TRUTH.values())
    images, texts = by_hand(FILES, [t.format(c) for c in labels for t in templates])
    classes = texts.reshape(9, 2, -1).mean(1)
    cosines = images @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T
    best = np.argsort(-cosines, axis=1)
    truth = np.array([labels.index(label) for label in TRUTH.values()])
    assert found.zero_shot.top(1) == pytest.approx((best[:, 0] == truth).mean())
    assert found.zero_shot.top(5) == pytest.approx((best[:, :5] == truth[:, None]).any(1).mean())
    assert found.zero_shot.top(1) > 0.5
    wrong = {labels[t]: labels[b] for t, b in zip(truth, best[:, 0], strict=True) if t != b}
    assert {row.label: row.confused_with for row in found.zero_shot.per_class() if row.confused_with} == wrong


def _captions(label: str) -> list[str]:
    return [f"a drawing of a {label}", f"{label} icon"]


def _expected_recall(by_hand, names: list[str], k: int) -> tuple[float, float]:
    texts = [caption for name in names for caption in _captions(TRUTH[name])]
    images, words = by_hand([str(PICTURES / name) for name in names], texts)
    return _dense_recall(images, words, np.repeat(np.arange(len(names)), 2), k)


def test_recall_of_a_table_with_a_row_for_each_caption(embedder, by_hand, tmp_path) -> None:
    rows = [(PICTURES / name, caption) for name, label in TRUTH.items() for caption in _captions(label)]
    rows.insert(3, (tmp_path / "missing.png", "nothing"))
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *(f"{path},{text}" for path, text in rows)]))
    found = evaluate(embedder, open_source(tmp_path / "pairs.csv"))
    assert found.zero_shot is None
    assert (found.retrieval.images, found.retrieval.texts, found.pictures) == (9, 18, 9)
    assert len(found.skipped) == 1
    assert "missing.png" in found.skipped[0]
    for k in (1, 5):
        expected = _expected_recall(by_hand, list(TRUTH), k)
        assert (found.retrieval.image_to_text[k], found.retrieval.text_to_image[k]) == pytest.approx(expected)


def _write_tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.add(PICTURES / name, arcname=name)
            for ending, content in (("txt", "\n".join(_captions(TRUTH[name]))), ("cls", str(list(TRUTH).index(name)))):
                member = tarfile.TarInfo(f"{Path(name).stem}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content.encode()))


def test_labels_and_captions_of_tar_shards(embedder, by_hand, tmp_path) -> None:
    names = list(TRUTH)
    _write_tar(tmp_path / "00.tar", names[:4])
    _write_tar(tmp_path / "01.tar", names[4:])
    found = evaluate(embedder, open_source(str(tmp_path / "*.tar")), labels=list(TRUTH.values()))
    assert found.retrieval.as_dict()["image_to_text_recall_at_5"] == pytest.approx(
        _expected_recall(by_hand, names, 5)[0]
    )
    folder = evaluate(embedder, labelled())
    assert found.zero_shot.top(1) == folder.zero_shot.top(1)
    assert found.zero_shot.mean_per_class == folder.zero_shot.mean_per_class


def test_parquet_and_a_dataset_that_holds_its_pictures(embedder, tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    names = list(TRUTH)[:6]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=sorted(TRUTH[name] for name in names))
    )
    rows = {"image": [str(PICTURES / name) for name in names], "label": [TRUTH[name] for name in names]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "six.parquet")
    expected = None
    for place in (data, tmp_path / "six.parquet"):
        found = evaluate(embedder, open_source(place)).as_dict()
        assert [row["label"] for row in found["zero_shot"]["classes"]] != []
        expected = expected or found
        assert found == expected
    folder = tmp_path / "folders"
    for name in names:
        (folder / TRUTH[name].replace(" ", "_")).mkdir(parents=True)
        shutil.copy(PICTURES / name, folder / TRUTH[name].replace(" ", "_"))
    assert evaluate(embedder, open_source(folder)).as_dict()["zero_shot"] == expected["zero_shot"]


def test_broken_pictures_and_bare_entries_cost_only_themselves(embedder, tmp_path) -> None:
    for name in ("cat.png", "dog.png", "key.png"):
        (tmp_path / Path(name).stem).mkdir()
        shutil.copy(PICTURES / name, tmp_path / Path(name).stem)
    (tmp_path / "cat" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "key" / "empty.png").touch()
    shutil.copy(PICTURES / "house.png", tmp_path)
    found = evaluate(embedder, open_source(tmp_path))
    assert found.pictures == 3
    assert [line.split(":")[0] for line in found.skipped] == ["cat/broken.png", "key/empty.png"]
    assert found.unused == ["house.png: no label"]
    assert {row.label: row.pictures for row in found.zero_shot.per_class()} == {"cat": 1, "dog": 1, "key": 1}


def test_what_can_be_measured_is_found_out(embedder, tmp_path) -> None:
    for name in ("cat.png", "dog.png"):
        (tmp_path / "all").mkdir(exist_ok=True)
        shutil.copy(PICTURES / name, tmp_path / "all")
        (tmp_path / "all" / name).with_suffix(".txt").write_text(f"a {TRUTH[name]}")
    found = evaluate(embedder, open_source(tmp_path))
    assert found.zero_shot is None  # one folder around all pictures is no class
    assert found.retrieval.texts == 2
    with pytest.raises(ValueError, match="one class only, 'all'"):
        evaluate(embedder, open_source(tmp_path), task="classify")
    with pytest.raises(ValueError, match="none of 9 entries has a caption"):
        evaluate(embedder, open_source(FILES), task="retrieve")
    with pytest.raises(ValueError, match=r"none of 9 pictures has a label or a caption .* \(--truth on"):
        evaluate(embedder, open_source(FILES))
    with pytest.raises(ValueError, match="task='rank' is unknown"):
        evaluate(embedder, open_source(tmp_path), task="rank")


def test_all_pictures_broken_is_an_error(embedder, tmp_path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"none of 2 pictures can be read; the first: a/x\.png"):
        evaluate(embedder, open_source(tmp_path))


def test_a_naflex_model(tmp_path) -> None:
    write_naflex(tmp_path / "model")
    classifier = load_classifier(str(tmp_path / "model"), "cpu")
    embedder = SiglipEmbedder(tmp_path / "model", device="cpu", dtype="float32", batch_size=10, workers=2)
    found = evaluate(embedder, labelled())
    scored = classifier(FILES, sorted(TRUTH.values()), named_scores=True)
    pipe = [rows[0]["label"] for rows in scored]
    given = [found.zero_shot.labels[number] for number in found.zero_shot.predicted[:, 0].tolist()]
    assert given == pipe


def test_progress_counts_up_to_all(embedder) -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate(
        embedder,
        labelled(),
        on_progress=lambda *state: seen.append(state),
    )
    steps = [(4, 9), (8, 9), (9, 9)]
    assert seen == [(what, *step) for what in ("labels", "pictures") for step in steps]


def test_the_confusion_picture(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    count = MAX_CLASSES + 5
    labels = tuple(f"class {i}" for i in range(count))
    predicted = [[(i + 1) % count if i < MAX_CLASSES else i] for i in range(count)]
    for accuracy, name in (
        (ZeroShotAccuracy(labels, torch.arange(count), torch.tensor(predicted)), "many.png"),
        (_accuracy([0, 1], [[0, 1], [0, 1]], "ab"), "few.png"),
    ):
        check_picture_file(tmp_path / name)
        draw_confusion(accuracy, tmp_path / name)
        with Image.open(tmp_path / name) as picture:
            assert picture.convert("L").getextrema()[0] < 60  # the darkest blue of a full cell
    for path, said in ((tmp_path / "x.docx", "no picture format"), (tmp_path / "no" / "x.png", "no folder")):
        with pytest.raises(ValueError, match=said):
            check_picture_file(path)
