"""Draws the pictures of README.md and docs/: the demo's contact sheet. Run after the embedded checkpoint changes.

The plot of docs/siglip.md is drawn by scripts/bench/attention.py. Run: python scripts/docs/draw_pictures.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from siglip_hf.cli.main import main as siglip_hf

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "src" / "siglip_hf" / "apps" / "pictures"
SHEET = ROOT / "docs" / "img" / "contact_sheet.png"
WIDTH = 1100
MAX_BYTES = 150_000


def main() -> int:
    """Draws what `make demo` draws, in a size for a web page."""
    code = siglip_hf(
        ["classify", str(PICTURES), "--truth", str(PICTURES / "labels.json"), "--top", "3", "--sheet", str(SHEET)]
    )
    if code:
        return code
    with Image.open(SHEET) as sheet:
        height = round(sheet.height * WIDTH / sheet.width)
        small = sheet.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS)
    small.quantize(128, dither=Image.Dither.NONE).save(SHEET, optimize=True)
    if SHEET.stat().st_size > MAX_BYTES:
        print(f"{SHEET} has {SHEET.stat().st_size} bytes, more than {MAX_BYTES}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
