"""sentence-transformers: a folder as a model name; texts, pictures, dicts and mixtures equal encode_text, encode_image.

It sends `padding=True`, `videos_kwargs={}` and the like to every processor; with stock classes a short text then gets
another embedding (huggingface/sentence-transformers#2629, #3722).
"""

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import siglip_hf

sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = ["a cat", "Two red circles, above a green square", "a drawing of a house"]


def pictures() -> list[Image.Image]:
    """A wide and a tall picture whose pixels all differ."""
    noise = torch.randint(0, 255, (96, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [Image.fromarray(noise.numpy()), Image.fromarray(noise.numpy()).rotate(90, expand=True)]


def load(folder: str) -> "sentence_transformers.SentenceTransformer":
    return sentence_transformers.SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})


@pytest.fixture(scope="module", params=["siglip", "siglip saved", "siglip converted", "siglip2", "siglip2 saved"])
def case(request, tmp_path_factory):
    """`(SentenceTransformer, text embeddings, image embeddings)` of an embedded folder or one that we save."""
    family, *saved = request.param.split()
    folder = siglip_hf.default_checkpoint() if family == "siglip" else siglip_hf.naflex_checkpoint()
    # The embedded weights are float16, which 1e-5 would be too fine for.
    model, processor = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoProcessor.from_pretrained(folder)
    if saved == ["converted"]:
        folder = str(siglip_hf.convert_weights(folder, tmp_path_factory.mktemp("out") / family).path)
    elif saved:
        folder = str(tmp_path_factory.mktemp(family))
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    with torch.no_grad():
        texts = model.encode_text(processor(text=TEXTS, return_tensors="pt")["input_ids"])
        images = model.encode_image(**processor(images=pictures(), return_tensors="pt"))
    return load(folder), texts, images


def assert_encodes(case, inputs, expected) -> None:
    embedded = case[0].encode(inputs, convert_to_tensor=True)
    torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-5)


def test_texts(case):
    assert_encodes(case, TEXTS, case[1])


def test_one_short_text(case):
    """Alone in its batch, where the longest text of the batch is not what the model was trained on."""
    assert_encodes(case, TEXTS[0], case[1][0])


def test_pictures(case):
    assert_encodes(case, pictures(), case[2])


def test_dicts(case):
    assert_encodes(case, [{"image": picture} for picture in pictures()], case[2])
    assert_encodes(case, [{"text": text} for text in TEXTS], case[1])


def test_texts_and_pictures_in_one_list(case):
    """It joins kinds by a chat template only, and refuses them before a processor or a model is asked."""
    with pytest.raises(ValueError, match=r"(?i)modality"):
        case[0].encode([TEXTS[0], pictures()[0], TEXTS[1]])


def test_similarity(case):
    scores = case[0].similarity(*(case[0].encode(batch, convert_to_tensor=True) for batch in (pictures(), TEXTS)))
    torch.testing.assert_close(scores, case[2] @ case[1].T, rtol=0, atol=1e-5)


def test_saved_by_sentence_transformers(case, tmp_path):
    case[0].save(str(tmp_path))
    again = load(str(tmp_path))
    assert isinstance(again[0].auto_model, type(case[0][0].auto_model))
    assert_encodes((again,), TEXTS, case[1])
    assert_encodes((again,), pictures(), case[2])
