"""What this machine and this installation have, whether they can run the package, and how fast."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec import __version__
from sparsespec._sessions import automatic_order, import_onnxruntime, lacking_driver
from sparsespec._threads import available_cpus
from sparsespec.backbone import Backbone
from sparsespec.models import UnknownModelError, get_model, resolve
from sparsespec.providers import (
    AUTO,
    CPU,
    OPENVINO,
    PROVIDERS,
    available_providers,
    find_provider,
    installed_runtimes,
    missing_message,
    runtime_conflict,
)

__all__ = ["Diagnosis", "Problem", "diagnose"]

_PACKAGES = ("numpy", "scipy", "numba", "pyamg", "scikit-image", "imageio", "click")
_EXTRAS = ("onnx", "openvino", "huggingface-hub", "safetensors", "pycocotools")
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
# As /proc/cpuinfo has them, x86 and ARM, from the plain to those that networks in few bits are fast with.
_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8",
    "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_VNNI = {"avx_vnni", "avx512_vnni"}
_BF16 = {"avx512_bf16", "amx_bf16"}
_SHAPE = (360, 480)
_ENOUGH_MEMORY = 1.0e9
_SAME_FEATURES = 0.99


@dataclass(frozen=True)
class Problem:
    """Something that is wrong or could be better.

    Attributes
    ----------
    text : str
        What, in one line.
    remedy : str
        What to do about it, in one line.
    level : str
        ``error`` when nothing can be run because of it, ``warning``, or ``hint``.
    """

    text: str
    remedy: str
    level: str = "warning"


@dataclass
class Diagnosis:
    """What was found.

    Attributes
    ----------
    facts : dict of str to dict
        By section: ``versions``, ``runtime``, ``processor``, ``memory``, ``storage``, ``model``, ``speed``. Values are
        text, numbers, None, and lists and dicts of them.
    problems : list of Problem
        Worst first.
    """

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def can_run(self) -> bool:
        """Whether images can be segmented here."""
        return all(problem.level != "error" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain types, for JSON."""
        problems = [vars(problem) for problem in self.problems]
        return {"can_run": self.can_run, "problems": problems, **self.facts}


def diagnose(
    model: str | os.PathLike[str] = "default",
    *,
    provider: str = AUTO,
    provider_options: dict[str, str] | None = None,
    seconds: float = 10.0,
) -> Diagnosis:
    """Look at the machine, the installation and a model, and time the model.

    Nothing is written, but for what Numba keeps of compiled kernels, and nothing is fetched from the network.

    Parameters
    ----------
    model : str or path, default "default"
        What to run, see :class:`sparsespec.Backbone`.
    provider, provider_options
        What to run it on.
    seconds : float, default 10
        Roughly how long to measure; loading and compiling come on top. 0 leaves measuring out.

    Returns
    -------
    Diagnosis
        Whatever goes wrong is in its ``problems``.

    Raises
    ------
    ValueError
        On a negative ``seconds``, an unknown provider, or options that can't be its.
    """
    if not seconds >= 0:
        raise ValueError(f"seconds must be at least 0, got {seconds!r}")
    if provider != AUTO:
        find_provider(provider)
    examination = _Examination()
    for section in (_versions, _runtime, _processor, _memory, _storage):
        with examination.guarded(section.__name__.strip("_")):
            section(examination)
    with examination.guarded("model"):
        _model(examination, model)
        with examination.guarded("runtime"):
            backbone = _started(examination, model, provider, provider_options)
            if seconds and backbone is not None:
                with examination.guarded("speed"):
                    _speed(examination, backbone, seconds)
    order = ("error", "warning", "hint")
    examination.result.problems.sort(key=lambda problem: order.index(problem.level))
    return examination.result


class _Examination:
    """The diagnosis as it grows."""

    def __init__(self) -> None:
        self.result = Diagnosis()

    def note(self, section: str, **facts: Any) -> None:
        self.result.facts.setdefault(section, {}).update(facts)

    def add(self, text: str, remedy: str, level: str = "warning") -> None:
        problem = Problem(_one_line(text), _one_line(remedy), level)
        if problem not in self.result.problems:
            self.result.problems.append(problem)

    @contextmanager
    def guarded(self, section: str) -> Iterator[None]:
        """Turn what goes wrong in one section into a problem: the others are worth looking at all the more."""
        try:
            yield
        except Exception as error:  # whatever a broken installation comes up with
            fatal = section in ("model", "runtime", "speed")
            text, remedy = _split(str(error) or type(error).__name__)
            self.add(f"{section}: {text}", remedy or "see the message", "error" if fatal else "warning")


def _versions(found: _Examination) -> None:
    versions: dict[str, str | None] = {"sparsespec": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in (*_PACKAGES, *_EXTRAS)}
    found.note("versions", system=platform.platform(terse=True), machine=platform.machine(), **versions)


def _runtime(found: _Examination) -> None:
    installed = installed_runtimes()
    found.note("runtime", distributions=installed)
    conflict = runtime_conflict()
    if conflict is not None:
        found.add(*_split(conflict))
    runtime = import_onnxruntime()
    available = list(runtime.get_available_providers())
    names = available_providers(available)
    found.note("runtime", onnxruntime=runtime.__version__, build=_build(), execution_providers=available)
    found.note("runtime", providers=names, auto_tries=[each.name for each in automatic_order(available)])
    if OPENVINO.name in names:
        found.note("runtime", openvino_devices=_openvino_devices())
    _unused_hardware(found, available)


def _unused_hardware(found: _Examination, available: list[str]) -> None:
    cuda = PROVIDERS["cuda"]
    has_driver = sys.platform in cuda.systems and lacking_driver() is None
    found.note("runtime", nvidia_driver=has_driver)
    if has_driver and cuda.execution_provider not in available:
        message = missing_message(cuda, available)
        found.add("an NVIDIA GPU's driver is here, but ONNX Runtime can't use it", message.split(". ", 1)[1], "hint")
    accelerated = [each for each in automatic_order(available) if each.precision is not None]
    if accelerated and _version("onnx") is None:
        named = accelerated[0].name
        found.add(
            f"8-bit models can't be run on {named} without the package onnx", "pip install 'sparsespec[gpu]'", "hint"
        )


def _build() -> str | None:
    """Name the distribution whose files are really there; where two are installed that is the one that came last."""
    try:
        from onnxruntime.capi import build_and_package_info
    except ImportError:
        return None
    return getattr(build_and_package_info, "package_name", None)


def _openvino_devices() -> list[str]:
    try:
        import openvino

        return list(openvino.Core().available_devices)
    except Exception as error:  # it is optional; a broken one shows when it is asked for
        return [f"none: {_one_line(str(error))}"]


def _processor(found: _Examination) -> None:
    flags = _flags()
    granted = available_cpus()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    variables = {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}
    found.note("processor", name=_processor_name(), instructions=[name for name in _FLAGS if name in flags])
    found.note("processor", of_the_machine=os.cpu_count(), affinity=affinity, granted=granted, variables=variables)
    if affinity is not None and granted < affinity:
        found.note("processor", limited_by="the CPU quota of the control group")
    if flags and platform.machine().lower() in ("x86_64", "amd64"):
        if "avx2" not in flags:
            found.add("the processor has no AVX2: everything is several times slower", "use a newer machine", "hint")
        elif not flags & _VNNI:
            found.add(
                "the processor has no VNNI instructions: 8-bit models gain less, and can lose accuracy",
                "compare with a float32 model of 'sparsespec models list'",
                "hint",
            )
        if flags & _BF16 and _version("openvino") is None:
            found.add(
                "the processor computes in bfloat16, which ONNX Runtime makes no use of",
                "pip install 'sparsespec[openvino,hub]', then --provider openvino --model dinov2-vits14",
                "hint",
            )
    for name, value in variables.items():
        if value.strip().isdigit() and int(value) > granted:
            found.add(
                f"{name}={value}, but only {granted} processors are granted: threads wait for each other",
                f"set {name} to {granted} or less, or leave it unset",
            )


def _flags() -> set[str]:
    """Return the instruction sets, by their names in /proc/cpuinfo; elsewhere what NumPy has found out."""
    for line in _lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return set(value.split())
    for module in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
        known = getattr(sys.modules.get(module), "__cpu_features__", None)
        if known is not None:
            names = {name.lower() for name, there in known.items() if there}
            # NumPy names groups: Ice Lake's has VNNI, Sapphire Rapids' half precision and bfloat16.
            names |= {"avx512_vnni"} if "avx512_icl" in names else set()
            return names | ({"avx512_fp16", "avx512_bf16"} if "avx512_spr" in names else set())
    return set()


def _processor_name() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _memory(found: _Examination) -> None:
    sizes = {}
    for line in _lines(Path("/proc/meminfo")):
        key, _, value = line.partition(":")
        if key in ("MemTotal", "MemAvailable") and value.split():
            sizes[key] = int(value.split()[0]) * 1024
    limit = _memory_limit()
    total = sizes.get("MemTotal") or _physical_memory()
    found.note("memory", total=total, available=sizes.get("MemAvailable"), limit=limit)
    usable = min((size for size in (sizes.get("MemAvailable"), limit) if size is not None), default=None)
    if usable is not None and usable < _ENOUGH_MEMORY:
        found.add(
            f"{usable / 1e6:.0f} MB of memory can be used; a photograph of usual size takes up to 700 MB",
            "close other programs or raise the container's limit, and use --long-side 336 or less",
        )


def _memory_limit() -> int | None:
    """Return the bytes that the control group grants, the smallest of those found."""
    root = Path("/sys/fs/cgroup")
    places = [root / "memory.max", root / "memory/memory.limit_in_bytes"]
    for line in _lines(Path("/proc/self/cgroup")):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        inside = group.strip().lstrip("/")
        if number == "0" and not controllers:
            places.append(root / inside / "memory.max")
        elif "memory" in controllers.split(","):
            places.append(root / "memory" / inside / "memory.limit_in_bytes")
    limits = []
    for place in places:
        text = "".join(_lines(place)).strip()
        # Version 1 says "none" by a number near 2**63.
        if text.isdigit() and int(text) < 2**60:
            limits.append(int(text))
    return min(limits, default=None)


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _storage(found: _Examination) -> None:
    kernels = _kernel_cache()
    found.note("storage", compiled_kernels=kernels)
    if kernels is None:
        found.add(
            "compiled kernels can't be kept: each process compiles them again, for some 20 seconds",
            "set NUMBA_CACHE_DIR to a folder that can be written",
        )
    try:
        from sparsespec.models import store
    except ImportError:
        return
    try:
        folder = store.home()
    except store.StoreError as error:
        found.note("storage", models=None)
        found.add(f"there is no folder to keep models in: {error}", "set SPARSESPEC_HOME to one", "hint")
        return
    found.note("storage", models=os.fspath(folder))
    if not _writable(folder):
        found.add(
            f"the folder of models {os.fspath(folder)!r} can't be written: no model can be pulled or built into it",
            "set SPARSESPEC_HOME to a folder that can, or copy models into this one elsewhere",
            "hint",
        )


def _kernel_cache() -> str | None:
    """Return the folder that Numba keeps the kernels of this package in, None where it finds none to write to."""
    import numba

    def probe() -> None:
        pass

    try:
        path = numba.njit(cache=True)(probe).stats.cache_path
    except RuntimeError:
        return None
    return None if path is None else str(path)


def _writable(folder: Path) -> bool:
    """Tell whether a folder, which need not exist, could be written to."""
    for place in (folder, *folder.parents):
        if place.exists():
            return place.is_dir() and os.access(place, os.W_OK)
    return False


def _model(found: _Examination, model: str | os.PathLike[str]) -> None:
    found.note("model", asked=os.fspath(model))
    try:
        known = get_model(os.fspath(model))
    except UnknownModelError:
        known = None
    path = Path(resolve(model))
    found.note("model", file=os.fspath(path), size_bytes=path.stat().st_size)
    expected = getattr(known, "sha256", None)
    if expected is not None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found.note("model", sha256=digest, as_recorded=digest == expected)
        if digest != expected:
            found.add(
                f"the file of the model {path} isn't the one that was released: its SHA-256 is {digest}",
                "reinstall: pip install --force-reinstall --no-deps sparsespec",
                "error",
            )


def _started(
    found: _Examination,
    model: str | os.PathLike[str],
    provider: str,
    provider_options: dict[str, str] | None,
) -> Backbone | None:
    backbone = Backbone(model, provider=provider, provider_options=provider_options)
    start = time.perf_counter()
    used = list(backbone.providers)
    found.note("model", name=backbone.name, precision=backbone.precision)
    found.note("runtime", asked=provider, used=used, threads=backbone.threads)
    found.note("speed", load_ms=_milliseconds(start))
    tried = found.result.facts["runtime"].get("auto_tries", [])
    if provider == AUTO and tried and used[0] != PROVIDERS[tried[0]].execution_provider:
        try:
            _ = Backbone(model, provider=tried[0]).providers
        except Exception as error:  # what "auto" has passed over is said here
            level = "hint" if PROVIDERS[tried[0]].install == CPU.install else "warning"
            text, remedy = _split(str(error))
            found.add(f"{tried[0]} isn't used: {text}", remedy or "see docs/providers.md", level)
    return backbone


def _speed(found: _Examination, backbone: Backbone, seconds: float) -> None:
    image = _picture(*_SHAPE)
    start = time.perf_counter()
    first = backbone.features(image)
    found.note("speed", tokens=len(first.keys), features_first_ms=_milliseconds(start))
    times = _repeated(lambda: backbone.features(image), 0.35 * seconds)
    found.note("speed", features_ms=round(1e3 * median(times), 1), images_per_second=round(1 / median(times), 2))
    if not np.isfinite(first.keys).all():
        found.add(
            f"{backbone.providers[0]} gives features that aren't finite numbers",
            "use --provider cpu, or --provider-option graph_precision=float32",
            "error",
        )
        return
    if backbone.providers[0] != CPU.execution_provider:
        _compare_with_cpu(found, backbone, image, first.keys)

    from sparsespec.pipeline import Segmenter

    segmenter = Segmenter(backbone)
    start = time.perf_counter()
    result = segmenter(image)
    found.note("speed", segmentation_first_ms=_milliseconds(start), instances=len(result))
    times = _repeated(lambda: segmenter(image), 0.5 * seconds)
    found.note("speed", segmentation_ms=round(1e3 * median(times), 1), peak_memory=_peak_memory())


def _compare_with_cpu(
    found: _Examination, backbone: Backbone, image: npt.NDArray[np.uint8], keys: npt.NDArray[np.float32]
) -> None:
    plain = Backbone(backbone.path, provider=CPU.name)
    start = time.perf_counter()
    expected = plain.features(image).keys
    _ = _milliseconds(start)
    times = _repeated(lambda: plain.features(image), 0)
    cosine = (keys * expected).sum(1) / (np.linalg.norm(keys, axis=1) * np.linalg.norm(expected, axis=1) + 1e-12)
    found.note("speed", cpu_features_ms=round(1e3 * median(times), 1), key_cosine_to_cpu=round(float(cosine.mean()), 6))
    if not cosine.mean() > _SAME_FEATURES:
        found.add(
            f"{backbone.providers[0]} gives other features than the CPU: cosine of the keys {cosine.mean():.4f}",
            "use --provider cpu, or --provider-option graph_precision=float32",
        )


def _picture(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Make a picture with a sky, a ground and three things on it."""
    y, x = np.mgrid[0:height, 0:width] / height
    picture = np.stack([0.5 + 0.2 * y, 0.6 + 0.1 * np.sin(9 * x), 0.9 - 0.6 * y], axis=-1)
    things = ((0.35, 0.6, 0.16, (0.8, 0.2, 0.1)), (0.85, 0.5, 0.2, (0.1, 0.5, 0.2)), (1.15, 0.75, 0.1, (0.9, 0.9, 0.2)))
    for across, down, radius, colour in things:
        inside = (x - across) ** 2 + (y - down) ** 2 < radius**2
        shade = 1 - 0.5 * ((x - across) + (y - down)) / radius
        picture[inside] = (np.array(colour) * shade[..., None])[inside]
    noise = np.random.default_rng(0).normal(0, 0.03, picture.shape)
    return (255 * np.clip(picture + noise, 0, 1)).astype(np.uint8)


def _repeated(work: Callable[[], object], seconds: float) -> list[float]:
    """Time something again and again, at least once."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _milliseconds(since: float) -> float:
    return round(1e3 * (time.perf_counter() - since), 1)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _split(message: str) -> tuple[str, str]:
    """Part a message of ours into what is wrong and what to do."""
    for mark in (
        "; install it with: ",
        ". Install it with: ",
        "; keep one: ",
        "; repair it with: ",
        ". Install ",
        "; ",
    ):
        before, found, after = message.partition(mark)
        if found:
            return before, f"Install {after}" if mark == ". Install " else after
    return message, ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
