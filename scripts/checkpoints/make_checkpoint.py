"""Make both embedded checkpoints from nothing and measure them: pictures, square training, NaFlex training, evaluation.

Usage: python scripts/checkpoints/make_checkpoint.py [--minutes 240] [--device cpu] [--work runs] [--data data/pictures]

What is done already is kept: start it again and it goes on. Nothing of the package is replaced; the checkpoints are
WORK/default/checkpoint and WORK/naflex/checkpoint, and their figures WORK/default.json and WORK/naflex.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
#: Shares of the minutes; what is left is for pictures and evaluation.
SQUARE, NAFLEX = 0.78, 0.15


def commands(minutes: float, device: str, work: Path, data: Path) -> list[list[str]]:
    """The scripts to run, in order, each with its options."""
    square, naflex = work / "default", work / "naflex"
    pictures = ["--data", str(data)]
    return [
        ["build_pictures.py", "--out", str(data)],
        ["train_default.py", *pictures, "--run", str(square), "--minutes", f"{SQUARE * minutes:g}", "--device", device],
        [
            *("train_naflex.py", *pictures, "--run", str(naflex), "--minutes", f"{NAFLEX * minutes:g}"),
            *("--device", device, "--square", str(square / "checkpoint")),
        ],
        [
            *("evaluate_default.py", *pictures, "--model", str(square / "checkpoint")),
            *("--json", str(work / "default.json")),
        ],
        [
            *("evaluate_naflex.py", *pictures, "--model", str(naflex / "checkpoint")),
            *("--square", str(square / "checkpoint"), "--json", str(work / "naflex.json")),
        ],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=240, help="on idle cores (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/pictures"), help="folder of the pictures")
    arguments = parser.parse_args()
    for script, *options in commands(arguments.minutes, arguments.device, arguments.work, arguments.data):
        print(f"== {script} {' '.join(options)}", flush=True)
        code = subprocess.call([sys.executable, str(HERE / script), *options])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
