"""Every sink gets every row, with the real packages and no network; one that fails or hangs holds up nothing."""

import io
import json
import sqlite3
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec, SpecError, parse_spec
from trimaran.runtime.train.metrics import MetricsLogger, read_metrics
from trimaran.runtime.train.monitor import peak_memory
from trimaran.runtime.train.sinks import start
from trimaran.runtime.train.sinks.feeder import Feeder
from trimaran.runtime.train.sinks.start import IDENTITIES, SinkError, check_packages, sinks_of, start_sinks


class Taken:
    """A sink that keeps what it is given, and raises or waits where it is told to."""

    def __init__(self, *, fails_at: int = 0, goes_on: threading.Event | None = None) -> None:
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.ends: list[bool] = []
        self._fails_at, self._goes_on = fails_at, goes_on
        self.waits = threading.Event()
        self.identity = "taken"

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self.waits.set()
        if self._goes_on is not None:
            self._goes_on.wait()
        if step == self._fails_at:
            raise OSError(28, "No space left on device")
        self.rows.append((step, values))

    def close(self, *, failed: bool) -> None:
        self.ends.append(failed)


def spec_of(folder: Path, sinks: object) -> RunSpec:
    return parse_spec(
        {
            "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2},
            "data": {"source": ["corpus.txt"], "tokenizer_vocab_size": 300},
            "optimizer": {"lr": 1e-3},
            "train": {
                "num_steps": 9, "global_batch_size": 2, "micro_batch_size": 1, "seq_len": 8, "output_dir": str(folder)
            },
            "logging": {"sinks": sinks},
        }
    )  # fmt: skip


def log(logger: MetricsLogger, *steps: int) -> None:
    for step in steps:
        values: dict[str, Any] = {"loss": 5.0 - step, "lr": 1e-3, "grad_norm": 1.0, "tokens_seen": 16 * step}
        logger.log(step=step, tokens_per_second=1e3, step_time_ms=16.0, more={"peak_memory_bytes": 2**20}, **values)


def logger_with(folder: Path, sink: Taken, screen: io.StringIO) -> MetricsLogger:
    return MetricsLogger(folder, num_steps=9, tensorboard=False, sinks={"taken": sink}, stream=screen)


def test_a_sink_gets_every_row_by_the_names_of_tensorboard_and_is_told_how_the_run_ended(tmp_path: Path) -> None:
    sink = Taken()
    with logger_with(tmp_path / "well", sink, io.StringIO()) as logger:
        log(logger, 1)
        logger.log_evaluation(step=1, held_out_loss=0.0)
        logger.log_scores(step=1, scores={"arc_easy/acc": 0.5, "arc_easy/acc_norm": None})
    row, held_out, scores = (values for _, values in sink.rows)
    assert set(row) == {
        f"train/{name}"
        for name in ("loss", "lr", "grad_norm", "tokens_seen", "tokens_per_second", "step_time_ms", "peak_memory_bytes")
    }
    assert (held_out, scores) == ({"held_out/loss": 0.0, "held_out/perplexity": 1.0}, {"evaluation/arc_easy/acc": 0.5})
    with pytest.raises(RuntimeError, match="diverged"), logger_with(tmp_path / "ill", sink, io.StringIO()):
        raise RuntimeError("diverged")
    assert sink.ends == [False, True]


def test_a_sink_of_a_run_on_gpus_gets_what_their_allocators_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The columns of a GPU, by a peak that is made up: on the CPU there is no reserved memory to tell of."""
    mesh, others = (
        SimpleNamespace(rank=1, world_size=3, world=None),
        torch.tensor([[3e9, 0, 2e9], [5e9, 0, 9e9]], dtype=torch.float64),
    )
    monkeypatch.setattr(peak_memory, "_peaks_of", lambda device: (7e9, 8e9))
    monkeypatch.setattr(peak_memory, "all_reduce", lambda peaks, group: peaks + others)
    peaks = peak_memory.PeakMemory(cast(Mesh, mesh), torch.device("cpu"))
    assert peaks.columns() == {}
    peaks.after_step()
    columns = {"peak_memory_bytes": 7e9, "peak_memory_rank": 1, "peak_memory_reserved_bytes": 9e9}
    assert peaks.columns() == columns
    taken = Taken()
    logger = logger_with(tmp_path, taken, io.StringIO())
    logger.log(
        step=1, loss=4.0, lr=1e-3, grad_norm=1.0, tokens_seen=16, tokens_per_second=1e3, step_time_ms=16.0,
        more=peaks.columns(),
    )  # fmt: skip
    logger.close()
    assert taken.rows[0][1].items() >= {f"train/{name}": value for name, value in columns.items()}.items()
    assert read_metrics(tmp_path / "metrics.jsonl")[0].items() >= columns.items()


def test_a_sink_that_fails_is_told_once_and_the_run_goes_on(tmp_path: Path) -> None:
    sink, screen = Taken(fails_at=2), io.StringIO()
    with logger_with(tmp_path, sink, screen) as logger:
        log(logger, *range(1, 6))
    assert [step for step, _ in sink.rows] == [1]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    (told,) = [line for line in screen.getvalue().splitlines() if line.startswith("taken")]
    assert told == (
        "taken failed ([Errno 28] No space left on device) and gets no more rows; training goes on, and metrics.jsonl "
        "has every row"
    )


def test_a_sink_that_hangs_holds_up_no_step_and_what_it_lacks_is_counted() -> None:
    goes_on, said = threading.Event(), list[str]()
    sink = Taken(goes_on=goes_on)
    feeder = Feeder("taken", sink, said.append, most_rows=2)
    feeder.add(1, {})
    sink.waits.wait()
    for step in range(2, 7):  # two wait, three have no room
        feeder.add(step, {})
    feeder.close(failed=False, patience_s=0.01)
    assert said == [
        "taken is too slow: rows are left out there; metrics.jsonl has every row",
        "taken has not taken its last rows within 0.01 s; metrics.jsonl has every row",
    ]
    goes_on.set()
    feeder.close(failed=False)
    assert [step for step, _ in sink.rows] == [1, 2, 3]
    assert said[2:] == ["3 rows were left out of taken; metrics.jsonl has every row"]


@pytest.mark.filterwarnings("ignore")  # of the packages among themselves, such as MLflow's use of SQLAlchemy
def test_the_real_packages_take_a_run_without_a_network_and_a_resumed_one_goes_on_in_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    folder, database = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    folder.mkdir()
    spec = spec_of(folder, {"wandb": {"mode": "offline"}, "mlflow": {"tracking_uri": database}, "trackio": True})
    screen = io.StringIO()
    for before, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        sinks = start_sinks(spec, before)
        with MetricsLogger(folder, num_steps=9, resume_step=before, sinks=sinks, stream=screen) as logger:
            log(logger, *steps)
            logger.log_evaluation(step=steps[-1], held_out_loss=2.5)
    assert "failed" not in screen.getvalue()
    identities = json.loads((folder / IDENTITIES).read_text())

    client: Any = import_module("mlflow.tracking").MlflowClient(tracking_uri=database)
    (experiment,) = [each for each in client.search_experiments() if each.name == "trimaran"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status, run.info.run_name) == (identities["mlflow"], "FINISHED", "run")
    assert run.data.params["train.num_steps"] == "9"
    history = [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(set(history)) == [(step, 5.0 - step) for step in range(1, 5)]
    assert run.data.metrics["held_out/loss"] == 2.5

    starts = sorted((folder / "wandb").glob(f"offline-run-*-{identities['wandb']}/run-{identities['wandb']}.wandb"))
    assert starts, "wandb has a file of the one run"
    assert all(b"held_out/loss" in start.read_bytes() for start in starts)
    assert not [each for each in (folder / "wandb").glob("offline-run-*") if identities["wandb"] not in each.name]

    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as connection:
        tables = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
        text = " ".join(str(row) for table in tables for row in connection.execute(f"select * from {table}"))
    assert identities["trackio"].startswith("run-")
    assert identities["trackio"] in text
    assert "held_out/loss" in text


def test_a_sink_that_can_not_start_is_a_sentence_and_ends_those_that_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Taken()

    def refuse(run: object, options: object) -> Taken:
        raise RuntimeError("api_key not configured (no-tty)\nmore lines")

    monkeypatch.setattr(start, "_STARTS", {"wandb": lambda run, options: taken, "trackio": refuse})
    with pytest.raises(SinkError, match=r"logging.sinks: trackio can't start: api_key not configured \(no-tty\); look"):
        start_sinks(spec_of(tmp_path, ["wandb", "trackio"]), 0)
    assert taken.ends == [True]
    (tmp_path / IDENTITIES).write_text("[1]")
    with pytest.raises(SinkError, match=r"sinks\.json holds no names of sinks; remove it"):
        start_sinks(spec_of(tmp_path, ["wandb"]), 4)


def test_a_package_that_is_missing_is_named_with_its_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: None if name == "trackio" else True)
    check_packages(spec_of(tmp_path, ["wandb", "mlflow"]))
    with pytest.raises(SinkError, match=r"trackio is not installed: pip install 'trimaran\[trackio\]'"):
        check_packages(spec_of(tmp_path, "trackio"))


def test_sinks_are_a_list_of_names_or_a_record(tmp_path: Path) -> None:
    assert sinks_of(spec_of(tmp_path, None)) == sinks_of(spec_of(tmp_path, [])) == []
    assert sinks_of(spec_of(tmp_path, ["trackio", "wandb"])) == ["wandb", "trackio"]
    assert sinks_of(spec_of(tmp_path, {"tensorboard": True, "mlflow": {"experiment": "a"}})) == [
        "tensorboard",
        "mlflow",
    ]
    for wrong, words in (
        (["wandbb"], "names among tensorboard, wandb, mlflow, trackio, got 'wandbb'"),
        ({"wandb": None}, "names no sink"),
        ({"wandb": {"mode": "off"}}, "must be online or offline"),
        ({"wandb": {"projekt": "a"}}, "did you mean logging.sinks.wandb.project?"),
    ):
        with pytest.raises(SpecError, match=words):
            spec_of(tmp_path, wrong)
