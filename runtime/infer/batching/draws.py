"""The draw of a pass: a token of each row, by the sampling of its own request, vectorised over the rows.

A row's token is the one that `generate` would draw for it alone: the formulas are those of runtime/infer/sampling.py,
with a number of each row where those have one for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimaran.runtime.infer.batching.messages import Request
from trimaran.runtime.infer.batching.rows import Row
from trimaran.runtime.infer.sampling import (
    NOT_FINITE,
    draw,
    forbid,
    keep_top_p,
    penalize_counts,
    penalize_repetition,
    uniforms,
    wide,
)
from trimaran.runtime.infer.sampling_params import SamplingParams

_DRAWS = 64  # random numbers that are made at once


@dataclass
class _Text:
    """What the draws of a request's text depend on, besides the logits.

    Attributes:
        seen: [1, vocab] bool, the tokens of the text so far; counts: [1, vocab], how often each is among the new ones.
            None where no penalty of the request needs them.
        numbers: the next random numbers, the nearest one last.
    """

    request: Request
    seen: Tensor | None = None
    counts: Tensor | None = None
    numbers: list[float] = field(default_factory=list)


class Drawer:
    """Draws the tokens of a group's rows, on a rank of the last stage."""

    def __init__(self) -> None:
        self._texts: dict[int, _Text] = {}

    def draw(self, rows: Sequence[Row], logits: Tensor) -> Tensor:
        """Return the next token of each row, [rows] int64; NOT_FINITE where the largest logit is not finite.

        Args:
            logits: [rows, vocab], without padding.
        """
        texts = [self._text(row, logits) for row in rows]
        samplings = [each.request.sampling for each in texts]
        logits = self._penalized(rows, texts, logits)
        chosen = logits.argmax(-1)
        drawn = [number for number, each in enumerate(samplings) if not each.is_greedy]
        if drawn:
            uniform = [self._number(rows[each], texts[each]) for each in drawn]
            some = wide(logits[drawn] if len(drawn) < len(rows) else logits)
            kept = filtered_each(some, [samplings[each] for each in drawn])
            numbers = torch.tensor(uniform, dtype=torch.float64, device=logits.device)
            chosen[drawn] = draw(kept, numbers)
        chosen = chosen.where(logits.amax(-1).isfinite(), NOT_FINITE)
        for text, token in zip(texts, chosen.tolist(), strict=True):
            if token != NOT_FINITE:
                if text.seen is not None:
                    text.seen[0, token] = True
                if text.counts is not None:
                    text.counts[0, token] += 1
        return chosen

    def _text(self, row: Row, logits: Tensor) -> _Text:
        request = row.request
        assert request is not None, "a row that draws has a request"
        text = self._texts.get(row.number)
        if text is None or text.request is not request:
            text, sampling = _Text(request), request.sampling
            if sampling.repetition_penalty != 1.0:
                text.seen = torch.zeros((1, logits.shape[1]), dtype=torch.bool, device=logits.device)
                text.seen[0, torch.tensor(request.prompt, device=logits.device)] = True
            if sampling.counts_tokens:
                text.counts = torch.zeros((1, logits.shape[1]), dtype=wide(logits[:0]).dtype, device=logits.device)
            self._texts[row.number] = text
        return text

    def _penalized(self, rows: Sequence[Row], texts: Sequence[_Text], logits: Tensor) -> Tensor:
        """Return the logits after the penalties and without stop tokens that come too early."""
        is_whole = True  # the logits are the caller's, which tells log-probabilities from them
        for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
            sampling, part = text.request.sampling, logits[number : number + 1]
            changed = part
            if text.seen is not None:
                changed = penalize_repetition(wide(changed), text.seen, sampling.repetition_penalty)
            if text.counts is not None:
                changed = penalize_counts(
                    wide(changed), text.counts, sampling.presence_penalty, sampling.frequency_penalty
                )
            if row.num_new < sampling.min_new_tokens and sampling.stop_tokens:
                changed = forbid(changed, sampling.stop_tokens)
            if changed is not part:
                logits, is_whole = (wide(logits).clone() if is_whole else logits), False
                logits[number] = changed[0]
        return logits

    def _number(self, row: Row, text: _Text) -> float:
        if not text.numbers:
            sample = torch.tensor([text.request.sample])
            first = row.num_new
            found = uniforms(text.request.sampling.seed, sample, first, first + _DRAWS)
            text.numbers = found[0].tolist()[::-1]
        return text.numbers.pop()


def filtered_each(logits: Tensor, samplings: Sequence[SamplingParams]) -> Tensor:
    """Return the logits [rows, vocab] after each row's temperature, which is not 0, and its filters."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]

    vocab = logits.shape[1]
    logits = (logits - logits.amax(-1, keepdim=True)) / column([each.temperature for each in samplings])
    most = [each.top_k if 0 < each.top_k < vocab else 0 for each in samplings]
    if any(most):
        largest = logits.topk(max(most)).values
        places = torch.tensor([max(0, k - 1) for k in most], device=logits.device)[:, None]
        smallest = largest.gather(1, places).where(column(most) > 0, -torch.inf)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    some = [number for number, each in enumerate(samplings) if each.top_p < 1]
    for p in {samplings[number].top_p for number in some}:
        same = [number for number in some if samplings[number].top_p == p]
        logits[same] = keep_top_p(logits[same], p)
    if any(each.min_p for each in samplings):
        probabilities = logits.softmax(-1)
        least = column([each.min_p for each in samplings]) * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits
