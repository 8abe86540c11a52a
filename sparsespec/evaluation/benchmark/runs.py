"""``sparsespec bench runs``: what the layer around the segmenter costs when a folder of images is worked on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsespec.evaluation.benchmark import data, memory
from sparsespec.evaluation.benchmark.bench import Bench
from sparsespec.evaluation.benchmark.jobs import Job, task
from sparsespec.evaluation.benchmark.measure import Contender
from sparsespec.evaluation.benchmark.report import Column, Table, contest

if TYPE_CHECKING:
    from sparsespec.batch import Inputs
    from sparsespec.batch.job import Engine
    from sparsespec.batch.job import Job as BatchJob
    from sparsespec.batch.shard import ShardSummary, ShardTask
    from sparsespec.pipeline import Segmenter

__all__ = ["Noted", "Stub", "differing", "make_images", "process_bytes", "run", "spread"]

_PIXELS = 640
"""Longer side of a photograph of about 480p."""
_COPIES, _QUICK_COPIES = 8, 1
"""Files made of each photograph."""
_TINY, _QUICK_TINY = 100_000, 2_000
_WITH_OVERLAYS = 10
"""So many times fewer images with overlays."""
_NOTED, _QUICK_NOTED = 200_000, 5_000
_TINY_SIZES = ((32, 32), (48, 32), (32, 48), (64, 48), (48, 64))
_IN_A_FOLDER = 1000
# File systems allow a file some tens of thousands of names.
_NAMES_OF_A_FILE = 20_000
_MARKS = (0.1, 0.5, 1.0)
_LIMIT = 900.0
# As "sparsespec run" has it: the matrices of one photograph are small.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}

_LOOP, _PLAIN, _DRAWN = "loop", "run, no overlays", "run, overlays"
_ONE, _TWO, _PROCESSES = "inline, one at a time", "inline, two at a time", "processes"


def run(bench: Bench) -> list[Table]:
    """Measure everything about runs."""
    return [overhead(bench), engines(bench), tiny(bench), noted(bench)]


def overhead(bench: Bench) -> Table:
    """A run beside a loop over the same photographs, in turns in one process."""
    stages = ("read", "segment", "write", "rest")
    table = Table(
        "overhead",
        f"A run beside a loop that reads, segments and writes the label image, photographs of {_PIXELS} pixels",
        (
            Column("who", "who"),
            Column("seconds", "a photograph", "seconds"),
            *(Column(stage, stage, "seconds") for stage in stages),
            Column("overhead", "more than the loop", "percent"),
            Column("least", "least", "percent"),
            Column("most", "most", "percent"),
            Column("remark", "remark"),
        ),
    )
    bench.say("runs: overhead")
    folder, count = _photographs(bench)
    rounds = bench.options.repeats or (2 if bench.quick else 5)
    inputs = {"folder": str(folder), "rounds": rounds, "threads": bench.threads}
    own = bench.race(
        {"sparsespec": Contender("runs overhead", inputs, "runs")},
        repeats=1,
        limit=max(bench.limit, _LIMIT),
        fresh=["sparsespec"],
        environment=_ENVIRONMENT,
    )["sparsespec"]
    if own.status != "done":
        table.rows += contest({}, own)
        return table
    for who, turns in own.result["turns"].items():
        totals = [turn["total"] for turn in turns]
        row = {"who": who, "ours": True, "status": "done", "remark": "", "turns": turns}
        row["seconds"] = statistics.median(totals)
        row |= {stage: statistics.median(turn[stage] for turn in turns) for stage in stages}
        if who != _LOOP:
            row |= spread(totals, [turn["total"] for turn in own.result["turns"][_LOOP]])
        table.rows.append(row)
    table.notes.append(
        f"{count} photographs, {rounds} rounds; in each all three work on all photographs with the same Segmenter,"
        f" {bench.threads} threads, one image at a time, in changing order. Times are medians; *more than the loop* is"
        " the median of the rounds, with the least and the most of them."
    )
    table.notes.append(
        "*Read* of a run includes the looks at the file before it, *segment* the eigenvectors that the report shows,"
        " *write* the run-length encodings, boxes, the picture and the masks of each for the report (10,000 at most)"
        " and, if asked for, the overlay; *rest* is the journal, the listing and names, and the files about all images"
        " together. Label images are brought to the disk by all three before they are in their place."
    )
    return table


def engines(bench: Bench) -> Table:
    """Worker processes beside one process, same photographs, same bytes."""
    table = Table(
        "engines",
        f"Engines, photographs of {_PIXELS} pixels",
        (
            Column("who", "engine"),
            Column("workers", "workers", "count"),
            Column("threads", "threads of each", "count"),
            Column("rate", "photographs/s", "number"),
            Column("ratio_one", "against one at a time", "fine"),
            Column("least_one", "least", "fine"),
            Column("most_one", "most", "fine"),
            Column("ratio_two", "against two at a time", "fine"),
            Column("least_two", "least", "fine"),
            Column("most_two", "most", "fine"),
            Column("same", "same bytes"),
            Column("remark", "remark"),
        ),
    )
    folder, count = _photographs(bench)
    rounds = bench.options.repeats or (2 if bench.quick else 5)
    many = max(2, bench.threads)
    ways = {_ONE: (1, bench.threads), _TWO: (many, max(1, bench.threads // many))}
    if bench.threads > 1:
        ways[_PROCESSES] = (bench.threads, 1)
    contenders = {}
    for who, (workers, threads) in ways.items():
        bench.say(f"runs: {who}")
        inputs = {"folder": str(folder), "engine": who, "workers": workers, "threads": threads}
        contenders[who] = Contender("runs engine", inputs, who)
    # Not only the fastest run counts: the machine's moods are in all of them.
    found = bench.race(
        contenders, repeats=rounds, limit=max(bench.limit, _LIMIT), enough=_LIMIT, environment=_ENVIRONMENT
    )
    for who, (workers, threads) in ways.items():
        own = found[who]
        row: dict[str, Any] = {"who": who, "workers": workers, "threads": threads, "ours": True}
        row |= {"status": own.status, "remark": own.remark}
        if own.status == "done":
            seconds = [taken for taken, _ in own.runs]
            row |= {"seconds": seconds, "rate": count / statistics.median(seconds)}
            for key, other in (("one", _ONE), ("two", _TWO)):
                if who != other and found[other].status == "done":
                    ratios = [there / here for (there, _), here in zip(found[other].runs, seconds, strict=False)]
                    row |= {f"ratio_{key}": statistics.median(ratios)}
                    row |= {f"least_{key}": min(ratios), f"most_{key}": max(ratios)}
            if found[_ONE].status == "done":
                files = {
                    name for _, result in own.runs for name in differing(found[_ONE].result["files"], result["files"])
                }
                row["same"] = "yes" if not files else f"no: {min(files)}"
                if files:
                    row |= {"status": "failed", "remark": f"{len(files)} files differ"}
        table.rows.append(row)
    table.notes.append(
        f"Runs over {count} photographs with overlays, {rounds} times in turns; a ratio is the median over the turns,"
        " with the least and the most. Models are open and kernels compiled before."
    )
    table.notes.append(
        "*Same bytes* compares every file of the output but run.json and report/run.js, which hold times, with those of"
        " the first row. One at a time has all threads in the network; several at a time is what `sparsespec run` does"
        " by itself."
    )
    return table


def tiny(bench: Bench) -> Table:
    """Many tiny images and a stub in the place of the segmenter: the batch layer alone."""
    count = bench.options.photographs or (_QUICK_TINY if bench.quick else _TINY)
    table = Table(
        "tiny",
        f"{count:,} tiny images, the segmenter replaced by a stub that marks two rectangles",
        (
            Column("who", "engine"),
            Column("workers", "workers", "count"),
            Column("overlays", "overlays"),
            Column("images", "images", "count"),
            Column("rate", "images/s", "number"),
            Column("listing", "listing", "seconds"),
            Column("final", "final files", "seconds"),
            *(
                Column(f"after_{k}", f"memory at {mark:.0%}".replace("%", " %"), "megabytes")
                for k, mark in enumerate(_MARKS)
            ),
            Column("growth", "growth per image", "bytes"),
            Column("remark", "remark"),
        ),
    )
    few = max(1, count // _WITH_OVERLAYS)
    ways = [("inline", 1, False, count), ("inline", 2, False, count)]
    if bench.threads > 1:
        ways.append(("processes", 2, False, count))
    ways.append(("inline", 2, True, few))
    folders: dict[int, Path] = {}
    for who, workers, overlays, images in ways:
        bench.say(f"runs: {images:,} tiny images, {who} with {workers}{', overlays' if overlays else ''}")
        if images not in folders:
            folders[images] = bench.folder / f"tiny-{images}"
            make_images(folders[images], images)
        inputs = {"folder": str(folders[images]), "engine": who, "workers": workers, "overlays": overlays}
        own = bench.race(
            {"sparsespec": Contender("runs tiny", inputs, "runs")},
            repeats=1,
            limit=max(bench.limit, _LIMIT),
            fresh=["sparsespec"],
            environment=_ENVIRONMENT,
        )["sparsespec"]
        group = {"engine": who, "workers": workers, "overlays": "yes" if overlays else "no", "images": images}
        row = {**contest(group, own, extras=["listing", "working", "final", "resident"])[0], "who": who}
        if own.status == "done":
            row["rate"] = images / own.result["working"]
            resident = own.result["resident"]
            if all(resident):
                row |= {f"after_{k}": value for k, value in enumerate(resident)}
                row["growth"] = (resident[-1] - resident[0]) / ((_MARKS[-1] - _MARKS[0]) * images)
        table.rows.append(row)
    for folder in folders.values():
        shutil.rmtree(folder)
    table.notes.append(
        "JPEGs of 32 to 64 pixels a side, many names of a few files. Everything but the segmenter is what a run does:"
        " reading, label images, run-length encodings, journal, each file on the disk before it is in its place."
        " *Images/s* is over the time from the start of the run to its last image, that of processes included; for"
        " the listing before and the files about all images after it there are times of their own."
    )
    table.notes.append(
        "*Memory* is resident memory of the process and its worker processes together, once so much of the images is"
        " done."
    )
    return table


def noted(bench: Bench) -> Table:
    """Many names and results that nobody computed: what is left of a run without its images."""
    count = bench.options.names or (_QUICK_NOTED if bench.quick else _NOTED)
    table = Table(
        "noted",
        f"{count:,} names and made-up results, two instances each, no image read or written",
        (
            Column("step", "step"),
            Column("each", "an image", "microseconds"),
            Column("million", "a million", "seconds"),
            Column("peak", "memory at the highest, an image", "bytes"),
            Column("kept", "kept, an image", "bytes"),
            Column("remark", "remark"),
        ),
    )
    bench.say(f"runs: {count:,} names")
    folder = bench.folder / f"noted-{count}"
    make_images(folder, count)
    own = bench.race(
        {"sparsespec": Contender("runs noted", {"folder": str(folder)}, "runs")},
        repeats=1,
        limit=max(bench.limit, _LIMIT),
        fresh=["sparsespec"],
        environment=_ENVIRONMENT,
    )["sparsespec"]
    shutil.rmtree(folder)
    if own.status != "done":
        table.rows += contest({"step": "all"}, own)
        return table
    for step in own.result["steps"]:
        row = {"step": step["step"], "ours": True, "status": "done", "remark": "", "each": step["seconds"] / count}
        row["million"] = row["each"] * 1e6
        row |= {key: None if step[key] is None else step[key] / count for key in ("peak", "kept")}
        table.rows.append(row)
    table.notes.append(
        "*A million* is the time of each image times a million. Memory is resident memory of the process above what it"
        " had before the listing, at the highest during the step and after it."
    )
    return table


def spread(seconds: Iterable[float], base: Iterable[float]) -> dict[str, float]:
    """Compare pairs of times: by how much the first is longer, the median of all pairs, the least and the most."""
    more = [here / there - 1 for here, there in zip(seconds, base, strict=True)]
    return {"overhead": statistics.median(more), "least": min(more), "most": max(more)}


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> set[str]:
    """Names whose digests aren't the same, or that only one has."""
    return {name for name in {*one, *other} if one.get(name) != other.get(name)}


def make_images(folder: Path, count: int) -> None:
    """Fill a folder with so many small JPEGs in folders of a thousand: many names of few files."""
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    whole: list[bytes] = []
    for shape in _TINY_SIZES:
        pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
        path = folder / f".{len(whole)}.jpg"
        Image.fromarray(pixels).resize(shape, Image.Resampling.BICUBIC).save(path, quality=90)
        whole.append(path.read_bytes())
    sources: list[Path] = [folder / f".{k}.jpg" for k in range(len(whole))]
    for index in range(count):
        kind, turn = index % len(whole), index // len(whole)
        below = folder / f"{index // _IN_A_FOLDER:05d}"
        if index % _IN_A_FOLDER == 0:
            below.mkdir()
        path = below / f"{index:07d}.jpg"
        if turn % _NAMES_OF_A_FILE == 0:
            path.write_bytes(whole[kind])
            sources[kind] = path
            continue
        try:
            os.link(sources[kind], path)
        except OSError:  # a file system without such links
            path.write_bytes(whole[kind])


def process_bytes() -> int | None:
    """Resident memory of this process and its children; None where the system doesn't say."""
    own = memory.current_bytes()
    if own is None:
        return None
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text("utf-8", "replace").splitlines())
        except (OSError, ValueError):
            continue
        if int(fields["PPid"]) == os.getpid() and "VmRSS" in fields:
            own += 1024 * int(fields["VmRSS"].split()[0])
    return own


class Stub:
    """Stands in the place of the segmenter: marks two rectangles."""

    def __call__(self, image: Any, /, *, out: npt.NDArray[np.uint16] | None = None) -> Any:
        """Give labels for an image."""
        height, width = image.shape[:2]
        labels = np.zeros((height, width), np.uint16) if out is None else out
        labels[height // 8 : height // 2, width // 8 : width // 2] = 1
        labels[height // 2 : height * 7 // 8, width // 2 : width * 7 // 8] = 2
        return SimpleNamespace(labels=labels, scores=np.array([0.9, 0.8]), info={})


class Noted:
    """An engine of runs that computes nothing and notes made-up results of every image.

    Parameters
    ----------
    first
        Called before the first shard.
    """

    settings: Mapping[str, Any] = {"engine": "made-up results"}

    def __init__(self, first: Callable[[], None]) -> None:
        self._first = first

    def summaries(
        self, job: BatchJob, tasks: Iterable[ShardTask], *, stopping: threading.Event
    ) -> Iterator[ShardSummary]:
        """Note all images of each shard, see `sparsespec.batch.job.ShardEngine`."""
        from sparsespec.batch.job import Outcome
        from sparsespec.batch.outputs import mask_file
        from sparsespec.batch.record import Row
        from sparsespec.batch.shard import ShardSummary
        from sparsespec.batch.state import State
        from sparsespec.formats.coco import instance_annotations

        state = State(job.target)
        shape = (48, 64)
        found = Stub()(np.empty((*shape, 3), np.uint8))
        annotations = instance_annotations(found.labels, found.scores)
        scores = found.scores.tolist()
        first: Callable[[], None] | None = self._first
        for task_ in tasks:
            if first is not None:
                first()
                first = None
            settled = {}
            for item in task_.items:
                row = Row(
                    item.path, "done", mask_file(item.name), size=(shape[1], shape[0]), instances=len(annotations)
                )
                row.scores, row.seconds, row.fingerprint = scores, {"total": 0.001}, "1-1"
                settled[item.path] = [Outcome(row, annotations, files={str(row.mask): 100}, name=item.name)]
            state.finish(task_.number, settled, [])
            rows: list[tuple[str, str, str | None, int]] = [(path, "done", None, len(annotations)) for path in settled]
            yield ShardSummary(task_.number, rows, files=len(settled))


@task("runs overhead")
def overhead_job(folder: str, rounds: int, threads: int) -> Job:
    """Ours: a loop and two runs over the same photographs, in changing order."""
    segmenter = _segmenter(threads, 1)
    ways: dict[str, Callable[[Inputs, Path], dict[str, float] | None]] = {
        _LOOP: partial(_loop, segmenter),
        _PLAIN: partial(_batch, segmenter, False),
        _DRAWN: partial(_batch, segmenter, True),
    }

    def go() -> dict[str, Any]:
        turns: dict[str, list[dict[str, float]]] = {who: [] for who in ways}
        order = list(ways)
        # What is loaded and compiled on first use, once for each.
        for turn in range(-1, rounds):
            for who in order:
                with _output(folder) as output:
                    seconds = _timed(ways[who], folder, output)
                if turn >= 0:
                    turns[who].append(seconds)
            order.append(order.pop(0))
        return turns

    return Job(go, lambda turns: {"turns": turns})


@task("runs engine")
def engine_job(folder: str, engine: str, workers: int, threads: int) -> Job:
    """Ours: a run over photographs with one of the engines."""
    from sparsespec.batch import Inline, find_inputs, run_batch
    from sparsespec.batch.processes import Processes

    segmenter = _segmenter(threads, 1 if engine == _PROCESSES else workers)
    chosen: Any = Processes(workers, threads) if engine == _PROCESSES else Inline(workers)
    with _output(folder) as output:  # opens models and starts processes
        run_batch(segmenter, find_inputs(folder), output, engine=chosen)

    def go() -> dict[str, str]:
        with _output(folder) as output:
            run_batch(segmenter, find_inputs(folder), output, engine=chosen)
            return _digests(output)

    return Job(go, lambda files: {"files": files})


@task("runs tiny")
def tiny_job(folder: str, engine: str, workers: int, overlays: bool) -> Job:
    """Ours: a run over many images with a stub in the place of the segmenter."""
    from sparsespec.batch import Formats, Inline, find_inputs, run_batch
    from sparsespec.batch.processes import Processes

    def go() -> dict[str, Any]:
        chosen: Engine = Processes(workers, 1) if engine == "processes" else Inline(workers)
        resident: list[int | None] = []
        last = 0.0

        def progress(row: Any, settled: int, count: int) -> None:
            nonlocal last
            while len(resident) < len(_MARKS) and settled >= _MARKS[len(resident)] * count:
                resident.append(process_bytes())
            if settled == count:
                last = time.perf_counter()

        before = time.perf_counter()
        inputs = find_inputs(folder)
        listed = time.perf_counter()
        with _output(folder) as output:
            result = run_batch(
                Stub(), inputs, output, engine=chosen, formats=Formats(overlays=overlays), progress=progress
            )
            end = time.perf_counter()
            if isinstance(chosen, Processes):
                chosen.close()
        if result.count("done") != len(inputs.images):
            raise RuntimeError(f"only {result.count('done')} of {len(inputs.images)} images were done")
        return {"listing": listed - before, "working": last - listed, "final": end - last, "resident": resident}

    return Job(go, dict)


@task("runs noted")
def noted_job(folder: str) -> Job:
    """Ours: listing, names, shards, records and final files of images that nobody looks at."""
    from sparsespec.batch import find_inputs, run_batch

    def go() -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = []
        base = memory.current_bytes()
        memory.reset_peak()
        before = time.perf_counter()

        def ended(step: str) -> None:
            nonlocal before
            now, peak, kept = time.perf_counter(), memory.peak_bytes(), memory.current_bytes()
            steps.append(
                {
                    "step": step,
                    "seconds": now - before,
                    "peak": None if base is None or peak is None else peak - base,
                    "kept": None if base is None or kept is None else kept - base,
                }
            )
            memory.reset_peak()
            before = time.perf_counter()

        def progress(row: Any, settled: int, count: int) -> None:
            # Files are counted shard by shard: all rows of the last one come with the full number.
            if settled == count and len(steps) == 2:
                ended("records of the shards")

        inputs = find_inputs(folder)
        ended("listing")
        with _output(folder) as output:
            run_batch(Stub(), inputs, output, engine=Noted(partial(ended, "names and shards")), progress=progress)
            ended("merging, final files")
        return steps

    return Job(go, lambda steps: {"steps": steps})


def _photographs(bench: Bench) -> tuple[Path, int]:
    """Write the photographs of about 480p into a folder, some copies of each; the folder, and how many there are."""
    from PIL import Image

    folder = bench.folder / "runs-photographs"
    copies = _QUICK_COPIES if bench.quick else _COPIES
    names = list(bench.photos)
    names = names[: data.EVERYDAY] if bench.options.images is None else names
    if not folder.is_dir():
        folder.mkdir()
        for number, name in enumerate(names[:2] if bench.quick else names):
            picture = Image.fromarray(data.long_side(bench.photos[name], _PIXELS))
            for copy in range(copies):
                picture.save(folder / f"{number}-{copy}.jpg", quality=95)
    return folder, len(os.listdir(folder))


def _segmenter(threads: int, workers: int) -> Segmenter:
    # As "sparsespec run" has it, before Numba is loaded.
    if "numba" not in sys.modules:
        os.environ["NUMBA_NUM_THREADS"] = str(threads)
    from sparsespec.backbone import Backbone
    from sparsespec.pipeline import Segmenter

    return Segmenter(Backbone(threads=threads, concurrency=workers))


@contextmanager
def _output(folder: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=Path(folder).parent, prefix="runs-output-") as output:
        yield Path(output)


def _timed(way: Callable[[Inputs, Path], dict[str, float] | None], folder: str, output: Path) -> dict[str, float]:
    from sparsespec.batch import find_inputs

    begin = time.perf_counter()
    inputs = find_inputs(folder)
    measured = way(inputs, output)
    total = time.perf_counter() - begin
    stages = _stored_stages(output) if measured is None else measured
    stages |= {"total": total, "rest": total - sum(stages.values())}
    return {stage: seconds / len(inputs.images) for stage, seconds in stages.items()}


def _loop(segmenter: Segmenter, inputs: Inputs, output: Path) -> dict[str, float]:
    """What anyone would write: seconds of its stages over all photographs."""
    from sparsespec.formats.labels import write_label_png
    from sparsespec.images import read_image

    stages = dict.fromkeys(("read", "segment", "write"), 0.0)
    for path in inputs.images:
        times = [time.perf_counter()]
        image = read_image(Path(inputs.root) / path)
        times.append(time.perf_counter())
        found = segmenter(image)
        times.append(time.perf_counter())
        write_label_png(output / f"{Path(path).stem}.png", found.labels)
        times.append(time.perf_counter())
        for stage, seconds in zip(stages, np.diff(times).tolist(), strict=True):
            stages[stage] += seconds
    return stages


def _batch(segmenter: Segmenter, overlays: bool, inputs: Inputs, output: Path) -> None:
    from sparsespec.batch import Formats, run_batch

    result = run_batch(segmenter, inputs, output, formats=Formats(overlays=overlays))
    if result.count("done") != len(inputs.images):
        raise RuntimeError(f"only {result.count('done')} of {len(inputs.images)} photographs were done")


def _digests(output: Path) -> dict[str, str]:
    """SHA-256 of every file of a run that holds no times."""
    from sparsespec.formats.report import RUN_SCRIPT

    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_file() and name not in ("run.json", RUN_SCRIPT) and not name.startswith(".sparsespec/"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _stored_stages(output: Path) -> dict[str, float]:
    """Seconds by stage over all photographs of a run, from its ``run.json``."""
    stages = dict.fromkeys(("read", "segment", "write"), 0.0)
    for row in json.loads((output / "run.json").read_bytes())["images"]:
        times = row["seconds"]
        stages["read"] += times["read"]
        stages["write"] += times["write"]
        stages["segment"] += times["total"] - times["read"] - times["write"]
    return stages
