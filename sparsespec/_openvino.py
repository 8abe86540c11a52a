"""OpenVINO's own runtime behind the interface of an ONNX Runtime session."""

from __future__ import annotations

import os
import queue
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.providers import OPENVINO, ProviderError

NAME = "OpenVINO"
"""What a session says its provider is; the provider of ONNX Runtime of that name is another thing."""
# Prepared operations kept for the next image of the same size; with the default of 5000 memory goes on growing, by some
# 20 MB for 40 new sizes, and a run is no faster.
_KERNELS_KEPT = 64


class OpenVinoSession:
    """A compiled model, to be run by several threads at a time.

    A run takes a request, of which there are as many as runs are to go on at the same time; the next caller waits for
    one of them.

    Parameters
    ----------
    model
        Path of an ONNX file, or what would stand in one.
    threads
        Threads of one run.
    at_once
        Runs at the same time.
    options
        Properties of OpenVINO, such as ``INFERENCE_PRECISION_HINT``, in any case; ``DEVICE`` is the device, CPU unless
        given.
    """

    def __init__(self, model: str | bytes, threads: int, at_once: int, options: Mapping[str, str]) -> None:
        # Its message to its makers at each import is sent by a package of its own, which asks for this.
        os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
        try:
            import openvino
        except ImportError as error:
            raise ProviderError(
                f"the provider {OPENVINO.name} needs the package openvino, which can't be imported ({error}); "
                "install it with: pip install 'sparsespec[openvino]'"
            ) from error
        given = {key.upper(): value for key, value in options.items()}
        self._device = given.pop("DEVICE", "CPU").upper()
        properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if self._device == "CPU":
            properties |= {
                "INFERENCE_NUM_THREADS": threads * at_once,
                "NUM_STREAMS": at_once,
                # Pinned threads of two processes can share a processor while another idles.
                "ENABLE_CPU_PINNING": False,
                "CPU_RUNTIME_CACHE_CAPACITY": _KERNELS_KEPT,
            }
        properties |= given
        core = openvino.Core()
        try:
            network = core.read_model(model)
            self._compiled = core.compile_model(network, self._device, properties)
            streams = int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        except RuntimeError as error:
            raise ProviderError(
                f"OpenVINO could not start on the device {self._device}: {_reason(error)}; "
                f"its devices here are {', '.join(core.available_devices) or 'none'}"
            ) from error
        self._requests: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(max(1, streams)):
            self._requests.put(None)

    def get_providers(self) -> list[str]:
        """Return one name, with the device where that isn't the CPU."""
        return [NAME if self._device == "CPU" else f"{NAME} {self._device}"]

    @property
    def precision(self) -> str:
        """Kind of numbers it computes with, such as ``bfloat16``."""
        try:
            return str(self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        except (AttributeError, RuntimeError):
            return "unknown"

    def run(self, names: Sequence[str], feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        """Run the model; the arrays returned are the caller's own."""
        request = self._requests.get()
        try:
            if request is None:
                request = self._compiled.create_infer_request()
            request.infer(dict(feed), share_inputs=True)
            return [np.array(request.get_tensor(name).data, np.float32) for name in names]
        finally:
            self._requests.put(request)


def _reason(error: Exception) -> str:
    """Return the line that says something: before it stand the places in OpenVINO's sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from ", "Check '"))]
    return said[0] if said else " ".join(lines)
