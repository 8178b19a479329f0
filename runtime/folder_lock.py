"""A lock on a folder among the processes of several hosts. Imports no torch.

The lock is a file that names its holder. It appears whole by a hard link, which is atomic on NFS too; flock is not
used, because it does not reach other hosts everywhere. A holder that was killed leaves the file behind. The next
process takes the lock over where the holder has ended:

- on the same host its process is gone (another process may have got its number, but not its start time);
- it is an earlier start of the same job, or a job that Slurm says has ended;
- otherwise, it has not touched the file for SILENT_S. Ages are differences of two times of the file server, because the
  clocks of hosts differ.
"""

import errno
import json
import logging
import os
import re
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Annotated, Final, Self

from pydantic import Field, TypeAdapter

from trimaran.runtime.files import open_regular, read_bytes
from trimaran.runtime.processes import start_of, this_machine

LOCK = ".lock"
"""Name of the lock inside a run folder."""
NO_JOB: Final[Mapping[str, str]] = MappingProxyType({})
"""The environment of a process that belongs to no job."""
BEAT_S = 10.0
SILENT_S = 120.0
_MOST_BYTES = 1 << 16
_MOMENT_S = 0.005
_POLL_S, _LONGEST_POLL_S = 1.0, 15.0  # each asks the controller of Slurm, and hundreds of runs may wait
_ANSWER_S = 10.0
# A job in any other state has no processes.
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT", "CONFIGURING"}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

logger = logging.getLogger(__name__)


class FolderInUse(ValueError):
    """Another process holds the lock; the message names it."""


@dataclass(frozen=True)
class Holder:
    """The holder of a lock.

    Args:
        what: it does, such as "trimaran train".
        machine: the boot of its kernel, and its process namespace; "" where unknown.
        started: start time of the process, in the kernel's clock ticks.
        job: the scheduler's job, "" for none.
        starts: how often the job was started before, by the scheduler and by torchrun.
        since: when it took the lock.
        token: no other holder has it.
    """

    what: str
    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    machine: str
    started: str
    job: str
    starts: tuple[int, int]
    since: str
    token: Annotated[str, Field(pattern=r"^\w+$", max_length=64)]

    @staticmethod
    def here(what: str, environment: Mapping[str, str]) -> "Holder":
        """Return this process as a holder.

        Args:
            environment: the variables of Slurm and torchrun name the job.
        """
        job = ""
        if "SLURM_JOB_ID" in environment:
            job = f"Slurm job {environment['SLURM_JOB_ID']}"
        elif environment.get("TORCHELASTIC_RUN_ID", "none") != "none":
            job = f"torchrun {environment['TORCHELASTIC_RUN_ID']}"
        counts = (environment.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
        first, second = (int(count) if count.isdigit() else 0 for count in counts)
        return Holder(
            what=what,
            host=environment.get("SLURMD_NODENAME") or socket.gethostname(),
            pid=os.getpid(),
            machine=this_machine(),
            started=start_of(os.getpid()),
            job=job,
            starts=(first, second),
            since=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            token=uuid.uuid4().hex[:16],
        )

    def __str__(self) -> str:
        if self == _UNKNOWN:
            return "a process that its lock does not name"
        return (
            f"`{self.what}` on host {self.host} (process {self.pid}{', ' if self.job else ''}{self.job}) since "
            f"{self.since}"
        )

    def has_ended(self, asking: "Holder", silent_s: float) -> bool:
        """Return whether this holder has ended, as far as the process `asking` can know.

        Args:
            silent_s: seconds since this holder last touched the lock.
        """
        if self.machine and self.machine == asking.machine:
            return start_of(self.pid) != self.started
        if self.job and self.job == asking.job and asking.starts > self.starts:
            return True
        return silent_s > SILENT_S or _slurm_has_ended(self.job, self.starts[0])


_HOLDER = TypeAdapter(Holder)
_UNKNOWN = Holder("", "", 0, "", "", "", (0, 0), "", "unknown")
"""The holder where a lock does not say."""


@dataclass(frozen=True)
class _Found:
    """What a lock file holds, and the time of its last change."""

    holder: Holder
    changed: float

    @staticmethod
    def read(path: Path) -> "_Found | None":
        """Return it, None where there is no lock. Opening the file makes NFS ask the server."""
        try:
            with open_regular(path) as file:
                changed = os.fstat(file.fileno()).st_mtime
                text = file.read(_MOST_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:  # it was removed meanwhile
                return None
            if error.errno in (errno.EISDIR, errno.EINVAL):
                raise OSError(error.errno, f"{error.strerror}, in the place of a lock; remove it", str(path)) from error
            raise
        try:
            return _Found(_HOLDER.validate_json(text), changed)
        except ValueError:  # it is being written on a file system without links, or damaged
            return _Found(_UNKNOWN, changed)


class FolderLock:
    """A lock that this process holds, from `take`; a thread touches its file until `release`."""

    def __init__(self, path: Path, holder: Holder, made: list[Path]) -> None:
        self._path, self._holder, self._made = path, holder, made
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="folder-lock", daemon=True).start()

    @staticmethod
    def of_run(folder: Path, what: str, environment: Mapping[str, str]) -> "FolderLock":
        """Lock a run folder, which is made if need be, and removed at the release if it is still empty.

        Args:
            environment: see `Holder.here`.

        Raises:
            FolderInUse: another process holds it, or makes the folder right now.
        """
        refuse_if_held(_beside(folder), folder)
        return FolderLock._take(folder / LOCK, folder, Holder.here(what, environment), waits=False)

    @staticmethod
    def beside(
        target: Path, what: str, environment: Mapping[str, str] = NO_JOB, *, waits: bool = False
    ) -> "FolderLock":
        """Lock a folder that does not exist yet, by a file beside it.

        Args:
            environment: see `Holder.here`.
            waits: whether to wait for another holder's end.

        Raises:
            FolderInUse: another process holds it, or runs in the folder.
        """
        refuse_if_held(target / LOCK, target)
        return FolderLock._take(_beside(target), target, Holder.here(what, environment), waits=waits)

    @staticmethod
    def of_moment(path: Path, what: str, environment: Mapping[str, str]) -> "FolderLock":
        """Take the lock file `path`, which processes hold for moments only, after the others.

        Args:
            environment: see `Holder.here`.
        """
        return FolderLock._take(path, path.parent, Holder.here(what, environment), waits=True, pause_s=_MOMENT_S)

    @staticmethod
    def _take(path: Path, folder: Path, me: Holder, *, waits: bool, pause_s: float = _POLL_S) -> "FolderLock":
        made = _make(path.parent) if path.name == LOCK else []
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            while (found := _try(path, me)) is not None:
                if not waits:
                    raise _in_use(folder, path, found)
                if pause_s == _POLL_S:
                    logger.info("waiting for %s, which makes %s", found.holder, folder)
                time.sleep(pause_s)
                pause_s = min(_LONGEST_POLL_S, 1.2 * pause_s)
        except BaseException:
            _remove_empty(made)
            raise
        return FolderLock(path, me, made)

    def release(self) -> None:
        """Remove the lock; may be called again."""
        if not self._released.is_set():
            self._released.set()
            with suppress(OSError):
                found = _Found.read(self._path)
                if found is not None and found.holder.token == self._holder.token:
                    self._path.unlink(missing_ok=True)
            _remove_empty(self._made)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                # A lock that somebody has removed is written again.
                found = _Found.read(self._path) or _try(self._path, self._holder)
                if found is not None and found.holder.token != self._holder.token and not self._released.is_set():
                    logger.error("%s was taken over by %s: this process ends", self._path.parent, found.holder)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                os.utime(self._path)
            except OSError:  # the file server does not answer, or the folder is gone
                continue


def refuse_if_held(path: Path, folder: Path) -> None:
    """Raise FolderInUse if a living process holds the lock `path` of `folder`; writes nothing."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        found = _Found.read(path)
        if found is not None and not _has_ended(found):
            raise _in_use(folder, path, found)


def holder_of(folder: Path) -> Holder | None:
    """Return the living process that runs in a run folder, None where there is none."""
    try:
        found = _Found.read(folder / LOCK)
    except OSError:
        return None
    if found is None or found.holder == _UNKNOWN or _has_ended(found):
        return None
    return found.holder


def _has_ended(found: _Found) -> bool:
    """Return whether the holder has ended; this host's clock is good enough for a lock that is only looked at."""
    return found.holder.has_ended(Holder.here("", {}), time.time() - found.changed)


def _in_use(folder: Path, path: Path, found: _Found) -> FolderInUse:
    holder = found.holder
    if holder == _UNKNOWN:
        hint = f"it counts as ended {SILENT_S:g} s after {path} has changed: wait, remove it if nothing runs there"
    elif holder.machine == this_machine():
        hint = f"wait for its end, or end it by `kill {holder.pid}`"
    else:
        hint = f"wait for its end, or end it there (it counts as ended after {SILENT_S:g} s without a sign of life)"
    return FolderInUse(f"{folder} is in use: {holder}; {hint}, or choose another folder")


def _try(path: Path, me: Holder) -> _Found | None:
    """Take the lock and return None, or return its holder."""
    temporary = path.with_name(f"{path.name}.{me.token}")
    try:
        temporary.write_text(json.dumps(asdict(me)), encoding="utf-8")
        while not _link(temporary, path):
            found = _Found.read(path)
            if found is None:
                if path.is_symlink():
                    raise FolderInUse(f"{path}, in the place of a lock, is a link that leads nowhere; remove it")
                continue
            os.utime(temporary)
            if not found.holder.has_ended(me, temporary.stat().st_mtime - found.changed):
                return found
            _remove_ended(path, found.holder)
        return None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> bool:
    """Make the lock with the content of `temporary`; return whether that worked."""
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        # NFS says so too where the answer to a first, successful request was lost.
        return temporary.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "wb") as file:
        file.write(read_bytes(temporary))
    return True


def _remove_ended(path: Path, ended: Holder) -> None:
    """Remove the lock of a holder that has ended.

    Only the process that made a file named after that holder may do so, and only after a second look: otherwise a slow
    process could remove the lock of the one that has taken over meanwhile.
    """
    right = path.with_name(f"{path.name}.{ended.token}.ended")
    try:
        os.close(os.open(right, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        with suppress(FileNotFoundError):
            if time.time() - right.stat().st_mtime > SILENT_S:  # that process was killed here
                right.unlink()
        time.sleep(_POLL_S / 20)
        return
    try:
        found = _Found.read(path)
        if found is not None and found.holder.token == ended.token:
            path.unlink(missing_ok=True)
    finally:
        right.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    return target.parent / f".{target.name}{LOCK}"


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; return the new ones, the deepest first."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # one that is not empty ends it
        for folder in folders:
            folder.rmdir()


def _slurm_has_ended(job: str, starts: int) -> bool:
    """Return whether Slurm says that this start of a job has ended; False where it does not know."""
    number = re.fullmatch(r"Slurm job (\w+)", job)
    if number is None:
        return False
    command = ["scontrol", "show", "job", number[1], "--oneliner"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    state, restarts = re.search(r"\bJobState=(\w+)", shown), re.search(r"\bRestarts=(\d+)", shown)
    return state is not None and (state[1] not in _RUNNING or (restarts is not None and int(restarts[1]) > starts))
