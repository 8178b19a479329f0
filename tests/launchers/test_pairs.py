"""`trimaran evaluate --pairs`: translations and summaries measured by chrF and ROUGE, as their packages do."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from tests.launchers.chat_run import chat_run
from tests.launchers.drawn_run import Answer, invoke
from tests.launchers.runs import text_of, trimaran
from trimaran.runtime.evaluate.results import read_evaluation
from trimaran.runtime.evaluate.tasks.pairs import PairsTask, pairs_results, read_pairs
from trimaran.runtime.infer.modes import Mode
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.infer.sampling_params import SamplingParams

GEN = ("--gen", "max_gen_toks=60")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs and pairs, the first of which goes in passages."""
    folder = tmp_path_factory.mktemp("pairs")
    chat_run(folder)
    chat_run(folder, has_template=False)
    sources = [text_of(8), *(text_of(1, seed) for seed in range(1, 6))]
    rows = [{"source": source, "target": source[::2]} for source in sources]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture
def evaluate(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    monkeypatch.chdir(place)
    return partial(invoke, "evaluate")


def test_the_figures_are_those_of_sacrebleu_and_rouge_score(place: Path, evaluate: Callable[..., Answer]) -> None:
    code, out, err = evaluate("talker", "--mode", "translate", "--to", "tr", "--pairs", "pairs.jsonl", *GEN)
    assert code == 0, err
    for words in ("translate-tr", "chrf ↑", "rougeL ↑"):
        assert words in out
    assert "translate-tr: 5 texts of 6 went in passages, which are put together" in err
    folder = place / "talker" / "evaluations" / "translate-tr-pairs-gen-max_gen_toks=60-step-0"
    found = read_evaluation(folder)
    assert (folder / "report.html").is_file()
    samples = found.samples["translate-tr"]
    answers = [sample["filtered_resps"][0] for sample in samples]
    targets = [json.loads(line)["target"] for line in (place / "pairs.jsonl").read_text().splitlines()]
    assert [sample["target"] for sample in samples] == targets
    assert all(answers)
    row = found.results["results"]["translate-tr"]
    assert row["chrf,none"] == CHRF().corpus_score(answers, [targets]).score > 0
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [rouge.score(target, answer) for target, answer in zip(targets, answers, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert row[f"{name},none"] == pytest.approx(sum(each[name].fmeasure for each in scores) / 6, rel=1e-12)
    assert found.results["configs"]["translate-tr"]["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no")
    assert found.results["config"]["pairs"] == "pairs.jsonl"


def test_summaries_at_another_layout_are_the_same(place: Path, evaluate: Callable[..., Answer]) -> None:
    asked = ("--mode", "summarize", "--pairs", "pairs.jsonl", *GEN, "--limit", "3")
    code, out, err = evaluate("talker", *asked, "--output", "one")
    assert code == 0, err
    assert "--limit 3: 3 of 6 documents" in out
    ranks = trimaran(place, "evaluate", "talker", *asked, "--output", "ranks", "--tp", "2")
    assert ranks.code == 0, ranks.err
    one, two = (read_evaluation(place / name) for name in ("one", "ranks"))
    assert one.results["results"] == two.results["results"]


def test_a_model_without_a_template_writes_summaries_too_and_models_are_compared(
    place: Path, evaluate: Callable[..., Answer]
) -> None:
    code, out, err = evaluate(
        "talker", "writer", "--mode", "summarize", "--pairs", "pairs.jsonl", *GEN, "--output", "both"
    )
    assert code == 0, err
    assert "95% interval" in out
    assert "rougeL" in out
    assert "6 of 6 prompts differ" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--pairs", "pairs.jsonl"), "--pairs and --mode go together"),
        (("--mode", "answer"), "nothing to evaluate"),
        (("--mode", "sumarize", "--pairs", "pairs.jsonl"), "did you mean summarize?"),
        (("--mode", "translate", "--pairs", "pairs.jsonl"), "--mode translate needs --to"),
        (("--mode", "translate", "--to", "turk", "--pairs", "pairs.jsonl"), "did you mean tr (Turkish)?"),
        (("--to", "tr", "--text", "pairs.jsonl"), "--to is for --mode translate"),
        (("--mode", "summarize", "--pairs", "none.jsonl"), "No such file"),
        (("--mode", "summarize", "--pairs", "pairs.jsonl", "--gen", "max_gen_toks=999"), "999 new tokens, and the"),
        (("--mode", "summarize", "--pairs", "pairs.jsonl", "--gen", "beams=4"), "generation has no setting beams"),
        (("--mode", "answer", "--pairs", "pairs.jsonl"), "pairs.jsonl, line 1: the text and an answer of 128"),
        (("--mode", "summarize", "--pairs", "pairs.jsonl", "--num-fewshot", "1"), "--num-fewshot is for --tasks"),
        (("--mode", "summarize", "--pairs", "pairs.jsonl", "--system", "x" * 300), "has no room for a passage"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_get_a_sentence(options: tuple[str, ...], words: str, evaluate: Callable[..., Answer]) -> None:
    code, _, err = evaluate("talker", *options)
    assert (code, words in err) == (2, True), err


def test_a_writer_is_refused_what_it_can_not_do(place: Path, evaluate: Callable[..., Answer]) -> None:
    code, _, err = evaluate("writer", "--mode", "answer", "--pairs", "pairs.jsonl")
    assert code == 2
    assert "this model has no chat template" in err
    assert "--mode continue" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no pair; write a line such as"),
        (b"\n{", "line 2 is not JSON"),
        (b'{"source": "a"}', "line 1 must be a record with the texts source and target"),
        (b'{"source": "a", "target": " "}', "line 1 must be a record with the texts source and target"),
        (b'{"source": "a", "target": "b"}\n"c"', "line 2 must be a record"),
        (b'{"source": "\xff"}', "line 1 is not UTF-8"),
    ],
)
def test_wrong_pairs_name_their_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_pairs(tmp_path / "pairs.jsonl")


def test_that_rouge_knows_a_to_z_alone_is_told(place: Path) -> None:
    text = RunText.open(place / "talker")
    (place / "tr.jsonl").write_text('{"source": "a tree", "target": "bir ağaç"}\n', encoding="utf-8")
    pairs, sampling = read_pairs(place / "tr.jsonl"), SamplingParams(9)
    task = PairsTask("translate-tr", Mode("translate", "tr"), pairs, 1, text, 256, None, sampling, ())
    results, (note,) = pairs_results(task, ["bir ağaç"])
    assert results["results"]["translate-tr"]["chrf,none"] == 100
    assert note.startswith(
        "translate-tr: the targets have 2 letters that rouge-score takes for spaces, because it knows"
    )
