"""One number for each of many documents, by forward passes at any layout: log-probabilities, or scores."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimaran.models.batch import Microbatch
from trimaran.models.criterion import Criterion, Head
from trimaran.models.parallel.group import all_reduce
from trimaran.models.transformer import Stage, in_eval_mode
from trimaran.runtime.finetune.data.loader import ExampleBatch, ExampleLoader
from trimaran.runtime.finetune.data.packing import one_a_row, pack, row_multiple
from trimaran.runtime.finetune.documents import Documents
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.pipeline.executor import Executor
from trimaran.runtime.pipeline.passes import add_communication, validate
from trimaran.runtime.pipeline.schedule import forward_only
from trimaran.runtime.pipeline.transport import P2PTransport
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.pipeline import placement_of
from trimaran.runtime.train.train_context import TrainContext

ReadDocuments = Callable[[Head, Tensor, ExampleBatch], Tensor]
"""(head, hidden, batch) -> one number of each document [documents], float64."""
_PADDING: Final = 0


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """What this rank needs for forward passes alone."""

    spec: RunSpec
    mesh: Mesh
    stages: dict[int, Stage]
    executor: Executor

    @classmethod
    def of(cls, train_context: TrainContext) -> "ForwardPass":
        """Return that of a rank that trains; both share the weights."""
        context = train_context
        return cls(context.spec, context.mesh, context.stages, context.evaluator)

    @classmethod
    def build(cls, spec: RunSpec, mesh: Mesh, stages: dict[int, Stage]) -> "ForwardPass":
        """Return that of a rank which holds weights and trains nothing."""
        schedule = add_communication(forward_only(placement_of(spec), spec.num_microbatches))
        validate(schedule, num_stages=spec.num_stages, num_microbatches=spec.num_microbatches)
        context = next(iter(stages.values())).context
        transport = P2PTransport.of(mesh, schedule.placement, spec.transformer, context)
        return cls(spec, mesh, stages, Executor(stages, schedule.actions[mesh.pp.rank], transport, loss_weight=1.0))


@dataclass
class _Collector:
    """Keeps a number of each document, and has no loss."""

    read: ReadDocuments
    names: Sequence[str] = ()
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, head: Head, hidden: Tensor, batch: Microbatch) -> Tensor:
        assert isinstance(batch, ExampleBatch), type(batch)
        self.found.append((batch.document_numbers, self.read(head, hidden, batch).detach()))
        return hidden.new_zeros(())

    def take_sums(self) -> Tensor:
        return torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def document_values(forward: ForwardPass, documents: Documents, read: ReadDocuments) -> npt.NDArray[np.float64]:
    """Return a number of each document [documents], the same on all ranks. Collective over the world.

    The weights are those of the stages, dropout is off. At one layout the result has the same bits every time.
    """
    spec, mesh = forward.spec, forward.mesh
    device = forward.executor.transport.device
    values = torch.zeros(len(documents), dtype=torch.float64, device=device)
    if not len(documents):
        return values.cpu().numpy()
    loader = _loader(spec, documents, mesh)
    collector = _Collector(read)
    with in_eval_mode(forward.stages.values()), using_criterion(forward.stages.values(), collector):
        for first in range(0, loader.num_samples, spec.train.global_batch_size):
            forward.executor.run(loader.microbatches(first))
            for numbers, found in collector.found if mesh.tp.rank == 0 else ():
                values[numbers] = found.to(device)
            collector.found.clear()
    # Each document is on one rank, so that the sum adds zeros to it.
    return all_reduce(values, mesh.world).cpu().numpy()


def _loader(spec: RunSpec, documents: Documents, mesh: Mesh) -> ExampleLoader:
    packs = spec.finetune is None or spec.finetune.packing == "documents"
    return ExampleLoader(
        documents,
        pack(documents.example_lengths, spec.train.seq_len) if packs else one_a_row(len(documents)),
        seq_len=spec.train.seq_len,
        global_batch_size=spec.train.global_batch_size,
        micro_batch_size=spec.train.micro_batch_size,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        seed=spec.seed,
        padding_id=_PADDING,
        shuffle=False,
        repeats=False,
        row_multiple=row_multiple(spec.parallel.tp),
    )


@contextmanager
def using_criterion(stages: Iterable[Stage], criterion: Criterion) -> Iterator[None]:
    """Have the last stage make its loss by another criterion inside the block."""
    last = [stage for stage in stages if stage.is_last]
    before = [stage.criterion for stage in last]
    for stage in last:
        stage.criterion = criterion
    try:
        yield
    finally:
        for stage, former in zip(last, before, strict=True):
            stage.criterion = former
