"""A vision transformer in NumPy, float64, one line per formula: what the graph of the model has to compute."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.models.vit import Linear, Norm, Vit
from sparsespec.position_table import resize_positions

_Array = npt.NDArray[np.float64]
_erf = np.vectorize(math.erf)


def _linear(x: _Array, layer: Linear) -> _Array:
    return x @ layer.weight.astype(float) + layer.bias


def _norm(x: _Array, layer: Norm) -> _Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + layer.epsilon) * layer.weight + layer.bias


def _attend(q: _Array, k: _Array, v: _Array, heads: int) -> _Array:
    parts = []
    for qh, kh, vh in zip(*(np.split(m, heads, axis=-1) for m in (q, k, v)), strict=True):
        score = qh @ kh.T / math.sqrt(qh.shape[-1])
        weight = np.exp(score - score.max(-1, keepdims=True))
        parts.append(weight / weight.sum(-1, keepdims=True) @ vh)
    return np.concatenate(parts, axis=-1)


def forward(
    vit: Vit, image: npt.NDArray[Any], positions: npt.NDArray[Any] | None = None
) -> list[tuple[_Array, _Array, _Array]]:
    """Queries, keys and values (P + h * w, D) of every block, for one normalised (3, H, W) image.

    ``positions`` (h * w, D) are added to the patches; by default the table of the model, resized by its rule.
    """
    p = vit.patch_size
    grid = image.shape[1] // p, image.shape[2] // p
    if positions is None:
        positions = resize_positions(vit.positions, grid, rule=vit.rule).reshape(-1, vit.embed_dim)
    patches = []
    for top in range(0, grid[0] * p, p):
        for left in range(0, grid[1] * p, p):
            patch = image[:, top : top + p, left : left + p].astype(float)
            patches.append((vit.patch.weight * patch).sum((1, 2, 3)) + vit.patch.bias)
    x = np.concatenate([vit.prefix.astype(float), np.array(patches) + positions])
    found = []
    for block in vit.blocks:
        attention = block.attention
        normed = _norm(x, attention.norm)
        q, k, v = (_linear(normed, part) for part in (attention.query, attention.key, attention.value))
        found.append((q, k, v))
        if block.rest is None:
            break
        x = x + _linear(_attend(q, k, v, vit.heads), block.rest.out)
        feed = block.rest.feed_forward
        hidden = _linear(_norm(x, block.rest.norm), feed.fc1)
        x = x + _linear(_ACTIVATIONS[feed.activation](hidden), feed.fc2)
    return found


def _swiglu(hidden: _Array) -> _Array:
    gate, value = np.split(hidden, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * value


_ACTIVATIONS = {
    "gelu": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "swiglu": _swiglu,
}
