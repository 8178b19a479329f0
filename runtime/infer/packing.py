"""Weights packed once for the many passes of generation and evaluation, while they do not change."""

from collections.abc import Iterator
from contextlib import contextmanager

from trimaran.models.transformer import Stage
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.processes import free_memory_bytes


def pack_weights(stages: dict[int, Stage], mesh: Mesh) -> None:
    """Pack the weights of this rank's stages where a quarter of the free memory has room for all ranks' copies.

    What is packed already stays so. Collective over the world, and a barrier: the memory that is left can be measured
    after it.
    """
    free = free_memory_bytes()
    parameters = [each for stage in stages.values() for each in stage.parameters()]
    size = sum(each.numel() * each.element_size() for each in parameters)
    if free is not None and size * mesh.world_size <= free // 4:
        for stage in stages.values():
            stage.pack_weights()
    mesh.gather_text("")


@contextmanager
def packed_weights(stages: dict[int, Stage], mesh: Mesh) -> Iterator[None]:
    """Pack the weights of a run that trains, and drop the copies afterwards. Collective over the world at its start."""
    try:
        pack_weights(stages, mesh)
        yield
    finally:
        for stage in stages.values():
            stage.unpack_weights()
