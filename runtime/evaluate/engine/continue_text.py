"""Continuations of an evaluation: which are made together, and the texts that come of them."""

from collections.abc import Sequence

from trimaran.models.transformer import Stage
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.evaluate.engine.budget import Budget
from trimaran.runtime.evaluate.engine.requests import Continuation
from trimaran.runtime.infer.generate import generate
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.infer.text import TextStream
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.pipeline.schedule import Placement
from trimaran.runtime.spec import RunSpec


def divide_continuations(
    requests: Sequence[Continuation], most: int | None, budget: Budget, max_seq_len: int
) -> list[list[int]]:
    """Return the numbers of all requests in batches of the same sampling and similar lengths, the longest first.

    Args:
        most: requests of a batch; None for as many as the budget allows.
    """
    by_sampling: dict[SamplingParams, list[int]] = {}
    for number, request in enumerate(requests):
        by_sampling.setdefault(request.sampling, []).append(number)
    divided: list[tuple[int, list[int]]] = []
    for sampling, numbers in by_sampling.items():
        numbers.sort(key=lambda number: -len(requests[number].context))
        while numbers:
            longest = min(max_seq_len, len(requests[numbers[0]].context) + sampling.max_new_tokens)
            size = most or max(1, min(budget.together, budget.cache_tokens // longest))
            divided.append((longest * min(size, len(numbers)), numbers[:size]))
            del numbers[:size]
    return [numbers for _, numbers in sorted(divided, key=lambda each: -each[0])]


def continue_texts(
    stages: dict[int, Stage],
    mesh: Mesh,
    spec: RunSpec,
    placement: Placement,
    tokenizer: Tokenizer,
    requests: Sequence[Continuation],
    numbers: Sequence[int],
) -> list[str]:
    """Return the texts that continue requests of the same sampling, each without its stop string.

    Collective over the pipeline and the tp group.

    Args:
        numbers: of the requests among all, for the random numbers.

    Raises:
        NotFiniteError: the logits are not finite.
    """
    streams = {
        number: TextStream(tokenizer, request.context, request.stop_strings)
        for number, request in zip(numbers, requests, strict=True)
    }

    def watch(number: int, token: int) -> bool:
        return streams[number].add(token)

    prompts, sampling = [request.context for request in requests], requests[0].sampling
    generate(stages, mesh, spec, prompts, sampling, watch, numbers=numbers, placement=placement)
    for stream in streams.values():
        stream.finish()
    return [stream.text for stream in streams.values()]
