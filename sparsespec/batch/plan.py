"""What a run was asked to do, noted where its results go, so that only the same run can go on there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import sparsespec
from sparsespec.batch.record import jsonable

__all__ = [
    "DEFAULT_SHARD_SIZE",
    "REPORT_CARDS",
    "SHARD_SIZES",
    "Plan",
    "PlanError",
    "fewest_digests",
    "inputs_digest",
    "shard_count",
    "shard_of",
]

SHARD_SIZES = (64, 512)
"""Least and most files in a shard, on average."""

DEFAULT_SHARD_SIZE = 128
"""Files in a shard, on average."""

REPORT_CARDS = 10_000
"""Images with a card in the report: of more, so many are chosen by the digest of their paths."""

_FORMAT = 2


class PlanError(ValueError):
    """The plan of an earlier run cannot be read."""


@dataclass(frozen=True)
class Plan:
    """What the results of a run depend on.

    Attributes
    ----------
    parameters : dict
        Settings; JSON values only.
    inputs : str
        Digest of the list of inputs, of `inputs_digest`.
    shards : int
        Number of shards.
    version : str
        Of the package.
    """

    parameters: Mapping[str, Any]
    inputs: str
    shards: int
    version: str = sparsespec.__version__

    def encode(self) -> bytes:
        """Write the plan as JSON."""
        content = {
            "program": "sparsespec",
            "format": _FORMAT,
            "version": self.version,
            "shards": self.shards,
            "inputs": self.inputs,
            "parameters": jsonable(self.parameters),
        }
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, content: bytes) -> Plan:
        """Read what `encode` wrote.

        Raises
        ------
        PlanError
            It is damaged, or of a version of the package that keeps its state in another way.
        """
        try:
            plan = json.loads(content)
            written = plan["format"]
            shards, inputs = plan["shards"], plan["inputs"]
            parameters, version = plan["parameters"], plan["version"]
            if not isinstance(shards, int) or shards < 1 or not isinstance(parameters, dict):
                raise TypeError("a value of the wrong kind")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PlanError(f"it is damaged ({type(error).__name__}: {error})") from error
        if written != _FORMAT:
            raise PlanError(f"it has the format {written}, of sparsespec {version}; this version reads {_FORMAT}")
        return cls(parameters, str(inputs), shards, str(version))

    def differences(self, other: Plan) -> list[str]:
        """Say how this plan differs from that of an earlier run, one difference an entry; the inputs don't count."""
        found = []
        if self.version != other.version:
            found.append(f"sparsespec was {other.version}, is {self.version}")
        new, old = jsonable(self.parameters), other.parameters
        for name in sorted({*new, *old}):
            if name not in old:
                found.append(f"{name} is {_shown(new[name])}, was not set")
            elif name not in new:
                found.append(f"{name} was {_shown(old[name])}, is not set")
            elif new[name] != old[name]:
                found.append(f"{name} was {_shown(old[name])}, is {_shown(new[name])}")
        return found


def shard_count(files: int, size: int = DEFAULT_SHARD_SIZE) -> int:
    """Give the number of shards for so many files.

    Raises
    ------
    ValueError
        `size` lies outside `SHARD_SIZES`.
    """
    if not SHARD_SIZES[0] <= size <= SHARD_SIZES[1]:
        raise ValueError(f"shard_size must lie in {SHARD_SIZES[0]}..{SHARD_SIZES[1]}, not {size!r}")
    return max(1, -(-files // size))


def shard_of(path: str, shards: int) -> int:
    """Give the shard that a path belongs to, the same on every machine, whatever other files there are."""
    return _digest(path) % shards


def fewest_digests(paths: Sequence[str], count: int) -> frozenset[str] | None:
    """Choose `count` of the paths, the same whatever their order; None stands for all of them."""
    if len(paths) <= count:
        return None
    digests = np.fromiter(map(_digest, paths), np.uint64, len(paths))
    return frozenset(paths[index] for index in np.argpartition(digests, count)[:count])


def inputs_digest(paths: Iterable[str]) -> str:
    """Sum up the list of inputs."""
    total = hashlib.sha256()
    for path in paths:
        total.update(os.fsencode(path) + b"\0")
    return total.hexdigest()


def _digest(path: str) -> int:
    return int.from_bytes(hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:79] + "…"
