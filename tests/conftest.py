from __future__ import annotations

import os
from pathlib import Path

import pytest

# Several test processes with threads of their own for small matrices wait for each other most of the time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Processes that tests start must import the installed package, not the checkout they happen to stand in, where cli/ and
# models/ are not yet where they are imported from.
os.environ["PYTHONSAFEPATH"] = "1"

_SHARED = "SPARSESPEC_SHARED"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Photographs and reference numbers that are too large, or not free enough, to live in the project."""
    here = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get(_SHARED, here.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"measuring data not found: no folder 'shared' beside the checkout and {_SHARED} is not set")
    return folder
