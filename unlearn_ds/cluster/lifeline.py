"""One TCP connection from every rank to rank 0, so that a dead rank brings the others down within seconds.

A collective waits for a dead peer until its timeout. Here a killed process closes its socket and the others know at once; a
lost host or a cut network is noticed when heartbeats stop. Rank 0 passes on what it learns; every rank then says what
happened and leaves. The same line asks all ranks for their stacks when one of them hangs.

Only ranks of the run hold one (`admission`): its secret is drawn anew by rank 0 and reaches the others over the process group.
"""

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

import torch.distributed as dist

from unlearn_ds import ownership
from unlearn_ds.cluster.admission import Door, address_of, knock
from unlearn_ds.markup import visible

EXIT_PEER_LOST = 76
HEARTBEAT_S = 1.0
SILENCE_S = 40.0  # longer than Python code holds the interpreter lock, shorter than anyone wants to wait
JOIN_S = (
    30.0  # for all ranks to connect, once the group is there; who is in hears nothing before, so less than SILENCE_S
)
_MAX_LINE = 1 << 16  # bytes of a message
_MAX_WHY = 1 << 13  # characters of what it says: at most six bytes each
_KINDS = ("beat", "bye", "lost", "failed", "hang")
_EOF_GRACE_S = 0.5
_FAILED_GRACE_S = 10.0  # for a rank to come to its own, better error


@dataclass
class _Peer:
    """The far end of a connection."""

    rank: int
    connection: socket.socket
    heard_at: float
    buffer: bytes = b""
    finished: bool = False  # said goodbye: its silence means nothing


@dataclass
class Lifeline:
    """This rank's connections: rank 0 holds one to every other rank, the others hold one to rank 0."""

    rank: int
    on_hang: Callable[[str], None] | None = None  # called in the lifeline's thread with what the hanging rank reports
    _failed: str | None = None  # what another rank says that it ends of
    _peers: dict[int, _Peer] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    @classmethod
    def start(cls) -> "Lifeline":
        """Connect all ranks of the default process group. Every rank calls this."""
        line = cls(dist.get_rank())
        address = address_of(os.environ["MASTER_ADDR"])
        reached_by: list = [None] * dist.get_world_size()
        dist.all_gather_object(reached_by, address)
        door, shared = None, [None]
        if line.rank == 0:
            secret = secrets.token_bytes(32)
            door = Door(reached_by[1:], secret)
            shared = [(secret, door.ports)]
        dist.broadcast_object_list(shared, src=0)
        if door is not None:
            line._let_in(door)
        else:
            secret, ports = shared[0]
            line._join(address[1], ports[address[1]], secret)
        line._thread = threading.Thread(target=line._watch, name="lifeline", daemon=True)
        line._thread.start()
        return line

    def _let_in(self, door: Door) -> None:
        others = range(1, dist.get_world_size())
        for rank, connection in sorted(door.admit(others, JOIN_S).items()):
            self._add(rank, connection)
        if strangers := door.turned_away.total():
            found = ", ".join(f"{count} from {address}" for address, count in door.turned_away.most_common(3))
            _say(f"warning: connections to rank 0 that were not of this run: {found} ({strangers} in all): dropped")
        if missing := [rank for rank in others if rank not in self._peers]:
            self._lost(missing[0], f"it has not connected to rank 0 in {JOIN_S:.0f} s ({len(missing)} ranks missing)")

    def _join(self, address: str, port: int, secret: bytes) -> None:
        try:
            self._add(0, knock(address, port, self.rank, secret, JOIN_S))
        except OSError as error:
            self._lost(0, f"no connection to it at {address} port {port} in {JOIN_S:.0f} s ({error})")

    def finish(self, failure: str | None = None) -> None:
        """Say goodbye: from now on this rank may end. `failure`: what it ends of, so that the others end too."""
        self._send_all({"kind": "failed", "why": failure} if failure else {"kind": "bye"})
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
        for peer in self._peers.values():
            peer.connection.close()

    def leave_if_a_peer_is_gone(self) -> None:
        """For a rank with an error that may follow from another's end: if one ends within a moment, say that and leave."""
        deadline = time.monotonic() + 2 * _EOF_GRACE_S
        while time.monotonic() < deadline:
            if self._failed is not None:
                self._leave(self._failed, aloud=self.rank == 0)
            time.sleep(0.02)

    def report_hang(self, report: str) -> None:
        """Ask all other ranks to dump their stacks."""
        self._send_all({"kind": "hang", "why": report})

    def _add(self, rank: int, connection: socket.socket) -> None:
        connection.settimeout(5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[rank] = _Peer(rank, connection, time.monotonic())

    def _send_all(self, message: dict[str, str], but: int | None = None) -> None:
        why = {"why": message["why"][:_MAX_WHY]} if "why" in message else {}
        line = json.dumps({"rank": self.rank} | message | why).encode() + b"\n"
        with self._lock:
            for peer in self._peers.values():
                if peer.rank != but and not peer.finished:
                    try:
                        peer.connection.sendall(line)
                    except OSError:
                        continue  # the watching thread sees that peer's end, or its silence

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for peer in self._peers.values():
            selector.register(peer.connection, selectors.EVENT_READ, peer)
        beat_at = 0.0
        while not self._stop.is_set() and any(not peer.finished for peer in self._peers.values()):
            now = time.monotonic()
            if now - beat_at >= HEARTBEAT_S:
                self._send_all({"kind": "beat"})
                beat_at = now
            for key, _ in selector.select(timeout=HEARTBEAT_S / 4):
                if not self._receive(key.data):
                    selector.unregister(key.fileobj)
            for peer in self._peers.values():
                silence = time.monotonic() - peer.heard_at
                if not peer.finished and silence > SILENCE_S:
                    self._lost(peer.rank, f"no sign of it for {silence:.0f} s: its host or the network is gone")

    def _receive(self, peer: _Peer) -> bool:
        """Take in what a peer sent; False at the end of its connection."""
        try:
            data = peer.connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            if not peer.finished and not self._stop.wait(_EOF_GRACE_S):
                self._lost(peer.rank, "its process ended")
            peer.finished = True
            return False
        peer.heard_at = time.monotonic()
        *lines, peer.buffer = (peer.buffer + data).split(b"\n")
        for line in lines:
            self._act(peer, _message(line))
        if len(peer.buffer) > _MAX_LINE:
            self._act(peer, None)
        return True

    def _act(self, peer: _Peer, message: dict | None) -> None:
        if message is None:
            self._lost(peer.rank, "it sent something that is no message of a rank")
        kind = message["kind"]
        if kind == "bye":
            peer.finished = True
        elif kind == "lost":
            self._leave(message["why"], aloud=False)
        elif kind == "failed":
            peer.finished = True
            if self.rank == 0:
                self._send_all(message, but=peer.rank)
            self._failed = f"rank {message['rank']} failed: {message['why']}"
            # This rank may be about to report the same error, and better.
            if not self._stop.wait(_FAILED_GRACE_S):
                self._leave(self._failed, aloud=self.rank == 0)
        elif kind == "hang":
            if self.rank == 0:
                self._send_all(message, but=peer.rank)
            if self.on_hang is not None:
                self.on_hang(message["why"])

    def _lost(self, rank: int, how: str) -> NoReturn:
        why = f"rank {rank} is lost: {how}"
        self._send_all({"kind": "lost", "why": why}, but=rank)
        self._leave(why, aloud=True)

    def _leave(self, why: str, aloud: bool) -> NoReturn:
        if aloud:
            who = f"rank {self.rank} on {socket.gethostname()}"
            _say(f"{who}: {visible(why)}. Leaving: start again with --resume")
        ownership.release_all()
        os._exit(EXIT_PEER_LOST)


def _say(message: str) -> None:
    os.write(
        sys.stderr.fileno(), f"unlearn-ds: {message}\n".encode()
    )  # print may be in the middle of another thread's line


def _message(line: bytes) -> dict | None:
    """A line as a message, None if it is none."""
    if len(line) > _MAX_LINE:
        return None
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or message.get("kind") not in _KINDS or type(message.get("rank")) is not int:
        return None
    silent = message["kind"] in ("beat", "bye")
    return message if silent or isinstance(message.get("why"), str) else None
