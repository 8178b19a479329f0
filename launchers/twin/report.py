"""`trimaran twin report`: measure a twin beside its base, choose the checkpoint, and write report.json and its page."""

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from trimaran.launchers.twin.collect import Said, Start, Talker, talking
from trimaran.runtime.checkpoint.folder import find_checkpoints, newest_checkpoint
from trimaran.runtime.data.files import DataError
from trimaran.runtime.files import read_text
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.twin.asking import Twin
from trimaran.runtime.twin.casing import lower
from trimaran.runtime.twin.passages import Passage, read_passages
from trimaran.runtime.twin.record import TWIN, TwinRecord
from trimaran.runtime.twin.report import memorisation
from trimaran.runtime.twin.report.delta import Delta, reference
from trimaran.runtime.twin.report.intervals import Estimate, mean, share
from trimaran.runtime.twin.report.memorisation import PREFIX, VERBATIM, Prefix, prefixes_of
from trimaran.runtime.twin.report.others import others_of
from trimaran.runtime.twin.report.questions import ABSENT, follow_up, questions_about
from trimaran.runtime.twin.report.record import Figure, Memory, Step, TwinReport, Way
from trimaran.runtime.twin.report.style import PIECE, CannotMeasureError, StyleClassifier, train_style
from trimaran.runtime.twin.report.topics import topics
from trimaran.runtime.twin.retrieval.masked import make_queries

Say = Callable[[str], None]
MOST_RISE: Final = 0.03
"""Of others' bits a character over the base's, up to which a checkpoint may be chosen (early stop)."""
_QUERIES: Final = 200
_FIRST: Final = 5
_LONGEST: Final = 10
_DIALOGUES: Final = 10
_SAMPLE: Final = 50  # passages whose characters a token are counted
_LEAST_PIECE: Final = 120
_SHARE_OF_ANSWER: Final = 0.8


@dataclass(frozen=True)
class Wish:
    """What is measured, and how much of it.

    Args:
        others: sources of texts of others; none for those that every Python has.
        questions: that each of the four ways answers.
        answer_tokens: most of an answer.
        prefixes: of training texts, and of held-out ones, that are continued.
        characters: most of the held-out text, and of others', that is scored.
        seed: of the draws of answers.
    """

    others: tuple[str, ...] = ()
    questions: int = 24
    answer_tokens: int = 120
    prefixes: int = 200
    characters: int = 20_000
    seed: int = 0


@dataclass
class _Texts:
    """What everything is measured on."""

    twin: Twin
    record: TwinRecord
    passages: list[Passage]
    held_out: list[str]
    others: list[str]
    others_are: str
    questions: list[str]
    absent: list[str]
    style: StyleClassifier | CannotMeasureError
    delta: Delta | CannotMeasureError
    ways: dict[str, Way] = field(default_factory=dict)


async def make_report(run: Path, wish: Wish, start: Start, say: Say) -> TwinReport:
    """Return what was measured of the twin of a run folder.

    Args:
        start: of the ranks, for one model after the other.
        say: called with a sentence about what is measured now.

    Raises:
        ValueError: the run is no twin or has no checkpoint, or a source of others' texts can't be read.
        BackendGoneError: the ranks of a model have failed.
    """
    texts = _texts(Twin.open(run), run, wish)
    record = texts.record
    checkpoints = [(found.step, found.path) for found in find_checkpoints(run / "checkpoints") if found.broken is None]
    if not checkpoints:
        raise ValueError(f"{run} has no whole checkpoint; train the twin by trimaran twin train {run}")
    base, memory = None, dict[str, dict[str, Memory]]()
    if record.model is not None and record.decision.method == "adapter":
        say(f"the base, {record.model}")
        path = newest_checkpoint(Path(record.model))
        if path is None:
            raise ValueError(f"{record.model}, the model that the twin was made of, has no whole checkpoint any more")
        async with talking(start, path, path.parent.parent) as talker:
            base = await _step(talker, texts, 0)
            memory["base"] = await _answer(talker, texts, wish, "base")
    steps = []
    for step, path in checkpoints:
        say(f"held-out text at step {step}")
        async with talking(start, path, run) as talker:
            steps.append(await _step(talker, texts, step))
    chosen, why = choose(base, steps)
    say(f"step {chosen}: {why}")
    async with talking(start, dict(checkpoints)[chosen], run) as talker:
        memory["tuned"] = await _answer(talker, texts, wish, "tuned")
        dialogues = await _dialogues(talker, texts, wish)
    recall, milliseconds = _retrieval(texts)
    style, delta = texts.style, texts.delta
    return TwinReport(
        author=record.author, character=record.character, model=record.model, language=record.language, base=base,
        steps=steps, chosen=chosen, why=why, others=texts.others_are,
        classifier=Figure(why_not=str(style)) if isinstance(style, CannotMeasureError)
        else Figure(value=style.accuracy, count=sum(style.held_out)),
        held_out_delta=None if isinstance(delta, CannotMeasureError) else delta.held_out,
        recall=recall, milliseconds=milliseconds, ways=texts.ways, memory=memory, dialogues=dialogues,
        settings=vars(wish),
    )  # fmt: skip


def choose(base: Step | None, steps: Sequence[Step]) -> tuple[int, str]:
    """Return the step of the checkpoint to take, and why: the author's best that spoils others' texts little."""
    best = min(steps, key=lambda each: each.author)
    if base is None or base.others is None:
        return best.step, "the author's held-out text costs it fewest bits"
    most = base.others * (1 + MOST_RISE)
    fitting = [each for each in steps if each.others is not None and each.others <= most]
    if not fitting:
        least = min(steps, key=lambda each: each.others or 0.0)
        rise = (least.others or 0.0) / base.others - 1
        return best.step, (
            f"others' texts cost at least {rise:+.1%} at every kept step, above {MOST_RISE:.0%}, so the author's "
            "held-out text alone decides"
        )
    kept = min(fitting, key=lambda each: each.author)
    why = "the author's held-out text costs it fewest bits"
    if kept is not best:
        why += f", of the steps at which others' texts cost at most {MOST_RISE:.0%} more than the base's"
    return kept.step, why


def _texts(twin: Twin, run: Path, wish: Wish) -> _Texts:
    record, passages = TwinRecord.read(run / TWIN), read_passages(run / TWIN)
    language = record.language
    training = [each.text for each in passages if not each.is_held_out]
    held_out = [each.text for each in passages if each.is_held_out]
    others, held_out_others, others_are = others_of(wish.others, language)
    style: StyleClassifier | CannotMeasureError
    delta: Delta | CannotMeasureError
    try:
        piece = _piece(run, training, wish.answer_tokens)
        style = train_style(training, others, held_out, held_out_others, piece=piece, seed=wish.seed)
    except CannotMeasureError as error:
        style = error
    try:
        groups = [[lower(text, language) for text in group] for group in (training, others, held_out)]
        delta = reference(*groups)
    except CannotMeasureError as error:
        delta = error
    words = topics(_learned(run), training, others, twin.library.index.terms, wish.questions)
    absent = [each for each in ABSENT.get(language, ()) if each]
    return _Texts(
        twin, record, passages, _cut(held_out, wish.characters), _cut(held_out_others, wish.characters), others_are,
        questions_about(words, language), absent, style, delta,
    )  # fmt: skip


def _learned(run: Path) -> list[str]:
    """Return what the twin has learned to say; DataError where its examples are not there."""
    found, files = [], sorted((run / TWIN / "persona").glob("*.jsonl"))
    if not files:
        raise DataError(
            f"{run / TWIN / 'persona'} has no examples; run trimaran twin build again, which makes them anew"
        )
    for path in files:
        for line in read_text(path).splitlines():
            example = json.loads(line)
            found += [each["content"] for each in example.get("messages", ()) if each["role"] == "assistant"]
            found += [example["text"]] if "text" in example else []
    return found


def _piece(run: Path, texts: Sequence[str], answer_tokens: int) -> int:
    """Return the characters of a piece to judge style by: about what an answer has, but at most PIECE."""
    sample = texts[:: max(1, len(texts) // _SAMPLE)]
    tokens = sum(len(RunText.open(run).tokenizer.encode(each)) for each in sample)
    return max(_LEAST_PIECE, min(PIECE, int(_SHARE_OF_ANSWER * answer_tokens * sum(map(len, sample)) / tokens)))


def _cut(texts: Sequence[str], characters: int) -> list[str]:
    """Return whole texts, as many as have at most so many characters together, drawn alike; at least one if any."""
    drawn, found, size = random.Random(0).sample(list(texts), len(texts)), list[str](), 0
    for text in drawn:
        if found and size + len(text) > characters:
            break
        found.append(text)
        size += len(text)
    return found


async def _step(talker: Talker, texts: _Texts, step: int) -> Step:
    author = await talker.bits_per_character(texts.held_out)
    others = await talker.bits_per_character(texts.others) if texts.others else None
    return Step(step=step, author=author, others=others)


async def _answer(talker: Talker, texts: _Texts, wish: Wish, name: str) -> dict[str, Memory]:
    """Measure the answers of a model, with retrieval and without, and what it repeats."""
    twin = texts.twin
    sampling = SamplingParams(wish.answer_tokens, temperature=0.8, top_p=0.95, seed=wish.seed, context="stop")
    ways = (False, True) if talker.text.template is not None else (False,)
    for retrieval in ways:
        said = await talker.answer(twin, texts.questions, sampling, retrieval=retrieval)
        absent = [not twin.library.index.search(each) for each in texts.absent] if retrieval else []
        texts.ways[f"{name} + retrieval" if retrieval else name] = _way(said, absent, texts, f"{name}{retrieval}")
    encode = talker.text.tokenizer.encode
    found = {}
    training = [(each.id, encode(each.text)) for each in texts.passages if not each.is_held_out]
    held_out = [(each.id, encode(each.text)) for each in texts.passages if each.is_held_out]
    for which, passages in (("training", training), ("held out", held_out)):
        prefixes = prefixes_of(passages, wish.prefixes)
        continuations = await talker.go_on([each.tokens for each in prefixes], VERBATIM)
        found[which] = _memory(prefixes, continuations, [tokens for _, tokens in training], f"{name} {which}")
    return found


def _memory(
    prefixes: Sequence[Prefix], continuations: Sequence[Sequence[int]], training: Sequence[Sequence[int]], name: str
) -> Memory:
    if not prefixes:
        none = Figure(why_not=f"no passage has {PREFIX + VERBATIM} tokens")
        return Memory(verbatim=none, copied=none, longest=[])
    found = memorisation.copies(prefixes, continuations, training)
    copied = _mean(found.copied, name)
    longest = sorted(found.longest, reverse=True)[:_LONGEST]
    return Memory(verbatim=Figure.of(found.verbatim), copied=copied, longest=longest)


def _way(said: Sequence[Said], absent: Sequence[bool], texts: _Texts, name: str) -> Way:
    language = texts.record.language
    spoken = [each.text for each in said if not each.is_silent]
    checked = [each.checked for each in said if each.checked is not None]
    citations = [citation for each in checked for citation in each.citations]
    quotes = [quote for each in checked for quote in each.quotes]
    no_passages = Figure(why_not="no passages were given")
    to_author = to_others = Figure(why_not=str(texts.delta))
    if isinstance(texts.delta, Delta):
        try:
            both = texts.delta.distances([lower(text, language) for text in spoken], name)
            to_author, to_others = map(Figure.of, both)
        except CannotMeasureError as error:
            to_author = to_others = Figure(why_not=str(error))
    style = texts.style
    return Way(
        style=_tried(lambda: style.judge(spoken, name)) if isinstance(style, StyleClassifier)
        else Figure(why_not=str(style)),
        delta_author=to_author, delta_others=to_others,
        cited=Figure.of(share(sum(bool(each.citations) for each in checked), len(checked))) if checked else no_passages,
        supported=Figure.of(share(sum(each.is_supported for each in citations), len(citations))) if citations
        else Figure(why_not="nothing was cited") if checked else no_passages,
        invalid=sum(each.invented for each in said),
        quotes=len(quotes), verbatim=sum(each.is_verbatim for each in quotes),
        refused=Figure.of(share(sum(absent), len(absent))) if absent
        else Figure(why_not="without retrieval no question is refused" if not checked
                    else "no questions about absent topics are known in this language"),
        answers=[(each.question, each.text) for each in said],
    )  # fmt: skip


def _tried(measured: Callable[[], Estimate]) -> Figure:
    try:
        return Figure.of(measured())
    except CannotMeasureError as error:
        return Figure(why_not=str(error))


def _mean(values: Sequence[int], name: str) -> Figure:
    if len(values) < 2:
        return Figure(value=float(values[0]), count=1)
    return Figure.of(mean([float(each) for each in values], name))


async def _dialogues(talker: Talker, texts: _Texts, wish: Wish) -> list[list[tuple[str, str]]]:
    """Return dialogues of two turns with the twin as it is talked with: with its library."""
    twin, sampling = texts.twin, SamplingParams(wish.answer_tokens, 0.8, top_p=0.95, seed=wish.seed + 1, context="stop")
    questions = texts.questions[:_DIALOGUES]
    first = await talker.answer(twin, questions, sampling, retrieval=True)
    more = follow_up(texts.record.language)
    before = [[(each.question, each.text)] for each in first]
    second = await talker.answer(twin, [more] * len(first), sampling, retrieval=True, before=before)
    return [[(one.question, one.text), (more, two.text)] for one, two in zip(first, second, strict=True)]


def _retrieval(texts: _Texts) -> tuple[Figure, float]:
    """Return recall@5 of masked sentences, and the median milliseconds of a search."""
    index = texts.twin.library.index
    queries = make_queries(texts.passages, index.terms, _QUERIES)
    if not queries:
        return Figure(why_not="no sentence has enough words for a query"), 0.0
    hits, taken = 0, list[float]()
    for each in queries:
        start = time.perf_counter()
        found = index.search(each.query, _FIRST)
        taken.append(1000 * (time.perf_counter() - start))
        hits += any(hit.passage.id == each.passage for hit in found)
    return Figure.of(share(hits, len(queries))), statistics.median(taken)
