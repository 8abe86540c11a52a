"""Channel statistics with ``numpy.histogram`` and ``numpy.std``."""

from __future__ import annotations

import numpy as np


def unit_tokens(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float32)
    length = np.sqrt((features * features).sum(axis=1, keepdims=True))
    return np.divide(features, length, out=features.copy(), where=length > 0)


def channel_entropy(features: np.ndarray, bins: int = 30, *, normalize: bool = True) -> np.ndarray:
    features = unit_tokens(features) if normalize else np.asarray(features, np.float32)
    entropies = []
    for channel in features.T:
        counts = np.histogram(channel, bins)[0]
        share = (counts if normalize else counts + 1e-6) / features.size
        entropies.append(5.0 if np.any(share == 0) else -np.sum(share * np.log2(share)))
    return np.array(entropies)


def channel_deviation(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    return np.std(features, axis=0, ddof=1) if len(features) > 1 else np.zeros(features.shape[1])
