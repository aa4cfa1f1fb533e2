"""The label bank: what it encodes, what it remembers, what makes it forget."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from siglip_hf.inference.label_bank import LabelBank, parse_labels, parse_templates

LENGTH, WIDTH = 8, 6


class Tokenizer:
    """One id per letter; records what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts, return_tensors, padding, max_length, truncation):
        assert return_tensors == "pt"
        self.calls.append((tuple(texts), padding, max_length))
        ids = [[ord(letter) % 64 for letter in text][:max_length] for text in texts]
        longest = max_length if padding == "max_length" else max(map(len, ids))
        return {"input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in ids])}


class Model(nn.Module):
    """A text tower that depends on every id, its place and the padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text_model = nn.ModuleDict({"embed": nn.Embedding(64, WIDTH), "mix": nn.Linear(WIDTH, WIDTH)})
        self.config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=64))
        self.device = torch.device("cpu")

    def encode_text(self, input_ids):
        places = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        features = self.text_model["embed"](input_ids) * places.sqrt().to(self.text_model["embed"].weight.dtype)
        return nn.functional.normalize(self.text_model["mix"](features.mean(dim=1)), dim=-1)


@pytest.fixture
def bank():
    return LabelBank(Model(), Tokenizer())


def direct(bank, texts, **options):
    options = {"padding": "max_length", "truncation": True, "max_length": 64, **options}
    with torch.no_grad():
        return bank.model.encode_text(bank.tokenizer(texts, return_tensors="pt", **options)["input_ids"]).float()


def test_rows_equal_a_direct_encoding_and_are_made_once(bank):
    labels, templates = ["cat", "dog", "a bird"], ["a photo of {}."]
    expected = direct(bank, ["a photo of cat.", "a photo of dog.", "a photo of a bird."])
    first = bank.class_embeddings(labels, templates)
    torch.testing.assert_close(first, expected, atol=1e-6, rtol=0)
    assert (bank.texts_encoded, len(bank)) == (3, 3)

    # Other order, fewer labels, one new label: only the new one costs a text.
    torch.testing.assert_close(bank.class_embeddings(["a bird", "cat"], templates), expected[[2, 0]], atol=0, rtol=0)
    assert bank.texts_encoded == 3
    bank.class_embeddings(["fish", "cat"], templates)
    assert bank.texts_encoded == 4
    assert bank.tokenizer.calls[-1][0] == ("a photo of fish.",)


def test_same_question_gives_the_same_tensor(bank):
    assert bank.class_embeddings(["x"], ["{}"]) is bank.class_embeddings(["x"], ["{}"])


def test_template_and_tokenizer_arguments_are_part_of_the_key(bank):
    rows = [
        bank.class_embeddings(["cat"], ["{}"]),
        bank.class_embeddings(["cat"], ["a {}"]),
        bank.class_embeddings(["cat"], ["{}"], {"max_length": LENGTH}),
    ]
    assert bank.texts_encoded == 3
    assert not any(torch.allclose(rows[i], rows[j], atol=1e-3) for i, j in ((0, 1), (0, 2), (1, 2)))
    torch.testing.assert_close(rows[2], direct(bank, ["cat"], max_length=LENGTH), atol=1e-6, rtol=0)


def test_several_templates_average_to_one_normalized_embedding(bank):
    templates = ["a {}", "the {}", "{}"]
    embeds = bank.class_embeddings(["cat", "dog"], templates)
    mean = torch.stack([direct(bank, [t.format(label) for t in templates]).mean(0) for label in ("cat", "dog")])
    torch.testing.assert_close(embeds, mean / mean.norm(dim=-1, keepdim=True), atol=1e-6, rtol=0)
    assert bank.texts_encoded == 6
    assert len(bank) == 2


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 100])
def test_chunks_bound_the_forward_and_do_not_change_the_result(chunk_size):
    bank = LabelBank(Model(), Tokenizer(), chunk_size=chunk_size)
    labels = [f"label {i}" for i in range(11)]
    embeds = bank.class_embeddings(labels, ["{}", "a {}"])
    assert max(len(texts) for texts, _, _ in bank.tokenizer.calls) <= chunk_size
    reference = LabelBank(Model(), Tokenizer(), chunk_size=1000).class_embeddings(labels, ["{}", "a {}"])
    torch.testing.assert_close(embeds, reference, atol=1e-6, rtol=0)


def test_memory_is_bounded_and_the_least_recently_used_row_goes_first():
    row_bytes = WIDTH * 4
    bank = LabelBank(Model(), Tokenizer(), max_bytes=3 * row_bytes)
    bank.class_embeddings(["a", "b", "c"], ["{}"])
    bank.class_embeddings(["a"], ["{}"])  # b is now the oldest
    bank.class_embeddings(["d"], ["{}"])
    assert (bank.texts_encoded, len(bank)) == (4, 3)
    bank.class_embeddings(["c", "a"], ["{}"])
    assert bank.texts_encoded == 4
    bank.class_embeddings(["b"], ["{}"])
    assert bank.texts_encoded == 5

    many = [f"label {i}" for i in range(10)]  # more than fits: right all the same
    torch.testing.assert_close(bank.class_embeddings(many, ["{}"]), direct(bank, many), atol=1e-6, rtol=0)
    assert len(bank) == 3


def test_rows_do_not_keep_their_chunk_alive(bank):
    bank.class_embeddings([f"label {i}" for i in range(10)], ["{}"])
    assert {row.untyped_storage().nbytes() for row in bank._rows.values()} == {WIDTH * 4}


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.encode_text(torch.ones(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()


def replace_weight(model):
    model.text_model["mix"].weight = nn.Parameter(torch.eye(WIDTH))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
        lambda model: model.to(torch.bfloat16),
        optimizer_step,
        replace_weight,
    ],
    ids=["load_state_dict", "dtype", "optimizer step", "new parameter"],
)
def test_changed_weights_are_noticed(bank, change):
    before = bank.class_embeddings(["cat"], ["{}"])
    change(bank.model)
    after = bank.class_embeddings(["cat"], ["{}"])
    assert bank.texts_encoded == 2
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, direct(bank, ["cat"]), atol=1e-6, rtol=0)


def test_clear_forgets_what_autograd_cannot_see(bank):
    bank.class_embeddings(["cat"], ["{}"])
    bank.model.text_model["mix"].weight.data.mul_(-1)
    bank.clear()
    torch.testing.assert_close(bank.class_embeddings(["cat"], ["{}"]), direct(bank, ["cat"]), atol=1e-6, rtol=0)


def test_padding_to_the_longest_is_obeyed_and_never_mixed_between_questions(bank):
    options = {"padding": "longest"}
    short = bank.class_embeddings(["cat"], ["{}"], options)
    torch.testing.assert_close(short, direct(bank, ["cat"], padding="longest"), atol=1e-6, rtol=0)
    both = bank.class_embeddings(["cat", "rhinoceros"], ["{}"], options)
    torch.testing.assert_close(both, direct(bank, ["cat", "rhinoceros"], padding="longest"), atol=1e-6, rtol=0)
    assert not torch.allclose(short[0], both[0], atol=1e-3)
    assert bank.class_embeddings(["cat", "rhinoceros"], ["{}"], options) is both


def test_no_gradient_is_kept(bank):
    assert not bank.class_embeddings(["cat"], ["{}"]).requires_grad


@pytest.mark.parametrize("options", [{"max_bytes": -1}, {"chunk_size": 0}])
def test_impossible_bounds_are_refused(options):
    (value,) = options.values()
    with pytest.raises(ValueError, match=str(value)):
        LabelBank(Model(), Tokenizer(), **options)


def test_labels_as_text_or_list():
    assert parse_labels("cat, dog") == ("cat", "dog")
    assert parse_labels(" a red cat ,dog,, ") == ("a red cat", "dog")
    assert parse_labels("cat") == ("cat",)
    assert parse_labels(["a, b", "c"]) == ("a, b", "c")
    assert parse_labels(label for label in ("x", "y", "x")) == ("x", "y")
    assert [type(label) for label in parse_labels(np.array(["x", "y"]))] == [str, str]


@pytest.mark.parametrize("labels", [[], "", " , ", ["cat", ""], ["cat", "  "], ["cat", 3], [None], 5, b"cat"])
def test_what_is_no_label_is_refused(labels):
    with pytest.raises(ValueError, match="candidate_labels"):
        parse_labels(labels)


def test_templates():
    assert parse_templates("a {}") == ("a {}",)
    assert parse_templates(["a {}", "{0}!", "a {}"]) == ("a {}", "{0}!")
    assert parse_templates("first line\n{}") == ("first line\n{}",)


NO_TEMPLATES = [
    *("a photo", "", "{} and {}", "{1}", "{label}", "{", "}", "{{}}", "{{x}} {}", "{} }", "{ }", "{00}", 3, []),
    *("{:>50000000}", "{.__class__}", "{.foo}", "{[a]}", "{0[a]}", "{!r}", "{!r:>9}", "{:{}}", ["a {}", "b"]),
]


@pytest.mark.parametrize("template", NO_TEMPLATES)
def test_a_template_without_one_place_is_refused(bank, template):
    with pytest.raises(ValueError, match="template"):
        parse_templates(template)
    with pytest.raises(ValueError, match="template"):
        bank.class_embeddings(["cat"], template)
    assert bank.texts_encoded == 0


def test_a_long_template_is_not_repeated_in_its_error():
    with pytest.raises(ValueError, match="no single") as caught:
        parse_templates("x" * 1_000_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("half", ["\ud800", "a \udcff {}"])
def test_half_a_character_is_refused_with_the_text(half):
    with pytest.raises(ValueError, match="cannot be a label: the character at place"):
        parse_labels(["cat", half])
    with pytest.raises(ValueError, match="cannot be a template: the character at place"):
        parse_templates(half.replace(" {}", "") + "{}")


def test_threads_that_share_a_bank_get_their_own_answers_and_encode_each_label_once(bank):
    labels = [f"label {i}" for i in range(40)]
    expected = direct(bank, labels)
    encode, meet = bank.model.encode_text, threading.Barrier(8, timeout=30)

    def slow(input_ids):
        time.sleep(0.001)  # lets another thread in between the question and the answer
        return encode(input_ids)

    bank.model.encode_text = slow
    bank.max_bytes = 10**6

    def ask(thread):
        meet.wait()
        for start in range(0, 40, 4):
            places = [(start + thread * 4 + i) % 40 for i in range(4)]
            rows = bank.class_embeddings([labels[i] for i in places], ["{}"])
            torch.testing.assert_close(rows, expected[places], atol=1e-6, rtol=0)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    assert bank.texts_encoded == len(bank) == 40


def test_a_bank_can_be_copied(bank):
    rows = bank.class_embeddings(["cat"], ["{}"])
    other = copy.deepcopy(bank)
    torch.testing.assert_close(other.class_embeddings(["cat"], ["{}"]), rows, atol=0, rtol=0)
    other.clear()
    assert (len(other), len(bank)) == (0, 1)


def test_underscores_of_a_label_are_spaces(bank):
    joined, spaced = ((name,) for name in ("hot_air_balloon", "hot air balloon"))
    templates = ("a photo of {}.", "my_{}")
    torch.testing.assert_close(
        bank.class_embeddings(joined, templates), bank.class_embeddings(spaced, templates), rtol=0, atol=0
    )
