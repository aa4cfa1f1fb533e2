"""The names of transformers' image processors are all there; the class of "...Pil" is the one that uses Pillow."""

import pytest
from PIL import Image

import siglip_hf


@pytest.mark.parametrize("family", ["Siglip", "Siglip2"])
@pytest.mark.parametrize("suffix", ["", "Pil", "Fast"])
def test_every_name_loads_a_folder(family, suffix, tmp_path):
    image_processor_class = getattr(siglip_hf, f"{family}ImageProcessor{suffix}")
    assert (image_processor_class is getattr(siglip_hf, f"{family}ImageProcessor")) == (suffix != "Fast")
    image_processor_class().save_pretrained(tmp_path)
    config = tmp_path / "preprocessor_config.json"
    text = config.read_text().replace(f"{image_processor_class.__name__}", f"{family}ImageProcessor{suffix}")
    config.write_text(text)
    assert f'"{family}ImageProcessor{suffix}"' in text
    loaded = image_processor_class.from_pretrained(tmp_path)
    assert type(loaded) is image_processor_class
    assert loaded(Image.new("RGB", (20, 20)), return_tensors="pt").pixel_values.shape[0] == 1
