"""A look at every node before a run: packages, disk, clock, speed, and the links between the nodes. One Slurm task a node runs it.

    srun --ntasks-per-node=1 python -m trimaran.launchers.slurm.preflight SPEC

Exits with 0, with NODES_REFUSED where nodes should not be used (they are in the run folder's logs/preflight.json), or with 1.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from trimaran.launchers.consistency import VERSIONED, digest_of_code
from trimaran.launchers.place import Place, resolve
from trimaran.launchers.slurm.script import NODES_REFUSED
from trimaran.launchers.slurm.verdict import NodeFacts, Verdict, refused_nodes
from trimaran.runtime.spec import RunSpec, load_spec

if TYPE_CHECKING:
    from trimaran.launchers.rendezvous import Meeting

_GIB = 2**30
_MATRIX = 1024
_PRODUCTS = 5
_RING_MIB = 4


def main() -> int:
    """Entry point of a node's task."""
    spec = load_spec(Path(sys.argv[1]))
    folder = Path(spec.train.output_dir)
    place = resolve(os.environ, "slurm")
    try:
        facts = look(spec, place, folder)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with this node, the others shall name it
        facts = NodeFacts(place.node, {}, 0.0, 0.0, 0.0, f"{type(error).__name__}: {error}")
    return judge(spec, place, folder, facts)


def look(spec: RunSpec, place: Place, folder: Path) -> NodeFacts:
    """Return what this node is like."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".preflight-{place.node}"
    probe.write_bytes(b"x")
    probe.unlink()
    free = shutil.disk_usage(folder).free / _GIB
    return NodeFacts(place.node, versions_here(), matrix_gflops(spec), free, time.time())


def versions_here() -> dict[str, str]:
    """Return the versions that must be the same on every node."""
    found = {"python": sys.version.split()[0], "trimaran": digest_of_code()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


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


def judge(spec: RunSpec, place: Place, folder: Path, facts: NodeFacts) -> int:
    """Bring the nodes' facts together, try the links between them, and return the exit code; the first node says what is wrong."""
    from trimaran.launchers.rendezvous import meet

    meeting = meet(place, os.environ, spec.launcher, folder)
    # The clocks are read when all have met, as close together as a store allows.
    now = float(meeting.gather(str(time.time()))[0])
    facts = NodeFacts(**{**asdict(facts), "clock_s": round(time.time() - now, 1) if place.rank else 0.0})
    every = [NodeFacts.parse(text) for text in meeting.gather(json.dumps(asdict(facts)))]
    refused = refused_nodes(every, spec.slurm.preflight_min_free_gib)
    if not refused and place.world_size > 1:
        slowest = ring_seconds(spec, meeting)
        links = meeting.gather(json.dumps(slowest))
        if place.rank == 0:
            _say(f"ring of {place.world_size} nodes: {_RING_MIB} MiB in {max(map(float, links)) * 1e3:.1f} ms a hop at most")
    if place.rank == 0:
        _tell(folder, every, refused)
    meeting.gather("judged")  # the verdict is written before anybody's exit ends the step
    meeting.leave()
    return NODES_REFUSED if refused else 0


def ring_seconds(spec: RunSpec, meeting: "Meeting") -> float:
    """Send a buffer from every node to the next, and return the seconds that took this node's neighbour; collective over the nodes."""
    import torch
    import torch.distributed as dist

    from trimaran.launchers.world import join_group

    join_group(spec, torch.device("cpu"), meeting)
    rank, size = meeting.place.rank, meeting.place.world_size
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
        raise RuntimeError(f"what node {(rank - 1) % size} sent arrived damaged at {meeting.place.node}")
    dist.destroy_process_group()
    return seconds


def _tell(folder: Path, every: list[NodeFacts], refused: Mapping[str, str]) -> None:
    for each in every:
        _say(f"{each.node}: {each.gflops:.0f} GFLOP/s, {each.free_gib:.1f} GiB free, clock {each.clock_s:+.1f} s")
    for node, reason in refused.items():
        _say(f"node {node} is not used: {reason}")
    Verdict.read(folder).after(refused).write(folder)


def _say(text: str) -> None:
    print(f"preflight: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
