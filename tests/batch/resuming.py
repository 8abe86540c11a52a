"""Runs that are killed, for tests of what they leave. As a program: starts one after the other, on request.

Each line on standard input describes a run, as JSON; the answer is its exit status, as of `os.waitpid`. Each run has a
process of its own, made by a fork of this one, which has everything imported already.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Runner:
    """Starts runs in processes of their own."""

    def __init__(self) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, source: Path, output: Path, **how: Any) -> tuple[int, dict[str, Any]]:
        """Run; return the exit status, below 0 for a signal, and what the run has told."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"source": str(source), "output": str(output), **how}), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return os.waitstatus_to_exitcode(answer["status"]), answer["told"]

    def close(self) -> None:
        """End."""
        self._process.communicate()


def contents(output: Path) -> dict[str, bytes]:
    """Every file but those with times and of the lock, the state of the run included."""
    found = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if name not in ("run.json", "report/run.js", ".sparsespec/lock")
    }


class Steps:
    """Counts what is done to files of an output, and kills the process just before a certain step, or half-way."""

    def __init__(self, output: str, kill_at: int | None, seed: int) -> None:
        self.count = 0
        self._output = output
        self._kill_at = kill_at
        self._seed = seed
        self._lock = threading.Lock()
        sys.addaudithook(self._audit)
        self._write = os.write
        from sparsespec.batch import journal

        journal.os = self  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, content: memoryview) -> int:
        """Write a line of a journal, and perhaps not all of it."""
        if self._steps():
            self._write(descriptor, content[: random.Random(self._seed).randrange(len(content))])
            os.kill(os.getpid(), signal.SIGKILL)
        return self._write(descriptor, content)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        if str(arguments[0]).startswith(self._output) and self._steps():
            os.kill(os.getpid(), signal.SIGKILL)

    def _steps(self) -> bool:
        with self._lock:
            self.count += 1
            return self.count == self._kill_at


def _run(how: dict[str, Any], told: int) -> None:
    from stubs import Stub

    from sparsespec.batch import Formats, Inline, find_inputs, run_batch
    from sparsespec.batch.processes import Processes

    class Own(Stub):
        """Of the main program: worker processes refuse it, at once, and nothing is looked at in one."""

    Own.__module__ = "__main__"
    marks = {int(grey): what for grey, what in how.get("marks", {}).items()}
    segmenter = Stub(marks) if how.get("guarded") else Own(marks)
    engine: Any = Processes(2, 1) if how.get("engine") == "processes" else Inline(how.get("workers", 1))
    steps = Steps(how["output"], how.get("kill_at"), how.get("seed", 0))
    seen: list[str] = []
    result = run_batch(
        segmenter,
        find_inputs(how["source"], output=how["output"]),
        how["output"],
        engine=engine,
        formats=Formats(**how.get("formats", {})),
        shard_size=64,
        retry_quarantined=how.get("retry_quarantined", False),
        progress=lambda row, *_: seen.append(row.path),
    )
    answer = {"steps": steps.count, "seen": seen, "earlier": result.earlier, "counts": dict(result.counts)}
    os.write(told, json.dumps(answer).encode())


def main() -> None:
    """Answer requests."""
    sys.path.insert(0, str(HERE))
    import stubs  # noqa: F401 - to have it
    from PIL import Image

    from sparsespec.batch import one, processes  # noqa: F401

    # Loads all decoders, which each run would do again.
    Image.init()
    # What a killed process has written stays written: only the loss of power is another matter.
    os.fsync = lambda _: None
    for line in sys.stdin:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            code = 1
            try:
                _run(json.loads(line), writer)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(writer)
        told = b""
        while chunk := os.read(reader, 65536):
            told += chunk
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": status, "told": json.loads(told) if told else {}}), flush=True)


if __name__ == "__main__":
    main()
