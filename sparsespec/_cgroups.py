"""The quota of processor time that control groups grant this process, as containers and service managers set it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class _Mount:
    """Where a hierarchy of control groups is seen.

    Attributes
    ----------
    unified
        Version 2, one hierarchy for everything.
    top
        The group that stands at ``folder``: "/", or in a container often its own group.
    folder
        The folder.
    """

    unified: bool
    top: PurePosixPath
    folder: Path


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the processors' worth of time that this process is granted.

    A group can't use more than any of the groups it lies in, so the smallest quota counts of the group of this process
    and of all above it that can be seen from here. Version 2 (``cpu.max``) and version 1 (``cpu.cfs_quota_us``) are
    read, both where a machine has both.

    Parameters
    ----------
    root : Path
        The folder that holds ``proc`` and ``sys``.

    Returns
    -------
    float or None
        Processors, not whole; None without a quota, or where there are no control groups.
    """
    groups = dict(_groups(root / "proc/self/cgroup"))
    quotas = []
    for mount in _mounts(root):
        group = groups.get(mount.unified)
        for folder in _chain(mount, group):
            quota = _quota_v2(folder) if mount.unified else _quota_v1(folder)
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _groups(file: Path) -> Iterator[tuple[bool, PurePosixPath]]:
    """Yield the groups of this process that count processor time, and whether each is of version 2."""
    for line in _lines(file):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number == "0" and not controllers) or "cpu" in controllers.split(","):
            yield not controllers, PurePosixPath(path)


def _mounts(root: Path) -> list[_Mount]:
    mounts = []
    for line in _lines(root / "proc/self/mountinfo"):
        # "31 23 0:28 TOP FOLDER OPTIONS [optional ...] - TYPE SOURCE OPTIONS"
        before, _, after = line.partition(" - ")
        place, kind = before.split(), after.split()
        if len(place) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" or (kind[0] == "cgroup" and "cpu" in kind[2].split(",")):
            top, folder = (_unescaped(part) for part in place[3:5])
            mounts.append(_Mount(kind[0] == "cgroup2", PurePosixPath(top), root / folder.lstrip("/")))
    if not mounts:
        # Without that list: where they usually are.
        whole = PurePosixPath("/")
        usual = root / "sys/fs/cgroup"
        mounts = [
            _Mount(True, whole, usual),
            _Mount(False, whole, usual / "cpu"),
            _Mount(False, whole, usual / "cpu,cpuacct"),
        ]
    return mounts


def _chain(mount: _Mount, group: PurePosixPath | None) -> Iterator[Path]:
    """Yield the folders of a group and of those above it, as far as they are seen."""
    below: tuple[str, ...] = ()
    # A group outside what is mounted ("/../.."), or unknown: what is mounted is then a container's own.
    if group is not None and ".." not in group.parts and group.is_relative_to(mount.top):
        below = group.relative_to(mount.top).parts
    for depth in range(len(below), -1, -1):
        yield mount.folder.joinpath(*below[:depth])


def _quota_v2(folder: Path) -> float | None:
    try:
        limit, period = (folder / "cpu.max").read_text(encoding="ascii").split()[:2]
        return None if limit == "max" else _share(float(limit), float(period))
    except (OSError, ValueError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        limit, period = (
            float((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii")) for name in ("quota", "period")
        )
        return _share(limit, period)
    except (OSError, ValueError):
        return None


def _share(limit: float, period: float) -> float | None:
    return limit / period if limit > 0 and period > 0 else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(path: str) -> str:
    # Blanks are written as octal numbers there.
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path
