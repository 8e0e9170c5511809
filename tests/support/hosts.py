"""Two hosts on this machine for the tests: network namespaces with their own addresses, names and ssh servers.

`ip netns exec` lays /etc/netns/NAME over /etc, so inside a host plain `ssh node2` works as on a prepared cluster: names, keys
and known hosts are its own. Names and addresses differ from one instance to the next; `stop` leaves nothing behind. Needs root
and Debian's iproute2 and openssh-server (launch/test_packages.sh).
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.support.slurm import end_with_parent

PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "unshare")
_SSHD_CONFIG = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
AcceptEnv *
"""
_SSH_CONFIG = """
Host node1 node2
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  PasswordAuthentication no
"""


def missing_programs() -> list[str]:
    """Programs for namespaces and ssh that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None]


def _environ(pid: int) -> bytes:
    try:
        return (Path("/proc") / str(pid) / "environ").read_bytes()
    except OSError:
        return b""


class Hosts:
    """`node1` and `node2`, joined by one cable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.tag = f"u{os.getpid()}-{random.SystemRandom().randrange(1000)}"
        self.names = [f"{self.tag}-{i}" for i in (1, 2)]
        network = random.SystemRandom().randrange(256)
        self.addresses = [f"10.213.{network}.{i}" for i in (1, 2)]
        self._servers: list[subprocess.Popen] = []

    def start(self) -> "Hosts":
        """Lay the cable, start an ssh server on each host and wait until both answer."""
        self._call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key"))
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in self.names:
            self._call("ip", "netns", "add", name)
            self._write_etc(Path("/etc/netns") / name)
        first, second = self.names
        self._call(
            "ip", "link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second
        )
        for name, address in zip(self.names, self.addresses):
            self._call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            self._call("ip", "-n", name, "link", "set", "cable", "up")
            self._call("ip", "-n", name, "link", "set", "lo", "up")
        for i in (0, 1):
            # exec throughout, so that the process we hold is the server itself.
            server = f"hostname node{i + 1} && exec $(command -v sshd || echo /usr/sbin/sshd) -D -e"
            with (self.folder / f"sshd{i + 1}.log").open("w") as log:
                self._servers.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", self.names[i], "unshare", "--uts", "sh", "-c", server],
                        stdout=log,
                        stderr=log,
                        preexec_fn=end_with_parent,
                    )
                )
        deadline = time.monotonic() + 120
        for name in ("node1", "node2"):
            while self.run(0, ["ssh", name, "hostname"], timeout_s=60).stdout.strip() != name:
                if time.monotonic() > deadline:
                    raise AssertionError(f"{name} has no ssh: {[p.read_text() for p in self.folder.glob('*.log')]}")
                time.sleep(0.2)
        return self

    def command(self, host: int, command: list[str]) -> list[str]:
        """`command` as it runs on a host (0 or 1)."""
        script = f'hostname node{host + 1} && exec "$@"'
        return ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "sh", "-c", script, "sh", *command]

    def run(self, host: int, command: list[str], timeout_s: float = 300, **options) -> subprocess.CompletedProcess:
        """Run a command on a host."""
        return subprocess.run(
            self.command(host, command), capture_output=True, text=True, timeout=timeout_s, check=False, **options
        )

    def cut(self) -> None:
        """Pull the cable: packets vanish, nobody is told."""
        for name in self.names:
            self._call("ip", "-n", name, "link", "set", "cable", "down")

    def mend(self) -> None:
        """Plug the cable in again."""
        for name in self.names:
            self._call("ip", "-n", name, "link", "set", "cable", "up")

    def ranks(self) -> list[int]:
        """Ids of the ranks that run on either host."""
        return [pid for pid in self.processes() if b"RANK=" in _environ(pid)]

    def ranks_running(self, within_s: float = 60) -> list[int]:
        """Ids of those that still run after at most `within_s` seconds."""
        deadline = time.monotonic() + within_s
        while (ranks := self.ranks()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return ranks

    def processes(self) -> list[int]:
        """Ids of the processes that run on either host."""
        found = []
        for name in self.names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            found += [int(word) for word in listed.stdout.split()]
        return found

    def stop(self) -> None:
        """End every process of both hosts and take them down."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for server in self._servers:
            server.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/etc/netns").rmdir()

    def _write_etc(self, etc: Path) -> None:
        (etc / "ssh").mkdir(parents=True)
        (etc / "ssh" / "sshd_config").write_text(_SSHD_CONFIG.format(folder=self.folder).lstrip())
        (etc / "ssh" / "ssh_config").write_text(_SSH_CONFIG.format(folder=self.folder).lstrip())
        lines = ["127.0.0.1 localhost", *(f"{address} node{i + 1}" for i, address in enumerate(self.addresses))]
        (etc / "hosts").write_text("\n".join(lines) + "\n")

    def _call(self, *command: str) -> None:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise AssertionError(f"{' '.join(command)}: {finished.stderr}")
