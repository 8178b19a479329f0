"""A pass of a group's rows through this rank's stage, and what comes of it as numbers that travel between ranks."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from trimaran.models.cache.rows import RowCache
from trimaran.models.parallel.group import all_gather, all_reduce
from trimaran.models.transformer import Stage
from trimaran.runtime.infer.batching.draws import Drawer
from trimaran.runtime.infer.batching.rows import Found, Pass
from trimaran.runtime.infer.sampling import wide

_LOGITS_BYTES: Final = 8 << 20  # of prompt tokens that are scored at once


class Passes:
    """The passes of one group of rows, on one rank.

    Args:
        vocab_size: of the model, without padding.
    """

    def __init__(self, stage: Stage, cache: RowCache, vocab_size: int) -> None:
        self._stage, self._cache, self._vocab_size = stage, cache, vocab_size
        self._drawer = Drawer()

    def extend(self, step: Pass, hidden: Tensor | None) -> Tensor:
        """Return the stage's output [rows, new, hidden]. Collective over tp.

        Args:
            hidden: the previous stage's; None on the first.
        """
        tokens = torch.tensor(step.tokens, device=self._stage.context.device)
        return self._stage.extend(hidden, tokens, self._cache.view(step.rows[0].place, step.lengths))

    def find(self, step: Pass, hidden: Tensor) -> Tensor:
        """Return what the pass has found, int64 `step.shape`, the same on every tp rank. Collective over tp.

        Args:
            hidden: `extend` of the last stage.
        """
        parts = [self._scores(step, hidden)] if step.scored else []
        if step.draws:
            parts.append(self._draw(step, hidden))
        context = self._stage.context
        found = torch.cat(parts) if parts else torch.empty(step.shape, dtype=torch.int64, device=context.device)
        # A GPU's sums may differ in the last bit between ranks: all use one rank's draw.
        if context.tp.size > 1 and found.numel():
            all_reduce(found.mul_(context.tp.rank == 0), context.tp)
        return found

    def _draw(self, step: Pass, hidden: Tensor) -> Tensor:
        logits = self._logits(hidden[:, -1:])
        return _encoded(self._drawer.draw(step.rows, logits), logits, step.most_told)

    def _scores(self, step: Pass, hidden: Tensor) -> Tensor:
        """Return the prompt's tokens behind the pass's first ones, with their log-probabilities."""
        (row,) = step.rows
        first = row.cached - step.new
        tokens = torch.tensor(row.tokens[first + 1 : first + 1 + step.scored], device=hidden.device)
        size = max(1, _LOGITS_BYTES // (self._vocab_size * hidden.element_size()))
        return torch.cat(
            [
                _encoded(tokens[start : start + size], self._logits(hidden[:, start:stop]), step.most_told or 0)
                for start in range(0, step.scored, size)
                for stop in [min(start + size, step.scored)]
            ]
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of all positions, [positions, vocab], without padding."""
        local = self._stage.logits(hidden).flatten(0, 1)
        return all_gather(local, self._stage.context.tp).transpose(0, 1).flatten(1)[:, : self._vocab_size]


def _encoded(tokens: Tensor, logits: Tensor, told: int | None) -> Tensor:
    """Return [tokens, 1 or 2 + 2 * told] int64: a token, its log-probability, and the likeliest with theirs.

    Log-probabilities are the bits of float64 numbers.
    """
    if told is None:
        return tokens[:, None]
    logs = wide(logits).log_softmax(-1)
    columns = [tokens[:, None], _bits(logs.gather(1, tokens.clamp(min=0)[:, None]))]
    if told:
        best = logs.topk(min(told, logits.shape[1]))
        columns += [best.indices, _bits(best.values)]
    return torch.cat(columns, dim=1)


def _bits(x: Tensor) -> Tensor:
    return x.double().contiguous().view(torch.int64)


def decoded(found: Tensor) -> Sequence[Found]:
    """Return what `Passes.find` has returned as records."""
    told = (found.shape[1] - 2) // 2
    tokens = found[:, 0].tolist()
    if found.shape[1] == 1:
        return [Found(token) for token in tokens]
    logprobs = found[:, 1].cpu().contiguous().view(torch.float64).tolist()
    ids = found[:, 2 : 2 + told].tolist()
    logs = found[:, 2 + told :].cpu().contiguous().view(torch.float64).tolist()
    return [
        Found(token, logprob, tuple(zip(best, values, strict=True)))
        for token, logprob, best, values in zip(tokens, logprobs, ids, logs, strict=True)
    ]
