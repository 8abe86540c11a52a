"""Linear directions of the token features that say how object-like a token is, and where in its object it lies.

Both are fitted without labels, by :mod:`sparsespec.fitting`, to what the method itself finds in photographs: one
direction tells tokens that stand out from their image's border from those that don't, two more tell left from right and
top from bottom within the instances found. They carry over to photographs they were not fitted on, and to things they
never saw, since they only read what the network knows already.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec._checks import check_features
from sparsespec.channels import token_norms
from sparsespec.models import shipped_directions

Float32Array = npt.NDArray[np.float32]

FORMAT = "sparsespec-directions"
FORMAT_VERSION = 1

_ADVICE = "give a file that 'sparsespec fit' wrote"


class DirectionsError(ValueError):
    """Directions that can't be read or used, or that belong to another model."""


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
        Of the features, as :attr:`sparsespec.Backbone.features_sha256` has it: of the file the network's weights were
        taken from, where they are those of its last block. Empty where that isn't known.
    photographs
        How many they were fitted on.

    Raises
    ------
    DirectionsError
        Shapes that don't fit together, or numbers that aren't finite.

    Notes
    -----
    The arrays are kept as copies that can't be written to: one object serves all images and threads.
    """

    objectness: Float32Array
    objectness_offset: float
    position: Float32Array
    position_offset: Float32Array
    source_sha256: str = ""
    photographs: int = 0

    def __post_init__(self) -> None:
        for name in ("objectness", "position", "position_offset"):
            object.__setattr__(self, name, _frozen(getattr(self, name), name))
        length = self.objectness.size
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
        return self.objectness.size // 3

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
        ValueError
            They aren't real, finite numbers, one row per token.
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
        ValueError
            They aren't real, finite numbers, one row per token.
        """
        return self._project(self.position, keys, queries, values) + self.position_offset

    def _project(
        self, weights: Float32Array, keys: Float32Array, queries: Float32Array, values: Float32Array
    ) -> npt.NDArray[np.float64]:
        total: npt.NDArray[np.float64] | None = None
        for number, (name, kind) in enumerate({"keys": keys, "queries": queries, "values": values}.items()):
            # Halves can't hold the bound that they are checked against.
            array = check_features(np.asarray(kind, np.float32), name=name)
            if array.shape[1] != self.channels:
                raise DirectionsError(
                    f"the directions are of a network with {self.channels} channels, but the {name} have "
                    f"{array.shape[1]}: fit directions for this network with 'sparsespec fit', or give directions=None"
                )
            part = weights[number * self.channels : (number + 1) * self.channels]
            # Scaled afterwards: unit copies of all tokens would take longer than the products.
            products = (array @ part) / token_norms(array)[:, None]
            if total is None:
                total = products.astype(np.float64)
            elif len(total) == len(products):
                total += products
            else:
                raise ValueError(f"keys are of {len(total)} tokens, but {name} of {len(products)}")
        assert total is not None
        return total

    def to_bytes(self) -> bytes:
        """Content of a file: NumPy's .npz, always the same for the same directions."""
        buffer = io.BytesIO()
        # Not compressed: weights hardly are, and what a compressor makes of them depends on its version.
        np.savez(
            buffer,
            format=np.array([FORMAT, str(FORMAT_VERSION)]),
            objectness=self.objectness,
            objectness_offset=np.float64(self.objectness_offset),
            position=self.position,
            position_offset=self.position_offset,
            source_sha256=np.array(self.source_sha256),
            photographs=np.int64(self.photographs),
        )
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a file, which :meth:`load` reads.

        Raises
        ------
        OSError
            It can't be written.
        """
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Directions:
        """Read a file written by :meth:`save`.

        Raises
        ------
        DirectionsError
            There is none, it can't be read, or it isn't one of these.
        """
        where = os.fspath(path)
        if not Path(path).is_file():
            raise DirectionsError(f"there is no file of directions {where!r}; {_ADVICE}")
        try:
            # Other kinds of NumPy's files would be unpickled, or refused in words that don't help here.
            if not zipfile.is_zipfile(path):
                raise DirectionsError(f"{where!r} is no file of directions, or it is cut short; {_ADVICE}")
            with np.load(path, allow_pickle=False) as stored:
                content: dict[str, Any] = {name: stored[name] for name in stored.files}
        except DirectionsError:
            raise
        except OSError as error:
            raise DirectionsError(
                f"the file of directions {where!r} can't be read: {error.strerror or error}"
            ) from error
        except Exception as error:
            raise DirectionsError(
                f"{where!r} is no file of directions, or it is damaged ({error}); {_ADVICE}"
            ) from error
        said = content.get("format", np.zeros(0))
        if getattr(said, "shape", None) != (2,) or said.dtype.kind != "U":
            raise DirectionsError(f"{where!r} is no file of directions, but holds something else; {_ADVICE}")
        name, version = (str(text) for text in said)
        if name != FORMAT or version != str(FORMAT_VERSION):
            raise DirectionsError(
                f"{where!r} holds {name!r} of version {version}; this version of sparsespec reads {FORMAT!r} of "
                f"version {FORMAT_VERSION}"
            )
        try:
            return cls(
                objectness=content["objectness"],
                objectness_offset=float(_single(content, "objectness_offset", "fiu")),
                position=content["position"],
                position_offset=content["position_offset"],
                source_sha256=str(_single(content, "source_sha256", "U")),
                photographs=int(_single(content, "photographs", "iu")),
            )
        except KeyError as error:
            raise DirectionsError(f"{where!r} holds no usable directions: {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise DirectionsError(f"{where!r} holds no usable directions: {error}") from error


def _frozen(values: npt.ArrayLike, name: str) -> Float32Array:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise DirectionsError(f"{name} must hold real numbers; its dtype is {array.dtype}")
    # Numbers beyond float32 become infinite, which is refused with its own message.
    with np.errstate(over="ignore"):
        copy = np.array(array, np.float32, order="C")
    copy.flags.writeable = False
    return copy


def _single(content: Mapping[str, Any], name: str, kinds: str) -> Any:
    """Read one number or text: NumPy would take arrays of one element for it as well."""
    array = np.asarray(content[name])
    if array.shape != () or array.dtype.kind not in kinds:
        raise DirectionsError(f"{name} must be a single value; it is an array of {array.dtype}, shape {array.shape}")
    return array[()]


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
        if path is not None and not path.is_file():
            raise DirectionsError(
                f"the directions of this model are missing from this installation: {os.fspath(path)!r}; reinstall "
                "sparsespec, or give directions=None"
            )
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
