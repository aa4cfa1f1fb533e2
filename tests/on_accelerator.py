"""Runs what is to go on beside an accelerator on one made of CPU memory, and tells what the host did meanwhile.

A script, because the made-up device lasts as long as the process. It prints one line of JSON for each path, or for
those that it is given: facts that the tests of each room assert; see the fixture `on_accelerator`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

import accelerator
import siglip_hf
from peers import families
from siglip_hf import parallel
from siglip_hf.loading import load_checkpoint
from tiny_checkpoint import write_tiny_checkpoint
from tiny_siglip2 import tiny_pictures, write_naflex
from training_data import largest_difference, make_trainer, weights, write_two_captions

DEVICE = "gpu:0"
PATHS: dict[str, Callable[[], Any]] = {}


def path(function: Callable[[], Any]) -> Callable[[], Any]:
    """Runs a function, and tells what it returns, by its name."""
    PATHS[function.__name__] = function
    return function


def done(notes: list[accelerator.Note]) -> dict[str, Any]:
    """What the host did, in numbers."""
    of = {kind: [note for note in notes if note.kind == kind] for kind in ("send", "fetch", "launch", "read", "wait")}
    return {
        **{f"{kind}s": len(found) for kind, found in of.items()},
        "sent_bytes": sum(note.bytes for note in of["send"]),
        "pinned": all(note.pinned for note in of["send"]),
        "blocking": sum(note.blocks for note in notes),
    }


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Image processors

SIZES = [(40, 60), (33, 20), (64, 64), (16, 90)]
PICTURES = [Image.fromarray(noise(*size)) for size in SIZES]
BY_CHANNEL = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
RAW = {"do_rescale": False, "do_normalize": False}
UNIT = noise(30, 30).astype(np.float64) / 255  # stays in 0..1 where nothing is rescaled


def preprocessed(processor: Any, pictures: Any, **options: Any) -> dict[str, Any]:
    """One batch on the device, against the same on the CPU."""
    with accelerator.Accelerator() as device:
        there = processor(pictures, device=DEVICE, **options)
        notes = list(device.notes)
        kept = list(there["pixel_values"])
        values = [each.cpu() for each in kept]
    here = processor(pictures, **options)
    return {
        **done(notes),
        "device": sorted({str(each.device) for each in kept}),
        "dtype": sorted({str(each.dtype) for each in kept}),
        "contiguous": all(each.is_contiguous() for each in kept),
        "equal": all(
            torch.equal(one, other) and one.dtype == other.dtype
            for one, other in zip(values, here["pixel_values"], strict=True)
        ),
        "others": {
            name: [there[name].device.type, torch.equal(there[name], here[name])]
            for name in here
            if name != "pixel_values"
        },
    }


@path
def image_processors() -> dict[str, Any]:
    fast = siglip_hf.SiglipImageProcessorFast(size={"height": 16, "width": 24})
    naflex = siglip_hf.Siglip2ImageProcessorFast(patch_size=8, max_num_patches=20)
    pt = {"return_tensors": "pt"}
    return {
        "plain": preprocessed(fast, PICTURES, **pt),
        "by channel": preprocessed(fast, PICTURES, **pt, **BY_CHANNEL),
        "raw": preprocessed(fast, PICTURES, **pt, **RAW),
        "floats": preprocessed(fast, [*PICTURES, UNIT], **pt, do_rescale=False),
        "sizes": preprocessed(fast, PICTURES, do_resize=False),
        "sizes and padding": preprocessed(
            fast, PICTURES, **pt, do_resize=False, do_pad=True, pad_size={"height": 90, "width": 90}
        ),
        "naflex": preprocessed(naflex, PICTURES, **pt),
        "naflex by channel": preprocessed(naflex, PICTURES, **pt, **BY_CHANNEL),
        "naflex raw": preprocessed(naflex, PICTURES, **pt, **RAW),
        "naflex floats": preprocessed(naflex, [*PICTURES, UNIT], **pt, do_rescale=False),
        "naflex budgets": preprocessed(naflex, PICTURES, **pt, max_num_patches=[4, 20, 9, 16]),
    }


# The embedder


def embedded(model: Any, processor: Any, pictures: list[Any], texts: list[str], size: int) -> dict[str, Any]:
    """Pictures and texts in batches of `size` on the device, against the same on the CPU."""
    there = put_on(copy.deepcopy(model), DEVICE)
    here = siglip_hf.SiglipEmbedder.of(model, processor, weights="-", batch_size=size)
    told = {}
    for kind, inputs in (("image", pictures), ("text", texts)):
        with accelerator.Accelerator() as device:
            embedder = siglip_hf.SiglipEmbedder.of(there, processor, weights="-", batch_size=size)
            encode = getattr(there, f"encode_{kind}")
            setattr(there, f"encode_{kind}", lambda encode=encode, **given: device.note("forward") or encode(**given))
            embeds = getattr(embedder, f"embed_{kind}s")(inputs)
            told[kind] = {
                "order": [
                    [note.kind, note.stream, note.name if note.kind == "wait" else note.pinned, note.blocks]
                    for note in device.notes
                    if note.kind != "launch"
                ],
                "waited_for": device.stream.waits_for,
                "held": len(device.stream.holds),
            }
        told[kind]["apart"] = float(np.abs(embeds - getattr(here, f"embed_{kind}s")(inputs)).max())
        told[kind]["shape"] = list(embeds.shape)
    return told


def put_on(module: Any, device: str) -> Any:
    """The module, with its parameters and buffers on the device."""
    with accelerator.Accelerator():
        return module.to(device)


@path
def embedder() -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    write_naflex(folder)
    naflex = siglip_hf.Siglip2Model.from_pretrained(folder).eval()
    texts = [f"picture number {number}" for number in range(11)]
    return {
        "siglip": embedded(*load_checkpoint(dtype=torch.float32), PICTURES * 3, texts, 5),
        "siglip2": embedded(naflex, siglip_hf.Siglip2Processor.from_pretrained(folder), PICTURES * 3, texts, 5),
    }


@path
def broken_picture() -> dict[str, Any]:
    """An error comes where it comes on the CPU: after the batches before it."""
    model, processor = load_checkpoint()
    told = {}
    for name, tower in (("cpu", model), (DEVICE, put_on(copy.deepcopy(model), DEVICE))):
        with accelerator.Accelerator():
            one = siglip_hf.SiglipEmbedder.of(tower, processor, weights="-", batch_size=2)

            def prepare(chunk: Any, one: Any = one) -> tuple[Any, Any]:
                if 5 in chunk:
                    raise ValueError("picture 5")
                return list(chunk), None if 2 in chunk else one.prepare_images(PICTURES[: len(chunk)])

            seen: list[Any] = []
            try:
                for results, embeds in one.encode_ahead(range(8), prepare):
                    seen.append([results, list(embeds.shape)])
            except ValueError as error:
                seen.append(str(error))
        told[name] = seen
    return told


# Models


def on(inputs: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    """The inputs, with those of these names on the device."""
    return {name: value.to(DEVICE) if name in names else value for name, value in inputs.items()}


@path
def naflex() -> dict[str, Any]:
    """What the host waits for in a forward, with shapes and mask on the device and on the host."""
    joint, classifier = families.make("Siglip2Model"), families.make("Siglip2ForImageClassification")
    there = {id(model): put_on(copy.deepcopy(model), DEVICE) for model in (joint, classifier)}
    inputs = tiny_pictures()
    unmasked = {name: value for name, value in inputs.items() if name != "pixel_attention_mask"}
    pictures = [noise(*size) for size in SIZES]

    def features(model: Any, packed: bool | None, **given: Any) -> torch.Tensor:
        return model.vision_model(**given, packed=bool(packed)).pooler_output

    calls: dict[str, Any] = {
        "encode_image": (joint, lambda model, packed, **given: model.encode_image(**given, packed=packed), inputs),
        "features": (joint, features, inputs),
        "classifier": (
            classifier,
            lambda model, packed, **given: model(**given, packed=bool(packed)).logits,
            inputs,
        ),
        "a list": (joint, lambda model, packed: model.encode_image(pictures, packed=packed, max_num_patches=9), {}),
    }
    calls["encode_image without a mask"] = (*calls["encode_image"][:2], unmasked)
    told = {}
    for name, (model, call, given) in calls.items():
        for packed, word in ((None, "by itself"), (True, "packed"), (False, "padded")):
            for end, names in (("", list(given)), (", on the host", ["pixel_values"])):
                with accelerator.Accelerator() as device, torch.no_grad():
                    sent = on(given, *names)
                    device.notes.clear()
                    result = call(there[id(model)], packed, **sent)
                    facts = done(device.notes)
                    result = result.cpu()
                with torch.no_grad():
                    apart = (result - call(model, packed, **given)).abs().max().item()
                told[f"{name}, {word}{end}"] = {**facts, "apart": apart}
    return told


@path
def split() -> dict[str, Any]:
    """Towers spread by accelerate over two devices and the CPU."""
    told = {}
    places = {
        "logit_scale": "cpu",
        "logit_bias": "cpu",
        "text_model": "cpu",
        "vision_model.embeddings": "gpu:0",
        "vision_model.encoder.layers.0": "gpu:0",
        "vision_model.encoder.layers.1": "gpu:1",
        "vision_model.post_layernorm": "gpu:1",
        "vision_model.head": "gpu:1",
    }
    for name, options in (("SiglipModel", {}), ("Siglip2Model", {}), ("Siglip2Model packed", {"packed": True})):
        model = families.make(name.split()[0])
        inputs = families.inputs_of(name.split()[0])
        with torch.no_grad():
            expected = model(**inputs, **options).logits_per_image
        with accelerator.Accelerator(), torch.no_grad():
            for place, device in places.items():
                part = model.get_parameter(place) if place.startswith("logit") else model.get_submodule(place)
                if isinstance(part, torch.nn.Module):
                    part.to(device)
                    add_hook_to_module(part, AlignDevicesHook(device, io_same_device=False))
            found = model(**on(inputs, *(key for key in inputs if key != "input_ids")), **options)
            devices = sorted({str(value.device) for value in model.parameters()})
            told[name] = {
                "devices": devices,
                "apart": (found.logits_per_image.cpu() - expected).abs().max().item(),
            }
    return told


# Training


@path
def trainer() -> dict[str, Any]:
    """What the host waits for in a run, and what comes of it."""
    folder = Path(tempfile.mkdtemp())
    checkpoint, data = write_tiny_checkpoint(folder / "tiny"), write_two_captions(folder / "pictures")
    told = {}
    for name, size, accumulation in (("at once, shared pictures", 20, 1), ("accumulated, each alone", 2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        options |= {"max_grad_norm": 1.0}
        for steps, logging in ((2, 100), (4, 100), (4, 1)):
            options |= {"max_steps": steps, "logging_steps": logging}
            made = make_trainer(checkpoint, data, folder / "run", **options)
            with accelerator.Accelerator() as device:
                made.args.__dict__["_setup_devices"] = torch.device(DEVICE)
                made.accelerator.state.device = PartialState._shared_state["device"] = torch.device(DEVICE)
                made.model.to(DEVICE)
                device.notes.clear()
                made.train()
                told[f"{name}, {steps} steps, a log each {logging}"] = done(device.notes)
                found = {key: value.cpu() for key, value in weights(made).items()}
            AcceleratorState._reset_state(reset_partial_state=True)
        here = make_trainer(checkpoint, data, folder / "run", **options)
        here.train()
        entries = zip(made.state.log_history, here.state.log_history, strict=True)
        logged = ("loss", "grad_norm", "scale", "bias", "positive_logit", "negative_logit")
        told[name] = {
            "apart": largest_difference(found, weights(here)),
            "logs_apart": [
                max(abs(one[key] - other[key]) for key in logged) for one, other in entries if "loss" in one
            ],
        }
    return told


def main() -> None:
    """Runs every path."""
    parallel._PINNED.add(accelerator.NAME)
    for name, function in PATHS.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        try:
            with contextlib.redirect_stdout(sys.stderr):
                told = function()
        except Exception:  # told in the line, and fails the tests of this path
            told = {"error": traceback.format_exc()}
        print(json.dumps({"path": name, "told": told}))


if __name__ == "__main__":
    sys.exit(main())
