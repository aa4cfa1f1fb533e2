"""Stock transformers and this package side by side on a checkpoint and pictures: the proof of "same numbers".

Each side runs in a process of its own (`verify_side`), so that stock's classes load as they do without this package,
and time and memory are each side's own.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from siglip_hf.loading import pick_device

# Largest difference of embeddings of length 1; logits may differ by that times the temperature, scores by that of
# the logits times the sigmoid's slope.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}

_PICTURES = Path(__file__).parents[1] / "apps" / "pictures"
_LARGEST_SIDE = 512  # of the pictures of published models
DEFAULT_PICTURES = ("cat.png", "penguin.png", "bicycle.png", "pizza.png")
DEFAULT_LABELS = ("cat", "penguin", "bicycle", "pizza", "house")
TEMPLATE = "This is a photo of {}."

# The examples of transformers' pages of SigLIP and SigLIP 2: a photograph of two cats, labels, and the score that is
# printed there for the first of them.
PUBLISHED_PICTURE = "http://images.cocodataset.org/val2017/000000039769.jpg"
PUBLISHED_LABELS = ("2 cats", "a plane", "a remote")
PUBLISHED_SCORES = {
    "siglip-base-patch16-224": 0.1979,
    "siglip2-base-patch16-224": 0.1499,
    "siglip2-base-patch16-naflex": 0.211,
}
# Printed by other versions of torch and Pillow, and rounded.
PUBLISHED_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Comparison:
    """One quantity on both sides.

    Attributes:
        name: what was compared.
        shape: of the quantity, e.g. (4, 768).
        difference: the largest one; inf where the shapes differ or something is not finite.
        allowed: the largest one that rounding explains.
        note: what there is to say about it.
    """

    name: str
    shape: tuple[int, ...]
    difference: float
    allowed: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the difference is one of rounding."""
        return self.difference <= self.allowed


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        model: the checkpoint.
        dtype: in which both sides computed.
        comparisons: one for each quantity.
        sides: by "stock" and "siglip_hf": `classes`, `seconds` by step, `memory_before` and `peak_memory` in bytes.
        published: the example of the model's page: `printed`, and each side's score; None if the model has none, or if
            it could not be tried (`notes` says why).
        notes: what the reader should know.
    """

    model: str
    dtype: str
    comparisons: list[Comparison]
    sides: dict[str, dict[str, Any]]
    published: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every difference is within its tolerance."""
        return all(comparison.ok for comparison in self.comparisons)

    @property
    def verdict(self) -> str:
        """All of it in one line."""
        bad = [comparison for comparison in self.comparisons if not comparison.ok]
        if bad:
            what = "; ".join(f"{c.name} differ by {c.difference:.2g} (allowed {c.allowed:.2g})" for c in bad)
            return f"DIFFERENT: {what}"
        worst = max(self.comparisons, key=lambda c: c.difference / c.allowed if c.allowed else 0.0)
        return (
            f"SAME: {self.model} gives stock's numbers in {self.dtype}; the largest difference, relative to what is "
            f"allowed, is that of the {worst.name}: {worst.difference:.2g} of {worst.allowed:.2g}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        comparisons = [asdict(comparison) | {"ok": comparison.ok} for comparison in self.comparisons]
        return asdict(self) | {"comparisons": comparisons, "ok": self.ok, "verdict": self.verdict}


def verify(
    model: str | os.PathLike[str] | None = None,
    pictures: Sequence[Any] | None = None,
    *,
    labels: Iterable[str] | None = None,
    random: str | None = None,
    reference: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> Verification:
    """Runs a checkpoint in stock transformers and in this package, and compares what comes out.

    Compared are token ids, pixel values, embeddings (B, E) and (T, E), logits and scores (B, T). Where the model's page
    prints a score for its example, that is checked as well, if the picture can be had.

    Args:
        model: a folder or a hub name of a joint model; the embedded checkpoint by default.
        pictures: whatever `load_picture` takes; four of the package's own by default.
        labels: what the pictures may show; they are put into "This is a photo of {}."
        random: the name of a preset, such as "siglip-so400m-patch14-384", in place of `model`: random weights of its
            shapes are written to a temporary folder and loaded by both sides. Needs no network; there is no tokenizer,
            so that the token ids are random too.
        reference: what stock loads, if not the same: to compare a converted or changed checkpoint with its original.
        dtype: "float32", "float16" or "bfloat16".
        device: where both compute, e.g. "cuda".

    Returns:
        A `Verification`; its `ok` says whether all differences are those of rounding.

    Raises:
        ValueError: if the arguments exclude each other, there is no such device, or the checkpoint is no joint SigLIP
            model.
        OSError: if the checkpoint or a picture cannot be read, or a side fails; with its last words.
    """
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(TOLERANCE)}")
    if random is not None and (model is not None or reference is not None):
        raise ValueError("random weights take the place of a model; pass one of the two")
    pick_device(device)  # two processes would take a minute to find out
    with tempfile.TemporaryDirectory(prefix="siglip-hf-verify-") as temporary:
        work = Path(temporary)
        if random is not None:
            name, folder = f"random {random}", str(write_random(random, work / "random"))
        else:
            name = folder = str(model) if model is not None else _default_checkpoint()
        config = _joint_config(folder)
        cases, notes = _cases(config, folder, name, pictures, labels, random is not None, work)
        request = {"model": folder, "dtype": dtype, "device": device, "cases": cases}
        ours, our_side = _run_side(request | {"side": "siglip_hf"}, work)
        stock, stock_side = _run_side(request | {"side": "stock", "model": str(reference or folder)}, work)
    comparisons = _compare(stock, ours, dtype, max(our_side["logit_scale"], stock_side["logit_scale"]))
    published = None
    if "published" in cases:
        published, comparison = _published(_published_name(name), stock, ours)
        comparisons.append(comparison)
    return Verification(name, dtype, comparisons, {"stock": stock_side, "siglip_hf": our_side}, published, notes)


def write_random(preset: str, folder: Path) -> Path:
    """Writes a model of a preset's shapes with random values in all parameters, and its image processor's file.

    Args:
        preset: a key of `PRESETS` or `NAFLEX_PRESETS`.
        folder: where to.

    Raises:
        ValueError: if there is no such preset.
    """
    from siglip_hf.models.configuration_siglip import SiglipConfig
    from siglip_hf.models.configuration_siglip2 import NAFLEX_PRESETS, Siglip2Config
    from siglip_hf.models.modeling_siglip import SiglipModel
    from siglip_hf.models.modeling_siglip2 import Siglip2Model
    from siglip_hf.preprocessing.image_processing_siglip import SiglipImageProcessor
    from siglip_hf.preprocessing.image_processing_siglip2 import Siglip2ImageProcessor
    from siglip_hf.registration import register

    register()  # a command has not done it yet, and what is saved without it has no published names
    naflex = preset.removeprefix("google/") in NAFLEX_PRESETS
    config: Any = (Siglip2Config if naflex else SiglipConfig).from_preset(preset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (Siglip2Model if naflex else SiglipModel)(config)
        for parameter in model.parameters():
            if parameter.ndim == 1 and len(parameter) > 1:  # biases of zero and norms of one would hide mistakes
                nn.init.normal_(parameter, float(parameter.detach().mean() > 0.5), 0.1)
    model.save_pretrained(folder)
    vision = config.vision_config
    size = (
        {"patch_size": vision.patch_size} if naflex else {"size": dict.fromkeys(("height", "width"), vision.image_size)}
    )
    (Siglip2ImageProcessor if naflex else SiglipImageProcessor)(**size).save_pretrained(folder)
    return folder


def _default_checkpoint() -> str:
    from siglip_hf.loading import default_checkpoint

    return default_checkpoint()


def _joint_config(folder: str) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ("siglip", "siglip2"):
        raise ValueError(f"{folder} has model_type {config.model_type!r}; a joint SigLIP model is needed")
    return config


def _cases(
    config: Any, folder: str, name: str, pictures: Any, labels: Any, random: bool, work: Path
) -> tuple[dict[str, Any], list[str]]:
    """What both sides are asked for: the user's pictures and texts, and the published example where there is one."""
    from siglip_hf.inference.label_bank import parse_labels
    from siglip_hf.preprocessing.text_cleaning import label_words

    notes: list[str] = []
    sources = [str(_PICTURES / file) for file in DEFAULT_PICTURES] if not pictures else list(pictures)
    files = []
    for number, source in enumerate(sources):
        files.append(str(work / f"picture{number}.png"))
        _picture(source).save(files[-1])  # one by one: all of them may not fit into memory
    given = parse_labels(labels if labels is not None else DEFAULT_LABELS)
    texts = [TEMPLATE.format(label_words(label)) for label in given]
    if joined := next((label for label in given if label != label_words(label)), None):
        notes.append(
            f"both sides read {joined!r} as {label_words(joined)!r}, as this package's label paths and the original "
            "evaluation do; stock's pipeline leaves `_` to the tokenizer, and SigLIP's deletes it"
        )
    if config.text_config.vocab_size >= 256_000 or config.model_type == "siglip2":
        # It was trained so. Our tokenizer lowercases by itself; stock's GemmaTokenizer keeps capitals.
        texts = [text.lower() for text in texts]
        notes.append("texts are in lower case, as SigLIP 2 was trained; stock's GemmaTokenizer would keep capitals")
    case: dict[str, Any] = {"pictures": files, "texts": texts}
    if random:
        del case["texts"]
        shape = (len(texts), config.text_config.max_position_embeddings)
        generator = torch.Generator().manual_seed(0)
        case["input_ids"] = torch.randint(config.text_config.vocab_size, shape, generator=generator).tolist()
        notes.append("random weights have no tokenizer: the token ids are random, and the scores mean nothing")
    cases = {"yours": case}
    if not random and (key := _published_name(name)) in PUBLISHED_SCORES:
        mine = [source for source in sources if str(source).endswith(PUBLISHED_PICTURE.rpartition("/")[2])]
        try:
            _picture(mine[0] if mine else PUBLISHED_PICTURE).save(work / "published.png")
        except OSError as error:
            notes.append(
                f"the published example of {key} was not tried, since its picture could not be had ({error}); "
                f"pass a copy of {PUBLISHED_PICTURE} under its own name"
            )
        else:
            published = [TEMPLATE.format(label) for label in PUBLISHED_LABELS]
            cases["published"] = {"pictures": [str(work / "published.png")], "texts": published}
    return cases, notes


def _picture(source: Any) -> Any:
    """A picture for both sides; a very large one is made smaller, since stock's side would hold it several times."""
    from siglip_hf.preprocessing.image_intake import LARGE_PIXELS, load_picture, reduction

    picture = load_picture(source, draft_to=_LARGEST_SIDE)
    if picture.width * picture.height <= LARGE_PIXELS:
        return picture
    return picture.reduce(reduction(picture.size, _LARGEST_SIDE))


def _published_name(name: str) -> str:
    return Path(name).name


def _run_side(request: dict[str, Any], work: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Runs `verify_side` in a process of its own.

    Raises:
        OSError: if it fails.
    """
    side = request["side"]
    path, output = work / f"{side}.json", work / f"{side}.safetensors"
    path.write_text(json.dumps(request))
    script = Path(__file__).with_name("verify_side.py")
    # -P keeps the script's own folder, and so this package's modules, from the search path.
    command = [sys.executable, "-P", str(script), str(path), str(output)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise OSError(f"{side} failed on {request['model']}: {lines[-1]}")
    with safe_open(output, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["measured"])


def _difference(stock: torch.Tensor, ours: torch.Tensor) -> float:
    """The largest difference of two tensors of any shape; inf where it has no meaning."""
    if stock.shape != ours.shape:
        return float("inf")
    difference = (stock.double() - ours.double()).abs().max().item()
    return difference if difference == difference else float("inf")  # NaN equals nothing


def _compare(
    stock: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], dtype: str, logit_scale: float
) -> list[Comparison]:
    """The rows of the table, in the order of the computation."""
    tolerance = TOLERANCE[dtype]
    logits = tolerance * max(logit_scale, 1.0)
    allowed = {
        "token ids": ("input_ids", 0.0),
        "pixel values": ("pixel_values", 1e-6),
        "patch masks": ("pixel_attention_mask", 0.0),
        "patch grids": ("spatial_shapes", 0.0),
        "image embeddings": ("image_embeds", tolerance),
        "text embeddings": ("text_embeds", tolerance),
        "logits": ("logits_per_image", logits),
    }
    rows = []
    for name, (key, limit) in allowed.items():
        if (full := f"yours/{key}") in ours or full in stock:
            one, other = stock.get(full), ours.get(full)
            shape = tuple((other if other is not None else one).shape)  # type: ignore[union-attr]
            difference = float("inf") if one is None or other is None else _difference(one, other)
            rows.append(Comparison(name, shape, difference, limit))
    scores = [side["yours/logits_per_image"].double().sigmoid() for side in (stock, ours)]
    # The sigmoid's steepest slope where these scores lie: near 0, where most are, a wrong score is a small number too.
    # Within `logits` of a place the slope grows by no more than that power of e.
    slope = max((score * (1 - score)).max().item() for score in scores)
    limit = logits * min(slope * math.exp(logits), 1 / 4)
    rows.append(Comparison("scores", tuple(scores[1].shape), _difference(*scores), limit))
    return rows


def _published(
    key: str, stock: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]
) -> tuple[dict[str, float], Comparison]:
    """Each side's score of the published example, and how far ours is from the printed one."""
    printed = PUBLISHED_SCORES[key]
    scores = {
        name: side["published/logits_per_image"][0, 0].sigmoid().item()
        for name, side in (("stock", stock), ("siglip_hf", ours))
    }
    same_ids = torch.equal(stock["published/input_ids"], ours["published/input_ids"])
    difference, note = abs(scores["siglip_hf"] - printed), f"printed {printed}, here {scores['siglip_hf']:.4f}"
    if not same_ids:
        # The page's number is of ids with capitals, which the model was not trained on; so stock is held to it.
        difference = abs(scores["stock"] - printed)
        note += f"; stock, whose tokenizer keeps capitals, {scores['stock']:.4f}"
    return {"printed": printed, **scores}, Comparison("published scores", (1,), difference, PUBLISHED_TOLERANCE, note)


__all__ = ["PUBLISHED_SCORES", "Comparison", "Verification", "verify"]
