from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sparsespec
from sparsespec import _processes
from sparsespec.batch import one, processes
from sparsespec.batch.job import Formats, Item, Job, Outcome
from sparsespec.batch.processes import Processes, WorkerError
from sparsespec.batch.store import LocalStore

HERE = Path(__file__).parent
BAD = 77
posix = pytest.mark.skipif(os.name != "posix", reason="signals and process groups of POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc of Linux")


@pytest.fixture(autouse=True)
def _four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "available_cpus", lambda: 4)


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("stubs")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


def pictures(folder: Path, greys: list[int]) -> list[Item]:
    folder.mkdir()
    items = []
    for number, grey in enumerate(greys):
        pixels = np.full((20, 30, 3), grey, np.uint8)
        pixels[5:10, 5 : 6 + number % 20] = 250
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        items.append(Item(f"{number:03}.png", f"{number:03}"))
    return items


def job_of(tmp_path: Path, segmenter: Any, output: str = "out", **options: Any) -> Job:
    (tmp_path / output).mkdir(exist_ok=True)
    stores = LocalStore(tmp_path / "in"), LocalStore(tmp_path / output)
    return Job(segmenter, *stores, Formats(overlays=False), **options)


def work(engine: Processes, job: Job, items: list[Item], **options: Any) -> dict[str, list[Outcome]]:
    options = {"begin": lambda item: None, "stopping": threading.Event(), **options}
    found = list(engine.outcomes(job, items, **options))
    assert len({item.path for item, _ in found}) == len(found)
    return {item.path: outcomes for item, outcomes in found}


def failed(found: dict[str, list[Outcome]]) -> dict[str, str | None]:
    return {path: outcomes[0].row.reason for path, outcomes in found.items() if outcomes[0].row.status == "failed"}


def pids(notes: Path) -> set[int]:
    return {int(path.name.split("-")[1]) for path in notes.glob("pid-*")}


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def lives(notes: Path) -> bool:
    """Whether any of the processes that left a note lives: it has its note locked."""
    import fcntl

    for path in notes.glob("pid-*"):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [1, 2])
def test_same_bytes_as_here(tmp_path: Path, stubs: ModuleType, workers: int) -> None:
    items = pictures(tmp_path / "in", list(range(20)))
    (tmp_path / "in" / "007.png").write_bytes(b"no image")
    here = job_of(tmp_path, stubs.Stub(), "here")
    expected = {item.path: one.process_file(here, item) for item in items}
    begun: list[str] = []
    with Processes(workers) as engine:
        found = work(engine, job_of(tmp_path, stubs.Stub()), items, begin=lambda item: begun.append(item.path))
    assert files(tmp_path / "out") == files(tmp_path / "here")
    assert len(files(tmp_path / "out" / "masks")) == 19
    assert sorted(begun) == sorted(found) == sorted(expected)
    for path, (outcome,) in expected.items():
        (other,) = found[path]
        assert (other.annotations, other.card, other.files) == (outcome.annotations, outcome.card, outcome.files)
        assert (other.row.path, other.row.status, other.row.error) == (path, outcome.row.status, outcome.row.error)


@pytest.mark.slow
def test_same_bytes_with_the_network(tmp_path: Path) -> None:
    from skimage import data

    (tmp_path / "in").mkdir()
    items = [Item(f"{name}.png", name) for name in ("astronaut", "coffee", "chelsea")]
    for item in items:
        Image.fromarray(getattr(data, item.name)()).resize((150, 100)).save(tmp_path / "in" / item.path)
    here = job_of(tmp_path, sparsespec.Segmenter(threads=2, long_side=224), "here")
    for item in items:
        one.process_file(here, item)
    with Processes(2, 1) as engine:
        found = work(engine, job_of(tmp_path, here.segmenter), items)
    assert failed(found) == {}
    assert all(outcomes[0].row.instances for outcomes in found.values())
    assert files(tmp_path / "out") == files(tmp_path / "here")


@pytest.mark.slow
def test_one_session_for_each_worker_kept_from_call_to_call(tmp_path: Path, stubs: ModuleType, notes: Path) -> None:
    items = pictures(tmp_path / "in", [1] * 12)
    stub = stubs.Stub({1: "slow"}, notes)
    with Processes(2) as engine:
        work(engine, job_of(tmp_path, stub), items[:6])
        first = pids(notes)
        # An equal job, as another task brings it.
        work(engine, job_of(tmp_path, stubs.Stub({1: "slow"}, notes)), items[6:])
        assert len(first) == 2
        assert pids(notes) == first
        # Another job: the same processes.
        work(engine, job_of(tmp_path, stubs.Stub({}, notes), "other"), items)
        assert pids(notes) == first
        assert len(files(tmp_path / "other" / "masks")) == 12
    assert os.getpid() not in first


def test_threads_reach_the_segmenter_and_numba(tmp_path: Path, stubs: ModuleType) -> None:
    items = pictures(tmp_path / "in", [1])
    with Processes(threads=2) as engine:
        assert dict(engine.settings) == {"engine": "processes", "workers": 2, "threads": 2}
        ((outcome,),) = work(engine, job_of(tmp_path, stubs.Stub()), items).values()
    assert outcome.row.details["tokens"] == 2
    assert outcome.row.details["solver"] == "2"


def test_no_more_threads_than_processors() -> None:
    assert (Processes().workers, Processes().threads) == (4, 1)
    assert (Processes(3).workers, Processes(3).threads) == (3, 1)
    assert (Processes(threads=4).workers, Processes(1).threads) == (1, 4)
    with pytest.raises(ValueError, match=r"3 workers x 2 threads are more than the 4 processors .* at most 4"):
        Processes(3, 2)
    with pytest.raises(ValueError, match="5 workers are more than the 4 processors"):
        Processes(5)
    with pytest.raises(ValueError, match="workers must be"):
        Processes(0)
    with pytest.raises(ValueError, match="start_limit must be"):
        Processes(1, start_limit=0)


@posix
@pytest.mark.parametrize(
    ("workers", "what", "said"),
    [
        (1, "segfault", "ended by SIGSEGV (it touched memory that is not its own), twice"),
        (2, "segfault", "ended by SIGSEGV (it touched memory that is not its own), twice"),
        (2, "killed", "ended by SIGKILL (killed from outside, as the system does when memory runs out), twice"),
        (1, "exit", "ended with exit code 3, twice"),
        (2, "sys.exit", "ended with exit code 1 (no reason), twice"),
    ],
)
def test_what_ends_its_process_is_quarantined(
    tmp_path: Path, stubs: ModuleType, notes: Path, workers: int, what: str, said: str
) -> None:
    items = pictures(tmp_path / "in", [1, 2, BAD, 3, 4, BAD, 5, 6])
    begun: list[str] = []
    with Processes(workers) as engine:
        job = job_of(tmp_path, stubs.Stub({BAD: what}, notes))
        found = work(engine, job, items, begin=lambda item: begun.append(item.path))
    assert failed(found) == {"002.png": "crash", "005.png": "crash"}
    error = found["002.png"][0].row.error
    assert error is not None
    assert said in error
    assert "\n" not in error
    assert len(found) == len(items)
    assert sorted(begun) == [item.path for item in items]
    assert {"masks/001.png", "masks/003.png", "masks/007.png"} <= set(files(tmp_path / "out"))
    # Two for each bad file, and those that work on when they are done with.
    assert 4 <= len(pids(notes)) <= 4 + workers


def test_what_ends_its_process_once_only_is_done(tmp_path: Path, stubs: ModuleType, notes: Path) -> None:
    items = pictures(tmp_path / "in", [1, BAD, 2])
    with Processes(2) as engine:
        found = work(engine, job_of(tmp_path, stubs.Stub({BAD: "exit"}, notes, once=True)), items)
    assert failed(found) == {}
    assert len(files(tmp_path / "out" / "masks")) == 3


@posix
def test_nothing_else_is_at_work_when_it_is_tried_again(
    tmp_path: Path, stubs: ModuleType, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = pictures(tmp_path / "in", [1, BAD, 1, 1, 1, 1])
    beside: list[int] = []

    class Watched(processes._Floor):
        @contextmanager
        def alone(self) -> Iterator[None]:
            with super().alone():
                beside.append(self._together)
                yield

    monkeypatch.setattr(processes, "_Floor", Watched)
    with Processes(3) as engine:
        found = work(engine, job_of(tmp_path, stubs.Stub({1: "slow", BAD: "exit"}, notes)), items)
    assert failed(found) == {"001.png": "crash"}
    assert beside == [0]


@pytest.mark.parametrize("what", ["hang", pytest.param("stubborn", marks=posix)])
def test_time_limit(tmp_path: Path, stubs: ModuleType, notes: Path, what: str) -> None:
    items = pictures(tmp_path / "in", [1, BAD, 2, 3])
    with Processes(2) as engine:
        found = work(engine, job_of(tmp_path, stubs.Stub({BAD: what}, notes), time_limit=0.6), items)
    assert failed(found) == {"001.png": "timeout"}
    assert "time limit of 0.6 s" in str(found["001.png"][0].row.error)
    assert found["001.png"][0].row.seconds["total"] >= 0.6
    assert len(files(tmp_path / "out" / "masks")) == 3


@linux
def test_memory_limit(tmp_path: Path, stubs: ModuleType, notes: Path) -> None:
    items = pictures(tmp_path / "in", [1, BAD, 2])
    with Processes(1, memory_limit=300 << 20) as engine:
        found = work(engine, job_of(tmp_path, stubs.Stub({BAD: "allocate"}, notes)), items)
    assert failed(found) == {"001.png": "memory"}
    assert "more than 300 MiB of memory" in str(found["001.png"][0].row.error)
    with (
        Processes(1, memory_limit=1 << 20) as engine,
        pytest.raises(WorkerError, match="memory_limit=1048576 before its first file"),
    ):
        work(engine, job_of(tmp_path, stubs.Stub()), items)


def test_prints_of_libraries_do_no_harm(tmp_path: Path, stubs: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    items = pictures(tmp_path / "in", [BAD] * 3)
    with Processes(1) as engine:
        found = work(engine, job_of(tmp_path, stubs.Stub({BAD: "print"})), items)
    assert failed(found) == {}
    assert capfd.readouterr().out == ""


def test_a_segmenter_that_cannot_be_loaded(tmp_path: Path, stubs: ModuleType) -> None:
    items = pictures(tmp_path / "in", [1, 2])
    with Processes(2) as engine:
        with pytest.raises(WorkerError, match=r"cannot be used in a worker process: .*the model is missing"):
            work(engine, job_of(tmp_path, stubs.Unloadable()), items)
        # The engine can be used after that.
        assert failed(work(engine, job_of(tmp_path, stubs.Stub()), items)) == {}


@posix
@pytest.mark.parametrize(("how", "starts"), [("exit", 1), ("killed", 2)])
def test_processes_that_die_before_they_are_ready(
    tmp_path: Path, stubs: ModuleType, notes: Path, how: str, starts: int
) -> None:
    items = pictures(tmp_path / "in", [1, 2])
    begun: list[Item] = []
    with Processes(1) as engine, pytest.raises(WorkerError, match=r"before it was ready; it wrote:\n.*my last words"):
        work(engine, job_of(tmp_path, stubs.Dying(how, notes)), items, begin=begun.append)
    assert begun == []
    assert len(pids(notes)) == starts


def test_processes_that_are_never_ready(tmp_path: Path, stubs: ModuleType, notes: Path) -> None:
    items = pictures(tmp_path / "in", [1])
    with Processes(1, start_limit=0.5) as engine, pytest.raises(WorkerError, match=r"not ready after 0\.5 s"):
        work(engine, job_of(tmp_path, stubs.Dying("hang", notes)), items)


def test_the_package_is_not_found(tmp_path: Path, stubs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    items = pictures(tmp_path / "in", [1])
    monkeypatch.setattr(_processes, "_BOOT", _processes._BOOT.replace("{module}", "nosuchpackage"))
    with Processes(1) as engine, pytest.raises(WorkerError, match=r"exit code 1 .*No module named 'nosuchpackage'"):
        work(engine, job_of(tmp_path, stubs.Stub()), items)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nosuchpython"))
    with Processes(1) as engine, pytest.raises(WorkerError, match=r"could not be started: .*nosuchpython"):
        work(engine, job_of(tmp_path, stubs.Stub()), items)


def test_a_segmenter_that_cannot_be_sent(tmp_path: Path) -> None:
    items = pictures(tmp_path / "in", [1])
    with Processes(1) as engine, pytest.raises(WorkerError, match=r"cannot be sent to worker processes .*'inline'"):
        work(engine, job_of(tmp_path, lambda image: image), items)


def test_a_segmenter_of_the_main_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = pictures(tmp_path / "in", [1])
    segmenter = type("Mine", (), {"__module__": "__main__", "__call__": lambda self, image: image})
    monkeypatch.setattr(sys.modules["__main__"], "Mine", segmenter, raising=False)
    with Processes(1) as engine, pytest.raises(WorkerError, match="'Mine' stands in the main program"):
        work(engine, job_of(tmp_path, segmenter()), items)


def test_stopping_finishes_what_is_at_work(tmp_path: Path, stubs: ModuleType) -> None:
    items = pictures(tmp_path / "in", [1] * 12)
    stopping = threading.Event()
    begun: list[str] = []

    def begin(item: Item) -> None:
        begun.append(item.path)
        if len(begun) == 3:
            stopping.set()

    with Processes(2) as engine:
        found = work(engine, job_of(tmp_path, stubs.Stub({1: "slow"})), items, begin=begin, stopping=stopping)
    assert 3 <= len(begun) <= 4
    assert sorted(found) == sorted(begun)
    assert failed(found) == {}


@posix
def test_closing_kills_what_is_at_work(tmp_path: Path, stubs: ModuleType, notes: Path) -> None:
    items = pictures(tmp_path / "in", [1, BAD, BAD])
    with Processes(2) as engine:
        outcomes = engine.outcomes(
            job_of(tmp_path, stubs.Stub({BAD: "hang"}, notes)),
            items,
            begin=lambda item: None,
            stopping=threading.Event(),
        )
        assert next(outcomes)[0] == items[0]
        wait_for(lambda: len(pids(notes)) == 2)
        outcomes.close()
        assert not lives(notes)
        assert failed(work(engine, job_of(tmp_path, stubs.Stub()), items)) == {}


def test_one_call_at_a_time(tmp_path: Path, stubs: ModuleType) -> None:
    items = pictures(tmp_path / "in", [1, 2, 3])
    job = job_of(tmp_path, stubs.Stub())
    with Processes(1) as engine:
        outcomes = engine.outcomes(job, items, begin=lambda item: None, stopping=threading.Event())
        next(outcomes)
        with pytest.raises(RuntimeError, match="make an engine for each"):
            work(engine, job, items)
        assert len(list(outcomes)) == 2
        assert len(work(engine, job, items)) == 3


def test_files_are_taken_as_they_are_worked_on(tmp_path: Path, stubs: ModuleType) -> None:
    items = pictures(tmp_path / "in", [1])
    taken = 0

    def endless() -> Iterator[Item]:
        nonlocal taken
        while True:
            taken += 1
            yield items[0]

    with Processes(1) as engine:
        outcomes = engine.outcomes(
            job_of(tmp_path, stubs.Stub()), endless(), begin=lambda item: None, stopping=threading.Event()
        )
        next(outcomes)
        time.sleep(0.3)
        assert taken <= 8
        outcomes.close()


def test_errors_of_the_caller_come_out(tmp_path: Path, stubs: ModuleType) -> None:
    items = pictures(tmp_path / "in", [1, 2])

    def begin(item: Item) -> None:
        raise OSError("the journal's disk is full")

    with Processes(2) as engine:
        with pytest.raises(OSError, match="journal's disk"):
            work(engine, job_of(tmp_path, stubs.Stub()), items, begin=begin)
        assert failed(work(engine, job_of(tmp_path, stubs.Stub()), items)) == {}


@linux
def test_nothing_is_left(tmp_path: Path, stubs: ModuleType, notes: Path) -> None:
    items = pictures(tmp_path / "in", [1, BAD, 2, 3])
    before = set(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    with Processes(2) as engine:
        work(engine, job_of(tmp_path, stubs.Stub({BAD: "exit"}, notes)), items)
        assert any(Path(f"/proc/{pid}").exists() for pid in pids(notes))
    assert len(pids(notes)) >= 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids(notes))
    assert set(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == threads


@linux
def test_an_engine_that_nobody_has_any_more(tmp_path: Path, stubs: ModuleType, notes: Path) -> None:
    items = pictures(tmp_path / "in", [1])
    engine = Processes(1)
    work(engine, job_of(tmp_path, stubs.Stub({}, notes)), items)
    assert lives(notes)
    del engine
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids(notes))


def test_from_another_thread(tmp_path: Path, stubs: ModuleType) -> None:
    items = pictures(tmp_path / "in", [1, 2, 3])
    found: list[dict[str, list[Outcome]]] = []

    def run() -> None:
        with Processes(1) as engine:
            found.append(work(engine, job_of(tmp_path, stubs.Stub()), items))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(found[0]) == 3


PARENT = """
import sys, threading
from pathlib import Path
sys.path.insert(0, {here!r})
import stubs
from sparsespec.batch.job import Item, Job
from sparsespec.batch.processes import Processes
from sparsespec.batch.store import LocalStore
root = Path({root!r})
job = Job(stubs.Stub({{77: {what!r}}}, root / "notes"), LocalStore(root / "in"), LocalStore(root / "out"))
items = [Item("000.png", "000"), Item("001.png", "001")]
engine = Processes(1)
for item, _ in engine.outcomes(job, items, begin=lambda item: None, stopping=threading.Event()):
    print(item.path, flush=True)
print("end", flush=True)
"""


def parent(tmp_path: Path, what: str) -> subprocess.Popen[str]:
    (tmp_path / "out").mkdir()
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(here=str(HERE), root=str(tmp_path), what=what), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=os.name == "posix",
    )


@posix
@pytest.mark.parametrize("what", ["hang", pytest.param("stubborn", marks=linux)])
def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path, stubs: ModuleType, notes: Path, what: str) -> None:
    pictures(tmp_path / "in", [1, BAD])
    with parent(tmp_path, what) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "000.png\n"
        assert lives(notes)
        time.sleep(0.1)
        process.kill()
    wait_for(lambda: not lives(notes))


@posix
def test_ctrl_c_is_for_the_parent(tmp_path: Path, stubs: ModuleType, notes: Path) -> None:
    pictures(tmp_path / "in", [1, BAD])
    with parent(tmp_path, "hang") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "000.png\n"
        # As a terminal does: to the whole group.
        os.killpg(process.pid, signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 130)
    assert out == ""
    assert errors.strip().endswith("KeyboardInterrupt")
    assert not lives(notes)


def test_a_program_need_not_close_the_engine(tmp_path: Path, stubs: ModuleType, notes: Path) -> None:
    pictures(tmp_path / "in", [1, 2])
    with parent(tmp_path, "hang") as process:
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (0, "000.png\n001.png\nend\n", "")
    assert os.name != "posix" or not lives(notes)


@linux
def test_temporary_files_of_a_killed_process_go_with_it(
    tmp_path: Path, stubs: ModuleType, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(processes.tempfile, "tempdir", str(scratch))
    child = processes._Child(1, scratch=True)
    with suppress(processes.EndedError):
        (Path(str(child.scratch)) / "fetched.jpg").touch()
        child.kill()
        child.ask("job", (b"", 1), 1.0)
    assert "SIGKILL" in child.end()
    assert list(scratch.iterdir()) == []


@posix
def test_a_process_that_cannot_be_killed_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    child = processes._Child(1, scratch=False)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "GRACE", 0.1)
        patch.setattr(processes, "LAST_GRACE", 0.1)
        # One that waits for a disk can only be pretended.
        patch.setattr(processes, "kill_group", lambda process: None)
        os.kill(child.pid, signal.SIGSTOP)
        assert "cannot be ended" in child.end()
        assert "could not be killed" in caplog.text
    processes.kill_group(child._process)
    child._process.wait()
    child._listener.join()


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = "import json, sys, sparsespec.batch.worker, sparsespec.batch.one; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"numba", "scipy", "skimage", "onnxruntime", "pyamg"} & set(json.loads(done.stdout))
