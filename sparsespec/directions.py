"""Linear directions of the token features that say how object-like a token is, and where in its object it lies.

Both are fitted without labels, by :mod:`sparsespec.fitting`, to what the method itself finds in photographs: one
direction tells tokens that stand out from their image's border from those that don't, two more tell left from right and
top from bottom within the instances found. They carry over to photographs they were not fitted on, and to things they
never saw, since they only read what the network knows already.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.channels import token_norms
from sparsespec.models import shipped_directions

Float32Array = npt.NDArray[np.float32]

FORMAT = "sparsespec-directions"
FORMAT_VERSION = 1


class DirectionsError(ValueError):
    """A file of directions that can't be read, or that belongs to another model."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions of the keys, queries and values of one network.

    Attributes
    ----------
    objectness
        (3 C,) float32 weights of the unit keys, then of the unit queries, then of the unit values.
    objectness_offset
        Added to it. Over the tokens it was fitted on, the sum has unit deviation.
    position
        (3 C, 2) float32 weights: across (x), down (y).
    position_offset
        (2,) float32.
    source_sha256
        Of the file the network's weights were taken from, as :attr:`sparsespec.Backbone.source_sha256` has it; empty
        where that isn't known.
    photographs
        How many they were fitted on.
    """

    objectness: Float32Array
    objectness_offset: float
    position: Float32Array
    position_offset: Float32Array
    source_sha256: str = ""
    photographs: int = 0

    def __post_init__(self) -> None:
        length = len(self.objectness)
        if self.objectness.ndim != 1 or length % 3 or not length:
            raise DirectionsError(
                f"objectness must hold 3 C weights, C for each of keys, queries, values; its shape is "
                f"{self.objectness.shape}"
            )
        if self.position.shape != (length, 2) or self.position_offset.shape != (2,):
            raise DirectionsError(
                f"position must be ({length}, 2) with an offset of (2,), not {self.position.shape} and "
                f"{self.position_offset.shape}"
            )
        parts = (self.objectness, self.position, self.position_offset, np.array(self.objectness_offset))
        if not all(np.isfinite(part).all() for part in parts):
            raise DirectionsError("directions must be finite numbers; there are NaN or infinite ones")

    @property
    def channels(self) -> int:
        """C, of one kind of features."""
        return len(self.objectness) // 3

    def objectness_of(self, keys: Float32Array, queries: Float32Array, values: Float32Array) -> npt.NDArray[np.float64]:
        """How object-like each token is: (N,) float64, on one scale for all images.

        Parameters
        ----------
        keys, queries, values
            (N, C) arrays; the length of a row doesn't matter.

        Raises
        ------
        DirectionsError
            They have another number of channels than the directions.
        """
        return self._project(self.objectness[:, None], keys, queries, values)[:, 0] + self.objectness_offset

    def position_of(self, keys: Float32Array, queries: Float32Array, values: Float32Array) -> npt.NDArray[np.float64]:
        """Where each token lies in the box of its object: (N, 2) float64, x and y, 0 in the middle, +-0.5 at the edges.

        Parameters
        ----------
        keys, queries, values
            (N, C) arrays; the length of a row doesn't matter.

        Raises
        ------
        DirectionsError
            They have another number of channels than the directions.
        """
        return self._project(self.position, keys, queries, values) + self.position_offset

    def _project(
        self, weights: Float32Array, keys: Float32Array, queries: Float32Array, values: Float32Array
    ) -> npt.NDArray[np.float64]:
        total = np.zeros((len(keys), weights.shape[1]))
        for number, kind in enumerate((keys, queries, values)):
            if kind.shape[1] != self.channels:
                raise DirectionsError(
                    f"the directions are of a network with {self.channels} channels, but the features have "
                    f"{kind.shape[1]}: fit directions for this network with 'sparsespec fit', or give directions=None"
                )
            part = weights[number * self.channels : (number + 1) * self.channels]
            # Scaled afterwards: unit copies of all tokens would take longer than the products.
            total += (kind @ part) / token_norms(kind)[:, None]
        return total

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a file, as NumPy's .npz."""
        with open(path, "wb") as file:
            np.savez_compressed(
                file,
                format=np.array([FORMAT, str(FORMAT_VERSION)]),
                objectness=self.objectness,
                objectness_offset=np.float64(self.objectness_offset),
                position=self.position,
                position_offset=self.position_offset,
                source_sha256=np.array(self.source_sha256),
                photographs=np.int64(self.photographs),
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Directions:
        """Read a file written by :meth:`save`.

        Raises
        ------
        DirectionsError
            There is none, it can't be read, or it isn't one of these.
        """
        where = os.fspath(path)
        advice = "give a file that 'sparsespec fit' wrote"
        if not Path(path).is_file():
            raise DirectionsError(f"there is no file of directions {where!r}; {advice}")
        try:
            with np.load(path, allow_pickle=False) as stored:
                content: dict[str, Any] = {name: stored[name] for name in stored.files}
            name, version = (str(text) for text in content["format"])
        except Exception as error:
            raise DirectionsError(f"{where!r} is no file of directions ({error}); {advice}") from error
        if name != FORMAT or version != str(FORMAT_VERSION):
            raise DirectionsError(
                f"{where!r} holds {name!r} of version {version}; this version of sparsespec reads {FORMAT!r} of "
                f"version {FORMAT_VERSION}"
            )
        try:
            return cls(
                objectness=content["objectness"].astype(np.float32),
                objectness_offset=float(content["objectness_offset"]),
                position=content["position"].astype(np.float32),
                position_offset=content["position_offset"].astype(np.float32),
                source_sha256=str(content["source_sha256"]),
                photographs=int(content["photographs"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DirectionsError(f"{where!r} holds no usable directions: {error}") from error


def find_directions(
    directions: Directions | str | os.PathLike[str] | None, *, source_sha256: str, channels: int
) -> Directions | None:
    """Directions for a network.

    Parameters
    ----------
    directions
        "default" for those that come with the package, None where there are none for this network; None for none; a
        file; or directions, which are checked.
    source_sha256, channels
        Of the network.

    Raises
    ------
    DirectionsError
        A file that can't be read, or directions of another network.
    """
    if directions is None:
        return None
    if isinstance(directions, str) and directions == "default":
        path = shipped_directions(source_sha256)
        return None if path is None else _load_shipped(path)
    where = "the directions"
    if not isinstance(directions, Directions):
        where = f"the directions in {os.fspath(directions)!r}"
        directions = Directions.load(directions)
    if directions.source_sha256 and source_sha256 and directions.source_sha256 != source_sha256:
        raise DirectionsError(
            f"{where} were fitted on another network's features: its weights come from a file of SHA-256 "
            f"{directions.source_sha256[:12]}..., this network's from {source_sha256[:12]}...; fit them anew with "
            "'sparsespec fit'"
        )
    if directions.channels != channels:
        raise DirectionsError(
            f"{where} are of a network with {directions.channels} channels, this one has {channels}; fit them anew "
            "with 'sparsespec fit'"
        )
    return directions


@lru_cache(maxsize=4)
def _load_shipped(path: Path) -> Directions:
    return Directions.load(path)
