"""datasets, pandas and numpy: their columns are texts or pictures, as lists are, and the wrong entry is named."""

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer, pipeline

import siglip_hf

FOLDERS = {"siglip": siglip_hf.default_checkpoint(), "siglip2": siglip_hf.naflex_checkpoint()}
TEXTS = ["a red cat", "Two Dogs", "house"]
IMAGES = [Image.new("RGB", (20 + 10 * i, 30), color) for i, color in enumerate(("red", "green", "blue"))]


@pytest.fixture(scope="module")
def dataset() -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    return datasets.Dataset.from_dict({"text": TEXTS, "image": IMAGES}, features=features)


def series_of(kind: str, dataset: datasets.Dataset):
    """The three texts in the way of a library."""
    return {
        "datasets column": lambda: dataset["text"],
        "datasets slice": lambda: dataset[:3]["text"],
        "pandas series": lambda: pd.Series(TEXTS, index=[7, 8, 9]),
        "pandas string series": lambda: pd.Series(TEXTS, dtype="string"),
        "pandas index": lambda: pd.Index(TEXTS),
        "numpy objects": lambda: np.array(TEXTS, dtype=object),
        "numpy strings": lambda: np.array(TEXTS),
        "tuple": lambda: tuple(TEXTS),
    }[kind]()


KINDS = [
    "datasets column",
    "datasets slice",
    "pandas series",
    "pandas string series",
    "pandas index",
    "numpy objects",
    "numpy strings",
    "tuple",
]


@pytest.mark.parametrize("family", FOLDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_texts(kind, family, dataset):
    processor = AutoProcessor.from_pretrained(FOLDERS[family])
    expected = processor(text=TEXTS, return_tensors="pt")["input_ids"]
    texts = series_of(kind, dataset)
    torch.testing.assert_close(processor(text=texts, return_tensors="pt")["input_ids"], expected, rtol=0, atol=0)
    torch.testing.assert_close(processor.tokenizer(texts, return_tensors="pt")["input_ids"], expected, rtol=0, atol=0)
    both = processor(images=IMAGES, text=texts, return_tensors="pt")
    torch.testing.assert_close(both["input_ids"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FOLDERS)
def test_a_column_of_pictures(family, dataset):
    processor = AutoProcessor.from_pretrained(FOLDERS[family])
    expected = processor(images=IMAGES, return_tensors="pt")
    for images in (dataset["image"], dataset[:3]["image"], pd.Series(IMAGES, index=[4, 5, 6])):
        for inputs in (
            processor(images=images, return_tensors="pt"),
            processor.image_processor(images, return_tensors="pt"),
        ):
            torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"], rtol=0, atol=0)


@pytest.mark.parametrize("family", FOLDERS)
@pytest.mark.parametrize("wrong", [float("nan"), None, 7, IMAGES[0]], ids=["nan", "None", "int", "picture"])
def test_a_wrong_text_is_named(family, wrong):
    processor = AutoProcessor.from_pretrained(FOLDERS[family])
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS[family])
    for texts in (["a", wrong, "b"], pd.Series(["a", wrong, "b"], dtype=object)):
        for call in (lambda t=texts: processor(text=t), lambda t=texts: tokenizer(t)):
            with pytest.raises((ValueError, TypeError), match=r"\b1\b") as caught:
                call()
            assert type(wrong).__name__ in str(caught.value)
            assert "picture 0" not in str(caught.value)
            assert "no such file" not in str(caught.value)


@pytest.mark.parametrize("family", FOLDERS)
def test_map_and_torch_format(family, dataset):
    """The usual preparation: `map` in batches, `set_format("torch")`, a DataLoader."""
    processor = AutoProcessor.from_pretrained(FOLDERS[family])
    prepared = dataset.map(
        lambda rows: processor(images=rows["image"], text=rows["text"]),
        batched=True,
        batch_size=2,
        remove_columns=dataset.column_names,
    ).with_format("torch")
    batch = next(iter(torch.utils.data.DataLoader(prepared, batch_size=3)))
    expected = processor(images=IMAGES, text=TEXTS, return_tensors="pt")
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(batch[key], value, rtol=0, atol=1e-6, check_dtype=False)
    model = AutoModel.from_pretrained(FOLDERS[family], dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch).logits_per_image, model(**expected).logits_per_image, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("family", FOLDERS)
def test_pipeline_over_a_dataset(family, dataset):
    """`KeyDataset` is what transformers' pipelines read a column with."""
    from transformers.pipelines.pt_utils import KeyDataset

    classify = pipeline("zero-shot-image-classification", model=FOLDERS[family], dtype=torch.float32)
    labels = ["red", "green", "blue"]
    expected = classify(IMAGES, candidate_labels=labels)
    for source in (KeyDataset(dataset, "image"), dataset["image"]):
        found = list(classify(source, candidate_labels=pd.Series(labels)))
        assert [[row["label"] for row in rows] for rows in found] == [
            [row["label"] for row in rows] for rows in expected
        ]
        scores = [[torch.tensor([row["score"] for row in rows]) for rows in result] for result in (found, expected)]
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-6)
