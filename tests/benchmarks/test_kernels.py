"""benchmarks/kernels.py in Triton's interpreter: its own code works, writes its tables and finds a wrong kernel; its figures are not looked at."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "kernels.py"
MEMORY_OPS = (
    "rms_norm",
    "layer_norm",
    "add_rms_norm",
    "add_layer_norm",
    "rotary",
    "swiglu",
    "geglu",
    "gelu",
    "dropout_add",
    "adamw",
)


def run(*arguments: str, interpret: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": str(int(interpret)),
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def tables(file: Path) -> dict[str, list[list[str]]]:
    """Return the cells of each section's rows, by title."""
    sections = file.read_text(encoding="utf-8").split("\n## ")[1:]
    rows = {
        section.splitlines()[0]: [line for line in section.splitlines() if line.startswith("| ")][2:]
        for section in sections
    }
    return {
        title: [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        for title, lines in rows.items()
    }


@pytest.mark.slow
def test_a_smoke_run_writes_every_table_and_the_plot(tmp_path: Path) -> None:
    done = run(str(SCRIPT), "--smoke", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = tables(tmp_path / "kernels.md")
    checked = {row[0]: row[-1] for row in found["Correctness"]}
    assert {*MEMORY_OPS, "attention", "cross_entropy", "decode"} <= checked.keys()
    assert set(checked.values()) == {"equal"}
    assert {*MEMORY_OPS} <= {row[0] for row in found["Memory-bound ops"]}
    assert {row[3] for row in found["Attention"]} == {"forward", "backward", "backward, deterministic"}
    assert {row[1] for row in found["Cross entropy"]} == {"ours", "torch, unfused", "Liger"}
    assert {row[2] for row in found["Decode attention"]} == {"contiguous", "pages of 8"}
    model = found["Whole model: llama-1.3b"]
    assert [row[-1] for row in model] == ["agrees"] * 4 + ["-"]
    losses = {row[0]: row[-2] for row in model}
    assert losses["Triton kernels"] == losses["torch kernels"] == losses["torch kernels, torch.compile"]
    assert float(losses["plain PyTorch, torch.compile"]) > 0
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "kernels.md").read_text(encoding="utf-8") in done.stdout + "\n"


@pytest.mark.slow
def test_tuning_writes_the_keys_it_measured_and_nothing_else(tmp_path: Path) -> None:
    table = tmp_path / "interpreter.json"
    shutil.copy(ROOT / "kernels" / "tuned" / "interpreter.json", table)
    before = table.read_text(encoding="utf-8")
    folders = ("--tuned-dir", str(tmp_path), "--out", str(tmp_path))
    done = run(str(SCRIPT), "--smoke", "--tune", "--op", "rotary", "--op", "attention_statistics", *folders)
    assert done.returncode == 0, done.stderr
    after = table.read_text(encoding="utf-8")
    ops, ops_before = json.loads(after)["ops"], json.loads(before)["ops"]
    changed = {op for op in ops if ops[op] != ops_before[op]}
    assert changed == {"rotary", "attention_statistics"}
    assert all(ops[op]["measured"] and not ops_before[op]["measured"] for op in changed)
    assert ops["rotary"]["configs"]["default"].keys() == ops_before["rotary"]["configs"]["default"].keys()
    # As before but for these two ops' dates and single keys: the format is the same.
    lines, lines_before = after.splitlines(), before.splitlines()
    assert len(lines) == len(lines_before)
    assert sum(a != b for a, b in zip(lines, lines_before, strict=True)) <= 4
    assert tables(tmp_path / "tuning.md").keys() == {f"Tuning of {op} for interpreter" for op in changed}


@pytest.mark.slow
def test_a_wrong_op_is_not_timed_and_fails_the_run(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import dataclasses, kernels
from kernel_bench import cases
right = cases.MEMORY_OPS["swiglu"]
wrong = lambda kernels, x: right.run(kernels, x) * (1.01 if kernels.name == "triton" else 1.0)
cases.MEMORY_OPS["swiglu"] = dataclasses.replace(right, run=wrong)
sys.exit(kernels.main())
"""
    done = run("-c", script, "--smoke", "--op", "swiglu", "--op", "geglu", "--out", str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "swiglu, 5 x 24, torch.float32: error 1.00e-02 over the tolerance 2e-05" in done.stderr
    found = tables(tmp_path / "kernels.md")
    assert {row[0]: row[-1] for row in found["Correctness"]} == {"swiglu": "**wrong**", "geglu": "equal"}
    assert {row[0] for row in found["Memory-bound ops"]} == {"geglu"}


@pytest.mark.parametrize(("arguments", "interpret"), [(("--smoke",), False), ((), True)], ids=str)
def test_without_a_gpu_it_says_so(arguments: tuple[str, ...], interpret: bool) -> None:
    done = run(str(SCRIPT), *arguments, interpret=interpret)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "needs an NVIDIA GPU" in done.stderr


def test_an_unknown_op_is_named() -> None:
    done = run(str(SCRIPT), "--op", "atention")
    assert done.returncode == 2
    assert "unknown --op atention" in done.stderr
