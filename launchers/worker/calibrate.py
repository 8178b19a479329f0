"""`trimaran calibrate` on the ranks: each measures, all at once and together; rank 0 writes the points."""

import json
import os
import time

import psutil
import torch

from trimaran.launchers.env.rank_env import node_name
from trimaran.launchers.terminal import say
from trimaran.launchers.worker.tasks import CalibrateTask
from trimaran.models.fields import counted
from trimaran.runtime.files import write_text
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.plan.calibrate.record import Point
from trimaran.runtime.processes import cores_of_mask, quota_of_cores, usable_cores
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.calibration.exchange import measure_exchanges, merged, to_text
from trimaran.runtime.train.calibration.measure import CPU, GPU, SMOKE, Effort, measure
from trimaran.runtime.train.hardware import describe_machine


def run_calibrate(task: CalibrateTask, spec: RunSpec, mesh: Mesh, device: torch.device) -> int:
    """Measure, and write the points and the facts of the machine on rank 0. Collective over the world."""
    mine = json.dumps([node_name(os.environ), sorted(cores_of_mask())])
    placed = [json.loads(text) for text in mesh.gather_text(mine)]
    nodes = [node for node, _ in placed]
    on_node = {core for node, own in placed if node == nodes[mesh.rank] for core in own}
    effort = SMOKE if task.is_smoke else GPU if device.type == "cuda" else CPU
    facts, alone = _facts(device), list[Point]()
    cores, threads = usable_cores(), torch.get_num_threads()
    if device.type == "cpu" and mesh.world_size > 1:
        if mesh.rank == 0 and cores > threads:
            torch.set_num_threads(cores)
            alone = _alone(task, device, effort)
            torch.set_num_threads(threads)
        mesh.gather_text("")  # the others wait, and take no core meanwhile
    if mesh.rank == 0:
        where = f" on {len(set(nodes))} nodes" if len(set(nodes)) > 1 else ""
        say(f"measuring {counted(mesh.world_size, 'rank')} at once{where}")
    # Who is on another node takes no core of this one.
    points = list(measure(device, task.dtypes, max(map(nodes.count, nodes)), effort))
    if mesh.world_size > 1:
        points += measure_exchanges(device, effort.exchanges, spec.launcher.timeout_s, nodes)
    texts = mesh.gather_text(to_text(points))
    if mesh.rank == 0:
        found = [*alone, *merged(texts)]
        # srun may have given each rank some cores of the node, and a run's ranks share them all.
        facts["cores"] = min(len(on_node), quota_of_cores() or len(on_node))
        write_text(task.output, json.dumps({**facts, "points": [each.model_dump() for each in found]}))
    return 0


def _alone(task: CalibrateTask, device: torch.device, effort: Effort) -> list[Point]:
    """Return the points of one process with all threads; none where other programs leave it too little time."""
    threads, begun = torch.get_num_threads(), time.monotonic()
    say(f"measuring one process of {threads} threads")
    found = []
    for point in measure(device, task.dtypes, 1, effort):
        found.append(point)
        if time.monotonic() - begun > effort.limit_s:
            say(
                f"one process of {threads} threads was not measured within {effort.limit_s:.0f} s, for other programs "
                "use the cores: the calibration has nothing of it",
                style="yellow",
            )
            return []
    return found


def _facts(device: torch.device) -> dict[str, object]:
    """Return what is known of the machine before anything is measured."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        torch.zeros(1, device=device)
        free, total = torch.cuda.mem_get_info(device)
        return {
            "kind": "gpu", "name": properties.name, "memory_bytes": properties.total_memory,
            "processors": properties.multi_processor_count,
            "context_bytes": total - free - torch.cuda.memory_reserved(device),
        }  # fmt: skip
    machine = describe_machine()
    return {
        "kind": "cpu", "name": machine["cpu"], "memory_bytes": machine["memory_bytes"], "processors": 0,
        "context_bytes": _own_bytes(),
    }  # fmt: skip


def _own_bytes() -> int:
    """Return the bytes that this process holds and shares with no file."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)
