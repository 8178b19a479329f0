"""Bytes of a rank's state, to the byte: the buckets of `runtime/zero/buckets.py`, laid out by their lengths alone.

Norms are whole on every tp rank, heads and vocabulary are padded to one length on all of them, and every bucket is
padded to a multiple of the ranks that share it. No torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.runtime.pipeline.partition import stage_layers
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.pipeline import placement_of

_NARROW: Final = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class BucketSize:
    """A bucket of a rank.

    Args:
        length: elements, padded.
        shard: ranks that share it out.
        is_expert: whether it holds experts that only some dp ranks have.
        blocks: numbers of the rank's blocks that are in it, in the order of the network.
    """

    length: int
    shard: int
    is_expert: bool
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class State:
    """Bytes of what one rank holds from step to step, and of ZeRO's buffers.

    Args:
        gradient_buffers: for whole gradients on their way, with stages 2 and 3.
        gathered: the most that two blocks' whole parameters take, with stage 3.
    """

    parameters: int
    gradients: int
    optimizer: int
    gradient_buffers: int
    gathered: int

    @property
    def total(self) -> int:
        """Bytes from step to step."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class _Block:
    """Elements of a block on a rank, beside the embedding's rows, which have a bucket of their own."""

    name: str
    plain: int
    expert: int = 0


def state_of(spec: RunSpec, rank: int) -> State:
    """Return the state of a rank of pipeline rank `rank`. Of a native ZeRO; all of its tp and dp ranks hold as much.

    Raises:
        ValueError: the spec has DeepSpeed's.
    """
    check_native(spec)
    buckets = buckets_of(spec, rank)
    narrow = _NARROW[spec.precision.dtype]
    wide, stage = max(4, narrow), spec.zero.stage
    alone = spec.zero.stage == 0 or (spec.zero.shard_size or spec.parallel.dp) == 1
    kept = [bucket.length // bucket.shard for bucket in buckets]
    whole = [bucket.length for bucket in buckets]
    parameters = narrow * sum(kept if stage == 3 and not alone else whole)
    gradients = wide * sum(kept if stage >= 2 and not alone else whole)
    optimizer = (2 * wide + (wide if narrow != wide else 0)) * sum(kept)
    buffers = gathered = 0
    if stage >= 2 and not alone:
        for kind in (False, True):
            lengths = sorted((each.length for each in buckets if each.is_expert == kind), reverse=True)
            buffers += wide * sum(lengths[:2])
    if stage == 3 and not alone:
        number = 1 + max(max(bucket.blocks) for bucket in buckets)
        uses = [{i for i, bucket in enumerate(buckets) if block in bucket.blocks} for block in range(number)]
        gathered = narrow * max(sum(whole[i] for i in one | two) for one, two in pairwise([set[int](), *uses]))
    return State(parameters, gradients, optimizer, buffers, gathered)


def check_native(spec: RunSpec) -> None:
    """Raise ValueError where the run's ZeRO is not this runtime's."""
    if spec.zero.backend != "native":
        raise ValueError(
            f"zero.backend is {spec.zero.backend}, whose buffers are not known; set zero.backend to native"
        )


def buckets_of(spec: RunSpec, rank: int) -> list[BucketSize]:
    """Return the buckets of pipeline rank `rank`, in order."""
    parallel, bucket_bytes = spec.parallel, spec.zero.bucket_size_mib * 2**20
    wide = max(4, _NARROW[spec.precision.dtype])
    shard = 1 if spec.zero.stage == 0 else spec.zero.shard_size or parallel.dp
    of_experts = max(1, shard // parallel.ep)
    found: list[BucketSize] = []

    def close(elements: int, is_expert: bool, blocks: list[int]) -> None:
        group = parallel.dp // parallel.ep if is_expert else parallel.dp
        if elements:
            length = -(-elements // group) * group
            found.append(BucketSize(length, of_experts if is_expert else shard, is_expert, tuple(blocks)))

    rows = -(-spec.transformer.vocab_size // parallel.tp) * spec.transformer.hidden_size
    stages = list(_stages(spec, rank))
    readers, first = list(_readers_of_rows(spec, stages)), 0
    for blocks in stages:
        collected: dict[bool, tuple[int, list[int]]] = {False: (0, []), True: (0, [])}
        for number, block in reversed(list(enumerate(blocks, first))):
            if readers and number == readers[0]:
                close(rows, False, readers)
            if block.name == "head":
                close(block.plain, False, [number])
                continue
            for kind, size in ((False, block.plain), (True, block.expert)):
                before, numbers = collected[kind]
                if before and size and wide * (before + size) > bucket_bytes:
                    close(before, kind, numbers)
                    before, numbers = 0, []
                collected[kind] = before + size, [*numbers, *([number] if size else [])]
        for kind, (size, numbers) in collected.items():
            close(size, kind, numbers)
        first += len(blocks)
    return found


def _readers_of_rows(spec: RunSpec, stages: Sequence[Sequence[_Block]]) -> Iterator[int]:
    """Yield the numbers of the blocks that read the embedding's rows: its own, and a tied head's."""
    names = ("embedding", "head") if spec.transformer.ties_head else ("embedding",)
    blocks = [block for stage in stages for block in stage]
    return (number for number, block in enumerate(blocks) if block.name in names)


def _stages(spec: RunSpec, rank: int) -> Iterator[Sequence[_Block]]:
    """Yield the blocks of each stage of a pipeline rank, in the order of the network."""
    config, tp, ep = spec.transformer, spec.parallel.tp, spec.parallel.ep
    layers = stage_layers(config, spec.train.seq_len, spec.num_stages, spec.parallel.layers_per_stage)
    layer = _layer(config, tp, ep)
    for stage, owner in enumerate(placement_of(spec)):
        if owner == rank:
            blocks = [_embedding(config)] if stage == 0 else []
            blocks += [layer] * len(layers[stage])
            yield [*blocks, *_ends(config, tp)] if stage == spec.num_stages - 1 else blocks


def _embedding(config: TransformerConfig) -> _Block:
    tables = config.vocab_size * config.hidden_size
    return _Block("embedding", config.embedding_parameters() - tables)


def _layer(config: TransformerConfig, tp: int, ep: int) -> _Block:
    hidden, queries = config.hidden_size, config.heads_per_rank(tp) * config.head_dim
    kv_heads = config.kv_heads_per_rank(tp) if config.cuts_kv_heads(tp) else config.num_kv_heads
    keys = kv_heads * config.head_dim
    total = (queries + 2 * keys) * (hidden + int(config.qkv_bias)) + hidden * (queries + int(config.out_bias))
    total += {"none": 0, "head": 2 * config.head_dim, "width": queries + keys}[config.query_key_norm]
    if config.position == "relative":
        total += queries * hidden + 2 * queries
    total += (
        config.norms_per_layer
        * hidden
        * (int(config.norm_weight) + int(config.norm == "layernorm" and config.norm_bias))
    )
    parts, inner = 2 if config.is_gated else 1, -(-config.ffn_hidden_size // tp)
    if not config.num_experts:
        bias = int(config.mlp_bias)
        return _Block("layer", total + parts * inner * (hidden + bias) + hidden * (inner + bias))
    total += config.num_experts * hidden
    if ep == 1:
        return _Block("layer", total + config.num_experts * (parts + 1) * inner * hidden)
    mine = -(-config.num_experts // (ep * tp))
    return _Block("layer", total, mine * (parts + 1) * config.ffn_hidden_size * hidden)


def _ends(config: TransformerConfig, tp: int) -> list[_Block]:
    """Return the final norm's block and the head's, without a tied embedding's rows."""
    rows = -(-config.vocab_size // tp)
    own = rows * config.hidden_size if config.has_head and not config.tie_embeddings else 0
    bias = rows if config.head_bias and config.has_head else 0
    score = config.hidden_size if config.score_head != "none" else 0
    whole = config.vocab_size if config.has_head else 0
    projection = (0 if config.tie_embeddings else whole * config.hidden_size) + (whole if config.head_bias else 0)
    return [_Block("final", config.head_parameters() - projection - score), _Block("head", own + bias + score)]
