"""Length of every token; range, histogram and moments of every channel, with tokens scaled while they are read."""

from __future__ import annotations

import numpy as np

from sparsespec._kernels._compile import device, kernel

# Every kernel takes a range of rows or of channels, for threads to share.


@device(fastmath=True)
def _squared_length(row):
    total = np.float32(0.0)
    for c in range(row.size):
        total += row[c] * row[c]
    return total


@kernel()
def token_norms(features, first, last, norms):
    # void(float32[N, C], intp, intp, float32[N]): 1 for tokens of zeros, which are to stay as they are
    for i in range(first, last):
        norm = np.sqrt(_squared_length(features[i]))
        norms[i] = norm if norm > np.float32(0.0) else np.float32(1.0)


@kernel()
def unit_tokens(features, kept, first, last, out):
    # void(float32[N, C], intp[K], intp, intp, float32[N, K]): the kept channels of tokens, scaled to unit length
    for i in range(first, last):
        for c in range(kept.size):
            out[i, c] = features[i, kept[c]]
        norm = np.sqrt(_squared_length(out[i]))
        if norm > np.float32(0.0):
            for c in range(kept.size):
                out[i, c] /= norm


@kernel()
def channel_histogram(features, norms, first, last, counts):
    # void(float32[N, C], float32[N], intp, intp, int64[C, bins]): of features / norms, as numpy.histogram counts them
    size, width = features.shape[0], last - first
    bins = counts.shape[1]
    lowest = np.empty(width, np.float32)
    highest = np.empty(width, np.float32)
    step = np.empty(width, np.float32)
    spread = np.empty(width, np.float32)
    place = np.empty(width, np.int32)
    for c in range(width):
        lowest[c] = features[0, first + c] / norms[0]
        highest[c] = lowest[c]
    for i in range(1, size):
        row = features[i, first : first + width]
        norm = norms[i]
        for c in range(width):
            value = row[c] / norm
            lowest[c] = value if value < lowest[c] else lowest[c]
            highest[c] = value if value > highest[c] else highest[c]
    for c in range(width):
        if lowest[c] == highest[c]:
            # A constant channel has no width; give it one, so that it fills a single bin.
            half = max(np.float32(0.5), abs(lowest[c]) * np.float32(1e-3))
            lowest[c] -= half
            highest[c] += half
        spread[c] = highest[c] - lowest[c]
        step[c] = spread[c] / np.float32(bins)
    top = np.int32(bins - 1)
    for i in range(size):
        row = features[i, first : first + width]
        norm = norms[i]
        for c in range(width):
            value = row[c] / norm
            guess = np.int32((value - lowest[c]) / spread[c] * np.float32(bins))
            guess = guess if guess > np.int32(0) else np.int32(0)
            guess = guess if guess < top else top
            # The guess is rounded; the edges decide. The last bin holds its right edge.
            left = np.float32(guess) * step[c] + lowest[c]
            right = np.float32(guess + np.int32(1)) * step[c] + lowest[c]
            down = np.int32(1) if value < left and guess > np.int32(0) else np.int32(0)
            up = np.int32(1) if value >= right and guess < top else np.int32(0)
            place[c] = guess - down + up
        for c in range(width):
            counts[first + c, place[c]] += 1


@kernel()
def channel_moments(features, first, last, sums, squares):
    # void(float32[N, C], intp, intp, float64[C], float64[C]): sum of x - x_0 and of (x - x_0)^2 over the tokens. Taking
    # the first token off keeps a channel with a small deviation around a large mean exact, and a constant one at zero.
    for c in range(first, last):
        sums[c] = 0.0
        squares[c] = 0.0
    for i in range(1, features.shape[0]):
        for c in range(first, last):
            value = np.float64(features[i, c]) - np.float64(features[0, c])
            sums[c] += value
            squares[c] += value * value
