"""The sharded optimizer: what of a model's state is whole on a rank and what is sharded over dp, and a step on it.

    ZeRO stage                     0      1      2      3     (Rajbhandari et al. 2020, section 5)
    moments, main parameters       whole  shard  shard  shard
    gradients                      whole  whole  shard  shard
    parameters                     whole  whole  whole  shard

A step sums every bucket's gradients so that each rank has the total of its slice, clips by the global norm, updates the
slice, and publishes the new parameters. float32 parameters are their own main copy; for lower precision the slice has a
float32 copy.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, UntypedStorage, nn

from trimaran.models.boundary import backward_blocks
from trimaran.models.parallel.group import all_reduce, single
from trimaran.models.parallel.shard import ShardPiece
from trimaran.models.transformer import Stage
from trimaran.runtime.mesh import Mesh, Sharding
from trimaran.runtime.optimizer.adamw import AdamW, AdamWSettings, FlatShard, UpdateRange
from trimaran.runtime.pipeline.action import Action, ActionKind
from trimaran.runtime.zero.buckets import Bucket, build_buckets
from trimaran.runtime.zero.protocol import ReadRange
from trimaran.runtime.zero.stage1 import FullGradients, FullParameters
from trimaran.runtime.zero.stage2 import ShardedGradients
from trimaran.runtime.zero.stage3 import ShardedParameters, Use

_NORM_ROW = 4096


class Gradients(Protocol):
    """Where gradients are summed: over microbatches, and over dp.

    Attributes:
        kept: by bucket, the gradients of the slice that this rank updates; valid after `finish`.
    """

    kept: list[Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes that are held from step to step."""

    @property
    def transit_bytes(self) -> int:
        """Bytes of buffers for gradients before their reduction."""

    def begin_step(self) -> None:
        """Clear the gradients."""

    def before_block(self, index: int) -> None:
        """A block of bucket `index` adds to its gradients next."""

    def after_block(self, index: int) -> None:
        """A block of bucket `index` has added a microbatch's gradients. May be collective over dp."""

    def finish(self) -> None:
        """Finish every reduction. Collective over dp."""


class ShardedOptimizer:
    """AdamW over the parameters of this rank's stages, and the listener of their blocks.

    The constructor moves every parameter into flat buckets. Gradients are sums over microbatches and dp ranks: scale
    the loss by the global number of tokens.

    Args:
        stages: stage index -> stage, of this rank.
        bucket_bytes: most bytes of gradients in a bucket of several blocks.
        num_microbatches: of a step.
        actions: this rank's list of a step, in whose order stage 3 gathers parameters.
        draw: with stage 3, fills a parameter by its name, for parameters have no memory yet; None keeps them whole.
    """

    description = ""

    def __init__(
        self,
        stages: Mapping[int, Stage],
        mesh: Mesh,
        settings: AdamWSettings,
        *,
        zero_stage: int,
        bucket_bytes: int,
        num_microbatches: int,
        actions: Iterable[Action] = (),
        draw: Callable[[str, nn.Parameter], None] | None = None,
    ) -> None:
        self._mesh = mesh
        first = next(iter(stages.values()))
        alone = Sharding(single("dp"), mesh.dp), Sharding(single("expert_dp"), mesh.expert_dp)
        dp, expert_dp = (mesh.sharding, mesh.expert_sharding) if zero_stage else alone
        tied = first.config.ties_head and mesh.embedding.size > 1
        blocks = {index: stage.blocks() for index, stage in stages.items()}
        made = build_buckets(list(blocks.values()), dp, expert_dp, mesh.tp, bucket_bytes=bucket_bytes, tied=tied)
        is_alone = dp.shard.size == 1  # then a shard is the whole
        assert (draw is not None) == (zero_stage == 3 and not is_alone), "stage 3 draws what it shards"
        self._sharded = None if draw is None else ShardedParameters(made, draw)
        self._parameters = self._sharded or FullParameters(made)
        self._buckets = self._parameters.buckets
        self._gradients: Gradients = (
            FullGradients(self._buckets, num_microbatches)
            if zero_stage < 2 or is_alone
            else ShardedGradients(self._buckets, num_microbatches)
        )
        self._main = [
            kept if kept.dtype == bucket.grad_dtype else kept.to(bucket.grad_dtype)
            for bucket, kept in zip(self._buckets, self._parameters.kept, strict=True)
        ]
        self._rule = AdamW(settings, first.context.kernels, [self._shard(i) for i in range(len(self._buckets))])
        self._indexes = {block: self._buckets_of(block) for own in blocks.values() for block in own}
        self._uses = list(self._uses_of(actions, blocks)) if self._sharded else []
        for stage in stages.values():
            stage.boundary.listener = self

    @property
    def num_steps(self) -> int:
        """Steps taken."""
        return self._rule.num_steps

    @property
    def buckets(self) -> list[Bucket]:
        """The flat buckets of this rank's parameters."""
        return self._buckets

    def _shard(self, index: int) -> FlatShard:
        bucket, main, kept = self._buckets[index], self._main[index], self._parameters.kept[index]
        ranges = [
            UpdateRange(each.start - bucket.kept.start, each.stop - bucket.kept.start, each.decay, each.lr_scale)
            for each in bucket.segments(bucket.kept)
        ]
        return FlatShard(main, self._gradients.kept[index], kept if kept is not main else None, ranges)

    def _buckets_of(self, block: str) -> Use:
        return tuple(index for index, bucket in enumerate(self._buckets) if block in bucket.blocks)

    def _read_in_backward(self, block: str) -> Use:
        return tuple(index for index in self._indexes[block] if self._buckets[index].is_read_in_backward)

    def _uses_of(self, actions: Iterable[Action], blocks: Mapping[int, Iterable[str]]) -> Iterator[Use]:
        """Yield what each block of each action reads, without repetitions in a row."""
        last: Use = ()
        for action in actions:
            uses: list[Use] = []
            if action.kind is ActionKind.F:
                uses = [self._indexes[block] for block in blocks[action.stage]]
            elif action.kind in (ActionKind.B, ActionKind.I):
                uses = [self._read_in_backward(block) for block in backward_blocks(blocks[action.stage])]
            for use in uses:
                if use and use != last:
                    yield use
                    last = use

    # The listener of the blocks.

    def before_forward(self, block: str) -> None:
        """Gather the block's parameters. Collective over dp with stage 3."""
        if self._sharded:
            self._sharded.use(self._indexes[block])

    def after_forward(self, block: str) -> None:
        """Nothing: parameters are freed when the next ones are gathered."""

    def before_backward(self, block: str) -> None:
        """Gather the parameters on which the gradient of the block's input depends. Collective over dp with stage 3."""
        if self._sharded:
            self._sharded.use(self._read_in_backward(block))

    def after_backward(self, block: str) -> None:
        """Nothing: parameters are freed when the next ones are gathered."""

    def before_gradients(self, block: str) -> None:
        """Provide the block's parameters with memory for their gradients."""
        for index in self._indexes[block]:
            self._gradients.before_block(index)

    def after_gradients(self, block: str) -> None:
        """Reduce the gradients of buckets that are complete. Collective over dp."""
        for index in self._indexes[block]:
            self._gradients.after_block(index)

    # A step.

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Clear the gradients; all backward passes of the step run inside the block."""
        self._gradients.begin_step()
        if self._sharded:
            self._sharded.begin(self._uses)
        yield
        if self._sharded:
            self._sharded.begin(())

    def finish_gradients(self) -> Tensor:
        """Finish every reduction: over dp, over tp where gradients are partial, and between tied embeddings.

        Collective: all ranks of the mesh must enter.

        Returns:
            This rank's part of the squared gradient norm, scalar float64. The sum over the world is the square of the
                global norm.
        """
        self._gradients.finish()
        self._sum_partial_gradients()
        total = torch.zeros((), dtype=torch.float64, device=self._main[0].device)
        for bucket, grads in zip(self._buckets, self._gradients.kept, strict=True):
            if bucket.tied:
                all_reduce(grads, self._mesh.embedding)
            for segment in bucket.segments(bucket.stored):
                if segment.counted:
                    total += squared_norm(grads[segment.start - bucket.kept.start : segment.stop - bucket.kept.start])
        return total

    def _sum_partial_gradients(self) -> None:
        """Sum the gradients that are parts of a sum over tp, all in one collective."""
        partial = [
            grads[segment.start - bucket.kept.start : segment.stop - bucket.kept.start]
            for bucket, grads in zip(self._buckets, self._gradients.kept, strict=True)
            for segment in bucket.segments(bucket.kept)
            if segment.is_partial
        ]
        if partial and self._mesh.tp.size > 1:
            total = all_reduce(torch.cat(partial), self._mesh.tp)
            for part, summed in zip(partial, total.split([len(part) for part in partial]), strict=True):
                part.copy_(summed)

    def step(self, lr: float, grad_factor: float = 1.0) -> None:
        """Take a step on the kept slices with gradients times `grad_factor`, and publish the new parameters.

        Collective over dp.
        """
        self._rule.step(lr, grad_factor)
        self._parameters.publish()

    # The state.

    def pieces(self) -> Iterator[ShardPiece]:
        """Yield the weights and moments that this rank stores, each element of the model from exactly one rank."""
        for index, (bucket, main) in enumerate(zip(self._buckets, self._main, strict=True)):
            yield from _pieces_of(bucket, {"weight": main, **self._rule.moments[index]})

    def gradient_pieces(self) -> Iterator[ShardPiece]:
        """Yield the reduced gradients (key "grad") after `finish_gradients`, each element from exactly one rank."""
        for bucket, grads in zip(self._buckets, self._gradients.kept, strict=True):
            yield from _pieces_of(bucket, {"grad": grads})

    def load(self, read: ReadRange, num_steps: int, *, weights_only: bool = False) -> None:
        """Read weights and moments through `read` and publish the parameters. Collective over dp.

        Args:
            num_steps: steps taken when the state was stored.
            weights_only: leave the moments unchanged, which are zero in a fresh optimizer.
        """
        for index, (bucket, main) in enumerate(zip(self._buckets, self._main, strict=True)):
            tensors = {"weight": main, **({} if weights_only else self._rule.moments[index])}
            for slot, start, stop in bucket.overlaps(bucket.kept):
                for key, tensor in tensors.items():
                    where = (slot.info.shard, tuple(slot.parameter.shape), start - slot.start, stop - slot.start)
                    tensor[start - bucket.kept.start : stop - bucket.kept.start].copy_(read(slot.name, key, *where))
            self._parameters.kept[index].copy_(main)
        self._rule.resume_at(num_steps)
        self._parameters.publish()

    def state_bytes(self) -> dict[str, int]:
        """Bytes on this rank: `parameters`, `gradients`, `optimizer` (moments, and copied main parameters), `transit`.

        In transit are buffers for gradients before their reduction, and the parameters that are gathered now.
        """
        moments = sum(tensor.nbytes for own in self._rule.moments for tensor in own.values())
        copies = sum(
            main.nbytes for main, kept in zip(self._main, self._parameters.kept, strict=True) if main is not kept
        )
        return {
            "parameters": self._parameters.num_bytes,
            "gradients": self._gradients.num_bytes,
            "optimizer": moments + copies,
            "transit": self._gradients.transit_bytes + (self._sharded.whole_bytes if self._sharded else 0),
        }

    @property
    def gathered(self) -> list[UntypedStorage]:
        """The memory of gathered parameters, whose size changes; none below stage 3."""
        return self._sharded.storages if self._sharded else []


def _pieces_of(bucket: Bucket, tensors: Mapping[str, Tensor]) -> Iterator[ShardPiece]:
    """Yield the stored parts of `tensors`, each of the bucket's kept slice, by key."""
    for slot, start, stop in bucket.overlaps(bucket.stored):
        if bucket.holds(slot):
            for key, tensor in tensors.items():
                data = tensor[start - bucket.kept.start : stop - bucket.kept.start]
                yield ShardPiece(slot.name, key, data, slot.info.shard, tuple(slot.parameter.shape), start - slot.start)


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
