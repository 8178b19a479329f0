"""What a criterion counts beside its loss, without a wait for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Statistics:
    """Sums of named figures over the units of the microbatches since the last `take`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums: Tensor | None = None

    def add(self, *figures: Tensor) -> None:
        """Add the sum of each figure's values over units [units each], in the order of the names."""
        sums = torch.stack([figure.detach().sum(dtype=torch.float64) for figure in figures])
        assert len(sums) == len(self.names), self.names
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> Tensor:
        """Return the sums [names] float64, zeros where nothing was added, and begin anew."""
        sums, self._sums = self._sums, None
        return torch.zeros(len(self.names), dtype=torch.float64) if sums is None else sums
