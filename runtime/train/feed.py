"""The microbatches of consecutive steps; for a GPU, the next step's are read and pinned while this one is computed."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from trimaran.models.batch import Microbatch


class BatchFeed:
    """Reads the microbatches of each step, which a GPU gets without waiting: the copy from pinned memory is queued.

    Args:
        read: returns the microbatches of the global batch that begins at a sample of the run.
        samples_per_step: how far the next step's batch is from this one's.
        device: where they are computed. On a CPU nothing is read ahead: it would take the cores of the step.
    """

    def __init__(self, read: Callable[[int], list[Microbatch]], samples_per_step: int, device: torch.device) -> None:
        self._read, self._samples_per_step, self._device = read, samples_per_step, device
        self._thread: ThreadPoolExecutor | None = None
        if device.type == "cuda":
            # A thread starts on GPU 0, where pinning would open a context of every rank of the host.
            self._thread = ThreadPoolExecutor(1, "batches", torch.cuda.set_device, (device,))
        self._ahead: dict[int, Future[list[Microbatch]]] = {}

    def at(self, consumed_samples: int) -> list[Microbatch]:
        """Return the microbatches of the step at this position, and start to read the next step's.

        Raises what reading them raises.
        """
        if self._thread is None:
            return self._read(consumed_samples)
        following = consumed_samples + self._samples_per_step
        mine = self._ahead.get(consumed_samples) or self._thread.submit(self._read_pinned, consumed_samples)
        self._ahead = {following: self._thread.submit(self._read_pinned, following)}
        return mine.result()

    def _read_pinned(self, consumed_samples: int) -> list[Microbatch]:
        return pinned(self._read(consumed_samples), self._device)

    def close(self) -> None:
        """End the thread that reads ahead."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


def pinned(batches: Sequence[Microbatch], device: torch.device) -> list[Microbatch]:
    """Return the microbatches in pinned memory where `device` is a GPU, else unchanged."""
    return [batch.pin() for batch in batches] if device.type == "cuda" else list(batches)
