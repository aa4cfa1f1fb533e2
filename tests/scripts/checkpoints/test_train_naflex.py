"""The parts of train_naflex.py: the start from a square model, short texts, canvases, the vocabulary."""

import pytest
import torch

import siglip_hf
from recipe.canvas import CanvasAugmenter, plain_canvases, to_patches
from recipe.naflex_start import GRID, SHORT_LENGTH, TEXT_LENGTH, enlarged_positions, start_from
from recipe.naflex_vocabulary import Encoder, gemma_tokenizer
from recipe.pictures import PictureSet


@pytest.fixture(scope="module")
def square() -> siglip_hf.SiglipModel:
    return siglip_hf.SiglipModel.from_pretrained(siglip_hf.default_checkpoint(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def started(square) -> siglip_hf.Siglip2Model:
    torch.manual_seed(0)
    return start_from(square).eval()


def test_it_starts_as_good_as_the_square_model(square, started):
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(
            started.encode_image(**to_patches(pixels, 16)), square.encode_image(pixels), atol=1e-4, rtol=0
        )


def test_enlarged_positions_resize_to_the_learned_ones():
    table = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    larger = enlarged_positions(table, (4, 4), GRID)
    assert larger.shape == (GRID * GRID, 5)
    image = larger.view(1, GRID, GRID, 5).permute(0, 3, 1, 2)
    back = torch.nn.functional.interpolate(image, (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(back[0].flatten(1).T, table, atol=1e-4, rtol=0)


def test_short_texts_are_read_as_padded_ones(started):
    ids = torch.tensor([[7, 9, 11, 1], [5, 1, 0, 0]])
    short = torch.nn.functional.pad(ids, (0, SHORT_LENGTH - 4))
    whole = torch.nn.functional.pad(ids, (0, TEXT_LENGTH - 4))
    with torch.inference_mode():
        torch.testing.assert_close(started.finished().encode_text(whole), started.encode_text(short), atol=1e-5, rtol=0)


def test_patches_are_those_of_the_image_processor():
    pixels = torch.randint(0, 256, (1, 3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = siglip_hf.Siglip2ImageProcessor(do_resize=False)(pixels[0], max_num_patches=6, return_tensors="pt")
    actual = to_patches(pixels / 127.5 - 1, 16)
    torch.testing.assert_close(actual["pixel_values"], expected["pixel_values"], atol=1e-6, rtol=0)
    assert torch.equal(actual["spatial_shapes"], expected["spatial_shapes"])


def test_canvases_have_all_shapes_and_one_or_two_drawings():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.full((8, 4, 24, 24), 255, dtype=torch.uint8)
    pixels[:, :3] = torch.arange(8)[:, None, None, None] * 20
    pictures = PictureSet(pixels, torch.arange(8), torch.zeros(8, dtype=torch.bool))
    augment = CanvasAugmenter(8, generator)
    shapes, pairs = set(), 0
    for _ in range(60):
        batch = augment.batch(pictures, torch.arange(8), strength=0.0)
        rows, columns = batch.inputs["spatial_shapes"][0].tolist()
        shapes.add((rows, columns))
        values = batch.inputs["pixel_values"]
        assert values.shape == (8, rows * columns, 8 * 8 * 3)
        assert rows * columns <= 64
        assert values.abs().max() <= 1
        assert torch.equal(batch.first, torch.arange(8))
        for picture, (first, second) in enumerate(zip(batch.first.tolist(), batch.second.tolist(), strict=True)):
            levels = (values[picture] + 1) * 127.5
            for drawn in {first, second}:  # each is somewhere on the canvas, in its own grey
                assert (levels - 20 * drawn).abs().min() < 1
            pairs += first != second
    assert len(shapes) > 15
    assert min(rows / columns for rows, columns in shapes) < 1 / 3
    assert max(rows / columns for rows, columns in shapes) > 3
    assert pairs > 30


def test_plain_canvases_hold_the_picture_in_the_middle():
    black = torch.zeros(1, 4, 20, 20, dtype=torch.uint8)
    black[:, 3] = 255
    inputs = plain_canvases(black, (1, 3), 8)
    assert [patch.unique().tolist() for patch in inputs["pixel_values"][0]] == [[1.0], [-1.0], [1.0]]


def test_vocabulary_is_of_gemmas_kind(tmp_path):
    texts = ["a cat", "a dog", "ein hund", "un chat noir", "a cat and a dog"] * 3
    tokenizer = gemma_tokenizer(texts, 300)
    assert tokenizer.get_vocab_size() <= 300
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<0x00>"]
    assert [tokenizer.id_to_token(index) for index in range(6)] == first
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encode = Encoder(tmp_path / "tokenizer.json", 16)
    ids = encode(["A Cat", "고양이", "a cat " * 40])
    assert ids.shape == (3, 16)
    assert (ids[:, -1] == 0).all()  # the last is padding always
    assert ids[2, -2] == 1
    assert tokenizer.decode(ids[0].tolist()) == "a cat"
    assert tokenizer.decode(ids[1].tolist()).startswith("고")
