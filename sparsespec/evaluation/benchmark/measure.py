"""Runs contenders against each other: each in a process of its own, warmed up, in turns, under a time limit.

A process of its own means that a contender that hangs can be stopped, that one that runs out of memory takes nothing
with it, that none meets the thread pools of another, and that its peak of memory is its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

__all__ = ["ENOUGH", "Contender", "Outcome", "Workers"]

_STATUSES = ("done", "not reached", "out of time", "failed", "missing", "not run", "not available")
# Importing and compiling is not measured, but must end.
_PREPARE_LIMIT = 300.0
# Runs that took this long together are not disturbed by what else goes on for a moment: enough of them.
ENOUGH = 6.0
_PAUSE = 0.05


@dataclass(frozen=True)
class Contender:
    """What is to be run.

    Attributes
    ----------
    task
        A name of :data:`sparsespec.evaluation.benchmark.jobs.TASKS`.
    inputs
        Files (.npy) and plain values that the task works on.
    family
        Contenders of one family may share a process, one after the other.
    """

    task: str
    inputs: Mapping[str, Any]
    family: str


@dataclass
class Outcome:
    """What came of a contender.

    Attributes
    ----------
    status
        "done"; "not reached": it gave an answer, but not as good as asked; "out of time"; "failed"; "missing": not
        installed; "not run"; "not available": this version has no such thing.
    seconds
        Of the fastest run. For "out of time": what it was given, and did not keep within.
    result
        What the fastest run gave, plain values.
    runs
        ``(seconds, result)`` of every run.
    peak_bytes, base_bytes
        Resident memory of its process at the highest during its first run, and just before it.
    remark
        A sentence for the table.
    """

    status: str
    seconds: float | None = None
    result: dict[str, Any] = field(default_factory=dict)
    runs: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    peak_bytes: int | None = None
    base_bytes: int | None = None
    remark: str = ""

    def __post_init__(self) -> None:
        if self.status not in _STATUSES:
            raise ValueError(f"status must be one of {', '.join(_STATUSES)}, not {self.status!r}")


class _Stopped(Exception):
    """The worker gave no answer; its text says why."""


class _OutOfTime(_Stopped):
    """It gave none within the limit."""


class _Worker:
    """A process that prepares and runs tasks, one at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sparsespec.evaluation.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **environment},
            text=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, limit: float, **question: Any) -> dict[str, Any]:
        """Send one question, return its answer.

        Raises
        ------
        _Stopped
            The task raised or the process ended.
        _OutOfTime
            No answer within the limit; the process has been ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise _OutOfTime(f"stopped after {limit:g} s") from None
        except OSError:
            line = ""
        if not line:
            code = self._process.wait()
            raise _Stopped(f"its process ended ({'signal' if code < 0 else 'code'} {abs(code)}){self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _Stopped(answer["error"])
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        # Closing what it still reads would fail there. The end has come, unless the process left children behind.
        self._listener.join(timeout=5.0)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._errors.close()


class Workers:
    """The processes of one benchmark; a context manager that ends them.

    Parameters
    ----------
    threads
        That every contender may use, whatever library it uses them in.
    """

    def __init__(self, threads: int) -> None:
        # BLAS has one thread: its matrices are tall and thin, and with more each of ARPACK's products, ours and the
        # peers', takes several times as long. PyTorch has its threads from OpenMP and MKL.
        self._environment = {f"{name}_NUM_THREADS": str(threads) for name in ("NUMBA", "OMP", "MKL")}
        self._environment |= {"OPENBLAS_NUM_THREADS": "1", "VECLIB_MAXIMUM_THREADS": "1"}
        # The package that was installed is measured, not a checkout that the command happens to be started in.
        self._environment["PYTHONSAFEPATH"] = "1"
        self._workers: dict[str, _Worker] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def race(
        self,
        contenders: Mapping[str, Contender],
        *,
        repeats: int,
        limit: float,
        fresh: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        enough: float = ENOUGH,
    ) -> dict[str, Outcome]:
        """Run contenders in turns: the first, the second, ..., the first again.

        Parameters
        ----------
        contenders
            By name; each is prepared (libraries loaded, inputs read, kernels compiled on a small input) before the
            first is run. Of one family there may be only one.
        repeats
            Runs of each; one is enough for those that take long.
        limit
            Seconds that one run may take.
        fresh
            Names that need a new process: their peak of memory is asked for.
        environment
            Variables for processes that are started now.
        enough
            Seconds of all its runs together after which a contender is not run again.

        Returns
        -------
        dict
            An outcome for every name.
        """
        families = [contender.family for contender in contenders.values()]
        if len(set(families)) != len(families):
            raise ValueError(f"contenders of one race must be of different families, not {', '.join(families)}")
        outcomes: dict[str, Outcome] = {}
        running: dict[str, _Worker] = {}
        for name, contender in contenders.items():
            try:
                worker = self._worker(contender.family, fresh=name in fresh, environment=environment or {})
                worker.ask(_PREPARE_LIMIT, do="prepare", task=contender.task, inputs=dict(contender.inputs))
            except _Stopped as error:
                outcomes[name] = Outcome("failed", remark=f"could not be prepared: {error}")
            else:
                outcomes[name] = Outcome("done")
                running[name] = worker
        prepared = list(running.values())
        for _ in range(repeats):
            for name, worker in list(running.items()):
                outcome = outcomes[name]
                # Threads of the contender before still spin for a moment, waiting for more work.
                time.sleep(_PAUSE)
                try:
                    answer = worker.ask(limit, do="run")
                except _OutOfTime as error:
                    outcomes[name] = Outcome("out of time", seconds=limit, remark=str(error))
                    del running[name]
                    continue
                except _Stopped as error:
                    outcomes[name] = Outcome("failed", remark=str(error))
                    del running[name]
                    continue
                if not outcome.runs:
                    outcome.peak_bytes, outcome.base_bytes = answer["peak_bytes"], answer["base_bytes"]
                outcome.runs.append((answer["seconds"], answer["result"]))
                if outcome.seconds is None or answer["seconds"] < outcome.seconds:
                    outcome.seconds, outcome.result = answer["seconds"], answer["result"]
                if sum(seconds for seconds, _ in outcome.runs) >= enough:
                    del running[name]
        for worker in prepared:
            if not worker.alive:
                continue
            # Its inputs would otherwise stay in memory while others are measured.
            with contextlib.suppress(_Stopped):
                worker.ask(_PREPARE_LIMIT, do="forget")
        return outcomes

    def _worker(self, family: str, *, fresh: bool, environment: Mapping[str, str]) -> _Worker:
        worker = self._workers.get(family)
        if worker is not None and (fresh or not worker.alive):
            worker.close()
            worker = None
        if worker is None:
            worker = self._workers[family] = _Worker({**self._environment, **environment})
        return worker
