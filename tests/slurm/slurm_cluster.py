"""A real Slurm of two nodes on this machine: slurmctld, two slurmd and munge on loopback addresses, in one directory.

Each node has a host name and a view of /etc/hosts of its own (`unshare`); all else they share. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "unshare")
PACKAGES = ("slurmctld", "slurmd", "munge", "slurm-client")
INSTALL = "A2D_INSTALL_SLURM"  # set to 1: install Debian's packages where they are missing

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
KillWait=5
SchedulerParameters=sched_min_interval=0,sched_interval=1,bf_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.2 Port={ports[1]} CPUs=64 RealMemory=1000000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.3 Port={ports[2]} CPUs=64 RealMemory=1000000 State=UNKNOWN
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def obstacle() -> str | None:
    """Why there can be no cluster here; None if there can. Installs it when asked."""
    if os.geteuid() != 0:
        return "Slurm's daemons on loopback addresses need root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing and os.environ.get(INSTALL) == "1":
        if reason := _install():
            return f"{', '.join(missing)} missing, and {reason}"
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install {' '.join(PACKAGES)}, or set {INSTALL}=1"
    if subprocess.run(["unshare", "-m", "-u", "true"], capture_output=True).returncode:
        return "this machine allows no mount namespaces (unshare -m -u)"
    return None


def _install() -> str | None:
    """Debian's packages; returns why it could not be."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]):
        try:
            subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as problem:
            return f"cannot be installed: {problem}"
        except subprocess.CalledProcessError as problem:
            return f"cannot be installed: {' '.join(command)}: {(problem.stderr.strip() or 'failed').splitlines()[-1]}"
    return None


class Cluster:
    """`with Cluster(directory): ...`; `run` is for Slurm's commands."""

    def __init__(self, root: Path):
        self.root = root
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self._begin()
        except BaseException:
            self.__exit__()  # nothing of it stays behind
            raise
        return self

    def _begin(self) -> None:
        root, host = self.root, socket.gethostname().split(".")[0]
        for name in ("state", "log", "run", "spool/n1", "spool/n2"):
            (root / name).mkdir(parents=True)
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
        (root / "slurm.conf").write_text(CONF.format(host=host, root=root, ports=_free_ports(3)))
        (root / "hosts").write_text(f"127.0.0.1 localhost {host}\n127.0.0.2 n1\n127.0.0.3 n2\n")
        key = root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        run, log = root / "run", root / "log"
        self._start(
            "munged", "--force", f"--socket={run}/munge.socket", f"--key-file={key}", f"--pid-file={run}/munged.pid",
            f"--log-file={log}/munged.log", f"--seed-file={run}/munged.seed",
        )  # fmt: skip
        hosts = f"mount --bind {root}/hosts /etc/hosts"
        self._start("unshare", "-m", "sh", "-c", f"{hosts} && slurmctld")
        for node in NODES:
            self._start("unshare", "-m", "-u", "sh", "-c", f"hostname {node}; {hosts} && slurmd -N {node}")
        self.wait_idle()

    def __exit__(self, *error: object) -> None:
        self.run("scancel", "--user=root", check=False)
        wait_for(lambda: not self.run("squeue", "-h", check=False), 20)
        self.run("scontrol", "shutdown", check=False)
        for file in sorted((self.root / "run").glob("*.pid"), key=lambda file: file.name == "munged.pid"):
            _end(int(file.read_text()), patience=0 if file.name == "munged.pid" else 10)  # all need munge to the last

    def run(self, *command: str, check: bool = True) -> str:
        """The standard output of one of Slurm's commands."""
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout.strip()

    def wait_idle(self) -> None:
        """Until both nodes are idle; one that was put down is brought back."""
        end = time.monotonic() + 40
        while True:
            states = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines()
            if sorted(states) == [f"{node} idle" for node in NODES]:
                return
            if any("down" in state for state in states):
                self.run("scontrol", "update", "nodename=n[1-2]", "state=resume", check=False)
            if time.monotonic() > end:
                logs = "\n".join(path.read_text()[-2000:] for path in sorted((self.root / "log").iterdir()))
                raise RuntimeError(f"the nodes do not become idle: {states}\n{logs}")
            time.sleep(0.2)

    def _start(self, *command: str) -> None:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


def _free_ports(count: int) -> list[int]:
    """Other clusters on this machine keep theirs."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _end(pid: int, patience: float) -> None:
    """Wait for a daemon that was asked to stop, then kill it."""
    process = Path(f"/proc/{pid}")
    for number, seconds in ((None, patience), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            if number:
                os.kill(pid, number)
        if wait_for(lambda: not process.exists(), seconds):
            return
