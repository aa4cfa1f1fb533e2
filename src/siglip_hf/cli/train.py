"""`siglip-hf train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siglip_hf.cli.common import embedded_note, no_library_progress, progress_bar

if TYPE_CHECKING:
    from siglip_hf.training.run import TrainReport

# Lines about what was left out.
_MOST_LINES = 20


def train(
    context: typer.Context,
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA", help="A folder, a table, tar shards or a saved dataset: pictures with captions."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder of the run. Run again, it goes on where it was.")
    ] = None,
    output_of_old: Annotated[str | None, typer.Option("--output", hidden=True)] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML or JSON file with any of these options.")] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint; without it the embedded one.")] = None,
    eval_data: Annotated[list[str] | None, typer.Option(help="Pictures on which recall is measured.")] = None,
    hold_out: Annotated[int | None, typer.Option(help="So many pictures of DATA are kept to measure recall.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column with the pictures.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column with the captions.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with the class.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a saved dataset.  [default: train]")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Text with {} for the label of a picture without captions.")
    ] = None,
    captions: Annotated[str | None, typer.Option(help="random or first, of several.  [default: random]")] = None,
    augment: Annotated[str | None, typer.Option(help="Any of crop,flip,color.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.  [default: 10]")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, in place of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs in the loss of a step.  [default: 256]")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Pairs in memory at a time.  [default: 32]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak.  [default: 3e-5]")] = None,
    scale_learning_rate: Annotated[float | None, typer.Option(help="Of temperature and bias.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[default: 0.01]")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps.  [default: 0.1]")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, linear or constant.  [default: cosine]")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.  [default: float32]")] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    compile: Annotated[bool, typer.Option(help="Run the model through torch.compile.")] = False,
    fsdp: Annotated[bool, typer.Option(help="Shard the model over the processes.")] = False,
    freeze: Annotated[
        list[str] | None, typer.Option(help="image, text, image:6 (its first 6 blocks), or a pattern of names.")
    ] = None,
    lora: Annotated[int | None, typer.Option(help="Rank of LoRA adapters.")] = None,
    image_store: Annotated[str | None, typer.Option(help="Folder for embeddings of a frozen image tower.")] = None,
    seed: Annotated[int | None, typer.Option(help="[default: 0]")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between measurements.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; a tenth of the run.")] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints kept.  [default: 2]")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between points of the plot.  [default: 1]")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read pictures.")] = None,
    cpu: Annotated[bool, typer.Option(help="Leave accelerators alone.")] = False,
) -> int:
    """Fine-tune on pictures with captions, or with labels.

    Stopped at any moment, it goes on when it is called again. The folder gets the checkpoint, loss.png and report.json.
    For several processes: torchrun --nproc-per-node 2 --no-python siglip-hf train ...
    """
    from siglip_hf.training.run import run_training
    from siglip_hf.training.settings import TrainSettings, read_config

    given = _given(context)
    given.pop("config", None)
    if old := given.pop("output_of_old", None):
        given.setdefault("output", old)
    if augment is not None:
        given["augment"] = [name.strip() for name in augment.split(",") if name.strip()]
    values = read_config(config) if config else {}
    settings = TrainSettings.read({**_with_underscores(values), **given}, str(config) if config else "train")

    note = embedded_note(settings.model)
    with no_library_progress(), progress_bar() as progress:
        task = progress.add_task("loading", total=None)

        def show(what: str, done: int, total: int) -> None:
            note()
            progress.update(task, description=what, completed=done, total=total)

        report = run_training(settings, on_progress=show)
    if report is None:  # not the first process
        return 0
    _print_report(report, settings.output)
    for line in report.skipped[:_MOST_LINES]:
        print(f"skipped {line}", file=sys.stderr)
    if len(report.skipped) > _MOST_LINES:
        print(f"... and {len(report.skipped) - _MOST_LINES} more, all in report.json", file=sys.stderr)
    return 1 if report.skipped else 0


def _given(context: typer.Context) -> dict[str, Any]:
    """What stands on the command line; the rest may be in a file."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {
        name: value
        for name, value in context.params.items()
        if value is not None and getattr(sources[name], "name", "") == "COMMANDLINE"
    }


def _with_underscores(values: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in values.items()}


def _print_report(report: TrainReport, output: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title=escape(output), title_justify="left", title_style="bold")
    table.add_column("", min_width=24)
    table.add_column("before", justify="right", min_width=10)
    table.add_column("after", justify="right", min_width=10)
    table.add_row("loss of a batch", f"{report.first_loss:.4f}", f"{report.last_loss:.4f}")
    for name in report.after:
        if name.endswith(("recall_at_1", "recall_at_5")):
            words = name.replace("_recall_at_", " recall@").replace("_", " ")
            table.add_row(words, *(f"{part.get(name, float('nan')):.1%}" for part in (report.before, report.after)))
    console.print(table)
    done = "finished before" if report.finished_before else f"{report.seconds:.0f} s"
    resumed = f", resumed at step {report.resumed_from}" if report.resumed_from else ""
    print(f"{report.pairs} pairs, {report.steps} steps of {report.batch_size}, {done}{resumed}")
    print(f"recall on {report.evaluated}; {len(report.skipped)} skipped")
    print(f"checkpoint: {output}")
