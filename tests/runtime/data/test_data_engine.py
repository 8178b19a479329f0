"""Tasks that prepare data survive the death of any process, and a document that never ends is left out."""

import errno
import gzip
import json
import os
import runpy
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from trimaran.launchers.data import supervisor
from trimaran.launchers.data.workers import WorkerOptions, local_workers
from trimaran.launchers.local import mpirun
from trimaran.runtime import processes
from trimaran.runtime.data.engine import cluster as cluster_of_engine
from trimaran.runtime.data.engine.cluster import MOST_DEATHS, MOST_FAILURES, Cluster, Credentials, TaskFailed
from trimaran.runtime.data.engine.task import Output, Task
from trimaran.runtime.data.engine.watch import Board, Watch, note_slow, slow_documents
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.prepare import prepare_data
from trimaran.runtime.data.recipe import stage_runner
from trimaran.runtime.data.recipe.curate import curate
from trimaran.runtime.data.recipe.of_spec import recipe_of
from trimaran.runtime.data.tokens import kept
from trimaran.runtime.scratch import scratch_folder
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.spec.parsing import parse_spec

_MODULE = """
import os, signal, time
from pathlib import Path

def double(arguments, inputs, folder, watch):
    marks = Path(arguments["marks"])
    for number in range(3):
        if number in watch.slow:
            continue
        with watch.document(number):
            mark = marks / f"{arguments['n']}-{number}-{time.monotonic_ns()}"
            mark.touch()
            tries = len(list(marks.glob(f"{arguments['n']}-{number}-*")))
            if (arguments["n"], number) in ((1, 0), (2, 1)) and tries == 1:
                os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory is short
            if (arguments["n"], number) == (3, 2):
                time.sleep(1000)
            if arguments["n"] == "fatal":
                os.kill(os.getpid(), signal.SIGKILL)
            if arguments["n"] == "wrong":
                raise OSError(5, "Input/output error", "shelf.jsonl")
    (folder / "out.txt").write_text(f"{2 * arguments['n']}")
    return {"slow": sorted(watch.slow), "text_bytes": {"in": 1}}
"""
_DYING = """
import os, signal
from pathlib import Path
from trimaran.runtime.data.tokens import tasks
from trimaran.runtime.data.tokens.tasks import measure_part, save_tokenizer, train_tokenizer

def encode_part(arguments, inputs, folder, watch):
    mark = Path(os.environ["DEATHS"], inputs[0].name)
    if not mark.exists() and len(list(mark.parent.iterdir())) < 2:
        mark.touch()
        (folder / "train-00000.bin").write_bytes(b"half of its tok")
        os.kill(os.getpid(), signal.SIGKILL)
    return tasks.encode_part(arguments, inputs, folder, watch)
"""


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three workers, two of which are used, that give a document five seconds."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "trial_tasks.py").write_text(_MODULE, encoding="utf-8")
    (folder / "dying_tasks.py").write_text(_DYING, encoding="utf-8")
    (folder / "deaths").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("DEATHS", str(folder / "deaths"))
        patch.syspath_prepend(folder)
        with Cluster(folder / "root", local_workers(WorkerOptions(3, 5.0, None))) as cluster:
            cluster._workers = replace(cluster._workers, count=2)
            yield cluster


def _task(marks: Path, number: int | str) -> Task:
    return Task("double", "trial_tasks:double", {"n": number, "marks": str(marks)}, f"shelf {number}")


def test_tasks_survive_deaths_and_endless_documents(cluster: Cluster, marks: Path) -> None:
    tasks, done = [_task(marks, number) for number in range(6)], list[str]()
    outputs = cluster.run(tasks, lambda task, output: done.append(task.about))
    assert [(output.folder / "out.txt").read_text() for output in outputs] == ["0", "2", "4", "6", "8", "10"]
    assert [output.result["slow"] for output in outputs] == [[], [], [], [2], [], []]
    assert sorted(done) == [task.about for task in tasks]
    before = sorted(marks.iterdir())
    assert cluster.run(tasks, lambda task, output: None) == outputs, "what is done is found"
    assert sorted(marks.iterdir()) == before, "and not done again"


def test_failures_name_their_input(cluster: Cluster, marks: Path) -> None:
    with pytest.raises(TaskFailed, match=f"shelf fatal: {MOST_DEATHS} workers died while they did its stage double"):
        cluster.run([_task(marks, "fatal")], lambda task, output: None)
    assert len(list(marks.glob("fatal-*"))) == MOST_DEATHS
    with pytest.raises(TaskFailed, match=r"shelf wrong: .*Input/output error: 'shelf.jsonl'"):
        cluster.run([_task(marks, "wrong")], lambda task, output: None)
    assert len(list(marks.glob("wrong-*"))) == MOST_FAILURES, "a remote store may come back"
    full = cluster_of_engine._failure(_task(marks, 1), OSError(errno.ENOSPC, "No space left on device", "a.npz"))
    assert str(full) == (
        "shelf 1: No space left on device: 'a.npz'; make room there and run the command again, which goes on"
    )


def test_any_number_of_workers_and_deaths_give_the_same_manifest_and_shards(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files, one packed, each many parts; in the second run workers die while they tokenize."""
    texts = (f"Text {number % 40}, " + "of which some words are repeated. " * 40 for number in range(50))
    rows = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(rows[:30]), encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(rows[30:]).encode()))
    data = {"source": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")], "dedup": {"url": False, "near": False}}
    spec = parse_spec(
        {
            "data": {**data, "tokenizer_vocab_size": 300, "cache_dir": str(tmp_path / "cache")},
            "optimizer": {"lr": 0.001},
            "model": {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "vocab_size": 512},
            "train": {"num_steps": 2, "global_batch_size": 4, "micro_batch_size": 2, "seq_len": 16},
        }
    )
    monkeypatch.setattr(stage_runner, "PIECE_BYTES", 12000)
    manifests, splits = list[str](), list[Any]()
    monkeypatch.setattr(cluster, "_workers", cluster._workers)
    monkeypatch.setattr(cluster, "root", cluster.root)
    for count in (1, 2, 3):
        cluster._workers, cluster.root = replace(cluster._workers, count=count), tmp_path / str(count)
        curated = curate(recipe_of(spec), cluster, lambda *_: None)
        assert len(curated.parts) == 6
        with monkeypatch.context() as patch:
            if count == 2:
                patch.setattr(kept, "_TASKS", "dying_tasks")
            prepared = prepare_data(spec, curated=curated, runner=cluster)
        manifests.append((curated.folder / "recipe.json").read_text(encoding="utf-8"))
        splits.append(prepared.manifest["splits"])
        shutil.rmtree(prepared.folder)
    assert len(list(Path(os.environ["DEATHS"]).iterdir())) >= 2
    assert manifests[0] == manifests[1] == manifests[2]
    assert splits[0] == splits[1] == splits[2]


def test_no_worker_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    (tmp_path / "stage" / ".half-done").mkdir(parents=True)
    with (
        Cluster(tmp_path, local_workers(WorkerOptions(1, 2.0, None))) as cluster,
        pytest.raises(DataError, match="no worker is left"),
    ):
        cluster.run([_task(tmp_path, 1)], lambda task, output: None)
    assert not list((tmp_path / "stage").iterdir()), "what killed workers left is gone"


def test_a_process_ends_where_its_starter_died_before_it_could_ask_to(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, commands = list[int](), list[list[str]]()
    monkeypatch.setattr(processes, "_prctl", lambda *_: None)
    monkeypatch.setattr("os._exit", ended.append)
    processes.exit_with_parent(os.getppid())
    assert not ended
    processes.exit_with_parent(os.getpid())
    assert ended == [1]
    worker = SimpleNamespace(poll=lambda: 0, returncode=0)
    monkeypatch.setattr(supervisor.subprocess, "Popen", lambda command, **_: commands.append(command) or worker)
    assert supervisor.supervise(["credentials.json", "--parent", "1"], 1.0) == 0
    assert commands[0][-2:] == ["--parent", str(os.getpid())], "the worker's is its supervisor"
    with local_workers(WorkerOptions(1, 2.0, None)).start(Path("credentials.json")):
        pass
    assert commands[1][-2:] == ["--parent", str(os.getpid())]
    monkeypatch.setattr(mpirun, "find_mpirun", lambda: "mpirun")
    given = dict[str, Any]()
    monkeypatch.setattr("subprocess.run", lambda command, **more: given.update(more) or worker)
    assert mpirun.run_by_mpirun(cast(RunSpec, SimpleNamespace(world_size=1)), Path("spec.yaml"), []) == 0
    assert given["preexec_fn"].args == (os.getpid(),)


def test_a_rank_asks_to_end_with_its_launcher_before_it_imports_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("trimaran.launchers.worker.")]:
        monkeypatch.delitem(sys.modules, name)

    def ended() -> None:
        raise SystemExit(1)

    monkeypatch.setattr(processes, "exit_with_parent", ended)
    with pytest.raises(SystemExit):
        runpy.run_module("trimaran.launchers.worker", run_name="__main__")
    assert "trimaran.launchers.worker.entry" not in sys.modules


def test_the_folder_of_a_killed_process_goes_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left, fresh, other = (
        tmp_path / name for name in ("trimaran-worker-left", "trimaran-worker-new", "trimaran-other-1")
    )
    with scratch_folder("worker") as used:
        for folder in (left, fresh, other, used):
            folder.mkdir(exist_ok=True)
            (folder / "board").touch()
            if folder != fresh:
                os.utime(folder, (0, 0))
        (tmp_path / "trimaran-worker-link").symlink_to(other)
        with scratch_folder("worker") as second:
            assert not list(second.iterdir())
            assert not left.exists()
            assert all((folder / "board").exists() for folder in (fresh, other, used))
    assert not used.exists()


def test_credentials_are_this_users(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    Credentials("tls://127.0.0.1:1", "certificate", "key").write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Credentials.read(path) == Credentials("tls://127.0.0.1:1", "certificate", "key")
    with pytest.raises(DataError, match="cannot join the run"):
        Credentials.read(tmp_path / "other.json")


def _write(arguments: dict[str, int], inputs: list[Path], folder: Path, watch: Watch) -> dict[str, int]:
    del inputs, watch
    (folder / "a.txt").write_text(str(arguments["n"]), encoding="utf-8")
    return {"n": arguments["n"]}


def test_a_task_is_its_content(tmp_path: Path) -> None:
    task = Task("write", f"{__name__}:_write", {"n": 1, "path": "/here"}, "it", identity={"n": 1})
    output = task.run(tmp_path, Watch())
    moved = Task("write", f"{__name__}:_write", {"n": 1, "path": "/there"}, "it", identity={"n": 1})
    assert moved.found(tmp_path) == output
    changes = [
        Task("write", f"{__name__}:_write", {"n": 2}, "it"),
        Task("write", f"{__name__}:_write", {"n": 1}, "it", versions={"ftfy": "7"}),
        Task("write", f"{__name__}:_write", {"n": 1}, "it", inputs=(output,)),
        Task("write", f"{__name__}:_other", {"n": 1}, "it"),
    ]
    assert len({task.key, *(each.key for each in changes)}) == 5
    (output.folder / "a.txt").write_text("cut", encoding="utf-8")
    assert task.found(tmp_path) is None, "a file of another size is no output"
    assert task.run(tmp_path, Watch()) == output
    record = json.loads((output.folder / "task.json").read_text(encoding="utf-8"))
    assert record["result"] == {"n": 1}
    assert Output.read(tmp_path) is None


def test_the_board_tells_what_takes_long(tmp_path: Path) -> None:
    board, supervisor = Board(tmp_path / "board"), Board(tmp_path / "board")
    note = tmp_path / "stage" / "key.slow.json"
    board.task(str(note))
    watch = Watch(board, slow_documents(note))
    assert supervisor.overdue(0.0) is None
    with watch.document(7):
        time.sleep(0.01)
        assert supervisor.overdue(0.001) == (note, 7)
        assert supervisor.overdue(100.0) is None
    assert supervisor.overdue(0.0) is None
    with pytest.raises(OSError, match="gone"), watch.document(8):
        raise OSError("gone")
    assert supervisor.overdue(0.0) is None, "the next task of the worker would lose its document 8"
    assert supervisor.begun == 2
    note_slow(note, 7)
    note_slow(note, 3)
    assert slow_documents(note) == {3, 7}
