"""How many processors this process may use: one answer for ONNX Runtime and Numba alike."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1 = Path("/sys/fs/cgroup/cpu")


def available_cpus() -> int:
    """Count the processors granted to this process.

    The smallest of the scheduler affinity and the control group's quota, since libraries that ask the operating system
    for "all cores" take the host's and ignore both.

    Returns
    -------
    int
        At least 1.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _cgroup_quota()
    if quota is not None:
        count = min(count, max(1, math.ceil(quota)))
    return max(1, count)


def _cgroup_quota() -> float | None:
    try:
        limit, period = _CGROUP_V2.read_text().split()[:2]
        return None if limit == "max" else float(limit) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        pass
    try:
        limit_us = float((_CGROUP_V1 / "cpu.cfs_quota_us").read_text())
        period_us = float((_CGROUP_V1 / "cpu.cfs_period_us").read_text())
        return limit_us / period_us if limit_us > 0 and period_us > 0 else None
    except (OSError, ValueError):
        return None
