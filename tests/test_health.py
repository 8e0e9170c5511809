"""Before step 1: locks of extensions being built, and what ranks have in common."""

import os
import threading
import time

import pytest
import torch

from unlearn_ds import health


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    path = tmp_path / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir()
    return path


def test_a_lock_that_nobody_holds_is_removed_once_it_is_old(lock, capsys):
    lock.touch()
    started = time.monotonic()
    health.wait_for_extension_locks(stale_s=1.0)
    assert time.monotonic() - started >= 0.7
    assert not lock.exists()
    said = capsys.readouterr().out
    assert f"waiting for {lock}: delete it if no other host builds" in said
    assert f"{lock} was left by a process that died while building: removed" in said


def test_a_lock_that_a_process_holds_is_waited_for(lock, capsys):
    handle = os.open(lock, os.O_CREAT | os.O_EXCL)
    os.utime(lock, (0, 0))

    def release() -> None:
        time.sleep(0.6)
        os.close(handle)
        lock.unlink()

    thread = threading.Thread(target=release)
    thread.start()
    health.wait_for_extension_locks(stale_s=0.1)
    thread.join()
    assert f"waiting for {lock}: a process is building" in capsys.readouterr().out


def test_a_lock_from_the_future_is_not_waited_for(lock):
    """The clock was set back after the lock was made."""
    lock.touch()
    os.utime(lock, (time.time() + 86400,) * 2)
    health.wait_for_extension_locks(stale_s=300.0)
    assert not lock.exists()


def test_another_rank_of_the_host_leaves_removing_to_the_first(lock, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    lock.touch()
    os.utime(lock, (0, 0))
    thread = threading.Thread(target=health.wait_for_extension_locks, args=(0.1,))
    thread.start()
    time.sleep(0.5)
    assert lock.exists()
    lock.unlink()
    thread.join(5)
    assert not thread.is_alive()


def test_facts_name_device_precision_and_versions():
    facts = health.rank_facts(torch.device("cpu"), torch.float32)
    assert facts["torch"] == torch.__version__
    assert facts["dtype"] == "torch.float32"
    health.compare_ranks(facts)  # one rank agrees with itself
    assert health.time_all_reduce(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("versions", "last"),
    [
        (["2.13", "2.13", "2.12"], "rank 2 on host has torch 2.12, the others have 2.13"),
        (["2.13"] * 6 + ["2.12"] * 5, "and 1 more ranks differ in torch"),
        (["2.13"] * 2, None),
    ],
)
def test_ranks_that_differ_are_named(versions, last):
    found = health.differences([("host", {"torch": version}) for version in versions])
    assert (found[-1] if found else None) == last
