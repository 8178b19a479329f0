"""torchrun's agent through its own API: it starts this node's ranks, watches them, and restarts them after a failure.

It restarts them launcher.max_restarts times. Two things differ from `torchrun` itself: ranks are forked from a process
that has imported torch already, and the stores listen at one address only.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from trimaran.launchers.env.exit_codes import LaunchError
from trimaran.launchers.env.limits import check_limits, raise_soft_limits
from trimaran.launchers.local.fork_server import bare_ranks, forks, start_fork_server
from trimaran.launchers.worker.process import threads_per_rank
from trimaran.runtime.processes import is_stopped
from trimaran.runtime.signal_watch import SignalWatch
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.signals import STOPPING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

_BACKEND = "trimaran"
_SHUTDOWN_S = 120  # for the ranks to save after a signal, before the agent kills them
_KILLED_S = 10  # for a killed process to be gone
_KEEP_ALIVE_S = 2
_AGAIN_S = 0.3  # between two SIGINT that are two wishes: programs around this one may pass on what the terminal sends
_WATCH_S, _ROLL_CALL_S, _POLL_S = 1.0, 10.0, 0.05

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """This node among those of the run.

    Args:
        run: a name that no other run has, the same on all nodes.
        store: shared by the nodes; one of them serves it.
        address: of this node, at which other nodes reach its ranks.
        nodes: of the run.
        ranks: of this node.
        logs: a folder for the agent's own files.
    """

    run: str
    store: "TCPStore"
    address: str
    nodes: int
    ranks: int
    logs: Path


def get_ready(spec: RunSpec, ranks: int) -> None:
    """Start the process from which the ranks of this node are forked; it imports torch once for all of them.

    Raises:
        LimitError: a limit of this machine is too low for the ranks.
    """
    raise_soft_limits()
    for warning in check_limits(spec, ranks):
        logger.warning(warning)
    start_fork_server(threads_per_rank(spec, ranks))


def run_ranks(node: Node, spec: RunSpec, entry: Callable[..., None], *arguments: str) -> None:
    """Run entry(*arguments) on every rank of this node and return when all ranks of the run have returned.

    Raises:
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: a rank of this node failed, more often than
            launcher.max_restarts.
        torch.distributed.elastic.multiprocessing.SignalException: a signal came; it was passed on to the ranks, and
            they have ended.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousError, rendezvous_handler_registry
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    rendezvous_handler_registry.register(_BACKEND, _make_handler)
    get_ready(spec, node.ranks)
    handlers: list[DynamicRendezvousHandler] = []
    config = LaunchConfig(
        min_nodes=node.nodes,
        max_nodes=node.nodes,
        nproc_per_node=node.ranks,
        run_id=node.run,
        rdzv_backend=_BACKEND,
        rdzv_configs={
            "store": node.store,
            "join_timeout": int(spec.launcher.start_timeout_s),
            "handlers": handlers,
        },
        local_addr=node.address,  # the default, this host's full name, need not resolve
        max_restarts=spec.launcher.max_restarts,
        monitor_interval=0.1,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(node.logs)),
        signals_to_handle=",".join(number.name for number in STOPPING),
        shutdown_timeout=_SHUTDOWN_S,
    )
    others = frozenset(forks())
    with (
        _quiet(),
        bare_ranks(),
        _stopped_ranks_killed(node.ranks, spec.launcher.timeout_s, others),
        SignalWatch(_AtOnce(others).heard),
        _no_rank_left(others),
    ):
        try:
            elastic_launch(config, entry)(*arguments)
        except RendezvousError as error:
            raise LaunchError(
                f"the {node.nodes} nodes have not met within {spec.launcher.start_timeout_s:g} s, or one has left "
                f"({type(error).__name__}); run the same command on all of them, and raise launcher.start_timeout_s if "
                "some start later",
                1,
            ) from error
        except DistError as error:
            raise LaunchError(f"another node has left: {str(error).splitlines()[0]}; start the run anew", 1) from error
        except EOFError as error:
            raise LaunchError(
                "the process from which the ranks are forked has ended; its own message is above: raise the limits of "
                "processes (ulimit -u), open files (ulimit -n) and memory (ulimit -v)",
                1,
            ) from error
        finally:
            # After a signal torch leaves the heartbeat's thread running. If that thread were then the last to hold the
            # handler, it would try to join itself and print a traceback.
            for handler in handlers:
                handler._stop_heartbeats()


def _make_handler(parameters: "RendezvousParameters") -> "RendezvousHandler":
    """Return torch's rendezvous handler over a store that exists already; the ranks' store listens at one address."""
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

    from trimaran.launchers.rendezvous.store import serve_store

    class Handler(DynamicRendezvousHandler):
        """Serves the ranks' store at one address, not at every address of the host."""

        def _create_tcp_store_server(self, master_addr: str, master_port: int) -> "TCPStore":
            return serve_store(master_addr, master_port)

    class Backend(C10dRendezvousBackend):
        """Has the name under which the handler is registered."""

        @property
        def name(self) -> str:
            return _BACKEND

    store = parameters.config["store"]
    handler: DynamicRendezvousHandler = Handler.from_backend(
        parameters.run_id,
        store,
        Backend(store, parameters.run_id),
        parameters.min_nodes,
        parameters.max_nodes,
        parameters.local_addr,
        RendezvousTimeout(join=timedelta(seconds=parameters.config["join_timeout"])),
        keep_alive_interval=_KEEP_ALIVE_S,
    )
    parameters.config["handlers"].append(handler)
    return handler


@contextmanager
def _stopped_ranks_killed(ranks: int, timeout_s: float, others: frozenset[int]) -> Iterator[None]:
    """Kill ranks of this node that are stopped (SIGSTOP) once the others can't wait for them any longer.

    That is some time after `timeout_s`, in which the ranks themselves find the cause, or when another rank has ended.
    A stopped process does not act on SIGTERM, for which the agent would give it half a minute.

    Args:
        others: children of the fork server that are no ranks of this run.
    """
    done = threading.Event()

    def watch() -> None:
        since: dict[int, float] = {}
        most = 0
        while not done.wait(_WATCH_S):
            children = _ranks_but(others)
            most = min(ranks, max(most, len(children)))
            since = {pid: since.get(pid, time.monotonic()) for pid in children if is_stopped(pid)}
            for pid, start in since.items():
                stopped_s = time.monotonic() - start
                if len(children) < most or stopped_s > timeout_s + _ROLL_CALL_S:
                    logger.warning("process %d, a rank, was stopped (SIGSTOP) for %.0f s and is killed", pid, stopped_s)
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=watch, name="stopped-ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class _AtOnce:
    """Kills the ranks of this node when Ctrl-C is pressed again while they save: whoever does so won't wait.

    Args:
        others: children of the fork server that are no ranks of this run.
    """

    def __init__(self, others: frozenset[int]) -> None:
        self._others = others
        self._first_s: float | None = None

    def heard(self, number: signal.Signals) -> None:
        """Count a signal."""
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._first_s is None:
            self._first_s = now
        elif now - self._first_s > _AGAIN_S:
            logger.warning("Ctrl-C again: the ranks end at once, and save nothing more")
            for pid in _ranks_but(self._others):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextmanager
def _no_rank_left(others: frozenset[int] = frozenset()) -> Iterator[None]:
    """End the ranks of this node that the agent has left behind, however the block ends.

    A second signal, such as `timeout` sends, interrupts the agent while it waits for the ranks to save, and a signal
    during a start finds ranks that it does not know yet. From here on signals do nothing here, but are heard of.

    Args:
        others: children of the fork server that are no ranks of this run.
    """
    try:
        yield
    finally:
        for number in STOPPING:
            signal.signal(number, lambda number, frame: None)
        for number, patience_s in ((signal.SIGTERM, _SHUTDOWN_S), (signal.SIGKILL, _KILLED_S)):
            end = time.monotonic() + patience_s
            for pid in _ranks_but(others):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            while _ranks_but(others) and time.monotonic() < end:
                time.sleep(_POLL_S)


def _ranks_but(others: frozenset[int]) -> list[int]:
    return [pid for pid in forks() if pid not in others]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the agent's log, which repeats our last sentence at length; restore the signal handlers it replaces."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
