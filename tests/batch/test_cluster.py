from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sparsespec
from sparsespec.batch import Row, cluster_worker, find_inputs, run_batch
from sparsespec.batch.cluster import Cluster, ClusterError
from sparsespec.batch.cluster_worker import Refusal
from sparsespec.batch.job import Item, Job, Outcome
from sparsespec.batch.one import process_file
from sparsespec.batch.shard import ShardSummary, ShardTask, work_shard
from sparsespec.batch.store import LocalStore

from .servers import attached

pytest.importorskip("distributed", reason="distributed is not installed")

PATIENCE = 300.0
DEADLY = 77
"""Value of the first pixel of an image that ends the worker of whoever looks at it."""

# What processes of the cluster import: the tests themselves are no module for them.
STUB = """
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparsespec.batch.store import LocalStore


@dataclass
class Result:
    labels: np.ndarray
    scores: np.ndarray
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bright:
    "Takes bright pixels for one object; notes in a file which worker it was."

    log: str
    seconds: float = 0.003

    def __call__(self, image, *, out=None):
        worker = os.getppid()
        with open(self.log, "a") as file:
            file.write(f"{worker}\\n")
        if image[0, 0, 0] == 77:
            os.kill(worker, signal.SIGKILL)
            time.sleep(60)
        time.sleep(self.seconds)
        labels = (image.max(axis=2) > 127).astype(np.int32)
        return Result(labels, np.full(int(labels.max()), 0.5, np.float32), {"model": "stub"})


class Elsewhere(LocalStore):
    "A folder that some machines don't share."

    def read(self, path):
        if os.environ.get("STUB_ELSEWHERE") == "output":
            raise FileNotFoundError(path)
        return super().read(path)

    def size(self, path):
        return 1 if os.environ.get("STUB_ELSEWHERE") == "input" else super().size(path)


class Full(LocalStore):
    "Can't list what a shard has left, as a disk that doesn't answer; the first time or always."

    def list(self, prefix):
        marker = self.folder / "asked"
        if self.folder.name == "full" or not marker.exists():
            marker.touch()
            raise OSError(5, "the disk doesn't answer")
        return super().list(prefix)
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("stub")
    (folder / "cluster_stub.py").write_text(STUB, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))
        import cluster_stub  # type: ignore[import-not-found]

        yield cluster_stub
        sys.modules.pop("cluster_stub")


@pytest.fixture
def job(stub: Any, tmp_path: Path) -> Callable[..., tuple[Job, list[ShardTask]]]:
    def make(shards: int, size: int, *, seconds: float = 0.003, deadly: int | None = None) -> tuple[Job, list[Any]]:
        source = tmp_path / "in"
        source.mkdir(exist_ok=True)
        items = []
        for number in range(shards * size):
            pixels = np.full((8, 10, 3), 20, np.uint8)
            pixels[2:4, 1 : 2 + number % 7] = 200
            if number == deadly:
                pixels[0, 0, 0] = DEADLY
            Image.fromarray(pixels).save(source / f"{number:03d}.png")
            items.append(Item(f"{number:03d}.png", f"{number:03d}"))
        target = tmp_path / "out"
        target.mkdir()
        segmenter = stub.Bright(str(tmp_path / "log"), seconds)
        tasks = [ShardTask(k, tuple(items[k * size : (k + 1) * size])) for k in range(shards)]
        return Job(segmenter, LocalStore(source), LocalStore(target)), tasks

    return make


class Here:
    """Works on one file after the other in this process."""

    settings: dict[str, Any] = {}  # noqa: RUF012

    def outcomes(
        self, job: Job, items: Any, *, begin: Callable[[Item], None], stopping: threading.Event
    ) -> Iterator[tuple[Item, list[Outcome]]]:
        for item in items:
            if stopping.is_set():
                return
            begin(item)
            yield item, process_file(job, item)


def inline(job: Job, tasks: list[ShardTask], folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    alone = Job(job.segmenter, job.source, LocalStore(folder))
    for task in tasks:
        work_shard(alone, task, Here())
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    """All that must not depend on who did the work."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    volatile = (".sparsespec/times/", ".sparsespec/journal/")
    return {name: content for name, content in found.items() if not name.startswith(volatile)}


def recorded(folder: Path) -> dict[str, str]:
    """Path and status of all images in the records."""
    found = {}
    for file in (folder / ".sparsespec/records").iterdir():
        for line in file.read_text(encoding="utf-8").splitlines():
            text = line if line.startswith("{") else line.partition(" ")[2]
            row = json.loads(text)
            if "path" in row:
                assert row["path"] not in found
                found[row["path"]] = row["status"]
    return found


def until(true: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.05)
    raise AssertionError("nothing happened")


class Farm:
    """A scheduler and workers, each a process as on machines of their own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        note = folder / "scheduler.json"
        self.scheduler = self._start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--dashboard-address", "127.0.0.1:0",
            "--scheduler-file", str(note), **environment,
        )  # fmt: skip
        until(lambda: note.exists() and note.stat().st_size)
        self.address: str = json.loads(note.read_text())["address"]

    def worker(self, **environment: str) -> subprocess.Popen[bytes]:
        return self._start(
            "worker", self.address, "--nthreads", "1", "--no-dashboard", "--memory-limit", "0", "--local-directory",
            str(self._folder), "--death-timeout", "300", **environment,
        )  # fmt: skip

    def _start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"log-{len(self._processes)}").open("wb") as log:
            process = subprocess.Popen(
                attached("dask", *command),
                stdin=subprocess.PIPE,
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def wait_for(self, workers: int) -> None:
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=PATIENCE)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """With all that it has started, as if the machine were gone."""
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)

    def close(self) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                self.kill(process)
            process.communicate(timeout=PATIENCE)


@pytest.fixture
def farm(stub: Any, tmp_path: Path) -> Iterator[Callable[..., Farm]]:
    if os.name != "posix":
        pytest.skip("processes are killed by group here, which POSIX has")
    farms = []

    def start(**environment: str) -> Farm:
        folder = tmp_path / "farm"
        folder.mkdir()
        farms.append(Farm(folder, **environment))
        return farms[-1]

    yield start
    for each in farms:
        each.close()


@pytest.fixture
def pretending(tmp_path: Path) -> Callable[[str], str]:
    """Give a PYTHONPATH with which a process runs some code before any other."""

    def make(code: str) -> str:
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(textwrap.dedent(code), encoding="utf-8")
        return os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])

    return make


def run(cluster: Cluster, job: Job, tasks: Any) -> list[ShardSummary]:
    return list(cluster.summaries(job, tasks, stopping=threading.Event()))


# A cluster of this machine


def test_local_cluster_gives_what_inline_gives(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    work, tasks = job(12, 4)
    taken = 0

    def counted() -> Iterator[ShardTask]:
        nonlocal taken
        for task in tasks:
            taken += 1
            yield task

    summaries = []
    for summary in Cluster(workers=2, window=1).summaries(work, counted(), stopping=threading.Event()):
        summaries.append(summary)
        assert taken <= len(summaries) + 2 + 1  # one at each worker, one ready
    assert sorted(summary.number for summary in summaries) == list(range(12))
    assert all(summary.files == 4 and not summary.stopped for summary in summaries)
    assert sorted(row[0] for summary in summaries for row in summary.rows) == [f"{k:03d}.png" for k in range(48)]
    assert files(tmp_path / "out") == inline(work, tasks, tmp_path / "alone")
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.slow
def test_stop_finishes_the_files_at_work_and_the_next_run_goes_on(job: Any, tmp_path: Path) -> None:
    work, tasks = job(6, 10, seconds=0.02)
    stopping = threading.Event()
    cluster = Cluster(workers=1)
    summaries = []
    for summary in cluster.summaries(work, tasks, stopping=stopping):
        summaries.append(summary)
        stopping.set()
    done = {path for path in files(tmp_path / "out") if path.startswith("masks/")}
    assert 10 <= len(done) < 60
    assert not summaries[0].stopped
    assert all(summary.stopped for summary in summaries[2:])
    assert sum(len(summary.rows) for summary in summaries) == len(done)

    rest = run(cluster, work, tasks)
    assert sum(len(summary.rows) for summary in rest) == 60 - len(done)
    assert files(tmp_path / "out") == inline(work, tasks, tmp_path / "alone")


def test_closing_gives_up_at_once(job: Any, tmp_path: Path) -> None:
    import psutil

    work, tasks = job(6, 10, seconds=0.05)
    before = set(psutil.Process().children(recursive=True))
    summaries = Cluster(workers=1).summaries(work, tasks, stopping=threading.Event())
    next(summaries)
    summaries.close()  # type: ignore[attr-defined]
    until(lambda: not set(psutil.Process().children(recursive=True)) - before - _trackers())
    assert len([path for path in files(tmp_path / "out") if path.startswith("masks/")]) < 60


def _trackers() -> set[Any]:
    """The process of multiprocessing that outlives its users."""
    import psutil

    children = psutil.Process().children()
    return {child for child in children if "resource_tracker" in " ".join(child.cmdline())}


@pytest.mark.slow
def test_a_disk_that_does_not_answer_is_asked_again(job: Any, stub: Any, tmp_path: Path) -> None:
    work, tasks = job(1, 2)
    shaky = Job(work.segmenter, work.source, stub.Full(tmp_path / "out"))
    summaries = run(Cluster(workers=1), shaky, tasks)
    assert [summary.files for summary in summaries] == [2]

    (tmp_path / "full").mkdir()
    dead = Job(work.segmenter, work.source, stub.Full(tmp_path / "full"))
    with pytest.raises(ClusterError, match=r"shard 0 .* 1 times.*the disk doesn't answer.*the same command"):
        run(Cluster(workers=1, retries=0), dead, tasks)


def test_nothing_to_do() -> None:
    work = Job(print, LocalStore(Path()), LocalStore(Path()))  # type: ignore[arg-type]
    assert run(Cluster(workers=1), work, []) == []


# A scheduler with workers of its own


@pytest.mark.slow
def test_a_worker_is_killed_and_another_joins(job: Any, farm: Any, tmp_path: Path) -> None:
    work, tasks = job(30, 8)
    machines = farm()
    first, second = machines.worker(), machines.worker()
    machines.wait_for(2)
    summaries: list[ShardSummary] = []
    for summary in Cluster(machines.address).summaries(work, tasks, stopping=threading.Event()):
        summaries.append(summary)
        if len(summaries) == 10:
            before = set(_workers(machines.address))
            machines.kill(first)
            machines.worker()
            until(lambda: _workers(machines.address).keys() - before)  # noqa: B023 - called at once
    assert second.poll() is None
    assert sorted(summary.number for summary in summaries) == list(range(30))
    assert recorded(tmp_path / "out") == {f"{number:03d}.png": "done" for number in range(240)}
    assert files(tmp_path / "out") == inline(work, tasks, tmp_path / "alone")
    workers = (tmp_path / "log").read_text().split()
    assert len(set(workers) - {str(os.getppid())}) == 3  # the killed one, the other, the new one


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_ends_as_inline_does(job: Any, farm: Any, tmp_path: Path) -> None:
    work, _ = job(4, 64, seconds=0.01)
    inputs = find_inputs(tmp_path / "in")
    machines = farm()
    first = machines.worker()
    machines.worker()
    machines.wait_for(2)
    told = []

    def progress(row: Row, position: int, total: int) -> None:
        told.append(row.path)
        if len(told) == 50:
            machines.kill(first)

    result = run_batch(
        work.segmenter, inputs, tmp_path / "out", engine=Cluster(machines.address), shard_size=64, progress=progress
    )
    assert result.counts["done"] == 256
    run_batch(work.segmenter, inputs, tmp_path / "alone", shard_size=64)
    ours, alone = (
        {
            name: content
            for name, content in files(tmp_path / folder).items()
            if name not in ("run.json", "report/run.js")
        }
        for folder in ("out", "alone")
    )
    assert ours == alone
    assert {"instances.json", "report.html"} <= ours.keys()


@pytest.mark.slow
def test_a_file_that_kills_workers_is_found_and_given_up(job: Any, farm: Any, tmp_path: Path) -> None:
    work, tasks = job(2, 4, deadly=5)
    machines = farm(DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0")
    machines.worker()
    summaries = run(Cluster(machines.address), work, tasks)
    assert sorted(summary.number for summary in summaries) == [0, 1]
    status = {f"{number:03d}.png": "failed" if number == 5 else "done" for number in range(8)}
    assert recorded(tmp_path / "out") == status
    rows = {path: (state, error) for summary in summaries for path, state, error, _ in summary.rows}
    assert rows["005.png"][0] == "failed"
    assert "quarantined" in (rows["005.png"][1] or "")
    assert not (tmp_path / "out/masks/005.png").exists()


@pytest.mark.slow
def test_the_scheduler_is_lost(job: Any, farm: Any) -> None:
    work, tasks = job(20, 4, seconds=0.02)
    machines = farm()
    machines.worker()
    summaries = Cluster(machines.address).summaries(work, tasks, stopping=threading.Event())
    next(summaries)
    machines.kill(machines.scheduler)
    with pytest.raises(ClusterError, match=r"was lost in the middle of the run; .* the same command goes on"):
        list(summaries)


@pytest.mark.slow
def test_workers_that_cannot_take_part(job: Any, farm: Any, pretending: Any, stub: Any, tmp_path: Path) -> None:
    work, tasks = job(1, 2)
    machines = farm()

    def refused(work: Job, *, late: bool = False, **environment: str) -> str:
        worker = machines.worker(**environment)
        if not late:
            machines.wait_for(1)
        with pytest.raises(ClusterError) as caught:
            run(Cluster(machines.address, worker_limit=PATIENCE), work, tasks)
        machines.kill(worker)
        # Until the scheduler has noticed.
        until(lambda: not _workers(machines.address))
        return str(caught.value)

    other = """
        import importlib.metadata as metadata

        found = metadata.version
        metadata.version = lambda name: "0.0.9" if name == "sparsespec" else found(name)
    """
    text = refused(work, PYTHONPATH=pretending(other))
    assert "it has sparsespec 0.0.9, and " + sparsespec.__version__ in text
    assert machines.address in text

    absent = """
        import importlib.metadata as metadata
        import sys

        found = metadata.version

        def version(name):
            if name == "sparsespec":
                raise metadata.PackageNotFoundError(name)
            return found(name)

        metadata.version = version
        sys.modules["sparsespec"] = None
    """
    (tmp_path / "site/sitecustomize.py").write_text(textwrap.dedent(absent), encoding="utf-8")
    site = os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]])
    for late in (False, True):
        text = refused(work, late=late, PYTHONPATH=site)
        assert "not installed there" in text
        assert f"pip install 'sparsespec[dask]=={sparsespec.__version__}'" in text

    assert "can't load what it is to do (ModuleNotFoundError" in refused(work, PYTHONPATH="")

    apart = Job(work.segmenter, stub.Elsewhere(work.source.folder), stub.Elsewhere(work.target.folder))
    for what in ("output", "input"):
        text = refused(apart, late=what == "output", STUB_ELSEWHERE=what)
        assert f"doesn't see the same files in the {what} folder" in text
        assert "s3://BUCKET" in text
    assert files(tmp_path / "out") == {}

    with pytest.raises(ClusterError, match=r"no workers for 0\.5 seconds: start some with 'dask worker tcp://"):
        run(Cluster(machines.address, worker_limit=0.5), work, tasks)


def _workers(address: str) -> dict[str, int]:
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        return dict(client.nthreads())


# Addresses and arguments


@pytest.mark.parametrize("listening", [False, True])
def test_an_address_that_does_not_answer(job: Any, listening: bool) -> None:
    work, tasks = job(1, 1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:  # takes the connection and says nothing
            server.listen()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"the scheduler {address} doesn't answer within 1 seconds.*'dask sched"):
            run(Cluster(address, connect_limit=1), work, tasks)


def test_an_address_of_something_else(job: Any) -> None:
    work, tasks = job(1, 1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"

        def answer() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
                        connection.recv(1000)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(ClusterError, match=f"the scheduler {address} "):
            run(Cluster(address, connect_limit=2), work, tasks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheduler": "10.0.0.5:8786"}, "scheduler must be an address such as 'tcp://"),
        ({"scheduler": "tcp://10.0.0.5"}, "scheduler must be an address"),
        ({"scheduler": "tcp://10.0.0.5:8786", "workers": 2}, "workers are those of the scheduler"),
        ({"workers": 0}, "workers"),
        ({"threads": 0}, "threads"),
        ({"window": 0}, "window"),
        ({"retries": -1}, "retries must be a whole number from 0 on, not -1"),
        ({"connect_limit": 0}, "connect_limit must be a number of seconds above 0"),
        ({"worker_limit": -1.0}, "worker_limit must be"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cluster(**arguments)


def test_settings_are_plain_values() -> None:
    settings = Cluster("tls://10.0.0.5:8786", threads=2).settings
    assert json.loads(json.dumps(settings))["scheduler"] == "tls://10.0.0.5:8786"
    assert settings["engine"] == "dask"


def test_without_distributed_the_extra_is_named(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work, tasks = job(1, 1)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"pip install 'sparsespec\[dask\]'"):
        run(Cluster(), work, tasks)


# What travels


def test_a_segmenter_that_cannot_travel(job: Any) -> None:
    work, tasks = job(1, 1)
    with pytest.raises(TypeError, match="segmenter can't be sent to other processes"):
        run(Cluster(), Job(lambda image: None, work.source, work.target), tasks)  # type: ignore[arg-type,return-value]


def test_models_travel_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = sparsespec.Segmenter()
    monkeypatch.chdir(tmp_path)
    packed = cluster_worker.pack(Job(segmenter, LocalStore(Path("in")), LocalStore(Path("out"))))
    work = cluster_worker.unpack(packed)
    assert work.source.folder == tmp_path / "in"
    # On another machine the package lies elsewhere.
    model = sparsespec.models.get_model("default").path  # type: ignore[attr-defined]
    copy = tmp_path / "elsewhere.onnx"
    copy.write_bytes(model.read_bytes())
    monkeypatch.setattr("sparsespec.models.registry._FOLDER", tmp_path)
    (tmp_path / model.name).write_bytes(model.read_bytes())
    assert cluster_worker.unpack(packed).segmenter._backbone.path == tmp_path / model.name  # type: ignore[attr-defined]
    (tmp_path / model.name).unlink()
    with pytest.raises(Refusal, match="sparsespec models pull dinov2-vits14-int8"):
        cluster_worker.unpack(packed)


def test_model_files_must_be_the_same(tmp_path: Path) -> None:
    model = tmp_path / "own.onnx"
    content = sparsespec.models.get_model("default").path.read_bytes()  # type: ignore[attr-defined]
    model.write_bytes(content)
    packed = cluster_worker.pack(Job(sparsespec.Segmenter(model), LocalStore(tmp_path), LocalStore(tmp_path)))
    assert cluster_worker.unpack(packed).segmenter._backbone.path == model  # type: ignore[attr-defined]
    model.write_bytes(content + b"\0")
    with pytest.raises(Refusal, match="is another one: its SHA-256 begins with"):
        cluster_worker.unpack(packed)
    model.unlink()
    with pytest.raises(Refusal, match=r"there is no model .*own\.onnx there: it must lie at the same path"):
        cluster_worker.unpack(packed)


def test_threads_are_shared_between_all_tasks_of_a_machine() -> None:
    from sparsespec.batch.cluster import _crowd

    workers = {"tcp://10.0.0.1:1": 2, "tcp://10.0.0.1:2": 2, "tcp://10.0.0.2:1": 4, "tcp://10.0.0.3:7": 1}
    assert _crowd(workers) == {"": 4, "10.0.0.3": 1}
    assert _crowd({}) == {}
