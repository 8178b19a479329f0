"""`trimaran plan`: what it prints and writes, its table of errors, and what it refuses."""

import json
import re
from pathlib import Path

import pytest

from tests.launchers.runs import trimaran_here

ROOT = Path(__file__).parents[2]
FALCON = str(ROOT / "examples" / "falcon-40b.yaml")


def test_a_plan_tells_memory_time_and_totals(tmp_path: Path) -> None:
    outcome = trimaran_here(
        tmp_path, "plan", FALCON, "--chip", "A100-40GB", "--price-per-hour", "2", "--json", "plan.json"
    )
    assert outcome.code == 0, outcome.err
    for words in ("0 (fullest)", "of a step", "products", "tokens a second", "MFU", "days with failures", "money"):
        assert words in outcome.out
    assert "calibration: default on any" in outcome.err
    assert "in 9 of 10 of the runs that it was fitted on" in outcome.err
    assert "doesn't fit" not in outcome.err
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert plan["chip"] == "A100-40GB"
    assert len(plan["memory_bytes"]) == 4
    assert plan["fullest_pipeline_rank"] == 0
    assert sum(plan["step_parts"].values()) == pytest.approx(plan["step_seconds"])
    assert plan["figures"]["money"] == pytest.approx(2 * plan["figures"]["GPU-hours"])


def test_one_that_does_not_fit_says_by_how_much(tmp_path: Path) -> None:
    outcome = trimaran_here(tmp_path, "plan", FALCON, "--chip", "RTX-4090", "--set", "parallel.tp=1")
    assert outcome.code == 0, outcome.err
    assert "it doesn't fit: pipeline rank 0 needs" in outcome.err
    assert "more than RTX-4090 has" in outcome.err


def test_the_cheapest_change_that_would_fit_is_named_and_fits(tmp_path: Path) -> None:
    sets = ("--chip", "A100-40GB", "--set", "train.micro_batch_size=16", "--set", "train.global_batch_size=1536")
    outcome = trimaran_here(tmp_path, "plan", FALCON, *sets)
    told = re.search(r"has; it would with (.+), \d+\.\d\d times the step", " ".join(outcome.err.split()))
    assert told, outcome.err
    paths = {"recompute": "train.recompute", "micro_batch_size": "train.micro_batch_size"}
    changed = [word.split() for word in told[1].split(", ")]
    again = [part for name, value in changed for part in ("--set", f"{paths.get(name, f'parallel.{name}')}={value}")]
    assert "doesn't fit" not in trimaran_here(tmp_path, "plan", FALCON, *sets, *again).err


def test_times_of_another_dtype_are_said_to_be_of_16_bits(tmp_path: Path) -> None:
    outcome = trimaran_here(tmp_path, "plan", FALCON, "--set", "precision.dtype=float32")
    assert outcome.code == 0, outcome.err
    assert "those of 16-bit products, which those of float32 take longer than" in " ".join(outcome.err.split())


def test_what_finetuning_adds_is_said_to_be_left_out(tmp_path: Path) -> None:
    outcome = trimaran_here(tmp_path, "plan", str(ROOT / "examples" / "lora.yaml"))
    assert outcome.code == 0, outcome.err
    assert "frozen weights of an adapter hold less" in " ".join(outcome.err.split())


def test_outside_of_a_calibration_is_said(tmp_path: Path) -> None:
    outcome = trimaran_here(tmp_path, "plan", FALCON, "--software", "internevo")
    assert outcome.code == 0, outcome.err
    assert "error outside what was calibrated" in outcome.err


def test_a_search_writes_the_spec_of_the_fastest(tmp_path: Path) -> None:
    sets = ("--set", "train.global_batch_size=1152", "--fix", "parallel.tp=8", "--gpus", "96")
    outcome = trimaran_here(tmp_path, "plan", FALCON, "--search", *sets, "--write", "best.yaml")
    assert outcome.code == 0, outcome.err
    first = outcome.out.splitlines()[1].split()
    assert first[:2] == ["1", "8"]
    assert "layouts were timed" in outcome.err
    planned = trimaran_here(tmp_path, "plan", "best.yaml")
    assert planned.code == 0, planned.err
    assert f"in all           {first[10]}" in planned.out
    assert "fewest GPUs that hold the run" in outcome.err
    assert "beside the first" in outcome.out
    assert re.search(r"zero.stage \d +(memory: \d|\+\d)", outcome.out)


def test_published_prints_every_bar(tmp_path: Path) -> None:
    outcome = trimaran_here(tmp_path, "plan", "--published")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert len(lines) == 15
    assert sum(line.rstrip().endswith("held") for line in lines) == 11
    assert [line.split("  ")[0].strip() for line in lines if line.rstrip().endswith("missed")] == [
        "left out, by whole models"
    ]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "a plan is made of a run spec; give one, or --published for the errors of plans"),
        ([FALCON, "--chip", "H1000"], "chip 'H1000' is not known; the nearest is 'H100-"),
        ([FALCON, "--software", "nemmo"], "software 'nemmo' is not known; the nearest is 'nemo', of "),
        ([FALCON, "--price-per-hour", "0"], "--price-per-hour must be above 0 and finite; got 0.0"),
        ([FALCON, "--price-per-hour", "nan"], "--price-per-hour must be above 0 and finite; got nan"),
        ([FALCON, "--nic", "-1"], "--nic must be above 0 and finite; got -1.0"),
        ([FALCON, "--restart", "-1"], "--restart must be at least 0 and finite; got -1.0"),
        ([FALCON, "--gpus", "8"], "--gpus, --fix and --write are for a search; add --search"),
        ([FALCON, "--search", "--headroom", "1"], "--headroom must be at least 0 and below 1"),
        ([FALCON, "--search", "--gpus", "0"], "--gpus must be at least 1; got 0"),
        (
            [FALCON, "--search", "--fix", "parallel.tpp=2"],
            "--fix parallel.tpp=2: write FIELD=VALUE of a field that ",
        ),
        ([FALCON, "--search", "--fix", "parallel.tp=two"], "--fix parallel.tp=two: parallel.tp takes a whole number"),
        ([FALCON, "--search", "--fix", "parallel.tp=0"], "--fix parallel.tp=0: parallel.tp: must be at least 1, got 0"),
        ([FALCON, "--search", "--fix", "zero.stage=7"], "--fix zero.stage=7: zero.stage: must be at most 3, got 7"),
        (
            [FALCON, "--search", "--fix", "parallel.schedule=zigzag"],
            "--fix parallel.schedule=zigzag: parallel.schedule: must be gpipe, 1f1b, ",
        ),
        (
            [FALCON, "--search", "--fix", "train.recompute=maybe"],
            "--fix train.recompute=maybe: train.recompute: must be none, selective, full, or",
        ),
        (
            [FALCON, "--search", "--fix", "parallel.tp=8", "--fix", "parallel.tp=4"],
            "--fix parallel.tp=4: parallel.tp is fixed already; fix a field once",
        ),
        (
            [FALCON, "--search", "--gpus", "4", "--fix", "parallel.tp=8"],
            "no layout of 4 GPUs is left: tp (8) x pp (1) must divide the GPUs (4)",
        ),
        ([FALCON, "--search", "--gpus", "8"], "no layout fits 8 H100-SXM: the closest, tp 8 pp 1 dp 1"),
        ([FALCON, "--search", "--headroom", "nan"], "--headroom must be at least 0 and below 1"),
        ([FALCON, "--search", "--set", "zero.backend=deepspeed"], "zero.backend is deepspeed, whose buffers are not"),
        ([FALCON, "--pue", "0.5"], "--pue must be at least 1, the energy of the computers themselves; got 0.5"),
        ([FALCON, "--watts", "nan"], "--watts must be above 0 and finite; got nan"),
        ([FALCON, "--json", "none/plan.json"], "--json none/plan.json: there is no folder none; make it, or write"),
        ([FALCON, "--search", "--write", "."], "--write . is a folder; give the name of a file"),
        ([FALCON, "--published"], "--published is of published runs alone; leave out the spec and --search, or"),
        (["none.yaml"], "1 error in none.yaml:"),
        ([FALCON, "--set", "zero.backend=deepspeed"], "zero.backend is deepspeed, whose buffers are not known"),
    ],
)
def test_what_can_not_be_planned_is_a_sentence(tmp_path: Path, arguments: list[str], error: str) -> None:
    outcome = trimaran_here(tmp_path, "plan", *arguments)
    assert outcome.code == 2
    assert f"error: {error}" in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
