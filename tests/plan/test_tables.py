"""The tables of published runs are read whole, and a corrupt cell is told with its line and column."""

import math
from collections import Counter
from pathlib import Path

import pytest

from trimaran.runtime.plan.published.tables import read_table

PUBLISHED = Path(__file__).parent / "published"


def corrupted(folder: Path, column: str, text: str) -> Path:
    """A copy of the first two rows in which a cell of line 3 is another."""
    lines = (PUBLISHED / "runs.csv").read_text(encoding="utf-8").splitlines()[:3]
    cells = lines[2].split(",")
    cells[lines[0].split(",").index(column)] = text
    path = folder / "runs.csv"
    path.write_text("\n".join([*lines[:2], ",".join(cells)]) + "\n", encoding="utf-8")
    return path


def test_every_timed_run_has_a_layout_and_fills_its_gpus() -> None:
    runs = read_table(PUBLISHED / "runs.csv")
    assert len(runs) == 1614
    for run in runs:
        assert run.cases
        assert run.seconds > 0
        for case in run.cases:
            assert case.tp * case.pp * case.cp * case.dp == run.gpus, run.line
            assert case.microbatches >= 1
            assert case.most_layers * case.pp >= case.layers
    assert Counter(run.stack for run in runs).most_common(3) == [
        ("vtrain-mds", 1214), ("llm-foundry", 162), ("megatron-deepspeed-2022", 116),
    ]  # fmt: skip


def test_memory_has_a_figure_in_every_row_and_rows_without_a_layout_have_no_case() -> None:
    runs = read_table(PUBLISHED / "memory.csv")
    assert len(runs) == 144
    assert all(run.gib > 0 and run.memory_kind for run in runs)
    without = Counter(run.source for run in runs if not run.cases)
    assert without == {"Megatron-LM pull request 482": 3, "pith-train pull request 18": 2}


def test_a_run_whose_microbatch_is_not_printed_stands_for_all_that_divide() -> None:
    runs = [run for run in read_table(PUBLISHED / "runs.csv") if run.stack == "mcore-2024"]
    small, large = runs[0], runs[-1]
    assert [(case.microbatch, case.virtual_stages) for case in small.cases] == [(1, 1), (2, 1), (4, 1)]
    assert {case.virtual_stages for case in large.cases} == {1, 2, 4}


@pytest.mark.parametrize(("column", "text"), [("hidden", "4O96"), ("sec_per_iter", "nan"), ("tp", "-1")])
def test_a_corrupt_cell_is_told_with_its_line_and_column(tmp_path: Path, column: str, text: str) -> None:
    path = corrupted(tmp_path, column, text)
    with pytest.raises(ValueError, match=rf"runs.csv: line 3, column {column}: '{text}' is no number"):
        read_table(path)


def test_a_row_with_a_cell_too_many_and_a_table_without_a_column_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 3 has another number of cells than the header"):
        read_table(corrupted(tmp_path, "note", "a,b"))
    path = tmp_path / "other.csv"
    path.write_text("layers,hidden\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 has no column seq"):
        read_table(path)


def test_an_empty_cell_is_not_zero() -> None:
    runs = read_table(PUBLISHED / "memory.csv")
    assert any(math.isnan(run.seconds) for run in runs)
