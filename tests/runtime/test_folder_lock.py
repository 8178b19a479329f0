"""The lock of a folder: one holder, named; taken over from the dead, on this host and on others; safe under a race."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier

import pytest

from trimaran.runtime import folder_lock
from trimaran.runtime.data.files import build_once
from trimaran.runtime.folder_lock import LOCK, SILENT_S, FolderInUse, FolderLock, Holder, holder_of
from trimaran.runtime.processes import this_machine

ME = Holder.here("trimaran train", {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURMD_NODENAME": "n1"})
ELSEWHERE = replace(ME, machine="another kernel", token="theirs")


def left(folder: Path, holder: Holder, silent_s: float = 0.0) -> None:
    """Write the lock of another holder, which has touched it `silent_s` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(holder)))
    os.utime(folder / LOCK, (time.time() - silent_s,) * 2)


def take(folder: Path) -> None:
    FolderLock.of_run(folder, "trimaran train", {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}).release()


def test_a_second_holder_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "my run"
    with FolderLock.of_run(run, "trimaran train", {}):
        words = (
            rf"my run is in use: `trimaran train` on host .* \(process {os.getpid()}.* since 20.*`kill {os.getpid()}`"
        )
        with pytest.raises(FolderInUse, match=words):
            FolderLock.of_run(run, "trimaran train", {})
        with pytest.raises(FolderInUse, match="my run is in use"):
            FolderLock.beside(run, "trimaran import")
        holder = holder_of(run)
        assert holder is not None
        assert (holder.pid, holder.what) == (os.getpid(), "trimaran train")
    assert not run.parent.exists(), "folders that were made for the lock are removed if they are empty"
    assert holder_of(run) is None
    with FolderLock.beside(run, "trimaran import"), pytest.raises(FolderInUse, match="my run is in use"):
        FolderLock.of_run(run, "trimaran train", {})


@pytest.mark.parametrize(
    ("holder", "silent_s", "ended"),
    [
        (replace(ME, token="theirs"), SILENT_S + 60, False),  # this very process, however long it is silent
        (replace(ME, pid=os.getppid(), started="0"), 0.0, True),  # another process has its number now
        (replace(ME, pid=2**22 + 1), 0.0, True),
        (replace(ELSEWHERE, starts=(1, 0)), 0.0, True),  # the job was requeued on another node
        (replace(ELSEWHERE, starts=(2, 0)), 0.0, False),
        (replace(ELSEWHERE, job="Slurm job 6", starts=(1, 0)), 0.0, False),
        (replace(ELSEWHERE, job=""), SILENT_S - 30, False),
        (replace(ELSEWHERE, job=""), SILENT_S + 30, True),
    ],
)
def test_a_lock_is_taken_over_from_the_dead_alone(
    holder: Holder, silent_s: float, ended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no scontrol
    left(tmp_path, holder, silent_s)
    if ended:
        take(tmp_path)
        assert list(tmp_path.iterdir()) == []
    else:
        with pytest.raises(FolderInUse, match=re.escape(holder.job or holder.since)):
            take(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize(
    ("shown", "ended"),
    [
        ("JobState=COMPLETED Restarts=2", True),
        ("JobState=PENDING Restarts=3", True),
        ("JobState=RUNNING Restarts=3", True),
        ("JobState=RUNNING Restarts=2", False),
        ("JobState=COMPLETING Restarts=2", False),
        ("slurm_load_jobs error: Invalid job id specified", False),
    ],
)
def test_slurm_is_asked_about_a_holder_on_another_host(
    shown: str, ended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho 'JobId=7 {shown}'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    left(tmp_path / "run", ELSEWHERE)
    if ended:
        take(tmp_path / "run")
    else:
        with pytest.raises(FolderInUse, match=r"on host n1 .*Slurm job 7.*counts as ended after 120 s"):
            take(tmp_path / "run")


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_find_a_dead_holder_one_gets_the_lock(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def link(*paths: Path) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    for round_ in range(5):
        run, start = tmp_path / str(round_), Barrier(8)
        left(run, replace(ME, pid=2**22 + 1), SILENT_S + 1)

        def attend(number: int, run: Path = run, start: Barrier = start) -> FolderLock | None:
            start.wait()
            try:
                return FolderLock.of_run(run, f"contender {number}", {})
            except FolderInUse:
                return None

        with ThreadPoolExecutor(8) as pool:
            locks = [lock for lock in pool.map(attend, range(8)) if lock is not None]
        assert len(locks) == 1
        locks[0].release()
        assert list(run.iterdir()) == []


WRONG = [{**asdict(ME), **change} for change in ({"job": 5}, {"pid": "x"}, {"starts": ["a"]}, {"token": "../x"})]


@pytest.mark.parametrize(("silent_s", "ended"), [(0.0, False), (SILENT_S + 30, True)])
@pytest.mark.parametrize("content", ["", '{"what"', "[]", *map(json.dumps, WRONG)])
def test_a_damaged_lock_counts_by_its_age(content: str, silent_s: float, ended: bool, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    os.utime(tmp_path / LOCK, (time.time() - silent_s,) * 2)
    assert holder_of(tmp_path) is None, "nobody is told to kill a process of unknown number"
    if ended:
        take(tmp_path)
    else:
        words = r"a process that its lock does not name; it counts as ended 120 s after .*/\.lock has changed: wait"
        with pytest.raises(FolderInUse, match=words):
            take(tmp_path)


def test_a_folder_or_a_pipe_in_the_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    for place, make in ((tmp_path / "a" / LOCK, Path.mkdir), (tmp_path / "b" / LOCK, os.mkfifo)):
        place.parent.mkdir()
        make(place)
        with pytest.raises(OSError, match=r"in the place of a lock; remove it: '.*\.lock'"):
            take(place.parent)
        assert holder_of(place.parent) is None


def eventually(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_holder_gives_signs_of_life_and_ends_when_another_has_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.02)
    monkeypatch.setattr(os, "kill", lambda *words: signals.append(words))
    lock = FolderLock.of_run(tmp_path, "trimaran train", {})
    file = tmp_path / LOCK
    os.utime(file, (0, 0))
    eventually(lambda: file.stat().st_mtime > 0)
    file.unlink()
    eventually(file.exists)
    assert not signals
    left(tmp_path, ELSEWHERE)
    eventually(lambda: signals)
    assert signals == [(os.getpid(), signal.SIGTERM)]
    lock.release()
    assert file.exists(), "it is another's"


def test_of_two_that_build_one_folder_the_second_waits(tmp_path: Path) -> None:
    built, both = [], Barrier(2)

    def build(temporary: Path) -> None:
        time.sleep(0.2)
        (temporary / "data").write_text("x")
        built.append(temporary)

    def attend(_: int) -> str:
        both.wait()
        build_once(tmp_path / "cache" / "key", build)
        return (tmp_path / "cache" / "key" / "data").read_text()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(attend, range(2))) == ["x", "x"]
    assert len(built) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key"]


def test_this_machine_has_a_name() -> None:
    assert this_machine()


def test_a_link_that_leads_nowhere_in_the_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "nowhere")
    with pytest.raises(FolderInUse, match=r"\.lock, in the place of a lock, is a link that leads nowhere; remove it"):
        FolderLock.of_run(tmp_path, "trimaran train", {})
