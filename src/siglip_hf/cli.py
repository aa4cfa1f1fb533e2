"""`siglip-hf`: parses, calls one function, prints. Torch and transformers are imported by the commands that need them.

Exit codes: 0 all well; 1 something was skipped or found wrong, named on stderr; 2 wrong usage, in one line on stderr.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from siglip_hf.classify import Classified

app = typer.Typer(
    name="siglip-hf",
    help="SigLIP from the command line.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (that of the process if None) and returns its exit code."""
    try:
        with _quiet_libraries():
            return app(arguments, standalone_mode=False) or 0
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:
        # Errors of usage come with an exit code and a message for the user, whatever class a version of typer has.
        if hasattr(error, "format_message"):
            message = error.format_message()
        elif isinstance(error, ValueError | OSError | ImportError):  # of an extra that is not installed
            message = str(error)
        else:
            raise
        print(f"siglip-hf: {' '.join(message.split())}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No warnings of libraries between the results; errors stay."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _print_version(wanted: bool) -> None:
    if wanted:
        from siglip_hf import __version__

        print(f"siglip-hf {__version__}")
        raise typer.Exit()


@contextlib.contextmanager
def _no_library_progress() -> Iterator[None]:
    """The bars of transformers stay away from ours."""
    from transformers.utils import logging as library

    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def classify(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Files, folders (with all below), globs, URLs.")],
    labels: Annotated[str | None, typer.Option(help='Labels, as "a cat, a dog".')] = None,
    labels_file: Annotated[Path | None, typer.Option(help="A text file with a label on each line.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A checkpoint; without it the embedded one, with no network.")
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="A folder made by `siglip-hf export`, run by ONNX Runtime; instead of --model.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Text with {} for the label; given several times, they are averaged.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels shown for each picture.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array, an object per picture.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Draw a contact sheet into this picture file.")] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            help='JSON of right labels, {"a.png": "a cat"}: prints the accuracy; its labels serve for --labels.'
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one forward.")] = 8,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the first accelerator by default.")
    ] = None,
) -> int:
    """Say which of some labels fit each picture.

    cosine: the bare similarity. logit: cosine x temperature + bias.
    sigmoid: the probability that the label fits, each on its own. softmax: its share among these labels.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from siglip_hf import default_checkpoint
    from siglip_hf.classify import (
        accuracy,
        classify_files,
        find_pictures,
        load_classifier,
        read_labels_file,
        read_truth_file,
    )
    from siglip_hf.label_bank import parse_labels, parse_templates

    if onnx is not None and (other := "--model" if model else "--device" if device else None):
        raise ValueError(f"{other} and --onnx are both given; pass one of them.")
    right = read_truth_file(truth) if truth else None
    given = [value for value in (labels, read_labels_file(labels_file) if labels_file else None) if value is not None]
    if len(given) > 1:
        raise ValueError("--labels and --labels-file are both given; pass one of them.")
    if not given and right is None:
        raise ValueError('no labels: pass --labels "a cat, a dog" or --labels-file FILE.')
    candidates = parse_labels(given[0] if given else (right or {}).values())
    templates = parse_templates(template) if template else None
    sources = find_pictures(images)
    if sheet is not None:
        _check_sheet(sheet, len(sources))

    errors = Console(stderr=True)
    progress = Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=errors,
        transient=True,
        redirect_stdout=False,
        disable=not errors.is_terminal,
    )
    with _no_library_progress(), progress:
        task = progress.add_task("loading the model", total=None)
        if onnx is not None:
            from siglip_hf.export import onnx_classifier

            classifier = onnx_classifier(onnx)
        else:
            classifier = load_classifier(model or default_checkpoint(), device)
        progress.update(task, description="classifying", total=len(sources))
        results = classify_files(
            classifier,
            sources,
            candidates,
            templates=templates,
            top_k=top,
            truth=right,
            batch_size=batch_size,
            on_progress=lambda done: progress.advance(task, done),
        )

    hits, judged = accuracy(results)
    summary = f"{hits} of {judged} best labels are right ({hits / judged:.1%})" if judged else ""
    if as_json:
        print(json.dumps([result.as_dict() for result in results], ensure_ascii=False, indent=2))
    else:
        _print_tables(results)
        if summary:
            print(summary)
    if sheet is not None:
        _draw_sheet(results, sheet, summary)
        print(f"contact sheet: {sheet}", file=sys.stderr)
    broken = [result for result in results if result.error]
    for result in broken:
        print(f"skipped {result.source}: {result.error}", file=sys.stderr)
    if broken:
        print(f"{len(broken)} of {len(results)} pictures skipped", file=sys.stderr)
    return 1 if broken else 0


def _print_tables(results: list[Classified]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for result in results:
        if not result.labels:
            continue
        title = result.source if result.truth is None else f"{result.source} ({result.truth})"
        table = Table(title=escape(title), title_justify="left", title_style="bold")
        table.add_column("label", min_width=20)
        for name in ("cosine", "logit", "sigmoid", "softmax"):
            table.add_column(name, justify="right", min_width=8)
        for row in result.labels:
            label = escape(row["label"])
            if row["label"] == result.truth:
                label = f"[green]{label}[/green]"
            table.add_row(
                label, f"{row['cosine']:.3f}", f"{row['logit']:.2f}", f"{row['sigmoid']:.2%}", f"{row['softmax']:.1%}"
            )
        console.print(table)


def _check_sheet(path: Path, count: int) -> None:
    """Refuses what would fail only after all pictures are classified."""
    from PIL import Image

    from siglip_hf.contact_sheet import MAX_PICTURES

    Image.init()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--sheet {path}: no picture format has this ending; use .png")
    if not path.parent.is_dir():
        raise ValueError(f"--sheet {path}: there is no folder {path.parent}")
    if count > MAX_PICTURES:
        raise ValueError(f"--sheet shows at most {MAX_PICTURES} pictures, not {count}.")


def _draw_sheet(results: list[Classified], path: Path, summary: str) -> None:
    from siglip_hf.contact_sheet import Card, draw_contact_sheet
    from siglip_hf.image_intake import load_picture

    cards = [
        Card(
            load_picture(result.source, draft_to=400),
            result.truth or Path(result.source).name,
            [(row["label"], row["softmax"]) for row in result.labels[:3]],
            result.truth,
        )
        for result in results
        if result.labels
    ]
    if cards:
        draw_contact_sheet(cards, title=summary or f"{len(cards)} pictures").save(path)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> int:
    """Show versions, devices, what is registered, optional parts, and try the attention implementations."""
    from rich.console import Console

    from siglip_hf.doctor import examine

    with Console(stderr=True).status("examining; flex attention may compile for a minute"):
        report = examine()
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _print_report(report)
    for problem in report["problems"]:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if report["problems"] else 0


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def attention_state(entry: dict[str, Any]) -> str:
        where = f"on {entry['device']} in {entry['dtype']}"
        return (
            f"[green]works[/green] {where}" if entry["works"] else f"[red]no[/red] {where}: {escape(entry['reason'])}"
        )

    def package_state(packages: dict[str, str | None]) -> str:
        return ", ".join(f"{name} {version or '[dim]not installed[/dim]'}" for name, version in packages.items())

    def text(value: Any) -> str:
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        return "not installed" if value is None else escape(str(value))

    checkpoint = report["checkpoint"]
    size = f", {checkpoint['bytes'] / 1e6:.1f} MB" if checkpoint["path"] else f": {checkpoint['reason']}"
    sections = {
        "versions": {name: text(version) for name, version in report["versions"].items()},
        "hardware": {name.replace("_", " "): text(value) for name, value in report["hardware"].items()},
        "registered": {
            f"{auto_class} {kind}": text(path.split(", "))
            for auto_class, rows in report["registered"].items()
            for kind, path in rows.items()
        },
        "optional parts": {
            escape(f"siglip-hf[{extra}]"): package_state(packages) for extra, packages in report["extras"].items()
        },
        "attention": {name: attention_state(entry) for name, entry in report["attention"].items()},
        "embedded checkpoint": {"folder": text(checkpoint["path"] or "missing") + text(size)},
    }
    console = Console()
    for title, rows in sections.items():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="IN.npz", help="A checkpoint of the original code.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    preset: Annotated[
        str | None, typer.Option(help="Published checkpoint that it is; inferred from the shapes by default.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The SentencePiece file that belongs to it.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Turn a checkpoint of the original code into a folder that transformers loads."""
    from siglip_hf.convert_big_vision import convert as convert_checkpoint

    result = convert_checkpoint(
        checkpoint, output, preset=preset, tokenizer=tokenizer, dtype=dtype, overwrite=overwrite
    )
    name = result.preset or "the shapes are those of no published checkpoint"
    print(f"{output}: {name}; {result.num_tensors} tensors, {result.num_parameters / 1e6:.1f} million parameters")


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint: a folder or a name.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    opset: Annotated[int, typer.Option(help="ONNX operator set, 18 to 23.")] = 20,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
) -> None:
    """Write both towers as ONNX files; refused if their embeddings are not PyTorch's."""
    from siglip_hf.export import export as export_model

    result = export_model(model, output, dtype=dtype, opset=opset, overwrite=overwrite)
    cosines = ", ".join(f"{tower}.onnx {cosine:.7f}" for tower, cosine in result.cosines.items())
    print(f"{output}: lowest cosine to PyTorch: {cosines}")
