"""`trimaran calibrate` and the plans by its file: what is measured and printed, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from tests.launchers.runs import trimaran, trimaran_here
from tests.plan.test_calibrate import GPU, H100, PUBLISHED, gpu_points, machine, spec
from trimaran.launchers.cli.planning.calibrate import calibrate, count_gpus
from trimaran.runtime.plan.calibrate.fitted_gpu import BLANK, fit_constants
from trimaran.runtime.plan.calibrate.record import VERSION, Machine
from trimaran.runtime.plan.cases import Case
from trimaran.runtime.spec import dump_spec

FALCON = str(Path(__file__).parents[2] / "examples" / "falcon-40b.yaml")


@pytest.mark.slow
def test_two_ranks_measure_and_their_calibration_is_compared(tmp_path: Path) -> None:
    (tmp_path / "before.json").write_text(machine().model_dump_json(), encoding="utf-8")
    options = ("--ranks", "2", "--dtype", "float32", "--smoke", "--compare", "before.json")
    outcome = trimaran(tmp_path, "calibrate", "--output", "chip.json", *options)
    assert outcome.code == 0, outcome.err
    assert outcome.left == []
    found = Machine.model_validate_json((tmp_path / "chip.json").read_text(encoding="utf-8"))
    assert (found.version, found.kind) == (VERSION, "cpu")
    assert {(each.axis, each.operation) for each in found.exchanges} == {
        ("tp", "all_reduce"), ("tp", "all_gather"), ("tp", "reduce_scatter"), ("dp", "all_gather"),
        ("dp", "reduce_scatter"), ("pp", "transfer"), ("ep", "all_to_all"),
    }  # fmt: skip
    assert {each.what for each in found.points} == {"copy", "product", "attention", "step", "update", "exchange"}
    assert {each.shape["head_dim"] for each in found.points if each.what == "attention"} == {64, 128}
    assert any(each.ranks == 2 and each.dtype == "float32" for each in found.rates)
    for words in ("products", "layer's host time", "all_reduce over tp", "changed since"):
        assert words in outcome.out
    assert "chip.json: trimaran plan SPEC --chip chip.json" in " ".join(outcome.err.split())


@pytest.mark.slow
def test_one_rank_measures_in_the_command_s_own_process(tmp_path: Path) -> None:
    outcome = trimaran(tmp_path, "calibrate", "--ranks", "1", "--dtype", "float32", "--smoke", "--output", "chip.json")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "chip.json").read_text(encoding="utf-8"))
    assert found["exchanges"] == []
    assert len(found["rates"]) == 1
    assert set(found["versions"]) == {"trimaran", "python", "torch"}


def test_a_plan_by_a_calibration(tmp_path: Path) -> None:
    (tmp_path / "chip.json").write_text(machine().model_dump_json(), encoding="utf-8")
    (tmp_path / "spec.yaml").write_text(dump_spec(spec({"dp": 2})), encoding="utf-8")
    outcome = trimaran_here(tmp_path, "plan", "spec.yaml", "--chip", "chip.json", "--json", "plan.json")
    assert outcome.code == 0, outcome.err
    told = " ".join(outcome.err.split())
    assert "calibration: trimaran on A processor, measured on this chip; error ± 3% in 9 of 10 of the steps" in told
    assert "MWh" not in outcome.out
    assert "of 4.00 GiB" in outcome.out
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["calibration"]["software"] == "trimaran"


@pytest.mark.parametrize(
    ("changes", "arguments", "error"),
    [
        ({"version": 9}, [], "chip.json has version 9 of calibrations, and this trimaran reads 1"),
        ({"spread": 0.4}, [], "chip.json has a spread of 40%, above 20%"),
        ({"kind": "tpu"}, [], "chip.json is no calibration: kind: Input should be 'cpu' or 'gpu'"),
        (
            {},
            ["--set", "launcher.device=cuda"],
            "the calibration is of a CPU, A processor, and launcher.device is cuda",
        ),
        (
            {},
            ["--set", "precision.dtype=bfloat16"],
            "precision.dtype is bfloat16, and the calibration of A processor has",
        ),
        ({}, ["--software", "nemo"], "--software nemo was calibrated on GPUs, and --chip is of A processor"),
        (
            {},
            ["--picture", "a.svg"],
            "--picture draws a step by the constants of GPUs, and --chip chip.json is of a CPU; give a GPU's",
        ),
        ({}, ["--search"], "--search times layouts by the constants of GPUs, and --chip chip.json is of a CPU"),
        ({}, ["--software", "fit.json"], "--chip chip.json and --software fit.json both hold measured constants"),
        ({"exchanges": []}, [], "parallel.dp is 2, and the calibration of A processor has no exchanges over dp"),
    ],
)
def test_a_calibration_that_does_not_do_is_a_sentence(
    tmp_path: Path, changes: dict[str, object], arguments: list[str], error: str
) -> None:
    (tmp_path / "chip.json").write_text(json.dumps({**machine().model_dump(), **changes}), encoding="utf-8")
    (tmp_path / "spec.yaml").write_text(dump_spec(spec({"dp": 2})), encoding="utf-8")
    outcome = trimaran_here(tmp_path, "plan", "spec.yaml", "--chip", "chip.json", *arguments)
    assert outcome.code == 2
    assert outcome.last_line.startswith(f"error: {error}")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--ranks", "0"], "--ranks must be from 1 to 64; got 0"),
        (["--dtype", "fp8"], "--dtype fp8: give one of float32, bfloat16, float64"),
        (["--compare", "none.json"], "none.json: No such file or directory"),
        (["--output", "."], "--output . is a folder; give the name of a file"),
        (["--output", "none/chip.json"], "--output none/chip.json: there is no folder none; make it, or write"),
        (["--fit", "none.csv"], "none.csv: No such file or directory"),
        (["--fit", "none.csv", "--ranks", "2"], "--fit measures nothing; give --compare and --ranks without it"),
        (["--fit", "chip.json"], "chip.json: line 1 has no column layers; a table of runs begins with its columns"),
    ],
)
def test_wrong_requests_are_a_sentence_before_anything_is_measured(
    tmp_path: Path, arguments: list[str], error: str
) -> None:
    (tmp_path / "chip.json").write_text("{}", encoding="utf-8")
    outcome = trimaran_here(tmp_path, "calibrate", *arguments)
    assert outcome.code == 2
    assert outcome.last_line.startswith(f"error: {error}")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--chip", "none.json"], "none.json: No such file or directory"),
        (["--chip", "H1000"], "chip 'H1000' is not known; the nearest is 'H100-"),
        (["--chip", "chip.json", "--launcher", "mpi"], "--chip is for a run on this machine alone; trimaran plan SPEC"),
        (["--chip", "chip.json", "--set", "launcher.device=cuda"], "the calibration is of a CPU, A processor, and "),
    ],
)
def test_a_chip_that_a_run_can_not_have_is_refused_at_once(tmp_path: Path, arguments: list[str], error: str) -> None:
    (tmp_path / "chip.json").write_text(machine().model_dump_json(), encoding="utf-8")
    (tmp_path / "spec.yaml").write_text(dump_spec(spec({"dp": 2})), encoding="utf-8")
    outcome = trimaran(tmp_path, "train", "spec.yaml", *arguments)
    assert outcome.code == 2
    assert outcome.last_line.startswith(f"error: {error}")
    assert not (tmp_path / "runs").exists()


def test_more_ranks_than_gpus_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    assert count_gpus(tmp_path) == 2
    monkeypatch.setattr("trimaran.launchers.cli.planning.calibrate.count_gpus", lambda: 2)
    with pytest.raises(typer.Exit) as ended:
        calibrate(ranks=4)
    assert ended.value.exit_code == 2
    assert "--ranks 4: this machine has 2 GPUs, and two ranks share none; give 2 at most" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_software_is_fitted_on_a_table_of_runs(tmp_path: Path) -> None:
    lines = (PUBLISHED / "runs.csv").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines[1:] if "internevo" in line][:8]
    (tmp_path / "runs.csv").write_text("\n".join([lines[0], *rows]) + "\n", encoding="utf-8")
    outcome = trimaran_here(tmp_path, "calibrate", "--fit", "runs.csv", "--output", "fit.json")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[1].split()[0] == "internevo"
    (fit,) = json.loads((tmp_path / "fit.json").read_text(encoding="utf-8"))["fits"]
    assert fit["runs"] == 8
    assert len(fit["constants"]) == 12

    plan = ["plan", FALCON, "--software", "fit.json", "--chip"]
    outcome = trimaran_here(tmp_path, *plan, fit["chip"], "--picture", "plan.svg")
    assert outcome.code == 0, outcome.err
    assert f"calibration: internevo on {fit['chip']}, 8 runs, GPUs" in " ".join(outcome.err.split())
    assert (tmp_path / "plan.svg").stat().st_size > 1000
    outcome = trimaran_here(tmp_path, *plan, "H200")
    assert outcome.code == 2
    assert f"fit.json has no constants of H200, but of {fit['chip']}; give --chip" in outcome.last_line
    for content, error in (
        ('{"version": 9, "fits": []}', "fit.json has version 9, and this trimaran reads 1; fit anew"),
        ('{"fits": []}', "fit.json holds no constants of trimaran calibrate --fit (version: Field required)"),
        ("{", "fit.json holds no constants of trimaran calibrate --fit (its content: Invalid JSON"),
    ):
        (tmp_path / "fit.json").write_text(content, encoding="utf-8")
        outcome = trimaran_here(tmp_path, *plan, fit["chip"])
        assert outcome.code == 2
        assert outcome.last_line.startswith(f"error: {error}")


def test_a_search_by_a_gpu_s_calibration(tmp_path: Path) -> None:
    """It goes by the measured constants: with products at half the speed the fastest step is longer."""
    case = Case(**{**BLANK, "flops": H100.flops, "processors": 132.0, "memory_rate": H100.memory_rate,
                   "link_rate": H100.link_rate})  # fmt: skip
    seconds = []
    for share in (0.8, 0.4):
        points = gpu_points(replace(GPU, gemm=share), case)
        constants = fit_constants(points, [], "NVIDIA H100 80GB HBM3", 132, "bfloat16")
        found = machine(
            kind="gpu", name="NVIDIA H100 80GB HBM3", constants=[constants], memory_bytes=80 << 30, rates=[],
            processors=132,
        )  # fmt: skip
        (tmp_path / "gpu.json").write_text(found.model_dump_json(), encoding="utf-8")
        fixed = ("--fix", "parallel.tp=8", "--fix", "parallel.pp=4", "--fix", "zero.stage=1")
        outcome = trimaran_here(
            tmp_path, "plan", FALCON, "--chip", "gpu.json", "--search", *fixed, "--write", "best.yaml"
        )
        assert outcome.code == 0, outcome.err
        seconds.append(float(outcome.out.splitlines()[1].split()[10]))
    assert seconds[1] > 1.3 * seconds[0]
