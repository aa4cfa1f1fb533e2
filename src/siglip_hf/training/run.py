"""A whole training run in a folder: data in, a checkpoint out, and a run that was killed goes on when called again."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback, TrainerCallback

from siglip_hf.data.sources import Source, open_source
from siglip_hf.data.streams import open_stream
from siglip_hf.extras import missing
from siglip_hf.files import (
    check_folder,
    first_line,
    name_full_disk,
    new_file,
    only_run,
    read_sealed_json,
    sha256,
    write_sealed_json,
)
from siglip_hf.integrations.peft import lora_config
from siglip_hf.loading import load_checkpoint
from siglip_hf.parallel import PIXELS
from siglip_hf.training.locked import freeze, store_images
from siglip_hf.training.pairs import check_templates, picture_key, stable_number, training_pairs
from siglip_hf.training.settings import SCHEDULES, TrainSettings
from siglip_hf.training.streams import StreamedPairs
from siglip_hf.training.trainer import SiglipTrainer, SiglipTrainingArguments

Progress = Callable[[str, int, int], None]

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
        pairs: Pairs of the training set; 0 of a stream, which is not counted.
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
        damaged: Checkpoints that the last call passed over, since they were damaged, and why.
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
    damaged: list[str] = field(default_factory=list)
    finished_before: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


def run_training(
    settings: TrainSettings, *, on_progress: Progress = lambda what, done, total: None
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
        OSError: If another process is writing to `output`.
        ImportError: Naming the extra that is to be installed.
    """
    settings.check()
    started = time.perf_counter()
    pyplot = _import_pyplot()
    output = Path(settings.output)
    first = int(os.environ.get("RANK", "0")) == 0
    source, held_out = _open_data(settings)
    plan = _plan(settings, len(source) if isinstance(source, Source) else settings.batch_size)
    identity = _identity(settings, plan, _fingerprint(source, held_out))
    _check_output(output, identity)
    alone = only_run(output) if first else contextlib.nullcontext()
    with alone, name_full_disk(output), PIXELS.at_most(settings.max_pixels):
        if _check_output(output, identity) and first:
            write_sealed_json(output / SETTINGS_FILE, identity)
        if (output / REPORT_FILE).exists():
            return _finished(output / REPORT_FILE) if first else None
        last, damaged = _last_checkpoint(output, remove=first)
        args = _arguments(settings, plan, last)
        evaluated = _evaluated(settings, source, held_out)
        on_progress("measuring", 0, plan.steps)
        trainer = _make_trainer(settings, args, source, evaluated, pyplot, on_progress)
        trainer.train(resume_from_checkpoint=last)
        on_progress("measuring", plan.steps, plan.steps)
        after = trainer.evaluate()
        broken = trainer.broken_everywhere()
        _save_model(trainer, output)
        if not first:
            return None
        history = trainer.state.log_history
        losses = [entry["loss"] for entry in history if "loss" in entry]
        where = "held out" if held_out is not None and settings.hold_out else "evaluation data"
        report = TrainReport(
            pairs=len(source) if isinstance(source, Source) else 0,
            batch_size=plan.batch_size,
            steps=plan.steps,
            skipped=[*source.unused, *(f"{id_}: {reason}" for id_, reason in broken.items())],
            first_loss=losses[0] if losses else math.nan,
            last_loss=losses[-1] if losses else math.nan,
            evaluated=f"{len(evaluated)} {where if held_out is not None else 'training pairs'}",
            before=_measures(next((entry for entry in history if "eval_loss" in entry), after)),
            after=_measures(after),
            seconds=time.perf_counter() - started,
            resumed_from=int(Path(last).name.partition("-")[2]) if last else 0,
            processes=args.world_size,
            damaged=damaged,
            history=history,
        )
        _plot(pyplot, history, output / PLOT_FILE)
        write_sealed_json(output / REPORT_FILE, dataclasses.asdict(report))
        return report


@dataclass(frozen=True)
class _Plan:
    """How the pairs of a step are spread over processes and micro-batches, and how many steps there are."""

    per_device: int
    accumulation: int
    batch_size: int
    steps: int


def _plan(settings: TrainSettings, pairs: int) -> _Plan:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = min(settings.batch_size, pairs)
    accumulation = math.ceil(wanted / (world * settings.micro_batch))
    per_device = math.ceil(wanted / (world * accumulation))
    batch_size = per_device * accumulation * world
    steps = settings.steps or math.ceil(settings.epochs * math.ceil(pairs / batch_size))
    return _Plan(per_device, accumulation, batch_size, steps)


def _arguments(settings: TrainSettings, plan: _Plan, last: str | None) -> SiglipTrainingArguments:
    """The settings in the Trainer's words."""
    args = SiglipTrainingArguments(
        output_dir=settings.output,
        per_device_train_batch_size=plan.per_device,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        max_steps=plan.steps,
        learning_rate=settings.learning_rate,
        scale_learning_rate=settings.scale_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,  # as in the paper, section 3.2: steadier with large batches
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=math.ceil(settings.warmup * plan.steps),
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
        gradient_checkpointing=settings.gradient_checkpointing,
        torch_compile=settings.compile,
        fsdp=settings.fsdp or None,  # type: ignore[arg-type]  # text is the older way to say it
        seed=settings.seed,
        augment=settings.augment,
        captions=settings.captions,
        templates=settings.template,
        shuffle_buffer=settings.stream,
        eval_strategy="steps" if settings.eval_every else "no",
        eval_steps=settings.eval_every,
        eval_on_start=last is None,
        save_strategy="steps",
        save_steps=settings.save_every or math.ceil(plan.steps / 10),
        save_total_limit=settings.keep,
        logging_steps=settings.log_every,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=not settings.cpu,
        use_cpu=settings.cpu,
    )
    if settings.workers is not None:
        args.dataloader_num_workers = settings.workers
    elif args.device.type != "cpu":
        args.dataloader_num_workers = 4
    if settings.fsdp and args.world_size == 1:
        raise ValueError("fsdp shards a model over processes, and there is one; start several with torchrun.")
    return args


class _Watch(TrainerCallback):
    """Tells how far the run is, and draws the loss whenever there is something to go on with."""

    def __init__(self, pyplot: Any, path: Path, on_progress: Progress):
        self.pyplot, self.path, self.on_progress = pyplot, path, on_progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_progress("training", state.global_step, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _plot(self.pyplot, state.log_history, self.path)


def _make_trainer(
    settings: TrainSettings,
    args: SiglipTrainingArguments,
    source: Source | StreamedPairs,
    evaluated: Source,
    pyplot: Any,
    on_progress: Progress,
) -> SiglipTrainer:
    model, processor = load_checkpoint(settings.model, dtype="float32")
    store = _lock(model, processor, settings, source, args, on_progress)
    trainer = SiglipTrainer(
        _with_adapters(model, settings) if settings.lora else model,
        args,
        train_dataset=source,
        eval_dataset=evaluated,
        processing_class=processor,
        image_store=store,
        callbacks=[_Watch(pyplot, Path(settings.output, PLOT_FILE), on_progress)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _import_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise missing("the plot of the loss needs matplotlib", "train") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _open_data(settings: TrainSettings) -> tuple[Source | StreamedPairs, Source | None]:
    """Training pairs, and pairs for evaluation if there are others."""
    check_templates(settings.template)
    columns = {name: getattr(settings, name) for name in ("image_column", "caption_column", "label_column")}

    def pairs(data: list[str]) -> Source:
        return training_pairs(open_source(data, split=settings.split, **columns))

    if settings.stream:
        streamed = StreamedPairs(open_stream(settings.data, **columns))
        return streamed, pairs(settings.eval_data) if settings.eval_data else None
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


def _evaluated(settings: TrainSettings, source: Source | StreamedPairs, held_out: Source | None) -> Source:
    if held_out is not None:
        return held_out
    if isinstance(source, StreamedPairs):
        return Source(source.name, list(islice(source, _MOST_EVALUATED))).require("image")
    order = sorted(range(len(source)), key=lambda place: stable_number("evaluate", settings.seed, place))
    return Source(source.name, [source[place] for place in sorted(order[:_MOST_EVALUATED])])


def _fingerprint(*sources: Source | StreamedPairs | None) -> str:
    """What tells data from other data: the ids and texts of all records; of a stream, its shards' names and sizes."""

    def parts() -> Iterator[bytes]:
        for source in sources:
            if isinstance(source, StreamedPairs):
                yield source.stream.stamp.encode()
                continue
            for record in source or ():
                yield repr((record.id, record.captions, record.label)).encode()
            yield b"end"

    return sha256(parts())


def _identity(settings: TrainSettings, plan: _Plan, data: str) -> dict[str, Any]:
    """What a run's result depends on, as it stands in its folder."""
    free = _FREE if settings.stream else {*_FREE, "stream"}  # a run from before there were streams goes on
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in free}
    return {**values, "batch_size": plan.batch_size, "data": data}


def _check_output(output: Path, identity: dict[str, Any]) -> bool:
    """Whether a run begins here; otherwise one of the same settings goes on. Until it has a checkpoint, it begins.

    Raises:
        ValueError: If the folder belongs to something else; the message names what differs.
    """
    path = output / SETTINGS_FILE
    if path.exists() and ((output / REPORT_FILE).exists() or any(output.glob("checkpoint-*"))):
        found = _read(path)
        changed = [
            f"{name} {found.get(name)!r} -> {value!r}" for name, value in identity.items() if found.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{output} holds a run with other settings ({'; '.join(changed)}). Give another output, or remove it."
            )
        return False
    empty = path.exists() or not output.exists()
    if not empty and (not output.is_dir() or any(not entry.name.startswith(".") for entry in output.iterdir())):
        raise ValueError(f"{output} is there already and no training run; give another output.")
    return True


def _last_checkpoint(output: Path, remove: bool) -> tuple[str | None, list[str]]:
    """The newest checkpoint of a run that is whole, and what is wrong with newer ones.

    The processes of a run come to the same answer even while the first of them removes a damaged one.

    Args:
        output: The folder of the run.
        remove: Remove the damaged ones, which would otherwise count among those to be kept.

    Raises:
        ValueError: If there are checkpoints, and none is whole; nothing is removed then.
    """
    damaged: dict[str, Path] = {}
    while output.is_dir() and (last := _newest(output, damaged.values())):  # process 0 may not have made it yet
        try:
            check_folder(last)
        except ValueError as error:
            damaged[str(error)] = last
            continue
        for folder in damaged.values() if remove else ():
            aside = output / f".{folder.name}"  # at once, so that no other process finds half of it
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
        return str(last), list(damaged)
    if damaged:
        raise ValueError(f"{'; '.join(damaged)}. No older checkpoint is there; give another output, or remove it.")
    return None, []


def _newest(output: Path, besides: Collection[Path]) -> Path | None:
    found = [path for path in output.glob("checkpoint-*") if path.name[11:].isdecimal() and path not in besides]
    return max(found, key=lambda path: int(path.name[11:]), default=None)


def _finished(path: Path) -> TrainReport:
    try:
        return TrainReport(**{**_read(path), "finished_before": True})
    except TypeError as error:
        raise ValueError(
            f"{path} is not a report of this version: {first_line(error)}. Give another output."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    """What a run has written into its folder about itself."""
    try:
        content = read_sealed_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Give another output, or remove this one.") from error
    content.pop("checksum", None)
    return content


def _lock(
    model: Any,
    processor: Any,
    settings: TrainSettings,
    source: Source | StreamedPairs,
    args: SiglipTrainingArguments,
    on_progress: Progress,
) -> Any:
    """Freezes what is to be frozen, and returns the store of image embeddings, if one is wanted."""
    if settings.freeze and not settings.lora:
        freeze(model, settings.freeze)
    if not settings.image_store or not isinstance(source, Source):
        return None
    if any(value.requires_grad for value in model.vision_model.parameters()):
        raise ValueError("image_store needs a frozen image tower: add freeze image.")
    with args.main_process_first(local=False, desc="image embeddings"):
        model.to(args.device)
        return store_images(
            model,
            processor,
            source,
            settings.image_store,
            batch_size=settings.micro_batch,
            on_progress=lambda done: on_progress("embedding pictures", done, len(source)),
        )


def _with_adapters(model: Any, settings: TrainSettings) -> Any:
    """The model with LoRA adapters; frozen towers get none that are trained."""
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("lora needs peft: pip install peft") from error
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
        for path in folder.iterdir():
            if path.is_dir():  # a run that was killed here has moved it before, and a full folder is not replaced
                shutil.rmtree(output / path.name, ignore_errors=True)
            os.replace(path, output / path.name)
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
