"""Folders of every class, written once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from . import families


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory) -> Callable[..., Path]:
    """`folder_of(name, dtype)`: a folder that `save_pretrained` wrote for a class, the same for all tests."""
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def folder(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in folders:
            folders[name, dtype] = families.save(name, tmp_path_factory.mktemp(name), dtype)
        return folders[name, dtype]

    return folder
