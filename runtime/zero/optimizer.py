"""The sharded optimizer: ZeRO stage 1, and plain data parallelism as stage 0.

Rajbhandari et al. 2020, section 5.1. Each dp rank keeps optimizer state for its slice of every bucket only. A step sums
each bucket's gradients so that every rank has the total of its slice (started while the last backward pass still runs),
clips by the global norm, runs AdamW on the slice, and gathers the new parameters. float32 parameters are their own main
copy; for lower precision the slice has a float32 copy.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimaran.kernels.adamw import AdamWState
from trimaran.models.parallel.gradient import GradAccumulator
from trimaran.models.parallel.group import (
    Wait,
    all_gather_into,
    all_reduce,
    start_all_reduce,
    start_reduce_scatter_into,
)
from trimaran.models.parallel.shard import ShardPiece, ShardSpec
from trimaran.models.transformer import Stage
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.zero.buckets import Bucket, Segment, build_buckets

_NORM_ROW = 4096
STATE_KEYS = ("weight", "exp_avg", "exp_avg_sq")
ReadRange = Callable[[str, str, ShardSpec, tuple[int, ...], int, int], Tensor]
"""(name, key, shard, local shape, start, stop) -> the flat range of the local shard, from a checkpoint."""


@dataclass(eq=False)
class _BucketState:
    """A bucket with the optimizer state of `kept`, the range that this rank updates, and its pending reduction."""

    bucket: Bucket
    stage_index: int
    kept: slice
    main: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    waiting: int = 0
    wait: Wait | None = None
    steps: list[tuple[Segment, AdamWState]] = field(default_factory=list)


@dataclass(frozen=True)
class AdamWSettings:
    """Hyperparameters that do not change during a run."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class ShardedOptimizer:
    """AdamW over the parameters of this rank's stages, with state sharded over dp (zero_stage 1) or not (0).

    The constructor moves every parameter into flat buckets and gives it a `main_grad`. Gradients are sums over
    microbatches and dp ranks: scale the loss by the global number of tokens.

    Args:
        stages: stage index -> stage, of this rank.
        bucket_bytes: maximum bytes of gradients in a bucket.
    """

    def __init__(
        self, stages: dict[int, Stage], mesh: Mesh, settings: AdamWSettings, *, zero_stage: int, bucket_bytes: int
    ) -> None:
        self._mesh, self._settings, self._sharded = mesh, settings, zero_stage >= 1
        self._kernels = next(iter(stages.values())).context.kernels
        self._states: list[_BucketState] = []
        seen: set[int] = set()
        for index, stage in stages.items():
            # A tied embedding may be one parameter of two stages of this rank; it then belongs to the first.
            parameters = [(name, p) for name, p in stage.named_parameters() if id(p) not in seen]
            seen.update(id(p) for _, p in parameters)
            tied = stage.config.tie_embeddings and mesh.embedding.size > 1
            grad_dtype = torch.float64 if stage.context.dtype == torch.float64 else torch.float32
            groups = (mesh.dp, mesh.expert_dp, mesh.tp)
            for bucket in build_buckets(
                parameters, *groups, grad_dtype=grad_dtype, bucket_bytes=bucket_bytes, tied=tied
            ):
                self._states.append(self._make_state(bucket, index))
        self.num_steps = 0

    def _make_state(self, bucket: Bucket, stage_index: int) -> _BucketState:
        kept = bucket.owned if self._sharded else slice(0, len(bucket.params))
        grads = bucket.grads[kept]
        main = bucket.params[kept] if bucket.params.dtype == bucket.grads.dtype else bucket.params[kept].to(grads.dtype)
        state = _BucketState(bucket, stage_index, kept, main, torch.zeros_like(grads), torch.zeros_like(grads))
        for segment in bucket.segments(kept):
            part = slice(segment.start - kept.start, segment.stop - kept.start)
            step = torch.zeros((), dtype=torch.float32, device=main.device)
            tensors = (main[part], grads[part], state.exp_avg[part], state.exp_avg_sq[part], step)
            copy = bucket.params[segment.start : segment.stop] if main.dtype != bucket.params.dtype else None
            state.steps.append((segment, AdamWState(*tensors, copy)))
        for slot in bucket.slots:
            info = slot.info
            info.on_grad = lambda state=state: self._count(state)
            slot.parameter.register_post_accumulate_grad_hook(_move_to_main_grad)
        return state

    def zero_grad(self) -> None:
        """Clear the gradient buffers."""
        for state in self._states:
            state.bucket.grads.zero_()

    def expect_last_backward(self, stage_index: int) -> None:
        """Announce that the stage's next backward pass is the step's last, so complete buckets may start to reduce."""
        for state in self._states:
            if state.stage_index == stage_index:
                state.waiting = sum(slot.info.uses for slot in state.bucket.slots)
                if state.waiting == 0:
                    self._start_reduction(state)

    def _count(self, state: _BucketState) -> None:
        if state.waiting > 0:
            state.waiting -= 1
            if state.waiting == 0:
                self._start_reduction(state)

    def _start_reduction(self, state: _BucketState) -> None:
        grads, dp = state.bucket.grads, state.bucket.dp
        if self._sharded:
            state.wait = start_reduce_scatter_into(grads[state.kept], grads.view(dp.size, -1), dp)
        else:
            state.wait = start_all_reduce(grads, dp)

    def finish_gradients(self) -> Tensor:
        """Finish every reduction: over dp, over tp where gradients are partial, and between tied embeddings.

        Collective: all ranks of the mesh must enter.

        Returns:
            This rank's part of the squared gradient norm, scalar float64. The sum over the world is the square of the
                global norm.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._states[0].main.device)
        for state in self._states:
            if state.wait is None:  # a tied embedding that another stage finishes, or a parameter without gradient
                self._start_reduction(state)
            assert state.wait is not None
            state.wait()
            state.wait, state.waiting = None, 0
            kept = state.bucket.grads[state.kept]
            if state.bucket.needs_tp_grad_reduce:
                all_reduce(kept, self._mesh.tp)
            if state.bucket.tied:
                all_reduce(kept, self._mesh.embedding)
            total += self._squared_norm(state)
        return total

    def _squared_norm(self, state: _BucketState) -> Tensor:
        """The squared norm of the owned slice.

        Each element of the model is counted by exactly one rank of the world.
        """
        total = torch.zeros((), dtype=torch.float64, device=state.main.device)
        for segment in state.bucket.segments(state.bucket.owned):
            if segment.counted:
                total += squared_norm(state.bucket.grads[segment.start : segment.stop])
        return total

    def step(self, lr: float, grad_factor: float = 1.0) -> None:
        """Take an AdamW step on the kept slices with gradients times `grad_factor`, and gather the new parameters.

        Collective over dp.
        """
        self.num_steps += 1
        settings = self._settings
        shared = {"beta1": settings.beta1, "beta2": settings.beta2, "eps": settings.eps, "grad_factor": grad_factor}
        alike: dict[tuple[bool, float], list[AdamWState]] = {}
        for state in self._states:
            for segment, adam in state.steps:
                alike.setdefault((segment.decay, segment.lr_scale), []).append(adam)
        for (decay, lr_scale), states in alike.items():
            # AdamW subtracts lr * weight_decay: divided by lr_scale, that is the same at every width.
            weight_decay = settings.weight_decay / lr_scale if decay else 0.0
            self._kernels.adamw_(states, lr=lr * lr_scale, weight_decay=weight_decay, **shared)
        self._gather_parameters()

    def _gather_parameters(self) -> None:
        for state in self._states:
            params, dp = state.bucket.params, state.bucket.dp
            if self._sharded:
                all_gather_into(params.view(dp.size, -1), params[state.kept], dp)

    def pieces(self) -> Iterator[ShardPiece]:
        """Yield the weights and moments of this rank's slice, each element of the model from exactly one rank."""
        for state in self._states:
            yield from self._pieces_of(
                state, dict(zip(STATE_KEYS, (state.main, state.exp_avg, state.exp_avg_sq), strict=True))
            )

    def gradient_pieces(self) -> Iterator[ShardPiece]:
        """Yield the reduced gradients of this rank's slice (key "grad") between `finish_gradients` and `zero_grad`."""
        for state in self._states:
            yield from self._pieces_of(state, {"grad": state.bucket.grads[state.kept]})

    def _pieces_of(self, state: _BucketState, tensors: dict[str, Tensor]) -> Iterator[ShardPiece]:
        for slot, start, stop in state.bucket.overlaps(state.bucket.owned):
            if state.bucket.holds(slot):
                for key, tensor in tensors.items():
                    data = tensor[start - state.kept.start : stop - state.kept.start]
                    yield ShardPiece(
                        slot.name, key, data, slot.info.shard, tuple(slot.parameter.shape), start - slot.start
                    )

    def load(self, read: ReadRange, num_steps: int, *, weights_only: bool = False) -> None:
        """Read weights and moments through `read` and refresh the parameters. Collective over dp.

        Args:
            num_steps: optimizer steps taken when the state was stored, for AdamW's bias correction.
            weights_only: leave the moments unchanged, which are zero in a fresh optimizer.
        """
        for state in self._states:
            tensors = dict(zip(STATE_KEYS, (state.main, state.exp_avg, state.exp_avg_sq), strict=True))
            if weights_only:
                tensors = {"weight": state.main}
            for slot, start, stop in state.bucket.overlaps(state.kept):
                for key, tensor in tensors.items():
                    where = (slot.info.shard, tuple(slot.parameter.shape), start - slot.start, stop - slot.start)
                    tensor[start - state.kept.start : stop - state.kept.start].copy_(read(slot.name, key, *where))
            state.bucket.params[state.kept].copy_(state.main)
            for _, adam in state.steps:
                adam.step.fill_(num_steps)
        self.num_steps = num_steps
        self._gather_parameters()

    def state_bytes(self) -> dict[str, int]:
        """Bytes on this rank: `parameters`, `gradients`, and `optimizer` (moments, and copied main parameters)."""
        sizes = {"parameters": 0, "gradients": 0, "optimizer": 0}
        for state in self._states:
            bucket = state.bucket
            sizes["parameters"] += bucket.params.nbytes
            sizes["gradients"] += bucket.grads.nbytes
            copies = [state.exp_avg, state.exp_avg_sq] + (
                [state.main] if state.main.dtype != bucket.params.dtype else []
            )
            sizes["optimizer"] += sum(tensor.nbytes for tensor in copies)
        return sizes


def squared_norm(x: Tensor) -> Tensor:
    """Return the sum of squares of x [n] as a float64 scalar on its device.

    Rows of 4096 are summed in x's dtype and the row sums in float64. torch sums float32 sequentially on a CPU, which
    loses four digits over ten million elements, and a different amount at every layout.
    """
    whole = len(x) // _NORM_ROW * _NORM_ROW
    rows = torch.linalg.vector_norm(x[:whole].view(-1, _NORM_ROW), dim=1).double()
    total: Tensor = rows.square().sum() + torch.linalg.vector_norm(x[whole:]).double().square()
    return total


def clip_factor(grad_norm: float, max_grad_norm: float) -> float:
    """Return the factor that reduces the gradients to a norm of at most `max_grad_norm` (0: no clipping)."""
    if max_grad_norm == 0.0 or not math.isfinite(grad_norm):
        return 1.0
    return min(1.0, max_grad_norm / (grad_norm + 1e-6))


def _move_to_main_grad(parameter: Tensor) -> None:
    """Add the gradient that autograd left in `.grad` to the flat buffer; it is None where the layer added it."""
    grad, parameter.grad = parameter.grad, None
    if grad is not None:
        gradient = GradAccumulator(parameter)
        gradient.total().add_(grad)
        gradient.finish()
