"""``sparsespec bench server``: many clients, images of many sizes and some malformed bodies against one server.

The server is a real one, ``sparsespec serve`` in a process of its own. Its clients are another process, and what they
take of the processors is measured. Before and after, in the same run, a loop over one segmenter in one process works
through the same photographs: what the server would give if it took nothing.
"""

from __future__ import annotations

import io
import json
import math
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any
from urllib.request import ProxyHandler, build_opener

import numpy as np
from PIL import Image

from sparsespec.evaluation.benchmark import clients, data
from sparsespec.evaluation.benchmark.bench import Bench
from sparsespec.evaluation.benchmark.jobs import Job, task
from sparsespec.evaluation.benchmark.measure import Contender
from sparsespec.evaluation.benchmark.report import Column, Table
from sparsespec.evaluation.benchmark.soak import slope

__all__ = ["Load", "malformed_bodies", "photographs_of", "run", "tree_bytes", "under_load"]

CLIENTS = 32
MALFORMED = 0.05
_SECONDS, _QUICK_SECONDS = 600.0, 60.0
_LEAST_SECONDS = 10.0
_LOOP_SECONDS, _QUICK_LOOP_SECONDS = 60.0, 10.0
_PHOTOGRAPHS = 24
_SHORTEST, _LONGEST = 240, 3000
"""Longer sides of the photographs in pixels."""
_SHORT_QUEUE = 4
_START_LIMIT = 600.0
_EVERY = 2.0
_WARM = (0.2, 0.3)
"""Part of the time whose memory is called that after the warm-up."""
_END = 0.9
_START = [sys.executable, "-P", "-c", "from sparsespec.cli import main; main()"]
_ACCEPTED = ("application/json", "image/png", "image/jpeg")


@dataclass
class Load:
    """What became of the requests of all clients.

    Attributes
    ----------
    seconds : float
        From the first request to the last answer.
    cpu_seconds : float
        That the clients took.
    results : list
        For each request: number of the body, whether it is an image, status, seconds until the answer, seconds of
        work, and when the answer came.
    memory : list of (float, int)
        Bytes of the server with its workers, and when.
    replaced : int
        Worker processes that were replaced.
    """

    seconds: float
    cpu_seconds: float
    results: list[list[float]]
    memory: list[tuple[float, int]] = field(default_factory=list)
    replaced: int = 0

    def count(self, true: Callable[[bool, int], bool]) -> int:
        """Count requests by whether they were images, and their status."""
        return sum(1 for _, good, status, *_ in self.results if true(bool(good), int(status)))

    def waits(self) -> list[float]:
        """Seconds until the answer, of the images that were segmented."""
        return sorted(seconds for _, good, status, seconds, *_ in self.results if good and status == 200)

    def slowest_work(self) -> float:
        """Most seconds of work on an image."""
        return max((work for _, _, status, _, work, *_ in self.results if status == 200), default=math.nan)


def run(bench: Bench) -> list[Table]:
    """Load a server, and compare it with a loop."""
    options = bench.options
    seconds = options.seconds or (_QUICK_SECONDS if bench.quick else _SECONDS)
    folder = bench.folder / "server"
    folder.mkdir()
    bench.say("server: photographs")
    pictures = photographs_of(list(bench.photos.values())[: data.EVERYDAY], _PHOTOGRAPHS)
    bodies = _write_bodies(pictures, folder)
    loops = [_loop(bench, folder)]
    workers = max(1, min(bench.threads, 4))
    waiting = [("as it is", CLIENTS, seconds), ("a short queue", _SHORT_QUEUE, max(_LEAST_SECONDS, seconds / 10))]
    rows: list[tuple[str, int, Load | str]] = []
    for name, most, time_ in waiting:
        bench.say(f"server: {CLIENTS} clients for {time_:g} s, {name}")
        arguments = ["--max-waiting", str(most), "--workers", str(workers)]
        try:
            rows.append((name, most, under_load(arguments, bodies, time_)))
        except (RuntimeError, OSError) as error:
            rows.append((name, most, str(error)))
    loops.append(_loop(bench, folder))
    table, memory = _tables(seconds)
    known = [speed for speed in loops if speed is not None]
    alone = sum(known) / len(known) if known else None
    for name, most, load in rows:
        if isinstance(load, str):
            for one in (table, memory):
                one.rows.append({"ours": True, "status": "failed", "queue": name, "remark": load})
            continue
        table.rows.append(_row(name, most, workers, load, alone))
        memory.rows.append(_memory_row(name, load))
    table.notes.append(
        f"{_PHOTOGRAPHS} photographs with longer sides of {_SHORTEST} to {_LONGEST} pixels, as JPEG and PNG; every"
        f" twentieth body is malformed. {workers} workers. *Refused*: 429 and 503, whose clients come again when they"
        " are told to."
    )
    table.notes.append(
        "*Bound*: the places in the queue and at work, over the workers, times the longest work on an image in the run."
        " *Loop*: one segmenter in one process with all threads over the same photographs, already decoded, before and"
        " after; the server decodes and encodes as well."
    )
    memory.notes.append(
        "Memory that the server and its workers do not share with others, and their part of what they share (PSS)."
        f" *Warm*: the median between {_WARM[0]:.0%} and {_WARM[1]:.0%} of the time; *end*: that of the last"
        f" {1 - _END:.0%}. *Growth*: slope over the second half."
    )
    return [table, memory]


def _tables(seconds: float) -> tuple[Table, Table]:
    load = Table(
        "server",
        f"A server, {CLIENTS} clients, {seconds:g} s",
        (
            Column("queue", "queue"),
            Column("images", "images", "count"),
            Column("ok", "segmented", "count"),
            Column("refused", "refused", "count"),
            Column("lost", "failed", "count"),
            Column("malformed", "malformed", "count"),
            Column("told", "answered 4xx", "count"),
            Column("p50", "p50", "seconds"),
            Column("p95", "p95", "seconds"),
            Column("p99", "p99", "seconds"),
            Column("bound", "bound", "seconds"),
            Column("speed", "images/s", "number"),
            Column("alone", "loop, images/s", "number"),
            Column("ratio", "of the loop", "fine"),
            Column("share", "clients' processors", "percent"),
            Column("remark", "remark"),
        ),
    )
    memory = Table(
        "memory",
        "Its memory",
        (
            Column("queue", "queue"),
            Column("start", "first", "megabytes"),
            Column("warm", "warm", "megabytes"),
            Column("end", "end", "megabytes"),
            Column("peak", "peak", "megabytes"),
            Column("growth", "growth per image", "kilobytes"),
            Column("replaced", "workers replaced", "count"),
            Column("remark", "remark"),
        ),
    )
    return load, memory


def _row(name: str, most: int, workers: int, load: Load, alone: float | None) -> dict[str, Any]:
    waits = load.waits()
    served = len(waits)
    speed = served / load.seconds if load.seconds else None
    return {
        "ours": True,
        "status": "done" if served else "failed",
        "queue": name,
        "images": load.count(lambda good, status: good),
        "ok": served,
        "refused": load.count(lambda good, status: good and status in (429, 503)),
        "lost": load.count(lambda good, status: good and status not in (200, 429, 503)),
        "malformed": load.count(lambda good, status: not good),
        "told": load.count(lambda good, status: not good and 400 <= status < 500),
        **{f"p{share}": _quantile(waits, share / 100) for share in (50, 95, 99)},
        "bound": (most + workers) / workers * load.slowest_work(),
        "speed": speed,
        "alone": alone,
        "ratio": None if not (speed and alone) else speed / alone,
        "share": load.cpu_seconds / load.seconds,
        "statuses": _statuses(load),
        "remark": None if served else "nothing was segmented",
    }


def _statuses(load: Load) -> dict[str, int]:
    found: dict[str, int] = {}
    for _, good, status, *_ in load.results:
        key = f"{'image' if good else 'malformed'} {int(status)}"
        found[key] = found.get(key, 0) + 1
    return dict(sorted(found.items()))


def _memory_row(name: str, load: Load) -> dict[str, Any]:
    row: dict[str, Any] = {"ours": True, "status": "done", "queue": name, "replaced": load.replaced, "remark": None}
    if len(load.memory) < 5:
        return {**row, "remark": "this system doesn't say, or too short"}
    whole = load.memory[-1][0]
    warm = [size for when, size in load.memory if _WARM[0] <= when / whole <= _WARM[1]]
    end = [size for when, size in load.memory if when / whole >= _END]
    half = [size for when, size in load.memory if when / whole >= 0.5]
    done = len(load.waits())
    each = slope(half, _EVERY)
    row |= {
        "start": load.memory[0][1],
        "warm": median(warm) if warm else None,
        "end": median(end),
        "peak": max(size for _, size in load.memory),
        "growth": each * load.seconds / done if each is not None and done else None,
    }
    return row


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else None


# What is sent


def photographs_of(photos: Sequence[data.Photograph], count: int) -> list[data.Photograph]:
    """Make so many photographs of sizes that are evenly spread by their logarithm, out of a few."""
    rng = np.random.default_rng(0)
    sides = np.geomspace(_SHORTEST, _LONGEST, count).round().astype(int)
    pictures = []
    for number, side in enumerate(sides.tolist()):
        photo = photos[number % len(photos)]
        # Three quarters of it, at a place of its own: no two are alike.
        height, width = (max(1, 3 * had // 4) for had in photo.shape[:2])
        top, left = (
            int(rng.integers(had - size + 1)) for had, size in zip(photo.shape[:2], (height, width), strict=True)
        )
        part = Image.fromarray(np.ascontiguousarray(photo[top : top + height, left : left + width]))
        scale = side / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        pictures.append(np.asarray(part.resize(size, Image.Resampling.BICUBIC)))
    return pictures


def malformed_bodies(photo: bytes) -> list[tuple[str, str, bytes]]:
    """Make bodies that no server could segment: what is wrong, the type they claim to be, and the bytes.

    Parameters
    ----------
    photo : bytes
        A good JPEG.
    """
    huge = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + huge + struct.pack(">I", zlib.crc32(b"IHDR" + huge))
    bomb += struct.pack(">I", 10) + b"IDAT" + bytes(10) + bytes(4)
    form = b'--border\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + photo[:1000]
    return [
        ("empty", "image/jpeg", b""),
        ("cut short", "image/jpeg", photo[: len(photo) // 3]),
        ("noise", "application/octet-stream", np.random.default_rng(0).bytes(100_000)),
        ("a page", "image/png", b"<!doctype html><html><body>404</body></html>"),
        ("another type", "text/html", photo),
        ("too many pixels", "image/png", bomb),
        ("half a form", "multipart/form-data; boundary=border", form),
        ("header only", "image/jpeg", photo[:30]),
    ]


def _write_bodies(pictures: Sequence[data.Photograph], folder: Path) -> list[dict[str, Any]]:
    bodies: list[dict[str, Any]] = []
    first = b""
    for number, picture in enumerate(pictures):
        np.save(folder / f"{number:03}.npy", picture)
        file = io.BytesIO()
        ending = "png" if number % 6 == 5 else "jpeg"
        Image.fromarray(picture).save(file, ending, **({"quality": 90} if ending == "jpeg" else {"compress_level": 1}))
        first = first or file.getvalue()
        path = folder / f"{number:03}.{ending}"
        path.write_bytes(file.getvalue())
        accept = _ACCEPTED[number % len(_ACCEPTED)]
        bodies.append(
            {"path": str(path), "type": f"image/{ending}", "accept": accept, "target": "/segment", "good": True}
        )
    for number, (_, kind, content) in enumerate(malformed_bodies(first)):
        path = folder / f"malformed-{number}"
        path.write_bytes(content)
        bodies.append({"path": str(path), "type": kind, "accept": "*/*", "target": "/segment", "good": False})
    return bodies


# The loop


def _loop(bench: Bench, folder: Path) -> float | None:
    """Images in a second of one process that does nothing else."""
    bench.say("server: a loop in one process")
    seconds = _QUICK_LOOP_SECONDS if bench.quick else _LOOP_SECONDS
    inputs = {"folder": str(folder), "seconds": seconds, "threads": bench.threads}
    outcome = bench.race(
        {"loop": Contender("server-loop", inputs, "server-loop")},
        repeats=1,
        limit=max(bench.limit, 20 * seconds),
        fresh=["loop"],
        environment={"OPENBLAS_NUM_THREADS": "1"},
    )["loop"]
    done = outcome.result
    return done["images"] / done["seconds"] if outcome.status == "done" else None


@task("server-loop")
def server_loop(folder: str, seconds: float, threads: int) -> Job:
    """Ours: one segmenter over all photographs, again and again."""
    from sparsespec.pipeline import Segmenter

    pictures = [np.load(path) for path in sorted(Path(folder).glob("*.npy"))]
    segmenter = Segmenter(threads=threads)
    # Every kernel, also those of images that are reduced.
    for picture in (pictures[0], pictures[len(pictures) // 2], pictures[-1]):
        segmenter(picture)

    def go() -> dict[str, float]:
        began, images = time.perf_counter(), 0
        # Whole rounds, for the same mixture of sizes.
        while (spent := time.perf_counter() - began) < seconds:
            for picture in pictures:
                segmenter(picture)
            images += len(pictures)
        return {"images": images, "seconds": spent if images == 0 else time.perf_counter() - began}

    return Job(go, lambda found: found)


# The server


def under_load(
    arguments: Sequence[str], bodies: Sequence[dict[str, Any]], seconds: float, *, count: int = CLIENTS
) -> Load:
    """Start a server, let clients at it, and end it.

    Parameters
    ----------
    arguments : sequence of str
        Of ``sparsespec serve``.
    bodies : sequence of dict
        ``path``, ``type``, ``accept``, ``target`` and ``good`` of each body.
    seconds : float
        How long.
    count : int
        Clients.

    Raises
    ------
    RuntimeError
        The server does not start, or the clients fail.
    """
    with _served(arguments) as (process, port, log):
        sampled: list[tuple[float, int]] = []
        over = threading.Event()
        began = time.monotonic()

        def sample() -> None:
            while not over.wait(_EVERY):
                size = tree_bytes(process.pid)
                if size:
                    sampled.append((time.monotonic() - began, size))

        watcher = threading.Thread(target=sample, daemon=True)
        watcher.start()
        what = {
            "host": "127.0.0.1",
            "address": "127.0.0.1",
            "port": port,
            "clients": count,
            "seconds": seconds,
            "malformed": MALFORMED,
            "seed": 0,
            "bodies": list(bodies),
        }
        done = subprocess.run(
            [sys.executable, "-P", clients.__file__],
            input=json.dumps(what),
            capture_output=True,
            text=True,
            check=False,
        )
        over.set()
        watcher.join()
        if done.returncode != 0:
            raise RuntimeError(f"the clients ended with code {done.returncode}: {done.stderr[-300:]}")
        found = json.loads(done.stdout)
    replaced = sum(1 for line in log if line.get("event") == "worker")
    return Load(found["seconds"], found["cpu_seconds"], found["results"], sampled, replaced)


@contextmanager
def _served(arguments: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], int, list[dict[str, Any]]]]:
    """Run a server; its process, its port, and its log, which goes on."""
    command = [*_START, "serve", "--port", "0", "--log-format", "json", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines: SimpleQueue[str] = SimpleQueue()
    log: list[dict[str, Any]] = []

    def listen() -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                with suppress(ValueError):
                    entry = json.loads(line)
                    # One for each request would be most of it.
                    if entry.get("event") != "request":
                        log.append(entry)
                lines.put(line)
                while lines.qsize() > 200:
                    lines.get()
        lines.put("")

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        end = time.monotonic() + _START_LIMIT
        while not any(entry.get("event") == "ready" for entry in log):
            if process.poll() is not None or time.monotonic() > end:
                with suppress(Empty):
                    raise RuntimeError(f"the server did not start: {lines.get(timeout=1)[:300]}")
            time.sleep(0.05)
        url = next(entry["url"] for entry in log if entry["event"] == "listening")
        _wait_for_workers(url, end)
        yield process, int(url.rpartition(":")[2]), log
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        listener.join(5)


def _wait_for_workers(url: str, end: float) -> None:
    """It is ready when the first worker is; the bound counts on all of them."""
    # Whatever proxy the environment names: this is the same machine.
    opener = build_opener(ProxyHandler({}))
    while True:
        with opener.open(f"{url}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        found = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
        if found["sparsespec_workers_ready"] == found["sparsespec_workers"]:
            return
        if time.monotonic() > end:
            raise RuntimeError("the server did not start all of its workers")
        time.sleep(0.1)


def tree_bytes(pid: int) -> int:
    """Bytes of a process and of all that it has started, shared pages by their part; 0 where the system doesn't say."""
    from sparsespec.evaluation.benchmark.killing import _descendants

    total = 0
    for one in (pid, *_descendants(pid)):
        with suppress(OSError, ValueError, IndexError), open(f"/proc/{one}/smaps_rollup", encoding="ascii") as file:
            total += 1024 * sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total
