"""Damages every kind of file that the package reads, and counts what becomes of it: found and named, or not.

Bits are flipped and files cut off, with fixed seeds; hostile texts, files that are none, and full disks come on top.
Inputs run in a worker, which is killed when one takes too long. It prints a table and fails if anything passed in
silence, ended in an error that is not one line, or hung. What carries no checksum (a picture, a table, published
weights) cannot tell that a number in it has changed; there, a whole result counts as right.
Run: python scripts/checks/damage.py --inputs 3000
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from damage_kinds import KINDS, MODELS, Kind, tiny_model

VERDICTS = ("right", "named", "silent", "traceback", "hung")
_SECONDS = 300  # for one input, also on a machine with other work; more is a hang
_CUTS = 5  # one input in so many is cut off, the others have a bit flipped


def main() -> int:
    """Parses the options, runs, prints the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    counts = run(options.inputs, options.seed, options.kinds)
    print(table(counts))
    return 1 if any(count[verdict] for count in counts.values() for verdict in VERDICTS[2:]) else 0


def run(inputs: int, seed: int, kinds: list[str]) -> dict[str, Counter[str]]:
    """What became of about so many inputs, by kind."""
    total = sum(KINDS[name].share for name in kinds)
    counts = {}
    for name in kinds:
        counts[name] = Counter(_run_kind(name, max(1, round(inputs * KINDS[name].share / total)), seed))
        print(f"{name}: {dict(counts[name])}", file=sys.stderr, flush=True)
    return counts


def table(counts: dict[str, Counter[str]]) -> str:
    """The counts as Markdown."""
    lines = [f"| kind | tried | {' | '.join(VERDICTS)} |", "|---" * (len(VERDICTS) + 2) + "|"]
    for name, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        lines.append(f"| {name} | {count.total()} | {' | '.join(str(count[verdict]) for verdict in VERDICTS)} |")
    return "\n".join(lines)


def _run_kind(name: str, inputs: int, seed: int) -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    start = 0
    while start < inputs:
        here, there = context.Pipe()
        worker = context.Process(target=_work, args=(there, name, start, inputs, seed))
        worker.start()
        there.close()
        verdict = "hung"
        try:
            here.poll(10 * _SECONDS) and here.recv()  # it is ready
            while start < inputs and here.poll(_SECONDS):
                verdict, what = here.recv()
                start += 1
                if verdict in VERDICTS[2:]:
                    print(f"{name}: {verdict}: {what}", file=sys.stderr, flush=True)
                yield verdict
                verdict = "hung"
        except EOFError:
            verdict = "traceback"  # the process has crashed
        if start < inputs:
            print(f"{name}: {verdict}: input {start}", file=sys.stderr, flush=True)
            start += 1
            yield verdict
        worker.join(0 if start < inputs else _SECONDS)
        worker.kill()
        worker.join()


def _work(pipe: Any, name: str, start: int, inputs: int, seed: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the bars and warnings of libraries
    with tempfile.TemporaryDirectory() as place:
        judged = judge(name, Path(place), range(start, inputs), seed)
        pipe.send(next(judged))
        for result in judged:
            pipe.send(result)


def judge(name: str, place: Path, numbers: range, seed: int) -> Iterator[tuple[str, str]]:
    """Damages files of a kind again and again.

    Args:
        name: the kind.
        place: a folder to work in.
        numbers: of the inputs; each is the same in every run.
        seed: of all inputs.

    Yields:
        "ready", then for each input its verdict, and in words what was damaged and what was said.
    """
    import torch

    torch.set_num_threads(1)
    MODELS[:] = [tiny_model(place / "tiny")]
    kind = KINDS[name]
    whole, folder = place / "whole", place / "damaged"
    whole.mkdir()
    files = [file.relative_to(whole) for file in kind.make(whole)]
    shutil.copytree(whole, folder)
    right = kind.use(folder)
    assert right is not None, f"{name}: the whole files are not read"
    yield "ready", ""
    for number in numbers:
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        rng = random.Random(f"{seed} {name} {number}")
        file = rng.choice(files)
        is_cut, what = _damage(folder / file, rng)
        verdict, said = _judge(kind, folder, right, is_cut)
        yield verdict, f"{file} {what}: {said}"


def _damage(file: Path, rng: random.Random) -> tuple[bool, str]:
    content = bytearray(file.read_bytes())
    if rng.randrange(_CUTS) == 0:
        size = rng.randrange(len(content))
        file.write_bytes(content[:size])
        return True, f"cut off after {size} of {len(content)} bytes"
    place = rng.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
    return False, f"bit {place} flipped"


def _judge(kind: Kind, folder: Path, right: Any, is_cut: bool) -> tuple[str, str]:
    try:
        found = kind.use(folder)
    except (ValueError, OSError) as error:  # what the command line prints as one line
        return ("named", str(error)) if str(error).strip() else ("traceback", repr(error))
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    if found is None:
        return "named", ""
    if found == right or not (kind.checked or (is_cut and kind.cuts)):
        return "right", ""
    return "silent", f"{found} is not {right}"[:500]


if __name__ == "__main__":
    sys.exit(main())
