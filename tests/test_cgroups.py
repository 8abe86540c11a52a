from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsespec import _threads
from sparsespec._cgroups import cpu_quota

V2 = "30 20 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct"
V1_FOLDER = "sys/fs/cgroup/cpu,cpuacct"


def machine(root: Path, groups: str, mounts: str | None, quotas: dict[str, str]) -> Path:
    """Make up what a kernel shows: groups of the process, what is mounted, and limits by folder."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    if mounts is not None:
        (root / "proc/self/mountinfo").write_text(mounts + "\n")
    for folder, limit in quotas.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        if folder.startswith(V1_FOLDER):
            quota, period = limit.split()
            (root / folder / "cpu.cfs_quota_us").write_text(quota + "\n")
            (root / folder / "cpu.cfs_period_us").write_text(period + "\n")
        else:
            (root / folder / "cpu.max").write_text(limit + "\n")
    return root


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({}, None),
        ({"": "200000 100000"}, 2.0),
        ({"": "max 100000"}, None),
        ({"a/b": "150000 100000"}, 1.5),
        ({"a/b": "max 100000", "a": "50000 100000"}, 0.5),
        ({"a/b": "300000 100000", "a": "max 100000", "": "100000 50000"}, 2.0),
        ({"a/b": "300000 100000", "a": "400000 100000"}, 3.0),
        # A neighbour's limit, and one below this group.
        ({"a/b": "300000 100000", "c": "100000 100000", "a/b/d": "100000 100000"}, 3.0),
        ({"a/b": "nonsense"}, None),
        ({"a/b": ""}, None),
        ({"a/b": "100000 0"}, None),
    ],
)
def test_version_2(tmp_path: Path, quotas: dict[str, str], expected: float | None) -> None:
    folders = {f"sys/fs/cgroup/{name}": limit for name, limit in quotas.items()}
    assert cpu_quota(machine(tmp_path, "0::/a/b\n", V2, folders)) == expected


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({}, None),
        ({"": "200000 100000"}, 2.0),
        ({"docker/x": "-1 100000"}, None),
        ({"docker/x": "-1 100000", "docker": "250000 100000"}, 2.5),
        ({"docker/x": "100000 100000", "docker": "250000 100000"}, 1.0),
        ({"docker/x": "100000 0"}, None),
    ],
)
def test_version_1(tmp_path: Path, quotas: dict[str, str], expected: float | None) -> None:
    groups = "5:memory:/elsewhere\n3:cpu,cpuacct:/docker/x\n2:cpuset:/other\n1:name=systemd:/init\n"
    folders = {f"{V1_FOLDER}/{name}": limit for name, limit in quotas.items()}
    assert cpu_quota(machine(tmp_path, groups, V1, folders)) == expected


def test_container_whose_own_group_is_mounted(tmp_path: Path) -> None:
    # The group is named as the host sees it, and only what lies below the mounted one is there.
    mounts = V1.replace(" / /sys", " /docker/x /sys")
    quotas = {V1_FOLDER: "300000 100000", f"{V1_FOLDER}/inner": "200000 100000"}
    assert cpu_quota(machine(tmp_path / "1", "3:cpu,cpuacct:/docker/x/inner\n", mounts, quotas)) == 2.0
    assert cpu_quota(machine(tmp_path / "2", "3:cpu,cpuacct:/docker/x\n", mounts, quotas)) == 3.0
    # A group outside of it: what is mounted counts.
    assert cpu_quota(machine(tmp_path / "3", "3:cpu,cpuacct:/docker/y\n", mounts, quotas)) == 3.0


def test_group_above_the_namespace(tmp_path: Path) -> None:
    quotas = {"sys/fs/cgroup": "100000 100000"}
    assert cpu_quota(machine(tmp_path, "0::/../../elsewhere\n", V2, quotas)) == 1.0


def test_both_versions_at_once(tmp_path: Path) -> None:
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    quotas = {f"{V1_FOLDER}/a": "400000 100000", "sys/fs/cgroup/unified/b": "300000 100000"}
    root = machine(tmp_path, "3:cpu,cpuacct:/a\n0::/b\n", f"{V1}\n{unified}", quotas)
    assert cpu_quota(root) == 3.0


def test_mounted_elsewhere_under_a_name_with_a_blank(tmp_path: Path) -> None:
    mounts = V2.replace("/sys/fs/cgroup", "/my\\040groups")
    assert cpu_quota(machine(tmp_path, "0::/a\n", mounts, {"my groups/a": "100000 50000"})) == 2.0


def test_without_a_list_of_mounts(tmp_path: Path) -> None:
    quotas = {"sys/fs/cgroup/a": "100000 50000"}
    assert cpu_quota(machine(tmp_path, "0::/a/gone\n", None, quotas)) == 2.0


def test_without_anything(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (0.2, 1), (1.0, 1), (1.5, 2), (7.9, 8), (64.0, 8)])
def test_the_smaller_of_quota_and_affinity(monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(_threads, "cpu_quota", lambda: quota)
    assert _threads.available_cpus() == expected


_COUNT = """
from sparsespec._threads import available_cpus
from sparsespec.backbone import Backbone
{}
print(available_cpus(), Backbone().threads)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no scheduler affinity")
def test_a_real_affinity() -> None:
    one = min(os.sched_getaffinity(0))
    code = _COUNT.format(f"import os; os.sched_setaffinity(0, [{one}])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1", "1"]


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A control group that is granted half a processor."""
    top = Path("/sys/fs/cgroup")
    unified = (top / "cgroup.controllers").exists()
    group = (top if unified else top / "cpu") / f"sparsespec-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            if unified:
                (group / "cpu.max").write_text("50000 100000")
            else:
                (group / "cpu.cfs_quota_us").write_text("50000")
        except OSError as error:
            pytest.skip(f"a control group can be made here, but not limited: {error}")
        (group / "inner").mkdir()
        yield group / "inner"
    finally:
        for folder in (group / "inner", group):
            if folder.exists():
                folder.rmdir()


def test_a_real_control_group(real_group: Path) -> None:
    # The process is in a group without a limit of its own, below one that has it.
    enter = f"open({str(real_group / 'cgroup.procs')!r}, 'w').write('0')"
    code = "from sparsespec._cgroups import cpu_quota; print(cpu_quota())"
    done = subprocess.run(
        [sys.executable, "-c", f"{enter}\n{code}\n{_COUNT.format('')}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.5", "1", "1"]
