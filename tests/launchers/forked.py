"""Commands that are forked from a process which has imported everything: cold starts without the seconds of imports.

As a program (`shim`) it takes the interpreter's place where mpirun, `ip netns exec` or another program starts one: it
has the command forked, passes signals on to it, and ends as it ends.
"""

import fcntl
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SOCKET = "TRIMARAN_TEST_FORK_SERVER"
START_S = 200.0  # five seconds on idle cores, far more where many others want them
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
COMMAND_LINE = "trimaran.launchers.cli.app"
HUGGING_FACE = (
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)
"""To be preloaded for commands that use transformers."""


class Forked:
    """A command that runs, with the interface of subprocess.Popen as far as tests need it.

    Args:
        words: what follows the interpreter: -m MODULE, -c CODE or FILE.py, and arguments.
        descriptors: number in the command -> file of this process.
        options: of the request, see fork_server.py: `network`, and `preload`, modules to import before the fork.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        descriptors: dict[int, int],
        environment: dict[str, str],
        **options: Any,
    ) -> None:
        self.returncode: int | None = None
        self.args = list(words)
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(os.environ[SOCKET])
        request = {
            "words": list(words),
            "folder": str(folder),
            "environment": environment,
            "descriptors": list(descriptors),
            **options,
        }
        socket.send_fds(self._connection, [json.dumps(request).encode()], list(descriptors.values()))
        self._connection.settimeout(START_S)
        self.pid: int = self._receive()["pid"]

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit code, minus the number of a signal that ended it.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = self._receive()["code"]
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from None
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _receive(self) -> dict[str, int]:
        message = self._connection.recv(65536)
        if not message:
            raise RuntimeError("the process that forks commands has ended")
        return dict(json.loads(message))


class ForkServer:
    """The process of `fork_server.py`, of which a test session has one for all its workers.

    Attributes:
        imported: by stage of its start, the modules that had been imported.
        shim: the program that takes the interpreter's place.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.imported: dict[str, list[str]] = json.loads((folder / "imported.json").read_text())
        self.shim = self.make_shim("python")
        os.environ[SOCKET] = str(folder / "socket")

    def make_shim(self, name: str) -> Path:
        """Return a program that has itself forked; one that is called trimaran or torchrun is that command."""
        shim = self._folder / name
        if not shim.exists():
            text = f"#!{sys.executable} -IS\n" + Path(__file__).read_text(encoding="utf-8")
            new = self._folder / f"{name}-{os.getpid()}"
            new.write_text(text, encoding="utf-8")
            new.chmod(0o755)
            new.rename(shim)
        return shim


@functools.cache
def fork_server() -> ForkServer:
    """Return this test session's, which the first worker that needs it starts."""
    from tests import counting

    if SOCKET in os.environ:  # a process that a test started
        return ForkServer(Path(os.environ[SOCKET]).parent)
    session = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    folder = Path(tempfile.gettempdir(), f"trimaran-forks-{session}")
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "imported.json").exists():
            counting.record("cold start", "the process that forks commands")
            _start(folder, session)
    return ForkServer(folder)


def _start(folder: Path, session: int) -> None:
    """Start the process, which ends with the session's."""
    # Libraries start their threads at import unless they are told to have one, and a fork would lose them.
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    one_thread["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # of pyarrow, which lm-eval brings
    one_thread["OMP_WAIT_POLICY"] = "passive"  # a command that takes more does not spin where others want the cores
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("fork_server.py")), str(folder), str(session)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **one_thread},
            cwd=folder,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_S
    while not (folder / "imported.json").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"the process that forks commands did not start\n{(folder / 'log').read_text()}")
        time.sleep(0.05)
    process.returncode = 0  # it outlives this worker: no warning that it still runs


def shim(arguments: Sequence[str]) -> int:
    """Have a command forked that has this process's directory, environment and descriptors; return its exit code."""
    name, words = Path(arguments[0]).name, list(arguments[1:])
    while words and words[0] in ("-u", "-P"):
        del words[0]
    module = {"trimaran": COMMAND_LINE, "torchrun": "torch.distributed.run"}.get(name)
    words = ["-m", module, *words] if module else words
    numbers = [int(each) for each in os.listdir("/proc/self/fd")]
    descriptors = {number: number for number in numbers if _is_inherited(number)}
    process = Forked(words, Path.cwd(), descriptors, dict(os.environ), network=f"/proc/{os.getpid()}/ns/net")
    for number in descriptors:
        if number > 2:
            os.close(number)  # the other end waits for the command to close them, as mpirun does before its exit
    for number in FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:  # what a shell has its commands ignore
            signal.signal(number, lambda number, frame: os.kill(process.pid, number))
    return process.wait()


def _is_inherited(number: int) -> bool:
    try:
        return number <= 2 or os.get_inheritable(number)
    except OSError:  # it was that of the listing itself
        return False


def _main() -> None:
    code = shim(sys.argv)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    _main()
