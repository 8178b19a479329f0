"""What a ZeRO stage costs a rank, by formula: bytes of state, and what it sends to its dp peers in a step. No torch.

P parameters on a rank, each in e bytes (2 for bfloat16); d ranks share them out; m microbatches. Gradients, moments and
a main copy (where e is 2) have 4 bytes each; for float64 8 (Rajbhandari et al. 2020, section 5 and 7):

    stage    bytes                             elements sent
    0        P (e + 4 + [4] + 8)               2 P (d-1)/d
    1        P (e + 4 + ([4] + 8) / d)         2 P (d-1)/d
    2        P (e + (4 + [4] + 8) / d)         (m+1) P (d-1)/d
    3        P (e + 4 + [4] + 8) / d           3 m P (d-1)/d

Buckets are padded to a multiple of d. Stages 2 and 3 hold whole gradients of two buckets on their way, and stage 3
whole parameters of two. Stage 3 sends less than that: it gathers no parameter again that the next block uses too, and
none of the head and the embedding's rows for a backward pass. Replicas beyond `zero.shard_size` sum their shards once a
step.

DeepSpeed (`zero.backend`) keeps a main copy of float32 parameters too, and whole gradients at every stage, which it
reduces once a step: by an all_reduce, with stage 3 by a reduce_scatter.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from trimaran.runtime.pipeline.partition import stage_layers
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.pipeline import placement_of

_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Held:
    """Parameters that are sharded alike.

    Args:
        parameters: on this rank.
        shard_size: ranks that share them out.
        replicas: groups of such ranks.
    """

    parameters: float
    shard_size: int
    replicas: int


def held_by_ranks(spec: RunSpec) -> list[list[Held]]:
    """Return what a rank of each pipeline rank holds: all but experts, and experts.

    Norms and biases are counted as cut over tp, which they are not, and vocabulary padding is left out.
    """
    shape, parallel = spec.transformer, spec.parallel
    placement = placement_of(spec)
    layers = stage_layers(shape, spec.train.seq_len, spec.num_stages, parallel.layers_per_stage)
    dense, experts = [0.0] * parallel.pp, [0.0] * parallel.pp
    for stage, rank in enumerate(placement):
        dense[rank] += len(layers[stage]) * (shape.layer_parameters() - shape.layer_expert_parameters())
        experts[rank] += len(layers[stage]) * shape.layer_expert_parameters()
    dense[placement[0]] += shape.embedding_parameters()
    dense[placement[-1]] += shape.head_parameters()
    if shape.ties_head and placement[0] != placement[-1]:
        dense[placement[-1]] += shape.vocab_size * shape.hidden_size
    shard_size = 1 if spec.zero.stage == 0 else spec.zero.shard_size or parallel.dp
    tp, ep, dp = parallel.tp, parallel.ep, parallel.dp
    of_experts = max(1, shard_size // ep)
    return [
        [
            Held(dense[rank] / tp, shard_size, dp // shard_size),
            Held(experts[rank] / (tp * ep), of_experts, dp // ep // of_experts),
        ]
        for rank in range(parallel.pp)
    ]


def bytes_of_state(stage: int, dtype: str, held: Iterable[Held], backend: str = "native") -> dict[str, float]:
    """Return the bytes of `parameters`, `gradients` and `optimizer` on a rank, without padding and transit."""
    narrow, wide, is_native = _BYTES[dtype], max(4, _BYTES[dtype]), backend == "native"
    sizes = {"parameters": 0.0, "gradients": 0.0, "optimizer": 0.0}
    for each in held:
        share = each.parameters / each.shard_size
        sizes["parameters"] += narrow * (share if stage >= 3 else each.parameters)
        sizes["gradients"] += wide * (share if stage >= 2 and is_native else each.parameters)
        sizes["optimizer"] += (2 * wide + (0 if narrow == wide and is_native else wide)) * share
    return sizes


def elements_sent(
    stage: int, held: Iterable[Held], num_microbatches: int, backend: str = "native"
) -> tuple[float, float]:
    """Return the gradients and the parameters that a rank sends to its dp peers in a step, in elements; at most."""
    gradients = parameters = 0.0
    for each in held:
        d, r = each.shard_size, each.replicas
        whole = each.parameters * (d - 1) / d
        if backend == "deepspeed":
            gradients += whole * (2 if stage < 3 else 1)
        else:
            gradients += whole * (num_microbatches if stage >= 2 else 1)
        gradients += 2 * each.parameters / d * (r - 1) / r
        parameters += whole * (2 * num_microbatches if stage >= 3 else 1)
    return gradients, parameters


def describe_state(spec: RunSpec) -> list[tuple[str, str]]:
    """Return rows about the largest rank's state and about what it sends to dp peers in a step."""
    stage, dtype, dp, backend = spec.zero.stage, spec.precision.dtype, spec.parallel.dp, spec.zero.backend
    by_rank = held_by_ranks(spec)
    rank, held = max(enumerate(by_rank), key=lambda item: sum(bytes_of_state(stage, dtype, item[1], backend).values()))
    sizes = bytes_of_state(stage, dtype, held, backend)
    where = f" on pipeline rank {rank}, the largest" if spec.parallel.pp > 1 else ""
    parts = ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())
    rows = [("state of a rank", f"about {_size(sum(sizes.values()))}{where}: {parts}")]
    if dp == 1:
        return rows
    sent = _bytes_sent(spec, stage, held)
    rows.append(("sent to dp peers", f"about {_size(sent)} a rank and step"))
    if stage == 3:
        saved = sum(bytes_of_state(2, dtype, held, backend).values()) - sum(sizes.values())
        more = sent - _bytes_sent(spec, 2, held)
        text = f"saves {_size(saved)} of stage 2's state and sends {_size(more)} more a step"
        if spec.parallel.pp > 1 and more > saved:
            text += f": every microbatch gathers again, {more / saved:.3g} times what is saved"
        rows.append(("zero.stage 3", text))
    return rows


def _bytes_sent(spec: RunSpec, stage: int, held: Iterable[Held]) -> float:
    dtype = spec.precision.dtype
    gradients, parameters = elements_sent(stage, held, spec.num_microbatches, spec.zero.backend)
    return gradients * max(4, _BYTES[dtype]) + parameters * _BYTES[dtype]


def _size(num_bytes: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes / 2**10:.3g} KiB"
