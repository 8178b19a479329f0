"""The agent of one node among several, which starts the node's ranks.

Under Slurm with `slurm.tasks: node` it is a task of the job; without Slurm it is `trimaran train` on every node.
"""

import secrets
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from trimaran.launchers.env.exit_codes import exit_code_after, exit_code_of
from trimaran.launchers.env.network import (
    AddressError,
    interface_of,
    own_address,
    resolve_name,
    wait_for_store,
)
from trimaran.launchers.env.rank_env import node_name
from trimaran.launchers.local.torch_elastic import Node, get_ready, run_ranks
from trimaran.launchers.worker.entry import run_spec_of_agent
from trimaran.runtime.spec import RunSpec

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

RUN = "trimaran/run"
"""Key of the nodes' store: a name of this run."""
_ANSWER_S, _CONNECT_S = 10.0, 1.0
_STORE = "the store of the nodes (launcher.rendezvous)"


def run_node(node: Node, spec: RunSpec, spec_path: Path, overrides: list[str]) -> int:
    """Run this node's ranks until those of all nodes have ended.

    Returns the exit code of the rank of this node that failed first, or 0.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run_ranks(node, spec, run_spec_of_agent, str(spec_path), *overrides)
    except ChildFailedError as error:
        return exit_code_of(next(iter(error.failures.values())).exitcode)
    except SignalException as error:
        return exit_code_after(error.sigval)
    return 0


def run_node_by_hand(spec: RunSpec, spec_path: Path, overrides: list[str]) -> int:
    """Run this node's ranks as one of launcher.nodes nodes, which connect at launcher.rendezvous; return the exit code.

    Raises:
        AddressError: nothing answers there within launcher.start_timeout_s.
    """
    assert spec.launcher.rendezvous is not None, "checked by check_nodes"
    host, _, port = spec.launcher.rendezvous.rpartition(":")
    refuse_taken(host, int(port), spec.launcher.start_timeout_s)
    ranks = spec.world_size // spec.launcher.nodes
    get_ready(spec, ranks)
    store = store_at(host, int(port), spec.launcher.start_timeout_s)
    address = own_address(spec.launcher.interface, store.host)
    logs = Path(spec.train.output_dir) / "logs" / time.strftime("agents-%Y%m%dT%H%M%S") / node_name({})
    return run_node(
        Node(store.get(RUN).decode(), store, address, spec.launcher.nodes, ranks, logs), spec, spec_path, overrides
    )


def refuse_taken(host: str, port: int, timeout_s: float) -> None:
    """Raise AddressError where something listens there and is no store.

    For use before torch is imported, which takes seconds, and many of them on a busy node.
    """
    start = time.monotonic()
    for address in resolve_name(host)[:1]:
        with suppress(OSError):  # nothing listens there yet
            socket.create_connection((address, port), timeout=_CONNECT_S).close()
            wait_for_store(host, address, port, start + min(timeout_s, _ANSWER_S), _STORE)


def store_at(host: str, port: int, timeout_s: float) -> "TCPStore":
    """Return the nodes' store: served here if the address is this node's, otherwise the one at that address."""
    from trimaran.launchers.rendezvous.store import connect_store, serve_store

    addresses = [address for address in resolve_name(host) if interface_of(address)]
    if addresses:
        try:
            store = serve_store(addresses[0], port)
            store.set(RUN, secrets.token_hex(6))
            return store
        except AddressError:
            # Another agent of this run on this node serves it, which answers at once, or the port is taken.
            timeout_s = min(timeout_s, _ANSWER_S)
    store = connect_store(host, port, timeout_s, _STORE)
    try:
        store.wait([RUN], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise AddressError(
            f"{host}:{port} (launcher.rendezvous) is the store of another program than trimaran; choose another port"
        ) from error
    return store
