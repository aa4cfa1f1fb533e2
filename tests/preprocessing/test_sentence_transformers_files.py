"""Every folder that is saved, and the embedded ones, can be read by sentence-transformers, with our embeddings."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import siglip_hf
from siglip_hf.preprocessing.sentence_transformers_files import write_sentence_transformers_files

TEXTS = ["a cat", "a drawing of two houses"]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("folder", [siglip_hf.default_checkpoint(), siglip_hf.naflex_checkpoint()])
def test_embeddings_are_ours(folder, saved, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, processor = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoProcessor.from_pretrained(folder)
    if saved:
        folder = str(tmp_path)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    pictures = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 50, 3), dtype=np.uint8))]
    with torch.no_grad():
        texts = model.encode_text(processor(text=TEXTS, return_tensors="pt")["input_ids"])
        images = model.encode_image(**processor(images=pictures, return_tensors="pt"))
    transformer = sentence_transformers.SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
    assert [type(module).__name__ for module in transformer] == ["Transformer", "Normalize"]
    assert transformer.similarity_fn_name == "cosine"
    for inputs, expected in ((TEXTS, texts), (pictures, images), ([{"text": TEXTS[0]}], texts[:1])):
        embedded = transformer.encode(inputs, convert_to_tensor=True)
        torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-5)


def test_files_that_are_there_stay(tmp_path):
    (tmp_path / "modules.json").write_text("[]")
    write_sentence_transformers_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["modules.json"]
