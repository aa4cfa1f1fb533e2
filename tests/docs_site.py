"""Builds the documentation, for the tests that look at its pages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Builds the site into a folder, without running the notebooks; its output tells the warnings."""
    for package in ("mkdocs", "material", "mkdocs_static_i18n", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement, which strict mode does not count
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
