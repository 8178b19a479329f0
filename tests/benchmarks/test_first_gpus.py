"""benchmarks/first_gpus.py without a GPU: its layouts, shape, FLOPs and tables; only the figures need one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.benchmarks.scripts import load_script
from trimaran.runtime.mesh import lone_mesh
from trimaran.runtime.spec import parse_spec

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "first_gpus.py"


@pytest.fixture(scope="module")
def first_gpus() -> ModuleType:
    return load_script("first_gpus")


def run_main(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    return int(module.main())


def test_without_a_gpu_it_ends_with_one_sentence(
    first_gpus: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run_main(first_gpus, monkeypatch, "--out", str(tmp_path)) == 2
    assert capsys.readouterr().err == (
        "benchmarks/first_gpus.py needs an NVIDIA GPU, and torch finds none; to see that it runs, use --smoke\n"
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run_main(first_gpus, monkeypatch, "--gpus", "2", "4", "--out", str(tmp_path)) == 2
    assert "needs 4 GPUs, and torch finds 2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_layout_is_a_valid_run_on_its_number_of_gpus(first_gpus: ModuleType) -> None:
    for smoke in (True, False):
        for count, cases in first_gpus.PARITY.items():
            for model, parallel in cases:
                assert parse_spec(first_gpus.parity_spec(model, parallel, smoke=smoke)).world_size == count
        for count, layouts in first_gpus.SPEED.items():
            for parallel in layouts:
                for micro_batch in first_gpus.MICRO_BATCHES:
                    spec = parse_spec(first_gpus.speed_spec(parallel, micro_batch, smoke=smoke))
                    assert spec.world_size == count
                    assert smoke or spec.num_microbatches == first_gpus.MICROBATCHES_A_STEP
    assert any(parallel.get("pp", 1) >= 3 for model, parallel in first_gpus.PARITY[4] if model == "gpt"), "tied"


def test_the_shape_has_1_3_billion_parameters_and_the_flops_of_the_formula(first_gpus: ModuleType) -> None:
    spec = parse_spec(first_gpus.speed_spec({}, 8))
    layers, hidden, ffn, vocab = 24, 2048, 5504, 32000
    matrices = layers * (4 * hidden * hidden + 3 * hidden * ffn)
    assert spec.transformer.num_parameters() == matrices + 2 * vocab * hidden + (2 * layers + 1) * hidden
    assert 1.3e9 < spec.transformer.num_parameters() < 1.4e9
    flops = 6 * (matrices + vocab * hidden) + 12 * layers * hidden * 2048
    assert spec.transformer.flops_per_token(spec.train.seq_len) == flops
    figures = first_gpus.Figures([2.0] * 13, [9.0] * 3 + [0.5] * 10, 3 << 30)  # warm-up steps do not count
    row = first_gpus.speed_row(8, {"dp": 8}, 4, figures, "NVIDIA H100 80GB HBM3")
    tokens = 4 * 8 * 8 * 2048 / 0.5
    share = tokens * flops / (8 * 989.5e12)
    assert row == ["8", "dp8", "4", f"{tokens:.0f}", f"{tokens / 8:.0f}", f"{share:.1%}", "500", "3.0", "2.0000"]


def test_a_job_starts_a_process_for_each_gpu(first_gpus: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def start(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        answers = {  # the exit code and what is printed, by the number of microbatches tried
            1: (1, "", "worker 0\nexitcode  : 75 (pid: 9)"),
            2: (75, "", "CUDA out of memory"),
            3: (0, 'a line\n{"losses": [1.0], "seconds": [0.1], "peak": 5}\n', ""),
            4: (1, "", "NCCL error"),
        }
        return subprocess.CompletedProcess(command, *answers[len(commands)])

    monkeypatch.setattr(subprocess, "run", start)

    def run(micro_batch: int) -> Any:
        parallel = {"tp": 2, "pp": 2, "dp": 2} if micro_batch != 4 else {}
        return first_gpus.run_apart(first_gpus.speed_spec(parallel, micro_batch), 13, smoke=False)

    assert first_gpus.fitting(run) == (2, first_gpus.Figures([1.0], [0.1], 5))
    flag = "--nproc-per-node"
    assert [command[command.index(flag) + 1] if flag in command else "1" for command in commands] == ["8", "1", "8"]
    jobs = [json.loads(command[command.index("--here") + 1]) for command in commands]
    assert [job["spec"]["train"]["micro_batch_size"] for job in jobs] == [8, 4, 2]
    assert {job["steps"] for job in jobs} == {13}
    with pytest.raises(first_gpus.RanksFailed, match="NCCL error"):
        run(1)


def here(first_gpus: ModuleType, *, wrong: str = "", broken: str = "") -> Callable[..., Any]:
    """Stands for run_apart: trains on one rank in this process whatever the layout is, which changes no loss."""
    found: dict[str, Any] = {}

    def run(spec: dict[str, Any], steps: int, *, smoke: bool) -> Any:
        layout = first_gpus.name_of(spec["parallel"])
        if layout == broken:
            raise first_gpus.RanksFailed("rank 1\nNCCL error: unhandled | system error", 1)
        key = json.dumps(spec["model"])
        if key not in found:
            alone = parse_spec({**spec, "parallel": {}})
            found[key] = first_gpus.train_here(alone, lone_mesh(), torch.device("cpu"), steps)
        losses, seconds = found[key].losses, (found[key].seconds * steps)[:steps]
        return first_gpus.Figures([loss * (1.001 if layout == wrong else 1) for loss in losses], seconds, 0)

    return run


def test_its_tables_have_a_row_for_each_layout_and_tell_what_failed_or_differs(
    first_gpus: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(first_gpus, "run_apart", here(first_gpus))
    assert run_main(first_gpus, monkeypatch, "--smoke", "--gpus", "2", "8", "--out", str(tmp_path)) == 0
    page = (tmp_path / "first_gpus.md").read_text(encoding="utf-8")
    layouts = [*first_gpus.PARITY[1], *first_gpus.PARITY[2], *first_gpus.PARITY[8]]
    assert page.count("| agrees |") == len(layouts)
    assert page.count("dp8 |") == 1
    assert "1.35 billion parameters" in page
    assert "Failures" not in page

    monkeypatch.setattr(first_gpus, "run_apart", here(first_gpus, wrong="pp2", broken="tp2 sequence parallel"))
    assert run_main(first_gpus, monkeypatch, "--smoke", "--gpus", "2", "--out", str(tmp_path)) == 1
    page = (tmp_path / "first_gpus.md").read_text(encoding="utf-8")
    assert "| gpt, pp2 | " in page
    assert page.count("**differs**") == 1
    assert page.count("failed: NCCL error: unhandled / system error |") == 2
    failures = page.partition("## Failures")[2].strip().splitlines()
    assert failures == [
        "- parity, gpt, tp2 sequence parallel",
        "- parity, gpt, pp2",
        "- speed, 2 GPUs, tp2 sequence parallel",
    ]


def test_a_loss_that_is_not_a_number_differs(
    first_gpus: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(spec: dict[str, Any], steps: int, **options: Any) -> Any:
        last = float("nan") if spec["parallel"] else 1.0
        return first_gpus.Figures([1.0] * (steps - 1) + [last], [1.0] * steps, 0)

    monkeypatch.setattr(first_gpus, "run_apart", run)
    failures = first_gpus.parity(first_gpus.Report(tmp_path / "page.md"), [1, 2], smoke=True)
    assert len(failures) == len(first_gpus.PARITY[2])
