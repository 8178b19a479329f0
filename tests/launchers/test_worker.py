"""A rank's device and threads, that all ranks agree on them, what it does not import, and its end with its launcher."""

import json
import multiprocessing
import os
import queue
import signal
import sys
import textwrap
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from tests.launchers.forked import fork_server
from tests.launchers.runs import run_code
from trimaran.launchers.rendezvous.fingerprint import InconsistentRanksError
from trimaran.launchers.rendezvous.store import single_process
from trimaran.launchers.worker import device as devices
from trimaran.launchers.worker import entry, process, run
from trimaran.launchers.worker.device import (
    DeviceError,
    Resources,
    check_resources,
    choose_device,
    resources_of,
    threads_of_rank,
)
from trimaran.launchers.worker.tasks import TrainTask
from trimaran.runtime import files
from trimaran.runtime.folder_lock import LOCK, FolderLock, Holder, holder_of
from trimaran.runtime.spec import RunSpec, parse_spec

CPU = Resources("host a", "a", "cpu", "gloo", "float32", "torch", "", "", 0, "ff", None)
GPU = replace(CPU, device="cuda", backend="nccl", kernels="triton", gpu="GPU-0", gpu_name="H100", num_gpus=8)


def spec_of(**launcher: object) -> RunSpec:
    raw: dict[str, Any] = {
        "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2},
        "optimizer": {"lr": 1e-3},
        "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "seq_len": 16},
        "launcher": launcher,
    }
    return parse_spec(raw)


def see(monkeypatch: pytest.MonkeyPatch, num_gpus: int, of_host: int) -> list[torch.device]:
    """Have torch see some of the GPUs of the host; return the list of devices that are set."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(devices, "_gpus_of_host", lambda: [f"nvidia{index}" for index in range(of_host)])
    return taken


@pytest.mark.parametrize(
    ("wish", "num_gpus", "of_host", "visible"),
    [("auto", 0, 0, None), ("cpu", 4, 4, None), ("auto", 0, 8, ""), ("auto", 0, 8, "-1"), ("auto", 0, 8, "NoDevFiles")],
)
def test_the_cpu_is_taken_where_there_is_no_gpu_or_none_is_wanted(
    wish: Literal["auto", "cpu"], num_gpus: int, of_host: int, visible: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, num_gpus, of_host)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert choose_device(wish, 0, 2, environment) == torch.device("cpu")


@pytest.mark.parametrize(
    ("wish", "of_host", "words"),
    [
        ("auto", 8, r"this host has 8 GPUs, and torch .* sees none of them here: .*set launcher\.device to cpu"),
        ("cuda", 0, r"launcher\.device is cuda, and torch .* sees none"),
    ],
)
def test_the_cpu_is_not_taken_silently(
    wish: Literal["auto", "cuda"], of_host: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, 0, of_host)
    with pytest.raises(DeviceError, match=words):
        choose_device(wish, 0, 2, {})


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "local_world_size", "index"),
    [(8, 3, 8, 3), (1, 3, 4, 0), (2, 3, 4, 1), (4, 1, 2, 1), (1, 0, 1, 0)],
)
def test_a_rank_takes_the_gpu_of_its_number_or_of_its_own_view(
    num_gpus: int, local_rank: int, local_world_size: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --gpus-per-task=1 each rank sees one GPU, and that is number 0."""
    taken = see(monkeypatch, num_gpus, 8)
    assert choose_device("auto", local_rank, local_world_size, {}) == torch.device("cuda", index)
    assert taken == [torch.device("cuda", index)]


def test_gpus_of_their_own_and_ranks_of_one_kind_are_accepted() -> None:
    check_resources([replace(GPU, gpu=f"GPU-{rank}", num_gpus=1) for rank in range(4)])
    check_resources([GPU, replace(GPU, machine="b")])  # the same name on another host
    check_resources([CPU] * 4)


def test_ranks_that_would_share_a_gpu_are_refused() -> None:
    """Seven of a node's eight GPUs are there."""
    found = [replace(GPU, gpu=f"GPU-{rank % 7}", num_gpus=7) for rank in range(8)]
    with pytest.raises(
        DeviceError, match=r"ranks 0 and 7 \(host a\) would share one GPU, H100 GPU-0: torch sees 7 there for 8 ranks"
    ):
        check_resources(found)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (replace(CPU, where="host b"), r"device: cuda on ranks 0-1 \(host a\), cpu on rank 2 \(host b\)"),
        (replace(GPU, gpu="GPU-2", backend="gloo"), "backend: nccl on ranks 0-1 .*, gloo on rank 2"),
        (replace(GPU, gpu="GPU-2", dtype="bfloat16"), "dtype: float32 on ranks 0-1 .*, bfloat16 on rank 2"),
        (replace(GPU, gpu="GPU-2", kernels="torch"), "kernels: triton on ranks 0-1 .*, torch on rank 2"),
    ],
)
def test_ranks_that_differ_are_listed(odd: Resources, words: str) -> None:
    with pytest.raises(InconsistentRanksError, match=words):
        check_resources([GPU, replace(GPU, gpu="GPU-1"), odd])


@pytest.mark.parametrize(
    ("masks", "quota", "threads"),
    [
        ([f"{0xFF << 8 * rank:x}" for rank in range(8)], None, [8] * 8),  # Slurm: 8 CPUs a task, 8 tasks
        (["f" * 16] * 8, None, [8] * 8),  # torchrun: one mask for all
        (["3", "3", "fc"], None, [1, 1, 6]),
        (["1"] * 4, None, [1] * 4),
        (["f" * 16] * 8, 16, [2] * 8),  # a container with a share of the CPU time
    ],
)
def test_a_rank_has_its_share_of_the_cores_that_it_may_use(
    masks: list[str], quota: int | None, threads: list[int]
) -> None:
    found = [replace(CPU, cores=mask, quota=quota) for mask in masks] + [replace(CPU, machine="b")]
    assert [threads_of_rank(spec_of(), found, rank) for rank in range(len(masks))] == threads
    assert threads_of_rank(spec_of(threads_per_rank=3), found, 0) == 3


def test_a_rank_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    here = resources_of(spec_of(), torch.device("cpu"), "host a")
    assert (here.device, here.backend, here.dtype, here.kernels, here.gpu) == ("cpu", "gloo", "float32", "torch", "")
    assert int(here.cores, 16)
    properties = SimpleNamespace(uuid="1-2-3", name="NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(devices, "kernels_of", lambda spec, device: (SimpleNamespace(name="triton"), ""))
    there = resources_of(spec_of(), torch.device("cuda", 1), "host a")
    assert (there.device, there.backend, there.kernels) == ("cuda", "nccl", "triton")
    assert (there.gpu, there.gpu_name, there.num_gpus) == ("1-2-3", "NVIDIA H200", 8)


def test_machine_json_names_the_gpus_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' records are made up; the process group is not joined."""
    spec = spec_of(device="auto").model_copy(deep=True)
    output = spec.train.model_copy(update={"output_dir": str(tmp_path)})
    spec = spec.model_copy(update={"train": output})
    found = [replace(GPU, gpu=f"GPU-{rank}", gpu_name="NVIDIA H200") for rank in range(2)]
    monkeypatch.setattr(run, "choose_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(run, "resources_of", lambda *_: found[0])
    monkeypatch.setattr(run, "join_world", lambda *_: None)
    monkeypatch.setattr(run, "open_data", lambda *_, **__: None)
    rank = process.Rank(announces=False)
    rendezvous = single_process()
    answers = iter([["{}", "{}"], [json.dumps(asdict(each)) for each in found]])
    task = TrainTask(spec=tmp_path / "spec.yaml", data=tmp_path)
    run._join(rank, rendezvous, task, spec, lambda text: next(answers))
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["accelerators"] == "2 x NVIDIA H200"
    assert machine["mfu_peak"] == "no peak of H200 is known in float32: TF32 or not is not told"


def test_a_failure_that_finds_a_full_disk_is_recorded_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half-written is left, on which torchrun's agent would fail: "Expecting value: line 1 column 1"."""
    monkeypatch.setattr(process, "exit_process", sys.exit)
    agents = tmp_path / "agent.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(agents))
    rank = process.Rank(announces=False)
    rank.keep_records(tmp_path / "logs", tmp_path / "spare")
    ours = tmp_path / "logs" / "rank-0" / process.ERROR_FILE

    def write_text(path: Path, text: str) -> None:
        if path in (ours, agents):
            raise OSError(28, "No space left on device", str(path))
        files.write_text(path, text)

    monkeypatch.setattr(process, "write_text", write_text)
    with pytest.raises(SystemExit):
        rank.fail(OSError(28, "No space left on device", "run/metrics.jsonl"))
    assert not ours.exists()
    assert not agents.exists()
    record = json.loads((tmp_path / "spare" / "rank-0" / process.ERROR_FILE).read_text())
    assert record["message"].startswith("run/metrics.jsonl: No space left on device; free some space there")


def test_a_record_that_two_threads_write_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread's own failure, and another rank's that the relay's thread hears of, of different lengths."""
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    rank = process.Rank(announces=False)
    rank._folder = tmp_path
    failures = [process.Failure(number, "here", 1, "x" * (1000 * number)) for number in (1, 50)]

    def write(failure: process.Failure) -> None:
        for _ in range(200):
            rank._write_record(failure, secondary=False)

    rank._write_record(failures[0], secondary=False)
    threads = [threading.Thread(target=write, args=(failure,)) for failure in failures]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert json.loads((tmp_path / "error.json").read_text())["rank"] in (1, 50)
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]


def test_a_rank_that_saves_when_its_launcher_ends_exits_after_that_and_holds_the_lock_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits: queue.Queue[int] = queue.Queue()
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(process, "exit_process", exits.put)
    monkeypatch.setattr(os, "kill", lambda *words: signals.append(words))
    monkeypatch.setattr(entry, "_STEP_S", 0.0)
    launcher = replace(Holder.here("trimaran train", {}), pid=2**22 + 1)  # there is no such process
    (tmp_path / LOCK).write_text(json.dumps(asdict(launcher)))
    rank, gone = process.Rank(announces=False), threading.Event()
    rank.run, rank.saves = tmp_path, True
    entry.leave_after(gone.wait, rank)
    assert not signals
    gone.set()
    while (holder := holder_of(tmp_path)) is None:
        time.sleep(0.01)
    assert holder.pid == os.getpid()
    assert signals == [(os.getpid(), signal.SIGTERM)]
    time.sleep(0.3)
    assert exits.empty()
    rank.saves = False
    assert exits.get(timeout=60) == 1
    assert not (tmp_path / LOCK).exists()


def test_a_rank_whose_launcher_is_gone_exits_where_another_run_has_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "exit_process", sys.exit)
    monkeypatch.setattr(process, "_CAUSE_S", 0.2)
    rank = process.Rank(announces=False)
    rank.run = tmp_path
    with FolderLock.of_run(tmp_path, "trimaran train", {}), pytest.raises(SystemExit, match="143"):
        rank.keep_lock()


def test_what_libraries_write_to_rank_0s_standard_error_is_kept_in_its_records(tmp_path: Path) -> None:
    code = """
        import os, sys
        from pathlib import Path
        from trimaran.launchers.worker.process import Rank

        rank = Rank(announces=False)
        rank.keep_records(Path("logs"))
        rank.keep_native_errors()
        os.write(2, b"NCCL's watchdog")
        print("Python's warning", file=sys.stderr)
        """
    outcome = run_code(tmp_path, textwrap.dedent(code))
    assert (outcome.code, outcome.err) == (0, "Python's warning\n")
    assert (tmp_path / "logs" / "rank-0" / process.STDERR_FILE).read_text() == "NCCL's watchdog"


def test_a_rank_that_is_killed_after_its_return_does_not_hold_up_the_agent() -> None:
    forked = multiprocessing.get_context("fork")
    event = forked.Event()
    here, there = forked.Pipe()

    def wait_as_rank() -> None:
        entry.be_forked_rank(process.Rank(announces=False))
        there.send_bytes(b"waits")
        assert event.wait()

    ranks = [forked.Process(target=wait_as_rank) for _ in range(2)]
    for each in ranks:
        each.start()
        here.recv_bytes()
    assert not entry.wait_uncounted(event, timeout=0.0)
    ranks[0].kill()
    ranks[0].join()
    assert event._cond._sleeping_count.get_value() == 0  # type: ignore[attr-defined]
    event.set()  # waits for each process that is counted
    ranks[1].join()
    assert [each.exitcode for each in ranks] == [-signal.SIGKILL, 0]


def test_a_rank_starts_without_the_compiler() -> None:
    """torch._dynamo and the sympy that it brings take as long to import as half of torch."""
    imported = set(fork_server().imported["rank"])
    assert {"torch", "trimaran.launchers.worker.run"} <= imported
    assert not {"torch._dynamo", "sympy", "matplotlib", "transformers"} & imported


def test_the_command_line_starts_without_torch() -> None:
    """A spec that is wrong is refused before the seconds that torch takes to import."""
    imported = set(fork_server().imported["command line"])
    assert "trimaran.launchers.cli.app" in imported
    assert not {"torch", "numpy", "matplotlib", "tokenizers", "transformers"} & imported
