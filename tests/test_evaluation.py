import numpy as np
import pytest
import torch

from siglip_hf.evaluation import retrieval_recall


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
