"""Modes measured on pairs of a text and what it should become: chrF (Popović 2015) and ROUGE (Lin 2004).

The figures are those of the packages sacrebleu (chrF2, its defaults) and rouge-score (F1, without stemming).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from trimaran.models.fields import counted
from trimaran.runtime.data.corpus import check_is_text
from trimaran.runtime.data.files import DataError
from trimaran.runtime.evaluate.answers import Answers
from trimaran.runtime.evaluate.bootstrap import standard_error
from trimaran.runtime.evaluate.engine.requests import Continuation, ScorerProtocol
from trimaran.runtime.evaluate.generation import MAX_NEW_TOKENS, SAMPLING, check_settings
from trimaran.runtime.files import parse_json, read_bytes
from trimaran.runtime.infer.modes import Mode, Round, passage_test, prompt_in_mode, rounds
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.infer.sampling_params import SamplingParams

_ROUGE: Final = ("rouge1", "rouge2", "rougeL")
_MEANS: Final = ("chrf_sentence", *_ROUGE)
_MOST_BYTES: Final = 1 << 30
_LENGTHS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Pair:
    """A text and what it should become.

    Args:
        place: file and line.
    """

    source: str
    target: str
    place: str


@dataclass(frozen=True)
class PairsTask:
    """Pairs that a model is asked for in a mode.

    Args:
        original: pairs of the file, of which `pairs` are the first.
        context: of the model, in tokens.
        stops: what ends an answer, beside the mode's own.
    """

    name: str
    mode: Mode
    pairs: Sequence[Pair]
    original: int
    text: RunText
    context: int
    system: str | None
    sampling: SamplingParams
    stops: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The sha256 of all texts."""
        return _sha("\0".join(f"{each.source}\0{each.target}" for each in self.pairs))

    def encode(self, text: str) -> list[int]:
        """Return the prompt of a text or passage."""
        has_template = self.text.template is not None
        return self.text.encode(prompt_in_mode(self.mode, text, has_template=has_template, system=self.system))

    def fits(self, passage: str) -> bool:
        """Whether a passage leaves room for its answer."""
        test = passage_test(self.mode, self.encode, self.context, self.sampling.max_new_tokens, self.text)
        return test(passage)


def read_pairs(path: Path) -> list[Pair]:
    """Return the pairs of a .jsonl file, whose lines are records with the texts `source` and `target`.

    Raises:
        DataError: a line is something else, or there is none; names the line.
        OSError: it can't be read.
    """
    data = read_bytes(path, _MOST_BYTES)
    check_is_text(path, data)
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line} is not UTF-8; convert the file to UTF-8") from error
    pairs = [_pair(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise DataError(f'{path} has no pair; write a line such as {{"source": "text", "target": "what it becomes"}}')
    return pairs


def _pair(line: str, place: str) -> Pair:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON ({error}); write one record a line") from error
    texts = [row.get(name) if isinstance(row, dict) else None for name in ("source", "target")]
    if not all(isinstance(each, str) and each.strip() for each in texts):
        raise DataError(f"{place} must be a record with the texts source and target; it is {line[:100]}")
    return Pair(str(texts[0]), str(texts[1]), place)


def pairs_task(
    path: Path,
    mode: Mode,
    text: RunText,
    context: int,
    *,
    system: str | None,
    generation: dict[str, Any],
    limit: float | None,
    seed: int,
) -> PairsTask:
    """Return the task of a file of pairs, with all checked that needs no weights.

    Args:
        generation: settings in lm-eval's names.
        limit: most pairs, below 1 their share.

    Raises:
        DataError: a pair or a setting is wrong, or a text has no room in the context.
        ChatError: the model is of the wrong kind for the mode.
        OSError: the file can't be read.
    """
    _check_packages()
    pairs = read_pairs(path)
    most = len(pairs) if limit is None else int(limit) if limit >= 1 else max(1, int(limit * len(pairs)))
    sampling, stops = _sampling(generation, text, context, seed)
    name = "-".join(each for each in (mode.name, mode.language) if each)
    task = PairsTask(name, mode, pairs[:most], len(pairs), text, context, system, sampling, stops)
    for pair in task.pairs:
        if not mode.is_by_passages and len(task.encode(pair.source)) + sampling.max_new_tokens > context:
            raise DataError(
                f"{pair.place}: the text and an answer of {sampling.max_new_tokens} tokens don't fit the model's "
                f"context of {context} (model.max_seq_len); shorten it, or give --gen max_gen_toks=N"
            )
    if mode.is_by_passages:
        next(rounds(mode, task.pairs[0].source, task.fits))  # which tells where no passage has room
    return task


def _sampling(
    generation: dict[str, Any], text: RunText, context: int, seed: int
) -> tuple[SamplingParams, tuple[str, ...]]:
    settings = check_settings(generation, "--gen")
    length = next((settings[name] for name in _LENGTHS if name in settings), min(MAX_NEW_TOKENS, context // 2))
    if not 0 < length < context:
        raise DataError(f"--gen: {length} new tokens, and the model's context has {context}; take 1 to {context - 1}")
    draws = settings.get("do_sample", settings.get("temperature", 0.0) > 0)
    chosen = {name: settings[name] for name in SAMPLING if name in settings} if draws else {}
    until = settings.get("until", [])
    stops = tuple(token for token in text.stop_tokens if token < text.tokenizer.vocab_size)
    try:
        return (
            SamplingParams(length, **{"temperature": 0.0, **chosen}, seed=seed, stop_tokens=stops, context="stop"),
            tuple([until] if isinstance(until, str) else until),
        )
    except ValueError as error:
        raise DataError(f"--gen: {error}") from error


def answer_pairs(
    task: PairsTask,
    scorer: ScorerProtocol,
    answers: Answers,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[list[str], list[str]]:
    """Return the answer to each pair, and sentences for the user; what the journal knows is not asked again.

    Args:
        progress: called with (requests answered, of how many), for each round of passages.
    """
    results = [""] * len(task.pairs)
    parts: dict[int, Generator[Round, Sequence[str], str]] = {}
    asked: dict[int, tuple[str, ...]] = {}
    passages: Counter[int] = Counter()
    for number, pair in enumerate(task.pairs):
        if task.mode.is_by_passages:
            parts[number] = rounds(task.mode, pair.source, task.fits)
            asked[number] = next(parts[number]).passages
        else:
            asked[number] = (pair.source,)
    while asked:
        found = iter(_ask(task, [each for texts in asked.values() for each in texts], scorer, answers, progress))
        waiting: dict[int, tuple[str, ...]] = {}
        for number, texts in asked.items():
            told = [next(found) for _ in texts]
            passages[number] += len(texts)
            try:
                if number in parts:
                    waiting[number] = parts[number].send(told).passages
                else:
                    results[number] = told[0].strip()
            except StopIteration as ended:
                results[number] = ended.value
        asked = waiting
    long = sum(count > 1 for count in passages.values())
    notes = [f"{task.name}: {counted(long, 'text')} of {len(results)} went in passages, which are put together"]
    return results, notes if long else []


def _ask(
    task: PairsTask,
    texts: Sequence[str],
    scorer: ScorerProtocol,
    answers: Answers,
    progress: Callable[[int, int], None],
) -> list[str]:
    stops = (*task.stops, *task.mode.stop_strings(has_template=task.text.template is not None))
    requests = [Continuation(tuple(task.encode(text)), stops, task.sampling) for text in texts]
    keys = [answers.key(request) for request in requests]
    wanted = {key: request for key, request in zip(keys, requests, strict=True) if answers.get(key) is None}
    names, of = list(wanted), len(set(keys))
    done = of - len(names)

    def take(number: int, answer: str) -> None:
        nonlocal done
        answers.put(names[number], answer)
        done += 1
        progress(done, of)

    try:
        if wanted:
            scorer.continuations(list(wanted.values()), take)
    finally:
        answers.write()
    return [str(answers.get(key)) for key in keys]


def pairs_results(task: PairsTask, told: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the results of the answers as lm-eval's schema has those of a task, with samples; and notes."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.chrf import CHRF

    chrf, rouge = CHRF(), RougeScorer(list(_ROUGE), use_stemmer=False)
    samples: list[dict[str, Any]] = []
    for number, (pair, answer) in enumerate(zip(task.pairs, told, strict=True)):
        scores = rouge.score(pair.target, answer)
        values = {name: float(scores[name].fmeasure) for name in _ROUGE}
        values["chrf_sentence"] = float(chrf.sentence_score(answer, [pair.target]).score)
        samples.append(
            {
                "doc_id": number,
                "doc": asdict(pair),
                "target": pair.target,
                "filtered_resps": [answer],
                "filter": "none",
                "metrics": list(_MEANS),
                "doc_hash": _sha(pair.source),
                "target_hash": _sha(pair.target),
                "prompt_hash": _sha(repr(task.encode(pair.source))),
                **values,
            }
        )
    row: dict[str, Any] = {"name": task.name, "alias": task.name, "sample_len": len(samples)}
    corpus = chrf.corpus_score(list(told), [[pair.target for pair in task.pairs]])
    row |= {"chrf,none": float(corpus.score), "chrf_stderr,none": "N/A"}
    for name in _MEANS:
        column: list[float] = [sample[name] for sample in samples]
        row[f"{name},none"] = sum(column) / len(column)
        row[f"{name}_stderr,none"] = standard_error(f"{task.name} {name}", column)
    config = {
        "task": task.name,
        "output_type": "generate_until",
        "chrf": str(chrf.get_signature()),
        "rouge": "rouge-score, F1, without stemming",
        "generation": asdict(task.sampling) | {"stop_strings": list(task.stops)},
    }
    results = {
        "results": {task.name: row},
        "group_subtasks": {},
        "configs": {task.name: config},
        "versions": {task.name: 1},
        "n-shot": {task.name: 0},
        "higher_is_better": {task.name: dict.fromkeys(("chrf", *_MEANS), True)},
        "n-samples": {task.name: {"original": task.original, "effective": len(samples)}},
        "samples": {task.name: samples},
    }
    letters = sum(each.isalpha() and not each.isascii() for pair in task.pairs for each in pair.target)
    note = f"{task.name}: the targets have {counted(letters, 'letter')} that rouge-score takes for spaces, because it "
    return results, [f"{note}knows a to z alone; chrF counts every letter"] if letters else []


def _check_packages() -> None:
    try:
        import rouge_score
        import sacrebleu
    except ImportError as error:
        raise DataError(
            f"--pairs needs the packages sacrebleu and rouge-score ({error}): pip install 'trimaran[evaluate]'"
        ) from error
    assert rouge_score
    assert sacrebleu


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
