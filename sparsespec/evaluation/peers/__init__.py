"""Other training-free methods on the same token features, written from their papers: what ours is compared with."""

from sparsespec.evaluation.peers.maskcut import maskcut
from sparsespec.evaluation.peers.ncut import PeerResult
from sparsespec.evaluation.peers.segment import PEERS, Peer, segment_with_peer
from sparsespec.evaluation.peers.tokencut import tokencut

__all__ = ["PEERS", "Peer", "PeerResult", "maskcut", "segment_with_peer", "tokencut"]
