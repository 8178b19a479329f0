"""A look at every node before a run: packages, disk, clock, speed, and the links between the nodes. One Slurm task a node runs it.

    srun --ntasks-per-node=1 python -m trimaran.launchers.slurm.preflight SPEC

Exits with 0, with NODES_REFUSED where nodes should not be used (they are in the run folder's logs/preflight.json), or
with 1.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trimaran.launchers.env.rank_env import RankEnv, resolve
from trimaran.launchers.rendezvous.fingerprint import versions_here
from trimaran.launchers.rendezvous.network import AddressError
from trimaran.launchers.slurm.node_report import NodeFacts, refused_nodes
from trimaran.launchers.slurm.requeue import nodes_of_job, refuse
from trimaran.launchers.slurm.sbatch import NODES_REFUSED
from trimaran.launchers.worker.process import leave_word
from trimaran.runtime.spec import RunSpec, load_spec

if TYPE_CHECKING:
    from trimaran.launchers.rendezvous.store import Meeting

_GIB = 2**30
_MATRIX = 1024
_PRODUCTS = 20  # the best of them counts: others may use the node meanwhile
_RING_MIB = 4


def main() -> int:
    """Entry point of a node's task; returns the exit code."""
    spec = load_spec(Path(sys.argv[1]))
    folder = Path(spec.train.output_dir)
    rank_env = resolve(os.environ, "slurm")
    try:
        facts = look(spec, rank_env, folder)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with this node, the others shall name it
        facts = NodeFacts(rank_env.node, {}, 0.0, 0.0, 0.0, f"{type(error).__name__}: {error}")
    return judge(spec, rank_env, folder, facts)


def look(spec: RunSpec, rank_env: RankEnv, folder: Path) -> NodeFacts:
    """Return what this node is like."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".preflight-{rank_env.node}"
    probe.write_bytes(b"x")
    probe.unlink()
    free = shutil.disk_usage(folder).free / _GIB
    return NodeFacts(rank_env.node, versions_here(), matrix_gflops(spec), free, time.time())


def matrix_gflops(spec: RunSpec) -> float:
    """Return the speed of a float32 matrix product on this node's device, the best of a few."""
    import torch

    device = "cuda" if spec.launcher.device != "cpu" and torch.cuda.is_available() else "cpu"
    matrix = torch.randn(_MATRIX, _MATRIX, device=device)
    best = float("inf")
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * _MATRIX**3 / best / 1e9


def judge(spec: RunSpec, rank_env: RankEnv, folder: Path, facts: NodeFacts) -> int:
    """Bring the nodes' facts together, try the links between them, and return the exit code; the first node says what is wrong."""
    from trimaran.launchers.rendezvous.store import meet

    try:
        meeting = meet(rank_env, os.environ, spec.launcher, folder)
    except AddressError as error:
        if rank_env.rank != 1:
            raise
        return _end(
            folder, {nodes_of_job()[0]: f"it did not answer: {error}"}
        )  # the first node, which should say so, is the silent one
    absent = meeting.call_roll(spec.launcher.start_timeout_s)
    if absent:
        if rank_env.rank:
            return NODES_REFUSED
        nodes = nodes_of_job()
        return _end(
            folder, {nodes[rank]: f"it did not answer within {spec.launcher.start_timeout_s:g} s" for rank in absent}
        )
    meeting.close_door()
    every = _compare(meeting, facts)
    refused = refused_nodes(every, spec.slurm.preflight_min_free_gib)
    if not refused and rank_env.world_size > 1:
        slowest = ring_seconds(spec, meeting)
        links = meeting.gather(json.dumps(slowest))
        if rank_env.rank == 0:
            _say(
                f"ring of {rank_env.world_size} nodes: {_RING_MIB} MiB in {max(map(float, links)) * 1e3:.1f} ms a hop at most"
            )
    if rank_env.rank == 0:
        for each in every:
            _say(f"{each.node}: {each.gflops:.0f} GFLOP/s, {each.free_gib:.1f} GiB free, clock {each.clock_s:+.1f} s")
        _end(folder, refused)
    meeting.gather("judged")  # the verdict is written before anybody's exit ends the step
    meeting.leave()
    return NODES_REFUSED if refused else 0


def _compare(meeting: "Meeting", facts: NodeFacts) -> list[NodeFacts]:
    """The facts of all nodes, with their clocks beside the first one's; collective over the nodes."""
    # All have met already, so the clocks are read as close together as a store allows.
    first, *_ = times = [float(text) for text in meeting.gather(str(time.time()))]
    facts = replace(facts, clock_s=round(times[meeting.rank_env.rank] - first, 1))
    return [NodeFacts.parse(text) for text in meeting.gather(json.dumps(asdict(facts)))]


def _end(folder: Path, refused: Mapping[str, str]) -> int:
    """Say which nodes are refused, write that down for the batch script, and return the exit code."""
    for node, reason in refused.items():
        _say(f"node {node} is not used: {reason}")
    if refused:
        refuse(folder, refused)
    code = NODES_REFUSED if refused else 0
    leave_word(code)
    return code


def ring_seconds(spec: RunSpec, meeting: "Meeting") -> float:
    """Send a buffer from every node to the next, and return the seconds that took this node's neighbour; collective over the nodes."""
    import torch
    import torch.distributed as dist

    from trimaran.launchers.worker.process_group import join_group

    join_group(spec, torch.device("cpu"), meeting)
    rank, size = meeting.rank_env.rank, meeting.rank_env.world_size
    sent, received = torch.full((_RING_MIB * 2**18,), float(rank)), torch.empty(_RING_MIB * 2**18)
    seconds = 0.0
    for _ in range(2):  # the first one makes the connections
        start = time.perf_counter()
        request = dist.isend(sent, (rank + 1) % size)
        dist.recv(received, (rank - 1) % size)
        assert request is not None
        request.wait()
        seconds = time.perf_counter() - start
    if not bool((received == (rank - 1) % size).all()):
        raise RuntimeError(f"what node {(rank - 1) % size} sent arrived damaged at {meeting.rank_env.node}")
    dist.destroy_process_group()
    return seconds


def _say(text: str) -> None:
    print(f"preflight: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        _say(f"error: {error}")
        sys.exit(1)
