"""The requests of an evaluation and their results, as token ids: what stands between tasks and the model. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from trimaran.runtime.infer.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Likelihood:
    """One question: the log-likelihood of a continuation after a context.

    Args:
        context: at least one token; where the text before is empty, the begin-of-text or end-of-text token.
        continuation: at least one token; together at most max_seq_len + 1.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LikelihoodScore:
    """The answer to a `Likelihood`.

    Args:
        log_likelihood: sum over the continuation, in nats.
        is_greedy: whether every token of the continuation is the likeliest.
        token_log_likelihoods: of each token of the continuation; None where they were not asked for.
    """

    log_likelihood: float
    is_greedy: bool
    token_log_likelihoods: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Continuation:
    """One text to continue.

    Args:
        context: at least one and at most max_seq_len tokens.
        stop_strings: the text ends before the first of them.
    """

    context: tuple[int, ...]
    stop_strings: tuple[str, ...]
    sampling: SamplingParams


class AskedToStop(Exception):
    """A rank was asked to stop, and the requests are not all answered."""


def ignore(index: int, result: object) -> None:
    """The default `done`."""


class ScorerProtocol(Protocol):
    """A model that answers requests. The results stand in the order of the requests.

    `done` is called with the index of a request and its result as soon as there is one, in any order.
    """

    def likelihoods(
        self, requests: Sequence[Likelihood], done: Callable[[int, LikelihoodScore], None] = ignore
    ) -> list[LikelihoodScore]:
        """Return the log-likelihoods. Raises NotFiniteError where the logits are not finite, naming the request."""
        ...

    def continuations(self, requests: Sequence[Continuation], done: Callable[[int, str], None] = ignore) -> list[str]:
        """Return the texts of the continuations, without the stop string. Raises NotFiniteError as above."""
        ...
