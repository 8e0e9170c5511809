"""Who may hold a lifeline: rank 0's door, and how the other ranks knock at it.

Both sides prove that they know the run's secret, without sending it, over fresh random challenges (HMAC-SHA256):

    door -> caller    challenge (32 bytes)
    caller -> door    rank (4), challenge (32), proof (32)
    door -> caller    proof (32)

so what was overheard in this run or another opens nothing. Whoever else connects is counted and dropped: at once for what it
says, after `_CALL_S` for what it does not, and when there are too many, the oldest first; the door hears all at the same time.
"""

import contextlib
import hmac
import os
import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

PROOF_BYTES = 32
CHALLENGE_BYTES = 32
RANK_BYTES = 4
HELLO_BYTES = RANK_BYTES + CHALLENGE_BYTES + PROOF_BYTES
_CALL_S = 5.0  # from a connection to its proof
_MAX_CALLERS = 256  # that have not proved anything yet
_AGAIN_S = 0.1

Address = tuple[int, str]  # family, numeric host


def address_of(host: str) -> Address:
    """The address that this machine reaches `host` by. Raises `OSError` if the name is unknown."""
    family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    return family, address[0]


def _proof(secret: bytes, side: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret, b"unlearn-ds lifeline " + side + b"".join(parts), "sha256")


@dataclass
class _Caller:
    """A connection that has not proved yet that it is of this run."""

    connection: socket.socket
    address: str
    challenge: bytes
    deadline: float
    said: bytes = b""


class Door:
    """Rank 0's side: listens at the addresses that the other ranks reach it by, until all of them are in."""

    def __init__(self, addresses: Iterable[Address], secret: bytes) -> None:
        self._secret = secret
        self._selector = selectors.DefaultSelector()
        self._callers: list[_Caller] = []  # the oldest first
        self._admitted: dict[int, socket.socket] = {}
        self._ranks: frozenset[int] = frozenset()
        self.turned_away: Counter[str] = Counter()  # connections that were no rank of this run, by their address
        self.ports: dict[str, int] = {}
        for family, address in sorted(set(addresses)):
            listener = _listen(family, address)
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, listener)
            self.ports[address] = listener.getsockname()[1]

    def admit(self, ranks: Iterable[int], timeout_s: float) -> dict[int, socket.socket]:
        """The connections of `ranks`, as far as they have come within `timeout_s`; the door is closed after that."""
        self._ranks = frozenset(ranks)
        deadline = time.monotonic() + timeout_s
        try:
            while len(self._admitted) < len(self._ranks) and time.monotonic() < deadline:
                for key, _ in self._selector.select(timeout=_AGAIN_S):
                    if isinstance(key.data, _Caller):
                        self._hear(key.data)
                    else:
                        self._open_to(key.data)
                while self._callers and self._callers[0].deadline < time.monotonic():
                    self._turn_away(self._callers[0])
        finally:
            self._close()
        return self._admitted

    def _open_to(self, listener: socket.socket) -> None:
        try:
            connection, address = listener.accept()
        except OSError:  # it is gone again, or there are too many open files
            if self._callers:
                self._turn_away(self._callers[0])
            return
        if len(self._callers) >= _MAX_CALLERS:
            self._turn_away(self._callers[0])
        caller = _Caller(connection, address[0], os.urandom(CHALLENGE_BYTES), time.monotonic() + _CALL_S)
        connection.setblocking(False)
        self._callers.append(caller)
        self._selector.register(connection, selectors.EVENT_READ, caller)
        with contextlib.suppress(OSError):  # its end is read below
            connection.send(caller.challenge)

    def _hear(self, caller: _Caller) -> None:
        if caller.connection.fileno() < 0:  # turned away in the same round
            return
        try:
            data = caller.connection.recv(HELLO_BYTES - len(caller.said))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        caller.said += data
        if not data:
            self._turn_away(caller)
        elif len(caller.said) == HELLO_BYTES:
            self._judge(caller)

    def _judge(self, caller: _Caller) -> None:
        said, proof = caller.said[:-PROOF_BYTES], caller.said[-PROOF_BYTES:]
        rank = int.from_bytes(said[:RANK_BYTES], "big")
        genuine = hmac.compare_digest(proof, _proof(self._secret, b"rank", caller.challenge, said))
        if not genuine or rank not in self._ranks:
            self._turn_away(caller)
            return
        answer = _proof(self._secret, b"door", said, caller.challenge)
        self._forget(caller)
        if (earlier := self._admitted.pop(rank, None)) is not None:  # it has not had our answer and knocked again
            earlier.close()
        try:
            caller.connection.send(answer)
        except OSError:
            caller.connection.close()
            return
        self._admitted[rank] = caller.connection

    def _forget(self, caller: _Caller) -> None:
        self._selector.unregister(caller.connection)
        self._callers.remove(caller)

    def _turn_away(self, caller: _Caller) -> None:
        self.turned_away[caller.address] += 1
        self._forget(caller)
        caller.connection.close()

    def _close(self) -> None:
        while self._callers:
            self._turn_away(self._callers[0])
        for key in list(self._selector.get_map().values()):
            key.data.close()
        self._selector.close()


def _listen(family: int, address: str) -> socket.socket:
    """A listening socket at `address`, or at all addresses where it is none of this machine's (a translated network)."""
    try:
        return socket.create_server((address, 0), family=family, backlog=socket.SOMAXCONN)
    except OSError:
        return socket.create_server(("", 0), family=family, backlog=socket.SOMAXCONN)


def knock(address: str, port: int, rank: int, secret: bytes, timeout_s: float) -> socket.socket:
    """The connection of `rank` to rank 0, tried again and again. Raises `OSError` if there is none after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return _knock_once(address, port, rank, secret, min(_CALL_S, timeout_s))
        except OSError:
            if time.monotonic() + _AGAIN_S > deadline:
                raise
            time.sleep(_AGAIN_S)


def _knock_once(address: str, port: int, rank: int, secret: bytes, timeout_s: float) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=timeout_s)
    try:
        challenge = _read_exactly(connection, CHALLENGE_BYTES)
        said = rank.to_bytes(RANK_BYTES, "big") + os.urandom(CHALLENGE_BYTES)
        connection.sendall(said + _proof(secret, b"rank", challenge, said))
        if not hmac.compare_digest(_read_exactly(connection, PROOF_BYTES), _proof(secret, b"door", said, challenge)):
            raise ConnectionError(f"who answers at {address} port {port} is not rank 0 of this run")
    except BaseException:
        connection.close()
        raise
    return connection


def _read_exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("rank 0 closed the connection before it had said who it is")
        data += part
    return data
