"""The fast image processors beside an accelerator made of CPU memory: what travels, and what the host waits for."""

import math

import pytest

SIZES = [(40, 60), (33, 20), (64, 64), (16, 90)]  # of the script's pictures
# Bytes of 4 pictures of 16 x 24, and of NaFlex patches: 4 x 20 of 8 x 8 pixels.
PIXELS, PATCHES = 4 * 16 * 24 * 3, 4 * 20 * 8 * 8 * 3
FACTORS = 2 * 4 * 3 * 4  # division and shift: float32 for each picture and channel
COUNTS = 4 * 8
FIVE = 5 / 4


@pytest.fixture
def told(on_accelerator):
    return on_accelerator["image_processors"]


def padded(*sizes: float) -> int:
    """Bytes of one block: every tensor in it begins at a multiple of 16."""
    return sum(math.ceil(size / 16) * 16 for size in sizes)


@pytest.mark.parametrize(
    ("batch", "sent", "launches"),
    [
        ("plain", padded(PIXELS, FACTORS), 1),
        ("by channel", padded(PIXELS, FACTORS), 1),
        ("raw", padded(PIXELS), 1),  # the channels are moved to the front
        ("floats", padded(FIVE * PIXELS, FIVE * FACTORS), 1),
        ("sizes", sum(padded(3 * height * width, FACTORS / 4) for height, width in SIZES), 4),
        ("naflex", padded(PATCHES, FACTORS, COUNTS), 4),  # scaling, and zeros for the padding
        ("naflex by channel", padded(PATCHES, FACTORS, COUNTS), 4),
        ("naflex raw", padded(PATCHES, FACTORS, COUNTS), 0),
        ("naflex floats", padded(FIVE * PATCHES, FIVE * FACTORS, FIVE * COUNTS), 4),
        ("naflex budgets", padded(PATCHES, FACTORS, COUNTS), 4),
    ],
)
def test_a_batch_travels_in_one_copy_of_8_bit_values(told, batch, sent, launches):
    facts = told[batch]
    assert facts["sends"] == 1
    assert facts["sent_bytes"] == sent
    assert facts["pinned"]
    assert facts["launchs"] == launches
    assert facts["blocking"] == facts["fetchs"] == facts["reads"] == 0


def test_the_device_has_the_values_of_the_cpu(told):
    assert len(told) == 11
    for batch, facts in told.items():
        assert facts["equal"], batch  # bit for bit, and of the same dtype
        assert facts["device"] == ["gpu:0"]
        assert facts["dtype"] == ["torch.uint8" if "raw" in batch else "torch.float32"]
        assert facts["contiguous"]


def test_masks_and_shapes_stay_on_the_cpu(told):
    """As in transformers; there a model reads them without waiting."""
    for batch, facts in told.items():
        others = {"pixel_attention_mask": ["cpu", True], "spatial_shapes": ["cpu", True]}
        assert facts["others"] == (others if "naflex" in batch else {})
