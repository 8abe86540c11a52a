"""``sparsespec bench scheduler``: what the scheduler of a Dask cluster has to do for a run, simulated on one machine.

The scheduler, the client, the tasks and the messages are those of a run over a hundred machines. The workers are not:
all of them live in one process, and a task does nothing but answer with a summary as long as a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sparsespec
from sparsespec.batch.cluster import Cluster
from sparsespec.batch.cluster_worker import Ticket, pack, pack_task, unpack_task
from sparsespec.batch.job import Item, Job
from sparsespec.batch.shard import ShardSummary, ShardTask
from sparsespec.batch.store import LocalStore
from sparsespec.evaluation.benchmark.bench import Bench
from sparsespec.evaluation.benchmark.report import Column, Table
from sparsespec.evaluation.benchmark.soak import slope

__all__ = ["SHARD", "answer", "run"]

SHARD = 512
"""Photographs in a task."""

_PHOTOGRAPHS = 20_000 * SHARD
_QUICK = 500 * SHARD
_MACHINES = (100,)
_QUICK_MACHINES = (4,)
_THREADS = 16
"""Tasks at once on a machine."""
_LOOKS = 100
"""Looks at the scheduler's memory, evenly over the tasks."""
_START_LIMIT = 120.0


def run(bench: Bench) -> list[Table]:
    """Send tasks that do nothing through a scheduler, by the code of real runs."""
    photographs = bench.options.photographs or (_QUICK if bench.quick else _PHOTOGRAPHS)
    tasks = max(1, photographs // SHARD)
    table = Table(
        "scheduler",
        f"A simulation: {tasks:,} tasks of {SHARD} names that do nothing, {_THREADS} at once on each machine",
        (
            Column("machines", "machines, simulated", "count"),
            Column("window", "tasks at once", "count"),
            Column("task_bytes", "a task", "kilobytes"),
            Column("summary_bytes", "its summary", "kilobytes"),
            Column("rate", "tasks per second", "number"),
            Column("scheduler_seconds", "processor time of the scheduler, each", "seconds"),
            Column("client_seconds", "of the client, each", "seconds"),
            Column("before_bytes", "memory of the scheduler before", "megabytes"),
            Column("half_bytes", "half-way", "megabytes"),
            Column("after_bytes", "at the end", "megabytes"),
            Column("growth", "growth per 1,000 tasks, second half", "kilobytes"),
            Column("remark", "remark"),
        ),
    )
    for machines in _QUICK_MACHINES if bench.quick else _MACHINES:
        bench.say(f"scheduler: {tasks:,} tasks, {machines} machines")
        row: dict[str, Any] = {"machines": machines, "ours": True, "status": "done", "remark": ""}
        try:
            row |= _measure(bench.folder / f"scheduler-{machines}", machines, tasks)
        except ImportError as error:
            row |= {"status": "not available", "remark": str(error)}
        except Exception as error:
            row |= {"status": "failed", "remark": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        table.rows.append(row)
    table.notes.append(
        "Simulated: the machines are objects in one process, which shares the processors of this machine with the"
        " scheduler and the client, so that tasks per second are a lower bound. The processor time of the scheduler"
        " is what it takes anywhere: it uses one processor, and 1 divided by that time is the most it can do."
    )
    return [table]


def answer(ticket: Ticket, task: bytes, threads: int | None, crowd: Mapping[str, int]) -> tuple[str, ShardSummary]:
    """Take the place of `sparsespec.batch.cluster_worker.work`."""
    shard = unpack_task(task)
    rows: list[tuple[str, str, str | None, int]] = [(item.path, "done", None, 3) for item in shard.items]
    return "done", ShardSummary(shard.number, rows, len(rows))


class _Idle(Cluster):
    _work = staticmethod(answer)


def _measure(folder: Path, machines: int, tasks: int) -> dict[str, Any]:
    folder.mkdir()
    job = Job(sparsespec.Segmenter(), LocalStore(folder), LocalStore(folder))
    summaries = 0
    resident: list[int] = []
    with _cluster(folder, machines) as (address, scheduler):
        cluster = _Idle(address, connect_limit=60.0, worker_limit=_START_LIMIT)
        results = cluster.summaries(job, _tasks(tasks), stopping=threading.Event())
        # The first answers come when all are connected and looked at.
        next(results)
        before, spent, own = scheduler.memory_info().rss, _processor_seconds(scheduler), time.process_time()
        clock = time.perf_counter()
        for summary in results:
            if len(summary.rows) != SHARD:
                raise RuntimeError(f"shard {summary.number} came back with {len(summary.rows)} rows")
            summaries += 1
            if summaries % max(1, tasks // _LOOKS) == 0:
                resident.append(scheduler.memory_info().rss)
        seconds = time.perf_counter() - clock
        spent, own = _processor_seconds(scheduler) - spent, time.process_time() - own
    if summaries != tasks - 1:
        raise RuntimeError(f"{summaries + 1} of {tasks} tasks came back")
    example = pack_task(next(_tasks(1)))
    ticket = Ticket(sparsespec.__version__, "0" * 16, pack(job))
    return {
        "window": round(1.25 * machines * _THREADS),
        "task_bytes": len(pickle.dumps((ticket, example, None, {"": _THREADS}))),
        "summary_bytes": len(pickle.dumps(answer(ticket, example, None, {}))),
        "tasks": tasks,
        "seconds": seconds,
        "rate": summaries / seconds,
        "scheduler_seconds": spent / summaries,
        "client_seconds": own / summaries,
        "before_bytes": before,
        "half_bytes": resident[len(resident) // 2],
        "after_bytes": resident[-1],
        "growth": slope(resident[len(resident) // 2 :], max(1, tasks // _LOOKS) / 1000),
        "resident": resident,
    }


def _tasks(count: int) -> Iterator[ShardTask]:
    for number in range(count):
        names = (f"archive/2024/05/{number:08d}/IMG_20240517_{photo:06d}" for photo in range(SHARD))
        yield ShardTask(number, tuple(Item(f"{name}.jpg", name, card=False) for name in names))


def _processor_seconds(process: Any) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def _cluster(folder: Path, machines: int) -> Iterator[tuple[str, Any]]:
    """Start a scheduler, and a process with all the workers; give the address and the process of the scheduler."""
    try:
        psutil: Any = importlib.import_module("psutil")  # Dask brings it
        importlib.import_module("distributed")
    except ImportError as error:
        raise ImportError(f"{error}: run pip install 'sparsespec[dask]'") from error
    note = folder / "scheduler.json"
    command = ["-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    command += ["--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(note)]
    started: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as cleanup:
        log = cleanup.enter_context((folder / "log").open("wb"))
        cleanup.callback(_end, started)
        started.append(subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, cwd=folder))
        end = time.monotonic() + _START_LIMIT
        while not (note.is_file() and note.stat().st_size):
            if time.monotonic() > end or started[0].poll() is not None:
                raise RuntimeError(
                    f"the scheduler doesn't start: {(folder / 'log').read_text(errors='replace')[-200:]}"
                )
            time.sleep(0.05)
        address = str(json.loads(note.read_text(encoding="utf-8"))["address"])
        workers = ["-m", "sparsespec.evaluation.benchmark.scheduler", address, str(machines), str(_THREADS)]
        started.append(subprocess.Popen([sys.executable, *workers], stdout=log, stderr=log, cwd=folder))
        yield address, psutil.Process(started[0].pid)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in reversed(processes):
        process.kill()
        process.wait()


async def _work(address: str, machines: int, threads: int) -> None:
    """Be so many workers until the scheduler is gone."""
    import dask
    from distributed import Worker

    # A hundred of them would look at the same process a hundred times.
    dask.config.set({"distributed.worker.profile.enabled": False, "distributed.admin.system-monitor.interval": "60s"})
    with tempfile.TemporaryDirectory(prefix="sparsespec-bench-") as folder:
        workers = [
            Worker(address, nthreads=threads, memory_limit=None, dashboard=False, local_directory=folder, name=number)
            for number in range(machines)
        ]
        await asyncio.gather(*workers)
        await asyncio.gather(*(worker.finished() for worker in workers))


if __name__ == "__main__":
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")
    asyncio.run(_work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
