"""Samples that go through the stages together during generation: the text of each, and what the model reads next.

A pass feeds the same number of tokens to every sample: as many as the sample with the most tokens outside the key-value
cache needs. A sample with fewer feeds cached tokens again; one that has no more is padded on the left. So the prompts
are one pass, each new token is one, and each slide of a full context to its newer half is one. With sequence
parallelism the number is rounded up to a multiple of tp. What all prompts have in common at their beginning is a pass
before, of one sample, whose keys and values are copied for all. Where each prompt is continued several times, that pass
has one sample for each prompt, with all of its tokens but the last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from trimaran.models.cache.key_value import KeyValueCache
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.parameter import LayerContext
from trimaran.runtime.infer.sampling import NOT_FINITE, choose, log_probs, uniforms, wide
from trimaran.runtime.infer.sampling_params import SamplingParams

Finish = Literal["length", "stop_token", "stop_string", "context"]
Watch = Callable[[int, int], bool]
"""Called with (sample, new token), except for stop tokens; returns whether the sample ends with it.

Must agree on all ranks.
"""

_PADDING = 0
_LEAST_SAVED = 64  # tokens, for which another pass through the network pays
_DRAWS = 64  # new tokens for which random numbers are drawn at once


class NotFiniteError(ValueError):
    """The weights, or the logits computed from them, hold infinite values or NaN.

    Args:
        request: which of several requests has the logits, counted from 0.
    """

    def __init__(self, message: str = "", request: int | None = None) -> None:
        super().__init__(message)
        self.request = request


@dataclass
class Completion:
    """One continuation.

    Args:
        tokens: the new tokens, including the stop token that ended it.
        finish: why it ended: max_new_tokens, a stop token, `watch` (a stop string), or a full context. "length" until
            then.
        slides: how often the model's context was full and its older half was dropped.
        log_probs: of each token, where asked for: under softmax(logits / temperature), whatever a filter took away.
    """

    tokens: list[int] = field(default_factory=list)
    finish: Finish = "length"
    slides: int = 0
    log_probs: list[float] = field(default_factory=list)


class SampleGroup:
    """The samples of one group on one rank.

    Args:
        prompts: token ids of each, at least one and at most config.max_seq_len.
        numbers: of each among all samples of the command, for the random numbers.
        copies: how often each prompt stands in `prompts`, one after the other.
        tells_log_probs: whether completions get `log_probs`.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        sampling: SamplingParams,
        config: TransformerConfig,
        layer_context: LayerContext,
        watch: Watch,
        *,
        copies: int = 1,
        tells_log_probs: bool = False,
    ) -> None:
        self.numbers, self.sampling, self.config, self.layer_context, self.watch = (
            numbers,
            sampling,
            config,
            layer_context,
            watch,
        )
        self.completions = [Completion() for _ in prompts]
        self.num_new = self.num_passes = 0
        self._prompts = prompts
        self._contexts = [list(prompt) for prompt in prompts]  # what the model may attend to
        self._num_cached = [0] * len(prompts)
        self._alive = [True] * len(prompts)
        self._parts = layer_context.tp.size if layer_context.sequence_parallel else 1
        longest = min(config.max_seq_len, max(map(len, prompts)) + sampling.max_new_tokens)
        self._whole_cache = KeyValueCache(len(prompts), self._round_up(longest), config, layer_context)
        self.cache = self._whole_cache
        self._copies, self._tells_log_probs = copies, tells_log_probs
        self._beginnings = self._shared_beginnings()
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self._uniforms: Tensor | None = None

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def is_done(self) -> bool:
        """Whether every sample has ended."""
        return not any(self._alive)

    def next_tokens(self) -> Tensor:
        """Return the model's next input, [samples, new] int64 on the rank's device, and prepare the cache for it.

        Where prompts begin alike, the first input is what they have in common, as that of one sample for all, or for
        the copies of each prompt; no token is drawn after it.
        """
        if self._beginnings and self.cache is self._whole_cache:
            return self._begin()
        if self._beginnings:
            self._whole_cache.begin_with(self.cache)
            share = len(self) // len(self._beginnings)
            self._num_cached = [len(each) for each in self._beginnings for _ in range(share)]
            self.cache, self._beginnings = self._whole_cache, []
        contexts, cached = self._contexts, self._num_cached
        lengths = list(map(len, contexts))
        new = self._round_up(max(1, *(length - has for length, has in zip(lengths, cached, strict=True))))
        if new == 1:
            rows = [context[-1:] for context in contexts]
        else:
            rows = [
                [_PADDING] * (new - length) + context[-new:] for context, length in zip(contexts, lengths, strict=True)
            ]
        self.cache.set_lengths(lengths)
        self._num_cached = lengths
        self.num_passes += 1
        return torch.tensor(rows, device=self.layer_context.device)

    def choose(self, logits: Tensor) -> Tensor:
        """Return the next token of each sample, int64 `drawn_shape`, on the rank that draws.

        Args:
            logits: [samples, vocab], without padding.
        """
        sampling, uniform = self.sampling, None
        if sampling.repetition_penalty != 1.0 and self._seen is None:
            self._seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            for row, prompt in enumerate(self._prompts):
                self._seen[row, torch.tensor(prompt, device=logits.device)] = True
        if sampling.counts_tokens and self._counts is None:
            self._counts = torch.zeros(logits.shape, dtype=wide(logits).dtype, device=logits.device)
        if not sampling.is_greedy:
            column = self.num_new % _DRAWS
            if column == 0 or self._uniforms is None:
                samples = torch.tensor(list(self.numbers))
                first = self.num_new - column
                self._uniforms = uniforms(sampling.seed, samples, first, first + _DRAWS).to(logits.device)
            uniform = self._uniforms[:, column]
        tokens = choose(logits, sampling, self.num_new, self._seen, uniform, self._counts)
        if self._seen is not None:
            self._seen.scatter_(1, tokens.clamp(min=0)[:, None], True)
        if self._counts is not None:
            self._counts.scatter_add_(1, tokens.clamp(min=0)[:, None], self._counts.new_ones(len(tokens), 1))
        if not self._tells_log_probs:
            return tokens
        # As whole numbers of the same bits, which travel with the tokens.
        found = log_probs(logits, tokens, sampling.temperature).double().view(torch.int64)
        return torch.stack((tokens, found))

    @property
    def drawn_shape(self) -> tuple[int, ...]:
        """Shape of what `choose` returns: a token of each sample, or in a second row its log-probability too."""
        return (2, len(self)) if self._tells_log_probs else (len(self),)

    def take(self, drawn: Tensor) -> None:
        """Add the next token of each sample that has not ended; NotFiniteError where the logits were not finite.

        Args:
            drawn: from `choose`.
        """
        self.num_new += 1
        tokens = drawn.flatten()[: len(self)].tolist()
        found = drawn[1].cpu().view(torch.float64).tolist() if self._tells_log_probs else []
        for row, token in enumerate(tokens):
            if self._alive[row]:
                if token == NOT_FINITE:
                    raise NotFiniteError(
                        f"the model's logits for new token {self.num_new} of sample {self.numbers[row]} are not "
                        "finite; the weights hold infinite values or NaN, or precision.dtype is too narrow for them"
                    )
                if found:
                    self.completions[row].log_probs.append(found[row])
                self._add(row, token)

    def _add(self, row: int, token: int) -> None:
        completion, context, sampling = self.completions[row], self._contexts[row], self.sampling
        completion.tokens.append(token)
        if token in sampling.stop_tokens:
            completion.finish = "stop_token"
        elif self.watch(self.numbers[row], token):
            completion.finish = "stop_string"
        elif self.num_new < sampling.max_new_tokens:
            if len(context) < self.config.max_seq_len:
                context.append(token)
                return
            if sampling.context == "slide":
                # The positions of the kept tokens change, so their cached keys and values are invalid.
                kept = self.config.max_seq_len // 2
                self._contexts[row], self._num_cached[row] = [*context[len(context) - kept :], token], 0
                completion.slides += 1
                return
            completion.finish = "context"
        self._alive[row] = False

    def _begin(self) -> Tensor:
        """Return what the samples have in common as the input of a pass of its own, and make its cache."""
        lengths = [len(each) for each in self._beginnings]
        new = self._round_up(max(lengths))
        self.cache = KeyValueCache(len(lengths), new, self.config, self.layer_context)
        self.cache.set_lengths(lengths)
        rows = [[_PADDING] * (new - len(each)) + list(each) for each in self._beginnings]
        return torch.tensor(rows, device=self.layer_context.device)

    def _shared_beginnings(self) -> list[Sequence[int]]:
        """Return what all prompts begin with, or what the copies of each do; [] where a pass of its own costs more.

        At least one token of each prompt is not among them.
        """
        distinct = self._prompts[:: self._copies]
        saved = sum(len(prompt) - 1 for prompt in distinct) * (self._copies - 1)
        if self._copies > 1 and saved >= _LEAST_SAVED and min(map(len, distinct)) > 1:
            return [prompt[:-1] for prompt in distinct]
        lowest, highest = (end(map(tuple, self._prompts)) for end in (min, max))
        most = min(map(len, self._prompts)) - 1
        common = next((index for index in range(most) if lowest[index] != highest[index]), most)
        common = common // self._parts * self._parts
        return [self._prompts[0][:common]] if common * (len(self) - 1) >= max(_LEAST_SAVED, 1) else []

    def _round_up(self, count: int) -> int:
        return -(-count // self._parts) * self._parts
