"""Counters of a server, in the text format of Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

__all__ = ["MEDIA_TYPE", "Counter", "Gauge", "Histogram", "Registry"]

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

Labels = tuple[tuple[str, str], ...]


@dataclass
class Counter:
    """A number for each combination of labels, which only rises."""

    name: str
    text: str
    values: dict[Labels, float] = field(default_factory=dict)
    kind = "counter"

    def add(self, amount: float = 1.0, **labels: str) -> None:
        """Add to the number of these labels."""
        key = tuple(sorted(labels.items()))
        self.values[key] = self.values.get(key, 0.0) + amount

    def samples(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        for labels, value in sorted(self.values.items()):
            yield f"{self.name}{_braces(labels)} {_number(value)}"


@dataclass
class Gauge:
    """Numbers that are looked up when they are asked for."""

    name: str
    text: str
    look: Callable[[], Mapping[Labels, float]]
    kind: str = "gauge"

    def samples(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        for labels, value in sorted(self.look().items()):
            yield f"{self.name}{_braces(labels)} {_number(value)}"


@dataclass
class Histogram:
    """How often values fell below bounds, for each combination of labels."""

    name: str
    text: str
    bounds: tuple[float, ...] = _BOUNDS
    values: dict[Labels, list[float]] = field(default_factory=dict)
    kind = "histogram"

    def add(self, value: float, **labels: str) -> None:
        """Note a value."""
        key = tuple(sorted(labels.items()))
        # A count for each bound, one for what lies above all of them, and the sum.
        counts = self.values.setdefault(key, [0.0] * (len(self.bounds) + 2))
        counts[bisect_left(self.bounds, value)] += 1
        counts[-1] += value

    def samples(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        for labels, counts in sorted(self.values.items()):
            below = 0.0
            for bound, count in zip((*map(_number, self.bounds), "+Inf"), counts[:-1], strict=True):
                below += count
                yield f"{self.name}_bucket{_braces((*labels, ('le', bound)))} {_number(below)}"
            yield f"{self.name}_sum{_braces(labels)} {_number(counts[-1])}"
            yield f"{self.name}_count{_braces(labels)} {_number(below)}"


class Registry:
    """All the numbers of one server."""

    def __init__(self, metrics: Iterable[Counter | Gauge | Histogram]) -> None:
        self._metrics = list(metrics)

    def text(self) -> str:
        """Write them down."""
        lines: list[str] = []
        for metric in self._metrics:
            lines += [f"# HELP {metric.name} {metric.text}", f"# TYPE {metric.name} {metric.kind}", *metric.samples()]
        return "\n".join(lines) + "\n"


def _braces(labels: Labels) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
