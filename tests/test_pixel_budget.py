"""Large pictures wait for each other: how many pixels lie decoded is bounded over all threads and readers."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import siglip_hf
from siglip_hf import (
    Siglip2ImageProcessor,
    Siglip2ImageProcessorFast,
    SiglipImageProcessor,
    SiglipImageProcessorFast,
    parallel,
)
from siglip_hf.apps import page
from siglip_hf.apps.search import read_hit
from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.data.sources import Record, Source
from siglip_hf.evaluation import verify, verify_side
from siglip_hf.inference.classify import classify_files, load_classifier
from siglip_hf.inference.contact_sheet import card_picture
from siglip_hf.parallel import PIXELS, PixelBudget
from siglip_hf.preprocessing import image_intake
from siglip_hf.preprocessing.image_intake import PictureError, load_picture
from siglip_hf.training import PairCollator
from siglip_hf.training.collator import PictureCollator
from siglip_hf.training.pairs import Draw


@pytest.fixture
def budget(monkeypatch):
    """A budget of 3 pictures of 400 pixels, of which none is too small to count; it notes how many were held."""
    monkeypatch.setattr(parallel, "SMALL_PIXELS", 1)
    monkeypatch.setattr(PIXELS, "limit", 1200)
    monkeypatch.setattr(parallel, "usable_cores", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    held = []
    load = image_intake._load
    monkeypatch.setattr(image_intake, "_load", lambda image: (held.append(PIXELS._held), load(image))[1])
    return held


def test_few_wait_for_none_and_many_for_each_other():
    budget, most, held, lock = PixelBudget(30_000_000), [], 0, threading.Lock()

    def work(pixels: int) -> int:
        nonlocal held
        with budget.bounded():
            budget.hold(pixels)
            with lock:
                held += pixels
                most.append(held)
            with lock:
                held -= pixels
        return pixels

    sizes = [10_000_000, 3_000_000, 25_000_000, 90_000_000] * 25
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, sizes)) == sizes
    assert max(most) == 90_000_000  # alone: with another one it would be more
    assert budget._held == 0


def test_a_thread_that_holds_one_does_not_wait():
    budget = PixelBudget(10_000_000)
    with budget.bounded():
        budget.hold(9_000_000)
        with budget.bounded():
            budget.hold(9_000_000)  # would wait forever
        assert budget._held == 18_000_000
        budget.release()
        assert budget._held == 0
    budget.hold(9_000_000)  # outside of a block nothing is counted
    assert budget._held == 0


def test_an_error_gives_back_what_was_held():
    budget = PixelBudget(10_000_000)

    @budget.bounded()
    def decode():
        budget.hold(9_000_000)
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        decode()
    assert budget._held == 0


def files(folder, count=12):
    paths = []
    for i in range(count):
        paths.append(str(folder / f"{i}.png"))
        Image.fromarray(np.full((20, 20, 3), i * 20, np.uint8)).save(paths[-1])
    return paths


@pytest.mark.parametrize(
    "processor_class",
    [SiglipImageProcessor, SiglipImageProcessorFast, Siglip2ImageProcessor, Siglip2ImageProcessorFast],
)
def test_image_processors_hold_few(processor_class, tmp_path, budget):
    paths = files(tmp_path)
    expected = [processor_class()([path], return_tensors="np").pixel_values[0] for path in paths]
    budget.clear()
    got = processor_class()(paths, return_tensors="np").pixel_values
    np.testing.assert_array_equal(got, expected)
    assert len(budget) == len(paths)
    assert 0 < max(budget) <= 1200
    assert PIXELS._held == 0


def test_classify_and_embed_hold_few(tmp_path, budget):
    paths = files(tmp_path)
    checkpoint = siglip_hf.default_checkpoint()
    classified = classify_files(load_classifier(checkpoint, device="cpu"), [*paths, "missing.png"], "a cat, a dog")
    assert [bool(entry.labels) for entry in classified] == [True] * len(paths) + [False]
    assert 0 < max(budget) <= 1200
    budget.clear()
    assert SiglipEmbedder(checkpoint, device="cpu", fast=False, workers=8).embed_images(paths).shape[0] == len(paths)
    assert 0 < max(budget) <= 1200
    assert PIXELS._held == 0


@pytest.mark.parametrize("checkpoint", [siglip_hf.default_checkpoint, siglip_hf.naflex_checkpoint])
@pytest.mark.parametrize("augment", [[], ["crop", "flip", "color"]])
def test_training_and_evaluation_hold_few(checkpoint, augment, tmp_path, budget):
    paths = files(tmp_path)
    source = Source("test", [Record(path, path, ("a cat",)) for path in [*paths, "missing.png"]])
    processor = siglip_hf.SiglipProcessor.from_pretrained(checkpoint())
    collate = PairCollator(processor, source, augment=augment)
    alone = [collate([Draw(record, number)]) for number, record in enumerate(source)]
    budget.clear()
    batch = collate([Draw(record, number) for number, record in enumerate(source)])
    assert 0 < max(budget) <= 400, "a picture is made small before the next one is decoded"
    for name in ("pixel_values", "input_ids", "picture_keys"):
        assert torch.equal(batch[name], torch.cat([one[name] for one in alone]))
    assert [name for name, _ in batch["broken"]] == ["missing.png"]
    budget.clear()
    batch = PictureCollator(processor)(list(enumerate(source)))
    assert 0 < max(budget) <= 400
    assert batch["readable"].tolist() == [True] * len(paths) + [False]
    assert len(batch["pixel_values"]) == len(source)
    assert PIXELS._held == 0


def test_a_very_large_picture_is_reduced_before_it_is_augmented(tmp_path, monkeypatch):
    monkeypatch.setattr("siglip_hf.training.collator.LARGE_PIXELS", 1000)
    (path,) = files(tmp_path, 1)
    Image.new("RGB", (1024, 1030), "red").save(path)
    sizes = []
    monkeypatch.setattr(
        "siglip_hf.training.collator.augmented", lambda picture, *rest: sizes.append(picture.size) or picture
    )
    processor = siglip_hf.SiglipProcessor.from_pretrained(siglip_hf.default_checkpoint())
    source = Source("test", [Record("a", path, ("a cat",))])
    for augment in ([], ["flip"]):
        PairCollator(processor, source, augment=augment)([Draw(source[0], 0)])
    assert sizes == [(1024, 1030), (256, 258)], "4 times the 64 pixels of the tower"


def test_sheets_and_pages_keep_pictures_small(tmp_path, budget):
    (path,) = files(tmp_path, 1)
    Image.new("RGB", (3000, 1000), "red").save(path)
    assert card_picture(path).size == (200, 67)
    assert read_hit(path).size == (2048, 683)
    assert read_hit(path, 100).size == (100, 33)
    assert budget == [3_000_000] * 3
    assert PIXELS._held == 0


def test_a_very_large_picture_of_a_result_is_never_in_memory_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(image_intake, "LARGE_PIXELS", 1000)
    made = []
    new = Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *rest: (made.append(size), new(mode, size, *rest))[1])
    Image.fromarray(np.full((1300, 1300, 4), 99, np.uint8)).save(tmp_path / "a.png")
    assert read_hit(str(tmp_path / "a.png"), 200).size == (200, 200)
    assert (217, 217) in made, "6 times smaller while it is converted, strip by strip"
    assert (1300, 1300) not in made


def test_visitors_of_pages_decode_in_few_threads(tmp_path, monkeypatch):
    (path,) = files(tmp_path, 1)
    threads = set()
    load = page.load_picture
    monkeypatch.setattr(page, "load_picture", lambda file: (threads.add(threading.get_ident()), load(file))[1])
    monkeypatch.setattr("siglip_hf.apps.search.load_picture", lambda file, **rest: page.load_picture(file))
    visitors = [threading.Thread(target=read, args=(path,)) for read in (page.read_upload, read_hit) * 8]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert 1 <= len(threads) <= page.DECODERS
    assert not threads & {visitor.ident for visitor in visitors}


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_verify_reduces_a_very_large_picture(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(verify, "_LARGEST_SIDE", 16)
    Image.new(mode, (193, 130), "red").save(tmp_path / "a.png")
    assert verify._picture(str(tmp_path / "a.png")).size == (193, 130)
    monkeypatch.setattr(image_intake, "LARGE_PIXELS", 10_000)
    small = verify._picture(str(tmp_path / "a.png"))
    assert (small.mode, small.size) == ("RGB", (97, 65)), "4 times the side of the tower at least"


def test_verify_takes_large_pictures_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(verify_side, "HELD_PIXELS", 1000)
    paths = files(tmp_path, 6)
    assert verify_side.few_pixels(paths) == [paths[:2], paths[2:4], paths[4:]]
    monkeypatch.setattr(verify_side, "HELD_PIXELS", 399)
    assert verify_side.few_pixels(paths) == [[path] for path in paths]


def test_the_largest_picture_can_be_chosen(tmp_path, monkeypatch):
    (path,) = files(tmp_path, 1)
    monkeypatch.setattr(PIXELS, "largest", 399)
    with pytest.raises(PictureError, match="400 pixels, more than the 399 that were allowed"):
        load_picture(path)


def encoded(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def noise(mode: str) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (61, 47, 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "RGB"])
def test_conversion_in_strips_is_the_same(mode, monkeypatch):
    image = noise(mode)
    if mode == "RGB":
        image.info["transparency"] = tuple(int(value) for value in np.asarray(image)[3, 4])
    whole = np.asarray(load_picture(image))
    monkeypatch.setattr(image_intake, "_STRIP_PIXELS", 200)
    np.testing.assert_array_equal(np.asarray(load_picture(image)), whole)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_would_lie_in_memory_twice_is_reduced(mode, orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.linear_gradient("L").resize((90, 120)).convert("RGBA")
    image.putalpha(Image.radial_gradient("L").resize((90, 120)))
    content = encoded(image.convert(mode), exif=exif)
    whole = load_picture(content, draft_to=4)
    monkeypatch.setattr(image_intake, "LARGE_PIXELS", 1000)
    monkeypatch.setattr(image_intake, "_STRIP_PIXELS", 700)
    reduced = load_picture(content, draft_to=4)
    costly = mode not in ("L", "RGB") or orientation == 6
    size = (18, 24) if costly else (90, 120)
    assert reduced.size == (size if orientation == 1 else size[::-1])
    assert (whole.size == reduced.size) == (not costly)
    small, expected = (np.asarray(each.resize((4, 4), Image.Resampling.BICUBIC), int) for each in (reduced, whole))
    assert np.abs(small - expected).max() <= 3
    assert load_picture(content).size == whole.size  # nobody said what it will be resized to
