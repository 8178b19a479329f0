"""Gradients of which every rank holds its shard: ZeRO stages 2 and 3 (Rajbhandari et al. 2020, section 5.2).

A microbatch's gradients of a bucket exist in a transit buffer, from the first block of its backward pass (or of its W)
to the last. Then they are reduce-scattered and added to the shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimaran.models.boundary import EMBEDDING
from trimaran.models.parallel.group import Wait, all_reduce, start_reduce_scatter_into
from trimaran.runtime.mesh import Sharding
from trimaran.runtime.zero.buckets import Bucket


@dataclass(eq=False)
class _Transit:
    """A buffer for whole gradients of one bucket at a time."""

    grads: Tensor
    index: int | None = None
    wait: Wait | None = None


class ShardedGradients:
    """Gradient shards of every bucket, and two transit buffers: one fills while the other one is reduced.

    Args:
        num_microbatches: of a step.

    Attributes:
        kept: by bucket, the gradients of the slice that this rank updates; valid after `finish`.
    """

    def __init__(self, buckets: Sequence[Bucket], num_microbatches: int) -> None:
        self._buckets, self._num_microbatches = buckets, num_microbatches
        self.kept = [bucket.new_grads(bucket.kept.stop - bucket.kept.start) for bucket in buckets]
        pools: dict[Sharding, list[_Transit]] = {}
        for bucket in buckets:
            if bucket.sharding not in pools:
                alike = sorted((b for b in buckets if b.sharding is bucket.sharding), key=lambda b: -b.length)
                pools[bucket.sharding] = [_Transit(each.new_grads(each.length)) for each in alike[:2]]
        self._pools = list(pools.values())
        self._pool_of = [pools[bucket.sharding] for bucket in buckets]
        self._open: dict[int, tuple[_Transit, int]] = {}  # bucket -> its buffer, and the blocks that are to come
        self._missing = [0] * len(buckets)

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards."""
        return sum(grads.nbytes for grads in self.kept)

    @property
    def transit_bytes(self) -> int:
        """Bytes of the transit buffers."""
        return sum(transit.grads.nbytes for pool in self._pools for transit in pool)

    def begin_step(self) -> None:
        """Clear the gradients."""
        for grads in self.kept:
            grads.zero_()
        self._missing = [len(bucket.blocks) * self._num_microbatches for bucket in self._buckets]

    def before_block(self, index: int) -> None:
        """A block of bucket `index` adds to its gradients next."""
        if index not in self._open:
            bucket, transit = self._buckets[index], self._take(index)
            transit.grads[: bucket.length].zero_()
            bucket.attach(transit.grads)
            self._open[index] = transit, bucket.blocks_at_once

    def after_block(self, index: int) -> None:
        """A block of bucket `index` has added a microbatch's gradients. Collective over dp."""
        transit, to_come = self._open[index]
        self._missing[index] -= 1
        if to_come > 1:
            self._open[index] = transit, to_come - 1
            return
        del self._open[index]
        bucket = self._buckets[index]
        bucket.attach(None)
        shard, grads = bucket.sharding.shard, transit.grads[: bucket.length]
        transit.wait = start_reduce_scatter_into(grads[bucket.kept], grads.view(shard.size, -1), shard)

    def finish(self) -> None:
        """Finish every reduction. Collective over dp."""
        assert not any(self._missing), "every block has the gradients of every microbatch"
        for pool in self._pools:
            for transit in pool:
                self._settle(transit)
        for bucket, kept in zip(self._buckets, self.kept, strict=True):
            all_reduce(kept, bucket.sharding.replica)

    def _take(self, index: int) -> _Transit:
        """Return a buffer that is long enough; first add what it still holds to its shard."""
        pool, bucket = self._pool_of[index], self._buckets[index]
        busy = [transit for transit, _ in self._open.values()]
        fitting = [each for each in pool if len(each.grads) >= bucket.length and each not in busy]
        transit = min(fitting, key=lambda each: len(each.grads))
        # The rows of the embedding are open together with what else is in that block: it leaves them the longer buffer.
        if EMBEDDING not in bucket.blocks:  # one whose reduction has ended, else the one whose reduction began first
            transit = next((each for each in fitting if each.wait is None), fitting[0])
        self._settle(transit)
        transit.index = index
        pool.remove(transit)
        pool.append(transit)
        return transit

    def _settle(self, transit: _Transit) -> None:
        """Add a reduced buffer to its shard, if that is pending."""
        if transit.wait is not None and transit.index is not None:
            transit.wait()
            self.kept[transit.index].add_(transit.grads[self._buckets[transit.index].kept])
            transit.wait = transit.index = None
