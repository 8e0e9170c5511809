"""torch's cache of compiled operators: one for each environment, and no wait for the lock of a process that is dead."""

import getpass
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path

from unlearn_ds.markup import tell

STALE_LOCK_S = 300.0  # building one of DeepSpeed's operators takes a minute or two


def use_cache_of_this_environment(environ: MutableMapping[str, str], prefix: str = sys.prefix) -> None:
    """Set TORCH_EXTENSIONS_DIR to a folder of this Python environment's own; an explicit setting wins.

    torch keeps one folder a user, Python and CUDA version. The compiler's command line names the environment's include
    folders, so that two environments with one folder rebuild DeepSpeed's operators under each other at every start. So do two
    versions of ninja, which one environment finds by whether it is activated: each takes the other's log for that of other
    commands.
    """
    if not environ.get("TORCH_EXTENSIONS_DIR"):
        from torch.utils.cpp_extension import get_default_build_root

        ninja = shutil.which("ninja", path=environ.get("PATH"))
        mark = hashlib.sha256(f"{prefix} {ninja}".encode()).hexdigest()[:8]
        version = f"py{sys.version_info.major}{sys.version_info.minor}"
        environ["TORCH_EXTENSIONS_DIR"] = str(Path(get_default_build_root()) / f"unlearn_ds_{version}_{mark}")


def use_compiled_code_of_this_processor(environ: MutableMapping[str, str], capability: str) -> None:
    """Set TORCHINDUCTOR_CACHE_DIR to a folder for processors of this `capability` alone; an explicit setting wins.

    torch 2.13 finds what it compiled by the graph, whatever the processor: code made for AVX512, run where torch itself
    computes in AVX2 (another node with the same cache, ATEN_CPU_CAPABILITY), gave NaN in every forward.
    """
    if not environ.get("TORCHINDUCTOR_CACHE_DIR"):
        folder = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
        environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"unlearn_ds_{capability}")


def wait_for_extension_locks(stale_s: float | None = None) -> None:
    """Wait for builds of DeepSpeed's operators in TORCH_EXTENSIONS_DIR; take away locks that a killed process left.

    torch waits for ever, and silently, for a file named `lock` in a build folder (torch 2.13, torch.utils.file_baton). The
    process that builds keeps the file open. A lock that no process of this host holds and that is older than `stale_s` is
    dead; a younger one may belong to another host with the same home folder, so we wait and say so. Where no other host builds
    UNLEARN_DS_STALE_LOCK_S may be short (default 300 s).
    """
    root = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    # One process of a host looks after the host's locks.
    _wait_for(lambda: list(root.glob("*/lock")), stale_s, removes=os.environ.get("LOCAL_RANK", "0") == "0")


def wait_for_dead_builders_too() -> None:
    """From now on torch waits for its locks as we do: their holder may die while we wait, and torch would wait for ever."""
    from torch.utils.file_baton import FileBaton

    def wait(self: FileBaton) -> None:
        lock = Path(self.lock_file_path)
        _wait_for(lambda: [lock] if lock.exists() else [], None, removes=True, silent_s=10.0)
        if not list(lock.parent.glob("*.so")):
            raise OSError(f"the process that was building {lock.parent.name} ended before it was done: start again")

    FileBaton.wait = wait


def _wait_for(find: Callable[[], list[Path]], stale_s: float | None, removes: bool, silent_s: float = 0.0) -> None:
    if stale_s is None:
        stale_s = float(os.environ.get("UNLEARN_DS_STALE_LOCK_S", STALE_LOCK_S))
    started = time.monotonic()
    said = set()
    # Dead at the last look, by inode: whoever builds lets go of the file just before removing it.
    suspects: set[tuple[Path, int]] = set()
    while locks := find():
        for lock in locks:
            try:
                status = lock.stat()
            except FileNotFoundError:
                continue
            age = time.time() - status.st_mtime
            held = _is_open(lock)
            if removes and not held and not 0 <= age < stale_s:
                if (lock, status.st_ino) not in suspects:
                    suspects.add((lock, status.st_ino))
                    continue
                tell(f"unlearn-ds: {lock} was left by a process that died while building: removed", file=sys.stdout)
                lock.unlink(missing_ok=True)
            elif removes and lock not in said and time.monotonic() - started >= silent_s:
                said.add(lock)
                reason = (
                    "a process is building" if held else f"delete it if no other host builds, or wait {stale_s:.0f} s"
                )
                tell(f"unlearn-ds: waiting for {lock}: {reason}", file=sys.stdout)
        time.sleep(0.2)


def _is_open(path: Path) -> bool:
    """Whether a process of this host that we may look at has the file open."""
    target = str(path.resolve())
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(entry) == target for entry in descriptors.iterdir()):
                return True
        except OSError:
            continue
    return False
