"""What is made of the positions that tokens say, one token and one edge at a time."""

from __future__ import annotations

import math

import numpy as np


def weaken_back_steps(
    weights: np.ndarray, said: np.ndarray, grid: tuple[int, int], strength: float, least: float = 1e-12
) -> np.ndarray:
    """Dense affinity times exp(-strength times how far the position steps back along each edge)."""
    out = np.zeros_like(weights)
    for i, j in np.argwhere(weights):
        step = np.array([j % grid[1] - i % grid[1], j // grid[1] - i // grid[1]])
        length = math.hypot(*step)
        forward = float(np.dot(step / length, said[j] - said[i])) if length else 0.0
        out[i, j] = max(least, weights[i, j] * math.exp(strength * min(0.0, forward)))
    return out


def residuals(masks: np.ndarray, said: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Mean squared distance of what the tokens of each mask say from their places in its box; 0 without tokens."""
    out = []
    for mask in masks:
        places = [divmod(int(token), grid[1]) for token in np.flatnonzero(mask)]
        total = 0.0
        for row, column in places:
            rows, columns = zip(*places, strict=True)
            x = (column - min(columns) + 0.5) / (max(columns) - min(columns) + 1) - 0.5
            y = (row - min(rows) + 0.5) / (max(rows) - min(rows) + 1) - 0.5
            x_said, y_said = said[row * grid[1] + column]
            total += (x_said - x) ** 2 + (y_said - y) ** 2
        out.append(total / len(places) if places else 0.0)
    return np.array(out)
