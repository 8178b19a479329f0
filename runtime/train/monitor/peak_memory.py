"""The most memory that each rank has taken since it started, told to all of them now and then."""

from collections.abc import Mapping

import torch

from trimaran.models.parallel.group import all_reduce
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.train.monitor.held import resident_bytes

_LONGEST = 1024  # steps between two exchanges


class PeakMemory:
    """The ranks' peaks of memory, as of the last exchange.

    A peak only grows, and nearly all of its growth is in the first steps. So the ranks exchange theirs after steps 1,
    2, 4, 8, ..., 512 and every 1,024th of a start: with 384 ranks that is one all_reduce of 6 KiB in 1,024 steps. It is
    an all_reduce of its own, because more numbers in that of the loss could change the order in which the loss is
    summed, and so its last bits.

    Attributes:
        by_rank: bytes, [2, world_size]: resident (CPU) or allocated (GPU); on a GPU what torch's allocator reserved.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._mesh, self._device, self._steps = mesh, device, 0
        self.by_rank: list[list[float]] = []

    def after_step(self) -> None:
        """Count a finished step, and exchange the peaks where that is due. Collective over the world then."""
        self._steps += 1
        if self._steps & (self._steps - 1) == 0 or self._steps % _LONGEST == 0:
            self.exchange()

    def exchange(self) -> None:
        """Have all ranks know the peak of each. Collective over the world."""
        peaks = torch.zeros(2, self._mesh.world_size, dtype=torch.float64)  # whole numbers up to 2^53 are exact
        peaks[:, self._mesh.rank] = torch.tensor(_peaks_of(self._device), dtype=torch.float64)
        self.by_rank = all_reduce(peaks.to(self._device), self._mesh.world).tolist()

    def columns(self) -> Mapping[str, float | None]:
        """Return the columns of metrics.jsonl: the largest peak, and its rank among several; none without exchange."""
        if not self.by_rank:
            return {}
        used, reserved = self.by_rank
        largest = max(range(len(used)), key=used.__getitem__)
        columns: dict[str, float | None] = {"peak_memory_bytes": int(used[largest])}
        if len(used) > 1:
            columns["peak_memory_rank"] = largest
        if any(reserved):
            columns["peak_memory_reserved_bytes"] = int(max(reserved))
        return columns


def _peaks_of(device: torch.device) -> tuple[float, float]:
    if device.type != "cuda":
        return float(resident_bytes()), 0.0
    return float(torch.cuda.max_memory_allocated(device)), float(torch.cuda.max_memory_reserved(device))
