"""The same run on several hosts: one ssh for each, over whose standard input goes all that the far end must know.

Arguments and variables stand on no command line and in no log; the shell over there reads two paths, quoted. When this process
ends, the far ends see their input end, and end their ranks.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from unlearn_ds.cluster.lifetime import start_tied

# What every rank gets, * standing for the rest of a name: what Python, communication, devices and caches are set by.
EXPORT = (
    "NCCL_* GLOO_* UCX_* CUDA_* TORCH_* DS_* OMP_* UNLEARN_DS_* HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE HF_DATASETS_CACHE "
    "HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE TOKENIZERS_PARALLELISM PYTHON*"
)
# What looks like a secret goes only where it is named in full.
_SECRET = re.compile("TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_LINE = re.compile(r"([^\s#-]\S*)\s+slots=(\d+)(?:\s.*)?")
PATIENCE_S = 60.0  # for the other hosts, once one has failed; then for their end
_GLANCE_S = 0.1


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a run meet, and how many each host has."""

    slots: dict[str, int]
    address: str
    port: int


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by host. Raises `ValueError` for a file that is no list of them."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    slots: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or match[1] in slots or not int(match[2]):
            raise ValueError(f"{path}, line {number}: {line!r}: expected `NAME slots=GPUS`, each host once")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ValueError(f"{path} names no host: put your machines in, a line each: NAME slots=GPUS")
    return slots


def exported(environ: Mapping[str, str], names: str) -> dict[str, str]:
    """The variables that `names`, separated by blanks, choose: in full, or as a family (`NCCL_*`, or `NCCL_` for the same)."""
    chosen = {}
    for word in names.split():
        family = word if "*" in word else f"{word}*" if word.endswith("_") else None
        if family is None:
            chosen |= {word: environ[word]} if word in environ else {}
        else:
            found = (name for name in environ if fnmatch.fnmatchcase(name, family))
            chosen |= {name: environ[name] for name in found if not _SECRET.search(name)}
    return chosen


def run_on_hosts(args: argparse.Namespace, module: str, arguments: Sequence[str]) -> int:
    """Run `module` on the hosts of `args.hostfile`; the largest exit code. Raises `ValueError` if they cannot be reached."""
    slots = read_hostfile(Path(args.hostfile))
    ssh = ["ssh", "-o", "BatchMode=yes", *(["-p", str(args.ssh_port)] if args.ssh_port else []), "--"]
    address = args.master_addr or _own_address(ssh, next(iter(slots)))
    port = args.master_port or random.SystemRandom().randrange(20000, 40000)
    order = {
        "meeting": asdict(Meeting(slots, address, port)),
        "environment": exported(os.environ, args.export or EXPORT),
        "module": module,
        "arguments": list(arguments),
    }
    far_end = (
        f"cd {shlex.quote(os.getcwd())} && exec {shlex.quote(sys.executable)} -u -m unlearn_ds.cluster.launch --node"
    )
    hosts = [Host(name, [*ssh, name, far_end], order | {"node_rank": i}) for i, name in enumerate(slots)]

    def hand_on(number: int, frame: FrameType | None) -> None:
        for host in hosts:
            host.tell(signal.SIGTERM if number == signal.SIGINT else signal.Signals(number))

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    return _wait(hosts)


def _own_address(ssh: list[str], first: str) -> str:
    answer = subprocess.run([*ssh, first, "hostname -I"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if answer.returncode or not answer.stdout.split():
        raise ValueError(
            f"{first} does not say its address (ssh: {answer.stderr.strip() or answer.returncode}): "
            "set MASTER_ADDR, or mend ssh to it without a password"
        )
    return answer.stdout.split()[0]


class Host:
    """The ssh to one host, whose lines come out with the host's name before them."""

    def __init__(self, name: str, command: list[str], order: dict) -> None:
        self._process = start_tied(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self._readers = [
            threading.Thread(target=_copy, args=(name, source, target), daemon=True)
            for source, target in (
                (self._process.stdout, sys.stdout.buffer),
                (self._process.stderr, sys.stderr.buffer),
            )
        ]
        for reader in self._readers:
            reader.start()
        self._write(json.dumps(order))

    def tell(self, number: signal.Signals) -> None:
        """Have the ranks over there get a signal."""
        self._write(number.name)

    def code(self) -> int | None:
        """The exit code over there, 255 if ssh failed; None as long as it runs."""
        code = self._process.poll()
        if code is not None:
            for reader in self._readers:
                reader.join(5)
        return 128 - code if code is not None and code < 0 else code

    def end(self) -> None:
        """Have the far end end its ranks."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def kill(self) -> None:
        """Give the host up."""
        self._process.kill()

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ended, or told to end
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()


def _copy(name: str, source: BinaryIO, target: BinaryIO) -> None:
    for line in source:
        target.write(name.encode() + b": " + line)
        target.flush()


def _wait(hosts: Iterable[Host]) -> int:
    """Wait for all; a host that goes on long after another has failed is ended."""
    hosts = list(hosts)
    deadline, steps = float("inf"), [Host.end, Host.kill]
    while None in (codes := [host.code() for host in hosts]):
        failed = any(codes)
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + PATIENCE_S
        if time.monotonic() > deadline and steps:
            for host, code in zip(hosts, codes):
                if code is None:
                    steps[0](host)
            del steps[0]
            deadline = time.monotonic() + PATIENCE_S
        time.sleep(_GLANCE_S)
    return max(codes)
