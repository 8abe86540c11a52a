"""Sessions of the runtime that runs a model."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

_LOG = logging.getLogger(__name__)
_CPU = "CPUExecutionProvider"


class ProviderError(RuntimeError):
    """An execution provider was asked for and isn't there, or ONNX Runtime didn't use it."""


def open_session(path: str, asked: tuple[str, ...] | None, threads: int) -> Any:
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
    if os.environ["ORT_DISABLE_TELEMETRY"] != "0" and hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()  # for a process that had loaded it before
    available = onnxruntime.get_available_providers()
    if asked is None:
        own = {"darwin": ["CoreMLExecutionProvider"], "win32": ["DmlExecutionProvider"]}.get(sys.platform, [])
        wanted = [name for name in ("CUDAExecutionProvider", *own, _CPU) if name in available]
    else:
        wanted = list(asked)
        missing = [name for name in wanted if name not in available]
        if missing:
            raise ProviderError(
                f"execution provider {', '.join(missing)} isn't available in this installation of ONNX Runtime; "
                f"available are {', '.join(available)}"
            )
    options = onnxruntime.SessionOptions()
    # 0 would mean every core of the host, past any affinity or container limit.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The arena keeps the largest block of every input shape seen; without it memory follows the image at hand.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Idle threads sleep instead of spinning: several workers, and Numba between two runs, share the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=wanted)
    used = session.get_providers()
    unused = [name for name in wanted if name not in used]
    if unused and asked is not None:
        raise ProviderError(
            f"execution provider {', '.join(unused)} was asked for, but ONNX Runtime could not start it and would have "
            f"used {', '.join(used)}; available are {', '.join(available)}"
        )
    if unused:
        _LOG.warning("%s is installed but could not be started; using %s", ", ".join(unused), used[0])
    return session
