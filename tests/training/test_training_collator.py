"""Batches out of records: the choice of captions, augmentation, broken pictures, and what makes two pairs alike."""

import random

import pytest
import torch
from PIL import Image

import siglip_hf
from siglip_hf.data.shards import TarMember
from siglip_hf.data.sources import Record, Source
from siglip_hf.training import PairCollator
from siglip_hf.training.collator import PictureCollator, augmented
from siglip_hf.training.pairs import Draw, picture_key, training_pairs
from tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    return siglip_hf.SiglipProcessor.from_pretrained(folder)


@pytest.fixture
def source(tmp_path):
    """Four pictures of one colour, the second broken, the third labelled only."""
    for name, color in (("a", "red"), ("b", "green"), ("c", "blue"), ("d", "white")):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    records = [
        Record("a", str(tmp_path / "a.png"), ("a red cat", "a small red cat", "the cat")),
        Record("b", str(tmp_path / "b.png"), ("a green dog",)),
        Record("c", str(tmp_path / "c.png"), (), "bird"),
        Record("d", str(tmp_path / "d.png"), ("a house",)),
    ]
    return Source("test", records)


def draws(source, places, start=0):
    return [Draw(source[place], start + number) for number, place in enumerate(places)]


def text_of(processor, row):
    return processor.tokenizer.decode(row, skip_special_tokens=True)


def test_a_batch_holds_what_the_processor_makes(processor, source):
    batch = PairCollator(processor, source, captions="first")(draws(source, [0, 2, 3]))
    expected = processor(
        images=[source[place].image for place in (0, 2, 3)],
        text=["a red cat", "This is a photo of bird.", "a house"],
        return_tensors="pt",
    )
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert batch["broken"] == []


def test_captions_are_chosen_anew_at_each_draw_and_the_same_when_drawn_again(processor, source):
    collate = PairCollator(processor, source, seed=5)
    rows = [collate(draws(source, [0], start=number))["input_ids"] for number in range(30)]
    chosen = [text_of(processor, row[0]) for row in rows]
    assert set(chosen) == {"a red cat", "a small red cat", "the cat"}
    again = PairCollator(processor, source, seed=5)
    # In another order and in one batch, as with other processes and workers.
    batch = again([Draw(source[0], number) for number in reversed(range(30))])
    assert [text_of(processor, row) for row in batch["input_ids"]] == chosen[::-1]
    other = PairCollator(processor, source, seed=6)(draws(source, [0] * 30))
    assert [text_of(processor, row) for row in other["input_ids"]] != chosen


def test_a_broken_picture_is_replaced_by_another_pair_and_named(processor, source):
    collate = PairCollator(processor, source, seed=1)
    batch = collate(draws(source, [1, 0]))
    assert len(batch["pixel_values"]) == 2
    assert {name for name, _ in batch["broken"]} == {"b"}
    assert "not a picture" in batch["broken"][0][1]
    assert batch["picture_keys"][0].item() in {picture_key(source[place]) for place in (0, 2, 3)}
    assert "green" not in text_of(processor, batch["input_ids"][0])
    assert torch.equal(collate(draws(source, [1, 0]))["pixel_values"], batch["pixel_values"])


def test_only_broken_pictures_are_an_error(processor, source):
    broken = Source("all broken", [source[1]])
    with pytest.raises(ValueError, match="all broken: 100 pictures in a row could not be read, at last b: "):
        PairCollator(processor, broken)(draws(broken, [0]))


def test_keys_tell_equal_pictures_and_texts(processor, source):
    same = Record("another id", source[0].image, ("A RED cat.",))  # the tokenizer sees the same text
    records = [source[0], same, source[3], Record("e", "e.png", (), "bird"), source[2]]
    source = Source("keys", [*source.records, same])
    collate = PairCollator(processor, source, captions="first", templates=["a {}", "the {}"])
    batch = collate([Draw(record, number) for number, record in enumerate([records[0], records[1], records[2]])])
    pictures, texts = batch["picture_keys"].tolist(), batch["text_keys"].tolist()
    assert pictures[0] == pictures[1] != pictures[2]
    assert texts[0] == texts[1] != texts[2]
    # Two pictures of a class are alike whatever template each got.
    found = PairCollator(processor, source, templates=["a {}", "the {}"], seed=2)(draws(source, [2] * 6))
    assert len(set(found["text_keys"].tolist())) == 1
    assert len({tuple(row) for row in found["input_ids"].tolist()}) == 2
    assert picture_key(Record("x", TarMember("t.tar", 0, 5))) != picture_key(Record("x", TarMember("t.tar", 512, 5)))


def test_augmentation():
    picture = Image.linear_gradient("L").convert("RGB").rotate(90)  # darker on one side
    assert augmented(picture, (), random.Random(0)) is picture
    flipped = [augmented(picture, ("flip",), random.Random(seed)) for seed in range(40)]
    mirrored = sum(image.getpixel((0, 0)) != picture.getpixel((0, 0)) for image in flipped)
    assert 10 < mirrored < 30
    for seed in range(20):
        cropped = augmented(picture, ("crop",), random.Random(seed))
        assert 0.49 <= cropped.width * cropped.height / (256 * 256) <= 1
        assert 0.7 < cropped.width / cropped.height < 1.4
        colored = augmented(picture, ("color",), random.Random(seed))
        assert colored.size == picture.size
    assert colored.tobytes() != picture.tobytes()
    narrow = Image.new("RGB", (400, 2))
    assert augmented(narrow, ("crop",), random.Random(0)).width <= 400


def test_augmented_batches_are_reproducible(processor, source):
    collate = PairCollator(processor, source, augment=["crop", "flip", "color"])
    first, second = (collate(draws(source, [0, 0, 3]))["pixel_values"] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(collate(draws(source, [0, 0, 3], start=3))["pixel_values"], first)


def test_pictures_for_evaluation(processor, source):
    batch = PictureCollator(processor)(list(enumerate(source)))
    assert batch["places"].tolist() == [0, 1, 2, 3]
    assert batch["readable"].tolist() == [True, False, True, True]
    assert [name for name, _ in batch["broken"]] == ["b"]
    expected = processor(images=[source[0].image], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"][:1], expected)


def test_pairs_leave_out_what_has_no_picture_or_no_words(source):
    records = [
        *source,
        Record("text alone", None, ("a text",)),
        Record("no caption", "x.png"),
        Record("dots", "y.png", ("...", " ?! ")),
        Record("half", "z.png", ("---", "a moon")),
        Record("emoji", "e.png", ("🐱",)),
    ]
    pairs = training_pairs(Source("mixed", records, ["row 9: an empty row"]))
    assert [record.id for record in pairs] == ["a", "b", "c", "d", "half", "emoji"]
    assert pairs[4].captions == ("a moon",)
    assert pairs.unused == [
        "row 9: an empty row",
        "text alone: no picture",
        "no caption: no caption",
        "dots: a caption without words",
    ]


def test_data_without_pairs_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds a word"):
        training_pairs(Source("dots", [Record("a", "a.png", ("...",))]))
    with pytest.raises(ValueError, match="none of 1 entries has a picture and a caption"):
        training_pairs(Source("bare", [Record("a", "a.png")]))
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "1.png")
    with pytest.raises(ValueError, match="no pictures in dog"):
        training_pairs(tmp_path)


def test_options_that_are_not_known(processor, source):
    with pytest.raises(ValueError, match="augment=blur is not known; choose among crop, flip, color"):
        PairCollator(processor, source, augment=["blur"])
    with pytest.raises(ValueError, match="captions='all'"):
        PairCollator(processor, source, captions="all")
    with pytest.raises(ValueError, match="template"):
        PairCollator(processor, source, templates=["no place"])
