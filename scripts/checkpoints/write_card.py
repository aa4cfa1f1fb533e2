"""Write what was measured into the card of a checkpoint, and draw its learning curve and the reliability of its scores.

Usage: python scripts/checkpoints/write_card.py --checkpoint FOLDER --run RUN --figures FILE [--data data/pictures]

The card is README.md in FOLDER. Its prose is written by hand; what stands between `<!-- written: NAME -->` and
`<!-- end -->` is written by this script, from what the training and the evaluation left behind. The plots are
learning_curve.svg and, for a square checkpoint, reliability.svg in FOLDER's place in docs/img.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from drawings.sources import read_json

IMAGES = Path(__file__).parents[2] / "docs" / "img"
STYLES = {"fxemoji": "FxEmoji", "openmoji": "OpenMoji"}
CHANCE = {"10-way": "10", "top-1": "0.07"}
#: Measures of the learning curve -> their names in the plot.
MEASURES = {
    "en": "label finds its concept, English",
    "de": "the same, German",
    "ko": "the same, Korean",
    "validation_top1": "validation, top-1",
    "probe_10way": "undrawn concepts, 10-way",
}


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def figures_table(figures: dict[str, Any]) -> str:
    """The measures of evaluate_default.py, a column for each held-out style."""

    def cell(style: str, name: str) -> str:
        value = figures[style][name]
        return "< 0.005" if value < 0.005 else f"{value:.2f}"

    names = [name for name in figures["openmoji"] if name in figures["fxemoji"] and name != "reliability"]
    return markdown(
        ("measure", *STYLES.values(), "chance"),
        (
            (name, *(cell(style, name) for style in STYLES), CHANCE.get(name.split(",")[0].split(" ")[0], ""))
            for name in names
        ),
    )


def naflex_table(figures: dict[str, Any]) -> str:
    """The measures of evaluate_naflex.py, a row for each budget of patches."""
    rows: dict[str, list[str]] = {}
    for kind in ("square", "NaFlex"):
        for name, values in figures[kind].items():
            budget = name.split(", ")[0]
            row = "squashed, by siglip-hf-pictures-64" if budget == "squashed" else f"NaFlex, {budget}"
            rows.setdefault(row, []).append(" / ".join(f"{value:.1f}" for value in values.values()))
    header = ("pictures of FxEmoji", *(name.split(", ")[1] for name in figures["square"]))
    return markdown(header, ((name, *cells) for name, cells in rows.items()))


def sources_table(manifest: dict[str, Any]) -> str:
    """Every package that pictures come from."""
    uses = {"train": "training", "evaluate": "evaluation only"}
    return markdown(
        ("package", "version", "pictures", "redrawn", "licence", "by", "use"),
        (
            (
                *(style["package"], style["version"], style["pictures"], style.get("restyled") or ""),
                *(style["licence"], style["author"], uses[style["use"]]),
            )
            for style in manifest["styles"]
        ),
    )


def read_curve(run: Path) -> dict[str, list[dict[str, float]]]:
    """The lines of a learning curve by stage, without stages that measure nothing as they go."""
    stages: dict[str, list[dict[str, float]]] = {}
    for line in (run / "learning_curve.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if MEASURES.keys() & row:
            rows = stages.setdefault(row["stage"], [])
            # A stage that was started again replaces what it had reached.
            rows[:] = [earlier for earlier in rows if earlier["samples"] < row["samples"]]
            rows.append(row)
    return stages


def curve_table(stages: dict[str, list[dict[str, float]]]) -> str:
    """Where each stage of a training ended."""
    return markdown(
        ("stage", "samples", "minutes of work", "loss", "at its end"),
        (
            (
                *(name, f"{rows[-1]['samples']:,.0f}", f"{rows[-1]['work'] / 60:.0f}", f"{rows[-1]['loss']:.2f}"),
                "; ".join(f"{MEASURES[key]} {100 * rows[-1][key]:.1f}%" for key in MEASURES if key in rows[-1]),
            )
            for name, rows in stages.items()
        ),
    )


def draw_curve(stages: dict[str, list[dict[str, float]]], path: Path) -> None:
    """A panel for each stage: what it measured against the samples it had seen."""
    figure = Figure(figsize=(2.8 * len(stages), 2.9), layout="constrained")
    for axes, (name, rows) in zip(
        figure.subplots(1, len(stages), sharey=True, squeeze=False)[0], stages.items(), strict=True
    ):
        for key, label in MEASURES.items():
            points = [(row["samples"] / 1000, 100 * row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.5)
        axes.set(title=name, xlabel="samples / 1000", ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6.5, loc="lower right" if name == "words" else "upper left")
    figure.supylabel("%", fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def draw_reliability(figures: dict[str, Any], path: Path) -> None:
    """How often a label is right at each score, where right and wrong labels are equally many."""
    figure = Figure(figsize=(4.2, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color="grey", linewidth=0.8, label="a score that says what it means")
    for style, name in STYLES.items():
        points = figures[style]["reliability"]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=name)
    axes.set(xlabel="mean sigmoid score, %", ylabel="right label, %", xlim=(0, 100), ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def fill(card: str, written: dict[str, str]) -> str:
    """Put each text between its marks.

    Raises:
        ValueError: A mark is missing from the card.
    """
    for name, text in written.items():
        marks = re.compile(rf"(<!-- written: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marks.search(card):
            raise ValueError(f"the card has no part '<!-- written: {name} -->' ... '<!-- end -->'")
        card = marks.sub(lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}", card)
    return card


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of weights and card")
    parser.add_argument("--run", type=Path, required=True, help="folder of the training")
    parser.add_argument("--figures", type=Path, required=True, help="what the evaluation wrote with --json")
    parser.add_argument("--data", type=Path, default=Path("data/pictures"), help="what build_pictures.py wrote")
    options = parser.parse_args()
    mpl.rcParams.update({"svg.hashsalt": "siglip_hf", "font.size": 8})  # the same bytes each time
    try:
        figures, manifest = read_json(options.figures), read_json(options.data / "manifest.json")
        stages = read_curve(options.run)
        square = "fxemoji" in figures
        written = {
            "figures": figures_table(figures) if square else naflex_table(figures),
            "sources": sources_table(manifest),
            "curve": curve_table(stages),
        }
        card = options.checkpoint / "README.md"
        card.write_text(fill(card.read_text(encoding="utf-8"), written), encoding="utf-8")
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    draw_curve(stages, IMAGES / f"{'square' if square else 'naflex'}_learning_curve.svg")
    if square:
        draw_reliability(figures, IMAGES / "reliability.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
