"""The check of every node before a run: packages, disk, clock, speed, all GPUs, and the links between the nodes.

One Slurm task a node runs it:

    srun --ntasks-per-node=1 python -m trimaran.launchers.slurm.preflight SPEC

Exits with 0, with NODES_REFUSED where nodes should not be used (they are in the run folder's logs/preflight.json), or
with 1.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trimaran.launchers.env.exit_codes import NODES_REFUSED, write_exit_file
from trimaran.launchers.env.network import AddressError
from trimaran.launchers.env.rank_env import RankEnv, read_env
from trimaran.launchers.rendezvous.address_file import AddressFile
from trimaran.launchers.rendezvous.fingerprint import versions_here
from trimaran.launchers.slurm.node_report import NodeFacts, refused_nodes
from trimaran.launchers.slurm.requeue import nodes_of_job, refuse
from trimaran.launchers.terminal import run_main
from trimaran.launchers.worker.entry import announce
from trimaran.launchers.worker.process import exit_process
from trimaran.launchers.worker.tasks import SpecFile
from trimaran.runtime.spec import RunSpec, load_spec

if TYPE_CHECKING:
    import torch

    from trimaran.launchers.rendezvous.store import Rendezvous

_GIB = 2**30
_RING_MIB = 4


def main() -> int:
    """Check this node as one task of the preflight; return the exit code."""
    spec = load_spec(Path(sys.argv[1]))
    folder = Path(spec.train.output_dir)
    rank_env = read_env(os.environ, "slurm")
    address_file = announce(rank_env, SpecFile(Path(sys.argv[1]), []))
    try:
        facts = look(spec, rank_env, folder)
    except Exception as error:  # noqa: BLE001 - any problem of this node must reach the first node, which prints it
        facts = NodeFacts(rank_env.node, {}, 0.0, 0.0, 0.0, problem=f"{type(error).__name__}: {error}")
    return judge(spec, rank_env, folder, facts, address_file)


def look(spec: RunSpec, rank_env: RankEnv, folder: Path) -> NodeFacts:
    """Return the facts about this node."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".preflight-{rank_env.node}"
    probe.write_bytes(b"x")
    probe.unlink()
    free = shutil.disk_usage(folder).free / _GIB
    gflops, of_gpus, gpu_faults = _speeds(spec)
    return NodeFacts(rank_env.node, versions_here(), gflops, free, time.time(), of_gpus=of_gpus, gpu_faults=gpu_faults)


def _speeds(spec: RunSpec) -> tuple[float, tuple[float, ...], str]:
    """Return the CPU's GFLOP/s or the slowest GPU's, those of each GPU, and what is wrong with the GPUs."""
    import torch

    from trimaran.launchers.slurm.gpu_check import check_nccl_here, look_at_gpus, matrix_gflops

    gpus = look_at_gpus() if spec.launcher.device != "cpu" else []
    of_ranks = spec.world_size // spec.launcher.nodes if spec.launcher.device == "cuda" else 0
    wanted = spec.slurm.gpus_per_node or of_ranks
    faults = [fault for gpu in gpus for fault in gpu.faults()]
    if spec.launcher.device != "cpu" and len(gpus) < wanted:
        faults.append(f"torch sees {len(gpus)} of {wanted} GPUs")
    faults += [fault for fault in (check_nccl_here() if gpus and not faults else "",) if fault]
    if not gpus:
        return matrix_gflops(torch.device("cpu")), (), "; ".join(faults)
    return min(gpu.gflops for gpu in gpus), tuple(gpu.gflops for gpu in gpus), "; ".join(faults)


def judge(
    spec: RunSpec, rank_env: RankEnv, folder: Path, facts: NodeFacts, address_file: AddressFile | None = None
) -> int:
    """Compare the nodes' facts, test the links between them, print the result on the first; return the exit code."""
    from trimaran.launchers.rendezvous.store import join_rendezvous

    try:
        rendezvous = join_rendezvous(rank_env, os.environ, spec.launcher, folder, announced=address_file)
    except AddressError as error:
        if rank_env.rank != 1:
            raise
        # The first node would report this, but it is the one that does not answer.
        return _end(folder, {nodes_of_job()[0]: f"it did not answer: {error}"})
    absent = rendezvous.barrier(spec.launcher.start_timeout_s)
    if absent:
        if rank_env.rank:
            return NODES_REFUSED
        nodes = nodes_of_job()
        return _end(
            folder, {nodes[rank]: f"it did not answer within {spec.launcher.start_timeout_s:g} s" for rank in absent}
        )
    rendezvous.remove_address_file()
    every = _compare(rendezvous, facts)
    refused = refused_nodes(every, spec.slurm.preflight_min_free_gib or 0.0)
    if not refused and rank_env.world_size > 1:
        import torch

        gpus = min(len(each.of_gpus) for each in every)
        devices = [torch.device("cuda", index) for index in range(gpus)] or [torch.device("cpu")]
        links = rendezvous.all_gather(json.dumps(max(ring_seconds(spec, rendezvous, devices))))
        if rank_env.rank == 0:
            how = f" by NCCL, from each of {gpus} GPUs" if gpus else ""
            worst_ms = max(map(float, links)) * 1e3
            _say(f"ring of {rank_env.world_size} nodes{how}: {_RING_MIB} MiB in {worst_ms:.1f} ms a hop at most")
    if rank_env.rank == 0:
        for each in every:
            _say(f"{each.node}: {each.gflops:.0f} GFLOP/s, {each.free_gib:.1f} GiB free, clock {each.clock_s:+.1f} s")
        _end(folder, refused)
    rendezvous.all_gather("judged")  # a barrier: the report is written before the exit of a task ends the step
    rendezvous.close()
    return NODES_REFUSED if refused else 0


def _compare(rendezvous: "Rendezvous", facts: NodeFacts) -> list[NodeFacts]:
    """Return the facts of all nodes, with clocks relative to the first node's. Collective over the nodes."""
    # After the rendezvous the clocks are read as close together as the store allows.
    first, *_ = times = [float(text) for text in rendezvous.all_gather(str(time.time()))]
    facts = replace(facts, clock_s=round(times[rendezvous.rank_env.rank] - first, 1))
    return [NodeFacts.parse(text) for text in rendezvous.all_gather(json.dumps(asdict(facts)))]


def _end(folder: Path, refused: Mapping[str, str]) -> int:
    """Print the refused nodes, write them down for the batch script, and return the exit code."""
    for node, reason in refused.items():
        _say(f"node {node} is not used: {reason}")
    if refused:
        refuse(folder, refused)
    code = NODES_REFUSED if refused else 0
    write_exit_file(code)
    return code


def ring_seconds(spec: RunSpec, rendezvous: "Rendezvous", devices: Sequence["torch.device"]) -> list[float]:
    """Send a buffer from every node to the next, by NCCL between GPUs; return the seconds that it took of each device.

    One device after the other, each in a process group of its own: GPUs of a node may have network cards of their own.
    Collective over the nodes.
    """
    import torch

    from trimaran.launchers.worker.process_group import join_group

    seconds = []
    for index, device in enumerate(devices):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        join_group(spec, device, rendezvous, f"ring-{index}")
        seconds.append(_pass_around(rendezvous.rank_env, device))
    return seconds


def _pass_around(rank_env: RankEnv, device: "torch.device") -> float:
    """Send a buffer to the next node over the default group, which is left then; return the seconds."""
    import torch
    import torch.distributed as dist

    rank, size = rank_env.rank, rank_env.world_size
    sent = torch.full((_RING_MIB * 2**18,), float(rank), device=device)
    received = torch.empty_like(sent)
    seconds = 0.0
    for _ in range(2):  # the first one makes the connections
        start = time.perf_counter()
        # Together, because NCCL's send waits for a receive that must not stand behind it.
        transfers = [
            dist.P2POp(dist.isend, sent, (rank + 1) % size),
            dist.P2POp(dist.irecv, received, (rank - 1) % size),
        ]
        for request in dist.batch_isend_irecv(transfers):
            request.wait()
        received[0].item()  # waits for a GPU
        seconds = time.perf_counter() - start
    if not bool((received == (rank - 1) % size).all()):
        raise RuntimeError(f"what node {(rank - 1) % size} sent arrived damaged at {rank_env.node}")
    dist.destroy_process_group()
    return seconds


def _say(text: str) -> None:
    print(f"preflight: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_process(run_main(main))
