"""Sessions of the runtime that runs a model."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

from sparsespec._openvino import NAME as OPENVINO_NAME
from sparsespec._openvino import OpenVinoSession
from sparsespec.providers import (
    AUTO,
    CPU,
    OPENVINO,
    PROVIDERS,
    Choice,
    Provider,
    ProviderError,
    available_providers,
    find_provider,
    installed_runtimes,
    missing_message,
    runtime_conflict,
)

_LOG = logging.getLogger(__name__)
_OWN_OF_PLATFORM = {"darwin": "coreml", "win32": "directml"}
_NVIDIA = ("cuda", "tensorrt")
# ONNX Runtime's defaults try every algorithm for each new size of image, take twice the memory that a size needs, and
# round the factors of float32 products to ten bits (TF32), which costs a float32 model its exactness.
_DEFAULT_OPTIONS = {
    "cuda": {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"},
}
_said: set[str] = set()
_said_lock = threading.Lock()


def open_session(path: str, precision: str, choice: Choice, threads: int, at_once: int = 1) -> Any:
    """Open a session for a model of this package.

    Parameters
    ----------
    path
        The file.
    precision
        Of the file: ``float32``, ``float16``, ``int8`` or ``int8-static``.
    choice
        What to run it on, see :func:`sparsespec.providers.choose`.
    threads
        Of one run on the CPU.
    at_once
        Runs that go on at the same time.

    Returns
    -------
    session
        With ``run(names, feed)`` and ``get_providers()``.

    Raises
    ------
    ProviderError
        When what was asked for isn't there, didn't start or was replaced by the CPU.
    ImportError
        Without ONNX Runtime.
    """
    if choice.name == OPENVINO.name:
        return _open_openvino(path, precision, choice, threads, at_once)
    onnxruntime = import_onnxruntime()
    available = onnxruntime.get_available_providers()
    if choice.name == AUTO:
        return _open_best(onnxruntime, available, path, precision, choice, threads)
    provider = find_provider(choice.name)
    if provider.execution_provider not in available:
        raise ProviderError(missing_message(provider, available))
    return _open_one(onnxruntime, available, provider, path, precision, choice, threads)


def import_onnxruntime() -> Any:
    """Import ONNX Runtime, complete and without its reports to its maker."""
    # From 1.29 on ONNX Runtime reports each session to its maker, hashes of the model included, unless this is set
    # before it is loaded. Nobody who segments photographs expects that; a value that is set already is left alone.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"ONNX Runtime is needed to run a model and can't be imported ({error}); "
            "install it with: pip install onnxruntime (or onnxruntime-gpu, onnxruntime-directml)"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        # What is left when one of two distributions with the same files was uninstalled.
        left = " ".join(installed_runtimes()) or "onnxruntime"
        raise ImportError(
            "ONNX Runtime is needed to run a model and is incomplete: files of its package are missing; "
            f"repair it with: pip uninstall -y {left} && pip install {left.split()[-1]}"
        )
    if os.environ["ORT_DISABLE_TELEMETRY"] != "0" and hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()  # for a process that had loaded it before
    return onnxruntime


def automatic_order(available: list[str]) -> list[Provider]:
    """List what ``auto`` tries: CUDA, the platform's own, the CPU, as far as ONNX Runtime has them."""
    names = ("cuda", _OWN_OF_PLATFORM.get(sys.platform), CPU.name)
    wanted = [PROVIDERS[name] for name in names if name is not None]
    return [provider for provider in wanted if provider.execution_provider in available]


def _open_best(onnxruntime: Any, available: list[str], path: str, precision: str, choice: Choice, threads: int) -> Any:
    for provider in automatic_order(available):
        try:
            session = _open_one(onnxruntime, available, provider, path, precision, choice, threads)
        except (ProviderError, ImportError) as error:
            # Core ML comes with every ONNX Runtime for macOS; the others somebody has installed on purpose.
            level = logging.INFO if provider.install == CPU.install else logging.WARNING
            _say_once(level, f"{provider.name} is installed but can't be used, trying the next: {error}")
            continue
        _say_once(
            logging.INFO,
            f"provider auto: {provider.name} of {', '.join(available_providers(available))}",
        )
        if provider is CPU and len(installed_runtimes()) > 1:
            _say_once(logging.WARNING, f"{runtime_conflict()}")
        return session
    raise ProviderError(
        f"none of ONNX Runtime's execution providers can be used: there are {', '.join(available) or 'none'}"
    )


def _open_one(
    onnxruntime: Any,
    available: list[str],
    provider: Provider,
    path: str,
    precision: str,
    choice: Choice,
    threads: int,
) -> Any:
    lacking = lacking_driver() if provider.name in _NVIDIA else None
    if lacking is not None:
        # Said before ONNX Runtime tries, which writes several lines of its own to stderr.
        raise ProviderError(_not_started(provider, [lacking]))
    options = onnxruntime.SessionOptions()
    # 0 would mean every core of the host, past any affinity or container limit.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The arena hands a layer's buffers on to the next. Without it every layer gets fresh pages from the system, which
    # takes longer, and malloc keeps more of them than the arena does: at 10,000 tokens a run needs 150 MB less with it.
    # Patterns would lay out, and keep, a block for every input shape seen.
    options.enable_cpu_mem_arena = True
    options.enable_mem_pattern = False
    # Idle threads sleep instead of spinning: several workers, and Numba between two runs, share the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    model = graph_for(path, precision, provider, choice.graph_precision)
    if provider is CPU:
        return onnxruntime.InferenceSession(model, options, providers=[CPU.execution_provider])
    given = _DEFAULT_OPTIONS.get(provider.name, {}) | dict(choice.options)
    wanted: list[Any] = [(provider.execution_provider, given)]
    if provider.name == "tensorrt" and PROVIDERS["cuda"].execution_provider in available:
        wanted.append((PROVIDERS["cuda"].execution_provider, _DEFAULT_OPTIONS["cuda"]))
    wanted.append(CPU.execution_provider)
    records = hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")
    if records:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # ONNX Runtime prints to stdout what it couldn't load or start, and then goes on without.
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if provider.name in _NVIDIA and hasattr(onnxruntime, "preload_dlls"):
            # CUDA and cuDNN as pip installs them stand where the loader doesn't look.
            onnxruntime.preload_dlls()
        try:
            session = onnxruntime.InferenceSession(model, options, providers=wanted, enable_fallback=0)
        except Exception as error:  # it has exceptions of its own, which aren't public
            raise ProviderError(
                _not_started(provider, [str(error), _lacking_library(onnxruntime, provider)])
            ) from error
    if provider.execution_provider not in session.get_providers():
        # Versions before 1.23 print the error, and open a session without the provider.
        said = re.findall(r"^EP Error (.*?)(?: when using .*)?$", printed.getvalue(), re.MULTILINE)
        raise ProviderError(_not_started(provider, [*said, _lacking_library(onnxruntime, provider)]))
    if records:
        _check_share(session, provider)
    return session


def _check_share(session: Any, provider: Provider) -> None:
    """Refuse a provider that started and took none of the network's operators: the CPU would do all of the work."""
    counts: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    taken, total = counts.get(provider.execution_provider, 0), sum(counts.values())
    if total and not taken:
        raise ProviderError(
            f"the provider {provider.name} started, but takes none of the {total} operators of this model: ONNX "
            f"Runtime would run it on {', '.join(counts)}; take another provider or another precision of the model"
        )
    _say_once(logging.INFO, f"{provider.name} runs {taken} of {total} operators")


def graph_for(path: str, precision: str, provider: Provider, asked: str | None) -> str | bytes:
    """Return the file, or in its place a graph that the provider runs well.

    The operators of an 8-bit file exist for the CPU alone; elsewhere they would be run one by one on the CPU, with
    copies to and fro.
    """
    # With fixed ranges they are the standard's own, which OpenVINO turns into products of 8 bits.
    rounded = precision == "int8" or (precision == "int8-static" and provider is not OPENVINO)
    wanted = asked or (provider.precision if rounded else None)
    if wanted in (None, "file", precision):
        return path
    try:
        from sparsespec.models.expand import expanded

        return bytes(expanded(path, wanted))
    except ImportError as error:
        raise ProviderError(
            f"for the provider {provider.name} the model {Path(path).name} ({precision}) has to be turned into {wanted}"
            f", which needs the package onnx ({error}); install it with: pip install "
            f"'sparsespec[{'openvino' if provider is OPENVINO else 'gpu'}]', or take a model that isn't int8"
        ) from error


def _open_openvino(path: str, precision: str, choice: Choice, threads: int, at_once: int) -> Any:
    from importlib.util import find_spec

    if find_spec("openvino") is None:
        # The execution provider of that name, in a distribution of its own, which is several versions behind.
        onnxruntime = import_onnxruntime()
        available = onnxruntime.get_available_providers()
        if OPENVINO.execution_provider not in available:
            raise ProviderError(missing_message(OPENVINO, available))
        return _open_one(onnxruntime, available, OPENVINO, path, precision, choice, threads)
    session = OpenVinoSession(
        graph_for(path, precision, OPENVINO, choice.graph_precision), threads, at_once, dict(choice.options)
    )
    _say_once(logging.INFO, f"{OPENVINO_NAME} computes in {session.precision}")
    return session


def _not_started(provider: Provider, reasons: list[str | None]) -> str:
    """Say that a provider could not be started, why, and what to do."""
    said = dict.fromkeys(_one_line(reason) for reason in reasons if reason)
    why = "; ".join(said) or "ONNX Runtime doesn't say why"
    return f"the provider {provider.name} could not be started: {why}{_remedy(provider, why)}"


def lacking_driver() -> str | None:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        return f"NVIDIA's driver isn't there ({error})"
    return None


def _lacking_library(onnxruntime: Any, provider: Provider) -> str | None:
    """Load the provider's library to hear what is missing; only after ONNX Runtime has failed to.

    It has to be first: the library asks ONNX Runtime for its functions while it is loaded, and never again.
    """
    if provider.name not in _NVIDIA:
        return None
    prefix, suffix = ("", ".dll") if sys.platform == "win32" else ("lib", ".so")
    folder = Path(getattr(onnxruntime, "__file__", None) or ".").parent / "capi"
    try:
        ctypes.CDLL(os.fspath(folder / f"{prefix}onnxruntime_providers_{provider.name}{suffix}"))
    except OSError as error:
        return str(error)
    return None


def _remedy(provider: Provider, why: str) -> str:
    if provider.name not in _NVIDIA:
        return ""
    if "driver" in why:
        return ". Install the driver of the GPU; a container needs access to it, such as docker run --gpus all"
    if "nvinfer" in why:
        return ". TensorRT's libraries are missing: pip install tensorrt, and put its folder on the loader's path"
    if re.search(r"cublas|cudart|cudnn|cufft|curand|nvrtc", why, re.IGNORECASE):
        return ". Libraries of CUDA or cuDNN are missing: pip install 'onnxruntime-gpu[cuda,cudnn]'"
    return ""


def _say_once(level: int, message: str) -> None:
    with _said_lock:
        if message in _said:
            return
        _said.add(message)
    _LOG.log(level, "%s", message)


def _one_line(text: str) -> str:
    """Join the lines of a message, without the places in ONNX Runtime's sources that stand in it."""
    return " ".join(re.sub(r"\S*/onnxruntime_src/\S+ [^()\n]*\([^()\n]*\)( const)?", "", text).split())
