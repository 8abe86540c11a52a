"""Models that do as they are told, for worker processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# What the stub does with a picture whose first pixel has this red.
CRASH, HANG, RAISE, NO_MEMORY, GREEDY, NAP, KILLED = 1, 2, 3, 4, 5, 6, 7
NAP_SECONDS = 0.3


@dataclass
class Found:
    """As much of a Segmentation as is needed: importing that takes seconds."""

    labels: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    info: dict[str, Any]
    layers: dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Stub:
    """A model that finds two rectangles, or misbehaves."""

    broken: str = ""
    slow_start: float = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes don't find the modules of the tests.
        return eval, (f"__import__('runpy').run_path({__file__!r})['Stub'](**{asdict(self)!r})",)

    def opened(self, threads: int) -> Callable[..., Found]:
        time.sleep(self.slow_start)
        if self.broken:
            raise ValueError(self.broken)
        return self.segment

    def segment(
        self, image: npt.NDArray[Any], /, *, n_instances: int | None, long_side: int | None, eigenvectors: int
    ) -> Found:
        misbehave(int(image[0, 0, 0]))
        height, width = image.shape[:2]
        wanted = 2 if n_instances is None else n_instances
        if n_instances is not None and n_instances > height * width:
            raise ValueError(f"n_instances is {wanted}, but an image of {width} x {height} pixels holds fewer")
        labels = np.zeros((height, width), np.int32)
        for k in range(min(wanted, height)):
            labels[k * height // wanted : (k + 1) * height // wanted, : max(1, width // 2)] = k + 1
        found = int(labels.max())
        scores = np.linspace(0.9, 0.5, found).astype(np.float32)
        layers = {"foreground": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)}
        for k in range(eigenvectors):
            layers[f"eigenvector {k + 1}"] = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
        return Found(labels, scores, {"seconds": {"features": 0.01, "total": 0.01}, "extent": [2, 3]}, layers)


def misbehave(red: int) -> None:
    if red == CRASH:
        os.kill(os.getpid(), signal.SIGSEGV)
    elif red == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    elif red == HANG:
        time.sleep(600)
    elif red == RAISE:
        raise RuntimeError("a secret of the server")
    elif red == NO_MEMORY:
        raise MemoryError
    elif red == GREEDY:
        kept = np.ones(300_000_000, np.uint8)
        time.sleep(600)
        del kept
    elif red == NAP:
        time.sleep(NAP_SECONDS)
