"""How the ranks of a start meet: the store that rank 0 serves, how the others learn its address from each launcher, and words exchanged through it.

Only rank 0 chooses a port, the one that the kernel gives it, and tells it; nobody guesses one. Its socket is bound to
one address of the node.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from trimaran.launchers.env.rank_env import RankEnv, resolve
from trimaran.launchers.rendezvous.mpi import MPIWorld
from trimaran.launchers.rendezvous.network import (
    AddressError,
    address_towards,
    interface_address,
    reachable_address,
    wait_until_open,
)
from trimaran.runtime.spec import LauncherSection

_POLL_S = 0.05


class Meeting:
    """What the ranks of a start share before there is a process group.

    Args:
        rank_env: this rank's.
        store: of this start alone; the process group and the tether use it too.
        address: of this node, on the interface that leads to the others.
        served: what `store` is a part of; None for a process by itself.
        notice: the file in which rank 0's address stands, for ranks that have not come yet.
    """

    def __init__(
        self, rank_env: RankEnv, store: Store, address: str, served: TCPStore | None = None, notice: Path | None = None
    ) -> None:
        self.rank_env, self.store, self.address, self.served = rank_env, store, address, served
        self._notice, self._exchanges = notice, 0

    def call_roll(self, timeout_s: float) -> list[int]:
        """Return the ranks that have not come within that many seconds of rank 0's call. Every rank that comes must call it."""
        self.store.set(f"here/{self.rank_env.rank}", "")
        if self.rank_env.rank == 0:
            deadline = time.monotonic() + timeout_s
            absent = list(range(1, self.rank_env.world_size))
            while absent and time.monotonic() < deadline:
                absent = [rank for rank in absent if not self.store.check([f"here/{rank}"])]
                time.sleep(_POLL_S)
            self.store.set("absent", json.dumps(absent))
            # Rank 0, which serves the store, may leave after this.
            self.store.wait([f"heard/{rank}" for rank in range(1, self.rank_env.world_size) if rank not in absent])
            return absent
        absent = list(json.loads(self.wait_for("absent")))
        self.store.set(f"heard/{self.rank_env.rank}", "")
        return absent

    def close_door(self) -> None:
        """Take the notice down: nobody is expected any more, and a later start must not read it."""
        if self._notice is not None and self.rank_env.rank == 0:
            self._notice.unlink(missing_ok=True)

    def gather(self, text: str) -> list[str]:
        """Return every rank's text, in rank order. Every rank must call it, equally often; bounded by the store's time-out."""
        self._exchanges += 1
        name = f"gather-{self._exchanges}"
        self.store.set(f"{name}/{self.rank_env.rank}", text)
        if self.rank_env.rank == 0:
            texts = [self.store.get(f"{name}/{rank}").decode() for rank in range(self.rank_env.world_size)]
            self.store.set(name, json.dumps(texts))
        return list(json.loads(self.store.get(name).decode()))

    def wait_for(self, name: str) -> str:
        """Return what rank 0 sets under `name`, however long that takes it; its death ends the wait with an error.

        Raises:
            torch.distributed.DistError: rank 0 is gone.
        """
        pause_s = _POLL_S
        while not self.store.check([name]):
            time.sleep(pause_s)
            pause_s = min(1.0, 1.2 * pause_s)  # hundreds of ranks may ask
        return self.store.get(name).decode()

    def leave(self) -> None:
        """Part in good order: rank 0, which may serve the store, stays until the others need it no more. Every rank must call it."""
        if self.rank_env.rank:
            self.store.set(f"left/{self.rank_env.rank}", "")
        else:
            self.store.wait([f"left/{rank}" for rank in range(1, self.rank_env.world_size)])


def meet(
    rank_env: RankEnv,
    environment: Mapping[str, str],
    section: LauncherSection,
    folder: Path,
    world: MPIWorld | None = None,
) -> Meeting:
    """Join the other ranks of this start; every rank must call it.

    Args:
        environment: the launcher's; torchrun names its store in it.
        folder: shared by all nodes; in a Slurm step rank 0 leaves its address there.
        world: of mpi4py, where MPI started the ranks.

    Raises:
        AddressError: rank 0 was not found within launcher.start_timeout_s seconds; the message names the address that
            was tried.
    """
    if rank_env.world_size == 1 and rank_env.launcher != "torchrun":
        return meet_nobody()
    notice = folder / f".meet-{rank_env.start}.json"
    if rank_env.launcher == "torchrun":
        store = _torchruns_store(rank_env, environment, section)
    elif world is not None:
        store = _told_by_mpi(rank_env, environment, section, world)
    else:
        store = _told_by_file(rank_env, environment, section, notice)
    address = interface_address(section.interface) if section.interface else address_towards(store.host)
    store.set_timeout(timedelta(seconds=section.timeout_s))
    return Meeting(rank_env, PrefixStore(rank_env.start, store), address, store, notice)


def meet_nobody() -> Meeting:
    """Return the meeting of a process that is a rank by itself."""
    return Meeting(resolve({}, "single"), HashStore(), "127.0.0.1")


def _torchruns_store(rank_env: RankEnv, environment: Mapping[str, str], section: LauncherSection) -> TCPStore:
    """The agent's store, or, where the ranks shall make their own, that of rank 0 at the address that all of them were told."""
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if rank_env.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return serve_store(host, port)
    return connect_store(host, port, section.start_timeout_s, "the store of torchrun (MASTER_ADDR, MASTER_PORT)")


def _told_by_mpi(
    rank_env: RankEnv, environment: Mapping[str, str], section: LauncherSection, world: MPIWorld
) -> TCPStore:
    if rank_env.rank == 0:
        store = _open(rank_env, environment, section)
        world.share(json.dumps([store.host, store.port]))
        return store
    address, port = json.loads(world.share(""))
    return connect_store(address, port, section.start_timeout_s, "the store of rank 0")


def _told_by_file(rank_env: RankEnv, environment: Mapping[str, str], section: LauncherSection, file: Path) -> TCPStore:
    """Through a file of the run folder: Slurm gives its tasks no means to exchange a word."""
    if rank_env.rank == 0:
        store = _open(rank_env, environment, section)
        nonce = secrets.token_hex(8)
        store.set("nonce", nonce)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(
            json.dumps({"address": store.host, "port": store.port, "node": rank_env.node, "nonce": nonce}),
            encoding="utf-8",
        )
        temporary.chmod(0o600)
        os.replace(temporary, file)
        return store
    deadline = time.monotonic() + section.start_timeout_s
    problem = f"rank 0 has not left its address in {file}"
    while time.monotonic() < deadline:
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            patience_s = min(3.0, section.start_timeout_s)
            store = connect_store(
                told["address"], told["port"], patience_s, f"the store of rank 0 on node {told['node']}"
            )
            if store.check(["nonce"]) and store.get("nonce").decode() == told["nonce"]:
                return store
            problem = f"{told['address']}:{told['port']} serves another run"
        except FileNotFoundError:
            pass
        # A file that a killed start of this name has left, perhaps, whose port another program has by now: rank 0 will
        # replace it.
        except (AddressError, RuntimeError) as error:
            problem = str(error)
        time.sleep(_POLL_S)
    raise AddressError(
        f"rank {rank_env.rank} on node {rank_env.node} has not met rank 0 within {section.start_timeout_s:.0f} s: {problem}; train.output_dir must be "
        "on a file system that all nodes share, and launcher.start_timeout_s long enough for the slowest node to import torch"
    )


def _open(rank_env: RankEnv, environment: Mapping[str, str], section: LauncherSection) -> TCPStore:
    """Serve a store at an address of this node that the others reach, on a port that the kernel chooses."""
    one_node = rank_env.local_world_size == rank_env.world_size
    return serve_store(reachable_address(environment, interface=section.interface, one_node=one_node), 0)


def serve_store(address: str, port: int) -> TCPStore:
    """Serve a store at one address of this node, where torch's own would listen on all of them; port 0 lets the kernel choose one.

    Raises:
        AddressError: the address is not this node's, or the port is taken.
    """
    try:
        listener = socket.create_server((address, port), backlog=1024)
    except OSError as error:
        raise AddressError(
            f"this node can't listen at {address}:{port}: {os.strerror(error.errno or 0)}; see launcher.interface"
        ) from error
    host, port = listener.getsockname()[:2]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def connect_store(host: str, port: int, timeout_s: float, what: str) -> TCPStore:
    """Connect to a store, `what` in words, once something listens there.

    Raises:
        AddressError: nothing did in that many seconds.
    """
    address = wait_until_open(host, port, timeout_s, what)
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
