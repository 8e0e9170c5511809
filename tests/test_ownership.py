"""One process a folder: who has it is named, a dead owner's is taken over, a lost one is noticed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.slurm import end_with_parent
from unlearn_ds import ownership
from unlearn_ds.durable import fresh_folder, publish_folder, replacing
from unlearn_ds.owner import read
from unlearn_ds.ownership import OWNER_FILE, FolderInUse, OwnerLost, entry_file, owned, take

HOLD = """
import sys, time
from pathlib import Path
from unlearn_ds.ownership import owned
with owned(Path(sys.argv[1]), "wait for it"):
    print("mine", flush=True)
    time.sleep(600)
"""
RACE = """
import sys, time
from pathlib import Path
from unlearn_ds.ownership import FolderInUse, owned
path, inside = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(int(sys.argv[3])):
    try:
        with owned(path, "wait for it"):
            inside.mkdir()  # an error if another is in there
            time.sleep(0.001)
            inside.rmdir()
            print("had it")
    except FolderInUse:
        time.sleep(0.0005)
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setenv(ownership.STALE_VARIABLE, "1.2")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / OWNER_FILE


def start(script: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=end_with_parent,
    )


@contextlib.contextmanager
def held_by_another(path: Path):
    process = start(HOLD, path)
    assert process.stdout.readline() == "mine\n", process.stderr.read()
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def left_by(path: Path, age_s: float = 0.0, **changes: object) -> None:
    """An owner file as a process that is dead, or elsewhere, leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with owned(path, ""):
        content = json.loads(path.read_text()) | {"token": "b0a4d"} | changes
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - age_s,) * 2)


ELSEWHERE = {"host": "node7", "command": "train.py --seed 1", "user": "ada"}


def test_who_has_it_is_named(path):
    with held_by_another(path) as process, pytest.raises(FolderInUse) as caught, owned(path, "go elsewhere"):
        pass
    said = str(caught.value)
    assert said.startswith(f"{path.parent} is in use by `-c {path}` (process {process.pid} of ")
    assert f" on {socket.gethostname()}, since 20" in said
    assert said.endswith("): go elsewhere")


def test_it_is_given_back_at_the_end_and_at_an_error(path):
    with owned(path, ""):
        assert path.exists()
    assert not path.parent.exists()  # nothing was written there
    path.parent.mkdir()

    def fail() -> None:
        with owned(path, ""):
            assert path.exists()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list(path.parent.iterdir()) == []
    with owned(path, ""):
        pass
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_gives_it_back_and_ends_the_process_as_it_would(path, number):
    with held_by_another(path) as process:
        process.send_signal(number)
        assert process.wait() == -number
        assert not path.exists()


def test_a_killed_owner_of_this_machine_is_taken_over_at_once(path, monkeypatch, capfd):
    monkeypatch.setenv(ownership.STALE_VARIABLE, "3600")
    with held_by_another(path) as process:
        process.kill()
        process.wait()
        with owned(path, ""):
            assert read(path)[0].pid == os.getpid()
    assert f"{path.parent} was left by `-c {path}` (process {process.pid} of " in capfd.readouterr().err
    assert list(path.parent.iterdir()) == []


def test_a_dead_process_that_nobody_waited_for_is_dead(path):
    with held_by_another(path) as process:
        process.kill()
        deadline = time.monotonic() + 30
        while "Z" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]:
            assert time.monotonic() < deadline
        with owned(path, ""):
            pass


def test_a_process_that_has_the_number_of_a_dead_one_is_another(path, monkeypatch):
    monkeypatch.setenv(ownership.STALE_VARIABLE, "3600")
    left_by(path, started=1)
    with owned(path, ""):
        pass


def test_a_stopped_owner_of_this_machine_lives(path):
    with held_by_another(path) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        with pytest.raises(FolderInUse), owned(path, ""):
            pass


def test_of_another_container_of_this_machine_the_lock_tells(path, monkeypatch):
    monkeypatch.setenv(ownership.STALE_VARIABLE, "3600")
    with held_by_another(path):
        other = json.loads(path.read_text()) | {"pid_space": "pid:[1]", "pid": 999999999}
        with path.open("r+") as file:  # the same file, which stays locked
            file.write(json.dumps(other))
            file.truncate()
        with pytest.raises(FolderInUse), owned(path, ""):
            pass
    with owned(path, ""):
        pass


def test_an_owner_elsewhere_is_waited_for_and_taken_over_without_a_sign_of_life(path, capfd):
    left_by(path, **ELSEWHERE)
    started = time.monotonic()
    with owned(path, ""):
        assert 1.0 < time.monotonic() - started < 20
    said = capfd.readouterr().err
    assert said.count("waiting for") == 1
    assert f"waiting for {path.parent}, in use by `train.py --seed 1` (process {os.getpid()} of ada on node7" in said
    assert "for at most 1 s: it may be dead" in said


def test_an_owner_elsewhere_that_died_long_ago_is_not_waited_for(path, capfd, monkeypatch):
    monkeypatch.setenv(ownership.STALE_VARIABLE, "3600")
    left_by(path, age_s=3601, **ELSEWHERE)
    with owned(path, ""):
        pass
    assert "waiting" not in capfd.readouterr().err


@pytest.mark.parametrize("changes", [ELSEWHERE, {"boot": "another machine of that name", "pid": 999999999}])
def test_an_owner_elsewhere_that_gives_a_sign_of_life_keeps_it(path, changes):
    left_by(path, **changes)
    end = threading.Event()

    def beat() -> None:
        while not end.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(FolderInUse), owned(path, ""):
            pass
    finally:
        end.set()
        thread.join()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": "../x"}', '{"token": 1}'])
def test_a_file_that_says_nothing_counts_by_its_age(path, content):
    path.parent.mkdir()
    path.write_text(content)
    started = time.monotonic()
    with owned(path, ""):
        assert time.monotonic() - started > 1.0


def test_a_waiter_gets_it_after_the_one_before(path, capfd):
    with held_by_another(path) as process:
        threading.Timer(1.0, process.terminate).start()
        with owned(path, "", wait=True):
            assert process.poll() is not None or process.wait(30) is not None
    assert capfd.readouterr().err.count("waiting for") == 1


def test_no_two_have_it_at_once(path, tmp_path, monkeypatch):
    """Four processes take and give back for some seconds, however long a busy machine stops one of them in between."""
    monkeypatch.setenv(ownership.STALE_VARIABLE, "60")
    inside = tmp_path / "inside"
    racers = [start(RACE, path, inside, 150) for _ in range(4)]
    taken = 0
    for racer in racers:
        out, err = racer.communicate(timeout=300)
        assert racer.returncode == 0, err
        taken += out.count("had it")
    assert taken > 20
    assert not inside.exists()


def test_of_many_takers_of_a_dead_owner_s_folder_one_gets_it(path):
    for attempt in range(5):
        left_by(path, pid=999999999, token=f"dead{attempt}")
        takers = [start(HOLD, path) for _ in range(4)]
        deadline = time.monotonic() + 120
        while sum(taker.poll() is None for taker in takers) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (winner,) = [taker for taker in takers if taker.poll() is None]
        assert winner.stdout.readline() == "mine\n"
        assert read(path)[0].pid == winner.pid
        winner.kill()
        assert all("FolderInUse" in taker.communicate()[1] for taker in takers if taker is not winner)
        winner.communicate()


def test_a_late_taker_does_not_take_from_the_first(path):
    left_by(path, pid=999999999)
    dead, _ = read(path)
    first = ownership._take_over(path, dead)
    assert ownership._take_over(path, dead) is None
    first.check()
    first.release()
    assert list(path.parent.iterdir()) == []


def test_a_taker_that_died_at_it_does_not_bar_the_next(path, monkeypatch):
    monkeypatch.setattr(ownership, "_MARKER_S", 0.2)
    left_by(path, pid=999999999)
    path.with_name(f"{path.name}.b0a4d.taker").touch()
    with owned(path, ""):
        pass
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_loss_is_said_once_and_nothing_is_written_after_it(path, how, capfd):
    held = take(path, "")
    finished = path.parent / "model"
    fresh_folder(path.parent / ".partial")
    if how == "removed":
        path.unlink()
    else:
        other = path.with_name("other")
        other.write_text(json.dumps(json.loads(path.read_text()) | {"token": "feed", "host": "node8"}))
        other.replace(path)
    for write in (
        lambda: fresh_folder(finished),
        lambda: publish_folder(path.parent / ".partial", finished),
        lambda: replacing(path.parent / "run.json").__enter__(),
    ):
        with pytest.raises(OwnerLost, match="no more"):
            write()
    assert not finished.exists()
    time.sleep(0.6)
    assert ownership.lost()
    said = capfd.readouterr().err
    assert said.count("no more") == 1, said
    assert ("was removed, so another process may work there" if how == "removed" else "on node8") in said
    held.release()
    assert path.exists() == (how == "replaced")
    assert not ownership.lost()


def test_an_entry_of_a_shared_folder_has_an_owner_of_its_own(tmp_path):
    first, second = (entry_file(tmp_path / name) for name in ("hidden-1", "hidden-2"))
    refused = pytest.raises(FolderInUse, match=f"^{tmp_path}/hidden-1 is in use by")
    with owned(first, ""), owned(second, ""), refused, owned(first, ""):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied", str(arguments[0]))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*/run/.owner.json'"):
        take(tmp_path / "run" / OWNER_FILE, "")


def test_a_forked_child_owns_nothing(path):
    held = take(path, "")
    pid = os.fork()
    if not pid:
        ownership.release_all()
        os._exit(0)
    os.waitpid(pid, 0)
    assert path.exists()
    held.check()
    held.release()
