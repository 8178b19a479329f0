"""The process that forks ranks for the pool, and the loop of one rank: take a function, send back what came of it.

`tests.distributed.ranks` has this process, the nursery, forked from the session's fork server, which has imported torch
and trimaran. It has a single thread, so that a fork of it is a whole rank after a few milliseconds, and never computes.
Messages are pickled dictionaries of plain values. A task goes like this:

- the rank enters the group, says "entered" and waits for the parent's word that all have: a function that raises at
  once would else close connections that a peer is still making, and torch cannot take back a group that was made by
  half;
- it runs the function and sends the outcome, "returned" or "raised";
- a rank whose function returned keeps its group until the parent says that every rank has an outcome: closing a gloo
  pair while the peer still reads would turn a good result into a 'connection reset';
- it destroys the group and says "idle".
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import importlib.util
import os
import pickle
import reprlib
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from trimaran.launchers.worker.process import exit_process

REPOSITORY = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# A rank writes its stacks at it. Not SIGUSR1, which the train loop catches: afterwards Python puts back the default
# action, not faulthandler's, so the next SIGUSR1 would end the rank.
STACKS_SIGNAL = signal.SIGUSR2
# What gloo and the store say on a rank whose peer has left; such an error is seldom the cause of a failure.
PEER_LEFT = (
    "Connection reset",
    "Connection closed",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "not connected",
)


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent ends, and end now if the parent ended before we could ask."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def load_function(module_name: str, file: str | None, qualname: str) -> Callable[..., Any]:
    """Return the function, importing its module by name if it is ours or installed, and by path if it is a test module.

    A module loaded by path is kept in `sys.modules` under the name that it has in the parent, so that its classes
    pickle in both directions.
    """
    module = sys.modules.get(module_name)
    if module is None:
        if file is None or not Path(file).is_relative_to(REPOSITORY / "tests"):
            module = importlib.import_module(module_name)
        else:
            spec = importlib.util.spec_from_file_location(module_name, file)
            if spec is None or spec.loader is None:
                raise ImportError(f"cannot load {file} as a Python module")
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[module_name]
                raise
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{module_name}.{qualname} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


@contextlib.contextmanager
def warnings_as_in_parent(filters: list[tuple[str, str, type[Warning], str, int]]) -> Iterator[None]:
    """Apply the parent's warning filters (pytest's `filterwarnings`, marks included) for the length of a task."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for action, message, category, module, lineno in filters:
            warnings.filterwarnings(action, message, category, module, lineno, append=True)  # type: ignore[arg-type]
        yield


def describe_exception(error: BaseException) -> dict[str, Any]:
    """Return the outcome that tells the parent of an exception: when, what, where, and the exception if it pickles."""
    trace = error.__traceback__.tb_next if error.__traceback__ is not None else None  # the first frame is this file's
    text = "".join(traceback.format_exception(type(error), error, trace))
    if isinstance(error, AssertionError):
        # pytest does not rewrite asserts in this process, so the values would be lost.
        text += describe_locals(trace)
    pickled = None
    with contextlib.suppress(Exception):
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    return {
        "status": "raised",
        "time": time.monotonic(),
        "traceback": text,
        "secondary": isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in PEER_LEFT),
        "payload": pickled,
        "fit": False,
    }


def describe_locals(trace: TracebackType | None) -> str:
    """Return the local variables of the innermost frame, one a line, each cut to a readable length."""
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    short = reprlib.Repr()
    short.maxother = short.maxstring = 400
    lines = []
    for name, value in trace.tb_frame.f_locals.items():
        try:
            lines.append(f"    {name} = {short.repr(value)}\n")
        except Exception as error:  # noqa: BLE001 - a broken repr must not hide the assertion
            lines.append(f"    {name} = <its repr raised {type(error).__name__}>\n")
    return "local variables where the assertion failed:\n" + "".join(lines) if lines else ""


def join_default_group(task: dict[str, Any]) -> None:
    """Make the default gloo group of the task and put what functions may have changed in torch back to the start."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(task["store"], task["world_size"]),  # type: ignore[attr-defined]
        rank=task["rank"],
        world_size=task["world_size"],
        timeout=timedelta(seconds=task["group_timeout_s"]),
    )


def leave_group() -> None:
    """Destroy the default group and every group made from it, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
        # A group in a reference cycle keeps its gloo device, whose thread wakes up a hundred times a second.
        gc.collect()


def run_task(task: dict[str, Any], connection: Connection) -> dict[str, Any]:
    """Run the task's function inside its group and return the outcome; the group is left standing."""
    fit = True
    try:
        with warnings_as_in_parent(task["filters"]):
            function = load_function(
                task["module"], task["file"], task["qualname"]
            )  # before the group: all ranks fail alike
            arguments = pickle.loads(task["arguments"])
            fit = False
            join_default_group(task)
            fit = True
            connection.send_bytes(pickle.dumps({"status": "entered"}))
            connection.recv_bytes()  # "all have entered"
            result = function(*arguments)
        return {"status": "returned", "payload": pickle.dumps(result), "fit": True}
    except BaseException as error:  # noqa: BLE001 - pytest's own and SystemExit are the test's to see
        return describe_exception(error) | {"fit": fit}


def serve(connection: Connection) -> None:
    """Run tasks from the connection until the parent closes it."""
    gc.freeze()  # what the nursery has imported is never garbage
    while True:
        try:
            task = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        outcome = run_task(task, connection)
        connection.send_bytes(pickle.dumps(outcome))
        if outcome["status"] == "returned":
            connection.recv_bytes()  # "every rank has an outcome"
        problem = None
        try:
            leave_group()
        except BaseException as error:  # noqa: BLE001 - told to the parent
            problem = describe_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(pickle.dumps({"status": "idle", "problem": problem}))


def serve_as_rank(descriptor: int, output: str, stacks: str, nursery_pid: int) -> None:
    """Turn this fork of the nursery into a rank and serve its connection."""
    die_with_parent(nursery_pid)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stacks_file = open(stacks, "a")  # noqa: SIM115 - stays open for the signal handler
    faulthandler.register(STACKS_SIGNAL, file=stacks_file, all_threads=True)
    faulthandler.enable()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, EOFError):  # the parent is gone
        serve(Connection(descriptor))


def fork_rank(control: socket.socket, descriptor: int, request: dict[str, Any]) -> int:
    """Fork a rank that serves the connection; return its process id."""
    nursery_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            control.close()
            serve_as_rank(descriptor, request["output"], request["stacks"], nursery_pid)
            code = 0
        except BaseException:  # noqa: BLE001 - nothing may return into the nursery's loop
            traceback.print_exc()
        finally:
            exit_process(code)
    os.close(descriptor)  # else later ranks inherit it, and the end of this one would not be seen
    return pid


def main(descriptor: int) -> None:
    """Fork and reap ranks on request until the other end of the control socket closes."""
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test session's to answer: it ends us
    control.send(pickle.dumps({"pid": os.getpid()}))
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 65536, 1)
        if not message:
            return
        request = pickle.loads(message)
        if request["do"] == "fork":
            control.send(pickle.dumps({"pid": fork_rank(control, descriptors[0], request)}))
        else:
            control.send(pickle.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])}))
