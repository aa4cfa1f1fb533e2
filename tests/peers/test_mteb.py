"""mteb: its own wrapper of SigLIP, over the batches that its data loaders make.

Without torchvision mteb builds no image tasks; the wrapper itself needs none.
"""

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import siglip_hf

pytest.importorskip("mteb")


@pytest.mark.parametrize("folder", [siglip_hf.default_checkpoint, siglip_hf.naflex_checkpoint])
@torch.no_grad()
def test_wrapper(folder):
    from mteb.models.model_implementations.siglip_models import SiglipModelWrapper

    wrapper = SiglipModelWrapper(folder(), revision=None, device="cpu")
    assert isinstance(wrapper.model, siglip_hf.SiglipModel | siglip_hf.Siglip2Model)
    wrapper.model.float()  # the embedded weights are float16
    texts = ["a cat", "Two red circles above a green square", "house"]
    images = [Image.new("RGB", (80, 48), "red"), Image.new("L", (48, 80), 99)]
    model, processor = AutoModel.from_pretrained(folder(), dtype=torch.float32), AutoProcessor.from_pretrained(folder())

    found = wrapper.get_text_embeddings([{"text": texts[:1]}, {"text": texts[1:]}], show_progress_bar=False)
    expected = model.encode_text(processor(text=texts, return_tensors="pt")["input_ids"], normalize=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    found = wrapper.get_image_embeddings([{"image": images[:1]}, {"image": images[1:]}], show_progress_bar=False)
    rgb = [image.convert("RGB") for image in images]
    expected = model.encode_image(**processor(images=rgb, return_tensors="pt"), normalize=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
