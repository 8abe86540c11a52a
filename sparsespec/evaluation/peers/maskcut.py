"""MaskCut: several objects by normalised cuts, each on what the ones before left over."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsespec._checks import check_count
from sparsespec.evaluation.peers.ncut import (
    Bipartition,
    BoolArray,
    PeerResult,
    bipartition,
    check_tau,
    component,
    cosine_similarity,
)


def maskcut(
    features: npt.ArrayLike,
    grid: tuple[int, int],
    *,
    tau: float = 0.15,
    n_masks: int = 3,
    min_area: float = 0.0,
    max_overlap: float = 1.0,
) -> PeerResult:
    """Find a few objects of an image by MaskCut, the first step of CutLER, without its edge refinement.

    The tokens are cut in two, see :func:`sparsespec.evaluation.peers.ncut.bipartition`; one side is the foreground,
    chosen by its corners (``foreground_side``), and its 4-connected part around its most extreme entry is an object.
    The tokens of the object lose their strong edges, and the next cut follows. An object gets what those before it have
    not taken.

    Parameters
    ----------
    features
        (N, C) real numbers, one row per token, row-major on the grid. The paper takes the keys of the last block of
        DINO ViT-B/8.
    grid
        (h, w), h w = N.
    tau
        Cosine from which on two tokens are joined; 0.15 in the paper.
    n_masks
        How many cuts are made, at least 1.
    min_area, max_overlap
        From the second cut on the search ends with an object of at most this share of the tokens, or whose
        intersection over union with the one before is above this. The paper has no such rule, and neither acts by
        default; 0.01 and 0.5 measure worse here.

    Returns
    -------
    PeerResult
        At most ``n_masks`` masks, none where all tokens are alike. The paper has no score; here it is 1 minus the
        eigenvalue of the cut, which is small where little is cut through.

    Raises
    ------
    ValueError
        ``features`` isn't an (N, C) array of finite numbers, ``grid`` doesn't hold N tokens, there are more than
        10,000, ``tau`` isn't in [-1, 1], ``n_masks`` is below 1, or ``min_area`` or ``max_overlap`` isn't in [0, 1].

    References
    ----------
    - Wang, Girdhar, Yu and Misra, Cut and Learn for Unsupervised Object Detection and Instance Segmentation,
      CVPR 2023, section 3.2.
    """
    threshold = check_tau(tau)
    wanted = check_count(n_masks, name="n_masks")
    for name, share in (("min_area", min_area), ("max_overlap", max_overlap)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], not {share!r}")
    similarity, size = cosine_similarity(features, grid)
    taken = np.zeros(len(similarity), bool)
    masks: list[BoolArray] = []
    scores: list[float] = []
    before = taken
    for turn in range(wanted):
        cut = bipartition(similarity, threshold, taken)
        if cut is None:
            break
        found = component(*foreground_side(cut, size), size)
        if turn and (found.mean() <= min_area or _overlap(found, before) > max_overlap):
            break
        before = found
        if (found & ~taken).any():
            masks.append(found & ~taken)
            scores.append(1 - cut.value)
        taken = taken | found
    return PeerResult(np.array(masks, bool).reshape(-1, len(similarity)), np.array(scores))


def foreground_side(cut: Bipartition, grid: tuple[int, int]) -> tuple[BoolArray, int]:
    """Decide which side of a cut is the foreground, by the two criteria of MaskCut.

    The foreground holds the entry of largest magnitude, and fewer than two corners of the image. The second comes
    first: where the two disagree, the side with one corner or none is taken. Where each side holds two corners neither
    meets it, and the first decides.

    Parameters
    ----------
    cut
        Its ``side`` holds the entry of largest magnitude.
    grid
        (h, w).

    Returns
    -------
    side : (N,) bool array
    seed : int
        The foreground's token furthest from the other side along the eigenvector.
    """
    corners = cut.side.reshape(grid)[[0, 0, -1, -1], [0, -1, 0, -1]]
    if np.count_nonzero(corners) > 2:
        return ~cut.side, int(np.argmin(cut.vector))
    return cut.side, int(np.argmax(cut.vector))


def _overlap(a: BoolArray, b: BoolArray) -> float:
    either = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / either if either else 0.0
