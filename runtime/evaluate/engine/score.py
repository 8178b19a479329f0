"""Batches of likelihoods through this rank's stages, at any tp and pp; the hidden states go from stage to stage.

The pipeline ranks work on different batches at the same time: each takes its batches in one order, and sends do not
block. Only the last stage knows the scores.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from trimaran.models.cache.prefix import PackedAttention, PrefixCache
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.likelihood import Scored
from trimaran.models.transformer import Stage, in_eval_mode
from trimaran.runtime.evaluate.engine.batches import LikelihoodBatch, Target
from trimaran.runtime.infer.ring import Ring
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.pipeline.schedule import Placement

_IN_FLIGHT = 2  # batches whose sends a rank has not waited for

TakeScores = Callable[[LikelihoodBatch, Sequence[float], Sequence[bool]], None]
"""Takes a batch's log-likelihoods, and whether each target is the likeliest token; NaN where logits are not finite."""


def check_causal(config: TransformerConfig) -> None:
    """Raise ValueError for BERT, XLNet and reward models, which give a text no likelihood."""
    if not config.has_head:
        raise ValueError(
            "a reward model (model.score_head only) gives a text no likelihood; use `trimaran score`, or evaluate the "
            "model that it judges"
        )
    if config.is_causal:
        return
    predicts = {
        "masked_lm": "predicts hidden tokens from both sides",
        "permutation_lm": "predicts a part of the tokens in a random order, given the others",
    }[config.objective]
    raise ValueError(
        f"a model of objective {config.objective} {predicts}, so its predictions do not multiply to the likelihood of "
        "a text; evaluate a causal_lm model"
    )


# Inference mode has no version counters and no view tracking.
@torch.inference_mode()
def score(
    stages: dict[int, Stage],
    mesh: Mesh,
    placement: Placement,
    batches: Iterable[LikelihoodBatch],
    take: TakeScores,
) -> None:
    """Run the batches through the stages; the ranks of the last stage call `take` with the scores of each.

    Collective over the pipeline and the tp group, which must have the same batches.

    Args:
        placement: stage -> pipeline rank.

    Raises:
        RuntimeError: a peer is gone or did not answer within the time-out.
    """
    passes = _Passes(stages, mesh, placement, take)
    with in_eval_mode(stages.values()):
        # With several stages on a rank, as many batches as there are ranks go round together.
        for group in _groups(iter(batches), 1 if len(stages) == 1 else mesh.pp.size):
            passes.run(group)
        passes.finish()


def _groups(batches: Iterator[LikelihoodBatch], size: int) -> Iterator[list[LikelihoodBatch]]:
    while group := list(islice(batches, size)):
        yield group


class _Passes:
    """Forward passes through this rank's stages."""

    def __init__(self, stages: dict[int, Stage], mesh: Mesh, placement: Placement, take: TakeScores) -> None:
        self._stages, self._mesh, self._placement, self._take = stages, mesh, placement, take
        self._ring, self._cache = Ring(mesh), PrefixCache()
        self._last, self._num_batches = len(placement) - 1, 0
        self._context = next(iter(stages.values())).context
        self._parts = self._context.tp.size if self._context.sequence_parallel else 1

    def run(self, group: Sequence[LikelihoodBatch]) -> None:
        """Run a group of batches through every stage of this rank."""
        packed = [
            PackedAttention(each.packing, self._cache, self._context.device, multiple=self._parts) for each in group
        ]
        hidden: list[Tensor | None] = [None] * len(group)
        for stage_index in self._stages:
            for number, batch in enumerate(group):
                hidden[number] = self._pass(stage_index, batch, packed[number], hidden[number], number)
        for batch in group:
            self._cache.drop(tuple(batch.packing.drops))
        self._num_batches += len(group)
        self._ring.settle(self._num_batches - len(group) - _IN_FLIGHT)

    def finish(self) -> None:
        """Wait until everything that was sent has arrived."""
        self._ring.finish()

    def _pass(
        self, stage_index: int, batch: LikelihoodBatch, packed: PackedAttention, hidden: Tensor | None, number: int
    ) -> Tensor | None:
        """Run one stage on one batch; return its output where the next stage is on this rank too."""
        stage, rank = self._stages[stage_index], self._mesh.pp.rank
        source = self._placement[stage_index - 1] if stage_index else rank
        if source != rank:
            shape = (1, packed.tokens.shape[1] // self._parts, stage.config.hidden_size)
            hidden = self._ring.receive(
                torch.empty(shape, dtype=self._context.dtype, device=self._context.device), source
            )
        hidden = stage.run_packed(hidden, packed)
        if stage_index == self._last:
            if batch.targets:
                log_likelihoods, is_likeliest = stage.log_likelihoods(
                    hidden, scored_tokens(batch.targets, self._context.device)
                )
                self._take(batch, log_likelihoods.tolist(), is_likeliest.tolist())
            return None
        target = self._placement[stage_index + 1]
        if target == rank:
            return hidden
        self._ring.send(hidden, target, self._num_batches)
        return None


def scored_tokens(targets: Sequence[Target], device: torch.device) -> Scored:
    """Return the targets of a batch, which are in the order of their rows, as tensors."""
    rows: list[int] = []
    of = []
    for target in targets:
        if not rows or rows[-1] != target.row:
            rows.append(target.row)
        of.append(len(rows) - 1)
    tokens = [target.token for target in targets]
    return Scored(*(torch.tensor(each, device=device) for each in (rows, of, tokens)))
