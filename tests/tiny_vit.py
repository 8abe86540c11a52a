"""Small vision transformers of random weights."""

from __future__ import annotations

import numpy as np

from sparsespec.models.vit import Attention, Block, FeedForward, Linear, Norm, Rest, Vit
from sparsespec.position_table import PositionRule


def random_vit(
    *,
    prefix: int = 1,
    blocks: int = 3,
    heads: int = 2,
    channels: int = 16,
    activation: str = "gelu",
    biases: bool = True,
    complete: bool = False,
    patch: int = 4,
    table: tuple[int, int] = (3, 3),
    rule: PositionRule | None = None,
    seed: int = 5,
) -> Vit:
    """Make one; its last block ends after q, k and v unless it is to be `complete`."""
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)

    def linear(inputs: int, outputs: int) -> Linear:
        return Linear(array(inputs, outputs), array(outputs) if biases else np.zeros(outputs, np.float32))

    def norm() -> Norm:
        return Norm(1 + array(channels), array(channels), 1e-6)

    def attention() -> Attention:
        return Attention(norm(), *(linear(channels, channels) for _ in range(3)))

    def rest() -> Rest:
        hidden = channels * 3 // 2
        wide = 2 * hidden if activation == "swiglu" else hidden
        feed_forward = FeedForward(linear(channels, wide), linear(hidden, channels), activation)
        return Rest(linear(channels, channels), norm(), feed_forward)

    return Vit(
        patch=Linear(rng.normal(size=(channels, 3, patch, patch)).astype(np.float32) / 5, linear(1, channels).bias),
        prefix=rng.normal(size=(prefix, channels)).astype(np.float32),
        positions=rng.normal(size=(*table, channels)).astype(np.float32),
        rule=rule or PositionRule(),
        heads=heads,
        blocks=tuple(Block(attention(), rest() if complete or i < blocks - 1 else None) for i in range(blocks)),
    )
