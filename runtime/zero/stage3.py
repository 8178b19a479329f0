"""Parameters of which every rank holds its shard: ZeRO stage 3 (Rajbhandari et al. 2020, section 5.3).

Layers keep their Parameters. The storage behind those of a bucket is filled before a block reads them, and freed
after; what autograd has saved of it is filled again for the backward pass. While one block computes, the parameters of
the next one in the schedule's list are gathered.
"""

import ctypes
import mmap
from collections.abc import Callable, Iterable

from torch import Tensor, UntypedStorage, nn

from trimaran.models.parallel.group import Wait, start_all_gather_into
from trimaran.runtime.zero.buckets import Bucket

Use = tuple[int, ...]
"""The buckets that hold one block's parameters."""


class ShardedParameters:
    """Parameter shards of every bucket, and the buckets that are gathered: the block's in use, and the next one's.

    Args:
        buckets: one is taken after the other, so that one is whole at a time.
        draw: fills a parameter, which has no values yet, by its name.

    Attributes:
        kept: by bucket, the slice that this rank updates.
    """

    def __init__(self, buckets: Iterable[Bucket], draw: Callable[[str, nn.Parameter], None]) -> None:
        self.buckets: list[Bucket] = []
        self.kept: list[Tensor] = []
        for bucket in buckets:
            for slot in bucket.slots:
                draw(slot.name, slot.parameter)
            self.buckets.append(bucket)
            self.kept.append(bucket.params[bucket.kept].clone())
            _free(bucket)
        self._whole: dict[int, Wait] = {}  # bucket -> the wait for its gathering
        self._now: Use = ()
        self._list: list[Use] = []
        self._next = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards."""
        return sum(kept.nbytes for kept in self.kept)

    @property
    def whole_bytes(self) -> int:
        """Bytes of the parameters that are gathered now."""
        return sum(self.buckets[index].params.untyped_storage().nbytes() for index in self._whole)

    @property
    def storages(self) -> list[UntypedStorage]:
        """Of every bucket the memory of its gathered parameters, whose size changes."""
        return [bucket.params.untyped_storage() for bucket in self.buckets]

    def begin(self, uses: Iterable[Use]) -> None:
        """Announce what the next calls of `use` will ask for, in order."""
        self._list, self._next, self._now = list(uses), 0, ()

    def use(self, buckets: Use) -> None:
        """Gather `buckets`, start to gather those that are announced next, and free all others. Collective over dp."""
        if not buckets or buckets == self._now:
            return
        following: Use = ()
        if self._list:
            assert self._list[self._next] == buckets, "blocks are used in the order of the list"
            self._next += 1
            following = self._list[self._next] if self._next < len(self._list) else ()
        self._now = buckets
        self._free_all_but({*buckets, *following})
        for index in (*buckets, *following):
            if index not in self._whole:
                self._whole[index] = self._start(index)
            if index in buckets:
                self._whole[index]()
                self._whole[index] = _nothing

    def publish(self) -> None:
        """Free what is gathered, for a step has changed the shards."""
        self._now, self._list = (), []
        self._free_all_but(set())

    def _start(self, index: int) -> Wait:
        bucket = self.buckets[index]
        bucket.params.untyped_storage().resize_(bucket.length * bucket.params.element_size())
        shard = bucket.sharding.shard
        return start_all_gather_into(bucket.params.view(shard.size, -1), self.kept[index], shard)

    def _free_all_but(self, needed: set[int]) -> None:
        for index in [index for index in self._whole if index not in needed]:
            self._whole.pop(index)()
            _free(self.buckets[index])


def _free(bucket: Bucket) -> None:
    storage = bucket.params.untyped_storage()
    if storage.device.type == "cpu":
        _return_pages(storage)
    storage.resize_(0)


def _return_pages(storage: UntypedStorage) -> None:
    """Give the pages inside `storage` back to the system.

    The C library would keep them: a bucket is often smaller than what it maps by itself, and shards that are allocated
    after it pin the heap above it.
    """
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _nothing() -> None:
    """Wait for what is there."""
