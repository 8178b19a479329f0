"""Dask runs the tasks: a scheduler in this process, and workers that a launcher starts, on this or other machines.

All traffic is TLS, with a certificate made for this run. Its key stands in a file that only this user can read, which
is all that a worker needs to join.
"""

import errno
import json
import logging
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from trimaran.runtime.data.engine.task import Output, Task, find_outputs
from trimaran.runtime.data.engine.watch import Board, Watch, slow_documents
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.files import DataError
from trimaran.runtime.files import read_json

if TYPE_CHECKING:
    from distributed import Client, Security

MOST_DEATHS: Final = 3
"""Workers that may die while they do one task, until the run ends as failed."""
MOST_FAILURES: Final = 3
"""Errors of reading or writing that one task may have, as of a remote store, until the run ends as failed."""
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_LASTING: Final = (*_FULL, errno.EROFS, errno.ENOENT, errno.EACCES)
_PACKAGES: Final = ("distributed", "cryptography")
_BOARD: Final = "board"
_JOIN: Final = ".join-"
# Dask opens a port for HTTP in any case; here it answers nothing, and only this machine reaches it.
_NO_DASHBOARD: Final = MappingProxyType({"dashboard": False, "dashboard_address": "127.0.0.1:0"})
_SETTINGS: Final = MappingProxyType(
    {
        "distributed.scheduler.allowed-failures": MOST_DEATHS - 1,
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        "distributed.worker.daemon": False,
        # It samples the frames of a task from another thread, on which a page's tree must not be freed.
        "distributed.worker.profile.enabled": False,
        "distributed.comm.timeouts.connect": "30s",
    }
)


class Crew(Protocol):
    """Workers that have been started."""

    def check(self) -> None:
        """Raise DataError where no worker is left and none will come."""

    def expect_end(self) -> None:
        """Start none anew from now on: the scheduler sends them home."""


StartWorkers = Callable[[Path], AbstractContextManager[Crew]]
"""Start the workers that join by a file of credentials, and end them when the block ends."""
_CHECK_S = 2.0


@dataclass(frozen=True)
class Workers:
    """The workers of one preparation.

    Attributes:
        count: how many are expected.
        host: address of this machine at which they reach it.
        start: starts them.
    """

    count: int
    host: str
    start: StartWorkers


@dataclass(frozen=True)
class Credentials:
    """What a worker needs to join: the scheduler's address, and the run's certificate and key (PEM)."""

    address: str
    certificate: str
    key: str

    def write(self, path: Path) -> None:
        """Write them where only this user can read them."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(vars(self), file)

    @staticmethod
    def read(path: Path) -> "Credentials":
        """Read what `write` wrote.

        Raises:
            DataError: the file is missing or no such file.
        """
        try:
            return Credentials(**read_json(path))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"cannot join the run of {path}: {error}; it has ended, or another user started it"
            ) from error

    def security(self) -> "Security":
        """Return Dask's record of them."""
        from distributed import Security

        pem = {"tls_ca_file": self.certificate}
        for role in ("scheduler", "worker", "client"):
            pem |= {f"tls_{role}_cert": self.certificate, f"tls_{role}_key": self.key}
        return Security(require_encryption=True, **pem)


class TaskFailed(DataError):
    """A task could not be done; the message names its input."""


class Cluster:
    """Runs tasks on workers, which are started with the first task that was not done before. A context manager.

    Args:
        root: the folder in which tasks write, which every worker sees.
        workers: what starts them.
        lock: entered with the first task that was not done before, so that no other process uses `root` meanwhile.
    """

    def __init__(
        self, root: Path, workers: Workers, lock: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self.root, self._workers, self._lock = root, workers, lock
        self._stack = ExitStack()
        self._crew: Crew | None = None
        self._has_begun = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._crew is not None and kind is None:
            self._crew.expect_end()
            with suppress(Exception):  # they are ended in any case; this only lets them end by themselves
                self._client.retire_workers()
        self._stack.close()

    @cached_property
    def _client(self) -> "Client":
        """The client of a scheduler in this process; starts both, and the workers."""
        import dask
        from distributed import Client, Scheduler, Security, SpecCluster

        logging.getLogger("distributed").setLevel(logging.ERROR)
        made, enter = Security.temporary(), self._stack.enter_context
        options = {"host": self._workers.host, "protocol": "tls://", "port": 0, "security": made, **_NO_DASHBOARD}
        enter(dask.config.set(_SETTINGS))
        scheduler = enter(
            SpecCluster(scheduler={"cls": Scheduler, "options": options}, workers={}, security=made, silence_logs=False)
        )
        client = enter(Client(scheduler, set_as_default=False))
        file = Path(enter(tempfile.TemporaryDirectory(prefix=_JOIN, dir=self.root)), "credentials.json")
        Credentials(scheduler.scheduler_address, str(made.tls_ca_file), str(made.tls_client_key)).write(file)
        self._crew = enter(self._workers.start(file))
        return client

    def begin(self) -> None:
        """Take the lock, unless that is done."""
        if self._has_begun:
            return
        require_extra(*_PACKAGES)
        self._stack.enter_context(self._lock())
        self._has_begun = True
        self.root.mkdir(parents=True, exist_ok=True)
        for left in (*self.root.glob("*/.*"), *self.root.glob(f"{_JOIN}*")):  # by processes that were killed
            shutil.rmtree(left, ignore_errors=True)

    def run(self, tasks: Sequence[Task], on_done: Callable[[Task, Output], None]) -> list[Output]:
        """Do all tasks; return their outputs in the order of the tasks.

        Args:
            on_done: called with each task as it ends, in any order.

        Raises:
            TaskFailed: one can't be done: what it raised, or that every worker that tried it died.
            DataError: a package is missing.
        """
        outputs = find_outputs(tasks, self.root)
        if not self._has_begun and not outputs.keys() >= {task.key for task in tasks}:
            self.begin()
            outputs = find_outputs(tasks, self.root)  # another process may have done them meanwhile
        waiting: list[Task] = []
        for key, task in {task.key: task for task in tasks}.items():
            if key in outputs:
                on_done(task, outputs[key])
            else:
                shutil.rmtree(task.folder(self.root), ignore_errors=True)  # damaged
                waiting.append(task)
        for task, output in self._run_all(waiting):
            outputs[task.key] = output
            on_done(task, output)
        return [outputs[task.key] for task in tasks]

    def _run_all(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Output]]:
        """Yield each task as it ends.

        No more are handed out than there are workers: of a worker that dies, Dask blames whatever it had been given.
        """
        from distributed.scheduler import KilledWorker

        waiting, known, failures = deque(tasks), dict[str, int](), Counter[str]()
        running: dict[Any, Task] = {}
        ended: SimpleQueue[Any] = SimpleQueue()

        def submit(task: Task) -> None:
            known[task.key] = len(slow_documents(task.slow_file(self.root)))
            name = f"{task.stage}-{task.key}-{known[task.key]}-{failures[task.key]}"
            given = tuple(replace(each, result={}) for each in task.inputs)  # their results are for this process
            future = self._client.submit(do_task, replace(task, inputs=given), str(self.root), key=name, pure=False)
            running[future] = task
            future.add_done_callback(ended.put)

        try:
            while waiting or running:
                while waiting and len(running) < self._workers.count:
                    submit(waiting.popleft())
                try:
                    future = ended.get(timeout=_CHECK_S)
                except Empty:
                    if self._crew is not None:
                        self._crew.check()
                    continue
                task, error = running.pop(future), future.exception()
                # A supervisor that ends its worker because of a slow document notes it: the next try is another.
                noted = len(slow_documents(task.slow_file(self.root)))
                failures[task.key] += isinstance(error, OSError)
                may_work = isinstance(error, OSError) and error.errno not in _LASTING
                slow = isinstance(error, KilledWorker) and noted > known[task.key]
                if slow or (may_work and failures[task.key] < MOST_FAILURES):
                    submit(task)
                elif error is None:
                    yield task, future.result()
                else:
                    raise _failure(task, error) from error
        finally:
            if running:
                self._client.cancel(list(running))


def _failure(task: Task, error: BaseException) -> BaseException:
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        return TaskFailed(
            f"{task.about}: {MOST_DEATHS} workers died while they did its stage {task.stage} (out of memory, perhaps); "
            "look at what they printed, lower data.workers, or leave this input out"
        )
    if isinstance(error, MemoryError):
        return TaskFailed(f"{task.about}: its stage {task.stage} needs more than data.worker_memory; raise it")
    if isinstance(error, OSError):
        told = f"{error.strerror or error}{f': {error.filename!r}' if error.filename else ''}"
        remedy = "make room there and run the command again, which goes on" if error.errno in _FULL else ""
        return TaskFailed(f"{task.about}: {told}{remedy and f'; {remedy}'}")
    return TaskFailed(f"{task.about}: {error}") if isinstance(error, DataError) else error


def do_task(task: Task, root: str) -> Output:
    """Do a task on a worker."""
    from distributed import get_worker

    slow_file = task.slow_file(Path(root))
    board: Board = get_worker().plugins[_BOARD].board
    board.task(str(slow_file))
    return task.run(Path(root), Watch(board, slow_documents(slow_file)))


def serve(credentials: Credentials, scratch: Path, board: Path, memory_bytes: int | None) -> None:
    """Be a worker until the scheduler ends.

    Args:
        scratch: a folder of this worker's own.
        board: the file between this worker and its supervisor.
        memory_bytes: the most that the process may allocate; a task that needs more fails by MemoryError.
    """
    import asyncio
    import resource

    import dask
    from distributed import Worker, WorkerPlugin

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # the driver tells what fails

    class BoardPlugin(WorkerPlugin):  # type: ignore[misc]
        """Holds the board of this worker."""

        name = _BOARD

        def __init__(self) -> None:
            self.board = Board(board)

    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))

    async def work() -> None:
        worker = Worker(
            credentials.address,
            security=credentials.security(),
            nthreads=1,
            memory_limit=0,
            **_NO_DASHBOARD,
            local_directory=str(scratch),
            death_timeout=60,
            plugins=(BoardPlugin(),),
        )
        async with worker:
            await worker.finished()

    with dask.config.set(_SETTINGS):
        asyncio.run(work())
