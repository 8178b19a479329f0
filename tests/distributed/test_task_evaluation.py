"""Tasks evaluated while a run trains: its curve is bit for bit that without them, their scores are a checkpoint's."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankPool
from tests.distributed.test_generate import ranks_of
from tests.launchers.runs import text_of
from tests.runtime.evaluate.evaluation_files import write_sets
from trimaran.launchers.data.prepare_run import prepare_run
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.prepare import prepare_data
from trimaran.runtime.evaluate.answers import Answers
from trimaran.runtime.evaluate.engine import replica
from trimaran.runtime.evaluate.engine.replica import Engine
from trimaran.runtime.evaluate.engine.scorer import Scorer
from trimaran.runtime.evaluate.engine.weights import load_stages, open_model
from trimaran.runtime.evaluate.evaluation import evaluate
from trimaran.runtime.evaluate.results import Origin, score_row
from trimaran.runtime.mesh import lone_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.spec.describe import describe
from trimaran.runtime.train.loop import train
from trimaran.runtime.train.metrics import Row, read_metrics
from trimaran.runtime.train.signals import StopRequest
from trimaran.runtime.train.task_evaluation import TaskEvaluation, prepare_tasks
from trimaran.runtime.train.train_context import build_mesh_of

CPU = torch.device("cpu")
TIMES = ("tokens_per_second", "step_time_ms")
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": {"parallel": {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b"}},
    "dp2-zero3": {"parallel": {"dp": 2}, "zero": {"stage": 3}},
}


def spec_of(folder: Path, layout: dict[str, Any], output: str, **sections: Any) -> RunSpec:
    return parse_spec(
        {
            "model": {
                "num_layers": 4, "hidden_size": 16, "num_heads": 2, "vocab_size": 300, "max_seq_len": 128,
                "hidden_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1,
            },
            "data": {
                "source": [str(folder / "text.txt")], "cache_dir": str(folder / "cache"), "tokenizer_vocab_size": 300,
            },
            "optimizer": {"lr": 1e-2},
            "precision": {"dtype": "float64"},
            "kernels": {"deterministic": True},
            "train": {
                "num_steps": 4, "global_batch_size": 4, "micro_batch_size": 1, "seq_len": 32,
                "output_dir": str(folder / output), "eval_interval": 2, "eval_batches": 1,
            },
            "logging": {"timeline": False, "tensorboard": False},
            **layout,
            **sections,
        }
    )  # fmt: skip


def train_both(folder: Path, layout: dict[str, Any], name: str) -> None:
    """On every rank: train the run once with tasks and once without."""
    tasks = {"tasks": ["arc_easy"], "data": str(folder / "sets"), "interval": 2, "limit": 4}
    for kind, sections in (("with", {"evaluation": tasks}), ("without", {})):
        spec = spec_of(folder, layout, f"{name}-{kind}", **sections)
        mesh, data = build_mesh_of(spec), prepare_data(spec)
        if mesh.rank == 0:
            Path(spec.train.output_dir).mkdir()
            data.tokenizer.save(Path(spec.train.output_dir) / "tokenizer.json")
        store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
        before = torch.get_rng_state()
        with StopRequest() as stop:
            train(spec, mesh, CPU, data, stop, store=store)
        assert torch.equal(torch.get_rng_state(), before)
        mesh.close()


def train_stopped(folder: Path, layout: dict[str, Any], name: str) -> None:
    """On every rank: train until the last rank is asked to stop within the evaluation of step 2; then go on."""
    tasks = {"tasks": ["arc_easy"], "data": str(folder / "sets"), "interval": 2, "limit": 4, "batch_size": 1}
    for is_stopped in (True, False):
        spec = spec_of(folder, layout, f"{name}-stopped", evaluation=tasks)
        mesh, data = build_mesh_of(spec), prepare_data(spec)
        if mesh.rank == 0:
            Path(spec.train.output_dir).mkdir(exist_ok=True)
            data.tokenizer.save(Path(spec.train.output_dir) / "tokenizer.json")
        store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
        with StopRequest() as stop, pytest.MonkeyPatch.context() as patch:
            real = TaskEvaluation.scores

            def scores(self: TaskEvaluation, step: int, seen: int) -> Any:
                if is_stopped and mesh.rank == mesh.world_size - 1:  # noqa: B023
                    stop._remember(signal.SIGTERM, None)
                return real(self, step, seen)  # noqa: B023

            patch.setattr(TaskEvaluation, "scores", scores)
            patch.setattr(replica, "_POLL_S", 0.0)  # the evaluation ends sooner than a leader looks
            state = train(spec, mesh, CPU, data, stop, store=store)
        assert state.step == (2 if is_stopped else 4)
        mesh.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "text.txt").write_text(text_of(300))
    write_sets(folder / "sets")
    prepare_data(spec_of(folder, {}, "any"))
    return folder


def rows_of(run: Path) -> list[Row]:
    """The rows of what is computed, without what is measured of the machine."""
    rows = read_metrics(run / "metrics.jsonl")
    computed = [row for row in rows if not row.keys() & {"started_at", "evaluation_s", "save_s"}]
    return [
        {name: value for name, value in row.items() if name not in TIMES and not name.startswith("peak_")}
        for row in computed
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_curve_stays_bit_for_bit_and_the_scores_are_the_checkpoints(
    name: str, folder: Path, ranks: RankPool
) -> None:
    layout = LAYOUTS[name]
    ranks.run(train_both, ranks_of(layout.get("parallel", {})), folder, layout, name)
    rows = rows_of(folder / f"{name}-with")
    scores = [row for row in rows if "arc_easy/acc" in row]
    assert [row["step"] for row in scores] == [2, 4]
    assert [row for row in rows if row not in scores] == rows_of(folder / f"{name}-without")
    standalone = scores_of_checkpoint(folder, folder / f"{name}-with")
    assert {name: value for name, value in scores[-1].items() if name != "step"} == pytest.approx(standalone, rel=1e-9)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_request_to_stop_leaves_an_evaluation_and_saves(name: str, folder: Path, ranks: RankPool) -> None:
    layout = LAYOUTS[name]
    ranks.run(train_stopped, ranks_of(layout.get("parallel", {})), folder, layout, name)
    rows = rows_of(folder / f"{name}-stopped")
    assert [row["step"] for row in rows if "arc_easy/acc" in row] == [4]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def scores_of_checkpoint(folder: Path, run: Path) -> dict[str, float | None]:
    """The scores of the last checkpoint by one process."""
    model = open_model(run)
    spec = spec_of(folder, {}, "x", evaluation={"tasks": ["arc_easy"], "data": str(folder / "sets"), "limit": 4})
    assert spec.evaluation is not None
    mesh = lone_mesh()
    with Scorer(Engine(load_stages(model.origin, model.spec, mesh, CPU), mesh, model.spec)) as scorer:
        prepared = prepare_tasks(spec.evaluation, model.text, model.spec)
        found = evaluate(prepared, scorer, Answers(None, ""), Origin("run", 4, 0, {}, {}, "float64", "cpu"))
    return score_row(found.results)


def test_a_wrong_task_is_refused_before_any_rank_starts(folder: Path) -> None:
    tasks = {"tasks": ["arc_esay"], "data": str(folder / "sets")}
    spec = spec_of(folder, {}, "wrong", evaluation=tasks)
    with pytest.raises(DataError, match=r"arc_esay.*did you mean .*arc_easy"):
        prepare_run(spec, Path(spec.train.output_dir))
    assert "evaluation" in dict(describe(spec))
