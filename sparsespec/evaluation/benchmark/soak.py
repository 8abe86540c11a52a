"""``sparsespec bench soak``: the memory of a process that sees many photographs of many sizes."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.evaluation.benchmark import data, memory
from sparsespec.evaluation.benchmark.bench import Bench
from sparsespec.evaluation.benchmark.jobs import Job, task
from sparsespec.evaluation.benchmark.measure import Contender
from sparsespec.evaluation.benchmark.report import Column, Table, contest

__all__ = ["pictures_of", "run", "slope"]

_SIDE = 448
"""Longest side of a picture and of the network's input for it."""
_SMALLEST = 112
_QUICK = (60, 20)
_EVERY = 10
"""Photographs from one look at the memory to the next."""
_MARKS = (0.05, 0.25, 0.5, 1.0)
_LIMIT = 3 * 3600.0
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}


def run(bench: Bench) -> list[Table]:
    """Segment photographs of many sizes in one process, from one thread and from several."""
    options = bench.options
    usual = _QUICK if bench.quick else (2000, 300)
    photographs, sizes = options.photographs or usual[0], options.sizes or usual[1]
    marks = [max(1, round(share * photographs)) for share in _MARKS]
    table = Table(
        "soak",
        f"Resident memory of one process, {photographs:,} photographs of {sizes:,} sizes",
        (
            Column("callers", "threads that call", "count"),
            *(Column(f"after_{k}", f"after {mark:,}", "megabytes") for k, mark in enumerate(marks)),
            Column("growth", "growth per photograph, second half", "kilobytes"),
            Column("peak_bytes", "peak", "megabytes"),
            Column("remark", "remark"),
        ),
    )
    paths = []
    for number, (name, photo) in enumerate(list(bench.photos.items())[: data.EVERYDAY]):
        bench.say(f"soak: {name}")
        paths.append(str(bench.folder / f"soak-{number}.npy"))
        np.save(paths[-1], photo)
    for callers in sorted({1, max(2, bench.threads)}):
        bench.say(f"soak: {photographs} photographs, {callers} at once")
        inputs = {"photos": json.dumps(paths), "photographs": photographs, "sizes": sizes, "callers": callers}
        own = bench.race(
            {"sparsespec": Contender("soak", {**inputs, "threads": bench.threads}, "soak")},
            repeats=1,
            limit=max(bench.limit, _LIMIT),
            fresh=["sparsespec"],
            environment=_ENVIRONMENT,
        )["sparsespec"]
        row = contest({"callers": callers}, own)[0]
        row["peak_bytes"] = own.peak_bytes
        seen = own.result.get("resident")
        if own.status == "done" and seen:
            row |= {f"after_{k}": seen[max(0, mark // _EVERY - 1)] for k, mark in enumerate(marks)}
            row["growth"] = slope(seen[len(seen) // 2 :], _EVERY)
        elif own.status == "done":
            row["remark"] = "this system doesn't say, or too few photographs"
        table.rows.append(row)
    table.notes.append(
        f"Pictures of {_SMALLEST} to {_SIDE} pixels a side, each seen by the network at its own size. *Growth* is the"
        f" slope of a line through the resident memory after every {_EVERY} photographs."
    )
    return [table]


def slope(values: Sequence[float], step: float) -> float | None:
    """Slope of the line through equally spaced values by least squares; None for fewer than three."""
    if len(values) < 3:
        return None
    return float(np.polyfit(np.arange(len(values)) * step, values, 1)[0])


def pictures_of(photos: Sequence[data.Photograph], sizes: int) -> list[data.Photograph]:
    """Cut so many pictures of different sizes out of photographs."""
    rng = np.random.default_rng(0)
    places = (_SIDE - _SMALLEST + 1) ** 2
    chosen = rng.choice(places, size=sizes, replace=False)
    pictures = []
    for number, place in enumerate(chosen.tolist()):
        height, width = (_SMALLEST + side for side in divmod(place, _SIDE - _SMALLEST + 1))
        photo = photos[number % len(photos)]
        # A photograph that is too small goes on as its mirror image.
        room = [(0, max(0, side - had)) for side, had in zip((height, width), photo.shape[:2], strict=True)]
        photo = np.pad(photo, [*room, (0, 0)], mode="symmetric")
        top, left = (
            int(rng.integers(had - side + 1)) for side, had in zip((height, width), photo.shape[:2], strict=True)
        )
        pictures.append(np.ascontiguousarray(photo[top : top + height, left : left + width]))
    return pictures


@task("soak")
def soak(photos: str, photographs: int, sizes: int, callers: int, threads: int) -> Job:
    """Ours: many photographs of many sizes, by several threads at once."""
    from sparsespec.backbone import Backbone
    from sparsespec.pipeline import Segmenter

    pictures = pictures_of([np.load(path) for path in json.loads(photos)], sizes)
    net = Backbone(threads=max(1, threads // callers), concurrency=callers)
    segmenter = Segmenter(net, scale=1.0)
    segmenter(pictures[0])

    def go() -> list[int]:
        resident: list[int] = []
        noting = threading.Lock()
        order: list[npt.NDArray[np.uint8]] = [pictures[k % sizes] for k in range(photographs)]
        done = [0]

        def one(picture: npt.NDArray[np.uint8]) -> None:
            segmenter(picture)
            with noting:
                done[0] += 1
                now = memory.current_bytes() if done[0] % _EVERY == 0 else None
                if now is not None:
                    resident.append(now)

        with ThreadPoolExecutor(callers) as pool:
            for _ in pool.map(one, order):
                pass
        return resident

    def describe(resident: list[int]) -> dict[str, Any]:
        return {"resident": resident}

    return Job(go, describe)
