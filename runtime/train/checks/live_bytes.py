"""LiveBytes: counts the bytes of the tensors that live, at every operation, on a device or without one."""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Phase:
    """A part of a step.

    Attributes:
        peak: the most bytes that lived after one of its operations.
        transit: of them, those of the storages that `LiveBytes.watch` was given.
    """

    name: str
    peak: int = 0
    transit: int = 0


class LiveBytes(TorchDispatchMode):
    """Inside the block, counts every storage once, from the operation that makes it until its last tensor is gone.

    What an operation takes and gives back before it returns is not seen, nor is what an allocator rounds up.

    Args:
        outside: tensors from before the block that its operations read and that are not counted.

    Attributes:
        phases: what `begin` has begun, in order.
    """

    def __init__(self, outside: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._outside = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in outside)}
        self._living: dict[int, tuple[weakref.ref[UntypedStorage], int]] = {}  # with the bytes that are counted for it
        self._bytes = 0
        self._watched: dict[int, UntypedStorage] = {}
        self.phases = [Phase("start")]

    @property
    def now(self) -> int:
        """Bytes that live now."""
        return self._bytes + self._bytes_of_watched()

    def begin(self, name: str) -> None:
        """Begin a phase, to which later operations belong."""
        self.phases.append(Phase(name))
        self._note()

    def watch(self, storages: Iterable[UntypedStorage]) -> None:
        """Count these storages by the size that they have at each operation, for it changes. They must live on."""
        for storage in storages:
            self._forget(id(storage))
            self._watched[id(storage)] = storage

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler, a second, to keep it from a method that nobody compiles

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and count what it returns."""
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # asked of FakeTensors more often than all else
            return result
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
            elif isinstance(each, list):
                for tensor in each:
                    self._count(tensor.untyped_storage())
        self._note()
        return result

    def _count(self, storage: UntypedStorage) -> None:
        key = id(storage)
        if key in self._living or key in self._watched or key in self._outside:
            return
        size = storage.nbytes()
        self._living[key] = weakref.ref(storage, lambda _: self._forget(key)), size
        self._bytes += size

    def _forget(self, key: int) -> None:
        _, size = self._living.pop(key, (None, 0))
        self._bytes -= size

    def _note(self) -> None:
        transit = self._bytes_of_watched()
        phase, total = self.phases[-1], self._bytes + transit
        if total > phase.peak:
            phase.peak, phase.transit = total, transit

    def _bytes_of_watched(self) -> int:
        return sum(storage.nbytes() for storage in self._watched.values())
