"""Counts and times of the server in Prometheus' text format (version 0.0.4)."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """How many values are at most each of the bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterable[str]:
        """Return the lines of the text format."""
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum!r}"
        yield f"{name}_count {total}"


@dataclass
class Metrics:
    """What has happened since the start.

    Args:
        requests: by (endpoint, outcome): completed, refused (a request that is wrong or not allowed), full, draining,
            disconnected, timed_out or failed.
        prompt_tokens, cached_tokens, new_tokens: read, of them not computed again, and written.
        active: texts that are being written.
        first_token_s: seconds from the end of a request to the first token of each text.
        token_s: seconds from one token to the next, on average over a text.
        request_s: seconds of answered requests.
    """

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    active: int = 0
    first_token_s: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    token_s: Histogram = field(default_factory=lambda: Histogram(_SECONDS_PER_TOKEN))
    request_s: Histogram = field(default_factory=lambda: Histogram(_SECONDS))

    def text(self, taken: int, slots: int) -> str:
        """Return the page of metrics.

        Args:
            taken: texts that are written or wait.
            slots: texts that can be written at the same time.
        """
        lines = _head("trimaran_requests_total", "counter", "Requests by endpoint and outcome.")
        for (endpoint, outcome), count in sorted(self.requests.items()):
            lines.append(f'trimaran_requests_total{{endpoint="{endpoint}",outcome="{outcome}"}} {count}')
        for name, kind, words, value in (
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("cached_prompt_tokens_total", "counter", "Tokens of prompts not computed again.", self.cached_tokens),
            ("generated_tokens_total", "counter", "Tokens written.", self.new_tokens),
            ("texts_active", "gauge", "Texts that are being written.", self.active),
            ("texts_waiting", "gauge", "Texts that wait for a slot or for their prompt.", taken - self.active),
            ("slots", "gauge", "Texts that can be written at the same time.", slots),
        ):
            lines += [*_head(f"trimaran_{name}", kind, words), f"trimaran_{name} {value}"]
        for name, words, histogram in (
            ("time_to_first_token_seconds", "From the end of a request to a text's first token.", self.first_token_s),
            ("seconds_per_token", "From one token to the next, on average over a text.", self.token_s),
            ("request_seconds", "Answered requests.", self.request_s),
        ):
            lines += [*_head(f"trimaran_{name}", "histogram", words), *histogram.lines(f"trimaran_{name}")]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, words: str) -> list[str]:
    return [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
