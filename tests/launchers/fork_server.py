"""The process that tests fork commands from: it imports what commands need once, and its forks run them.

`tests.launchers.forked` starts ``python -P fork_server.py FOLDER PID`` once and sends it requests; PID is the test
session's. A fork takes milliseconds where a cold start takes seconds. The forked command has the directory,
environment, arguments and files of the request, runs `sitecustomize` of its PYTHONPATH and then the module's `main`.
Where the command itself starts this interpreter (for the ranks' fork server, or torchrun for its ranks), a fork of a
process that was set aside before the command began takes the new interpreter's place.
"""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_LARGEST_MESSAGE = 1 << 20
_HIGH_DESCRIPTOR = 200  # above those that a request names
# Imported before the first command. Each stage is a promise of tests about what it does not import.
STAGES = {"command line": "trimaran.launchers.cli.app", "rank": "trimaran.launchers.worker.run"}
# Beside every module of ours, what commands import when they are under way.
LATER = [
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "rich.table",
    "torch._dynamo",  # by optimizers and dry steps
    "torch.distributed.run",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous",
    "torch.utils.tensorboard",
]
STARTS_INTERPRETERS = "trimaran.launchers.tune.worker"
"""A program that commands start and that starts ranks itself."""
EXEC_FLAGS = {"-P", "-u", "-s", "-B", "-E"}
"""Flags of the interpreter that make no difference to a fork."""

Request = dict[str, Any]


def serve(listener: socket.socket, session: int) -> None:
    """Fork a command for every connection until the session's process ends.

    The answers are the command's pid and, later, its exit code. A connection that closes early ends its command. What a
    request wants preloaded stays imported for those that follow.
    """
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, None)
    session_end = os.pidfd_open(session)
    selector.register(session_end, selectors.EVENT_READ, None)
    commands: dict[int, tuple[socket.socket, int]] = {}  # by pidfd
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                selector.register(connection, selectors.EVENT_READ, None)
            elif key.fileobj == session_end:
                for _, pid in commands.values():
                    os.kill(pid, signal.SIGKILL)
                return
            elif key.data is not None:  # a command ended
                selector.unregister(key.fileobj)
                connection, pid = commands.pop(key.fd)
                os.close(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                _answer(connection, {"code": code})
            elif isinstance(key.fileobj, socket.socket):
                request, descriptors = receive(key.fileobj)
                if request is None:
                    _hang_up(selector, commands, key.fileobj)
                    continue
                import_all(request.get("preload", ()))
                pid = os.fork()
                if pid == 0:
                    _close_all(selector)
                    run_forked(request, descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
                pidfd = os.pidfd_open(pid)
                commands[pidfd] = key.fileobj, pid
                selector.register(pidfd, selectors.EVENT_READ, pid)
                _answer(key.fileobj, {"pid": pid})


def import_all(names: Sequence[str]) -> None:
    """Import modules into this process, and so into all forks of it that follow.

    What they bring is never garbage: a fork that looked for garbage in it would copy its memory page by page.
    """
    for name in names:
        importlib.import_module(name)
    gc.freeze()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a fork would lose {threads - 1} threads"


def receive(connection: socket.socket) -> tuple[Request | None, list[int]]:
    """Return a request and its descriptors, or None where the other side has closed."""
    try:
        text, descriptors, _, _ = socket.recv_fds(connection, _LARGEST_MESSAGE, 64)
    except ConnectionResetError:
        return None, []
    return (json.loads(text) if text else None), list(descriptors)


def _answer(connection: socket.socket, message: dict[str, int]) -> None:
    with contextlib.suppress(OSError):
        connection.send(json.dumps(message).encode())


def _hang_up(
    selector: selectors.BaseSelector, commands: dict[int, tuple[socket.socket, int]], connection: socket.socket
) -> None:
    selector.unregister(connection)
    for of_command, pid in commands.values():
        if of_command is connection:
            os.kill(pid, signal.SIGKILL)
    connection.close()


def _close_all(selector: selectors.BaseSelector) -> None:
    """In a fork: close what the selector watches.

    Sockets close as objects: one that is collected later would close its number again, which by then is another file's.
    """
    for key in list(selector.get_map().values()):
        if isinstance(key.fileobj, socket.socket):
            key.fileobj.close()
        else:
            os.close(key.fd)
    selector.close()


def run_forked(request: Request, descriptors: Sequence[int]) -> NoReturn:
    """In the fork: be the command of the request until its end."""
    _take_descriptors(request["descriptors"], descriptors)
    os.setsid()
    if request.get("network") is not None:
        _enter_network(Path(request["network"]))
    _take_environment(request)
    _set_spare_aside([number for number in request["descriptors"] if number > 2])
    exit_process(lambda: _run(request["words"]))


def _take_descriptors(numbers: Sequence[int], descriptors: Sequence[int]) -> None:
    """Give the received descriptors the numbers that the command expects."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _HIGH_DESCRIPTOR) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for number, descriptor in zip(numbers, high, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _take_environment(request: Request) -> None:
    """Take directory and environment; run the `sitecustomize` of a new PYTHONPATH, as a new interpreter does."""
    before = os.environ.get("PYTHONPATH")
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    folders = os.environ.get("PYTHONPATH")
    if folders is None or folders == before:
        return
    sys.path[:0] = [folder for folder in folders.split(os.pathsep) if folder]
    file = next((found for folder in sys.path if (found := Path(folder, "sitecustomize.py")).is_file()), None)
    if file is not None:
        sys.modules.pop("sitecustomize", None)
        importlib.invalidate_caches()
        importlib.import_module("sitecustomize")


def _enter_network(path: Path) -> None:
    """Enter a network namespace, unless it is this process's; that takes root."""
    if path.stat().st_ino == Path("/proc/self/ns/net").stat().st_ino:
        return
    descriptor = os.open(path, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns {path}")
    os.close(descriptor)


def _run(words: Sequence[str]) -> None:
    """Run `-m MODULE ARGUMENT...`, `-c CODE ARGUMENT...` or `FILE.py ARGUMENT...` as the main program."""
    sys.modules["__main__"] = ModuleType("__main__")  # else multiprocessing runs this file again in its children
    if words[0].endswith(".py"):
        sys.path.insert(0, str(Path(words[0]).parent))  # as the interpreter does
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
        return
    kind, what, *arguments = words
    sys.argv = ["-c" if kind == "-c" else what, *arguments]
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), sys.modules["__main__"].__dict__)  # noqa: S102
    elif hasattr(sys.modules.get(what), "main"):
        code = sys.modules[what].main()  # runpy would run the module a second time
        sys.exit(code if isinstance(code, int) else 0)
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


def exit_process(run: Callable[[], object]) -> NoReturn:
    """Call the function and end this process as the interpreter would."""
    code = 1
    try:
        run()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 - the last resort of a program
        traceback.print_exc()
    # As the interpreter does: threads are joined, and whether or not that succeeds, the exit functions run. One of them
    # takes multiprocessing's semaphores away; its resource tracker would warn of those that are left.
    for last in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        with contextlib.suppress(BaseException):
            last()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


# --- interpreters that the command starts


def _set_spare_aside(received: Sequence[int]) -> None:
    """Fork a process that has no thread, no state and no descriptor of the command's; interpreters are forked from it.

    They become children of the command: their parent, a fork of the spare, ends at once, and the command adopts them.
    """
    import _posixsubprocess
    import subprocess

    real: Callable[..., int] = _posixsubprocess.fork_exec
    command = os.getpid()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        for descriptor in received:
            os.close(descriptor)
        _serve_command(theirs, command)
    theirs.close()

    def fork_exec(words: Sequence[str | bytes], *options: Any) -> int:
        text = [os.fsdecode(word) for word in words]
        main = main_of(text) if text[0] == sys.executable else None
        if main is None:
            return real(words, *options)
        kept, folder, environment = options[2], options[3], options[4]
        kept = [number for number in kept if number != options[12]]  # through which a failed exec would tell its error
        own = [each if each != -1 else number for number, each in enumerate((options[5], options[8], options[10]))]
        pairs = [os.fsdecode(entry).partition("=") for entry in environment or ()]
        request = {
            "words": main,
            "folder": os.fsdecode(folder) if folder is not None else os.getcwd(),
            "environment": dict(os.environ) if environment is None else {name: value for name, _, value in pairs},
            "descriptors": [0, 1, 2, *kept],
            "session": bool(options[14]),
        }
        socket.send_fds(ours, [json.dumps(request).encode()], [*own, *kept])
        return int(json.loads(ours.recv(_LARGEST_MESSAGE))["pid"])

    _posixsubprocess.fork_exec = fork_exec
    subprocess._fork_exec = fork_exec  # type: ignore[attr-defined]


def main_of(words: Sequence[str]) -> list[str] | None:
    """Return an interpreter's command line from `-m`, `-c` or the file on, None where a fork can't take its place."""
    position = 1
    while position < len(words) and words[position] in EXEC_FLAGS:
        position += 1
    first = words[position] if position < len(words) else ""
    return list(words[position:]) if first in ("-m", "-c") or first.endswith(".py") else None


def _serve_command(connection: socket.socket, command: int) -> NoReturn:
    """In the spare: fork an interpreter for every request of the command; end with it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != command:
        os._exit(1)
    stopping = (signal.SIGINT, signal.SIGTERM)  # a terminal's signals are for the command
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in stopping}
    while True:
        request, descriptors = receive(connection)
        if request is None:
            os._exit(0)
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:  # until the command has adopted this process
                os.sched_yield()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            connection.send(json.dumps({"pid": os.getpid()}).encode())
            connection.close()
            _take_descriptors(request["descriptors"], descriptors)
            if request["session"]:
                os.setsid()
            _take_environment(request)
            if STARTS_INTERPRETERS in request["words"]:
                _set_spare_aside([number for number in request["descriptors"] if number > 2])
            exit_process(lambda words=request["words"]: _run(words))  # type: ignore[misc]
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(between, 0)


def _our_modules() -> list[str]:
    packages = [importlib.import_module(f"trimaran.{room}") for room in ("launchers", "runtime")]
    found = [module for each in packages for module in pkgutil.walk_packages(each.__path__, f"{each.__name__}.")]
    return [module.name for module in found if not module.name.endswith("__main__")]


def shorten_ends() -> None:
    """Let forked runs write a short sample; commands that start cold write the real one."""
    loop = importlib.import_module("trimaran.runtime.train.loop")
    loop.SAMPLE_TOKENS = 16  # type: ignore[attr-defined]


def _imported_by(words: list[str]) -> list[str]:
    """Run a command that starts nothing in this process; return the modules that are imported then."""
    from trimaran.launchers.cli.app import app

    with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(Path(__file__).parents[2]):
        app(words, prog_name="trimaran", standalone_mode=False)
    return sorted(sys.modules)


def main() -> None:
    """Import everything, write down what each stage has imported, and serve until the session ends."""
    folder, session, here = Path(sys.argv[1]), int(sys.argv[2]), os.getpid()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        imported = {}
        for stage, name in STAGES.items():
            importlib.import_module(name)
            imported[stage] = sorted(sys.modules)
            if stage == "command line":
                imported["check"] = _imported_by(["check", "examples/quickstart.yaml"])
        import_all([*LATER, *_our_modules()])
        shorten_ends()
        listener.bind(str(folder / "socket"))
        listener.listen(64)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has started us in its background
        (folder / "new").write_text(json.dumps(imported))
        (folder / "new").rename(folder / "imported.json")
        try:
            serve(listener, session)
        finally:
            if os.getpid() == here:
                shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
