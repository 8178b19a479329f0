"""A recipe in a run: blended corpora go on after a stop, at another dp; the fate of each document can be asked."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.launchers.runs import Workplace, make_workplace, trimaran
from trimaran.launchers.data import prepare
from trimaran.launchers.data.prepare import prepare_spec
from trimaran.launchers.data.workers import WorkerOptions, local_workers
from trimaran.launchers.env.exit_codes import Stopped
from trimaran.runtime.spec import load_spec
from trimaran.runtime.train.metrics import read_metrics

STEPS = {"num_steps": 20, "global_batch_size": 4, "micro_batch_size": 1, "seq_len": 16, "eval_interval": 0}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Pages and plays, of which a copy is removed; the weights change after half of the run."""
    folder = tmp_path_factory.mktemp("recipe")
    words = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split()
    draw = random.Random(1)
    rows = [{"text": " ".join(draw.choices(words, k=300))} for _ in range(12)]
    (folder / "plays.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]), encoding="utf-8")
    (folder / "pages").mkdir()
    for number in range(6):
        text = " ".join(draw.choices(words, k=300))
        (folder / "pages" / f"{number}.html").write_text(f"<html><body><p>{text}</p></body></html>", encoding="utf-8")
    return make_workplace(
        folder,
        data={
            "source": ["quickstart"],
            "corpora": {
                "web": {"source": ["pages"], "weight": 1.0, "max_epochs": 3.0},
                "plays": {"source": ["plays.jsonl"], "weight": 3.0},
            },
            "stages": [
                {"tokens": 0, "weights": {"plays": 1.0}},
                {"tokens": 640, "weights": {"web": 3.0, "plays": 1.0}},
            ],
            "clean": {},
            "dedup": {},
            "workers": 1,
        },
        train=STEPS,
        parallel={"tp": 1, "pp": 1, "dp": 2},
        lr_schedule={"name": "constant", "warmup_steps": 0},
        precision={"dtype": "float64"},
        checkpoint={"interval": 7},
    )


@pytest.fixture(scope="module")
def losses(workplace: Workplace) -> list[float]:
    """The losses of the whole run, which is trained before."""
    whole = workplace.train()
    assert whole.code == 0, whole.err
    return [row["loss"] for row in workplace.rows()]


def test_blended_corpora_resume_at_another_dp(workplace: Workplace, losses: list[float]) -> None:
    assert len(losses) == 20
    stopped = workplace.folder / "stopped"
    shutil.copytree(workplace.run, stopped)
    for step in (14, 20):
        shutil.rmtree(stopped / "checkpoints" / f"step-{step:08d}")
    resumed = workplace.train("train.output_dir=stopped", "parallel.dp=4", "zero.stage=2")
    assert resumed.code == 0, resumed.err
    assert "step 8/20" in resumed.out
    rows = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses, rel=1e-9)


@pytest.mark.usefixtures("losses")
def test_the_commands_tell_what_became_of_documents(workplace: Workplace) -> None:
    prepared = trimaran(workplace.folder, "prepare", "spec.yaml", "--export", "jsonl.zst", "--export-to", "kept")
    assert prepared.code == 0, prepared.err
    assert (workplace.folder / "kept" / "documents-00000.jsonl.zst").stat().st_size > 1000
    folder = json.loads((workplace.run / "data_manifest.json").read_text())["source"]["recipe"]["folder"]
    page = (workplace.run / "data.html").read_text(encoding="utf-8")
    assert page == (Path(folder) / "data.html").read_text(encoding="utf-8")
    assert page.count("exact.copy") >= 2
    assert "tokens per word" in page
    checked = trimaran(workplace.folder, "check", "spec.yaml")
    row = re.search(r"corpus web +([\d,]+) tokens, 37\.5% of the samples, ([\d.]+) epochs", checked.out)
    assert row is not None, checked.out
    windows = (int(row[1].replace(",", "")) - 1) // 16
    assert row[2] == f"{30 / windows:.3g}", "three in four of the 40 samples of the second stage"
    shown = trimaran(workplace.folder, "data", "show", "run")
    assert "exact.copy (5.26%)" in shown.out, "one of nineteen"
    manifest = json.loads((workplace.run / "recipe.json").read_text())
    assert [stage["documents"].get("removed", 0) for stage in manifest["stages"]] == [0, 1, 0]
    why = trimaran(workplace.folder, "data", "why", "run", "web/0.html#0")
    assert why.out.startswith("web/0.html#0 is kept\n")
    unknown = trimaran(workplace.folder, "data", "why", "run", "web/7.html#0")
    assert unknown.code == 2
    assert "has no document 'web/7.html#0'" in unknown.err


def test_a_corpus_that_would_be_read_too_often_is_refused(workplace: Workplace) -> None:
    refused = workplace.train("train.output_dir=run3", "data.corpora.web.max_epochs=0.01")
    assert refused.code == 2
    assert "data.corpora.web.max_epochs (0.01)" in refused.last_line


def test_ctrl_c_says_where_it_goes_on(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimaran.runtime.data.recipe.of_spec.recipe_of", interrupted)
    spec = load_spec(workplace.folder / "spec.yaml", [])
    with pytest.raises(Stopped, match=r"^stopped by SIGINT; what is done is kept, and the same command goes on there$"):
        prepare_spec(spec, local_workers(WorkerOptions.of_spec(spec)))


@pytest.mark.parametrize("found_within_s", [-1.0, 1000.0])
def test_the_speed_of_a_stage_is_without_what_was_found(
    found_within_s: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "_FOUND_WITHIN_S", found_within_s)
    with prepare._progress() as update:
        update("clean", 0, 1, 0)
        update("clean", 1, 1, 10**9)
    shown = capsys.readouterr().err
    assert "clean" in shown
    assert ("MB/s" in shown) == (found_within_s < 0)


def test_a_run_on_the_pair_that_a_run_exports_has_the_same_losses(tmp_path: Path) -> None:
    """To the bit: the tokens of a run's text, written as Megatron's .bin and .idx, are the text of the next run."""
    workplace = make_workplace(tmp_path, train=STEPS | {"num_steps": 4}, data={"held_out_fraction": 0})
    exported = trimaran(tmp_path, "prepare", "spec.yaml", "--export", "megatron", "--export-to", "pair")
    assert exported.code == 0, exported.err
    losses = []
    for overrides in ((), ("data.source=[pair/train]", f"data.tokenizer={workplace.run}/tokenizer.json")):
        outcome = workplace.train(*overrides, f"train.output_dir={workplace.run if not overrides else 'again'}")
        assert outcome.code == 0, outcome.err
        folder = tmp_path / "again" if overrides else workplace.run
        losses.append([row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row])
    assert "taking the token ids of 1 document as they are" in outcome.err
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
