"""Memory of the fullest rank lies within the promised error of what published runs measured, by software."""

from pathlib import Path

import numpy as np
import pytest

from trimaran.runtime.plan.cases import Cases
from trimaran.runtime.plan.memory.habits import HABITS, habits_of, rank_bytes
from trimaran.runtime.plan.published.accuracy import memory_rows, planned_gib
from trimaran.runtime.plan.published.tables import PublishedRun, read_table

PUBLISHED = Path(__file__).parent / "published"


@pytest.fixture(scope="module")
def runs() -> list[PublishedRun]:
    return [run for run in read_table(PUBLISHED / "memory.csv") if run.cases]


def test_memory_is_within_the_bars(runs: list[PublishedRun]) -> None:
    rows = memory_rows(runs)
    assert [row.what for row in rows if not row.holds] == []
    assert {row.what: row.rows for row in rows} == {
        "memory, megatron-deepspeed-2022": 79, "memory, nanotron": 18, "memory, torchtitan": 18,
        "memory, internevo": 16, "memory, megatron-2022": 8,
    }  # fmt: skip


def test_korthikanti_s_own_formula_is_met(runs: list[PublishedRun]) -> None:
    """Their figures are analytic: no measurement, no context."""
    own = [run for run in runs if run.stack == "megatron-2022"]
    assert HABITS["megatron-2022"].context == 0
    assert np.abs(planned_gib(own) / [run.gib for run in own] - 1).max() < 0.1


def test_the_rows_that_resist_are_these(runs: list[PublishedRun]) -> None:
    """Beyond 20%: layouts of BigScience whose neighbours fit, nanotron's smallest, and another year's torchtitan."""
    far = []
    for name in HABITS:
        own = [run for run in runs if run.stack.startswith(name)]
        errors = planned_gib(own) / [run.gib for run in own] - 1
        far += [(run.stack, run.line) for run, error in zip(own, errors, strict=True) if abs(error) > 0.2]
    assert far == [
        ("megatron-deepspeed-2022", 87), ("megatron-deepspeed-2022", 108), ("nanotron", 35),
        ("torchtitan-compile", 18), ("torchtitan-compile", 19),
    ]  # fmt: skip


def test_fsdp_under_a_pipeline_keeps_parameters_gathered_and_gradients_whole(runs: list[PublishedRun]) -> None:
    run = next(run for run in runs if run.model == "Llama-3.1-405B")
    habits = habits_of(run.stack)
    assert habits is not None
    parts = rank_bytes(Cases.of(run.cases[:1]), habits)
    case = run.cases[0]
    layer = case.hidden * case.head_dim * (2 * case.heads + 2 * case.kv_heads) + 3 * case.hidden * case.ffn
    held = (case.first_layers * layer + case.vocab * case.hidden) / case.tp
    assert parts["gathered"][0] == pytest.approx(6 * held)
