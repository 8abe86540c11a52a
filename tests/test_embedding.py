"""What a server does with the library: threads, forks, containers, and no place to write."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec import Segmenter
from sparsespec.backbone import Backbone, BusyError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A bright disc on a textured ground."""
    y, x = np.mgrid[0:height, 0:width]
    disc = (y - height / 2) ** 2 + (x - width / 3) ** 2 < (min(height, width) / 4) ** 2
    noise = np.random.default_rng(seed).integers(0, 40, (height, width, 3))
    return (np.where(disc[..., None], [215, 120, 60], [30, 90, 40]) + noise).astype(np.uint8)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def run_python(code: str, *, options: tuple[str, ...] = ("-W", "error"), **more: Any) -> str:
    """Run a program in a new process and return what it printed."""
    # The threads of OpenBLAS, which starts them when it is loaded, count as threads when a process is forked.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **more.pop("environment", {})}
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=240, env=environment, **more
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    return done.stdout


# Threads


def test_threads_share_a_segmenter() -> None:
    segmenter = Segmenter(Backbone(threads=1, concurrency=3), long_side=112)
    pictures = [picture(60 + 12 * k, 150 - 15 * k, k) for k in range(6)]
    alone = [segmenter(each) for each in pictures]
    with ThreadPoolExecutor(5) as pool:
        together = list(pool.map(segmenter, pictures))
    assert any(len(each) for each in alone)
    for one, other in zip(alone, together, strict=True):
        assert one.labels.tobytes() == other.labels.tobytes()
        assert one.scores.tobytes() == other.scores.tobytes()
        assert one.boxes.tobytes() == other.boxes.tobytes()
        assert {**one.info, "seconds": 0} == {**other.info, "seconds": 0}


class Watched:
    """A picture that says when its pixels are read, and can be made to wait then."""

    dtype = np.dtype(np.uint8)

    def __init__(self, pixels: np.ndarray, gate: threading.Event) -> None:
        self.pixels, self.shape, self.gate = pixels, pixels.shape, gate
        self.read_by = threading.Event()

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        self.read_by.set()
        assert self.gate.wait(30)
        return self.pixels[top:bottom, left:right]


@pytest.mark.parametrize("whole", [False, True], ids=["features", "segmenter"])
def test_callers_wait_without_pixels_and_one_too_many_is_refused(whole: bool) -> None:
    net = Backbone(threads=1, concurrency=2, max_waiting=1)
    call: Callable[[Any], Any] = Segmenter(net, long_side=112) if whole else net.features
    gate = threading.Event()
    sources = [Watched(picture(40, 60), gate) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        served = [pool.submit(call, source) for source in sources[:2]]
        for source in sources[:2]:
            assert source.read_by.wait(30)
        waiting = pool.submit(call, sources[2])
        wait_until(lambda: net._turns.waiting == 1)
        with pytest.raises(BusyError, match=r"2 of 2 turns are taken and 1 callers are waiting.*max_waiting"):
            call(sources[3])
        assert not sources[2].read_by.is_set()
        assert not sources[3].read_by.is_set()
        gate.set()
        for each in (*served, waiting):
            assert each.result(60) is not None
    assert (net._turns.served, net._turns.waiting) == (0, 0)
    assert call(sources[3]) is not None


def test_a_failure_gives_its_turn_back() -> None:
    net = Backbone(threads=1, concurrency=1, max_waiting=0)
    segmenter = Segmenter(net, n_instances=50, long_side=14)
    for _ in range(3):
        with pytest.raises(ValueError, match="n_instances is 50"):
            segmenter(picture(20, 20))
        with pytest.raises(ValueError, match="finite"):
            net.features(np.full((20, 20, 3), np.nan))
    assert net.features(picture(20, 20), long_side=28).grid == (2, 2)


def test_one_turn_for_all_that_is_done_inside() -> None:
    net = Backbone(threads=1, concurrency=1, max_waiting=0)
    with net.turn(), net.turn():
        net.features(picture(20, 20), long_side=28)
        assert net._turns.served == 1
        # Another thread is another caller.
        with ThreadPoolExecutor(1) as pool, pytest.raises(BusyError):
            pool.submit(net.features, picture(20, 20)).result(60)
    assert net._turns.served == 0


@pytest.mark.parametrize(
    ("cpus", "options", "expected"),
    [
        (8, {}, (8, 1)),
        (8, {"threads": 1}, (1, 8)),
        (8, {"threads": 3}, (3, 2)),
        (2, {"threads": 4}, (4, 1)),
        (2, {"threads": 2, "concurrency": 5}, (2, 5)),
    ],
)
def test_threads_times_callers_are_what_was_granted(
    monkeypatch: pytest.MonkeyPatch, cpus: int, options: dict[str, int], expected: tuple[int, int]
) -> None:
    monkeypatch.setattr("sparsespec.backbone.available_cpus", lambda: cpus)
    net = Backbone(**options)  # type: ignore[arg-type]
    assert (net.threads, net.concurrency) == expected
    assert net.max_waiting is None


@pytest.mark.parametrize(("name", "value"), [("concurrency", 0), ("concurrency", -1), ("max_waiting", -1)])
def test_bad_numbers_of_callers(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least .* got {value}"):
        Backbone(**{name: value})  # type: ignore[arg-type]


# Processes


def test_a_copy_has_turns_of_its_own() -> None:
    net = Backbone(threads=1, concurrency=2, max_waiting=3)
    with net.turn():
        copy = pickle.loads(pickle.dumps(net))
        assert (copy.threads, copy.concurrency, copy.max_waiting) == (1, 2, 3)
        assert copy._turns.served == 0
    assert repr(copy) == repr(net)


@pytest.mark.slow
def test_a_used_segmenter_can_be_sent_to_a_spawned_process() -> None:
    segmenter = Segmenter(threads=1, long_side=112)
    expected = segmenter(picture(50, 60)).labels
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        np.testing.assert_array_equal(pool.submit(segmenter, picture(50, 60)).result(timeout=240).labels, expected)


_FORK = """
import os, sys, signal
import numpy as np
import sparsespec
{before}
child = os.fork()
if child == 0:
    signal.alarm(200)  # rather than waiting for ever
    {inside}
    sys.exit(0)
print("child ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
_MAKE = "image = np.zeros((40, 60, 3), np.uint8); net = sparsespec.Backbone(threads=2)"
# Python says that a process with threads was forked: that is what these tests are about.
_FORKS_WITH_THREADS = ("-W", "error", "-W", "ignore::DeprecationWarning")


@needs_fork
def test_fork_after_import_and_making() -> None:
    inside = "print(net.features(image, long_side=28).grid, flush=True)"
    printed = run_python(_FORK.format(before=_MAKE, inside=inside))
    assert printed.splitlines() == ["(2, 2)", "child ended with 0"]


@needs_fork
@pytest.mark.slow
def test_fork_with_a_segmenter_that_was_not_used() -> None:
    before = f"{_MAKE}; segmenter = sparsespec.Segmenter(net, long_side=112)"
    inside = "print(segmenter(image).labels.shape, flush=True)"
    printed = run_python(_FORK.format(before=before, inside=inside))
    assert printed.splitlines() == ["(40, 60)", "child ended with 0"]


_USE = f"{_MAKE}; net.features(image, long_side=28)"


@needs_fork
def test_fork_after_use_is_refused() -> None:
    uses = ("net.features(image)", "net.providers", "sparsespec.Segmenter(net)(image)", "net.turn().__enter__()")
    before, code = f"{_USE}\nprint(os.getpid(), flush=True)", ""
    for use in uses:
        caught = f"""
    try:
        {use}
    except sparsespec.backbone.ForkError as error:
        print(type(error).__mro__[1].__name__, error, flush=True)
    """
        code += _FORK.format(before=before, inside=caught.strip())
        before = ""
    parent, *said = run_python(code, options=_FORKS_WITH_THREADS).splitlines()
    assert len(said) == 2 * len(uses)
    for message, ending in zip(said[::2], said[1::2], strict=True):
        assert message.startswith("RuntimeError the model 'dinov2-vits14-int8' had been used in process " + parent)
        for advice in ('multiprocessing.get_context("spawn")', "make the Backbone or Segmenter in the forked process"):
            assert advice in message
        # And the child comes to an end, though it has a session whose threads it does not have.
        assert ending == "child ended with 0"


@needs_fork
def test_children_of_a_process_that_has_a_session_come_to_their_end() -> None:
    own = "image = sparsespec.Backbone(threads=2).features(image, long_side=28)"
    code = "".join(
        _FORK.format(before=before, inside=inside) for before, inside in ((_USE, "pass"), ("", "del net"), ("", own))
    )
    assert run_python(code, options=_FORKS_WITH_THREADS) == "child ended with 0\n" * 3


@needs_fork
def test_fork_while_another_thread_is_in_its_turn() -> None:
    before = f"""
{_MAKE}
import threading
inside, leave = threading.Event(), threading.Event()
def hold():
    with net.turn(), net._lock:
        inside.set()
        leave.wait(60)
thread = threading.Thread(target=hold)
thread.start()
inside.wait(60)
"""
    # The model itself was not used: the child has it for itself.
    code = _FORK.format(before=before, inside="print(net.features(image, long_side=28).grid, flush=True); os._exit(0)")
    printed = run_python(f"{code}\nleave.set()", options=_FORKS_WITH_THREADS)
    assert printed.splitlines() == ["(2, 2)", "child ended with 0"]


_NUMBA_FORK = """
import os, signal, sys
import numpy as np, numba
from sparsespec._threads import ForkError
from sparsespec.affinity import boc_knn_graph
features = np.random.default_rng(0).random((64, 8), np.float32)
expected = boc_knn_graph(features, 4, method="exact")
print(numba.threading_layer(), flush=True)
child = os.fork()
if child == 0:
    signal.alarm(200)
    try:
        again = boc_knn_graph(features, 4, method="exact")
        print("same" if (again != expected).nnz == 0 else "different", flush=True)
    except ForkError as error:
        print(error, flush=True)
    os._exit(0)
print("child ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["omp", "workqueue"])
def test_fork_after_kernels_on_several_threads(wanted: str) -> None:
    code = f"import numba; numba.config.THREADING_LAYER = {wanted!r}\n{_NUMBA_FORK}"
    try:
        layer, said, ending = run_python(code, options=_FORKS_WITH_THREADS).splitlines()
    except AssertionError as error:
        if "No threading layer could be loaded" in str(error):
            pytest.skip(f"Numba has no threading layer {wanted!r} here")
        raise
    assert layer == wanted
    # GNU OpenMP would end the process; Numba's own layer starts anew.
    assert said == "same" if wanted == "workqueue" else said.startswith("Numba's threads (omp) were in use")
    assert ending == "child ended with 0"


# Nowhere to write, nobody's home


_SEGMENT = """
import numpy as np, sparsespec
pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
print(sparsespec.Segmenter(threads=1, long_side=112)(pixels).labels.shape)
"""


def _on_read_only_file_system(code: str, writable: Path) -> str:
    """Run a program without HOME where even the superuser can write to nothing but one folder; or skip."""
    if shutil.which("unshare") is None:
        pytest.skip("this system has no unshare")
    guard = 'mount -o remount,ro,bind / && ! touch /sparsespec-test 2>/dev/null && mount -t tmpfs tmpfs "$1" && cd "$1"'
    enter = ["unshare", "-m", "sh", "-c"]
    probe = subprocess.run([*enter, guard, "sh", writable], capture_output=True, text=True, timeout=60)
    if probe.returncode != 0:
        pytest.skip(f"no file system can be made read-only here: {probe.stderr.strip()}")
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    done = subprocess.run(
        [*enter, f'{guard} && shift && exec "$@"', "sh", writable, sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=400,
        env={**environment, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_read_only_file_system_without_home(tmp_path: Path) -> None:
    assert _on_read_only_file_system(_SEGMENT, writable=tmp_path) == "(40, 60)\n"


_ONE_KERNEL = """
import numpy as np
from sparsespec.channels import channel_entropy
print(channel_entropy(np.random.default_rng(0).random((50, 4), np.float32)).shape)
"""


@pytest.mark.skipif(os.name == "nt", reason="a user of Windows has a profile")
def test_user_without_a_name_or_a_home(tmp_path: Path) -> None:
    # Only the working directory can be written: Numba would make a folder called "~" in it.
    nameless = "import pwd\ndef getpwuid(uid): raise KeyError(uid)\npwd.getpwuid = getpwuid"
    code = f"{nameless}\n{_ONE_KERNEL}\nimport os; print(os.listdir())"
    printed = _on_read_only_file_system(code, writable=tmp_path)
    assert printed.splitlines() == ["(4,)", "[]"]


def test_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "file" / "below")}
    assert run_python(_ONE_KERNEL, environment=environment) == "(4,)\n"


# Memory


_SOAK = """
import numpy as np
from sparsespec.evaluation.benchmark import memory
from sparsespec import Backbone, Segmenter
from concurrent.futures import ThreadPoolExecutor
rng = np.random.default_rng(0)
noise = rng.integers(0, 50, (160, 160, 3), dtype=np.uint8)
segmenter = Segmenter(Backbone(threads=1, concurrency=2), scale=1.0)
def one(shape):
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[shape[0] // 4 : shape[0] // 2, shape[1] // 4 : shape[1] // 2] = 200
    segmenter(pixels + noise[: shape[0], : shape[1]])
shapes = [tuple(map(int, shape)) for shape in rng.integers(30, 110, (120, 2))]
one((109, 109))
with ThreadPoolExecutor(2) as pool:
    list(pool.map(one, shapes[:40]))
    before = memory.current_bytes()
    list(pool.map(one, shapes[40:]))
    print(memory.current_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_photographs_seen() -> None:
    # 80 photographs of sizes not seen before, each with features of up to 290 kB and some megabytes around them.
    assert int(run_python(_SOAK)) < 25e6


def test_nothing_heavy_is_imported_for_the_new_modules() -> None:
    code = """
import sys
import sparsespec, sparsespec._cgroups, sparsespec._threads, sparsespec._turns, sparsespec.batch.several
print([name for name in ("onnxruntime", "numba", "scipy", "PIL") if name in sys.modules])
"""
    assert run_python(code) == "[]\n"


# The page about it


def test_the_server_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import json
    import re
    import urllib.error
    import urllib.request

    from PIL import Image

    page = (Path(__file__).parents[1] / "docs" / "embedding.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(code.replace("max_waiting=32", "max_waiting=0, concurrency=1"), "embedding.md", "exec"), names)
    server, backbone = names["server"], names["backbone"]
    serving = threading.Thread(target=server.serve_forever)
    serving.start()

    def post(body: bytes) -> tuple[int, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}/", data=body)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    try:
        file = io.BytesIO()
        Image.fromarray(picture(80, 120)).save(file, "png")
        status, content = post(file.getvalue())
        assert status == 200
        assert len(content["boxes"]) == len(content["scores"])
        assert post(b"no image")[0] == 400
        with backbone.turn():
            status, content = post(file.getvalue())
        assert (status, "turns are taken" in content["error"]) == (503, True)
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
