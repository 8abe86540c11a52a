"""The log of a server: one line for each request and each event, as JSON or as text.

Nothing of an upload gets into it, no name of a file, no query and no address of a client.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LOGGER", "Record", "handler"]

LOGGER = "sparsespec.server"

# Asked every few seconds by programs that watch the server: they would be most of the log.
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})

_FIELDS = (
    "request_id", "method", "path", "status", "ms", "received", "sent", "width", "height", "instances", "stages",
    "kind",
)  # fmt: skip


@dataclass
class Record:
    """What is known of a request.

    Attributes
    ----------
    request_id, method, path : str
        As asked.
    status : int
        Of the answer; 499 where the client was gone before it.
    received, sent : int
        Bytes of the bodies.
    facts : dict
        ``width``, ``height``, ``instances``, of an image.
    stages : dict of str to float
        Seconds.
    kind : str
        Of the problem, where there is one.
    """

    request_id: str
    method: str
    path: str
    status: int = 0
    received: int = 0
    sent: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    kind: str = ""
    began: float = field(default_factory=time.perf_counter)

    def write(self) -> None:
        """Write it to the log."""
        fields: dict[str, Any] = {
            "event": "request",
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "ms": round((time.perf_counter() - self.began) * 1000, 1),
            "received": self.received,
            "sent": self.sent,
            **self.facts,
        }
        if self.stages:
            fields["stages"] = {stage: round(seconds * 1000, 1) for stage, seconds in self.stages.items()}
        if self.kind:
            fields["kind"] = self.kind
        level = logging.ERROR if self.status == 500 else logging.DEBUG if self.path in _PROBES else logging.INFO
        logging.getLogger(LOGGER).log(level, "%s %s %d", self.method, self.path, self.status, extra=fields)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower()}
        event = getattr(record, "event", None)
        line["event"] = event or "message"
        if event != "request":
            line["message"] = record.getMessage()
        line |= _extra(record)
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        extra = _extra(record)
        if getattr(record, "event", None) == "request":
            stages = " ".join(f"{stage}={ms:g}" for stage, ms in extra.get("stages", {}).items())
            size = f" {extra['width']}x{extra['height']}" if "width" in extra else ""
            found = f" {extra['instances']} instances" if "instances" in extra else ""
            kind = f" {extra['kind']}" if "kind" in extra else ""
            line = (
                f"{record.getMessage()}{kind} {extra['ms']:g} ms{size}{found} {extra['request_id']} {stages}".rstrip()
            )
        else:
            line = record.getMessage()
            if record.exc_info:
                line += "\n" + self.formatException(record.exc_info)
        return f"{_time(record)} {record.levelname.lower()} {line}".rstrip()


def handler(kind: str) -> logging.Handler:
    """Make a handler that writes to stderr.

    Parameters
    ----------
    kind : str
        "json" or "text".
    """
    result = logging.StreamHandler(sys.stderr)
    result.setFormatter(_Json() if kind == "json" else _Text())
    return result


def _time(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03}Z"


def _extra(record: logging.LogRecord) -> Mapping[str, Any]:
    known = (*_FIELDS, "url", "pid", "killed_for")
    return {name: getattr(record, name) for name in known if hasattr(record, name)}
