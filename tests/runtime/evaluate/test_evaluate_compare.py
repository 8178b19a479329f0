"""Results are written whole, tell their limit and read back; intervals of paired differences cover as they say."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimaran.runtime.evaluate.bootstrap import generator_of, interval_of, resampled, standard_error
from trimaran.runtime.evaluate.compare import compare
from trimaran.runtime.evaluate.results import (
    Evaluation,
    Origin,
    evaluation_name,
    evaluation_of,
    joined,
    read_evaluation,
    scores_of,
    write_evaluation,
)
from trimaran.runtime.evaluate.tasks.catalog import MEANS
from trimaran.runtime.evaluate.text import TextCounts, TextDocument, text_results

ORIGIN = Origin("runs/a", 20, 400, {"tp": 2, "pp": 1, "dp": 1}, {"weights": "w", "tokenizer": "t"}, "fp32", "cpu")


def task(name: str, values: Mapping[str, Sequence[Any]], *, original: int | None = None) -> dict[str, Any]:
    """What lm-eval returns for a task whose metrics are means over these values of the documents."""
    count = len(next(iter(values.values())))
    row = {f"{metric},none": float(np.mean(each)) for metric, each in values.items()}
    samples = [
        {
            "doc_id": n, "doc": {"question": f"{name} {n}"}, "target": "1", "arguments": [["long prompt", " a"]],
            "resps": [[[-1.0, True]]], "filtered_resps": [[-1.0, True]], "filter": "none", "metrics": list(values),
            "doc_hash": hashlib.sha256(f"{name} {n}".encode()).hexdigest(), "prompt_hash": "p", "target_hash": "q",
            **{metric: each[n] for metric, each in values.items()},
        }
        for n in range(count)
    ]  # fmt: skip
    return {
        "results": {name: {"name": name, "alias": name, "sample_len": count, **row}},
        "group_subtasks": {},
        "n-shot": {name: 0},
        "higher_is_better": {name: dict.fromkeys(values, True)},
        "n-samples": {name: {"original": original or count, "effective": count}},
        "samples": {name: samples},
    }


def evaluation(*parts: Mapping[str, Any], origin: Origin = ORIGIN, **config: Any) -> Evaluation:
    return evaluation_of(joined(parts), origin, config={"limit": None} | config)


def test_results_come_back_whole_and_tell_the_limit(tmp_path: Path) -> None:
    found = evaluation(task("arc", {"acc": [1, 0, 1]}, original=40), limit=3)
    write_evaluation(tmp_path / "e", found, with_prompts=False)
    again = read_evaluation(tmp_path / "e")
    assert again.results["layout"] == {"tp": 2, "pp": 1, "dp": 1}
    assert again.results["software"]["torch"].startswith("2.")
    assert again.results["checkpoint"] == {"model": "runs/a", "step": 20, "tokens_seen": 400}
    assert again.results["hashes"]["weights"] == "w"
    assert "--limit 3: 3 of 40 documents were evaluated" in again.results["notes"][0]
    assert again.samples["arc"][1]["acc"] == 0
    assert "arguments" not in again.samples["arc"][0]
    (score,) = scores_of(again.results)
    assert (score.task, score.metric, score.documents, score.higher_is_better) == ("arc", "acc", 3, True)
    assert score.value == pytest.approx(2 / 3)
    write_evaluation(tmp_path / "e", found, with_prompts=True)
    assert read_evaluation(tmp_path / "e").samples["arc"][0]["arguments"] == [["long prompt", " a"]]
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == ["results.json", "samples.jsonl"]


def test_a_folder_without_a_whole_evaluation_is_told(tmp_path: Path) -> None:
    write_evaluation(tmp_path, evaluation(task("arc", {"acc": [1, 0]})), with_prompts=False)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    (tmp_path / "samples.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(ValueError, match="are of different evaluations"):
        read_evaluation(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"results": {}}))
    with pytest.raises(ValueError, match="holds no whole evaluation"):
        read_evaluation(tmp_path)


def test_names_hold_tasks_options_and_the_step() -> None:
    assert evaluation_name(["arc_easy", "a/own.yaml"], 20, {}) == "arc_easy+own-step-20"
    options = {"limit": 12, "num_fewshot": None, "apply_chat_template": True}
    assert evaluation_name(["text"], None, options) == "text-limit-12-apply-chat-template"
    many = [evaluation_name([f"task_{n}" for n in range(count)], 1, {}) for count in (90, 91)]
    assert many[0] != many[1]
    assert all(len(name) < 120 for name in many)


def test_the_interval_is_that_of_a_plain_loop() -> None:
    """Against resamples by hand, for few different values (counted) and for many (drawn one by one)."""
    draw = np.random.default_rng(1)
    for values in (draw.integers(-1, 2, 300).astype(float), draw.normal(0.2, 1, 300)):
        pairs = np.stack([values, np.ones(300)], axis=1)
        sums = resampled(pairs, generator_of(0, "a"), 10_000)
        by_hand = [float(np.mean(draw.choice(values, 300))) for _ in range(4000)]
        assert interval_of(sums[:, 0] / sums[:, 1]) == pytest.approx(np.percentile(by_hand, (2.5, 97.5)), abs=0.015)
        assert standard_error("acc", list(values)) == pytest.approx(values.std(ddof=1) / math.sqrt(300), rel=0.05)


def test_intervals_cover_the_true_difference_as_often_as_they_say() -> None:
    """200 pairs of models whose answers differ by 0.1 in truth; 95% is 190, and 3 standard deviations are 9."""
    draw, covered, shown = np.random.default_rng(2), 0, 0
    for _ in range(200):
        left = (draw.random(200) < 0.5).astype(int).tolist()
        right = [value if draw.random() < 0.7 else int(draw.random() < 0.5 + 0.1 / 0.3) for value in left]
        sides = [evaluation(task("t", {"acc": each})) for each in (left, right)]
        (row,) = compare(*sides, resamples=1000).differences
        assert row.interval is not None
        covered += row.interval[0] <= 0.1 <= row.interval[1]
        shown += row.verdict == "higher"
    assert 180 <= covered <= 199
    assert shown > 100


def test_equal_models_show_no_difference_and_seeds_repeat() -> None:
    draw = np.random.default_rng(3)
    left, right = (evaluation(task("t", {"acc": draw.integers(0, 2, 80).tolist()})) for _ in range(2))
    (row,) = compare(left, right).differences
    assert row.verdict == "no difference shown"
    assert compare(left, right) == compare(left, right)
    assert compare(left, right, seed=1).differences[0].interval != row.interval
    (same,) = compare(left, left).differences
    assert (same.difference, same.interval) == (0.0, (0.0, 0.0))
    assert same.verdict == "no difference shown"


def test_a_group_is_compared_by_the_weights_of_its_figure() -> None:
    draw = np.random.default_rng(4)
    sides = []
    for shift in (0.0, 0.3):
        small, large = ((draw.random(count) < 0.4 + shift).astype(int).tolist() for count in (40, 160))
        parts = [task("small", {"acc": small}), task("large", {"acc": large})]
        whole = joined(parts)
        whole["results"] = {
            "by_size": {"acc,none": float(np.mean(small + large)), "alias": "by size"},
            "plain": {"acc,none": float((np.mean(small) + np.mean(large)) / 2), "alias": "plain"},
            "odd": {"acc,none": 0.123, "alias": "odd"},
            **whole["results"],
        }
        whole["group_subtasks"] = {key: ["small", "large"] for key in ("by_size", "plain", "odd")}
        sides.append(evaluation(whole))
    found = compare(*sides)
    rows = {row.task: row for row in found.differences}
    assert set(rows) == {"by_size", "plain", "small", "large"}
    assert rows["by_size"].difference == pytest.approx(0.2 * rows["small"].difference + 0.8 * rows["large"].difference)
    for name in ("by_size", "plain"):
        interval = rows[name].interval
        assert interval is not None
        assert interval[0] < rows[name].difference < interval[1]
        assert rows[name].verdict == "higher"
    assert [note for note in found.notes if "acc of odd is not compared" in note]
    depths = {score.task: score.depth for score in scores_of(sides[0].results)}
    assert depths == {"by_size": 0, "small": 1, "large": 1, "plain": 0, "odd": 0}


def test_the_mean_of_groups_and_tasks_is_compared() -> None:
    sides = []
    for score in (0, 1):
        parts = [task(part.name, {part.metric.partition(",")[0]: [score, 0, 1]}) for part in MEANS["leaderboard"]]
        whole = joined(parts)
        whole["results"]["leaderboard"] = {"alias": "leaderboard", "mean,none": (score + 1) / 3}
        sides.append(evaluation(whole))
    (row,) = [row for row in compare(*sides).differences if row.task == "leaderboard"]
    assert (row.metric, row.documents) == ("mean", 12)
    assert row.difference == pytest.approx(1 / 3)
    assert row.verdict == "higher"


def test_texts_are_compared_by_what_does_not_depend_on_the_tokenizer() -> None:
    documents = [TextDocument(str(n), "word " * (n + 1)) for n in range(20)]
    sides = []
    for scale, tokenizer in ((1.0, "a"), (1.1, "b")):
        counts = [TextCounts(scale * (n + 2), 2 * n + 1, n + 2, 5 * n + 5, 5 * n + 5) for n in range(20)]
        origin = Origin("m", None, None, {}, {"tokenizer": tokenizer}, "fp32", "cpu")
        sides.append(evaluation(text_results(documents, counts, None, 8), origin=origin))
    found = compare(*sides)
    assert {row.metric for row in found.differences} == {
        "word_perplexity", "byte_perplexity", "bits_per_byte", "bits_per_character",
    }  # fmt: skip
    assert all(row.verdict == "higher" for row in found.differences)
    assert "nats_per_token of text is not compared: the tokenizers differ, and with them what a token is" in found.notes


def test_what_can_not_be_paired_is_an_error_or_told() -> None:
    left = evaluation(task("t", {"acc": [1, 0, 1]}), task("alone", {"acc": [1, 0]}), limit=3)
    with pytest.raises(ValueError, match="t: a step 20 has answers to 3 documents and a step 20 to 2; document 2 is"):
        compare(left, evaluation(task("t", {"acc": [1, 0]})))
    other = evaluation(task("t", {"acc": [1, 0, 1]}))
    changed = [{**sample, "doc_hash": "x"} for sample in other.samples["t"]]
    with pytest.raises(ValueError, match="t: document 0 of a step 20 is another than that of a step 20"):
        compare(left, Evaluation(other.results, {"t": changed}))
    corpus = evaluation(task("t", {"acc": [1, 0, 0], "f1": [[1, 0], [0, 0], [1, 1]]}))
    corpus.results["results"]["t"]["f1,none"] = 0.77
    notes = compare(corpus, corpus).notes
    assert notes == ["f1 of t is not compared: it is no mean over documents"]
    asked = [{**sample, "prompt_hash": "other"} for sample in other.samples["t"]]
    assert (
        "t: 3 of 3 prompts differ, by few-shot examples or chat template"
        in compare(other, Evaluation(other.results, {"t": asked})).notes
    )
    notes = compare(left, other).notes
    assert "alone was evaluated for a step 20 alone" in notes
    assert "--limit differs: 3 for a step 20, None for a step 20" in notes
    (row,) = compare(*[evaluation(task("t", {"acc": [each]})) for each in (0, 1)]).differences
    assert (row.difference, row.interval, row.verdict) == (1.0, None, "one document shows no interval")
