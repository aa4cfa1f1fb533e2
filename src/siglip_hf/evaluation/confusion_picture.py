"""A picture of which class is taken for which."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siglip_hf.extras import missing
from siglip_hf.files import new_file

if TYPE_CHECKING:
    from siglip_hf.evaluation.zero_shot import ZeroShotAccuracy

#: Classes that a reader can tell apart on a page; of more, those with the most mistakes are drawn.
MAX_CLASSES = 60


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("the confusion picture needs matplotlib", "train") from error
    return Figure(figsize=(width, height), layout="constrained")


def check_picture_file(path: str | os.PathLike[str]) -> None:
    """Refuses what would fail only after all pictures are read.

    Args:
        path: where a picture is to be written.

    Raises:
        ValueError: if no such picture can be written.
    """
    path = Path(path)
    endings = _figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in endings:
        raise ValueError(f"{path}: no picture format has this ending; use .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{path}: this is a folder; give the name of a picture file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path}: it cannot be written there")


def draw_confusion(accuracy: ZeroShotAccuracy, path: str | os.PathLike[str]) -> None:
    """Draws a matrix, a row for each right class and a column for each given one, as shares of the row.

    Of more than `MAX_CLASSES` classes those are drawn that have the most mistakes, as the right or the given class.

    Args:
        accuracy: what to draw.
        path: the file, of any format that matplotlib writes.
    """
    counts = accuracy.counts()
    involved: dict[int, int] = {}
    pictures: dict[int, int] = {}
    for (right, given), count in counts.items():
        pictures[right] = pictures.get(right, 0) + count
        for number in (right, given):
            involved[number] = involved.get(number, 0) + (count if right != given else 0)
    total = len(involved)
    worst = sorted(involved, key=lambda number: (-involved[number], number))[:MAX_CLASSES]
    shown = sorted(worst, key=lambda number: (accuracy.labels[number], number))
    shares = [[counts[row, column] / max(pictures.get(row, 0), 1) for column in shown] for row in shown]

    side = 2.5 + 0.3 * len(shown)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [accuracy.labels[number] for number in shown]
    axes.set_xticks(range(len(shown)), names, rotation=90)
    axes.set_yticks(range(len(shown)), names)
    axes.set_xlabel("given label")
    axes.set_ylabel("right label")
    if len(shown) <= 25:
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                if share:
                    colour = "white" if share > 0.5 else "black"
                    axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=6, color=colour)
    title = f"top-1 {accuracy.top(1):.1%} of {len(accuracy.truth)} pictures"
    if total > len(shown):
        title += f"; the {len(shown)} of {total} classes with the most mistakes"
    axes.set_title(title)
    figure.colorbar(drawn, shrink=0.7, label="share of the right label's pictures")
    with new_file(path) as partial:
        figure.savefig(partial, format=os.path.splitext(path)[1][1:].lower(), dpi=120)
