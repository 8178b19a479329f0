"""Generation at any layout: prompts of any lengths in one batch, with a key-value cache. Every rank gets every token.

A forward pass goes through the stages in order. With several pipeline ranks the batch is divided into as many groups of
samples, so that the ranks work on different groups at the same time. The last rank draws the tokens, which travel
around the ring of ranks ahead of the next pass's hidden states.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.group import all_gather, all_reduce
from trimaran.models.transformer import Stage, in_eval_mode
from trimaran.runtime.infer.ring import Ring
from trimaran.runtime.infer.sample_group import Completion, NotFiniteError, SampleGroup, Watch
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.pipeline.schedule import Placement, round_robin
from trimaran.runtime.spec import RunSpec


def check_weights(stages: dict[int, Stage], mesh: Mesh, origin: str) -> None:
    """Raise NotFiniteError, on all ranks, where any rank's weights are not finite: their text would mean nothing.

    Collective over the world.

    Args:
        origin: what the weights were read from.
    """
    parameters = (pair for stage in stages.values() for pair in stage.named_parameters())
    wrong = next((name for name, parameter in parameters if not bool(parameter.isfinite().all())), "")
    found = [name for name in mesh.gather_text(wrong) if name]
    if found:
        raise NotFiniteError(
            f"{origin} holds infinite values or NaN in {found[0]}, so its text would mean nothing; take an earlier "
            "checkpoint of the run, from before it diverged"
        )


def never(sample: int, token: int) -> bool:
    """The default `watch`, which ends no sample."""
    return False


def check_prompts(prompts: Sequence[Sequence[int]], config: TransformerConfig) -> None:
    """Raise ValueError for a prompt that is empty, too long or outside the vocabulary, and for a model without text."""
    if not config.has_head:
        raise ValueError(
            "a reward model (model.score_head only) scores answers and writes none; use `trimaran score`, or generate "
            "with the model that it judges"
        )
    if not config.is_causal:
        raise ValueError(
            f"a model of objective {config.objective} predicts hidden tokens from both sides and continues no text; "
            "generate with a causal_lm model"
        )
    for number, prompt in enumerate(prompts, 1):
        which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise ValueError(f"{which} has no tokens; give at least one character of text")
        if len(prompt) > config.max_seq_len:
            raise ValueError(
                f"{which} has {len(prompt)} tokens, more than the {config.max_seq_len} of the model's context "
                "(model.max_seq_len); shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise ValueError(
                f"{which} has the token {wrong}, and the model's vocabulary has "
                f"{config.vocab_size}; its tokenizer is not this one"
            )


def longest_shared(config: TransformerConfig) -> int | None:
    """Return up to how many tokens the model computes a token alike whatever follows it; None for any number."""
    scaling = config.rotary_scaling
    if scaling is None or scaling.kind != "dynamic_ntk":
        return None
    return scaling.original_max_position or config.max_seq_len


# Inference mode has no version counters and no view tracking: a pass of a small model takes a sixth less time.
@torch.inference_mode()
def generate(
    stages: dict[int, Stage],
    mesh: Mesh,
    spec: RunSpec,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    watch: Watch = never,
    *,
    first_sample: int = 0,
    numbers: Sequence[int] | None = None,
    placement: Placement | None = None,
    copies: int = 1,
    tells_log_probs: bool = False,
) -> list[Completion]:
    """Return the continuation of each prompt, the same on every rank.

    Collective over the pipeline and the tp group; dp replicas draw the same tokens.

    Args:
        prompts: token ids, at least one and at most spec.transformer.max_seq_len each.
        watch: called with (sample, token) for each new token that is no stop token, on every rank; returns whether the
            sample ends with it.
        first_sample: number of the first prompt among all that are continued with this seed.
        numbers: of every prompt, where they do not follow the first one's.
        placement: stage -> pipeline rank; by default the stages go round the ranks.
        copies: how often each prompt stands in `prompts`, one after the other: its keys and values are computed once.
        tells_log_probs: whether completions get the log-probability of each token.

    Raises:
        ValueError: a prompt is empty or too long.
        NotFiniteError: the logits are not finite.
        RuntimeError: a peer is gone or did not answer within the time-out.
    """
    check_prompts(prompts, spec.transformer)
    if sampling.max_new_tokens == 0 or not prompts:
        return [Completion() for _ in prompts]
    layer_context = next(iter(stages.values())).context
    # Dynamic scaling depends on the longest sample of a pass: with one sample a pass, samples do not affect each other.
    is_dynamic = longest_shared(spec.transformer) is not None
    copies = 1 if is_dynamic else copies
    size = 1 if is_dynamic else -(-len(prompts) // copies // mesh.pp.size) * copies
    numbers = range(first_sample, first_sample + len(prompts)) if numbers is None else numbers
    groups = [
        SampleGroup(
            prompts[part],
            numbers[part],
            sampling,
            spec.transformer,
            layer_context,
            watch,
            copies=copies,
            tells_log_probs=tells_log_probs,
        )
        for part in (slice(first, first + size) for first in range(0, len(prompts), size))
    ]
    with in_eval_mode(stages.values()):
        _Passes(
            stages, mesh, spec, groups, placement or round_robin(mesh.pp.size, spec.num_stages // mesh.pp.size)
        ).run()
    return [completion for group in groups for completion in group.completions]


class _Passes:
    """The forward passes of all groups through this rank's stages."""

    def __init__(
        self,
        stages: dict[int, Stage],
        mesh: Mesh,
        spec: RunSpec,
        groups: Sequence[SampleGroup],
        placement: Placement,
    ) -> None:
        self._stages, self._mesh, self._groups, self._placement = stages, mesh, groups, placement
        self._first_here = min(stages)
        self._last, self._vocab_size = spec.num_stages - 1, spec.transformer.vocab_size
        self._ring = Ring(mesh)
        self._layer_context = next(iter(stages.values())).context
        self._parts = self._layer_context.tp.size if self._layer_context.sequence_parallel else 1
        self._draws = self._last in stages
        self._tokens: list[Tensor] = [torch.empty(0)] * len(groups)
        self._hidden: list[Tensor | None] = [None] * len(groups)

    def run(self) -> None:
        """Run until every sample has ended."""
        active = list(range(len(self._groups)))
        while active:
            # All groups for each stage in turn: the order in which every link of the ring carries its tensors.
            for stage_index in self._stages:
                for number in active:
                    if stage_index == self._first_here:
                        self._begin(number)
                    if not self._groups[number].is_done:
                        self._pass(number, stage_index)
            active = [number for number in active if not self._groups[number].is_done]
        self._ring.finish()

    def _begin(self, number: int) -> None:
        """Receive the tokens that the previous pass has drawn, and prepare the next pass."""
        group, ring = self._groups[number], self._ring
        if group.num_passes and not self._draws:
            tokens = torch.empty(group.drawn_shape, dtype=torch.int64, device=self._layer_context.device)
            drawn = ring.receive(tokens, ring.previous)
            # The tokens have been around the ring, so everything this rank sent for the previous pass has arrived too.
            ring.settle(number)
            if ring.next != self._placement[self._last]:
                ring.send(drawn, ring.next, number)
            self._take(number, drawn)
        if not group.is_done:
            self._tokens[number] = group.next_tokens()

    def _pass(self, number: int, stage_index: int) -> None:
        """Run one stage on one group, and send its output."""
        group, tokens, stage = self._groups[number], self._tokens[number], self._stages[stage_index]
        rank = self._mesh.pp.rank
        hidden, self._hidden[number] = self._hidden[number], None
        source = self._placement[stage_index - 1] if stage_index else rank
        if source != rank:
            shape = (len(tokens), tokens.shape[1] // self._parts, stage.config.hidden_size)
            x = torch.empty(shape, dtype=self._layer_context.dtype, device=self._layer_context.device)
            hidden = self._ring.receive(x, source)
            if self._draws:  # it comes of all that this rank has sent before
                self._ring.settle(number)
        hidden = stage.extend(hidden, tokens, group.cache)
        if stage_index == self._last:
            if not group.num_passes:  # what the prompts have in common
                return
            drawn = self._draw(group, stage, hidden)
            if self._mesh.pp.size > 1:
                self._ring.send(drawn, self._ring.next, number)
            self._take(number, drawn)
        elif self._placement[stage_index + 1] == rank:
            self._hidden[number] = hidden
        else:
            self._ring.send(hidden, self._placement[stage_index + 1], number)

    def _take(self, number: int, drawn: Tensor) -> None:
        try:
            self._groups[number].take(drawn)
        except NotFiniteError:
            self._ring.settle(number)  # so that every rank receives the tokens
            raise

    def _draw(self, group: SampleGroup, stage: Stage, hidden: Tensor) -> Tensor:
        """Return the next token of each sample, int64 `drawn_shape`, the same on every tp rank."""
        # With sequence parallelism each tp rank returns its last position; that of the last rank is the last of all.
        local = stage.logits(hidden[:, -1:])[:, -1]
        logits = all_gather(local, self._layer_context.tp).transpose(0, 1).flatten(1)[:, : self._vocab_size]
        drawn = group.choose(logits)
        if (
            self._layer_context.tp.size > 1
        ):  # a GPU's sums may differ in the last bit between ranks: all use one rank's draw
            all_reduce(drawn.mul_(self._layer_context.tp.rank == 0), self._layer_context.tp)
        return drawn
