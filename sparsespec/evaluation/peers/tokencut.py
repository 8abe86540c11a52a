"""TokenCut: one object by one normalised cut."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsespec.evaluation.peers.ncut import PeerResult, bipartition, check_tau, component, cosine_similarity


def tokencut(features: npt.ArrayLike, grid: tuple[int, int], *, tau: float = 0.2) -> PeerResult:
    """Find the one object of an image by TokenCut, without its edge refinement.

    The tokens are cut in two, see :func:`sparsespec.evaluation.peers.ncut.bipartition`; the side that holds the entry
    of largest magnitude is the foreground, and its 4-connected part around that entry is the object.

    Parameters
    ----------
    features
        (N, C) real numbers, one row per token, row-major on the grid. The paper takes the keys of the last block of
        DINO ViT-S/16.
    grid
        (h, w), h w = N.
    tau
        Cosine from which on two tokens are joined; 0.2 in the paper.

    Returns
    -------
    PeerResult
        One mask, or none where all tokens are alike. The paper has no score; here it is 1 minus the eigenvalue of the
        cut, which is small where little is cut through.

    Raises
    ------
    ValueError
        ``features`` isn't an (N, C) array of finite numbers, ``grid`` doesn't hold N tokens, there are more than
        10,000, or ``tau`` isn't in [-1, 1].

    References
    ----------
    - Wang et al., Self-Supervised Transformers for Unsupervised Object Discovery using Normalized Cut, CVPR 2022,
      section 3.2.
    - Wang et al., TokenCut: Segmenting Objects in Images and Videos with Self-Supervised Transformer and Normalized
      Cut, T-PAMI 2023.
    """
    threshold = check_tau(tau)
    similarity, size = cosine_similarity(features, grid)
    cut = bipartition(similarity, threshold)
    if cut is None:
        return PeerResult(np.zeros((0, len(similarity)), bool), np.zeros(0))
    mask = component(cut.side, int(np.argmax(cut.vector)), size)
    return PeerResult(mask[None], np.array([1 - cut.value]))
