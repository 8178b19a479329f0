"""How the ranks of an evaluation hand work to each other through the store of their start. No pickle.

Rank 0 writes the jobs of a call, and the leaders of the dp replicas take the next one that nobody has, so none waits
for another. A replica writes the answers to a job once it has them all.
"""

import time
from array import array
from collections.abc import Sequence

from torch._C._distributed_c10d import PrefixStore, Store

from trimaran.runtime.evaluate.engine.requests import Likelihood, LikelihoodScore

_POLL_S, _LONGEST_POLL_S = 0.001, 0.1


class Board:
    """What rank 0 announces and what the others answer, by names that no other evaluation of this start has.

    Args:
        store: of this start; the time-out of a single access is its own.
        name: the same on every rank.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = PrefixStore(f"evaluate/{name}", store)

    def put(self, name: str, data: bytes) -> None:
        """Write data under a name, once."""
        self._store.set(name, data)  # type: ignore[arg-type]  # its stub knows text alone

    def get(self, name: str) -> bytes:
        """Return what is written under a name; waits up to the store's time-out."""
        return bytes(self._store.get(name))

    def find(self, name: str) -> bytes | None:
        """Return what is written under a name; None where nothing is yet."""
        return self.get(name) if self._store.check([name]) else None

    def wait(self, name: str) -> bytes:
        """Return what another rank writes under a name, however long that takes.

        The wait ends with an error if the process that serves the store is gone; a failure of another rank reaches this
        one by the failure relay.
        """
        pause_s = _POLL_S
        while (data := self.find(name)) is None:
            time.sleep(pause_s)
            pause_s = min(_LONGEST_POLL_S, 1.2 * pause_s)
        return data

    def count(self, name: str, amount: int = 1) -> int:
        """Add to a counter that starts at 0; return what it was before."""
        return int(self._store.add(name, amount)) - amount

    def remove(self, names: Sequence[str]) -> None:
        """Delete what is written under these names."""
        for name in names:
            self._store.delete_key(name)


def encode_likelihoods(requests: Sequence[Likelihood]) -> bytes:
    """Return requests as bytes; each says how many tokens it has in common with the one before it."""
    data = array("i")
    before: tuple[int, ...] = ()
    for request in requests:
        tokens = (*request.context, *request.continuation)
        common = next(
            (i for i, (a, b) in enumerate(zip(before, tokens, strict=False)) if a != b), min(len(before), len(tokens))
        )
        data.extend((common, len(tokens) - common, len(request.continuation)))
        data.extend(tokens[common:])
        before = tokens
    return data.tobytes()


def decode_likelihoods(data: bytes) -> list[Likelihood]:
    """Return the requests of `encode_likelihoods`."""
    numbers = array("i", data)
    requests: list[Likelihood] = []
    tokens: tuple[int, ...] = ()
    at = 0
    while at < len(numbers):
        common, new, length = numbers[at : at + 3]
        tokens = (*tokens[:common], *numbers[at + 3 : at + 3 + new])
        requests.append(Likelihood(tokens[:-length], tokens[-length:]))
        at += 3 + new
    return requests


def encode_scores(scores: Sequence[LikelihoodScore]) -> bytes:
    """Return scores as bytes; those of a request have as many numbers as its continuation has tokens, and one more."""
    data = array("d")
    for score in scores:
        assert score.token_log_likelihoods is not None, "the engine computes every token's"
        data.append(float(score.is_greedy))
        data.extend(score.token_log_likelihoods)
    return data.tobytes()


def decode_scores(data: bytes, requests: Sequence[Likelihood]) -> list[LikelihoodScore]:
    """Return the scores of `encode_scores`."""
    numbers, scores, at = array("d", data), [], 0
    for request in requests:
        stop = at + 1 + len(request.continuation)
        scores.append(score_of(numbers[at + 1 : stop].tolist(), numbers[at] == 1.0))
        at = stop
    return scores


def score_of(log_likelihoods: Sequence[float], is_greedy: bool) -> LikelihoodScore:
    """Return the score of a continuation from its tokens' log-likelihoods."""
    return LikelihoodScore(sum(log_likelihoods), is_greedy, tuple(log_likelihoods))
