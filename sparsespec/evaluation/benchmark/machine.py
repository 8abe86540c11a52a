"""What the figures were measured on."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from sparsespec import __version__

__all__ = ["describe"]

_OWN = ("numpy", "scipy", "numba", "pyamg", "onnxruntime", "scikit-image")
PEER_DISTRIBUTIONS = ("scikit-learn", "pynndescent", "ncut-pytorch", "torch")


def describe(threads: int) -> dict[str, Any]:
    """Return processor, threads, memory, system, Python and the versions of all libraries that take part.

    A peer that isn't installed has the version None.
    """
    return {
        "processor": _processor(),
        "threads": threads,
        "memory_gb": _memory_gb(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {"sparsespec": __version__, **{name: version(name) for name in (*_OWN, *PEER_DISTRIBUTIONS)}},
    }


def version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    if distribution == "onnxruntime":
        # Its distributions have several names and one module; of two that are installed the module says whose it is.
        try:
            return str(importlib.import_module(distribution).__version__)
        except ImportError:
            return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown processor"


def _memory_gb() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)
    except (AttributeError, OSError, ValueError):
        return None
