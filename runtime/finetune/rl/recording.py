"""Numbers of every answer's token by forward passes at any layout: log-probabilities, and values of a value head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimaran.kernels.cross_entropy import IGNORED_LABEL
from trimaran.models.batch import Microbatch
from trimaran.models.criterion import Head
from trimaran.models.parallel.group import all_reduce
from trimaran.models.transformer import Stage, in_eval_mode
from trimaran.runtime.finetune.forward import using_criterion
from trimaran.runtime.finetune.rl.batches import Rows
from trimaran.runtime.finetune.rl.criterion import spread_values
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.pipeline.executor import Executor
from trimaran.runtime.spec import RunSpec


@dataclass(eq=False)
class Recorder:
    """Keeps numbers of each answer's token, in place of a loss.

    Args:
        reads_values: whether those of the score head are kept too.

    Attributes:
        found: number of a microbatch's first row -> [1 or 2, micro_batch, width] float64: log-probabilities, values.
            Empty on ranks without the last stage.
    """

    temperature: float
    reads_values: bool = False
    names: Sequence[str] = ()
    found: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, head: Head, hidden: Tensor, batch: Microbatch) -> Tensor:
        """Record a microbatch; return 0."""
        found = [head.token_log_probs(hidden, batch, self.temperature)]
        if self.reads_values:
            found.append(spread_values(head, hidden, batch.labels != IGNORED_LABEL).to(found[0].dtype))
        self.found[batch.first_sample] = torch.stack(found).detach().double()
        return found[0].new_zeros(())

    def take_sums(self) -> Tensor:
        """Return nothing: [0]."""
        return torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class ForwardOnly:
    """What a rank needs for forward passes over rows of answers.

    Args:
        executor: of a schedule of forwards.
    """

    spec: RunSpec
    mesh: Mesh
    stages: Mapping[int, Stage]
    executor: Executor

    @torch.no_grad()
    def record(self, rows: Rows, recorder: Recorder) -> Tensor:
        """Return what the recorder keeps of every row [1 or 2, samples, width] float64, on the CPU of all ranks.

        Collective over the world.

        Args:
            rows: a whole number of global batches.
        """
        train, mesh = self.spec.train, self.mesh
        samples, width = rows.tokens.shape
        device = self.executor.transport.device
        out = torch.zeros(1 + recorder.reads_values, samples, width, dtype=torch.float64, device=device)
        with in_eval_mode(self.stages.values()), using_criterion(self.stages.values(), recorder):
            for start in range(0, samples, train.global_batch_size):
                mine = share_of(start, train.global_batch_size, mesh)
                self.executor.run(rows.batches(mine, train.micro_batch_size, mine[0], {}))
                for first, values in recorder.found.items() if mesh.tp.rank == 0 else ():
                    out[:, first : first + values.shape[1]] = values
                recorder.found.clear()
        return all_reduce(out, mesh.world).cpu()  # every row is on one rank: zeros are added to it


def share_of(start: int, global_batch_size: int, mesh: Mesh) -> range:
    """Return this dp rank's rows of the global batch that begins at a row."""
    share = global_batch_size // mesh.dp.size
    return range(start + mesh.dp.rank * share, start + (mesh.dp.rank + 1) * share)
