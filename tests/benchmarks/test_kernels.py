"""benchmarks/kernels.py in Triton's interpreter writes its tables and finds a wrong kernel; figures are not tested."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO

import pytest
import torch

from tests.benchmarks.scripts import load_script
from tests.kernels.interpreter import start_interpreted
from tests.launchers.forked import Forked

TIMEOUT_S = 100.0
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


class InInterpreter:
    """Runs the benchmark with Triton's interpreter: see interpreter_process.py."""

    def __init__(self, process: Forked, requests: IO[str], answers: IO[str]) -> None:
        self._process, self._requests, self._answers = process, requests, answers

    def __call__(self, folder: Path, *arguments: str, wrong: str = "") -> tuple[int, str, str]:
        """Run it into `folder`; return the exit status, its standard output and its errors.

        Args:
            wrong: an op whose kernel is falsified before.
        """
        output, errors = folder / "output.txt", folder / "errors.txt"
        request = {
            "arguments": [*arguments, "--out", str(folder)],
            "wrong": wrong,
            "output": str(output),
            "errors": str(errors),
        }
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        try:
            status = self._answers.readline()
        except BaseException:  # a later test must not read the answer of this one
            self._process.kill()
            raise
        assert status, "the process in the interpreter died"
        return int(status), output.read_text(encoding="utf-8"), errors.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def in_interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InInterpreter]:
    """What runs the benchmark in the interpreter."""
    code = "from tests.benchmarks.interpreter_process import serve; serve()"
    (read_requests, write_requests), (read_answers, write_answers) = os.pipe(), os.pipe()
    with open(write_requests, "w") as requests, open(read_answers) as answers:
        errors = (tmp_path_factory.mktemp("interpreter") / "errors").open("w")
        with open(read_requests) as stdin, open(write_answers, "w") as stdout, errors:
            process = start_interpreted(code, [], (stdin, stdout, errors), preload=["torch._dynamo"])
        yield InInterpreter(process, requests, answers)
        requests.close()
        process.wait(TIMEOUT_S)


@pytest.fixture
def benchmark_here(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/kernels.py in this process, which sees no GPU."""
    module = load_script("kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return module


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
@pytest.mark.timeout(620)
def test_a_smoke_run_writes_every_table_and_the_plot(tmp_path: Path, in_interpreter: InInterpreter) -> None:
    status, printed, errors = in_interpreter(tmp_path, "--smoke")
    assert status == 0, printed[-4000:] + errors[-4000:]
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
    assert (tmp_path / "kernels.md").read_text(encoding="utf-8") in printed + "\n"


@pytest.mark.slow
def test_tuning_writes_the_keys_it_measured_and_nothing_else(tmp_path: Path, in_interpreter: InInterpreter) -> None:
    table = tmp_path / "interpreter.json"
    shutil.copy(ROOT / "kernels" / "tuned" / "interpreter.json", table)
    before = table.read_text(encoding="utf-8")
    options = ("--smoke", "--tune", "--op", "rotary", "--op", "attention_statistics", "--tuned-dir", str(tmp_path))
    status, _, errors = in_interpreter(tmp_path, *options)
    assert status == 0, errors
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
def test_a_wrong_op_is_not_timed_and_fails_the_run(tmp_path: Path, in_interpreter: InInterpreter) -> None:
    options = ("--smoke", "--op", "swiglu", "--op", "geglu")
    status, _, errors = in_interpreter(tmp_path, *options, wrong="swiglu")
    assert status == 1, errors
    assert "swiglu, 5 x 24, torch.float32: error 1.00e-02 over the tolerance 2e-05" in errors
    found = tables(tmp_path / "kernels.md")
    assert {row[0]: row[-1] for row in found["Correctness"]} == {"swiglu": "**wrong**", "geglu": "equal"}
    assert {row[0] for row in found["Memory-bound ops"]} == {"geglu"}


@pytest.mark.parametrize(("arguments", "interpret"), [(("--smoke",), False), ((), True)], ids=str)
def test_without_a_gpu_it_says_so(
    arguments: tuple[str, ...],
    interpret: bool,
    benchmark_here: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(benchmark_here, "interpreting", lambda: interpret)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    assert benchmark_here.main() == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "needs an NVIDIA GPU" in message


def test_an_unknown_op_is_named(
    benchmark_here: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--op", "atention"])
    with pytest.raises(SystemExit, match="2"):
        benchmark_here.main()
    assert "unknown --op atention" in capsys.readouterr().err
