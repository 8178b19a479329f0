"""The report of fabricated run folders: whole, empty, diverged, broken and hostile."""

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.launchers.runs import run_code
from trimaran.launchers.report import page as report_page
from trimaran.launchers.report import write_report
from trimaran.launchers.report.charts import Line, chart, smooth, thin
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
                logger.log_evaluation(step=step, held_out_loss=2.5)
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


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are drawn as empty pictures, which takes no time, where a test looks at the rest of the page."""
    monkeypatch.setattr(report_page, "chart", lambda *arguments, **options: "<svg></svg>")


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
    assert "missing" not in found.text
    assert "Scores of tasks" in found.text
    assert "2 further tasks are in metrics.jsonl." in found.text, "a picture has eight lines"
    assert found.tags.count("svg") == 9, "the last two are what pipeline ranks hold, and where ranks live"


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


def drawn_labels(page: str, heading: str) -> list[str]:
    """The texts of the pictures of a section, which matplotlib writes into comments."""
    part = page.partition(heading)[2].partition("</section>")[0]
    return [text.strip() for text in re.findall(r"<!--(.*?)-->", part, re.DOTALL)]


def test_what_learning_from_rewards_tells_is_drawn(tmp_path: Path) -> None:
    row = dict.fromkeys(LABELS, 0.25) | {"old_kl": 0.5, "reward_std": 0.1}
    page = log_rows(tmp_path / "ppo", [row, row])
    drawn = drawn_labels(page, "Learning from rewards")
    assert set(LABELS.values()) <= set(drawn)
    assert {"from the reference", "from before the rollout", "deviation of its answers"} <= set(drawn)
    assert "loss of the policy" in page
    assert "Comparisons of answers" not in page
    without = {name: value for name, value in row.items() if name not in ("kl", "value_loss")}
    assert "loss of the values" not in log_rows(tmp_path / "grpo", [without, without])


def test_what_comparisons_tell_is_drawn_of_training_and_held_out_examples(tmp_path: Path) -> None:
    row = {"accuracy": 0.5, "margin": 0.1, "chosen_reward": 0.2, "rejected_reward": 0.1, "kl": 0.3}
    page = log_rows(tmp_path / "kto", [row, row | {"held_out_loss": 0.4, "held_out_accuracy": 0.75}])
    drawn = drawn_labels(page, "Comparisons of answers")
    assert {"accuracy", "margin", "rewards", "chosen reward", "divergence from the reference, nats"} <= set(drawn)
    assert "accuracy, held-out" in drawn
    assert "loss per example" in page
    assert "Learning from rewards" not in page


def test_the_page_reaches_for_nothing_outside_itself(tmp_path: Path) -> None:
    page = write_report(make_whole_run(tmp_path)).read_text()
    found = Outline(page)
    assert all(link.startswith("#") for link in found.links)
    assert not {"script", "link", "img", "iframe", "object", "image", "base"} & set(found.tags)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    assert str(tmp_path.parent) not in page, "the report does not tell where the run folder lies"
    targets = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert targets
    assert targets <= set(found.ids)


def test_a_folder_with_nothing_says_what_is_missing(tmp_path: Path) -> None:
    found = outline_of(tmp_path)
    assert "no step has finished yet" in found.text
    for name in ("spec.yaml", "metrics.jsonl", "timeline.json", "sample.txt", "data_manifest.json", "machine.json"):
        assert f"{name} is missing" in found.text
    assert "svg" not in found.tags


def test_a_run_without_steps_is_no_error(tmp_path: Path) -> None:
    make_run(tmp_path, num_steps=0)
    assert "No step has finished yet, so there is nothing to draw." in outline_of(tmp_path).text


@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_first_steps_can_be_drawn(tmp_path: Path, num_steps: int) -> None:
    assert outline_of(make_run(tmp_path, num_steps=num_steps)).tags.count("svg") == 4


def test_losses_that_are_not_numbers_are_named_and_the_rest_is_drawn(tmp_path: Path) -> None:
    found = outline_of(make_run(tmp_path, lost=(31, *range(58, 61))))
    assert "The loss is not a number at 4 of 60 steps, first at step 31." in found.text
    assert found.tags.count("svg") == 4


def test_a_run_whose_every_loss_is_nan_still_has_a_report(tmp_path: Path) -> None:
    found = outline_of(make_run(tmp_path, num_steps=3, lost=(1, 2, 3)))
    assert "first at step 1" in found.text
    assert found.tags.count("svg") == 3, "throughput, gradient norm and learning rate"


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
    assert not {"script", "img"} & set(found.tags)
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
def test_a_broken_timeline_costs_only_its_own_section(tmp_path: Path, timeline: str, undrawn: None) -> None:
    make_run(tmp_path)
    (tmp_path / "timeline.json").write_text(timeline)
    found = outline_of(tmp_path)
    assert re.search(r"timeline\.json (cannot be drawn|is not)", found.text)
    assert found.tags.count("svg") == 4


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
    assert "5 further characters are in sample.txt" in outline_of(tmp_path).text


def test_a_report_can_be_written_again(tmp_path: Path, undrawn: None) -> None:
    make_whole_run(tmp_path)
    first = write_report(tmp_path).read_text()
    (tmp_path / "sample.txt").write_text("another sample")
    assert "another sample" in write_report(tmp_path).read_text()
    assert "another sample" not in first
    assert sorted(path.name for path in tmp_path.glob("report*")) == ["report.html"]


def test_a_folder_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no-such-run' does not exist; name the train\.output_dir"):
        write_report(tmp_path / "no-such-run")


def test_a_long_run_is_thinned_to_a_small_picture_that_keeps_its_spikes() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    svg = chart("loss", "loss", [Line(points, "loss", "#000000")], size=(8, 3))
    assert len(svg) < 100_000
    assert len(thin(points)) <= 1500
    assert (54_321.0, 99.0) in thin(points)


def test_smoothing_keeps_a_straight_line_straight() -> None:
    line = [(float(step), 5.0 - 0.01 * step) for step in range(300)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    """Nor does it import torch; the fork of a process that has imported much imports what it draws with anew."""
    make_whole_run(tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "for name in list(sys.modules):\n"
        "    if name.partition('.')[0] in ('matplotlib', 'torch', 'trimaran'): del sys.modules[name]\n"
        "from trimaran.launchers.report import write_report\n"
        "early = 'matplotlib' in sys.modules; write_report(Path(sys.argv[1]))\n"
        "print(early, 'matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    outcome = run_code(tmp_path, code, str(tmp_path))
    assert outcome.code == 0, outcome.err
    assert outcome.out.split() == ["False", "True", "False", "False"]
    assert outcome.err == ""
