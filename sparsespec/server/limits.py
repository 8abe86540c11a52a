"""What a server takes on, and where it stops."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

__all__ = ["MAX_HEAD", "Limits"]

MAX_HEAD = 16_384
"""Bytes that the request line and the headers may have together."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server; each has its own answer when something is over it.

    Attributes
    ----------
    max_body : int
        Bytes of one upload. Over it: 413, before more is read.
    max_pixels : int
        Width times height of an image, which its header tells before any pixel is decoded. Over it: 413.
    max_waiting : int
        Images that may wait while all workers are busy. Over it: 429 at once.
    max_held : int
        Bytes of all uploads together that are held in memory. Over it: 429.
    max_long_side : int
        Largest ``long_side`` that may be asked for. Over it: 422.
    max_instances : int
        Largest ``n_instances`` that may be asked for: each is looked at once more, for a fifth of a second or so. Over
        it: 422.
    time_limit : float
        Seconds of work on one image, after which its worker process is ended. Over it: 503.
    wait_limit : float
        Seconds that an image may wait for a worker. Over it: 503.
    upload_limit : float
        Seconds that the upload of one body may take. Over it: 408.
    idle_limit : float
        Seconds without a byte in the middle of an upload. Over it: 408.
    head_limit : float
        Seconds from the connection, or from the answer before, to the end of the next request's headers. Over it the
        connection is closed.
    max_connections : int
        Connections at the same time. Over it: 503, and the connection is closed.
    memory_limit : int or None
        Bytes of memory of its own that a worker process may take (Linux). Over it: 503, and the process is ended.
    grace : float
        Seconds that a server which was told to stop takes to finish what it has taken on.
    """

    max_body: int = 20_000_000
    max_pixels: int = 50_000_000
    max_waiting: int = 32
    max_held: int = 256_000_000
    max_long_side: int = 896
    max_instances: int = 50
    time_limit: float = 60.0
    wait_limit: float = 60.0
    upload_limit: float = 60.0
    idle_limit: float = 10.0
    head_limit: float = 10.0
    max_connections: int = 256
    memory_limit: int | None = None
    grace: float = 20.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "memory_limit":
                continue
            least = 0 if field.name in ("max_waiting", "grace") else 1 if isinstance(field.default, int) else None
            whole = not isinstance(field.default, float)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"{field.name} must be a {'whole ' * whole}number, not {value!r}")
            if least is not None and not (least <= value < math.inf):
                raise ValueError(f"{field.name} must be a number of at least {least}, not {value!r}")
            if least is None and not (0 < value < math.inf):
                raise ValueError(f"{field.name} must be a number above 0, not {value!r}")
        if self.max_held < self.max_body:
            raise ValueError(
                f"max_held must be at least max_body ({self.max_body}), or no such upload could be held; "
                f"not {self.max_held}"
            )
