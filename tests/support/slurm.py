"""A real SLURM on this machine for the tests: munge, one slurmctld, two slurmd that stand for two nodes.

Everything lies in one folder and on free ports, so several can run side by side; `stop` ends every process that was started,
the job steps included. Needs root and Debian's slurm-wlm and munge (launch/test_packages.sh).
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.support.paths import ROOT
from unlearn_ds.cluster.processes import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_PR_SET_PDEATHSIG = 1
_TASKS = (b"unlearn_ds.train", b"unlearn_ds.tune.tune")
_CONF = """
ClusterName=unlearn
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=0,sched_interval=1,bf_interval=1,batch_sched_delay=0
KillWait=30
MinJobAge=3600
ReturnToService=2
JobRequeue=1
GresTypes=gpu
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Programs of SLURM and munge that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]


def end_with_parent() -> None:
    """In a child before exec: die when the test process dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def processes_with(variable: str) -> list[int]:
    """Ids of this machine's processes whose environment holds `variable` (NAME=value)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def _runs_a_task(pid: int) -> bool:
    process = Path("/proc", str(pid))
    try:
        interpreter = (process / "exe").readlink().name.startswith("python")
        words = (process / "cmdline").read_bytes().split(b"\0")
        return interpreter and b"-m" in words and any(word in words for word in _TASKS)
    except OSError:
        return False


def is_stopped(pid: int) -> bool:
    """Whether a process is there and stands still after a SIGSTOP."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


class Slurm:
    """A two-node cluster; `run` calls SLURM's commands with its configuration."""

    def __init__(self, folder: Path, cpus_per_node: int = 2) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={cpus_per_node} "
            f"RealMemory=1000 Gres=gpu:1 State=UNKNOWN"
            for i in (1, 2)
        )
        # A GPU in name only, so that the scripts can ask for one as they do on a real cluster.
        (folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/zero\n")
        self.conf = folder / "slurm.conf"
        self.conf.write_text(_CONF.format(host=host, folder=folder, controller_port=free_port(), nodes=nodes).lstrip())
        self.environment = os.environ | {"SLURM_CONF": str(self.conf), "PATH": os.environ["PATH"] + ":/usr/sbin"}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> "Slurm":
        """Start the daemons and wait until both nodes are idle."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir(exist_ok=True)
        munge_files = [f"--{kind}={self.folder}/munge.{ending}" for kind, ending in _MUNGE_FILES]
        # --force: it would rather not run as root, nor below a folder that others may write to.
        self._daemon("munged", "--foreground", "--force", *munge_files)
        self._wait_for(lambda: (self.folder / "munge.sock").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self._wait_for(
            lambda: self.run("sinfo", "-h", "-o", "%t %D", check=False).stdout.split() == ["idle", "2"], "sinfo"
        )
        return self

    def run(
        self, *command: str, check: bool = True, timeout_s: float = 240, **extra: str
    ) -> subprocess.CompletedProcess:
        """Run one of SLURM's commands from the repository's root."""
        finished = subprocess.run(
            command,
            env=self.environment | extra,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and finished.returncode:
            raise AssertionError(f"{' '.join(command)}: {finished.stdout}{finished.stderr}{self.logs()}")
        return finished

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        words = self.run("scontrol", "show", "job", job_id).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, job_id: str, *states: str, timeout_s: float = 720) -> dict[str, str]:
        """Wait until the job is in one of `states` and return what SLURM says of it."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(job_id))["JobState"] not in states:
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job_id} is {job['JobState']}, not {states}: {job}{self.logs()}")
            time.sleep(0.2)
        return job

    def ranks(self, job_id: str) -> list[int]:
        """Ids of the Python processes that a job's tasks are."""
        return [pid for pid in processes_with(f"SLURM_JOB_ID={job_id}") if _runs_a_task(pid)]

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "".join(f"\n--- {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))

    def stop(self) -> None:
        """Cancel all jobs, end the daemons and whatever they left running."""
        self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in processes_with(f"SLURM_CONF={self.conf}"):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}{command[-1].replace('/', '_')[-3:]}.out.log").open("w")
        with log:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=log, preexec_fn=end_with_parent, cwd=self.folder
                )
            )

    def _wait_for(self, condition, what: str, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                logs = self.logs()
                self.stop()
                raise AssertionError(f"the test SLURM did not start ({what}):{logs}")
            time.sleep(0.1)


_MUNGE_FILES = (
    ("socket", "sock"),
    ("key-file", "key"),
    ("pid-file", "pid"),
    ("log-file", "log"),
    ("seed-file", "seed"),
)
