"""Collectives among the CPU ranks of one host through shared memory; gloo only sets them up.

gloo moves every byte through the loopback's TCP stack. Here each rank copies its operand into a slot, wakes its peers
through a socket, and sums the peers' slots, in rank order, so that all ranks get the same bits.
"""

import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_FOLDER = Path("/dev/shm")
_SLOT_BYTES = 1 << 20  # fits a core's second-level cache; longer tensors go in chunks
_PATH_BYTES = 256
_WAKE = b"\1"


class SharedMemory:
    """Two slots per rank and a socket per pair of ranks, from `connect`. Every method is collective over the group.

    Two slots are enough: before a rank fills slot `k % 2`, every peer has started exchange `k - 1`, which it does only
    after it has read all of exchange `k - 2`.
    """

    def __init__(self, rank: int, names: list[str], memory: Tensor, sockets: list[socket.socket | None]) -> None:
        self.rank, self.size = rank, len(names)
        self._names, self._memory, self._sockets = names, memory, sockets
        self._count = 0
        self._pending: Tensor | None = None  # whose sum over the ranks is to come
        self._views: dict[tuple[int, int, torch.dtype, int], Tensor] = {}

    @staticmethod
    def connect(
        process_group: dist.ProcessGroup, rank: int, names: list[str], timeout_s: float
    ) -> "SharedMemory | None":
        """Return the shared memory of a gloo group; None unless all its ranks share one /dev/shm with enough room.

        Args:
            rank: this rank's index in the group.
            names: a readable name of each rank, for messages.
            timeout_s: bound of every wait for a peer.
        Collective over the group: all ranks get shared memory, or none.
        """
        folder = _agree_on_folder(process_group, rank, len(names))
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        memory: Tensor | None = None
        try:
            if folder is not None:
                try:
                    memory = _map_slots(folder / "slots", len(names))
                    server.bind(str(folder / f"{rank}.socket"))
                    server.listen(len(names))
                except OSError:
                    memory = None
            if not _all_agree(process_group, memory is not None):
                return None
            assert folder is not None
            assert memory is not None
            sockets = _connect_pairs(folder, server, rank, names, timeout_s)
            _all_agree(process_group, True)  # a barrier: afterwards every rank has opened the files of the folder
            return SharedMemory(rank, names, memory, sockets)
        finally:
            server.close()
            if folder is not None and rank == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Close the sockets; the memory is freed with its last view."""
        for peer in self._sockets:
            if peer is not None:
                peer.close()

    def start_all_reduce(self, x: Tensor) -> Callable[[], None]:
        """Publish `x` [contiguous]; the returned call waits for the peers and writes the sum to `x`."""
        if x.numel() * x.element_size() > _SLOT_BYTES:
            self._all_reduce_chunks(x)
            return lambda: None
        flat = x.view(-1)
        self._publish(flat)
        self._pending = flat
        return partial(self._finish_all_reduce, flat)

    def _finish_all_reduce(self, flat: Tensor) -> None:
        if self._pending is flat:
            self._pending = None
            self._sum_into(flat, self._collect(flat.dtype, flat.numel()))

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """Fill `out` [size, n] with every rank's `x` [n]; both contiguous."""
        step = _SLOT_BYTES // x.element_size()
        for first in range(0, x.numel(), step):
            part = slice(first, min(first + step, x.numel()))
            self._publish(x[part])
            for source, view in enumerate(self._collect(x.dtype, part.stop - part.start)):
                out[source, part].copy_(x[part] if source == self.rank else view)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """Fill `out` [n] with the sum over ranks of row `rank` of their `x` [size, n]; both contiguous."""
        step = _SLOT_BYTES // (x.element_size() * self.size)
        for first in range(0, x.shape[1], step):
            part = slice(first, min(first + step, x.shape[1]))
            width = part.stop - part.start
            self._publish(x[:, part])
            rows = [view.view(self.size, width)[self.rank] for view in self._collect(x.dtype, width * self.size)]
            self._sum_into(out[part], rows)

    def _all_reduce_chunks(self, x: Tensor) -> None:
        for chunk in x.view(-1).split(_SLOT_BYTES // x.element_size()):
            self._publish(chunk)
            self._sum_into(chunk, self._collect(chunk.dtype, chunk.numel()))

    def _sum_into(self, out: Tensor, views: list[Tensor]) -> None:
        if self.size == 1:
            out.copy_(views[0])
            return
        torch.add(views[0], views[1], out=out)
        for view in views[2:]:
            out.add_(view)

    def _view(self, rank: int, dtype: torch.dtype, numel: int) -> Tensor:
        key = (rank, self._count % 2, dtype, numel)
        if key not in self._views:
            with torch.inference_mode(False):  # sampling may make it, and training writes it later
                self._views[key] = self._memory[rank, self._count % 2, : numel * dtype.itemsize].view(dtype)
        return self._views[key]

    def _publish(self, x: Tensor) -> None:
        """Copy `x` into this rank's next slot and wake the peers."""
        if self._pending is not None:  # a second exchange at a time would overwrite slots that peers still read
            self._finish_all_reduce(self._pending)
        self._count += 1
        self._view(self.rank, x.dtype, x.numel()).view(x.shape).copy_(x)
        gone: OSError | None = None
        for index, peer in enumerate(self._sockets):
            if peer is not None:
                try:
                    peer.send(_WAKE)
                except OSError as error:  # still wake the others, so that they find the lost rank themselves
                    gone = error
                    gone.add_note(f"{self._names[self.rank]} lost {self._names[index]} in a shared-memory exchange")
        if gone is not None:
            raise RuntimeError("; ".join(gone.__notes__)) from gone

    def _collect(self, dtype: torch.dtype, numel: int) -> list[Tensor]:
        """Wait for every peer's slot of this exchange; return all ranks' slots in rank order."""
        for index, peer in enumerate(self._sockets):
            if peer is None:
                continue
            pair = f"{self._names[self.rank]} waits for {self._names[index]}"
            who = f"{pair} in a shared-memory exchange of {numel} {dtype}"
            try:
                if not peer.recv(1):
                    raise RuntimeError(f"{who}: that rank is gone")
            except BlockingIOError as error:
                raise RuntimeError(f"{who}: no answer within the time-out") from error
            except ConnectionError as error:
                raise RuntimeError(f"{who}: {error}") from error
        return [self._view(rank, dtype, numel) for rank in range(self.size)]


def _all_agree(process_group: dist.ProcessGroup, yes: bool) -> bool:
    flag = torch.tensor([int(yes)])
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=process_group)
    return bool(flag.item())


def _agree_on_folder(process_group: dist.ProcessGroup, rank: int, size: int) -> Path | None:
    """Return the path of a private folder with the slots' file, which rank 0 creates; None if it can't."""
    message = torch.zeros(_PATH_BYTES, dtype=torch.uint8)
    if rank == 0:
        folder = ""
        try:
            folder = tempfile.mkdtemp(prefix="trimaran-", dir=_FOLDER)
            with open(Path(folder) / "slots", "wb") as file:
                # Reserves the space, so that a full /dev/shm is an error here and not a SIGBUS later.
                os.posix_fallocate(file.fileno(), 0, size * 2 * _SLOT_BYTES)
            message[: len(folder)] = torch.tensor(list(folder.encode()), dtype=torch.uint8)
        except OSError:
            message.zero_()
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
    dist.broadcast(message, group=process_group, group_src=0)
    path = bytes(message.tolist()).rstrip(b"\0").decode()
    return Path(path) if path else None


def _map_slots(path: Path, size: int) -> Tensor:
    num_bytes = size * 2 * _SLOT_BYTES
    if path.stat().st_size != num_bytes:
        raise OSError(f"{path} is not the slots of {size} ranks")
    return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8).view(size, 2, _SLOT_BYTES)


def _connect_pairs(
    folder: Path, server: socket.socket, rank: int, names: list[str], timeout_s: float
) -> list[socket.socket | None]:
    sockets: list[socket.socket | None] = [None] * len(names)
    for peer in range(rank):
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.connect(str(folder / f"{peer}.socket"))
        link.sendall(bytes([rank]))
        sockets[peer] = link
    server.settimeout(timeout_s)
    for _ in range(rank + 1, len(names)):
        try:
            link, _address = server.accept()
            link.settimeout(timeout_s)
            sockets[link.recv(1)[0]] = link
        except (TimeoutError, IndexError) as error:
            missing = [names[peer] for peer in range(rank + 1, len(names)) if sockets[peer] is None]
            raise RuntimeError(
                f"{names[rank]} waits for {', '.join(missing)} to open shared memory: no answer within the time-out"
            ) from error
        link.settimeout(None)
    for socket_ in sockets:
        if socket_ is not None:
            # The kernel's time-out: Python's would poll before every receive.
            seconds, fraction = divmod(timeout_s, 1)
            socket_.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(fraction * 1e6))
            )
    return sockets
