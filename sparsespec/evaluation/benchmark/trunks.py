"""Tasks of ``sparsespec bench backbone``: a network on one image, ours and as others run it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.evaluation.benchmark.jobs import Job, task

__all__: list[str] = []

_Arrays = Sequence[npt.NDArray[np.float32]]
_NAMES = ["queries", "keys", "values"]
_WARM_TOKENS = 8
"""Side of the grid that everything is run on once before any clock starts."""


def _timed(run: Callable[[], _Arrays], keys: str) -> Job:
    """Time one run in seconds of the processor as well; what is described is those, and the keys go to a file."""

    def measured() -> tuple[_Arrays, float]:
        begin = time.process_time()
        found = run()
        return found, time.process_time() - begin

    def describe(found: tuple[_Arrays, float]) -> dict[str, Any]:
        np.save(keys, found[0][1][0])
        return {"cpu_seconds": found[1]}

    return Job(measured, describe)


def _feed(image: str, positions: str | None) -> dict[str, npt.NDArray[np.float32]]:
    feed = {"image": np.load(image)}
    if positions is not None:
        feed["positions"] = np.load(positions)
    return feed


def _small(feed: dict[str, npt.NDArray[np.float32]], patch: int, prefix: int) -> dict[str, npt.NDArray[np.float32]]:
    """Cut a feed down to a few tokens."""
    side = min(_WARM_TOKENS * patch, *(length // patch * patch for length in feed["image"].shape[2:]))
    small = {"image": np.ascontiguousarray(feed["image"][:, :, :side, :side])}
    if "positions" in feed:
        small["positions"] = np.ascontiguousarray(feed["positions"][:, : prefix + (side // patch) ** 2])
    return small


@task("backbone")
def backbone(
    model: str,
    image: str,
    positions: str,
    patch: int,
    prefix: int,
    threads: int,
    provider: str,
    keys: str,
    options: dict[str, str] | None = None,
) -> Job:
    """Ours: a model file, in the session that the backbone opens for it."""
    from sparsespec.backbone import Backbone

    session = Backbone(model, provider=provider, provider_options=options, threads=threads)._open()
    feed = _feed(image, positions)
    session.run(_NAMES, _small(feed, patch, prefix))
    return _timed(lambda: session.run(_NAMES, feed), keys)


@task("backbone plain")
def plain(
    graph: str,
    image: str,
    positions: str | None,
    patch: int,
    prefix: int,
    threads: int,
    keys: str,
    provider: str = "CPUExecutionProvider",
    options: dict[str, str] | None = None,
) -> Job:
    """ONNX Runtime on a graph as exporters write it, with its default options but for the number of threads."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    onnxruntime = importlib.import_module("onnxruntime")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    if provider != "CPUExecutionProvider" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(graph, settings, providers=[(provider, options or {})])
    feed = _feed(image, positions)
    session.run(_NAMES, _small(feed, patch, prefix))
    return _timed(lambda: [part[:, prefix:] for part in session.run(_NAMES, feed)], keys)


@task("backbone torch")
def torch_eager(
    weights: str,
    image: str,
    positions: str,
    patch: int,
    prefix: int,
    threads: int,
    dtype: str,
    keys: str,
    device: str = "cpu",
) -> Job:
    """PyTorch, eager, with its scaled dot product attention."""
    from sparsespec.evaluation.benchmark.plain import load_torch

    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    run = load_torch(weights, torch, dtype, device)
    feed = _feed(image, positions)
    small = _small(feed, patch, prefix)
    run(small["image"], small["positions"])
    return _timed(lambda: [part[:, prefix:] for part in run(feed["image"], feed["positions"])], keys)


# Nothing is imported there but what features need. The kernel's count of the peak, since getrusage on Linux counts in
# what the process that started it had.
_WINDOW = """
import json, sys, time
import numpy as np
from sparsespec.backbone import Backbone
model, image, threads, provider = json.loads(sys.argv[1])
trunk = Backbone(model, provider=provider, threads=threads, max_tokens=1 << 20)
begin = time.perf_counter()
found = trunk.features(np.load(image), long_side=None)
seconds = time.perf_counter() - begin
peak = None
try:
    with open("/proc/self/status") as stream:
        peak = 1024 * next(int(line.split()[1]) for line in stream if line.startswith("VmHWM:"))
except (OSError, StopIteration):
    if sys.platform == "darwin":
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"tokens": len(found.keys), "tiles": found.info["tiles"], "inside": seconds, "peak_bytes": peak}))
"""


@task("backbone features")
def features(model: str, image: str, threads: int, provider: str) -> Job:
    """Ours: all of ``Backbone.features`` on a photograph, in one piece, in a process that does nothing else."""
    question = json.dumps([model, image, threads, provider])

    def run() -> dict[str, Any]:
        command = [sys.executable, "-P", "-c", _WINDOW, question]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise RuntimeError(said[-1] if said else f"its process ended with code {done.returncode}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return Job(run, lambda found: found)


@task("backbone callers")
def callers(
    model: str, image: str, positions: str, patch: int, prefix: int, threads: int, callers: int, images: int
) -> Job:
    """Ours: one session that several threads of Python call at a time, each run with so many threads of its own."""
    from sparsespec.backbone import Backbone

    session = Backbone(model, provider="cpu", threads=threads)._open()
    feed = _feed(image, positions)
    session.run(_NAMES, _small(feed, patch, prefix))
    pool = ThreadPoolExecutor(callers)

    def run() -> int:
        return sum(len(found) for found in pool.map(lambda _: session.run(_NAMES, feed)[1][0], range(images)))

    return Job(run, lambda tokens: {"tokens": tokens})
