from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsespec.batch.cluster import Cluster
from sparsespec.batch.cluster_worker import Ticket, pack_task
from sparsespec.evaluation.benchmark import Options, scheduler


def bench(folder: Path, **options: Any) -> Any:
    said: list[str] = []
    return SimpleNamespace(
        options=Options(quick=True, **options), folder=folder, quick=True, say=said.append, said=said
    )


@pytest.mark.slow
def test_tasks_go_through_a_real_scheduler(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="distributed is not installed")
    (table,) = scheduler.run(bench(tmp_path, photographs=120 * scheduler.SHARD))
    (row,) = table.rows
    assert row["status"] == "done", row["remark"]
    assert (row["machines"], row["tasks"]) == (4, 120)
    assert row["rate"] > 0
    assert 0 < row["scheduler_seconds"] < 1
    assert len(row["resident"]) >= 100
    assert row["before_bytes"] > 10e6
    assert "simulation" in table.title
    assert "| machines, simulated |" in table.to_markdown()


def test_without_distributed_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    (table,) = scheduler.run(bench(tmp_path))
    (row,) = table.rows
    assert row["status"] == "not available"
    assert "sparsespec[dask]" in row["remark"]


def test_a_scheduler_that_fails_is_a_row_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, machines: int, tasks: int) -> None:
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(scheduler, "_measure", fail)
    (table,) = scheduler.run(bench(tmp_path))
    assert [(row["status"], row["remark"]) for row in table.rows] == [("failed", "RuntimeError: no room")]


def test_only_the_work_itself_is_replaced() -> None:
    assert issubclass(scheduler._Idle, Cluster)
    assert set(vars(scheduler._Idle)) - {"__module__", "__doc__", "__annotations__"} <= {
        "_work",
        "__static_attributes__",
        "__firstlineno__",
    }
    task = next(scheduler._tasks(1))
    assert len(task.items) == scheduler.SHARD
    kind, summary = scheduler.answer(Ticket("0", "run", b""), pack_task(task), None, {})
    assert kind == "done"
    assert [row[0] for row in summary.rows] == [item.path for item in task.items]
