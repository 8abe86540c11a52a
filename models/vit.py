"""The weights of a vision transformer, wherever they come from: what readers return and the writer takes.

A reader (:mod:`sparsespec.models.from_onnx`, :mod:`sparsespec.models.from_weights`) turns an export or a state dict
into a :class:`Vit`; the writer (:mod:`sparsespec.models.graph`) turns it into the one graph that
:class:`sparsespec.backbone.Backbone` runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.position_table import PositionRule

Array = npt.NDArray[Any]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""What DINO and DINOv2 normalise RGB in [0, 1] with."""


def float32(values: Array) -> Array:
    """Weights as a :class:`Vit` holds them: float32, in C order, not copied where they are."""
    return np.ascontiguousarray(values, dtype=np.float32)


class BuildError(RuntimeError):
    """A model can't be built from what was given."""


class UnrecognisedModelError(BuildError):
    """A part of the vision transformer was not found; the message says which one, and where it was looked for."""


@dataclass(frozen=True, eq=False)
class Linear:
    """``x @ weight + bias``: weight (inputs, outputs) float32, bias (outputs,) float32, zeros where there is none."""

    weight: Array
    bias: Array


@dataclass(frozen=True, eq=False)
class Norm:
    """Layer normalisation over the channels: weight (D,) and bias (D,) float32, ``epsilon`` added to the variance."""

    weight: Array
    bias: Array
    epsilon: float


@dataclass(frozen=True, eq=False)
class Attention:
    """First half of a block, up to its queries, keys and values."""

    norm: Norm
    query: Linear
    key: Linear
    value: Linear


@dataclass(frozen=True, eq=False)
class FeedForward:
    """``fc2(activation(fc1(x)))``.

    Attributes
    ----------
    fc1, fc2 : Linear
        For ``swiglu``, fc1 gives the gate and then the values: ``fc2(silu(gate) * values)``.
    activation : {"gelu", "gelu_tanh", "swiglu"}
        ``gelu`` is exact, with the error function.
    """

    fc1: Linear
    fc2: Linear
    activation: str = "gelu"


@dataclass(frozen=True, eq=False)
class Rest:
    """What follows queries, keys and values in a block, with the layer scales multiplied into ``out`` and ``fc2``."""

    out: Linear
    norm: Norm
    feed_forward: FeedForward


@dataclass(frozen=True, eq=False)
class Block:
    """A block of the transformer; without ``rest`` nothing can come after it."""

    attention: Attention
    rest: Rest | None


@dataclass(frozen=True, eq=False)
class Vit:
    """A vision transformer up to its last queries, keys and values.

    Attributes
    ----------
    patch : Linear
        Weight (D, 3, p, p) as a convolution keeps it, bias (D,).
    prefix : (P, D) float32
        The tokens in front of the patches as they enter the first block: the class token plus its position, then the
        registers. (0, D) where there are none.
    positions : (rows, columns, D) float32
        The table as learnt.
    rule : PositionRule
        How the table is brought to other grids.
    heads : int
        Attention heads.
    blocks : tuple of Block
        All of them; only the last may lack its ``rest``.
    mean, std : (float, float, float)
        Normalisation of RGB in [0, 1].
    """

    patch: Linear
    prefix: npt.NDArray[np.float32]
    positions: npt.NDArray[np.float32]
    rule: PositionRule
    heads: int
    blocks: tuple[Block, ...]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def patch_size(self) -> int:
        """Side of a patch, pixels."""
        return int(self.patch.weight.shape[-1])

    @property
    def embed_dim(self) -> int:
        """D, channels of a token."""
        return int(self.patch.weight.shape[0])
