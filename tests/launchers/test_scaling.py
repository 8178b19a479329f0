"""`trimaran scaling`: optima by published laws and by a fit of runs, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.benchmarks.scripts import load_script
from tests.launchers.runs import trimaran_here
from trimaran.runtime.plan.scaling.intervals import draws_of, interval, rows_of, shipped_draws
from trimaran.runtime.plan.scaling.laws import DEFAULT
from trimaran.runtime.spec import parse_spec

RUNS = Path(__file__).parents[1] / "plan" / "chinchilla.csv"
ROW = "{},{},{}\n"
SPEC = """
model: {num_layers: 2, hidden_size: 64, num_heads: 4, ffn_hidden_size: 128, vocab_size: 512}
data: {tokenizer_vocab_size: 512}
optimizer: {lr: 1.0e-3}
train: {num_steps: 10, global_batch_size: 4, micro_batch_size: 1, seq_len: 32}
"""


def table(folder: Path, rows: list[tuple[float, float, object]], header: str = "parameters,tokens,loss\n") -> str:
    path = folder / "runs.csv"
    path.write_text(header + "".join(ROW.format(*row) for row in rows), encoding="utf-8")
    return str(path)


def test_tokens_params_and_budget_agree(tmp_path: Path) -> None:
    budget = trimaran_here(tmp_path, "scaling", "budget", "5.76e23")
    assert budget.code == 0, budget.err
    assert "3.22e+10" in budget.out
    assert "7.22e+10" in budget.out
    assert "32B at 5.76e23 FLOP" in " ".join(budget.err.split())
    tokens = trimaran_here(tmp_path, "scaling", "tokens", "72.2b")
    params = trimaran_here(tmp_path, "scaling", "params", "1.33t")
    assert "1.33e+12" in tokens.out
    assert re.search(r"Besiroglu 2024 +7\.2\de\+10", params.out)
    assert "FLOP over the least for that loss" in tokens.out


def test_the_default_laws_optima_have_the_intervals_of_its_fit(tmp_path: Path) -> None:
    """The shipped draws are those of a bootstrap of the 240 runs; the paper's own approaches give 63B to 67B."""
    again = rows_of(draws_of(load_script("scaling_draws").law_of_chinchilla(200)))
    assert rows_of(shipped_draws()) == [pytest.approx(row, rel=1e-3) for row in again]
    outcome = trimaran_here(tmp_path, "scaling", "budget", "5.76e23")
    found = re.search(r"Besiroglu 2024 +7.22e\+10 \((\S+) to (\S+)\)", outcome.out)
    assert found is not None
    assert float(found[1]) < 63e9
    assert float(found[2]) > 80e9
    low, high = interval(shipped_draws(), lambda law: law.best(1e21)[0]) or (0.0, 0.0)
    assert low < DEFAULT.best(1e21)[0] < high
    assert interval([], lambda law: law.e) is None


def run_folder(folder: Path, layers: int, tokens: float, loss: float | None) -> str:
    folder.mkdir()
    spec = SPEC.replace("num_layers: 2", f"num_layers: {layers}")
    (folder / "spec.yaml").write_text(spec, encoding="utf-8")
    rows: list[dict[str, object]] = [{"step": 1, "loss": 9.0, "tokens_seen": 1, "held_out_loss": 8.0}] if loss else []
    rows += [{"step": 2, "loss": 3.0, "tokens_seen": int(tokens), **({"held_out_loss": loss} if loss else {})}]
    rows += [{"step": 3, "loss": 2.0, "tokens_seen": int(2 * tokens)}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def test_folders_of_runs_are_fitted_like_a_table_of_them(tmp_path: Path) -> None:
    rows = []
    for layers in (2, 8, 32):
        for tokens in (1e6, 4e6, 16e6):
            size = parse_spec(yaml.safe_load(SPEC.replace("num_layers: 2", f"num_layers: {layers}")))
            count = size.transformer.num_parameters()
            rows.append((count, tokens, 1.8 + 482 / count**0.35 + 2085 / tokens**0.37))
    folders = [
        run_folder(tmp_path / f"run{number}", (2, 8, 32)[number // 3], *row[1:]) for number, row in enumerate(rows)
    ]
    from_folders, from_table = (
        trimaran_here(tmp_path, "scaling", "fit", *given) for given in (folders, [table(tmp_path, rows)])
    )
    assert from_folders.code == 0, from_folders.err
    assert from_folders.out == from_table.out
    outcome = trimaran_here(tmp_path, "scaling", "fit", *folders, run_folder(tmp_path / "none", 2, 1e6, None))
    assert outcome.code == 2
    assert "none has no held-out loss, and a law needs that of every run; train it with" in outcome.last_line
    (tmp_path / "empty").mkdir()
    outcome = trimaran_here(tmp_path, "scaling", "fit", "empty")
    assert outcome.last_line.startswith("error: empty is no run: spec.yaml or metrics.jsonl is missing")
    hours = trimaran_here(tmp_path, "scaling", "budget", "1000h")
    assert "hours of GPUs are --gpu-hours" in hours.last_line


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b"parameters,tokens,loss\n1e6,1e8,3\n1e7,1e9\n", "line 3 has 2 cells, and the header has 3"),
        (b"parameters,tokens,loss\n1e6,1e8,3,9\n", "line 2 has 4 cells, and the header has 3"),
        (b"parameters,tokens,loss\n", "a law of five constants needs 6 runs or more; got 0"),
        (b"", "line 1 must name the columns parameters, loss, and tokens or flop"),
        (b"parameters,\xaf\n", "not a text in UTF-8 from byte 11 on; give a CSV file"),
    ],
)
def test_a_table_that_is_none_is_told_with_its_line(tmp_path: Path, text: bytes, error: str) -> None:
    (tmp_path / "runs.csv").write_bytes(text)
    outcome = trimaran_here(tmp_path, "scaling", "fit", "runs.csv")
    assert outcome.code == 2
    assert error in outcome.last_line


def test_far_beyond_the_largest_run_is_said(tmp_path: Path) -> None:
    near, far = (trimaran_here(tmp_path, "scaling", "budget", flops) for flops in ("5.76e23", "5.76e25"))
    assert "far beyond" not in near.err
    assert "5.76e+25 FLOP is 4,431 times the largest run" in " ".join(far.err.split())


def test_a_fit_without_outliers_leaves_them_out_and_names_them(tmp_path: Path) -> None:
    """All 245 runs: what lies far off is found, and the constants are the paper's within its errors."""
    with_all, without = (
        trimaran_here(tmp_path, "scaling", "fit", str(RUNS), *option) for option in ((), ("--without-outliers",))
    )
    assert "outliers count in the fit; --without-outliers leaves them out" in " ".join(with_all.err.split())
    assert "outliers were left out" in without.err
    constants = [
        {line.split()[0]: float(line.split()[1]) for line in outcome.out.splitlines()[1:6]}
        for outcome in (with_all, without)
    ]
    assert constants[0]["B"] > 10_000
    assert constants[1]["E"] == pytest.approx(1.82, abs=0.05)
    assert constants[1]["a"] == pytest.approx(0.348, abs=0.03)
    assert constants[1]["b"] == pytest.approx(0.366, abs=0.03)
    assert "loss 5.006" in without.err
    assert "IsoFLOP curve" in without.out


def test_gpu_hours_are_a_budget(tmp_path: Path) -> None:
    hours = trimaran_here(tmp_path, "scaling", "budget", "--gpu-hours", "1000", "--chip", "A100-80GB", "--mfu", "0.5")
    flops = trimaran_here(tmp_path, "scaling", "budget", "5.616e20")
    assert hours.code == 0, hours.err
    assert hours.out == flops.out


def test_a_fit_of_chinchilla_s_runs_gives_the_published_constants(tmp_path: Path) -> None:
    """Without the five outliers (Besiroglu et al. 2024): E 1.82, A 482, B 2085, a 0.348, b 0.366."""
    lines = RUNS.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = sorted(lines[1:], key=lambda line: float(line.rpartition(",")[2]))[:-5]
    path = tmp_path / "kept.csv"
    path.write_text(lines[0] + "".join(kept), encoding="utf-8")
    outcome = trimaran_here(tmp_path, "scaling", "fit", str(path), "--at", "5.76e23")
    assert outcome.code == 0, outcome.err
    constants = {line.split()[0]: float(line.split()[1]) for line in outcome.out.splitlines()[1:6]}
    assert constants["E"] == pytest.approx(1.82, abs=0.03)
    assert constants["a"] == pytest.approx(0.348, abs=0.02)
    assert constants["b"] == pytest.approx(0.366, abs=0.02)
    assert "240 runs" in outcome.err
    assert "5.76e+23" in outcome.out


SPREAD = [(n, d, 3.0) for n in (1e6, 1e7) for d in (1e8, 1e9, 1e10)]


@pytest.mark.parametrize(
    ("rows", "header", "error"),
    [
        (SPREAD[:5], None, "a law of five constants needs 6 runs or more; got 5"),
        (
            [(n, d, 3.0) for n in (1e6, 2e6) for d in (1e8, 1e9, 1e10)],
            None,
            "the runs' parameters differ by a factor of 2",
        ),
        ([(n, d, 3.0) for n in (1e6, 1e8) for d in (1e9, 2e9, 3e9)], None, "the runs' tokens differ by a factor of 3"),
        ([*SPREAD, (1e6, 1e8, "nan")], None, "line 8, column loss: 'nan' is no number above 0"),
        (SPREAD, "parameters,tokens,los\n", "no column loss; a law of the loss needs the loss of every run"),
        (SPREAD, "size,tokens,loss\n", "line 1 must name the columns parameters, loss, and tokens or flop"),
    ],
)
def test_runs_that_say_too_little_are_refused(
    tmp_path: Path, rows: list[tuple[float, float, object]], header: str | None, error: str
) -> None:
    path = table(tmp_path, rows) if header is None else table(tmp_path, rows, header)
    outcome = trimaran_here(tmp_path, "scaling", "fit", path)
    assert outcome.code == 2
    assert error in outcome.last_line


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["tokens", "7 GB"], "N '7 GB': that is a size in bytes"),
        (["tokens", "1e-3"], "N '1e-3': write a count, such as 7b or 7e9"),
        (["params", ""], "TOKENS '': write a count, such as 7b or 7e9"),
        (["budget", "1e400"], "FLOP '1e400': write a count"),
        (["fit", "none.csv"], "none.csv: No such file or directory"),
        (["fit", str(RUNS), "--at", "0"], "--at '0': write a count"),
        (["fit", str(RUNS), "--picture", "none/law.svg"], "--picture none/law.svg: there is no folder none"),
        (["budget"], "a budget is FLOP or --gpu-hours: give one of the two"),
        (["budget", "--gpu-hours", "nan"], "--gpu-hours must be above 0 and finite; got nan"),
        (["budget", "--gpu-hours", "10", "--mfu", "40"], "--mfu must be above 0 and at most 1; got 40.0"),
    ],
)
def test_a_wrong_request_is_a_sentence(tmp_path: Path, arguments: list[str], error: str) -> None:
    outcome = trimaran_here(tmp_path, "scaling", *arguments)
    assert outcome.code == 2
    assert outcome.last_line.startswith(f"error: {error}")
