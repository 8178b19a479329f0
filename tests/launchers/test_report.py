"""The report of fabricated run folders: whole, empty, diverged, broken and hostile."""

import base64
import hashlib
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.runs import run_code, trimaran
from trimaran.launchers.report import write_report
from trimaran.runtime.pages import charts
from trimaran.runtime.pages.charts import Look, Series, plot, smooth, thin
from trimaran.runtime.train.metrics import MetricsLogger

SPEC = """\
model:
  preset: gpt-tiny
parallel: {tp: 2, pp: 2, dp: 2, schedule: 1f1b, virtual_stages: 1, sequence_parallel: true}
train:
  num_steps: 60
"""
TIMELINE = {
    "num_ranks": 2,
    "measured": [[0, "0F0", 0.0, 1.1], [1, "1F0", 1.2, 2.2], [1, "1B0", 2.2, 4.3], [0, "0B0", 4.4, 6.5]],
    "simulated": [[0, "0F0", 0, 1], [1, "1F0", 1, 2], [1, "1B0", 2, 4], [0, "0B0", 4, 6]],
    "bubble_measured": 0.523,
    "bubble_simulated": 0.5,
}
STATE = {"parameters": 3 * 2**20, "gradients": 3 * 2**20, "optimizer": 6 * 2**20}
PLAN = {
    "place": "Some CPU", "memory": [{**STATE, "activations": 5 * 2**20, "context": 2**30}], "rank_bytes": 2**33,
    "seconds": 1.25, "error": 0.07, "parts": {"products": 1.0, "bubble": 0.2, "optimizer": 0.05},
    "tokens_per_step": 512, "num_steps": 60, "checkpoint_bytes": 9.0, "why_not": {},
}  # fmt: skip
HELD = {"peak_is": "resident", "by_pipeline_rank": [{**STATE, "peak": 18 * 2**20}]}
HOSTILE = "<script>alert('x')</script><img src=http://example.org/a.png onerror=alert(1)>\"&"


class Outline(HTMLParser):
    """Collects what a browser would see: tags, ids, attributes, text, and elements left open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data


def make_run(folder: Path, num_steps: int = 60, lost: tuple[int, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with MetricsLogger(folder, num_steps=60, tensorboard=False, stream=io.StringIO()) as logger:
        for step in range(1, num_steps + 1):
            logger.log(
                step=step,
                loss=math.nan if step in lost else 2.0 + 3.0 * math.exp(-step / 20),
                lr=3e-4 * (1 - step / 100),
                grad_norm=1.0 / step,
                tokens_seen=step * 50_000,
                tokens_per_second=1000.0 + step,
                step_time_ms=1500.0,
                mfu=None,
            )
            if step % 20 == 0:
                logger.log_time(step=step, name="evaluation_s", seconds=4.5)
                logger.log_evaluation(step=step, held_out_loss=2.5)
                logger.log_time(step=step, name="save_s", seconds=0.25)
            if step == 40:
                logger.log_time(step=step, name="started_at", seconds=1.7e9)
    return folder


def make_whole_run(folder: Path) -> Path:
    make_run(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in (30, 60):
            scores = {"mmlu/acc": step / 100, "mmlu/acc_stderr": 0.02, **{f"mmlu_{n}/acc": 0.2 for n in range(9)}}
            file.write(json.dumps({"step": step, **scores}) + "\n")
    (folder / "spec.yaml").write_text(SPEC)
    (folder / "timeline.json").write_text(json.dumps(TIMELINE))
    (folder / "sample.txt").write_text("To be, or not to be")
    (folder / "data_manifest.json").write_text(
        json.dumps({"tokens": 1234567, "dropped": {"empty": 3}, "shards": [{}, {}]})
    )
    (folder / "machine.json").write_text(json.dumps({"cpu": "Some CPU", "memory_bytes": 8 * 2**30, "torch": None}))
    (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "memory.json").write_text(json.dumps(HELD))
    return folder


def charts_of(page: str) -> dict[str, dict[str, Any]]:
    """What the charts of a page are drawn from, by their ids."""
    found = re.findall(
        r'<figure class="chart" id="([^"]+)">.*?<script type="application/json">(.*?)</script>', page, re.DOTALL
    )
    assert len({name for name, _ in found}) == len(found)
    return {name: json.loads(text) for name, text in found}


def labels_of(chart: dict[str, Any]) -> list[str]:
    return [line["label"] for line in chart["lines"]]


def outline_of(folder: Path) -> Outline:
    path = write_report(folder)
    assert path == folder / "report.html"
    found = Outline(path.read_text(encoding="utf-8"))
    assert found.open == []
    assert len(found.ids) == len(set(found.ids)), "an id that comes twice lets one picture take another's shapes"
    return found


def test_a_whole_run_shows_every_section_and_figure(tmp_path: Path) -> None:
    found = outline_of(make_whole_run(tmp_path / "my-run"))
    for text in (
        "my-run",
        "60 of 60 steps",
        "tp 2 × pp 2 × dp 2 = 8 ranks, 1f1b, sequence parallel",
        "As it ran",
        "Simulated",
        "Pipeline timeline of step 60",
        "It is the last step that ran, not a typical one: it took 1,500 ms, 0.0% longer than the median step",
        "The slowest, forward of microbatch 0 on rank 0, took 0 ms more than its kind's median.",
        "2023-11-14 22:13 UTC at step 40",
    ):
        assert text in found.text
    for text in (
        "2.1494",
        "2.5000",
        "12.18",
        "1,030",
        "3,000,000",
        "0:01:30",
        "52.3% measured, 50.0% simulated",
        "To be, or not to be",
    ):
        assert text in found.text
    for text in ("1,234,567", "dropped, empty", "2 listed", "8.00 GiB", "Some CPU", "preset: gpt-tiny"):
        assert text in found.text
    # planned and measured: the state, what is beside it, and a step of 1.25 s of which 0.2 s are waited
    for text in ("Planned and measured", "5.00 MiB", "6.00 MiB", "17.00 MiB", "18.00 MiB", "1.25 s", "0.2 s"):
        assert text in found.text
    assert " is missing" not in found.text
    assert "Scores of tasks" in found.text
    assert "Not drawn: 2 further tasks, in metrics.jsonl." in found.text, "a picture has eight lines"
    charts = charts_of((tmp_path / "my-run" / "report.html").read_text())
    assert list(charts) == [
        "loss", "scores-0", "tokens_per_second", "grad_norm", "lr", "timeline-measured", "timeline-simulated",
    ]  # fmt: skip
    loss = charts["loss"]
    assert labels_of(loss) == ["training", "training, smoothed", "held-out"]
    assert loss["x"] == ["step", "tokens", "seconds"]
    held_out = loss["lines"][2]
    assert held_out["x"] == [[20, 40, 60], [1_000_000, 2_000_000, 3_000_000], [30, 60, 90]]
    assert [(mark["label"], mark["x"][0]) for mark in loss["marks"]] == [
        ("saved (3 times)", [20, 40, 60]), ("resumed", [40]),
    ]  # fmt: skip
    assert charts["scores-0"]["lines"][0]["low"] == [0.2608, 0.5608]
    assert charts["timeline-measured"]["spans"][1] == [1, 1.2, 2.2, 0, "0"]
    phases = found.text.partition("Where the time went")[2]
    for text in ("1.5 minutes, 86.3%", "13.5 s, 12.9%", "750 ms, 0.7%", "1.05 ms", "tp 1 · pp 1 · dp 1"):
        assert text in phases


LABELS = {
    "reward": "reward",
    "kl": "divergence, nats a token",
    "entropy": "entropy, nats a token",
    "clip_share": "share of tokens that are clipped",
    "answer_tokens": "tokens of an answer",
    "cut_share": "share of answers without an end",
    "value_loss": "loss of the values",
}


def log_rows(folder: Path, rows: list[dict[str, float]]) -> str:
    """The page of a run with these columns beside the loss."""
    usual = {
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_seen": 10,
        "tokens_per_second": 9.0,
        "step_time_ms": 5.0,
        "mfu": None,
    }
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss": 0.5, **usual, **row}) for step, row in enumerate(rows, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    outline_of(folder)
    return (folder / "report.html").read_text()


def test_what_learning_from_rewards_tells_is_drawn(tmp_path: Path) -> None:
    row = dict.fromkeys(LABELS, 0.25) | {"old_kl": 0.5, "reward_std": 0.1}
    page = log_rows(tmp_path / "ppo", [row, row])
    charts = charts_of(page)
    assert {name: charts[name]["y"] for name in LABELS} == LABELS
    assert labels_of(charts["kl"]) == ["from the reference", "from before the rollout"]
    assert labels_of(charts["reward"]) == ["of the rollout", "deviation of its answers"]
    assert "loss of the policy" in page
    assert "Comparisons of answers" not in page
    without = {name: value for name, value in row.items() if name not in ("kl", "value_loss")}
    assert "value_loss" not in charts_of(log_rows(tmp_path / "grpo", [without, without]))


def test_what_comparisons_tell_is_drawn_of_training_and_held_out_examples(tmp_path: Path) -> None:
    row = {"accuracy": 0.5, "margin": 0.1, "chosen_reward": 0.2, "rejected_reward": 0.1, "kl": 0.3}
    page = log_rows(tmp_path / "kto", [row, row | {"held_out_loss": 0.4, "held_out_accuracy": 0.75}])
    charts = charts_of(page)
    assert {"accuracy", "margin", "kl"} <= charts.keys()
    assert labels_of(charts["chosen_reward"]) == ["chosen reward", "rejected reward"]
    assert labels_of(charts["accuracy"]) == ["accuracy", "accuracy, held-out"]
    assert "loss per example" in page
    assert "Learning from rewards" not in page


def test_the_page_reaches_for_nothing_outside_itself(tmp_path: Path) -> None:
    page = write_report(make_whole_run(tmp_path)).read_text()
    found = Outline(page)
    assert found.links == []
    assert not {"link", "img", "iframe", "object", "image", "base"} & set(found.tags)
    assert not re.search(r"@import|url\(|<script src|fetch\(|XMLHttpRequest|innerHTML", page)
    assert str(tmp_path.parent) not in page, "the report does not tell where the run folder lies"
    assert len(page) < 120_000


def test_the_policy_of_a_page_allows_its_own_script_and_style_alone(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    for kind in ("script", "style"):
        (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy[1]
    assert policy[1].startswith("default-src 'none';")
    assert "style=" not in page.partition("<body>")[2].partition("<script>")[0]


def test_the_library_is_what_was_published_and_carries_its_licence(tmp_path: Path) -> None:
    web = Path(charts.__file__).with_name("web")
    for name, expected in json.loads((web / "uplot.json").read_text())["sha256"].items():
        if not name.endswith(".tgz"):
            assert hashlib.sha256((web / name).read_bytes()).hexdigest() == expected
    assert "Copyright (c) 2022 Leon Sorokin" in write_report(tmp_path).read_text()


def test_a_folder_with_nothing_says_what_is_missing(tmp_path: Path) -> None:
    found = outline_of(tmp_path)
    assert "no step has finished yet" in found.text
    for name in ("spec.yaml", "metrics.jsonl", "timeline.json", "sample.txt", "data_manifest.json", "machine.json"):
        assert f"{name} is missing" in found.text
    assert "figure" not in found.tags


def test_a_run_without_steps_is_no_error(tmp_path: Path) -> None:
    make_run(tmp_path, num_steps=0)
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    found = outline_of(tmp_path)
    assert "No step has finished yet, so there is nothing to draw." in found.text
    assert "1.02 GiB planned" in found.text, "of one rank, and nothing is measured"
    (tmp_path / "plan.json").write_text(json.dumps({**PLAN, "memory": [{"activations": 0.0}]}))
    assert "0.0 KiB planned" in outline_of(tmp_path).text


@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_first_steps_can_be_drawn(tmp_path: Path, num_steps: int) -> None:
    assert outline_of(make_run(tmp_path, num_steps=num_steps)).tags.count("figure") == 4


def test_losses_that_are_not_numbers_are_named_and_the_rest_is_drawn(tmp_path: Path) -> None:
    found = outline_of(make_run(tmp_path, lost=(31, *range(58, 61))))
    assert "The loss is not a number at 4 of 60 steps, first at step 31." in found.text
    assert found.tags.count("figure") == 4


def test_why_the_newest_start_has_failed_is_told_and_a_start_that_got_on_clears_it(tmp_path: Path) -> None:
    def fail(start: str, rank: int, message: str, **more: Any) -> None:
        folder = make_run(tmp_path) / "logs" / start / f"rank-{rank}"
        folder.mkdir(parents=True)
        (folder / "error.json").write_text(json.dumps({"rank": rank, "where": "host n1", "message": message, **more}))
        os.utime(folder.parent, (100 + int(start[-1]), 100 + int(start[-1])))

    fail("start-1", 0, "an old one")
    fail("start-2", 0, "lost a peer", secondary=True, seconds=1.0)
    fail("start-2", 1, "training diverged at step 3: loss nan", secondary=False, seconds=2.0)
    assert "The newest start has failed: rank 1 (host n1): training diverged at step 3" in outline_of(tmp_path).text
    (tmp_path / "logs" / "start-3").mkdir()
    assert "has failed" not in outline_of(tmp_path).text


def test_a_run_whose_every_loss_is_nan_still_has_a_report(tmp_path: Path) -> None:
    found = outline_of(make_run(tmp_path, num_steps=3, lost=(1, 2, 3)))
    assert "first at step 1" in found.text
    assert found.tags.count("figure") == 3, "throughput, gradient norm and learning rate"


def test_text_from_the_run_folder_is_escaped_everywhere(tmp_path: Path) -> None:
    folder = make_whole_run(tmp_path / "<b>run<b>&")
    (folder / "sample.txt").write_text(HOSTILE)
    (folder / "spec.yaml").write_text(
        f"parallel: {{pp: 2, schedule: {json.dumps(HOSTILE)}, virtual_stages: {json.dumps(HOSTILE)}}}\n"
    )
    (folder / "data_manifest.json").write_text(json.dumps({HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}}))
    (folder / "machine.json").write_text(json.dumps({"cpu": HOSTILE}))
    (folder / "timeline.json").write_text(
        json.dumps({**TIMELINE, "bubble_measured": HOSTILE, "measured": [[0, HOSTILE, 0, 1]]})
    )
    found = outline_of(folder)
    assert "img" not in found.tags
    assert found.tags.count("script") == 1 + found.tags.count("figure"), "the page's own, and data"
    assert found.tags.count("b") == 6, "the cards, and nothing from the name of the folder"
    assert found.text.count(HOSTILE) >= 8


@pytest.mark.parametrize(
    "timeline",
    [
        "[]",
        "{",
        "[" * 100_000,
        "{}",
        '{"num_ranks": 1, "measured": [[0, "0F0", 0]], "simulated": []}',
        '{"num_ranks": 1, "measured": [[0, "walk", 0, 1]], "simulated": []}',
        '{"num_ranks": 1, "measured": [[-1, "0F0", 0, 1]], "simulated": []}',
        '{"num_ranks": 9999999999, "measured": [[9999999998, "0F0", 0, 1]], "simulated": []}',
        '{"num_ranks": 1, "measured": [[0, "0F0", 0, Infinity]], "simulated": []}',
        '{"num_ranks": 1, "measured": null, "simulated": []}',
    ],
)
def test_a_broken_timeline_costs_only_its_own_section(tmp_path: Path, timeline: str) -> None:
    make_run(tmp_path)
    (tmp_path / "timeline.json").write_text(timeline)
    found = outline_of(tmp_path)
    assert re.search(r"timeline\.json (cannot be drawn|is not)", found.text)
    assert found.tags.count("figure") == 4


def test_broken_metrics_and_spec_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\nnonsense\n{"step": 2, "loss": 1.0}\n')
    (tmp_path / "spec.yaml").write_text("a: [unclosed")
    found = outline_of(tmp_path)
    assert "metrics.jsonl line 2 is not a metrics row" in found.text
    assert "spec.yaml (line 1): is not valid YAML" in found.text
    assert "a: [unclosed" in found.text


def test_files_that_are_not_utf8_are_shown_with_replacements(tmp_path: Path) -> None:
    (tmp_path / "sample.txt").write_bytes(b"caf\xe9")
    assert "caf\N{REPLACEMENT CHARACTER}" in outline_of(tmp_path).text


def test_a_long_sample_is_cut_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "sample.txt").write_text("x" * 20_005)
    assert "Left out: 5 further characters, in sample.txt." in outline_of(tmp_path).text


def test_a_report_can_be_written_again(tmp_path: Path) -> None:
    make_whole_run(tmp_path)
    first = write_report(tmp_path).read_text()
    (tmp_path / "sample.txt").write_text("another sample")
    elsewhere = tmp_path / "elsewhere.html"  # as of a run on a disk that can only be read
    assert trimaran(tmp_path, "report", ".", "--output", "elsewhere.html").err == "report: elsewhere.html\n"
    assert (tmp_path / "report.html").read_text() == first
    assert write_report(tmp_path).read_text() == elsewhere.read_text()
    assert "another sample" in elsewhere.read_text()
    assert "another sample" not in first
    assert sorted(path.name for path in tmp_path.glob("report*")) == ["report.html"]


def test_a_folder_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no-such-run' does not exist; name the train\.output_dir"):
        write_report(tmp_path / "no-such-run")


def test_a_long_run_is_thinned_to_a_small_picture_that_keeps_its_spikes() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    drawn = plot("loss", Look("step", "loss"), [Series(points, "loss", line="-")])
    assert len(drawn) < 40_000
    assert len(thin([y for _, y in points])) <= 1500
    assert 54_321 in thin([y for _, y in points])
    table = drawn.partition("<details>")[2]
    assert table.count("<tr>") == 25
    assert "<td>0</td><td>1</td>" in table
    assert "24 of 100,000 places on the axis" in table


def test_the_table_of_many_lines_has_their_ends_and_extremes() -> None:
    lines = [Series([(1.0, number), (2.0, 9.0), (3.0, 0.5)], f"<{number}>") for number in range(1, 9)]
    drawn = plot("many", Look("step", "loss"), lines)
    assert "<td>&lt;7&gt;</td><td>7 at 1</td><td>0.5 at 3</td><td>0.5 at 3</td><td>9 at 2</td>" in drawn
    assert "<7>" not in drawn


def test_smoothing_keeps_a_straight_line_straight() -> None:
    line = [(float(step), 5.0 - 0.01 * step) for step in range(300)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])
    spike = [(x, 1e20 if x == 5 else 2.5) for x in range(100)]
    assert smooth(spike)[50:60] == spike[50:60], "a spike is forgotten where the window has left it"


def test_a_report_needs_no_matplotlib_and_no_torch(tmp_path: Path) -> None:
    """The fork of a process that has imported much imports what it needs anew."""
    make_whole_run(tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "for name in list(sys.modules):\n"
        "    if name.partition('.')[0] in ('matplotlib', 'torch', 'trimaran'): del sys.modules[name]\n"
        "from trimaran.launchers.report import write_report\n"
        "write_report(Path(sys.argv[1]))\n"
        "print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    )
    outcome = run_code(tmp_path, code, str(tmp_path))
    assert outcome.code == 0, outcome.err
    assert outcome.out.split() == ["False", "False"]
    assert outcome.err == ""


# ---------------------------------------------------------------- comparisons


def test_runs_of_any_length_and_metrics_are_compared(tmp_path: Path) -> None:
    make_whole_run(tmp_path / "whole")
    make_run(tmp_path / "<b>short", num_steps=8, lost=(3,))
    (tmp_path / "<b>short" / "spec.yaml").write_text(SPEC.replace("dp: 2", "dp: 4"))
    log_rows(tmp_path / "rewarded", [{"reward": 0.25, "kl": 0.5, "loss": 1e-7}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "spec.yaml").write_text("parallel: 3\n")
    outcome = trimaran(tmp_path, "report", "whole", "<b>short", "rewarded", "empty", "--output", "found.html")
    assert outcome.code == 0, outcome.err
    assert outcome.err.strip() == "comparison: found.html"
    page = (tmp_path / "found.html").read_text()
    found = Outline(page)
    assert found.open == []
    assert "b" not in found.tags
    for text in (
        "4 runs: whole, <b>short, rewarded, empty", "60 of 60 steps", "8 of 60 steps", "losses of these runs are not",
        "parallel.dp", "<b>short: The loss is not a number at 1 of 8 steps", "Differences of machine.json (0)",
        "Not known of <b>short, rewarded, empty.", "Not known of rewarded.",
        "tp 2 × pp 2 × dp 4 = 16 ranks", "no step has finished yet",
    ):  # fmt: skip
        assert text in found.text, text
    assert "model.preset" in found.text, "two runs do not have it"
    drawn = charts_of(page)
    assert labels_of(drawn["loss"]) == [
        "whole, training, smoothed", "whole, held-out", "<b>short, training", "rewarded, training",
    ]  # fmt: skip
    assert "1e-07" in found.text, "the loss of rewarded, whose first places are zeros"
    assert [mark["label"] for mark in drawn["loss"]["marks"]] == ["whole, resumed", "<b>short, not a number"]
    assert labels_of(drawn["reward"]) == ["rewarded"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("run", "--output", "run/metrics.jsonl/x.html"),
            "run/metrics.jsonl is a file, and a folder is needed there; choose another folder, or move the file away",
        ),
        (("run", "none"), "none is no run folder: it does not exist; give the train.output_dir of a run"),
        (("run",) * 9, "a comparison has 2 to 8 runs; got 9"),
    ],
)
def test_what_can_not_be_compared_is_said(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    make_run(tmp_path / "run", num_steps=1)
    outcome = trimaran(tmp_path, "report", *words)
    assert (outcome.code, outcome.last_line) == (2, f"error: {told}")
