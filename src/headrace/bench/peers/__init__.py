"""Other inference engines on this machine: finding, installing, starting and driving them."""

from headrace.bench.peers.catalog import OURS, PRECISIONS, Peer, discover, ours, peers_folder
from headrace.bench.peers.install import install
from headrace.bench.peers.session import Answer, PeerFailed, Session
from headrace.bench.peers.start import checkpoint_digest, is_converted, start

__all__ = [
    "OURS",
    "PRECISIONS",
    "Answer",
    "Peer",
    "PeerFailed",
    "Session",
    "checkpoint_digest",
    "discover",
    "install",
    "is_converted",
    "ours",
    "peers_folder",
    "start",
]
