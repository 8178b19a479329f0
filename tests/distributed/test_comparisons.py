"""Preferences and rewards are learned like in one process at every layout, micro batch and packing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.comparison_runs import LAYOUTS, METHODS, Case, build, train_all, write_examples
from tests.distributed.parity import Layout, proof_steps
from tests.distributed.ranks import RankPool

STEPS = proof_steps(3)
LIKE_ANOTHER = ("ipo", "orpo") if STEPS == 3 else ()
"""Methods that differ from dpo in what they make of the answers' log-probabilities; two layouts train them too."""


def train_methods(layout: Layout, packing: str, micro: int, written: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {
        name: train_all(Case(layout, name, packing, micro), each, folder / name, STEPS)
        for name, each in written.items()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("comparisons")
    for name in METHODS:
        (folder / name).mkdir()
    return {name: write_examples(folder / name, name) for name in METHODS}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_micro_batch_and_packing_compares_answers_like_one_process(
    layout: Layout, ranks: RankPool, written: dict[str, Any], tmp_path: Path
) -> None:
    place = written["dpo"]["folder"].parent / f"alone-{layout.model['tie_embeddings']}"
    expected = ranks.alone(train_methods, Layout("alone", {}, layout.model), "none", 2, written, place)
    for name, figures in expected.items():
        assert len({each["loss"] for each in figures[:STEPS]}) == STEPS, name
    chosen = {name: each for name, each in written.items() if layout in LAYOUTS[1:3] or name not in LIKE_ANOTHER}
    for found in ranks.run(train_methods, layout.world_size, layout, "documents", 1, chosen, tmp_path / "cut"):
        for name in chosen:
            assert len(found[name]) >= STEPS
            for step, (mine, theirs) in enumerate(zip(found[name], expected[name], strict=False)):
                assert mine.keys() == theirs.keys()
                if step == 0:  # before the first update all margins to the reference are 0, but for rounding
                    mine["accuracy"] = theirs["accuracy"]
                where = f"{name}, step {step}: {mine}, expected {theirs}"
                torch.testing.assert_close(list(mine.values()), list(theirs.values()), rtol=0, atol=1e-9, msg=where)


class Killed(Exception):
    """Stands for a kill in the middle of the reference pass."""


def begin(case: Case, written: dict[str, Any], folder: Path, kills: bool, resumed: bool = False) -> tuple[str, Any]:
    """Begin a run; return what it tells, and the log-probabilities of the reference as bytes."""
    context, comparisons, _ = build(case, written, folder)
    runs = 0

    def at_action(action: object) -> None:
        nonlocal runs
        runs += action is None  # the end of a run of the executor
        if kills and runs == 2:
            raise Killed

    context.evaluator.on_action = at_action
    try:
        told = comparisons.begin(context, resumed=resumed)
    except Killed:
        told = "killed"
    context.mesh.close()
    return told, {name: values.tobytes() for name, values in comparisons._reference.items()}


def test_a_reference_pass_that_was_killed_gives_the_same_bits_and_another_layout_reads_them(
    ranks: RankPool, written: dict[str, Any], tmp_path: Path
) -> None:
    layout = Layout("pp2-dp2", {"pp": 2, "dp": 2})
    case, data, folder = Case(layout, "kto"), written["kto"], tmp_path / "run"
    whole = ranks.run(begin, 4, case, data, tmp_path / "whole", False)
    assert len({repr(each) for each in whole}) == 1
    assert set(whole[0][1]) == {"train", "held_out", "train_mismatched", "held_out_mismatched"}
    assert whole[0][0].startswith("computed the reference's log-probabilities of 32 answers")
    assert [each[0] for each in ranks.run(begin, 4, case, data, folder, True)] == ["killed"] * 4
    assert not list(folder.rglob("*.safetensors"))
    assert ranks.run(begin, 4, case, data, folder, False)[0][1] == whole[0][1]
    (stored,) = (folder / "cache" / "reference").iterdir()
    alone = Case(Layout("alone", {}), "kto")
    for resumed in (False, True):  # from the run folder, whose file another start has written
        ((told, values),) = ranks.run(begin, 1, alone, data, folder, True, resumed)
        assert told == f"log-probabilities of the reference: {folder / 'run' / 'reference.safetensors'}"
        assert values == whole[0][1]
    (folder / "run" / "reference.safetensors").write_bytes(stored.read_bytes()[:-8])  # cut by a full disk
    ((told, values),) = ranks.run(begin, 1, alone, data, folder, True)
    assert told == f"log-probabilities of the reference: {stored}"
    assert values == whole[0][1]
    other = {**data, "folder": written["dpo"]["folder"], "records": written["dpo"]["records"]}
    ((told, _),) = ranks.run(begin, 1, Case(Layout("alone", {}), "dpo"), other, folder, False)
    assert told.startswith("computed the reference's log-probabilities of 32 answers")
