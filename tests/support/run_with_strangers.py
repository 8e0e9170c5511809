"""A training run on whose rank 0 strangers call before any rank does: see tests/cluster/test_admission.py."""

import socket
from collections.abc import Sequence
from typing import Any

from unlearn_ds.cluster.admission import Door
from unlearn_ds.train import main as train

NUM_STRANGERS = 43


def main(argv: Sequence[str]) -> int:
    """Arguments of a run; returns its exit code."""
    make, kept = Door.__init__, []

    def make_among_strangers(door: Door, *arguments: Any) -> None:
        make(door, *arguments)
        for address, port in door.ports.items():
            kept.extend(socket.create_connection((address, port)) for _ in range(NUM_STRANGERS))
            kept[0].close()
            kept[1].sendall((1).to_bytes(4, "big"))
            kept[2].sendall(b'{"kind": "lost", "why": "me", "rank": 1}\n')
            kept[3].sendall(b"\xff" * 100_000)

    Door.__init__ = make_among_strangers
    return train(argv)
