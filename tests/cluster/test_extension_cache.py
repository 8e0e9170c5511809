"""torch's extension cache: a folder for each environment; its locks are waited for, or removed, and always named."""

import os
import threading
import time

import pytest
import torch
from torch.utils.file_baton import FileBaton

from unlearn_ds.cluster.extension_cache import (
    use_cache_of_this_environment,
    use_compiled_code_of_this_processor,
    wait_for_dead_builders_too,
    wait_for_extension_locks,
)
from unlearn_ds.model.layers import wrap_layers


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
    wait_for_extension_locks(stale_s=1.0)
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
    wait_for_extension_locks(stale_s=0.1)
    thread.join()
    assert f"waiting for {lock}: a process is building" in capsys.readouterr().out


@pytest.mark.parametrize("built", [True, False])
def test_a_builder_that_dies_while_torch_waits_for_it(lock, monkeypatch, capsys, built):
    """Not there when we looked; torch itself waits for it, and its holder is killed."""
    monkeypatch.setattr(FileBaton, "wait", FileBaton.wait)  # restored after the test
    monkeypatch.setenv("UNLEARN_DS_STALE_LOCK_S", "0.5")
    handle = os.open(lock, os.O_CREAT | os.O_EXCL)
    if built:
        (lock.parent / "operator.so").touch()
    threading.Timer(0.5, os.close, [handle]).start()
    wait_for_dead_builders_too()
    baton = FileBaton(str(lock))
    assert not baton.try_acquire()
    if built:
        baton.wait()
    else:
        with pytest.raises(OSError, match="building deepspeed_shm_comm ended before it was done: start again"):
            baton.wait()
    assert f"{lock} was left by a process that died while building: removed" in capsys.readouterr().out


def test_a_lock_from_the_future_is_not_waited_for(lock):
    """The clock was set back after the lock was made."""
    lock.touch()
    os.utime(lock, (time.time() + 86400,) * 2)
    wait_for_extension_locks(stale_s=300.0)
    assert not lock.exists()


def test_another_rank_of_the_host_leaves_removing_to_the_first(lock, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    lock.touch()
    os.utime(lock, (0, 0))
    thread = threading.Thread(target=wait_for_extension_locks, args=(0.1,))
    thread.start()
    time.sleep(0.5)
    assert lock.exists()
    lock.unlink()
    thread.join(5)
    assert not thread.is_alive()


def test_each_environment_and_ninja_has_its_own_folder_and_an_explicit_one_wins(tmp_path):
    folders = []
    for prefix in ("/envs/one", "/envs/two", "/envs/one"):
        environ = {}
        use_cache_of_this_environment(environ, prefix)
        folders.append(environ["TORCH_EXTENSIONS_DIR"])
    assert folders[0] == folders[2] != folders[1]
    for name in ("activated", "system"):
        ninja = tmp_path / name / "ninja"
        ninja.parent.mkdir()
        ninja.touch(mode=0o755)
        environ = {"PATH": str(ninja.parent)}
        use_cache_of_this_environment(environ, "/envs/one")
        folders.append(environ["TORCH_EXTENSIONS_DIR"])
    assert folders[-1] != folders[-2]
    environ = {"TORCH_EXTENSIONS_DIR": "/scratch/operators"}
    use_cache_of_this_environment(environ, "/envs/one")
    assert environ == {"TORCH_EXTENSIONS_DIR": "/scratch/operators"}


def test_compiled_layers_have_a_cache_for_each_kind_of_processor():
    folders = set()
    for capability in ("AVX2", "AVX512"):
        environ = {}
        use_compiled_code_of_this_processor(environ, capability)
        folders.add(environ["TORCHINDUCTOR_CACHE_DIR"])
    assert len(folders) == 2
    environ = {"TORCHINDUCTOR_CACHE_DIR": "/mine"}
    use_compiled_code_of_this_processor(environ, "AVX2")
    assert environ == {"TORCHINDUCTOR_CACHE_DIR": "/mine"}


def test_who_compiles_layers_sets_it(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    wrap_layers(torch.nn.Module(), "none", False)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    wrap_layers(torch.nn.Module(), "none", True)
    assert torch.backends.cpu.get_cpu_capability() in os.environ["TORCHINDUCTOR_CACHE_DIR"]
