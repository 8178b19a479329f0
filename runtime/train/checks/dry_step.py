"""The dry step: what a rank holds during a training step, counted without the other ranks, a GPU or memory.

The rank's own code builds and takes the step over torch's fake process group, whose collectives return at once, on
tensors that have shapes and no numbers: FakeTensors for a run on CPUs; for one on GPUs meta tensors, on which ops take
the GPU's code path and Triton kernels are chosen and not launched.
"""

import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from trimaran.kernels.ahead_of_time import skipping_launches
from trimaran.models.adapter import frozen_bytes
from trimaran.models.batch import Microbatch
from trimaran.models.layers.experts import ExpertMLP
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.pipeline.action import Action, actions_of
from trimaran.runtime.pipeline.transport import P2PTransport
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.checks.live_bytes import LiveBytes
from trimaran.runtime.train.pipeline import placement_of
from trimaran.runtime.train.train_context import (
    accumulate,
    build_mesh_of,
    build_train_context,
    finish_step,
    kernels_of,
)
from trimaran.runtime.zero.optimizer import ShardedOptimizer

_ARCH = 90  # whose tuned sizes the kernels' workspaces have
_REDUCTION, _UPDATE = "end of the reductions", "optimizer step"


@dataclass(frozen=True)
class Peak:
    """The moment of an action, or of what follows the list, at which a rank holds most.

    Args:
        is_compute: whether it is no transfer.
        transit: bytes of ZeRO's buffers for whole gradients, and of gathered parameters.
        activations: bytes of all else but the state.
    """

    name: str
    is_compute: bool
    transit: int
    activations: int


@dataclass(frozen=True)
class StepBytes:
    """What one rank holds in a step, in bytes.

    Args:
        where: the rank and its coordinates.
        state: by part: parameters, gradients, optimizer.
        after: of all tensors, after the step.
        peaks: of every action of the rank's list, then of the end of the reductions and of the optimizer step.
    """

    where: str
    state: dict[str, int]
    after: int
    peaks: list[Peak]

    @property
    def peak(self) -> Peak:
        """The highest peak."""
        return max(self.peaks, key=lambda peak: peak.transit + peak.activations)

    @property
    def total(self) -> int:
        """The most bytes that the rank holds."""
        return sum(self.state.values()) + self.peak.transit + self.peak.activations


class _Delivered(P2PTransport):
    """Transfers that are complete when the next one begins, as those of NCCL are soon."""

    def send(self, action: Action, x: Tensor) -> None:
        """See P2PTransport."""
        self._sends.clear()
        super().send(action, x)


def count_step(
    spec: RunSpec, mesh: Mesh, device: torch.device, *, has_numbers: bool = True, outside: Iterable[Tensor] = ()
) -> StepBytes:
    """Build this rank's training, take a step, and count. Collective over the world.

    Args:
        has_numbers: whether tensors have; where not, every expert gets as many tokens as the others.
        outside: see LiveBytes.
    """
    with LiveBytes(outside) as live:
        train_context = build_train_context(spec, mesh, device, draws_weights=has_numbers, draws_adapters=has_numbers)
        optimizer, executor = train_context.optimizer, train_context.executor
        assert isinstance(optimizer, ShardedOptimizer), "another library's memory is not known"
        for module in (module for stage in train_context.stages.values() for module in stage.modules()):
            if isinstance(module, ExpertMLP) and not has_numbers:
                module.assumes_even_split = True
        if device.type == "meta":
            executor.transport = _Delivered(**vars(executor.transport))
        live.watch(optimizer.gathered)
        batches = [_microbatch(spec, index, device) for index in range(spec.num_microbatches)]
        executor.on_action = lambda action: live.begin(_REDUCTION if action is None else str(action))
        sums = accumulate(train_context, batches, spec.target_tokens_per_step)
        live.begin(_UPDATE)
        norm = 2.0 * (spec.optimizer.max_grad_norm or 1.0)  # is clipped
        finish_step(train_context, [1.0, norm**2, 0.0, 0.0], spec.optimizer.lr, spec.target_tokens_per_step)
        reduced = weakref.ref(sums.untyped_storage())
        del batches, sums
        _wait_until_gone(reduced)
        state = optimizer.state_bytes()
        state["parameters"] += sum(frozen_bytes(stage) for stage in train_context.stages.values())
        buffers = state.pop("transit")  # nothing is gathered after a step
        held = sum(state.values())
        compute = {_REDUCTION, _UPDATE, *(str(action) for action in actions_of(executor.actions) if action.is_compute)}
        peaks = [
            Peak(each.name, each.name in compute, buffers + each.transit, each.peak - each.transit - buffers - held)
            for each in live.phases[1:]
        ]
        return StepBytes(mesh.describe(), state, live.now, peaks)


def dry_step(spec: RunSpec, device: Literal["cpu", "cuda"]) -> StepBytes:
    """Return what this rank of torch's fake process group would hold in a step.

    Args:
        device: of the run; here needs to be none.
    """
    where = _stand_in(device)
    mesh = build_mesh_of(spec, shared_memory=False, has_tags=True, placement=placement_of(spec))
    with _without_numbers(where):
        return count_step(spec, mesh, where, has_numbers=False)


def kernels_without_device(spec: RunSpec, device: Literal["cpu", "cuda"]) -> str:
    """Return which kernels a run on such a device takes, as a phrase. Raises ValueError where its choice can't run."""
    return kernels_of(spec, _stand_in(device))[1]


def _stand_in(device: Literal["cpu", "cuda"]) -> torch.device:
    return torch.device("cpu" if device == "cpu" else "meta")


class _TakesAllRows(TorchDispatchMode):
    """Lets a mask select every row, for without numbers it is not known how many: the embedding's on CPUs."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see LiveBytes

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation."""
        if func is torch.ops.aten.index.Tensor:
            x, (index, *others) = args
            if index is not None and index.dtype == torch.bool and not others:
                return x.new_empty(index.numel(), *x.shape[index.ndim :])
        return func(*args, **(kwargs or {}))


@contextmanager
def _without_numbers(device: torch.device) -> Iterator[None]:
    if device.type == "meta":
        with skipping_launches(_ARCH):
            yield
        return
    from torch._subclasses.fake_tensor import FakeTensorMode  # which imports sympy

    takes_all_rows = _TakesAllRows()  # type: ignore[no-untyped-call]
    with FakeTensorMode(), takes_all_rows, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


def _wait_until_gone(storage: weakref.ref[UntypedStorage]) -> None:
    """Wait, for a second at most, until nothing holds the storage: gloo's thread lets go of it after the reduction."""
    end = time.monotonic() + 1.0
    while storage() is not None and time.monotonic() < end:
        time.sleep(0.001)


def _microbatch(spec: RunSpec, index: int, device: torch.device) -> Microbatch:
    """Return a microbatch of the run's shape, all of token 0."""
    rows, seq_len, labels = spec.train.micro_batch_size, spec.train.seq_len, spec.labels_per_sample

    def zeros(length: int) -> Tensor:
        return torch.zeros(rows, length, dtype=torch.int64, device=device)

    return Microbatch(
        zeros(seq_len), zeros(labels), index * rows, None if spec.transformer.is_causal else zeros(labels)
    )
