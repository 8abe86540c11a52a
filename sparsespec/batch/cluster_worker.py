"""What happens on a worker of the engine for clusters: it is looked at, it works on shards, it is told to stop."""

from __future__ import annotations

import asyncio
import hashlib
import io
import pickle
import signal
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sparsespec
from sparsespec._threads import available_cpus
from sparsespec.batch.job import Engine, Job
from sparsespec.batch.store import LocalStore, Store

if TYPE_CHECKING:
    from sparsespec.batch.shard import ShardSummary, ShardTask

__all__ = [
    "Probe",
    "Refusal",
    "Ticket",
    "forget",
    "look",
    "other_version",
    "pack",
    "pack_task",
    "stop",
    "unpack",
    "unpack_task",
    "work",
]

_JOBS_KEPT = 2
_RUNS_KEPT = 64
_LEVEL = 3
_INSTALL = "install the same version on every machine"


class Refusal(Exception):
    """A worker that can't take part, now or later."""


@dataclass(frozen=True)
class Probe:
    """How a worker shows that it reads and writes where the others do.

    Attributes
    ----------
    token : str
        A file in the output, relative to it, which holds its own name.
    path : str or None
        A file in the input, relative to it.
    size : int or None
        Its size in bytes.
    """

    token: str
    path: str | None = None
    size: int | None = None


class _Packer(pickle.Pickler):
    """Puts a model's name, or its path, and its SHA-256 in the place of where its file lies on this machine."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self._models: dict[Path, tuple[str, str | None, str, str]] = {}

    def persistent_id(self, obj: Any) -> Any:
        """Give what stands for an object, None for most."""
        if isinstance(obj, Path):
            return self._models.get(obj)
        # A Backbone comes before its own state, where the path is.
        if type(obj).__module__ == "sparsespec.backbone" and isinstance(getattr(obj, "path", None), Path):
            self._models[obj.path] = _model(obj.path)
        return None


class _Unpacker(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        """Find the file of a model on this machine."""
        return _model_file(*pid[1:])


def pack(job: Job) -> bytes:
    """Pickle a job so that it can be unpacked on another machine.

    Folders become absolute, and models are named by what they are rather than by where they lie.

    Raises
    ------
    TypeError
        The segmenter can't be pickled.
    """
    file = io.BytesIO()
    try:
        _Packer(file).dump(replace(job, source=_absolute(job.source), target=_absolute(job.target)))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"segmenter can't be sent to other processes ({type(error).__name__}: {error}): it must be picklable, of a"
            " class or function at the top of a module that the workers can import"
        ) from error
    return file.getvalue()


def unpack(packed: bytes) -> Job:
    """Undo `pack`.

    Raises
    ------
    Refusal
        The model isn't on this machine or is another one, or something can't be imported here.
    """
    try:
        job = _Unpacker(io.BytesIO(packed)).load()
    except Refusal:
        raise
    except OSError:
        raise  # a disk that doesn't answer may do so later
    except Exception as error:
        raise Refusal(
            f"it can't load what it is to do ({type(error).__name__}: {' '.join(str(error).split())}): {_INSTALL}, and"
            " what the segmenter needs"
        ) from error
    assert isinstance(job, Job)
    return job


def pack_task(task: ShardTask) -> bytes:
    """Pickle and compress a task: names of files have much in common."""
    return zlib.compress(pickle.dumps(task, protocol=5), _LEVEL)


def unpack_task(packed: bytes) -> ShardTask:
    """Undo `pack_task`."""
    task: ShardTask = pickle.loads(zlib.decompress(packed))
    return task


def _absolute(store: Store) -> Store:
    return replace(store, folder=store.folder.absolute()) if isinstance(store, LocalStore) else store


def _model(path: Path) -> tuple[str, str | None, str, str]:
    from sparsespec.models import list_models
    from sparsespec.models.store import StoreError

    for info in list_models():
        with suppress(StoreError):
            if info.path == path:
                return ("model", info.name, str(path), _sha256(path))
    return ("model", None, str(path.absolute()), _sha256(path))


def _model_file(name: str | None, place: str, sha256: str) -> Path:
    from sparsespec.models import get_model
    from sparsespec.models.store import StoreError

    try:
        path = Path(place) if name is None else get_model(name).path
    except (StoreError, ValueError) as error:
        raise Refusal(f"the model {name} can't be looked for there: {error}") from error
    if not path.is_file():
        if name is None:
            raise Refusal(f"there is no model {place} there: it must lie at the same path on every machine")
        raise Refusal(f"the model {name} isn't there ({path}): run 'sparsespec models pull {name}' on every machine")
    found = _sha256(path)
    if found != sha256:
        raise Refusal(
            f"its file of the model {name or place} is another one: its SHA-256 begins with {found[:16]}, here with"
            f" {sha256[:16]}; copy the same file to every machine"
        )
    return path


_digests: dict[tuple[str, int, int], str] = {}


def _sha256(path: Path) -> str:
    from sparsespec.models.store import file_sha256

    found = path.stat()
    key = (str(path), found.st_size, found.st_mtime_ns)
    if key not in _digests:
        _digests[key] = file_sha256(path)
    return _digests[key]


_lock = threading.Lock()
_jobs: OrderedDict[str, Job] = OrderedDict()
_runs: OrderedDict[str, threading.Event] = OrderedDict()
_seen: deque[str] = deque(maxlen=_RUNS_KEPT)
_engines: dict[int, tuple[int, Any]] = {}


def _job(packed: bytes) -> Job:
    name = hashlib.sha256(packed).hexdigest()
    with _lock:
        if name in _jobs:
            _jobs.move_to_end(name)
            return _jobs[name]
    job = unpack(packed)
    with _lock:
        _jobs[name] = job
        while len(_jobs) > _JOBS_KEPT:
            _jobs.popitem(last=False)
    return job


def _stopping(run: str) -> threading.Event:
    with _lock:
        event = _runs.setdefault(run, threading.Event())
        while len(_runs) > _RUNS_KEPT:
            _runs.popitem(last=False)
    return event


def other_version(theirs: str, ours: str) -> str:
    """Say that a worker has another version of the package."""
    return f"it has sparsespec {theirs}, and {ours} is run here: {_INSTALL}"


@dataclass(frozen=True)
class Ticket:
    """What lets a worker take part in a run.

    Attributes
    ----------
    version : str
        Of the package, where the run was started.
    run : str
        Which run it is.
    packed : bytes
        The job, of `pack`.
    probe : Probe or None
        Whether the worker sees the same files; None where that is certain.
    """

    version: str
    run: str
    packed: bytes
    probe: Probe | None = None


async def look(ticket: Ticket, *, local: bool = False) -> str | None:
    """See whether this worker can take part.

    Parameters
    ----------
    ticket : Ticket
        In which run.
    local : bool
        It is a process of the machine the run was started on, and hears the terminal's Ctrl-C too; that is for the one
        in front alone.

    Returns
    -------
    str or None
        Why not, and what to do.
    """
    if local:
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not in the thread that answers the scheduler.
    return await asyncio.to_thread(_look, ticket)


def _look(ticket: Ticket) -> str | None:
    try:
        _admitted(ticket)
    except Refusal as error:
        return str(error)
    except OSError as error:
        return f"it can't read the model: {error}"
    return None


def _admitted(ticket: Ticket) -> Job:
    """Give the job, if this worker can take part; a Refusal if not."""
    own = sparsespec.__version__
    if own != ticket.version:
        raise Refusal(other_version(own, ticket.version))
    job = _job(ticket.packed)
    with _lock:
        seen = ticket.run in _seen
    if ticket.probe is not None and not seen:
        reason = _unlike(job, ticket.probe)
        if reason is not None:
            raise Refusal(reason)
        with _lock:
            _seen.append(ticket.run)
    return job


def _unlike(job: Job, probe: Probe) -> str | None:
    """Say in what this worker's files differ from those that the run was started on."""
    try:
        same = job.target.read(probe.token) == probe.token.encode()
    except FileNotFoundError:
        same = False
    except OSError as error:
        return f"it can't read the output {job.target.place}: {error}"
    if not same:
        return _elsewhere("output", job.target)
    own = f"{probe.token}-{threading.get_ident()}-{id(job):x}"
    try:
        job.target.write(own, b"")
        job.target.remove(own)
    except OSError as error:
        return f"it can't write to the output {job.target.place}: {error}"
    if probe.path is not None:
        try:
            size = job.source.size(probe.path)
        except OSError as error:
            return f"it can't read the input {job.source.place}: {error}"
        if size != probe.size:
            return _elsewhere("input", job.source)
    return None


def _elsewhere(what: str, store: Store) -> str:
    if store.folder is None:
        return f"it doesn't see the same files at the {what} {store.place}: check its credentials and its endpoint"
    return (
        f"it doesn't see the same files in the {what} folder {store.place}: give a folder that all machines share, at"
        " the same path on each, or a URL such as s3://BUCKET/FOLDER"
    )


def work(ticket: Ticket, task: bytes, threads: int | None, crowd: Mapping[str, int]) -> tuple[str, Any]:
    """Work on a shard; what the scheduler hands to a worker comes to this.

    Parameters
    ----------
    ticket : Ticket
        Of the run.
    task : bytes
        The shard, of `pack_task`.
    threads : int or None
        For this shard; None for a fair share of the machine's processors.
    crowd : mapping of str to int
        Tasks that a machine may be given at once, by its address; those of most machines under the name "".

    Returns
    -------
    (str, str or ShardSummary)
        ``("refused", why)`` or ``("done", summary)``.
    """
    try:
        job = _admitted(ticket)
    except Refusal as error:
        return "refused", str(error)
    share = min(threads, available_cpus()) if threads else _fair_share(crowd)
    return "done", _work_shard(job, ticket.run, unpack_task(task), share)


def _work_shard(job: Job, run: str, task: ShardTask, threads: int) -> ShardSummary:
    from sparsespec.batch.shard import ShardSummary, work_shard

    stopping = _stopping(run)
    if stopping.is_set():
        return ShardSummary(task.number, stopped=True)
    try:
        return work_shard(job, task, _engine(threads), stopping=stopping)
    except BaseException:
        _close(threading.get_ident())
        raise


def _fair_share(crowd: Mapping[str, int]) -> int:
    from distributed import get_worker
    from distributed.comm import get_address_host

    try:
        host = get_address_host(get_worker().address)
    except ValueError:  # not on a worker
        host = ""
    return max(1, available_cpus() // max(1, crowd.get(host, crowd.get("", 1))))


def _engine(threads: int) -> Engine:
    """Give the process that works for this thread; it stays from shard to shard, the network loaded."""
    own = threading.get_ident()
    had = _engines.get(own)
    if had is not None and had[0] == threads:
        return had[1]
    _close(own)
    from sparsespec.batch.processes import Processes

    engine: Engine = Processes(workers=1, threads=threads)
    _engines[own] = (threads, engine)
    return engine


def _close(thread: int) -> None:
    with _lock:
        _, engine = _engines.pop(thread, (0, None))
    close = getattr(engine, "close", None)
    if close is not None:
        close()


async def stop(run: str) -> None:
    """Finish the files at work, and begin no others, neither now nor in shards still to come."""
    _stopping(run).set()


async def forget(run: str) -> None:
    """Stop, and end the processes that worked here as soon as they have finished the file in hand."""
    _stopping(run).set()
    for thread in list(_engines):
        threading.Thread(target=_close, args=(thread,), daemon=True).start()
