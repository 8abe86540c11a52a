"""Every peer in one way: from the token features of an image to its labels at full resolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec import paper, refine
from sparsespec._checks import check_count
from sparsespec.backbone import TokenFeatures
from sparsespec.evaluation.peers.maskcut import maskcut
from sparsespec.evaluation.peers.ncut import PeerResult
from sparsespec.evaluation.peers.tokencut import tokencut
from sparsespec.images import PixelSource, as_pixels
from sparsespec.pipeline import Settings

FEATURES = ("keys", "queries", "values")


@dataclass(frozen=True)
class Peer:
    """How a peer is run where nothing else is asked for.

    Attributes
    ----------
    features
        Which features of the last block it sees: "keys", "queries" or "values".
    tau
        Cosine from which on two tokens are joined; None for a peer without a threshold.
    """

    features: str
    tau: float | None


# All three papers take the keys of DINO. Those of DINOv2 have so much in common that no cosine falls below a half: the
# papers' thresholds join everything, and the comparison would be won by default. So each peer gets the features and the
# threshold that served it best on the development sets, on average.
PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        "tokencut": Peer("queries", 0.4),
        "maskcut": Peer("values", 0.3),
        "paper": Peer("values", None),
    }
)


def segment_with_peer(
    name: str,
    tokens: TokenFeatures,
    pixels: npt.ArrayLike | PixelSource,
    *,
    n_instances: int | None = None,
    features: str | None = None,
    tau: float | None = None,
    refined: bool = True,
    steps: Mapping[str, Any] | None = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Segment one image with a peer, on the features and at the resolution that ours has.

    Parameters
    ----------
    name
        "tokencut", "maskcut" or "paper", the published SpecUnIIS (:mod:`sparsespec.paper`).
    tokens
        Features of the image.
    pixels
        The image, as :class:`~sparsespec.pipeline.Segmenter` takes it.
    n_instances
        How many instances there are, at least 0. "paper" has to be told; "maskcut" makes so many cuts, three by
        default; "tokencut" finds one in any case but 0.
    features, tau
        Other features and another threshold than in :data:`PEERS`.
    refined
        Whether edges follow the photograph as ours do, by the guided filter with the default settings, which stands in
        for the dense CRF (MaskCut) and the bilateral solver (TokenCut) of the papers. Without it every pixel has the
        label of its token.
    steps
        Of "paper": ``keep``, ``keep_deviation`` and ``weights`` of :func:`sparsespec.paper.instances`, the first for
        its foreground too; None for the published ones.

    Returns
    -------
    labels : (H, W) int32 array
        0 is background, 1..n are the instances by falling score.
    scores : (n,) float32 array
        In [0, 1].

    Raises
    ------
    ValueError
        Unknown ``name`` or ``features``; "paper" without ``n_instances``, or a ``tau`` for it; ``steps`` for another;
        ``pixels`` of another size than the image of the tokens; ``n_instances`` below 0; and what the peer itself
        raises.
    """
    if name not in PEERS:
        raise ValueError(f"name must be one of {', '.join(map(repr, PEERS))}, not {name!r}")
    peer = PEERS[name]
    if features is None:
        features = peer.features
    elif features not in FEATURES:
        raise ValueError(f"features must be one of {', '.join(map(repr, FEATURES))}, not {features!r}")
    if n_instances is not None:
        n_instances = check_count(n_instances, name="n_instances", least=0)
    image = as_pixels(pixels, name="pixels")
    shape = (int(image.shape[0]), int(image.shape[1]))
    if shape != tuple(tokens.image_shape):
        raise ValueError(f"pixels are {shape} high and wide, but tokens are of an image of {tuple(tokens.image_shape)}")

    if steps is not None and name != "paper":
        raise ValueError(f'steps are those of name="paper", not of {name!r}: leave them out')

    threshold = peer.tau if tau is None else tau
    found = _find(name, getattr(tokens, features), tokens.grid, n_instances, threshold, steps or {})
    token_masks = found.masks.reshape(-1, *tokens.grid)
    extent = tokens.extent
    if refined:
        settings = Settings()
        labels = refine.refine_masks(image, token_masks, extent, radius=settings.filter_radius, eps=settings.filter_eps)
        refine.absorb_specks(labels, settings.min_speck * tokens.token_side**2, out=labels)
    else:
        numbers = np.arange(1, len(found) + 1, dtype=np.int32)
        token_labels = (token_masks * numbers[:, None, None]).sum(axis=0, dtype=np.int32)
        labels = refine.enlarge_labels(token_labels, extent, shape)
    if name == "paper":
        refine.keep_all(labels, token_masks, extent)
    return _by_score(labels, found.scores)


def _find(
    name: str,
    features: npt.NDArray[Any],
    grid: tuple[int, int],
    n_instances: int | None,
    tau: float | None,
    steps: Mapping[str, Any],
) -> PeerResult:
    if name == "paper":
        if tau is not None:
            raise ValueError(f'tau is {tau!r}, but name="paper" has no threshold: leave it out')
        front = paper.foreground(features, grid, keep=steps.get("keep", paper.NCR_KEEP))
        found = paper.instances(features, grid, front.mask, n_instances, **steps)
        count = int(found.labels.max(initial=0))
        masks = np.arange(1, count + 1)[:, None] == found.labels.ravel()
        # The published method ranks by nothing; the share of the foreground is at least an order.
        return PeerResult(masks, masks.sum(axis=1) / max(int(masks.sum()), 1))
    if n_instances == 0:
        return PeerResult(np.zeros((0, len(features)), bool), np.zeros(0))
    threshold = {} if tau is None else {"tau": tau}
    if name == "tokencut":
        return tokencut(features, grid, **threshold)
    return maskcut(features, grid, **threshold, n_masks=3 if n_instances is None else n_instances)


def _by_score(
    labels: npt.NDArray[Any], scores: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Number the masks that have pixels by falling score."""
    present = np.unique(labels)
    present = present[present > 0] - 1
    order = present[np.argsort(-scores[present], kind="stable")]
    number = np.zeros(len(scores) + 1, np.int32)
    number[order + 1] = np.arange(1, len(order) + 1)
    return number[labels], scores[order].astype(np.float32)
