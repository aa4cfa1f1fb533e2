"""`siglip-hf train`."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siglip_hf.cli.common import console, counted, embedded_note, no_library_progress, progress_bar
from siglip_hf.training.settings import TrainSettings, read_config

if TYPE_CHECKING:
    from siglip_hf.training.run import TrainReport

# Lines about what was left out.
_MOST_LINES = 20


def train(**options: Any) -> int:
    """Fine-tune on pictures with captions, or with labels.

    Stopped at any moment, it goes on when it is called again. The folder gets the checkpoint, loss.png and report.json.
    For several processes: torchrun --nproc-per-node 2 --no-python siglip-hf train ...
    For more than memory holds: siglip-hf train "shards/*.tar" --stream 2000 --steps 1000 -o tuned
    """
    from siglip_hf.training.run import run_training

    del options["config"]  # what it says has gone into the others
    settings = TrainSettings(**options)

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
    for line in report.damaged:
        print(f"{line}; an older checkpoint was used", file=sys.stderr)
    for line in report.skipped[:_MOST_LINES]:
        print(f"skipped {line}", file=sys.stderr)
    if len(report.skipped) > _MOST_LINES:
        print(f"... and {len(report.skipped) - _MOST_LINES} more, all in report.json", file=sys.stderr)
    return 1 if report.skipped else 0


def _use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Lets a file stand in for what is not on the command line."""
    if path is not None:
        context.default_map = read_config(path)
    return path


def _parameters() -> list[inspect.Parameter]:
    """The settings as typer reads them: a field's type with its help, and its default."""
    kinds = typing.get_type_hints(TrainSettings, include_extras=True)
    kinds["config"] = Annotated[
        Path | None,
        typer.Option(is_eager=True, callback=_use_config, help="A YAML or JSON file with any of these options."),
    ]
    defaults: dict[str, Any] = {"config": None}
    for item in dataclasses.fields(TrainSettings):
        if item.default is not dataclasses.MISSING:
            defaults[item.name] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            defaults[item.name] = item.default_factory()
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(name, kind, default=defaults.get(name, inspect.Parameter.empty), annotation=annotation)
        for name, annotation in kinds.items()
    ]


train.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]


def _print_report(report: TrainReport, output: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(output), title_justify="left", title_style="bold")
    table.add_column("", min_width=24)
    table.add_column("before", justify="right", min_width=10)
    table.add_column("after", justify="right", min_width=10)
    table.add_row("loss of a batch", f"{report.first_loss:.4f}", f"{report.last_loss:.4f}")
    for name in report.after:
        if name.endswith(("recall_at_1", "recall_at_5")):
            words = name.replace("_recall_at_", " recall@").replace("_", " ")
            table.add_row(words, *(f"{part.get(name, float('nan')):.1%}" for part in (report.before, report.after)))
    console().print(table)
    done = "finished before" if report.finished_before else f"{report.seconds:.0f} s"
    resumed = f", resumed at step {report.resumed_from}" if report.resumed_from else ""
    pairs = f"{report.pairs} pairs" if report.pairs else "a stream of pairs"
    print(f"{pairs}, {counted(report.steps, 'step')} of {report.batch_size}, {done}{resumed}")
    print(f"recall on {report.evaluated}; {len(report.skipped)} skipped")
    print(f"checkpoint: {output}")
