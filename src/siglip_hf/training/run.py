"""A whole training run in a folder: data in, a checkpoint out, and a run that was killed goes on when called again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siglip_hf.data.sources import Source, open_source
from siglip_hf.extras import missing
from siglip_hf.files import new_file, sha256, write_json
from siglip_hf.integrations.peft import lora_config
from siglip_hf.loading import load_checkpoint
from siglip_hf.training.pairs import check_templates, picture_key, stable_number, training_pairs
from siglip_hf.training.settings import SCHEDULES, TrainSettings

#: Written first, with the settings; a folder that has it is one of a run.
SETTINGS_FILE = "settings.json"
#: Written last; a folder that has it is finished.
REPORT_FILE = "report.json"
PLOT_FILE = "loss.png"

# Pairs of the training set on which recall is measured if there is nothing else to measure it on.
_MOST_EVALUATED = 1000
# What may differ when a run goes on: it has no influence on the result.
_FREE = {"output", "workers", "log_every", "save_every", "keep", "micro_batch"}


@dataclass
class TrainReport:
    """What a run has done; all of it is in `report.json` too.

    Attributes:
        pairs: Pairs of the training set.
        batch_size: Pairs per step.
        steps: Optimizer steps of the whole run.
        skipped: What was left out and why, a line each.
        first_loss: Mean over the first logged steps.
        last_loss: Mean over the last logged steps.
        evaluated: On how many pictures, and which, recall was measured.
        before: Measures before the first step: `loss`, `image_to_text_recall_at_1` and so on.
        after: The same after the last step.
        seconds: Of the last call.
        resumed_from: The step at which the last call began, 0 for a run in one go.
        processes: That the last call ran on.
        finished_before: This call had nothing left to do.
        history: What was logged, in order.
    """

    pairs: int
    batch_size: int
    steps: int
    skipped: list[str]
    first_loss: float
    last_loss: float
    evaluated: str
    before: dict[str, float]
    after: dict[str, float]
    seconds: float
    resumed_from: int
    processes: int = 1
    finished_before: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


def run_training(
    settings: TrainSettings,
    *,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> TrainReport | None:
    """Trains, or goes on with a run that was interrupted at any moment.

    Works alone and under torchrun or accelerate launch.

    Args:
        settings: What to do. A second call with the same `output` must have the same ones.
        on_progress: Called with what is being done, how far it is, and how far it will go.

    Returns:
        The report, on the first process; None on all others.

    Raises:
        ValueError: For data, a model or settings that cannot be used, and for an `output` of another run.
        ImportError: Naming the extra that is to be installed.
    """
    settings.check()
    started = time.perf_counter()
    pyplot = _import_pyplot()
    output = Path(settings.output)
    first = int(os.environ.get("RANK", "0")) == 0
    source, held_out = _open_data(settings)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch_size = min(settings.batch_size, len(source))
    accumulation = math.ceil(batch_size / (world * settings.micro_batch))
    per_device = math.ceil(batch_size / (world * accumulation))
    batch_size = per_device * accumulation * world
    steps = settings.steps or math.ceil(settings.epochs * math.ceil(len(source) / batch_size))

    _claim_output(output, settings, {"batch_size": batch_size, "data": _fingerprint(source, held_out)}, first)
    if (output / REPORT_FILE).exists():
        report = TrainReport(**json.loads((output / REPORT_FILE).read_text()))
        return dataclasses.replace(report, finished_before=True) if first else None

    from transformers.trainer_callback import PrinterCallback, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    from siglip_hf.training.trainer import SiglipTrainer, SiglipTrainingArguments

    last = get_last_checkpoint(str(output)) if output.is_dir() else None  # process 0 may not have made it yet
    args = SiglipTrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        scale_learning_rate=settings.scale_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,  # as in the paper, section 3.2: steadier with large batches
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=math.ceil(settings.warmup * steps),
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
        gradient_checkpointing=settings.gradient_checkpointing,
        torch_compile=settings.compile,
        fsdp=settings.fsdp or None,  # type: ignore[arg-type]  # text is the older way to say it
        seed=settings.seed,
        augment=settings.augment,
        captions=settings.captions,
        templates=settings.template,
        eval_strategy="steps" if settings.eval_every else "no",
        eval_steps=settings.eval_every,
        eval_on_start=last is None,
        save_strategy="steps",
        save_steps=settings.save_every or math.ceil(steps / 10),
        save_total_limit=settings.keep,
        logging_steps=settings.log_every,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=not settings.cpu,
        use_cpu=settings.cpu,
    )
    if settings.workers is None and args.device.type != "cpu":
        args.dataloader_num_workers = 4
    elif settings.workers is not None:
        args.dataloader_num_workers = settings.workers
    if settings.fsdp and args.world_size == 1:
        raise ValueError("fsdp shards a model over processes, and there is one; start several with torchrun.")

    model, processor = load_checkpoint(settings.model, dtype="float32")
    store = _lock(model, processor, settings, source, args, on_progress)
    if settings.lora:
        model = _with_adapters(model, settings)

    def report_progress(what: str, done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(what, done, total)

    class Watch(TrainerCallback):
        """Tells how far the run is, and draws the loss whenever there is something to go on with."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            report_progress("training", state.global_step, state.max_steps)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                _plot(pyplot, state.log_history, output / PLOT_FILE)

    report_progress("measuring", 0, steps)
    evaluated = _evaluated(settings, source, held_out)
    trainer = SiglipTrainer(
        model,
        args,
        train_dataset=source,
        eval_dataset=evaluated,
        processing_class=processor,
        image_store=store,
        callbacks=[Watch()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last)
    report_progress("measuring", steps, steps)
    after = trainer.evaluate()
    broken = trainer.broken_everywhere()
    _save_model(trainer, output)
    if not first:
        return None

    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    before = next((entry for entry in history if "eval_loss" in entry), after)
    where = "held out" if held_out is not None and settings.hold_out else "evaluation data"
    report = TrainReport(
        pairs=len(source),
        batch_size=batch_size,
        steps=steps,
        skipped=[*source.unused, *(f"{id_}: {reason}" for id_, reason in broken.items())],
        first_loss=losses[0] if losses else math.nan,
        last_loss=losses[-1] if losses else math.nan,
        evaluated=f"{len(evaluated)} {where if held_out is not None else 'training pairs'}",
        before=_measures(before),
        after=_measures(after),
        seconds=time.perf_counter() - started,
        resumed_from=int(Path(last).name.partition("-")[2]) if last else 0,
        processes=args.world_size,
        history=history,
    )
    _plot(pyplot, history, output / PLOT_FILE)
    write_json(output / REPORT_FILE, dataclasses.asdict(report))
    return report


def _import_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise missing("the plot of the loss needs matplotlib", "train") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _open_data(settings: TrainSettings) -> tuple[Source, Source | None]:
    """Training pairs, and pairs for evaluation if there are others."""
    check_templates(settings.template)
    columns = {name: getattr(settings, name) for name in ("image_column", "caption_column", "label_column")}

    def pairs(data: list[str]) -> Source:
        return training_pairs(open_source(data, split=settings.split, **columns))

    source = pairs(settings.data)
    if settings.caption_column and not any(record.captions for record in source):
        raise ValueError(f"{source.name}: the column {settings.caption_column!r} holds no caption.")
    if settings.eval_data:
        return source, pairs(settings.eval_data)
    if not settings.hold_out:
        return source, None
    keys = [picture_key(record) for record in source]
    order = sorted(set(keys), key=lambda key: stable_number("hold out", settings.seed, key))
    if settings.hold_out >= len(order):
        raise ValueError(f"hold_out={settings.hold_out} leaves nothing to train on: there are {len(order)} pictures.")
    held = set(order[: settings.hold_out])
    parts = [
        [record for record, key in zip(source, keys, strict=True) if (key in held) == out] for out in (False, True)
    ]
    return Source(source.name, parts[0], source.unused), Source(f"{source.name} (held out)", parts[1])


def _evaluated(settings: TrainSettings, source: Source, held_out: Source | None) -> Source:
    if held_out is not None:
        return held_out
    order = sorted(range(len(source)), key=lambda place: stable_number("evaluate", settings.seed, place))
    return Source(source.name, [source[place] for place in sorted(order[:_MOST_EVALUATED])])


def _fingerprint(*sources: Source | None) -> str:
    """What tells data from other data: the ids and texts of all records."""

    def parts() -> Iterator[bytes]:
        for source in sources:
            for record in source or ():
                yield repr((record.id, record.captions, record.label)).encode()
            yield b"end"

    return sha256(parts())


def _claim_output(output: Path, settings: TrainSettings, facts: dict[str, Any], first: bool) -> None:
    """Makes the folder of a new run, or makes sure that it is one of the same run.

    A run that has no checkpoint yet begins anew, with whatever settings.

    Raises:
        ValueError: If it belongs to something else; the message names what differs.
    """
    wanted = {**dataclasses.asdict(settings), **facts}
    wanted = json.loads(json.dumps({name: value for name, value in wanted.items() if name not in _FREE}))
    path = output / SETTINGS_FILE
    begun = (output / REPORT_FILE).exists() or any(output.glob("checkpoint-*"))
    if path.exists() and begun:
        found = json.loads(path.read_text())
        changed = [
            f"{name} {found.get(name)!r} -> {wanted[name]!r}" for name in wanted if found.get(name) != wanted[name]
        ]
        if changed:
            raise ValueError(
                f"{output} holds a run with other settings ({'; '.join(changed)}). Give another output, or remove it."
            )
        return
    empty = path.exists() or not output.exists()
    if not empty and (not output.is_dir() or any(not entry.name.startswith(".") for entry in output.iterdir())):
        raise ValueError(f"{output} is there already and no training run; give another output.")
    if first:
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)


def _lock(
    model: Any,
    processor: Any,
    settings: TrainSettings,
    source: Source,
    args: Any,
    on_progress: Callable[[str, int, int], None] | None,
) -> Any:
    """Freezes what is to be frozen, and returns the store of image embeddings, if one is wanted."""
    from siglip_hf.training.locked import freeze, store_images

    if settings.freeze and not settings.lora:
        freeze(model, settings.freeze)
    if not settings.image_store:
        return None
    if any(value.requires_grad for value in model.vision_model.parameters()):
        raise ValueError("image_store needs a frozen image tower: add freeze image.")
    folder = settings.image_store

    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress("embedding pictures", done, len(source))

    with args.main_process_first(local=False, desc="image embeddings"):
        model.to(args.device)
        return store_images(model, processor, source, folder, batch_size=settings.micro_batch, on_progress=tell)


def _with_adapters(model: Any, settings: TrainSettings) -> Any:
    """The model with LoRA adapters; frozen towers get none that are trained."""
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("lora needs peft: pip install peft") from error
    from siglip_hf.training.locked import freeze

    if settings.fsdp:
        raise ValueError("lora and fsdp are both given; adapters are small, so leave out fsdp.")
    adapted = get_peft_model(model, lora_config(model, r=settings.lora))
    if settings.freeze:
        freeze(adapted.get_base_model(), settings.freeze)
    return adapted


def _save_model(trainer: Any, output: Path) -> None:
    """Puts the trained checkpoint into the run's folder, file by file, each of them whole."""
    folder = output / ".model"
    if trainer.args.should_save:
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_fsdp_enabled:  # under accelerate launch, checkpoints may be in shards; the result is whole
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if not hasattr(trainer.model, "peft_config"):
        trainer.save_model(str(folder), _internal_call=True)
    elif trainer.args.should_save:
        trainer.model.merge_and_unload().save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        (folder / "training_args.bin").unlink(missing_ok=True)
        for file in folder.iterdir():
            os.replace(file, output / file.name)
        folder.rmdir()


def _plot(pyplot: Any, history: list[dict[str, float]], path: Path) -> None:
    """Draws the loss over the steps, and recall if it was measured more than once."""
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if not losses:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*losses, strict=True), color="tab:blue", marker="." if len(losses) < 50 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("loss of a batch", color="tab:blue")
    axes.set_ylim(bottom=0)
    measured: dict[int, float] = {}
    for entry in history:
        values = [value for name, value in entry.items() if name.endswith("_recall_at_1")]
        if values:
            measured[int(entry["step"])] = sum(values) / len(values)
    if len(measured) > 1:
        right = axes.twinx()
        right.plot(list(measured), list(measured.values()), color="tab:orange", marker="o")
        right.set_ylabel("recall at 1, mean of both ways", color="tab:orange")
        right.set_ylim(0, 1)
    with new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)


def _measures(logs: Mapping[str, float]) -> dict[str, float]:
    kept = {name.removeprefix("eval_"): value for name, value in logs.items() if "loss" in name or "recall" in name}
    return {name: float(value) for name, value in kept.items()}
