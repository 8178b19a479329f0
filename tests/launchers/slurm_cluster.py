"""A real Slurm on this host for tests: munged, slurmctld and a slurmd for every node.

Several nodes of one host need distinct ports and loopback addresses. It takes root and Debian's packages slurm-wlm and
munge.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.launchers.ports import free_ports

TOOLS = ("munged", "munge", "slurmctld", "slurmd", "scontrol", "sinfo", "sbatch", "srun", "squeue")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
START_S = 120.0
CALL_S = 200.0  # of one of Slurm's commands: a second on idle cores
# What differs from a site's settings is there to make a test short: how soon a requeued job may start again. No silence
# counts as a loss here, for the daemons of a busy machine may be silent for long: `mark_down` tells of a lost node.
CONFIG = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=300
SlurmdTimeout=300
MessageTimeout=60
KillWait=30
MinJobAge=86400
"""


class Cluster:
    """The daemons and how to reach them."""

    def __init__(self, folder: Path, nodes: int, cpus: int) -> None:
        self.folder, self.names = folder, [f"n{index}" for index in range(1, nodes + 1)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        for name in ("state", "spool"):
            (folder / name).mkdir()
        self._write_config(cpus)

    def _write_config(self, cpus: int) -> None:
        host, port = socket.gethostname().split(".")[0], free_ports(len(self.names) + 1)
        lines = [CONFIG.strip().format(host=host, port=port, folder=self.folder)]
        for index, name in enumerate(self.names, start=1):
            address = f"NodeAddr=127.0.0.{10 + index} Port={port + index}"
            lines.append(f"NodeName={name} NodeHostname={host} {address} CPUs={cpus} RealMemory=2048 State=UNKNOWN")
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))

    def start(self) -> None:
        """Start every daemon that is not running, and wait until all nodes can be used."""
        socket_path = self.folder / "munge.sock"
        munged = ["munged", "--foreground", "--force", f"--socket={socket_path}", f"--key-file={self.folder}/munge.key"]
        munged += [
            f"--{name}={self.folder}/munged.{suffix}"
            for name, suffix in (("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))
        ]
        self._launch("munged", munged)
        self.wait_for("munged", lambda: self._answers(["munge", "-S", str(socket_path), "-n"]))
        self._launch("slurmctld", ["slurmctld", "-D"])
        for name in self.names:
            (self.folder / "spool" / name).mkdir(exist_ok=True)
            self._launch(name, ["slurmd", "-D", "-N", name])
        self.wait_for("slurmctld", lambda: "is UP" in self.call("scontrol", "ping"))
        self.wait_for("the nodes", self._all_ready)

    def _launch(self, name: str, command: list[str]) -> None:
        daemon = self._daemons.get(name)
        if daemon is not None and daemon.poll() is None:
            return
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=self.environment
            )

    def _all_ready(self) -> bool:
        states = dict(line.split() for line in self.call("sinfo", "-h", "-N", "-o", "%N %T").splitlines())
        for name, state in states.items():
            if state.startswith(("down", "drain", "fail")):
                self.call("scontrol", "update", f"nodename={name}", "state=resume")
        return len(states) == len(self.names) and all(
            state in ("idle", "mixed", "allocated", "completing") for state in states.values()
        )

    def _answers(self, command: list[str]) -> bool:
        done = subprocess.run(command, env=self.environment, capture_output=True, check=False, timeout=CALL_S)
        return done.returncode == 0

    def call(self, *words: str) -> str:
        """What a command prints, whether it fails or not."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False, timeout=CALL_S)
        return done.stdout + done.stderr

    def wait_for(self, what: str, happened: Callable[[], bool], timeout_s: float = START_S) -> None:
        """Wait for something in the cluster."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert time.monotonic() < deadline, f"{what}: still waiting after {timeout_s} s\n{self.logs()}"
            time.sleep(0.3)

    def logs(self) -> str:
        """The last lines of every daemon."""
        texts = [(file.name, file.read_text(errors="replace")) for file in sorted(self.folder.glob("*.log"))]
        return "\n".join(f"--- {name}\n{text[-1500:]}" for name, text in texts)

    def steps(self, node: str | None = None) -> list[psutil.Process]:
        """The processes of this cluster's jobs, on one node or all: batch shells, steps and what they started."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
                    continue
                where = environment.get("SLURMD_NODENAME")
                is_daemon = process.name() == "slurmstepd"  # whose environment names no node
                if (is_daemon and node is None) or (where is not None and node in (None, where)):
                    found.append(process)
        return found

    def lose_node(self, name: str, *, silently: bool = False) -> None:
        """End a node's daemon and all that runs on it.

        Args:
            silently: as if its power failed; else the daemons of its steps tell how these have ended.
        """
        daemon, steps = self._daemons[name], self.steps(name)
        everything = [psutil.Process(daemon.pid), *psutil.Process(daemon.pid).children(recursive=True), *steps]
        if silently:
            parents = [parent for step in steps if (parent := step.parent()) is not None]
            everything += [parent for parent in parents if parent.name() == "slurmstepd"]
        # Stopped first, so that none notices the death of another.
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for process in everything:
                with suppress(psutil.Error):
                    act(process)
        daemon.wait()

    def mark_down(self, name: str) -> None:
        """Tell the controller that a node is lost, as a site's monitoring does; by itself it would wait for minutes."""
        self.call("scontrol", "update", f"nodename={name}", "state=down", "reason=lost")

    def restart_controller(self, job: str) -> None:
        """Kill the controller, as its host's power failing would, and start it again.

        Up to five seconds of what it knows are not on its disk, and it would forget that the job has begun: of what is
        saved in the order in which it happens, a later change is waited for.
        """
        saved = self.folder / "state" / "job_state"
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        self.call("scontrol", "update", f"jobid={job}", "comment=seen")
        self.wait_for("the controller's save", lambda: saved.exists() and saved.stat().st_mtime_ns != before)
        self._daemons["slurmctld"].kill()
        self._daemons["slurmctld"].wait()
        self.start()

    def stop(self) -> None:
        """Cancel all jobs and end all daemons."""
        with suppress(subprocess.TimeoutExpired):
            jobs = self.call("squeue", "-h", "-o", "%A").split()
            if jobs:
                self.call("scancel", "--signal=KILL", "--full", *jobs)
                self.call("scancel", *jobs)
        for process in self.steps():
            with suppress(psutil.Error):
                process.kill()
        for daemon in reversed(list(self._daemons.values())):
            with suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()


def why_not() -> str | None:
    """Why a cluster can't be started here, None where it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    return f"not installed (apt-get install slurm-wlm munge): {', '.join(missing)}" if missing else None


@contextmanager
def running_cluster(folder: Path, nodes: int = 3, cpus: int = 8) -> Iterator[Cluster]:
    """A cluster while the block runs."""
    cluster = Cluster(folder, nodes, cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
