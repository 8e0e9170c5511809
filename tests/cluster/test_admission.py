"""The door of the lifeline: real ranks get in whoever else is there; who is not of the run is counted and dropped."""

import contextlib
import os
import socket
import threading
import time

import pytest

from tests.support.cluster import make_tiny_run
from tests.support.run_with_strangers import NUM_STRANGERS
from unlearn_ds.cluster import admission
from unlearn_ds.cluster.admission import CHALLENGE_BYTES, HELLO_BYTES, Door, address_of, knock
from unlearn_ds.cluster.lifeline import _MAX_LINE, _message

HERE = "127.0.0.1"
SECRET = b"s" * 32


class OpenDoor:
    """A door that waits for ranks 1 and 2 in a thread."""

    def __init__(self, timeout_s: float = 20.0) -> None:
        self.door = Door([(socket.AF_INET, HERE)], SECRET)
        self.port = self.door.ports[HERE]
        self.admitted: dict[int, socket.socket] = {}
        self._thread = threading.Thread(target=self._admit, args=(timeout_s,))
        self._thread.start()

    def _admit(self, timeout_s: float) -> None:
        self.admitted = self.door.admit([1, 2], timeout_s)

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()

    def call(self) -> socket.socket:
        return socket.create_connection((HERE, self.port), timeout=10)

    def let_the_ranks_in(self) -> None:
        """Both ranks knock; fails unless each then holds a line to the other end of its own."""
        ends = {rank: knock(HERE, self.port, rank, SECRET, 15) for rank in (2, 1)}
        self.join()
        assert sorted(self.admitted) == [1, 2]
        for rank, end in ends.items():
            end.sendall(bytes([rank]))
            self.admitted[rank].settimeout(5)
            assert self.admitted[rank].recv(10) == bytes([rank])
            end.close()
            self.admitted[rank].close()


def is_dropped(connection: socket.socket) -> bool:
    """Whether the far end closes the connection within ten seconds, whatever it has sent before."""
    connection.settimeout(10)
    with contextlib.suppress(ConnectionError):
        while connection.recv(1024):
            pass
    return True


def scan(door: OpenDoor) -> socket.socket:
    connection = door.call()
    connection.shutdown(socket.SHUT_RDWR)
    return connection


def four_bytes(door: OpenDoor) -> socket.socket:
    """What took a rank's place once."""
    connection = door.call()
    connection.sendall((1).to_bytes(4, "big"))
    connection.shutdown(socket.SHUT_WR)
    return connection


def garbage(door: OpenDoor) -> socket.socket:
    connection = door.call()
    connection.sendall(os.urandom(100_000))
    return connection


def lost(door: OpenDoor) -> socket.socket:
    connection = door.call()
    connection.sendall(b'{"kind": "lost", "why": "me", "rank": 1}\n' * 10)
    return connection


def other_run(door: OpenDoor) -> socket.socket:
    with pytest.raises(OSError, match="closed the connection"):
        admission._knock_once(HERE, door.port, 1, b"t" * 32, 10)
    return scan(door)


def replayed(door: OpenDoor) -> socket.socket:
    """The whole hello of a rank, overheard when it came to another door with the same secret."""
    overheard = OpenDoor()
    with socket.create_server((HERE, 0)) as between:
        heard: list[bytes] = []

        def relay() -> None:
            caller, _ = between.accept()
            with caller, overheard.call() as onward:
                caller.sendall(onward.recv(CHALLENGE_BYTES))
                heard.append(caller.recv(HELLO_BYTES))
                onward.sendall(heard[0])
                caller.sendall(onward.recv(32))

        listener = threading.Thread(target=relay)
        listener.start()
        knock(HERE, between.getsockname()[1], 1, SECRET, 5).close()
        listener.join(10)
    knock(HERE, overheard.port, 2, SECRET, 5).close()
    overheard.join()
    assert sorted(overheard.admitted) == [1, 2]
    assert len(heard[0]) == HELLO_BYTES
    connection = door.call()
    connection.sendall(heard[0])
    return connection


def rank_there_is_not(door: OpenDoor) -> socket.socket:
    with pytest.raises(OSError, match="closed the connection"):
        admission._knock_once(HERE, door.port, 7, SECRET, 10)
    return scan(door)


STRANGERS = [scan, four_bytes, garbage, lost, other_run, replayed, rank_there_is_not]


@pytest.mark.fault(
    "a hello of another run, or one that was overheard and is said again",
    "`warning: connections to rank 0 that were not of this run: ...: dropped`",
    "dropped",
)
@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.__name__)
def test_a_stranger_is_dropped_and_counted_and_the_ranks_get_in(stranger):
    door = OpenDoor()
    connection = stranger(door)
    assert is_dropped(connection)
    assert not door.admitted
    door.let_the_ranks_in()
    assert door.door.turned_away[HERE] == (2 if stranger in (other_run, rank_there_is_not) else 1)


def test_a_silent_caller_is_dropped_after_a_while(monkeypatch):
    monkeypatch.setattr(admission, "_CALL_S", 0.5)
    door = OpenDoor()
    assert is_dropped(door.call())
    door.let_the_ranks_in()
    assert door.door.turned_away == {HERE: 1}


def test_many_silent_callers_keep_no_rank_out(monkeypatch):
    monkeypatch.setattr(admission, "_MAX_CALLERS", 32)
    door = OpenDoor()
    silent = [door.call() for _ in range(150)]
    started = time.monotonic()
    door.let_the_ranks_in()
    assert time.monotonic() - started < admission._CALL_S
    assert door.door.turned_away == {HERE: 150}
    for connection in silent:
        connection.close()


@pytest.mark.fault(
    "more silent connections than rank 0 will hear",
    "`warning: connections to rank 0 that were not of this run: ...: dropped`",
    "the oldest are dropped, ranks get in",
)
def test_a_flood_that_does_not_end_keeps_no_rank_out():
    door, over = OpenDoor(), threading.Event()

    def flood() -> None:
        with contextlib.ExitStack() as kept:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    kept.enter_context(socket.create_connection((HERE, door.port), timeout=0.2))
                if len(kept._exit_callbacks) > 200:
                    kept.close()

    attacker = threading.Thread(target=flood)
    attacker.start()
    try:
        time.sleep(0.3)
        door.let_the_ranks_in()
    finally:
        over.set()
        attacker.join()
    assert door.door.turned_away[HERE] > 10


def test_who_does_not_come_is_missing_and_nobody_waits_for_ever():
    door = OpenDoor(timeout_s=0.5)
    end = knock(HERE, door.port, 2, SECRET, 5)
    door.join()
    assert sorted(door.admitted) == [2]
    end.close()
    with pytest.raises(OSError):
        knock(HERE, door.port, 1, SECRET, 0.3)


def test_a_rank_does_not_take_a_stranger_for_rank_0():
    with socket.create_server((HERE, 0)) as impostor:

        def answer() -> None:
            connection, _ = impostor.accept()
            with connection:
                connection.sendall(os.urandom(CHALLENGE_BYTES))
                connection.recv(HELLO_BYTES)
                connection.sendall(os.urandom(32))

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match="is not rank 0 of this run"):
            admission._knock_once(HERE, impostor.getsockname()[1], 1, SECRET, 10)
        thread.join(10)


def test_the_door_is_where_the_run_is():
    door = Door([address_of("localhost")], SECRET)
    listeners = [key.data.getsockname()[0] for key in door._selector.get_map().values()]
    door.admit([], 0)
    assert set(listeners) <= {HERE, "::1"}


@pytest.mark.parametrize(
    "line",
    [b"", b"GET / HTTP/1.1", b"[]", b'{"kind": []}', b"[" * 60_000, b"\xff\xfe", b'{"kind": "lost", "rank": 1}',
     b'{"kind": "beat", "rank": true}', b'{"kind": "beat", "rank": 1, "why": "' + b"x" * _MAX_LINE + b'"}'],
    ids=range(9),
)  # fmt: skip
def test_what_is_no_message_is_seen(line):
    assert _message(line) is None
    assert _message(b'{"kind": "lost", "rank": 1, "why": "w"}') is not None


@pytest.mark.fault(
    "strangers call at the lifeline while ranks join: a scanner, silent ones, garbage, four bytes, a false `lost`",
    "`warning: connections to rank 0 that were not of this run: 43 from ADDRESS (43 in all): dropped`",
    "same",
)
def test_a_run_goes_its_way_among_strangers(tmp_path):
    """While ranks join, a scanner, silent callers, garbage and a false `lost` come to rank 0 first."""
    tiny = make_tiny_run(tmp_path)
    try:
        run = tiny.server.start(
            tiny.arguments(tmp_path / "run", max_steps=2), module="tests.support.run_with_strangers"
        )
        assert run.wait() == [0, 0], run.output()
        assert (
            run.output().count(
                f"warning: connections to rank 0 that were not of this run: {NUM_STRANGERS} from 127.0.0.1"
            )
            == 1
        )
    finally:
        tiny.server.stop()
