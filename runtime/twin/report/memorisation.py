"""What a model repeats word for word of the texts that it learned from.

A text is extractable with a context of k tokens where the model, given the k tokens before it, goes on greedily with
exactly its tokens (Carlini et al. 2023, definition 3.1). Prefixes of held-out texts, and the base model, tell how much
of that is chance or was known before.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from trimaran.runtime.twin.report.intervals import Estimate, share

PREFIX: Final = 50
"""Tokens that the model is given."""
VERBATIM: Final = 50
"""Tokens that make a copy."""
_SEED: Final = 8  # tokens of the shortest run that is looked for


@dataclass(frozen=True, slots=True)
class Prefix:
    """A place of a text.

    Args:
        tokens: that the model is given.
        truth: what follows in the text.
        passage: where it stands.
    """

    tokens: tuple[int, ...]
    truth: tuple[int, ...]
    passage: int


@dataclass(frozen=True)
class Copies:
    """What a model repeated.

    Attributes:
        verbatim: share of prefixes after which at least VERBATIM tokens are those of the text.
        copied: of each prefix, how many tokens after it are those of the text.
        longest: of each prefix, the longest run of its continuation that stands anywhere in the training texts; 0 for
            one below 8 tokens.
    """

    verbatim: Estimate
    copied: list[int]
    longest: list[int]


def prefixes_of(passages: Sequence[tuple[int, Sequence[int]]], most: int) -> list[Prefix]:
    """Return prefixes with what follows them, at most one a passage, spread evenly over all passages.

    Args:
        passages: number and tokens of each; those that are too short are passed over.
    """
    fitting = [(number, tokens) for number, tokens in passages if len(tokens) >= PREFIX + VERBATIM]
    step = max(1.0, len(fitting) / most)
    chosen = [fitting[int(number * step)] for number in range(min(most, len(fitting)))]
    return [
        Prefix(tuple(tokens[:PREFIX]), tuple(tokens[PREFIX : PREFIX + VERBATIM]), number) for number, tokens in chosen
    ]


def copies(
    prefixes: Sequence[Prefix], continuations: Sequence[Sequence[int]], training: Sequence[Sequence[int]]
) -> Copies:
    """Return what greedy continuations repeat.

    Args:
        continuations: tokens after each prefix, at least VERBATIM unless the model has ended its text.
        training: tokens of each text that the model learned from.

    Raises:
        ValueError: there is no prefix.
    """
    copied = [_equal(each.truth, found) for each, found in zip(prefixes, continuations, strict=True)]
    runs = Runs(training)
    longest = [runs.longest(found) for found in continuations]
    return Copies(share(sum(count >= VERBATIM for count in copied), len(copied)), copied, longest)


def _equal(truth: Sequence[int], found: Sequence[int]) -> int:
    return next((place for place, pair in enumerate(zip(truth, found, strict=False)) if pair[0] != pair[1]),
                min(len(truth), len(found)))  # fmt: skip


class Runs:
    """The places of all runs of 8 tokens in texts.

    Args:
        texts: tokens of each; a run never goes from one to the next.
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._texts = texts
        self._places: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, text in enumerate(texts):
            for start, run in _runs(text):
                self._places[run].append((number, start))

    def longest(self, tokens: Sequence[int]) -> int:
        """Return the length of the longest run of the tokens that stands in a text; 0 for one below 8."""
        best = 0
        for start, run in _runs(tokens):
            for number, place in self._places.get(run, ()):
                own = tokens[start:]
                best = max(best, _equal(self._texts[number][place : place + len(own)], own))
        return best


def _runs(tokens: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    for start in range(len(tokens) - _SEED + 1):
        yield start, tuple(tokens[start : start + _SEED])
