"""Resident memory of this process, now and at its highest."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

__all__ = ["current_bytes", "peak_bytes", "reset_peak"]

_STATUS = Path("/proc/self/status")


def current_bytes() -> int | None:
    """Resident memory now; None where the system doesn't say."""
    return _field("VmRSS:")


def peak_bytes() -> int | None:
    """Most resident memory since the process began, or since :func:`reset_peak`; None where the system doesn't say."""
    # Not getrusage on Linux: a process inherits the peak of the one that started it.
    found = _field("VmHWM:")
    if found is None and sys.platform == "darwin":
        import resource

        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def reset_peak() -> None:
    """Begin a new peak, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _field(name: str) -> int | None:
    try:
        text = _STATUS.read_text(encoding="ascii")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None
