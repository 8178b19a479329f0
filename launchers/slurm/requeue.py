"""Put a job back into the queue without the nodes that it should not use again. The batch script runs this:

    python -m trimaran.launchers.slurm.requeue SPEC            after a preflight has refused nodes
    python -m trimaran.launchers.slurm.requeue --lost SPEC     after a rank died without a message: its node may be lost

The exit code is 0 if the job will start again on other nodes.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trimaran.launchers.slurm.commands import SlurmError, call
from trimaran.launchers.slurm.node_report import NodeReport
from trimaran.launchers.terminal import run_main
from trimaran.runtime.checkpoint.folder import latest, step_of
from trimaran.runtime.spec import RunSpec, load_spec

_MOST_ATTEMPTS = 2  # without another checkpoint between them: after that the nodes are not the problem
_REQUEUED_S = 20.0
_ANSWER_S = 20.0


def main() -> int:
    """Requeue the job of this process; return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lost", action="store_true")
    parser.add_argument("spec", type=Path)
    options = parser.parse_args()
    spec = load_spec(options.spec)
    folder = Path(spec.train.output_dir)
    try:
        if options.lost:
            lost = lost_nodes()
            if not lost:  # a rank was killed on a healthy node: another start would end in the same way
                return 1
            refuse(folder, dict.fromkeys(lost, "it does not answer"))
        return leave_out(spec, NodeReport.read(folder))
    except SlurmError as error:
        print(f"error: the job can't be given other nodes: {error}", file=sys.stderr)
        return 1


def refuse(folder: Path, nodes: Mapping[str, str]) -> None:
    """Add nodes that the run can't use, each with the reason, to the node report of its folder."""
    saved = latest(folder / "checkpoints")
    NodeReport.read(folder).after(nodes, 0 if saved is None else step_of(saved) or 0).write(folder)


def nodes_of_job() -> list[str]:
    """Return the nodes of the job that this process belongs to, in the order of Slurm's node numbers.

    Raises:
        SlurmError: Slurm does not answer.
    """
    return call(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]).split()


def lost_nodes() -> list[str]:
    """Return the nodes of this job on which no process can be started; Slurm itself takes minutes (SlurmdTimeout)."""
    probes = [
        (
            node,
            subprocess.Popen(
                ["srun", "--overlap", "--mpi=none", "-N1", "-n1", "-w", node, "true"], stderr=subprocess.DEVNULL
            ),
        )
        for node in nodes_of_job()
    ]
    deadline = time.monotonic() + _ANSWER_S
    lost = []
    for node, probe in probes:
        try:
            code = probe.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            probe.kill()
            code = None
        if code != 0:
            lost.append(node)
    return lost


def leave_out(spec: RunSpec, found: NodeReport) -> int:
    """Requeue the job without the nodes that were found unfit; return the exit code.

    Raises:
        SlurmError: Slurm refuses it.
    """
    if found.attempts > _MOST_ATTEMPTS:
        print(
            f"error: other nodes were asked for {_MOST_ATTEMPTS} times, and the run has not got on since",
            file=sys.stderr,
        )
        return 1
    job = os.environ["SLURM_JOB_ID"]
    excluded = ",".join([*([spec.slurm.exclude] if spec.slurm.exclude else []), *found.excluded])
    # Which nodes a job leaves out can be changed only while it is pending; held, it can't start before that is done.
    call(["scontrol", "requeuehold", job])
    _update(["scontrol", "update", f"JobId={job}", f"ExcNodeList={excluded}"])
    call(["scontrol", "release", job])
    print(f"job {job} goes back into the queue, without {excluded}", file=sys.stderr)
    return 0


def _update(command: Sequence[str]) -> None:
    deadline = time.monotonic() + _REQUEUED_S
    while True:
        try:
            call(command)
            return
        except SlurmError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(run_main(main))
