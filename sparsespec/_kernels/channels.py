"""Range, histogram and moments of every channel, with tokens scaled while they are read."""

from __future__ import annotations

import numpy as np

from sparsespec._kernels._compile import kernel


@kernel()
def channel_range(features, norms, lowest, highest):
    # void(float32[N, C], float32[N], float32[C], float32[C]): of features / norms
    for c in range(features.shape[1]):
        value = features[0, c] / norms[0]
        lowest[c] = value
        highest[c] = value
    for i in range(1, features.shape[0]):
        norm = norms[i]
        for c in range(features.shape[1]):
            value = features[i, c] / norm
            lowest[c] = value if value < lowest[c] else lowest[c]
            highest[c] = value if value > highest[c] else highest[c]


@kernel()
def channel_histogram(features, norms, edges, counts):
    # void(float32[N, C], float32[N], float32[C, bins + 1], int64[C, bins]): of features / norms
    n_channels, bins = counts.shape
    for i in range(features.shape[0]):
        norm = norms[i]
        for c in range(n_channels):
            value = features[i, c] / norm
            lowest = edges[c, 0]
            place = int((value - lowest) / (edges[c, bins] - lowest) * np.float32(bins))
            place = min(max(place, 0), bins - 1)
            # The quotient is rounded; the edges decide. The last bin holds its right edge.
            if place > 0 and value < edges[c, place]:
                place -= 1
            elif place < bins - 1 and value >= edges[c, place + 1]:
                place += 1
            counts[c, place] += 1


@kernel()
def channel_moments(features, sums, squares):
    # void(float32[N, C], float64[C], float64[C]): sum of x - x_0 and of (x - x_0)^2 over the tokens. Taking the first
    # token off keeps a channel with a small deviation around a large mean exact, and a constant channel at zero.
    for c in range(features.shape[1]):
        sums[c] = 0.0
        squares[c] = 0.0
    for i in range(1, features.shape[0]):
        for c in range(features.shape[1]):
            value = np.float64(features[i, c]) - np.float64(features[0, c])
            sums[c] += value
            squares[c] += value * value
