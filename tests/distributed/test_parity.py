"""Any layout, same maths: 20 steps in float64 at every layout against one process, losses to 1e-9 and every gradient and parameter after."""

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.ranks import RankPool
from trimaran.models.batch import Microbatch
from trimaran.models.parallel.parameter import info_of
from trimaran.runtime.data.objectives import MaskedTokens, Objective, PermutedTokens
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.train_context import build_train_context, evaluate, train_step

NUM_STEPS = 20
LLAMA: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 24, "vocab_size": 263,
    "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False, "init_std": 0.2,
}  # fmt: skip
GPT: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 16, "num_heads": 4, "ffn_hidden_size": 24, "vocab_size": 263,
    "position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True, "tie_embeddings": True, "init_std": 0.2,
}  # fmt: skip
# Multi-query heads that every tp rank holds, and a block whose branches read one norm and share a collective.
FALCON: dict[str, Any] = GPT | {
    "num_kv_heads": 1, "position": "rotary", "rotary_dim": 2, "block": "parallel_one_norm", "bias": False, "norm_bias": True, "head_bias": True,
}  # fmt: skip
BLOOM: dict[str, Any] = GPT | {"position": "alibi", "embedding_norm": True, "block": "parallel", "z_loss": 1e-2}
GEMMA: dict[str, Any] = LLAMA | {
    "norm_position": "sandwich", "activation": "geglu_tanh", "attention_window": 3, "attention_pattern": ["window", "full"], "logits_softcap": 2.0,
    "attention_softcap": 1.0, "attention_scale": 0.3, "embedding_scale": 4.0, "tie_embeddings": True, "query_key_norm": "head",
}  # fmt: skip
OLMO: dict[str, Any] = LLAMA | {
    "norm_position": "branch",
    "query_key_norm": "width",
    "rotary_interleaved": True,
    "qkv_bias": True,
}
POST_NORM: dict[str, Any] = GPT | {
    "norm_position": "post",
    "activation": "relu",
    "norm_weight": False,
    "logits_scale": 0.5,
}
TFIXUP: dict[str, Any] = GPT | {"norm_position": "none", "init": "tfixup", "embedding_scale": 4.0}
DEEPNORM: dict[str, Any] = GPT | {"norm_position": "post", "init": "deepnorm", "embedding_scale": 4.0}
MUP: dict[str, Any] = LLAMA | {"init": "mup", "mup_base_width": 4, "mup_base_head_dim": 2, "tie_embeddings": True}
# As SmolLM2-135M has them; the second model's heads are not grouped.
UNEVEN: dict[str, Any] = LLAMA | {
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 4,
    "qkv_bias": True,
    "query_key_norm": "head",
}
UNEVEN_ALIBI: dict[str, Any] = BLOOM | {"num_heads": 5, "head_dim": 4} | {"attention_dropout": 0.1}
DROPOUT = {"embedding_dropout": 0.1, "hidden_dropout": 0.1, "attention_dropout": 0.1}


@dataclass(frozen=True)
class Layout:
    """One case: the parallel section, the model, and what else differs."""

    name: str
    parallel: dict[str, Any]
    model: dict[str, Any] = field(default_factory=lambda: LLAMA)
    zero_stage: int = 1
    dtype: str = "float64"
    shared_memory: bool = True
    global_batch_size: int = 4


LAYOUTS = [
    Layout("tp2", {"tp": 2}),
    Layout("tp4-gpt", {"tp": 4}, GPT),
    Layout("tp2-without-shared-memory", {"tp": 2}, shared_memory=False),
    Layout("tp2-sequence-parallel", {"tp": 2, "sequence_parallel": True}),
    Layout("tp4-sequence-parallel-gpt", {"tp": 4, "sequence_parallel": True}, GPT),
    Layout("pp2", {"pp": 2}),
    Layout("pp2-gpipe", {"pp": 2, "schedule": "gpipe"}),
    Layout("pp2-tied", {"pp": 2}, GPT),
    Layout("pp4-tied", {"pp": 4}, GPT, global_batch_size=8),
    Layout("pp2-interleaved", {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b"}, global_batch_size=8),
    Layout("pp2-interleaved-tied", {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b"}, GPT),
    Layout("pp1-interleaved-tied", {"virtual_stages": 2, "schedule": "interleaved_1f1b"}, GPT),
    Layout("pp2-uneven", {"pp": 2, "layers_per_stage": [3, 1]}),
    Layout("dp2", {"dp": 2}),
    Layout("dp4", {"dp": 4}, GPT),
    Layout("dp2-without-shared-memory", {"dp": 2}, GPT, shared_memory=False),
    Layout("dp4-without-shared-memory", {"dp": 4}, shared_memory=False),
    Layout("dp2-zero0", {"dp": 2}, GPT, zero_stage=0),
    Layout("tp2-pp2", {"tp": 2, "pp": 2}),
    Layout("tp2-dp2", {"tp": 2, "dp": 2}, GPT),
    Layout("pp2-dp2", {"pp": 2, "dp": 2}, GPT),
    Layout("tp2-pp2-dp2", {"tp": 2, "pp": 2, "dp": 2}, global_batch_size=8),
    Layout("tp2-pp2-dp2-tied-sequence-parallel", {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, GPT),
    Layout(
        "tp2-pp2-dp2-interleaved",
        {"tp": 2, "pp": 2, "dp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b", "sequence_parallel": True},
    ),
    Layout("tp2-pp2-dp2-dropout", {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, GPT | DROPOUT),
    Layout("tp2-dropout", {"tp": 2}, LLAMA | DROPOUT),
    Layout("tp2-one-layer", {"tp": 2}, LLAMA | {"num_layers": 1}),
    Layout("pp4-30-layers", {"pp": 4}, GPT | {"num_layers": 30, "init_std": 0.1}),
    Layout("tp2-9-heads-over-3", {"tp": 2, "uneven_heads": True}, UNEVEN),
    Layout(
        "tp2-pp2-sequence-parallel-5-heads",
        {"tp": 2, "pp": 2, "sequence_parallel": True, "uneven_heads": True},
        UNEVEN_ALIBI,
    ),
    Layout(
        "tp2-uneven-olmo", {"tp": 2, "uneven_heads": True}, OLMO | {"num_heads": 6, "num_kv_heads": 3, "head_dim": 4}
    ),
    Layout("tp4-falcon", {"tp": 4}, FALCON),
    Layout("tp2-pp2-sequence-parallel-falcon", {"tp": 2, "pp": 2, "sequence_parallel": True}, FALCON),
    Layout("tp2-pp2-bloom", {"tp": 2, "pp": 2}, BLOOM),
    Layout("tp2-sequence-parallel-bloom", {"tp": 2, "sequence_parallel": True}, BLOOM),
    Layout("tp4-gemma", {"tp": 4}, GEMMA),
    Layout("tp2-pp2-sequence-parallel-gemma", {"tp": 2, "pp": 2, "sequence_parallel": True}, GEMMA),
    Layout("tp4-olmo", {"tp": 4}, OLMO),
    Layout("tp2-pp2-sequence-parallel-olmo", {"tp": 2, "pp": 2, "sequence_parallel": True}, OLMO),
    Layout("tp2-pp2-post-norm", {"tp": 2, "pp": 2}, POST_NORM),
    Layout("tp2-pp2-tfixup", {"tp": 2, "pp": 2}, TFIXUP),
    Layout("tp2-pp2-sequence-parallel-deepnorm", {"tp": 2, "pp": 2, "sequence_parallel": True}, DEEPNORM),
    Layout("tp2-pp2-mup", {"tp": 2, "pp": 2}, MUP),
    Layout("tp2-dp2-mup", {"tp": 2, "dp": 2}, MUP),
    Layout(
        "tp2-pp2-dp2-sequence-parallel-dropout-falcon",
        {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True},
        FALCON | DROPOUT,
    ),
]


def make_spec(layout: Layout) -> RunSpec:
    return parse_spec(
        {
            "model": layout.model,
            "parallel": layout.parallel,
            "zero": {"stage": layout.zero_stage, "bucket_size_mib": 0.01},  # small: several buckets a stage
            "data": {
                "tokenizer_vocab_size": 258,
                "mask_fraction": None if layout.model.get("objective") is None else 0.25,
            },
            "optimizer": {"lr": 3e-3, "max_grad_norm": 1.0},
            "precision": {"dtype": layout.dtype},
            "train": {
                "num_steps": NUM_STEPS,
                "global_batch_size": layout.global_batch_size,
                "micro_batch_size": 1,
                "seq_len": 16,
            },
            "seed": 7,
        }
    )


def hiding_objective(spec: RunSpec) -> Objective:
    shape = spec.transformer
    if shape.objective == "permutation_lm":
        return PermutedTokens(spec.seed, spec.labels_per_sample, eot_id=0)
    return MaskedTokens(spec.seed, spec.labels_per_sample, mask_id=1, eot_id=0, vocab_size=shape.vocab_size)


def make_batches(spec: RunSpec, step: int, dp_rank: int, dp_size: int) -> list[Microbatch]:
    """The dp rank's microbatches of a step: random tokens that depend on the step alone, some labels ignored."""
    train = spec.train
    generator = torch.Generator().manual_seed(step)
    shape = (train.global_batch_size, train.seq_len)
    tokens = torch.randint(spec.transformer.vocab_size, shape, generator=generator)
    labels = torch.randint(spec.transformer.vocab_size, shape, generator=generator)
    labels[:, 3] = -100
    spans = torch.cat((tokens, labels[:, -1:]), dim=1).numpy()
    per_rank = train.global_batch_size // dp_size
    first = dp_rank * per_rank
    size = train.micro_batch_size
    if not spec.transformer.is_causal:
        objective = hiding_objective(spec)
        starts = [(i, step * train.global_batch_size + i) for i in range(first, first + per_rank, size)]
        return [objective.microbatch(spans[i : i + size], np.arange(sample, sample + size)) for i, sample in starts]
    return [
        Microbatch(tokens[i : i + size], labels[i : i + size], step * train.global_batch_size + i)
        for i in range(first, first + per_rank, size)
    ]


Result = dict[str, Any]


def train_on_rank(layout: Layout) -> Result:
    """Train NUM_STEPS; return losses, norms, a held-out loss, and this rank's shards of gradients and parameters."""
    spec = make_spec(layout)
    parallel = spec.parallel
    sizes = {axis: getattr(parallel, axis) for axis in ("pp", "dp", "cp", "tp", "ep")}
    mesh = build_mesh(**sizes, timeout_s=60, shared_memory=layout.shared_memory)
    assert all((group.shared is not None) == layout.shared_memory for group in (mesh.tp, mesh.dp) if group.size > 1)
    train_context = build_train_context(spec, mesh, torch.device("cpu"))
    losses, norms = [], []
    gradients: dict[str, list[Any]] = {}
    for step in range(NUM_STEPS):
        if step == NUM_STEPS - 1:
            gradients = last_gradients(train_context, spec, step)
        result = train_step(train_context, make_batches(spec, step, mesh.dp.rank, mesh.dp.size), 3e-3)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    held_out = evaluate(train_context, [make_batches(spec, 1000 + i, mesh.dp.rank, mesh.dp.size) for i in range(2)])
    parameters = {
        name: (parameter.detach().clone(), info_of(parameter).shard)
        for stage in train_context.stages.values()
        for name, parameter in stage.named_parameters()
    }
    mesh.close()
    return {"losses": losses, "norms": norms, "held_out": held_out, "parameters": parameters, "gradients": gradients}


def last_gradients(train_context: Any, spec: RunSpec, step: int) -> dict[str, list[Any]]:
    """The reduced gradients of the owned slices, as (local shape, shard, start, values), before the last step changes the weights."""
    train_context.optimizer.zero_grad()
    train_context.executor.run(make_batches(spec, step, train_context.mesh.dp.rank, train_context.mesh.dp.size))
    train_context.optimizer.finish_gradients()
    found: dict[str, list[Any]] = {}
    for piece in train_context.optimizer.gradient_pieces():
        found.setdefault(piece.name, []).append((piece.local_shape, piece.spec, piece.start, piece.data.clone()))
    return found


@cache
def reference_of(model: str, dtype: str, global_batch_size: int, pool: RankPool) -> Result:
    """The run of one process; `model` as JSON text, which can be a key of the cache."""
    (result,) = pool.run(
        train_on_rank, 1, Layout("single", {}, json.loads(model), dtype=dtype, global_batch_size=global_batch_size)
    )
    return result  # type: ignore[no-any-return]


def assert_same_shards(name: str, whole: torch.Tensor, local: torch.Tensor, shard: Any, atol: float) -> None:
    if shard.dim is None:
        torch.testing.assert_close(local, whole, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")
        return
    length = shard.real_length(tuple(local.shape))
    expected = whole.narrow(shard.dim, min(shard.offset, whole.shape[shard.dim]), length)
    torch.testing.assert_close(
        local.narrow(shard.dim, 0, length), expected, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}"
    )
    assert not local.narrow(shard.dim, length, local.shape[shard.dim] - length).any(), f"{name}: padding must stay zero"


def assert_trains_like_one_process(layout: Layout, ranks: RankPool) -> None:
    """Compare losses, norms, the held-out loss, and every gradient and parameter with those of one process."""
    reference = reference_of(json.dumps(layout.model, sort_keys=True), layout.dtype, layout.global_batch_size, ranks)
    spec = make_spec(layout)
    results = ranks.run(train_on_rank, spec.world_size, layout)
    # float64 keeps 1e-16 a step; sums in another order grow by some 1e-13 over 20 steps. 1e-9 is the promise.
    for result in results:
        assert result["losses"] == pytest.approx(reference["losses"], abs=1e-9, rel=0)
        assert result["norms"] == pytest.approx(reference["norms"], abs=1e-8, rel=0)
        assert result["held_out"] == pytest.approx(reference["held_out"], abs=1e-9, rel=0)
    assert reference["losses"][-1] != reference["losses"][0]
    seen: dict[str, int] = {}
    for result in results:
        for name, (local, shard) in result["parameters"].items():
            assert_same_shards(name, reference["parameters"][name][0], local, shard, 1e-8)
        for name, pieces in result["gradients"].items():
            for local_shape, shard, start, values in pieces:
                whole = reference["gradients"][name]
                expected = torch.cat([piece[3] for piece in whole]).view(shard.global_shape)
                padded = torch.zeros(local_shape, dtype=expected.dtype)
                if shard.dim is None:
                    padded.copy_(expected)
                else:
                    length = shard.real_length(local_shape)
                    padded.narrow(shard.dim, 0, length).copy_(expected.narrow(shard.dim, shard.offset, length))
                torch.testing.assert_close(values, padded.flatten()[start : start + len(values)], rtol=0, atol=1e-9)
                seen[name] = seen.get(name, 0) + len(values)
    assert set(seen) == set(reference["parameters"]), "every parameter's gradient was compared"
    shards: dict[str, dict[int, int]] = {}
    for result in results:
        for name, (local, shard) in result["parameters"].items():
            shards.setdefault(name, {})[shard.offset] = local.numel()
    for name, count in seen.items():
        assert count == sum(shards[name].values()), (
            f"{name}: every element's gradient, padding included, comes from exactly one rank"
        )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_trains_like_one_process(layout: Layout, ranks: RankPool) -> None:
    assert_trains_like_one_process(layout, ranks)
