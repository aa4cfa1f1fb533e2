"""Measures the peak memory of every reader of pictures on 24 pictures of 13000 x 13000 pixels.

Each reader runs in a fresh process. A third of the pictures are JPEG, a third RGB and a third RGBA in PNG. Fails if one
takes 1.5 GB. Run: python scripts/checks/memory.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COUNT, SIDE = 24, 13_000
MOST_BYTES = 1.5e9


def main() -> int:
    """Parses the options, runs, prints the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=SIDE, help="of the pictures, in pixels")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--in", dest="folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        os.chdir(options.folder)
        return READERS[options.readers[0]]() or 0
    print(f"| reader | peak memory of {COUNT} pictures of {options.side} x {options.side} | seconds |\n|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        run(["-c", f"import memory; memory.write_pictures({options.side})"], folder)
        for reader in options.readers:
            began = time.monotonic()
            code, peak = run([__file__, "--readers", reader, "--in", folder], folder)
            # Exit code 1: pictures were skipped, named. That is right for pages, which take no such pictures.
            bad = peak >= MOST_BYTES or code not in (0, 1)
            failed |= bad
            words = f"{peak / 1e9:.2f} GB" + f" FAILED (exit code {code})" * bad
            print(f"| {reader} | {words} | {time.monotonic() - began:.0f} |", flush=True)
    return 1 if failed else 0


def run(arguments: list[str], folder: str) -> tuple[int, int]:
    """Runs Python, with its output in a file; the exit code, and the peak memory of it and of what it started."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    with open(Path(folder, "log"), "a") as log:
        process = subprocess.Popen([sys.executable, *arguments], cwd=folder, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code not in (0, 1):
        print(Path(folder, "log").read_text()[-2000:], file=sys.stderr)
    return code, usage.ru_maxrss * 1024


def write_pictures(side: int) -> None:
    """Writes `COUNT` pictures in class folders, and a table with their captions."""
    from PIL import Image

    whole = Image.new("RGBA", (side, side), (200, 30, 30, 128))  # one colour is decoded fastest
    whole.save("rgba.png", compress_level=1)
    rgb = whole.convert("RGB")
    rgb.save("rgb.png", compress_level=1)
    rgb.save("rgb.jpg")
    rows = ["path,text"]
    for number in range(COUNT):
        source = ("rgb.jpg", "rgb.png", "rgba.png")[number % 3]
        target = Path("photos", f"class {chr(97 + number % 4)}", f"{number}{Path(source).suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
        rows.append(f"{target},picture {number}")
    Path("captions.csv").write_text("\n".join(rows))


def _paths() -> list[str]:
    return sorted(map(str, Path("photos").rglob("*.*")))


def _cli(*arguments: str) -> Callable[[], int]:
    def call() -> int:
        from siglip_hf.cli.main import main as command_line

        return command_line(list(arguments))

    return call


def _processor(name: str) -> Callable[[], None]:
    def call() -> None:
        import siglip_hf

        inputs: Any = getattr(siglip_hf, name)()(images=_paths(), return_tensors="pt")
        assert len(inputs["pixel_values"]) == COUNT

    return call


def _pipeline() -> None:
    from transformers import pipeline

    import siglip_hf

    classify = pipeline("zero-shot-image-classification", model=siglip_hf.default_checkpoint())
    assert len(classify(_paths(), candidate_labels="a cat, a dog", batch_size=8)) == COUNT


def _embedder() -> None:
    import siglip_hf

    assert len(siglip_hf.SiglipEmbedder().embed_images("photos")) == COUNT


def _verify() -> int:
    import siglip_hf

    return _cli("verify", siglip_hf.default_checkpoint(), *_paths())()


def _serve() -> None:
    """What the server does with as many uploads at once, if it is told to take them."""
    import asyncio

    import httpx2 as httpx

    from siglip_hf.serving.app import create_app
    from siglip_hf.serving.settings import Limits, Settings

    app = create_app(Settings(limits=Limits(pixels=200_000_000, seconds=3600)))

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=None) as client:
            posts = [
                client.post(
                    "/v1/embeddings", files={"image": Path(path).read_bytes()}, data={"encoding_format": "float"}
                )
                for path in _paths()
            ]
            return await asyncio.gather(*posts)

    replies = asyncio.run(ask())
    assert [reply.status_code for reply in replies] == [200] * COUNT, replies[0].text[:500]


def _pages() -> None:
    """What the pages do with uploads, and with the pictures of results, for eight visitors at once."""
    from concurrent.futures import ThreadPoolExecutor

    from siglip_hf.apps.page import read_upload
    from siglip_hf.apps.search import read_hit
    from siglip_hf.preprocessing.image_intake import PictureError

    def visit(path: str) -> bool:
        try:
            read_upload(path)
        except PictureError:
            read_hit(os.path.abspath(path))
            return True
        return False

    with ThreadPoolExecutor(8) as visitors:
        assert all(visitors.map(visit, _paths())), "uploads of this size are refused"


# Eight are measured before and after, sixteen are trained on.
_TRAIN = ("train", "captions.csv", "--steps", "2", "--batch-size", "8", "--hold-out", "8", "--cpu", "--workers", "0")
READERS: dict[str, Callable[[], int | None]] = {
    "processor, SiglipImageProcessor": _processor("SiglipImageProcessor"),
    "processor, SiglipImageProcessorFast": _processor("SiglipImageProcessorFast"),
    "processor, Siglip2ImageProcessor": _processor("Siglip2ImageProcessor"),
    "processor, Siglip2ImageProcessorFast": _processor("Siglip2ImageProcessorFast"),
    "pipeline": _pipeline,
    "classify --sheet": _cli("classify", "photos", "--labels", "a cat, a dog", "--sheet", "sheet.png"),
    "embed": _cli("embed", "photos", "--out", "photos.emb"),
    "index": _cli("index", "photos", "--out", "photos.idx"),
    "search --image --sheet": _cli("search", "photos.idx", "--image", "rgba.png", "-k", "24", "--sheet", "found.png"),
    "evaluate": _cli("evaluate", "photos"),
    "train": _cli(*_TRAIN, "--out", "run"),
    "train --augment crop,flip,color": _cli(*_TRAIN, "--out", "augmented", "--augment", "crop,flip,color"),
    "learn": _cli("learn", "photos", "--out", "head"),
    "SiglipEmbedder": _embedder,
    "verify": _verify,
    "serve, uploads at once": _serve,
    "pages, 8 visitors": _pages,
}

if __name__ == "__main__":
    sys.exit(main())
