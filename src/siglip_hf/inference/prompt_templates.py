"""Sets of prompts for zero-shot classification, by name.

All but the first two were written by the authors of CLIP (Radford et al. 2021, arXiv:2103.00020) and published under
the MIT licence in github.com/openai/CLIP: `notebooks/Prompt_Engineering_for_ImageNet.ipynb` and `data/prompts.md`.
big_vision, the original code of SigLIP, has the two ImageNet sets as well (`clip_paper`, `clip_best`).
"""

from __future__ import annotations

from siglip_hf.inference.pipeline import DEFAULT_TEMPLATE

# "itap" is Reddit's "I took a picture".
_IMAGENET = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

# Kinds of photo times article, in the order of the published list.
_CIFAR = tuple(
    pattern.format(article=article)
    for article in ("a", "the")
    for pattern in (
        "a photo of {article} {{}}.",
        "a blurry photo of {article} {{}}.",
        "a black and white photo of {article} {{}}.",
        "a low contrast photo of {article} {{}}.",
        "a high contrast photo of {article} {{}}.",
        "a bad photo of {article} {{}}.",
        "a good photo of {article} {{}}.",
        "a photo of {article} small {{}}.",
        "a photo of {article} big {{}}.",
    )
)

#: Name of a set -> its templates.
TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "default": (DEFAULT_TEMPLATE,),
    "label": ("{}",),
    "photo": ("a photo of a {}.",),
    # The 80 prompts of the CLIP paper.
    "imagenet": _IMAGENET,
    # Chosen from these one after the other, in this order, while ImageNet's accuracy rose.
    "imagenet7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "cifar": _CIFAR,
}


def template_set(name: str) -> tuple[str, ...]:
    """The templates of a set.

    Args:
        name: one of `TEMPLATE_SETS`.

    Raises:
        ValueError: if there is no such set.
    """
    if name not in TEMPLATE_SETS:
        raise ValueError(f"there is no set of templates {name!r}; there are {', '.join(TEMPLATE_SETS)}.")
    return TEMPLATE_SETS[name]
