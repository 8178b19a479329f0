"""What README, docs/ and CHANGELOG count, list or quote equals the code: layouts, shapes, defaults, figures."""

import re
import signal
from pathlib import Path
from typing import get_args

from tests.distributed.test_parity import LAYOUTS
from trimaran.launchers.env.exit_codes import exit_code_after
from trimaran.models.huggingface.registry import FAMILIES
from trimaran.models.presets import PRESETS
from trimaran.models.shape.choices import Initialization
from trimaran.runtime.huggingface.proof import TOLERANCE
from trimaran.runtime.infer.sample_group import Finish
from trimaran.runtime.pipeline.schedules import SCHEDULES, build_schedule
from trimaran.runtime.pipeline.simulate import Costs, simulate
from trimaran.runtime.spec import parse_spec
from trimaran.runtime.spec.fields import MASK_FRACTIONS
from trimaran.runtime.spec.sections import LauncherSection, SlurmSection
from trimaran.runtime.train.metrics import MetricsLogger, read_metrics
from trimaran.runtime.zero.costs import describe_state

ROOT = Path(__file__).parent.parent
README, CHANGELOG = ROOT / "README.md", ROOT / "CHANGELOG.md"


def text_of(page: Path) -> str:
    """The page with every run of white space as one space, so that line breaks don't matter."""
    return re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))


def docs(name: str) -> str:
    return text_of(ROOT / "docs" / name)


def first_cells(page: Path, header: str) -> list[str]:
    """The first column of the table that begins with `header`, without backticks."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(header)) + 2
    stop = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
    return [line.split("|")[1].strip() for line in lines[start:stop]]


def test_number_of_layouts() -> None:
    (count,) = re.findall(r"in float64 at each of (\d+) layouts", docs("how-it-works.md"))
    assert int(count) == len(LAYOUTS)


def test_number_of_published_shapes() -> None:
    for page in (README, CHANGELOG):
        (count,) = re.findall(r"over (\d+) published shapes", text_of(page))
        assert int(count) < len(PRESETS) < 2 * int(count), f"{page.name} says over {count}; there are {len(PRESETS)}"


def test_list_of_families() -> None:
    (listed,) = re.findall(r"Families: (.*?)\. PaLM was never", docs("models.md"))
    names = re.sub(r" \([^)]*\)", "", listed).split(", ")
    assert sorted(names) == sorted(family.name for family in FAMILIES)


def test_list_of_schedules() -> None:
    (listed,) = re.findall(r"pipeline \(([^)]*)\)", text_of(README))
    assert [name.lower().replace(" ", "_") for name in listed.split(", ")] == list(SCHEDULES)


def test_table_of_schedules() -> None:
    rows = re.findall(r"\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \|", docs("parallelism.md"))
    assert {name for name, *_ in rows} == set(SCHEDULES) - {"gpipe"}
    for name, *told in rows:
        stages = SCHEDULES[name].virtual_stages or 2
        result = simulate(build_schedule(name, 4, 8, stages), Costs.uniform(4 * stages))
        assert [int(each) for each in told] == [result.makespan, max(result.idle), max(result.peak_held)]


def test_table_of_initializations() -> None:
    cells = first_cells(ROOT / "docs" / "initialization.md", "| `init` |")
    assert [re.findall(r"`(\w+)`", cell)[0] for cell in cells] == list(get_args(Initialization))


def test_table_of_kernels() -> None:
    listed = {name for cell in first_cells(ROOT / "docs" / "kernels.md", "| file |") for name in cell.split("`")[1::2]}
    assert all((ROOT / "kernels" / name).exists() for name in listed)


def test_chips_with_tuned_tiles() -> None:
    page = docs("kernels.md")
    for file in (ROOT / "kernels" / "tuned").glob("*.json"):
        assert f"`{file.stem}`" in page, f"docs/kernels.md does not name {file.name}"


def test_ratios_of_the_readme_are_those_of_the_results() -> None:
    rows = re.findall(r"^\|(.*)\|$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ratios = rows[next(number for number, row in enumerate(rows) if row.startswith(" one process |")) + 2]
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    table = results[results.index("| layout | tokens/s | ratio | target |") :].split("\n\n")[0].splitlines()[2:]
    assert [cell.strip() for cell in ratios.split("|")] == [row.split("|")[3].strip() for row in table]


def test_columns_of_metrics(tmp_path: Path) -> None:
    log = MetricsLogger(tmp_path, num_steps=1, resume_step=0, interval=10, tensorboard=False)
    log.log(
        step=1,
        loss=1.0,
        lr=1.0,
        grad_norm=1.0,
        tokens_seen=1,
        tokens_per_second=1.0,
        step_time_ms=1.0,
        mfu=None,
        load_balancing_loss=1.0,
    )
    log.log_evaluation(step=1, held_out_loss=1.0)
    log.close()
    page = docs("run-folder.md")
    (columns, experts) = re.findall(r"one row a step: (.*?) \(null where unknown\), with experts also (\w+)", page)[0]
    (evaluation,) = re.findall(r"rows of evaluations: ((?:\w+, )*\w+)", page)
    trained, evaluated = read_metrics(tmp_path / "metrics.jsonl")
    assert [*columns.split(", "), experts] == list(trained)
    assert evaluation.split(", ")[:3] == list(evaluated)


def test_defaults_that_the_cluster_page_quotes() -> None:
    page, launcher, slurm = docs("clusters.md"), LauncherSection(), SlurmSection()
    assert f"`launcher.start_timeout_s` ({launcher.start_timeout_s:g} s)" in page
    assert f"{slurm.signal_lead_s} s (`slurm.signal_lead_s`)" in page
    assert f"--signal=USR1@{slurm.signal_lead_s}" in page
    assert f"exit with {exit_code_after(signal.SIGUSR1)}" in page


def test_reasons_why_a_continuation_ends() -> None:
    (listed,) = re.findall(r"`finish` is (.*?)\. In a", docs("generation.md"))
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(get_args(Finish))


def test_numbers_of_the_models_page() -> None:
    page = docs("models.md")
    assert float(re.findall(r"differ by more than (\S+) of their scale", page)[0]) == TOLERANCE
    assert f"hides {MASK_FRACTIONS['masked_lm']:.0%} of the tokens" in page
    assert MASK_FRACTIONS["permutation_lm"] == 1 / 6
    assert "predicts the last sixth" in page


def test_state_and_traffic_of_falcon_40b() -> None:
    for stage in range(4):
        spec = parse_spec(
            {
                "model": {"preset": "falcon-40b"},
                "parallel": {"tp": 8, "pp": 4, "dp": 12, "sequence_parallel": True},
                "zero": {"stage": stage},
                "precision": {"dtype": "bfloat16"},
                "optimizer": {"lr": 1e-4},
                "train": {"num_steps": 1, "global_batch_size": 1152, "micro_batch_size": 1, "seq_len": 2048},
            }
        )
        rows = dict(describe_state(spec))
        state, sent = (rows[name].split()[1:3] for name in ("state of a rank", "sent to dp peers"))
        assert f"| {stage} | {' '.join(state)} | {' '.join(sent)} |" in docs("memory.md")
        assert ("zero.stage 3" in rows) == (stage == 3)
