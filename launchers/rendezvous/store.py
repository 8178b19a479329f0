"""The rendezvous of a start's ranks: rank 0 serves a store, and the others learn its address from their launcher.

The kernel chooses the port of the store, and rank 0 publishes it; no rank guesses a port. The socket is bound to one
address of the node.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from trimaran.launchers.env.network import (
    AddressError,
    own_address,
    reachable_address,
    wait_for_store,
    wait_until_open,
)
from trimaran.launchers.env.rank_env import RankEnv, read_env
from trimaran.launchers.rendezvous.address_file import AddressFile
from trimaran.runtime.spec import LauncherSection

_POLL_S, _LONGEST_POLL_S = 0.05, 1.0
_ANSWER_S = 3.0


class Rendezvous:
    """What the ranks of a start share before there is a process group.

    Args:
        rank_env: this rank's.
        store: of this start alone; the process group and the failure relay use it too.
        address: of this node, on the interface that leads to the other nodes.
        served: the store that `store` is a part of; None for a single process.
        address_file: the file in which ranks that are still starting find rank 0's address.
    """

    def __init__(
        self,
        rank_env: RankEnv,
        store: Store,
        address: str,
        served: TCPStore | None = None,
        address_file: AddressFile | None = None,
    ) -> None:
        self.rank_env, self.store, self.address, self.served = rank_env, store, address, served
        self._address_file, self._exchanges = address_file, 0

    def barrier(self, timeout_s: float) -> list[int]:
        """Wait for all ranks, and return those that are absent `timeout_s` seconds after the last one came.

        Every rank that has not failed must call it.
        """
        self.store.set(f"here/{self.rank_env.rank}", "")
        if self.rank_env.rank == 0:
            deadline = time.monotonic() + timeout_s
            absent = list(range(1, self.rank_env.world_size))
            while absent and time.monotonic() < deadline:
                missing = [rank for rank in absent if not self.store.check([f"here/{rank}"])]
                if missing != absent:
                    absent, deadline = missing, time.monotonic() + timeout_s
                time.sleep(_POLL_S)
            self.store.set("absent", json.dumps(absent))
            # Rank 0, which serves the store, may exit after this.
            self.store.wait([f"heard/{rank}" for rank in range(1, self.rank_env.world_size) if rank not in absent])
            return absent
        absent = list(json.loads(self.wait_for("absent")))
        self.store.set(f"heard/{self.rank_env.rank}", "")
        return absent

    def remove_address_file(self) -> None:
        """Remove the file with rank 0's address once all ranks are here: a later start must not read it."""
        if self._address_file is not None and self.rank_env.rank == 0:
            self._address_file.remove()

    def all_gather(self, text: str) -> list[str]:
        """Return every rank's text, in rank order; the store's time-out bounds the wait.

        Every rank must call it, and all of them equally often.
        """
        self._exchanges += 1
        name = f"gather-{self._exchanges}"
        self.store.set(f"{name}/{self.rank_env.rank}", text)
        if self.rank_env.rank == 0:
            texts = [self.store.get(f"{name}/{rank}").decode() for rank in range(self.rank_env.world_size)]
            self.store.set(name, json.dumps(texts))
        return list(json.loads(self.store.get(name).decode()))

    def wait_for(self, name: str) -> str:
        """Return what rank 0 sets under `name`, without a time limit; the wait ends with an error if rank 0 dies.

        Raises:
            torch.distributed.DistError: rank 0 is gone.
        """
        pause_s = _POLL_S
        while not self.store.check([name]):
            time.sleep(pause_s)
            pause_s = min(1.0, 1.2 * pause_s)  # hundreds of ranks may ask
        return self.store.get(name).decode()

    def close(self) -> None:
        """End the use of the store: rank 0, which may serve it, waits for the others. Every rank must call it."""
        if self.rank_env.rank:
            self.store.set(f"left/{self.rank_env.rank}", "")
        else:
            self.store.wait([f"left/{rank}" for rank in range(1, self.rank_env.world_size)])


def join_rendezvous(
    rank_env: RankEnv,
    environment: Mapping[str, str],
    section: LauncherSection,
    folder: Path,
    broadcast: Callable[[str], str] | None = None,
    announced: AddressFile | None = None,
) -> Rendezvous:
    """Connect this rank to the store of its start. Every rank must call it.

    Args:
        environment: the launcher's variables; torchrun's name its store.
        folder: shared by all nodes; in a Slurm step rank 0 writes its address there.
        broadcast: returns rank 0's text on every rank, where MPI started the ranks.
        announced: the file in which rank 0 gives signs of life already.

    Raises:
        AddressError: rank 0 was not found within launcher.start_timeout_s seconds of its last sign of life; the message
            names the address that was tried.
    """
    if rank_env.world_size == 1 and rank_env.launcher != "torchrun":
        return single_process()
    address_file = announced or AddressFile(folder, rank_env.start)
    if rank_env.launcher == "torchrun":
        store = _store_of_torchrun(rank_env, environment, section)
    elif broadcast is not None:
        store = _store_by_mpi(rank_env, environment, section, broadcast)
    else:
        store = _store_by_file(rank_env, environment, section, address_file)
    address = own_address(section.interface, store.host)
    store.set_timeout(timedelta(seconds=section.timeout_s))
    return Rendezvous(rank_env, PrefixStore(rank_env.start, store), address, store, address_file)


def single_process() -> Rendezvous:
    """Return the rendezvous of a process that is the only rank."""
    return Rendezvous(read_env({}, "single"), HashStore(), "127.0.0.1")


def _store_of_torchrun(rank_env: RankEnv, environment: Mapping[str, str], section: LauncherSection) -> TCPStore:
    """Return the agent's store; where the agent shares none, rank 0 serves one at MASTER_ADDR and MASTER_PORT."""
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if rank_env.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return serve_store(host, port)
    return connect_store(host, port, section.start_timeout_s, "the store of torchrun (MASTER_ADDR, MASTER_PORT)")


def _store_by_mpi(
    rank_env: RankEnv, environment: Mapping[str, str], section: LauncherSection, broadcast: Callable[[str], str]
) -> TCPStore:
    if rank_env.rank == 0:
        store = _open(rank_env, environment, section)
        broadcast(json.dumps([store.host, store.port]))
        return store
    address, port = json.loads(broadcast(""))
    return connect_store(address, port, section.start_timeout_s, "the store of rank 0")


def _store_by_file(
    rank_env: RankEnv, environment: Mapping[str, str], section: LauncherSection, file: AddressFile
) -> TCPStore:
    """Return the store whose address is in a file of the run folder."""
    if rank_env.rank == 0:
        store = _open(rank_env, environment, section)
        nonce = secrets.token_hex(8)
        store.set("nonce", nonce)
        file.publish(store.host, store.port, rank_env.node, nonce)
        return store
    last_sign, pause_s = time.monotonic(), _POLL_S
    seen: dict[str, Any] = {}
    problem = f"rank 0 has not left its address in {file}"
    while time.monotonic() - last_sign < section.start_timeout_s:
        found = file.read()
        if found != seen:
            last_sign, seen, pause_s = time.monotonic(), found, _POLL_S
        try:
            if "address" in found:
                timeout_s = min(_ANSWER_S, section.start_timeout_s)
                what = f"the store of rank 0 on node {found['node']}"
                store = connect_store(found["address"], int(found["port"]), timeout_s, what)
                if store.check(["nonce"]) and store.get("nonce").decode() == found["nonce"]:
                    return store
                problem = f"{found['address']}:{found['port']} serves another run"
        # A killed start of the same name may have left this file, and another program may use the port by now. Rank 0
        # will replace the file.
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            problem = str(error)
        time.sleep(pause_s)
        pause_s = min(_LONGEST_POLL_S, 1.2 * pause_s)
    raise AddressError(
        f"rank {rank_env.rank} on node {rank_env.node} has not met rank 0 within {section.start_timeout_s:.0f} s: "
        f"{problem}; train.output_dir must be on a file system that all nodes share, and launcher.start_timeout_s long "
        "enough for the slowest node to import torch"
    )


def _open(rank_env: RankEnv, environment: Mapping[str, str], section: LauncherSection) -> TCPStore:
    """Serve a store at an address that the other ranks reach, on a port that the kernel chooses."""
    one_node = rank_env.local_world_size == rank_env.world_size
    return serve_store(reachable_address(environment, interface=section.interface, one_node=one_node), 0)


def serve_store(address: str, port: int) -> TCPStore:
    """Serve a store at one address of this node; torch's own would listen on all of them.

    Args:
        port: 0 lets the kernel choose one.

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
    """Connect to a store once something listens there.

    Args:
        what: the store's name in the message of the error.

    Raises:
        AddressError: nothing listened there for `timeout_s` seconds, or something that is no store.
    """
    deadline = time.monotonic() + timeout_s
    address = wait_until_open(host, port, timeout_s, what)
    wait_for_store(host, address, port, deadline, what)
    try:
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise AddressError(f"{what} at {host}:{port} has hung up: {str(error).splitlines()[0]}") from error
