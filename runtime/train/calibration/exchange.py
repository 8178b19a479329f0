"""What ranks measure together: the exchanges of every axis of the mesh, by size, ranks and nodes of the group."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from trimaran.models.parallel.group import Group, all_gather_into, all_reduce, all_to_all, receive, send
from trimaran.models.parallel.group import start_reduce_scatter_into as start_reduce_scatter
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.plan.calibrate.record import Point
from trimaran.runtime.train.calibration.clock import time_repeats

_AXES: Final = {
    "tp": ("all_reduce", "all_gather", "reduce_scatter"),
    "dp": ("all_gather", "reduce_scatter"),
    "pp": ("transfer",),
    "ep": ("all_to_all",),
}
_LARGE, _REPEATS, _REPEATS_OF_LARGE = 1 << 20, 30, 8


def measure_exchanges(
    device: torch.device, sizes: Sequence[int], timeout_s: float, nodes: Sequence[str]
) -> Iterator[Point]:
    """Yield the points of exchanges. Collective over the world; every rank gets points of its own.

    Args:
        sizes: bytes of a rank's whole tensor, multiples of 4 times the ranks.
        timeout_s: bound of every wait.
        nodes: name of the node of each rank of the world; the ranks of a node follow each other.
    """
    for axis, operations in _AXES.items():
        for ranks, is_across in group_sizes(axis, nodes):
            mesh = _mesh(axis, ranks, len(nodes), timeout_s, device, is_across=is_across)
            group = mesh.pp if axis == "pp" else mesh.ep if axis == "ep" else getattr(mesh, axis)
            try:
                for operation in operations:
                    if operation == "transfer" and ranks > 2:
                        continue  # between two neighbours of any number
                    for size in sizes:
                        yield _point(axis, operation, size, group, mesh, device, nodes)
            finally:
                mesh.close()


def group_sizes(axis: str, nodes: Sequence[str]) -> list[tuple[int, bool]]:
    """Return the sizes of the groups that are measured, and whether they have one rank of each node.

    Such groups of dp, one for each rank of a node, exchange at once: so it is where tp fills the nodes.
    """
    world, on_node = len(nodes), max(map(nodes.count, nodes))
    sizes = [size for size in sorted({2, on_node, world}) if size > 1 and world % size == 0]
    found = [(size, False) for size in sizes]
    if axis == "dp" and 1 < on_node < world and world % on_node == 0:
        found.append((world // on_node, True))
    return found


def _mesh(axis: str, ranks: int, world: int, timeout_s: float, device: torch.device, *, is_across: bool) -> Mesh:
    """Return a mesh with `ranks` ranks on the axis; the others, if any, are on dp, for dp itself on pp or tp."""
    rest = world // ranks
    tp, pp, dp = (ranks if axis == each else 1 for each in ("tp", "pp", "dp"))
    if axis == "dp":
        tp, pp = (rest, 1) if is_across else (1, rest)
    elif axis == "ep":
        dp = world
    else:
        dp = rest
    ep = ranks if axis == "ep" else 1
    return build_mesh(pp=pp, dp=dp, cp=1, tp=tp, ep=ep, timeout_s=timeout_s, device=device)


def _point(
    axis: str, operation: str, size: int, group: Group, mesh: Mesh, device: torch.device, nodes: Sequence[str]
) -> Point:
    repeats = _REPEATS if size < _LARGE else _REPEATS_OF_LARGE
    work = _work(operation, size, group, device)
    mesh.gather_text("")  # nobody begins before the others are there
    found = time_repeats(work, device, repeats)
    return Point(
        what="exchange", dtype="float32", ranks=group.size, threads=1, shape={"bytes": size}, axis=axis,
        operation=operation, nodes=len({nodes[rank] for rank in group.ranks}), seconds=found.seconds,
        cpu_seconds=found.cpu_seconds, spread=found.spread, repeats=repeats,
    )  # fmt: skip


def _work(operation: str, size: int, group: Group, device: torch.device) -> Callable[[], object]:
    whole = torch.zeros(group.size, size // 4 // group.size, device=device)
    part = torch.zeros_like(whole[0])
    if operation == "all_reduce":
        return lambda: all_reduce(whole, group)
    if operation == "all_gather":
        return lambda: all_gather_into(whole, part, group)
    if operation == "reduce_scatter":
        return lambda: start_reduce_scatter(part, whole, group)()
    if operation == "all_to_all":
        rows = [1] * group.size
        return lambda: all_to_all(whole, rows, rows, group)
    return lambda: _transfer(whole, group)


def _transfer(x: Tensor, group: Group) -> None:
    """Send to the neighbour and take back: half of this is one transfer, which `merged` accounts for."""
    if group.rank == 0:
        send(x, 1, group)
        receive(x, 1, group)
    else:
        receive(x, 0, group)
        send(x, 0, group)


def merged(texts: Sequence[str]) -> list[Point]:
    """Return one point for the points that ranks have of the same thing, the one with the median time.

    Groups on as many nodes are the same thing. A transfer there and back is two.

    Args:
        texts: of every rank, its points as `to_text` makes them.
    """
    by_rank = [[Point.model_validate(each) for each in json.loads(text)] for text in texts]
    found = []
    for of_all in zip(*by_rank, strict=True):
        for nodes in sorted({point.nodes for point in of_all}):
            same = sorted((point for point in of_all if point.nodes == nodes), key=lambda point: point.seconds)
            middle = same[len(same) // 2]
            if middle.operation == "transfer":
                halves = {"seconds": middle.seconds / 2, "cpu_seconds": middle.cpu_seconds / 2}
                middle = middle.model_copy(update=halves)
            found.append(middle)
    return found


def to_text(points: Sequence[Point]) -> str:
    """Return points as a text that ranks exchange."""
    return json.dumps([point.model_dump() for point in points])
