"""The process a contender runs in: reads questions as lines of JSON, answers each with one line of JSON.

``prepare`` makes a task ready, ``run`` runs it once and says how long it took, ``forget`` lets go of it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import IO, Any

from sparsespec.evaluation.benchmark import memory

__all__ = ["main"]


def main() -> None:
    """Answer until the questions end."""
    # Libraries print; the answers have a stream of their own.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(sys.stdin, answers)


def serve(questions: IO[str], answers: IO[str]) -> None:
    """Answer each line of ``questions`` with a line of ``answers``."""
    from sparsespec.evaluation.benchmark import (  # noqa: F401 - they register their tasks
        ours,
        peers,
        runs,
        server,
        soak,
        trunks,
    )
    from sparsespec.evaluation.benchmark.jobs import TASKS

    job = None
    for line in questions:
        question = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if question["do"] == "run":
                if job is None:
                    raise RuntimeError("nothing is prepared")
                answer = _run(job)
            else:
                job = None
                gc.collect()
                if question["do"] == "prepare":
                    job = TASKS[question["task"]](**question["inputs"])
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        answers.write(json.dumps(answer, allow_nan=False) + "\n")
        answers.flush()


def _run(job: Any) -> dict[str, Any]:
    gc.collect()
    memory.reset_peak()
    base = memory.current_bytes()
    begin = time.perf_counter()
    found = job.run()
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "base_bytes": base,
        "peak_bytes": memory.peak_bytes(),
        "result": job.describe(found),
    }


if __name__ == "__main__":
    main()
