"""The screen of `trimaran check` and its facts: the numbers of the plan, colours, one screen for every example."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.plan.test_calibrate import machine
from trimaran.launchers.cli.app import app
from trimaran.launchers.cli.planning.overview import overview_of
from trimaran.runtime.spec import load_spec

ROOT = Path(__file__).parents[2]
QUICKSTART, FALCON = (str(ROOT / "examples" / name) for name in ("quickstart.yaml", "falcon-40b.yaml"))
RUNS = [
    path
    for path in sorted((ROOT / "examples").glob("*.yaml"))
    if path.name not in ("tune-lr.yaml", "ladder.yaml", "twin-hamlet.yaml")
]
_MOST_LINES = 40


def check(*words: str, **environment: str) -> Any:
    return CliRunner().invoke(app, ["check", *words], env={"COLUMNS": "100", **environment})


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("example", RUNS, ids=lambda path: path.name)
def test_every_example_is_understood_on_one_screen(example: Path) -> None:
    shown = check(str(example), FORCE_COLOR="1").stdout
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in shown.splitlines()]
    assert len(lines) <= _MOST_LINES
    assert max(map(len, lines)) <= 100
    groups = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert [each for each in groups if each in ("model", "run", "where", "plan", "files")] == [
        "model", "run", "where", "plan", "files"
    ]  # fmt: skip


def test_colours_are_for_a_terminal_that_wants_them() -> None:
    assert "\x1b" not in check(QUICKSTART).stdout
    assert "\x1b[1;36m" in check(QUICKSTART, FORCE_COLOR="1").stdout
    assert "36m" not in check(QUICKSTART, FORCE_COLOR="1", NO_COLOR="1").stdout


def test_what_runs_where_is_told_by_pipeline_rank() -> None:
    shown = check(QUICKSTART).stdout
    assert "ranks 0-3: embedding, layers 0-2; 426,368 parameters each" in shown
    assert "ranks 4-7: layer 3, head; 229,568 parameters each" in shown
    assert "8 ranks on this machine by torchrun, on the CPU, gloo" in shown
    many = check(QUICKSTART, "--set", "model.num_layers=8", "--set", "parallel.pp=8", "--set", "parallel.tp=1").stdout
    assert "and 4 more pipeline ranks; --json has all" in many
    split = check(
        QUICKSTART, "--set", "parallel.virtual_stages=2", "--set", "parallel.schedule=interleaved_1f1b"
    ).stdout
    assert "layers 0 and 2" in split


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["launcher.kind=slurm", "launcher.nodes=2", "slurm.gpus_per_node=4"], "a Slurm job of 2 nodes with 4 ranks"),
        (["launcher.kind=mpi"], "8 ranks on this machine by mpirun"),
        (
            ["launcher.nodes=2", "launcher.rendezvous=n1:29400"],
            "4 ranks on each of 2 nodes, on the CPU, gloo; they meet",
        ),
    ],
)
def test_what_starts_the_ranks_is_told(sets: list[str], words: str) -> None:
    assert words in check(QUICKSTART, *(word for each in sets for word in ("--set", each))).stdout


def test_the_plan_is_that_of_the_command_plan(tmp_path: Path) -> None:
    options = [FALCON, "--set", "launcher.device=auto", "--chip", "A100-40GB", "--price-per-hour", "2"]
    made = CliRunner().invoke(app, ["plan", *options, "--json", "plan.json"])
    assert made.exit_code == 0, made.output
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    found = json.loads(check(*options, "--json").stdout)["plan"]
    assert found["place"] == plan["chip"]
    assert found["memory_bytes"] == sum(plan["memory_bytes"][plan["fullest_pipeline_rank"]].values())
    assert found["memory_limit_bytes"] == plan["chip_bytes"]
    assert (found["step_seconds"], found["step_error_p90"]) == (plan["step_seconds"], plan["error_p90"])
    assert found["tokens_per_second"] == pytest.approx(plan["figures"]["tokens a second"])
    assert found["total_seconds"] == pytest.approx(plan["figures"]["days"] * 86400)
    assert found["rank_hours"] == pytest.approx(plan["figures"]["GPU-hours"])
    assert found["money"] == pytest.approx(plan["figures"]["money"])
    assert found["checkpoint_bytes"] == plan["figures"]["checkpoint bytes"]
    screen = check(*options).stdout
    assert f"a step takes {plan['step_seconds']:.3g} s (± {plan['error_p90']:.0%})" in screen
    assert "rank-hours, 3" in screen


def test_a_cpu_has_a_plan_of_memory_and_with_a_calibration_one_of_time(tmp_path: Path) -> None:
    command = [QUICKSTART, "--set", "parallel.tp=1", "--set", "launcher.device=cpu", "--json"]
    plain = json.loads(check(*command).stdout)["plan"]
    assert plain["memory_bytes"] > 0
    assert plain["step_seconds"] is None
    assert "trimaran calibrate" in plain["why_not"]["time"]
    (tmp_path / "chip.json").write_text(machine().model_dump_json(), encoding="utf-8")
    timed = json.loads(check(*command, "--set", "parallel.pp=1", "--chip", "chip.json").stdout)["plan"]
    planned = CliRunner().invoke(
        app, ["plan", *command[:-1], "--set", "parallel.pp=1", "--chip", "chip.json", "--json", "plan.json"]
    )
    assert planned.exit_code == 0, planned.output
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert (timed["place"], timed["step_seconds"]) == ("A processor", plan["step_seconds"])
    assert timed["memory_bytes"] == sum(plan["memory_bytes"][0].values())


def test_the_facts_are_the_keys_of_the_page() -> None:
    page = (ROOT / "docs" / "check.md").read_text(encoding="utf-8")
    facts = json.loads(check(QUICKSTART, "--json").stdout)
    whole, of_plan = (
        dict(re.findall(r"^\| (`[^|]+) \| (.+) \|$", part, flags=re.MULTILINE)) for part in page.split("keys of `plan`")
    )
    assert [name for row in whole for name in re.findall(r"`(\w+)`", row)] == list(facts)
    assert [name for row in of_plan for name in re.findall(r"`(\w+)`", row)] == list(facts["plan"])
    for key in ("layout", "launcher"):
        assert set(facts[key]) <= set(re.findall(r"`(\w+)`", whole[f"`{key}`"])), key
    assert set(facts["pipeline_ranks"][0]) <= set(re.findall(r"`(\w+)`", whole["`pipeline_ranks`"]))
    assert (facts["parameters"], facts["model_bytes"]) == (1_311_872, 4 * 1_311_872)
    assert facts["tokens_per_parameter"] == pytest.approx(2_048_000 / 1_311_872)
    assert facts["problems"] == []


def test_problems_are_among_the_facts() -> None:
    result = check(QUICKSTART, "--set", "data.source=[nowhere.txt]", "--json")
    assert result.exit_code == 2
    assert ["'nowhere.txt' does not exist" in each for each in json.loads(result.stdout)["problems"]] == [True]


def test_a_wrong_spec_has_its_errors_as_json_too() -> None:
    result = check(QUICKSTART, "--set", "parallel.tp=3", "--set", "train.num_stepz=1", "--json")
    assert result.exit_code == 2
    facts = json.loads(result.stdout)
    assert list(facts) == ["version", "problems"]
    assert any(each.startswith("train.num_stepz: unknown field") for each in facts["problems"])
    assert all(each in result.stderr for each in facts["problems"])
    assert json.loads(check("nowhere.yaml", "--json").stdout)["problems"][0].startswith("nowhere.yaml: cannot be read")


def test_a_pipe_gets_no_line_that_is_filled_with_spaces() -> None:
    lines = check(QUICKSTART).stdout.splitlines()
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_plan_that_does_not_fit_says_what_would() -> None:
    spec = load_spec(FALCON, ["parallel.tp=1"])
    overview = overview_of(spec, "local", "RTX-4090", None, [])
    assert overview.warning is not None
    assert overview.warning.startswith("the plan doesn't fit: pipeline rank 0 lacks")
    assert overview.facts["plan"]["fits"] is False


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--chip", "H1000"], "chip 'H1000' is not known; the nearest is 'H100-SXM'"),
        (["--chip", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["--chip", "A100-40GB", "--price-per-hour", "-1"], "--price-per-hour must be above 0 and finite; got -1"),
        (["--json", "--memory"], "--json prints the facts alone; leave it out, or --memory and --picture"),
        (["--price-per-hour", "nan"], "--price-per-hour must be above 0 and finite; got nan"),
    ],
)
def test_options_that_can_t_be_are_a_sentence(words: list[str], sentence: str) -> None:
    result = check(QUICKSTART, *words)
    assert result.exit_code == 2
    assert sentence in result.stderr
