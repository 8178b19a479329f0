"""Generation at any layout: the stages pass the hidden states along, the last one draws the next token, and every rank learns it.

Each token runs the whole prefix again; there is no key-value cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.kernels.random import random_words, stream_key
from trimaran.models.parallel.group import all_gather, broadcast, receive, send
from trimaran.models.parallel.parameter import Placement
from trimaran.models.transformer import Stage, in_eval_mode
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.pipeline.schedule import rank_of_stage
from trimaran.runtime.spec import RunSpec


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        max_new_tokens: length of the continuation.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens may be drawn; 0 for all.
        stop_token: generation ends after it; None for never.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("temperature", self.temperature), ("top_k", self.top_k)):
            if value < 0:
                raise ValueError(f"{name} ({value}) must not be negative")


@torch.no_grad()
def generate(
    stages: dict[int, Stage],
    mesh: Mesh,
    spec: RunSpec,
    prompt: Sequence[int],
    sampling: Sampling,
    on_token: Callable[[int], None] = lambda token: None,
) -> list[int]:
    """Return the new tokens, the same on every rank. Collective over the pipeline and the tp group; dp replicas draw the same tokens.

    Args:
        prompt: token ids, at least one; the model sees the last `max_seq_len` tokens of prompt and continuation.
        on_token: called with each new token.
    Raises:
        ValueError: the prompt is empty.
        RuntimeError: a peer is gone or did not answer within the time-out.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens; give at least one character of text")
    tokens = list(prompt)
    with in_eval_mode(stages.values()):
        for _ in range(sampling.max_new_tokens):
            token = _next_token(stages, mesh, spec, tokens, sampling)
            tokens.append(token)
            on_token(token)
            if token == sampling.stop_token:
                break
    return tokens[len(prompt) :]


def _next_token(stages: dict[int, Stage], mesh: Mesh, spec: RunSpec, tokens: list[int], sampling: Sampling) -> int:
    place = next(iter(stages.values())).place
    parts = place.tp.size if place.sequence_parallel else 1
    window = tokens[-(spec.transformer.max_seq_len // parts * parts) :]
    padding = -len(window) % parts  # later positions don't change earlier ones, so any token may fill the last part
    ids = torch.tensor([window + [0] * padding], device=place.device)
    shape = (1, ids.shape[1] // parts, spec.transformer.hidden_size)
    hidden: Tensor | None = None
    last = spec.num_stages - 1
    for index in range(spec.num_stages):
        if index in stages:
            hidden = stages[index].run_layers(hidden, ids)
        if index < last:
            hidden = _hand_over(hidden, mesh, index, shape, place)
    chosen = torch.zeros(1, dtype=torch.int64, device=place.device)
    if last in stages:
        assert hidden is not None
        local = stages[last].logits(hidden)[0, len(window) - 1]
        logits = all_gather(local, mesh.tp).flatten()[: spec.transformer.vocab_size]
        chosen[0] = draw(logits.double(), len(tokens), sampling)
    return int(broadcast(chosen, rank_of_stage(last, mesh.pp.size), mesh.pp).item())


def _hand_over(x: Tensor | None, mesh: Mesh, stage: int, shape: tuple[int, ...], place: Placement) -> Tensor | None:
    """Move the hidden states of `stage` to the rank of the next stage; return them there."""
    source, target = rank_of_stage(stage, mesh.pp.size), rank_of_stage(stage + 1, mesh.pp.size)
    if source == target:
        return x
    if mesh.pp.rank == source:
        assert x is not None
        send(x, target, mesh.pp)
        return None
    if mesh.pp.rank == target:
        return receive(torch.empty(shape, dtype=place.dtype, device=place.device), source, mesh.pp)
    return None


def draw(logits: Tensor, position: int, sampling: Sampling) -> int:
    """Return a token id drawn from logits [vocab] float64, by a number that depends on (seed, position) alone."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    if 0 < sampling.top_k < len(logits):
        threshold = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    cumulative = (logits / sampling.temperature).softmax(-1).cumsum(-1)
    word = random_words(stream_key(sampling.seed, "generate"), torch.tensor([position]), 1)
    uniform = (float(word.item()) + 0.5) * 2.0**-32
    index = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1])).item())
    return min(index, len(logits) - 1)
