"""``sparsespec bench killing``: runs that are killed at any moment and gone on with, against an undisturbed one.

Runs are real ones, ``sparsespec run`` in a process of its own with the default model. They are ended as by a power cut,
by SIGKILL, which no process can notice. Moments are spread over a whole run, its start and its last files included.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from sparsespec._atomic import TEMPORARY_PATTERN
from sparsespec._threads import available_cpus
from sparsespec.batch.outputs import mask_file
from sparsespec.batch.plan import PlanError
from sparsespec.batch.state import State
from sparsespec.batch.store import LocalStore
from sparsespec.evaluation.benchmark import data
from sparsespec.evaluation.benchmark.bench import Bench
from sparsespec.evaluation.benchmark.report import Column, Table
from sparsespec.evaluation.benchmark.soak import pictures_of
from sparsespec.formats.report import RUN_SCRIPT

__all__ = ["ENGINES", "Survival", "differences", "run", "survive", "write_pictures"]

ENGINES = ("inline", "processes")

_PHOTOGRAPHS = 200
_KILLS = 50
_KILLS_A_RUN = 10
_QUICK = (24, 4)
_LOOKING = 0.01
"""Seconds from one look at the progress of a run to the next."""
_LIMIT = 3600.0
_START = [sys.executable, "-P", "-c", "from sparsespec.cli import main; main()"]


@dataclass
class Survival:
    """What became of runs that were killed.

    Attributes
    ----------
    runs : int
        Runs from the first image to the end.
    kills : int
        How often one was killed.
    alone : int
        Of these only the main process.
    before, between, after : int
        Of all before the first image was done, between the first and the last, and after the last.
    different : list of str
        Files that are not those of the undisturbed run, byte for byte.
    lost : int
        Images without a result in the end.
    twice : int
        Images with more than one.
    again : int
        Images that were done once more although their results had been noted.
    given_up : int
        Images that were at work when a run was killed, and were begun anew.
    unfinished : int
        Temporary files left behind.
    """

    runs: int = 0
    kills: int = 0
    alone: int = 0
    before: int = 0
    between: int = 0
    after: int = 0
    different: list[str] = field(default_factory=list)
    lost: int = 0
    twice: int = 0
    again: int = 0
    given_up: int = 0
    unfinished: int = 0


def run(bench: Bench) -> list[Table]:
    """Kill runs, go on with them, and compare what they leave with an undisturbed one."""
    photographs, kills = _QUICK if bench.quick else (_PHOTOGRAPHS, _KILLS)
    photographs = bench.options.photographs or photographs
    table = Table(
        "killing",
        f"Runs over {photographs:,} photographs, ended by SIGKILL at random moments and gone on with",
        (
            Column("engine", "engine"),
            Column("kills", "kills", "count"),
            Column("alone", "of the main process only", "count"),
            Column("before", "before the first image", "count"),
            Column("between", "between", "count"),
            Column("after", "after the last", "count"),
            Column("runs", "runs", "count"),
            Column("different", "other bytes", "count"),
            Column("lost", "lost", "count"),
            Column("twice", "twice", "count"),
            Column("again", "done again", "count"),
            Column("given_up", "given up at work", "count"),
            Column("remark", "remark"),
        ),
    )
    if os.name != "posix":
        table.rows.append({"ours": True, "status": "missing", "remark": "there is no SIGKILL on this system"})
        return [table]
    source = bench.folder / "killing"
    write_pictures(list(bench.photos.values())[: data.EVERYDAY], photographs, source)
    for engine in ENGINES:
        bench.say(f"killing: {engine}")
        found = survive(source, bench.folder / f"killing-{engine}", engine=engine, kills=kills, say=bench.say)
        row = {**vars(found), "different": len(found.different)}
        remark = ", ".join(sorted(set(found.different))[:3]) or None
        table.rows.append({"ours": True, "status": "done", "engine": engine, "remark": remark} | row)
    table.notes.append(
        "*Other bytes*: files of the output that differ from those of an undisturbed run, run.json excepted, of which"
        " all but times is compared, and report/run.js, which holds times. *Given up at work*: images that a process"
        " was at when it was killed."
    )
    return [table]


def write_pictures(photos: Sequence[data.Photograph], count: int, folder: Path) -> None:
    """Write so many different pictures, of up to 448 pixels a side, into a few folders; every tenth as PNG."""
    for number, picture in enumerate(pictures_of(photos, count)):
        ending = "png" if number % 10 == 9 else "jpg"
        path = folder / f"folder-{number % 3}" / f"{number:04}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, quality=92)


def survive(
    source: Path,
    folder: Path,
    *,
    engine: str = "inline",
    kills: int = _KILLS,
    kills_a_run: int = _KILLS_A_RUN,
    seed: int = 0,
    options: Sequence[str] = (),
    say: Any = None,
) -> Survival:
    """Run over images undisturbed, and again and again with kills.

    Parameters
    ----------
    source : Path
        Folder of images.
    folder : Path
        For the outputs; removed at the end unless something is wrong with them.
    engine : str
        Of `ENGINES`.
    kills : int
        How often in all: by turns all processes of a run at once, and the main one only.
    kills_a_run : int
        How often a run is killed before it is left to end.
    seed : int
        Of the moments.
    options : sequence of str
        More of ``sparsespec run``.
    say : callable, optional
        Called with a line after each kill and each run.

    Returns
    -------
    Survival

    Raises
    ------
    RuntimeError
        A run ended by itself with a failure.
    """
    rng = random.Random(f"{seed} {engine}")
    say = say or (lambda line: None)
    undisturbed = folder / "undisturbed"
    pace = _undisturbed(source, undisturbed, engine, options)
    say(f"undisturbed: first image after {pace.start:.1f} s, end {pace.end:.1f} s after the last of {pace.images}")
    result = Survival()
    while result.kills < kills:
        count = min(kills_a_run, kills - result.kills)
        output = folder / f"killed-{result.runs}"
        noted: set[str] = set()
        for left, phase in zip(range(count, 0, -1), _phases(count), strict=True):
            process = _begin(source, output, engine, options)
            if not _wait_for_moment(process, output, phase, left, pace, rng):
                _finish(process)
                noted = _noted(output)[0]
                break
            images = _done(output)
            alone = bool(result.kills % 2)
            _kill(process, whole=not alone)
            result.alone += alone
            result.kills += 1
            place = "before" if images == 0 else "after" if images == pace.images else "between"
            setattr(result, place, getattr(result, place) + 1)
            settled, begun = _noted(output)
            result.again += len(noted - settled)
            result.given_up += len(begun)
            noted = settled
            say(f"kill {result.kills}: {images} images, {len(settled)} noted, {len(begun)} at work")
        said = _finish(_begin(source, output, engine, options))
        result.again += len(noted) - _earlier(said)
        result.runs += 1
        different = differences(output, undisturbed)
        _count(result, output, pace.images)
        result.different += different
        say(f"run {result.runs}: {said}; {len(different)} files differ")
        if not different:
            shutil.rmtree(output)
    if not result.different:
        shutil.rmtree(folder)
    return result


def differences(output: Path, other: Path) -> list[str]:
    """List the files of two outputs that differ, apart from times and the lock."""
    files = _files(output), _files(other)
    found = sorted(files[0] ^ files[1])
    both = sorted(files[0] & files[1])
    found += [name for name in both if (output / name).read_bytes() != (other / name).read_bytes()]
    if without_times(output) != without_times(other):
        found.append("run.json")
    return found


def _files(output: Path) -> set[str]:
    names = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    return names - {"run.json", RUN_SCRIPT, ".sparsespec/lock"}


def without_times(output: Path) -> Any:
    """Read ``run.json`` without what differs from run to run."""
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    for name in ("started", "finished", "execution"):
        del record[name]
    del record["totals"]["seconds"]
    for row in record["images"]:
        # Which stages there are is known, not how long they took.
        row["seconds"] = sorted(row["seconds"])
    return record


@dataclass(frozen=True)
class _Pace:
    """How an undisturbed run goes: seconds until its first image, and from its last to its end; images."""

    start: float
    end: float
    images: int


def _undisturbed(source: Path, output: Path, engine: str, options: Sequence[str]) -> _Pace:
    images = sum(1 for path in source.rglob("*") if path.is_file())
    began = time.monotonic()
    process = _begin(source, output, engine, options)
    times: dict[int, float] = {}
    while process.poll() is None:
        done = _done(output)
        for least in (1, images):
            if done >= least:
                times.setdefault(least, time.monotonic())
        time.sleep(_LOOKING)
    end = time.monotonic()
    _finish(process)
    return _Pace(times.get(1, end) - began, end - times.get(images, end), images)


def _phases(count: int) -> list[str]:
    """Say in which part of a run each of so many kills comes: a fifth before any image, and as many after the last."""
    few = max(1, count // 5) if count > 2 else 0
    return ["start"] * few + ["images"] * (count - 2 * few) + ["end"] * few


def _wait_for_moment(
    process: subprocess.Popen[str], output: Path, phase: str, left: int, pace: _Pace, rng: random.Random
) -> bool:
    """Wait for the moment to kill a run; False when the run has ended before."""
    done = _done(output)
    if phase == "start":
        end = time.monotonic() + rng.random() * pace.start
        while time.monotonic() < end and _done(output) == done and process.poll() is None:
            time.sleep(_LOOKING)
        return process.poll() is None
    if phase == "images":
        # As far as the moments that are left get, on average, with what is left.
        wanted = min(pace.images - 1, done + math.ceil(rng.random() * 2 * (pace.images - done) / (left + 1)))
        while _done(output) < wanted and process.poll() is None:
            time.sleep(_LOOKING)
        wait = rng.random() * pace.end
    else:
        # The files about all images are written when the last ones have been noted.
        while _done(output) < pace.images and process.poll() is None:
            time.sleep(_LOOKING)
        while len(_noted(output)[0]) < pace.images and process.poll() is None:
            time.sleep(_LOOKING)
        wait = rng.random() * pace.end
    with suppress(subprocess.TimeoutExpired):
        process.wait(wait)
    return process.poll() is None


def _done(output: Path) -> int:
    """Label images that are there."""
    return sum(1 for _ in _below(output / mask_file("x").partition("/")[0], ".png"))


def _below(folder: Path, ending: str) -> Iterator[str]:
    for here, _, files in os.walk(folder):
        yield from (os.path.join(here, name) for name in files if name.endswith(ending))


def _noted(output: Path) -> tuple[set[str], set[str]]:
    """Images whose results are noted, and images that were begun and are not."""
    state = State(LocalStore(output))
    settled: set[str] = set()
    begun: set[str] = set()
    with suppress(PlanError, OSError):
        for shard in state.shards():
            past, _ = state.past(shard)
            settled |= past.settled.keys()
            begun |= past.names.keys()
    return settled, begun - settled


def _begin(source: Path, output: Path, engine: str, options: Sequence[str]) -> subprocess.Popen[str]:
    command = [*_START, "run", "--input", str(source), "--output", str(output), "--engine", engine]
    command += ["--workers", str(max(1, min(2, available_cpus()))), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def _finish(process: subprocess.Popen[str]) -> str:
    said = process.communicate(timeout=_LIMIT)[0].strip()
    if process.returncode != 0:
        raise RuntimeError(f"a run ended with exit code {process.returncode}:\n{said}")
    return said


def _kill(process: subprocess.Popen[str], *, whole: bool) -> None:
    for pid in [process.pid, *(_descendants(process.pid) if whole else ())]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def _descendants(pid: int) -> list[int]:
    """Processes that a process has started, and what these have; where the system says."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parent = int(entry.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        following = children.get(waiting.pop(), [])
        found += following
        waiting += following
    return found


def _earlier(said: str) -> int:
    """How many images were settled when a run began, by its last line."""
    _, found, rest = said.rpartition("\n")[2].partition(" done (")
    return int(rest.partition(" ")[0]) if found else 0


def _count(result: Survival, output: Path, images: int) -> None:
    rows = Counter(
        (row["path"], row["page"])
        for row in json.loads((output / "run.json").read_text(encoding="utf-8"))["images"]
        if row["status"] == "done" and (output / row["mask"]).is_file()
    )
    result.lost += images - len({path for path, _ in rows})
    result.twice += sum(1 for count in rows.values() if count > 1)
    coco = json.loads((output / "instances.json").read_text(encoding="utf-8"))
    for kind in ("images", "annotations"):
        numbers = Counter(entry["id"] for entry in coco[kind])
        result.twice += sum(1 for count in numbers.values() if count > 1)
    result.unfinished += sum(1 for _ in output.rglob(TEMPORARY_PATTERN))
