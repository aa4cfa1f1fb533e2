"""A folder of pictures with captions, and a training run on it; shared by the tests of training."""

import csv
import json
import shutil
from pathlib import Path

import torch

import siglip_hf
from siglip_hf.training import SiglipTrainer, SiglipTrainingArguments

PICTURES = Path(__file__).parents[1] / "src" / "siglip_hf" / "apps" / "pictures"


def write_captioned(folder: Path, count: int = 10) -> Path:
    """`count` pictures, each with two captions in a metadata.csv."""
    folder.mkdir(parents=True)
    labels = json.loads((PICTURES / "labels.json").read_text())
    with (folder / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "caption"])
        for name, label in list(labels.items())[:count]:
            shutil.copy(PICTURES / name, folder / name)
            rows.writerow([name, f"a photo of the {label}"])
    return folder


def write_two_captions(folder: Path, count: int = 10) -> Path:
    """As `write_captioned`, but the captions stand in text files, two lines each."""
    folder.mkdir(parents=True)
    labels = json.loads((PICTURES / "labels.json").read_text())
    for name, label in list(labels.items())[:count]:
        shutil.copy(PICTURES / name, folder / name)
        (folder / name).with_suffix(".txt").write_text(f"a photo of the {label}\nthis is a small {label}\n")
    return folder


def make_trainer(checkpoint, data, output, *, cls=SiglipTrainer, model=None, store=None, callbacks=None, **options):
    """A trainer on the CPU that logs each step.

    With so large an epsilon AdamW does not blow up what is only rounding, such as the gradient of a key's bias.
    """
    torch.manual_seed(0)
    options = {
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 0.05,
        "adam_epsilon": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        **options,
    }
    args = SiglipTrainingArguments(output_dir=str(output), use_cpu=True, report_to=[], disable_tqdm=True, **options)
    return cls(
        siglip_hf.SiglipModel.from_pretrained(checkpoint) if model is None else model,
        args,
        train_dataset=None if data is None else str(data),
        eval_dataset=None if data is None else str(data),
        processing_class=siglip_hf.SiglipProcessor.from_pretrained(checkpoint),
        image_store=store,
        callbacks=callbacks,
    )


def weights(trainer):
    """All parameters, whole ones, by name."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in trainer.model.named_parameters()
    }


def largest_difference(found, expected):
    assert found.keys() == expected.keys()
    return max((found[name] - value).abs().max().item() for name, value in expected.items())
