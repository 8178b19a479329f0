"""`trimaran train` from a spec to its report, and what can be done with the run afterwards."""

import json
import re
import shlex
import shutil
from html import escape
from pathlib import Path

import pytest
import yaml

from tests.launchers.runs import Outcome, Workplace, trimaran
from trimaran.runtime.spec import load_spec
from trimaran.runtime.train.metrics import read_metrics

pytestmark = pytest.mark.slow
Finished = tuple[Workplace, Outcome]


def copy_of(workplace: Workplace, folder: Path) -> Workplace:
    shutil.copytree(workplace.folder, folder, dirs_exist_ok=True)
    return Workplace(folder)


def test_a_run_succeeds_and_leaves_no_process_and_no_shared_memory(finished: Finished) -> None:
    workplace, outcome = finished
    assert outcome.code == 0, outcome.err
    assert outcome.left == []
    assert "Traceback" not in outcome.err
    assert "Warning" not in outcome.err
    assert "step 24/24" in outcome.out
    before = outcome.out.partition("step 1/24")[0].splitlines()
    parameters = load_spec(workplace.run / "spec.yaml").transformer.num_parameters()
    assert before[0].startswith("model: 2 layers, hidden 16, 2 heads of 8, feed-forward 24, ")
    assert before[0].endswith(", vocabulary 270 tokens")
    assert before[1].startswith("layout: tp 2 x pp 2 x dp 1 x cp 1 = 4 ranks")
    assert before[2] == f"{parameters:,} parameters, 64 tokens a step: making the weights"
    assert before[-1] == "training begins at step 1 of 24"
    assert "report.html" in outcome.last_line


def test_metrics_hold_every_step_once_with_every_column(finished: Finished) -> None:
    workplace, _ = finished
    rows = workplace.rows()
    assert [row["step"] for row in rows] == list(range(1, 25))
    columns = ["step", "loss", "lr", "grad_norm", "tokens_seen", "tokens_per_second", "step_time_ms", "mfu"]
    assert all(list(row) == [*columns, "peak_memory_bytes", "peak_memory_rank"] for row in rows)
    peaks = [int(row["peak_memory_bytes"] or 0) for row in rows]
    assert peaks == sorted(peaks)
    assert peaks[0] > 2**26, "the memory of a process with torch"
    assert [row["tokens_seen"] for row in rows] == [64 * step for step in range(1, 25)]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3  # type: ignore[operator]
    evaluations = [row for row in read_metrics(workplace.run / "metrics.jsonl") if "held_out_loss" in row]
    assert [row["step"] for row in evaluations] == [8, 16, 24]


def test_the_output_of_the_newest_start_and_of_a_rank_is_kept(finished: Finished) -> None:
    workplace, outcome = finished
    kept = trimaran(workplace.folder, "logs", str(workplace.run), "--follow")
    assert kept.code == 0, kept.err
    header, *lines = kept.out.splitlines()
    assert re.fullmatch(r"--- 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} trimaran train spec.yaml", header)
    assert [line for line in lines if line in outcome.out.splitlines()] == outcome.out.splitlines()
    assert lines[-1] == outcome.last_line
    assert any(line.startswith("starting 4 ranks") for line in lines)
    assert trimaran(workplace.folder, "logs", str(workplace.run), "--rank", "1").code == 0


def test_the_run_folder_is_complete(finished: Finished) -> None:
    workplace, outcome = finished
    assert workplace.saved_steps() == [20, 24]
    assert list((workplace.run / "tensorboard").glob("events.out.tfevents.*"))
    timeline = json.loads((workplace.run / "timeline.json").read_text())
    assert timeline["num_ranks"] == 2
    for key in ("measured", "simulated"):  # 4 microbatches, forward and backward, on each of 2 pipeline ranks
        assert sorted(row[1] for row in timeline[key]) == sorted(
            f"{stage}{kind}{m}" for stage in (0, 1) for kind in "FB" for m in range(4)
        )
    assert 0 < timeline["bubble_simulated"] < 1
    (prompt,) = shlex.split(outcome.last_line)[-1:]
    assert len(prompt.split()) > 2
    corpus = (workplace.folder / "corpus.txt").read_text()
    assert corpus.startswith(prompt), "the first passage is held out"
    assert (workplace.run / "sample.txt").read_text()[:8] == prompt[:8], "the model's context has 16 tokens"
    manifest = json.loads((workplace.run / "data_manifest.json").read_text())
    assert manifest["corpus"]["documents"] == 1
    assert not list(workplace.run.rglob("*.tmp"))
    assert not (workplace.run / ".lock").exists()
    assert json.loads((workplace.run / "machine.json").read_text())["accelerators"] == "none"
    assert yaml.safe_load((workplace.run / "spec.yaml").read_text())["parallel"]["pp"] == 2


def test_the_run_begins_with_its_plan_and_ends_with_what_it_held(finished: Finished) -> None:
    workplace, outcome = finished
    told = " ".join(outcome.err.split()).split("plan: ")[1:]
    assert len(told) == 3
    assert told[0].startswith("pipeline rank ")
    assert told[1].startswith("the time of a step is not planned: this CPU is not calibrated")
    planned = json.loads((workplace.run / "plan.json").read_text())
    memory = json.loads((workplace.run / "memory.json").read_text())
    held = memory["by_pipeline_rank"]
    peaks = memory["peak_by_rank"]  # tp is innermost
    assert [max(peaks[:2]), max(peaks[2:])] == [each["peak"] for each in held]
    for mine, theirs in zip(planned["memory"], held, strict=True):
        for part in ("parameters", "gradients", "optimizer"):
            assert mine[part] == theirs[part]
        assert theirs["peak"] > 0
    page = (workplace.run / "report.html").read_text()
    assert "Planned and measured" in page


def test_a_checkpoint_has_the_planned_bytes(finished: Finished) -> None:
    workplace, _ = finished
    planned = json.loads((workplace.run / "plan.json").read_text())["checkpoint_bytes"]
    files = list((workplace.checkpoints / "step-00000024").glob("rank-*.safetensors"))
    assert len(files) == 4
    stored = 0
    for file in files:
        content = file.read_bytes()
        stored += len(content) - 8 - int.from_bytes(content[:8], "little")  # beside the header
    assert stored == pytest.approx(planned, rel=1e-3)


def assert_whole_report(workplace: Workplace) -> None:
    page = (workplace.run / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//|/|file:)|url\(|@import|<script src|<link""", page), (
        "the page fetches something"
    )
    for title in ("Loss", "Speed", "As it ran", "Simulated", "Resolved run spec", "Text the model wrote", "saves"):
        assert title in page
    assert page.count("<figure") >= 6
    assert escape((workplace.run / "sample.txt").read_text()[:50]) in page
    assert "tokenizer_vocab_size: 270" in page


def test_the_report_shows_the_run_and_needs_nothing_else(finished: Finished) -> None:
    assert_whole_report(finished[0])


def test_report_writes_the_page_anew(finished: Finished, tmp_path: Path) -> None:
    workplace = copy_of(finished[0], tmp_path)
    (workplace.run / "report.html").unlink()
    outcome = trimaran(tmp_path, "report", "run")
    assert outcome.code == 0, outcome.err
    assert_whole_report(workplace)


def generate(workplace: Workplace, *options: str) -> str:
    outcome = trimaran(workplace.folder, "generate", "run", "--prompt", "abba", "--max-new-tokens", "20", *options)
    assert outcome.code == 0, outcome.err
    assert outcome.err.splitlines() == [  # the text is longer than what the model was trained on
        "1 of 1 texts filled the model's context of 16 tokens and went on from its newer half (--context slide)"
    ]
    assert outcome.left == []
    assert outcome.out.startswith("abba")
    return outcome.out


def test_generate_gives_the_same_text_at_any_layout(finished: Finished) -> None:
    workplace, _ = finished
    alone = generate(workplace, "--seed", "3")
    assert generate(workplace, "--seed", "3", "--tp", "2", "--pp", "2") == alone
    assert generate(workplace, "--seed", "4") != alone


def test_generate_takes_the_likeliest_tokens_at_temperature_zero_whatever_the_seed(finished: Finished) -> None:
    workplace, _ = finished
    assert generate(workplace, "--temperature", "0", "--seed", "1") == generate(
        workplace, "--temperature", "0", "--seed", "2"
    )


def test_generate_reads_one_checkpoint_and_refuses_a_layout_that_cannot_be(finished: Finished) -> None:
    workplace, _ = finished
    outcome = trimaran(workplace.folder, "generate", "run/checkpoints/step-00000020", "--max-new-tokens", "3")
    assert outcome.code == 0, outcome.err
    outcome = trimaran(workplace.folder, "generate", "run", "--tp", "3")
    assert outcome.code == 2
    assert "num_heads" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_finished_run_goes_on_at_another_layout_and_with_its_text_elsewhere_when_it_is_lengthened(
    finished: Finished, tmp_path: Path
) -> None:
    workplace = copy_of(finished[0], tmp_path)
    (tmp_path / "corpus.txt").rename(tmp_path / "moved.txt")
    lengthened = ("train.num_steps=26", "parallel.tp=1", "parallel.dp=1", "data.source=[moved.txt]")
    outcome = workplace.train(f"train.output_dir={workplace.run}", *lengthened)
    assert outcome.code == 0, outcome.err
    assert outcome.left == []
    assert "resuming at step 24" in outcome.out
    assert "parallel.tp: 2 -> 1" in outcome.out
    assert "data.source: [corpus.txt] -> [moved.txt]" in outcome.out, "the same text may lie elsewhere"
    assert [row["step"] for row in workplace.rows()] == list(range(1, 27))
    assert workplace.saved_steps() == [24, 26]


def test_a_finished_run_says_that_nothing_is_left_to_train(finished: Finished, tmp_path: Path) -> None:
    workplace = copy_of(finished[0], tmp_path)
    outcome = workplace.train(f"train.output_dir={workplace.run}", "parallel.tp=1", "parallel.pp=1")
    assert outcome.code == 0, outcome.err
    assert "nothing is left to train" in outcome.out
    assert workplace.rows() == finished[0].rows()


def test_a_run_goes_on_with_deepspeed_and_another_starts_from_its_weights(finished: Finished, tmp_path: Path) -> None:
    workplace, home = copy_of(finished[0], tmp_path / "copy"), tmp_path / "home"
    home.mkdir()
    places, sampled = {"HOME": str(home), "XDG_CACHE_HOME": str(home)}, (workplace.run / "sample.txt").read_text()
    ranks = ("parallel.pp=1", "parallel.tp=1", "parallel.dp=2", f"train.output_dir={workplace.run}")
    outcome = workplace.train(
        *ranks, "train.num_steps=26", "zero.backend=deepspeed", "zero.stage=3", environment=places
    )
    assert outcome.code == 0, outcome.err
    assert outcome.left == []
    said = r"\nthe optimizer is DeepSpeed [\d.]+, ZeRO stage 3, with torch's AdamW\ntraining begins at step 25 of 26\n"
    assert re.search(said, outcome.out)
    assert outcome.out.count("DeepSpeed") == 1
    assert "DeepSpeed" not in outcome.err
    assert "Warning" not in outcome.err
    assert [row["step"] for row in workplace.rows()] == list(range(1, 27))
    assert workplace.saved_steps()[-1] == 26
    assert (workplace.run / "sample.txt").read_text() != sampled
    again = workplace.train(
        f"train.output_dir={tmp_path / 'other'}", f"checkpoint.init_from={workplace.run}", "zero.backend=deepspeed",
        "train.num_steps=2", "train.eval_interval=1", environment=places,
    )  # fmt: skip
    assert again.code == 0, again.err
    assert "starting from the weights of" in again.out
    held_out = [
        [row["held_out_loss"] for row in read_metrics(run / "metrics.jsonl") if "held_out_loss" in row]
        for run in (workplace.run, tmp_path / "other")
    ]
    assert held_out[1][0] == pytest.approx(held_out[0][-1], rel=0.05)
    assert not list(home.rglob("*.*")), "nothing is left outside the run's folder"
