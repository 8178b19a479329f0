"""Parameters and gradients that every rank holds whole: ZeRO stages 0 and 1.

Stage 1 (Rajbhandari et al. 2020, section 5.1) shards the optimizer's state: each rank needs the sum of its slice of the
gradients only, and gathers the parameters that the other ranks have updated. Stage 0 is that with shards of one rank.
"""

from collections.abc import Iterable, Sequence

from trimaran.models.parallel.group import (
    Wait,
    all_gather_into,
    all_reduce,
    start_all_reduce,
    start_reduce_scatter_into,
)
from trimaran.runtime.zero.buckets import Bucket


class FullGradients:
    """Gradient buffers of every bucket; a bucket is reduced when its last block has the step's last gradient.

    Args:
        num_microbatches: of a step.

    Attributes:
        kept: by bucket, the gradients of the slice that this rank updates; valid after `finish`.
    """

    def __init__(self, buckets: Sequence[Bucket], num_microbatches: int) -> None:
        self._buckets, self._num_microbatches = buckets, num_microbatches
        self._grads = [bucket.new_grads(bucket.length) for bucket in buckets]
        self.kept = [grads[bucket.kept] for bucket, grads in zip(buckets, self._grads, strict=True)]
        for bucket, grads in zip(buckets, self._grads, strict=True):
            bucket.attach(grads)
        self._missing = [0] * len(buckets)
        self._waits: dict[int, Wait] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(grads.nbytes for grads in self._grads)

    @property
    def transit_bytes(self) -> int:
        """None: gradients are reduced in place."""
        return 0

    def begin_step(self) -> None:
        """Clear the gradients."""
        for grads in self._grads:
            grads.zero_()
        self._missing = [len(bucket.blocks) * self._num_microbatches for bucket in self._buckets]
        self._waits = {}

    def before_block(self, index: int) -> None:
        """A block of bucket `index` adds to its gradients next."""

    def after_block(self, index: int) -> None:
        """A block of bucket `index` has added a microbatch's gradients."""
        self._missing[index] -= 1
        if self._missing[index] == 0:
            self._waits[index] = self._start(index)

    def finish(self) -> None:
        """Finish every reduction. Collective over dp."""
        assert not any(self._missing), "every block has the gradients of every microbatch"
        for index in sorted(self._waits):
            self._waits[index]()
            sharding = self._buckets[index].sharding
            if sharding.shard.size > 1:
                all_reduce(self.kept[index], sharding.replica)

    @property
    def reduced_early(self) -> list[bool]:
        """Of every bucket, whether its reduction has begun."""
        return [index in self._waits for index in range(len(self._buckets))]

    def _start(self, index: int) -> Wait:
        grads, sharding = self._grads[index], self._buckets[index].sharding
        if sharding.shard.size == 1:
            return start_all_reduce(grads, sharding.replica)
        return start_reduce_scatter_into(self.kept[index], grads.view(sharding.shard.size, -1), sharding.shard)


class FullParameters:
    """The parameters of every bucket, which are gathered after each step.

    Attributes:
        kept: by bucket, the slice that this rank updates.
    """

    def __init__(self, buckets: Iterable[Bucket]) -> None:
        self.buckets = list(buckets)
        self.kept = [bucket.params[bucket.kept] for bucket in self.buckets]

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(bucket.params.nbytes for bucket in self.buckets)

    def publish(self) -> None:
        """Gather the slices that the ranks have updated. Collective over dp."""
        for bucket, kept in zip(self.buckets, self.kept, strict=True):
            shard = bucket.sharding.shard
            all_gather_into(bucket.params.view(shard.size, -1), kept, shard)
