"""Everything that only a GPU can show, in one command and under eight minutes: `make gpu`, or

    python scripts/bench/gpu.py                          # results/gpu.md and results/gpu.json grow as it goes
    python scripts/bench/gpu.py --device cpu --tiny      # the rehearsal: every step on a CPU; its figures mean nothing
    python scripts/bench/gpu.py --only loss towers       # some of the steps
    python scripts/bench/gpu.py --draw results           # the towers' speed-up as a picture, from results/gpu.json

Each step is a process of its own with a time limit of its own. What it measured before it fails or is stopped is kept,
and the next step starts. The steps are in `gpu_steps.py`; docs/gpu.md says what each is to prove.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """A step: a generator function of a module, and the seconds that it may take."""

    name: str
    limit: float
    module: str = "gpu_steps"


#: The most important first; the last takes what time is left.
STEPS = (
    Step("environment", 40),
    Step("parity", 60),
    Step("tests", 90),
    Step("loss", 75),
    Step("large_loss", 75),
    Step("towers", 150),
    Step("naflex", 30),
    Step("folder", 45),
    Step("four_bit", 40),
    Step("training", 40),
    Step("checkpoint", 600),
)


@dataclass(frozen=True)
class Options:
    """What a step is told.

    Attributes:
        device: "cuda" or "cpu".
        tiny: Shapes that a CPU computes in a moment.
        folder: Where results and notes from step to step are.
        seconds: How long the step may take.
    """

    device: str
    tiny: bool
    folder: str
    seconds: float = 60.0


def row(
    what: str,
    value: Any,
    unit: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    holds: tuple[str, bool] | None = None,
) -> dict[str, Any]:
    """One measured figure, with the aim and whether it is met: a bound, or words and an answer."""
    if at_least is not None:
        holds = (f">= {at_least:g}", value >= at_least)
    elif at_most is not None:
        holds = (f"<= {at_most:g}", value <= at_most)
    aim, held = holds or ("", None)
    return {"what": what, "value": value, "unit": unit, "aim": aim, "held": held}


def run_steps(steps: tuple[Step, ...], options: Options, minutes: float, stretch: float = 1.0) -> list[dict[str, Any]]:
    """Runs the steps in order and writes what they measure as it comes; all limits are multiplied by `stretch`.

    Returns:
        For each step its name, state ("ok", "failed", "stopped" or "no time"), seconds, rows, and a note on a failure.
    """
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes * stretch
    results: list[dict[str, Any]] = []
    context = multiprocessing.get_context("fork" if options.device == "cpu" else "spawn")
    if options.device == "cpu":  # the steps share one import of the libraries; CUDA would not survive a fork
        for module in {step.module for step in steps}:
            with contextlib.suppress(Exception):  # a step whose module does not import says so itself
                importlib.import_module(module)
    for step in steps:
        left = end - time.monotonic()
        result = {"step": step.name, "state": "no time", "seconds": 0.0, "rows": [], "note": ""}
        results.append(result)
        if left > 0:
            _run_step(step, options, min(step.limit * stretch, left), context, result, results)
        _write(folder, results)
        print(f"{step.name:12} {result['state']:8} {result['seconds']:6.1f} s  {result['note']}", flush=True)
    return results


def _run_step(
    step: Step, options: Options, limit: float, context: Any, result: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    """Runs one step to its end or its limit, and fills in its result."""
    folder = Path(options.folder)
    rows, log = folder / f"{step.name}.jsonl", folder / f"{step.name}.log"
    rows.unlink(missing_ok=True)
    told = Options(**{**asdict(options), "seconds": limit})
    start = time.monotonic()
    process = context.Process(target=_in_process, args=(step, told), name=step.name)
    process.start()
    while process.is_alive() and time.monotonic() - start < limit:
        process.join(0.5)
        result["seconds"] = time.monotonic() - start
        if len(found := _read(rows)) > len(result["rows"]):
            result["rows"] = found
            _write(folder, results)
    if stopped := process.is_alive():
        # With what it has started; it leads a group of its own once it runs.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    result["seconds"] = time.monotonic() - start
    result["rows"] = _read(rows)
    if stopped:
        result.update(state="stopped", note=f"after {limit:.0f} s, its limit; see {log.name}")
    elif process.exitcode:
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        result.update(state="failed", note=lines[-1][:200] if lines else f"exit code {process.exitcode}")
    else:
        result["state"] = "ok"


def _in_process(step: Step, options: Options) -> None:
    """In the step's process: its words go to a log, its rows to a file, one line each."""
    with contextlib.suppress(PermissionError):
        os.setsid()
    with open(Path(options.folder, f"{step.name}.log"), "w", buffering=1) as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno() if hasattr(stream, "fileno") else 1)
        try:
            with open(Path(options.folder, f"{step.name}.jsonl"), "w", buffering=1) as rows:
                for found in getattr(importlib.import_module(step.module), step.name)(options):
                    rows.write(json.dumps(found) + "\n")
        except BaseException:
            log.write(traceback.format_exc())
            log.flush()
            os._exit(1)


def _read(file: Path) -> list[dict[str, Any]]:
    """The rows so far; a line that is being written is left for the next time."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _write(folder: Path, results: list[dict[str, Any]]) -> None:
    """Results as JSON and as one Markdown table."""
    (folder / "gpu.json").write_text(json.dumps(results, indent=1))
    (folder / "gpu.md").write_text(table(results))


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table: a line per figure, and one per step for its state."""
    lines = ["| step | what | measured | aim | holds |", "|---|---|---|---|---|"]
    for result in results:
        for found in result["rows"]:
            value = found["value"]
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            held = {None: "", True: "yes", False: "no"}[found["held"]]
            cells = (result["step"], found["what"], f"{shown} {found['unit']}".strip(), found["aim"], held)
            lines.append(f"| {' | '.join(cells)} |")
        note = result["note"].replace("|", "/")
        lines.append(f"| {result['step']} | {result['state']} | {result['seconds']:.1f} s | {note} | |")
    return "\n".join(lines) + "\n"


def draw(folder: Path) -> Path:
    """The towers' rates over stock's, as bars: FOLDER/gpu_towers.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = {result["step"]: result["rows"] for result in json.loads((folder / "gpu.json").read_text())}
    found = [(found["what"], found["value"]) for found in results.get("towers", []) if found["unit"] == "x stock sdpa"]
    if not found:
        raise SystemExit(f"{folder / 'gpu.json'} has no figures of the towers: run the step `towers` first.")
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(found) + 1), layout="constrained")
    bars = axes.barh([what for what, _ in found][::-1], [value for _, value in found][::-1])
    axes.bar_label(bars, fmt="%.2f")
    axes.axvline(1, color="gray", linestyle="--")
    axes.set(xlabel="times as fast as transformers with sdpa")
    figure.savefig(folder / "gpu_towers.png", dpi=110)
    return folder / "gpu_towers.png"


def main() -> int:
    """Parses the options and runs the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--minutes", type=float, default=8, help="for all steps together (default: %(default)s)")
    parser.add_argument("--stretch", type=float, default=1, help="multiply all time limits, on a busy machine")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="some of the steps")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw the towers' speed-up, and do nothing else")
    arguments = parser.parse_args()
    if arguments.draw:
        print(draw(arguments.draw))
        return 0
    steps = tuple(step for step in STEPS if not arguments.only or step.name in arguments.only)
    options = Options(arguments.device, arguments.tiny, str(arguments.out))
    results = run_steps(steps, options, arguments.minutes, arguments.stretch)
    print((arguments.out / "gpu.md").read_text())
    return int(any(result["state"] in ("failed", "stopped") for result in results))


if __name__ == "__main__":
    sys.exit(main())
