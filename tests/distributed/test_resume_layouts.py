"""A checkpoint goes on at any other layout: within 1e-9 of the run without a stop, on the same layout bit for bit."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import RankPool
from trimaran.models.batch import Microbatch
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.state import TrainState, load_state, save_state
from trimaran.runtime.train.train_context import build_train_context, train_step

STOP, NUM_STEPS, BATCH = 2, 4, 4
LLAMA: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 24, "vocab_size": 263,
    "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False,
    "init_std": 0.2,
}  # fmt: skip
GPT: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 16, "num_heads": 4, "ffn_hidden_size": 24, "vocab_size": 263, "position": "learned",
    "norm": "layernorm", "activation": "gelu_tanh", "bias": True, "tie_embeddings": True, "init_std": 0.2,
    "hidden_dropout": 0.1,
}  # fmt: skip
MIXTRAL: dict[str, Any] = LLAMA | {"num_experts": 8, "router_aux_loss": 0.1}
MODELS = {"llama": LLAMA, "gpt": GPT, "mixtral": MIXTRAL}


@dataclass(frozen=True)
class Layout:
    """A parallel section by name, and what ZeRO shards over how many dp ranks."""

    name: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    virtual_stages: int = 1
    sequence_parallel: bool = False
    layers_per_stage: tuple[int, ...] | None = None
    zero_stage: int = 1
    shard_size: int | None = None


SINGLE = Layout("single")
TP2 = Layout("tp2", tp=2)
TP4 = Layout("tp4", tp=4)
PP2 = Layout("pp2", pp=2)
PP2_UNEVEN = Layout("pp2-uneven", pp=2, layers_per_stage=(1, 3))
PP4 = Layout("pp4", pp=4)
DP2 = Layout("dp2", dp=2)
DP4 = Layout("dp4-zero2", dp=4, zero_stage=2)
DP2_EP2 = Layout("dp2-ep2", dp=2, ep=2)
TP2_DP2_EP2_ZERO0 = Layout("tp2-dp2-ep2-zero0", tp=2, dp=2, ep=2, zero_stage=0)
DP4_EP2 = Layout("dp4-ep2-zero3-shards-of-2", dp=4, ep=2, zero_stage=3, shard_size=2)
DP2_ZERO0 = Layout("dp2-zero0", dp=2, zero_stage=0)
INTERLEAVED = Layout("pp2-interleaved", pp=2, virtual_stages=2)
TP2_PP2 = Layout("tp2-pp2", tp=2, pp=2)
TP2_PP2_DP2 = Layout("tp2-pp2-dp2", tp=2, pp=2, dp=2)
TP2_PP2_DP2_FULL = Layout(
    "tp2-pp2-dp2-interleaved-sequence-parallel-zero3",
    tp=2,
    pp=2,
    dp=2,
    virtual_stages=2,
    sequence_parallel=True,
    zero_stage=3,
)


def make_spec(layout: Layout, model: str, dtype: str, folder: str) -> RunSpec:
    parallel = {
        "tp": layout.tp,
        "pp": layout.pp,
        "dp": layout.dp,
        "ep": layout.ep,
        "virtual_stages": layout.virtual_stages,
        "schedule": "interleaved_1f1b" if layout.virtual_stages > 1 else "1f1b",
        "sequence_parallel": layout.sequence_parallel,
        "layers_per_stage": list(layout.layers_per_stage) if layout.layers_per_stage else None,
    }
    return parse_spec(
        {
            "model": MODELS[model],
            "parallel": parallel,
            # Small buckets: several a stage.
            "zero": {"stage": layout.zero_stage, "shard_size": layout.shard_size, "bucket_size_mib": 0.01},
            "data": {"tokenizer_vocab_size": 257},
            "optimizer": {"lr": 3e-3},
            "precision": {"dtype": dtype},
            "train": {
                "num_steps": NUM_STEPS,
                "global_batch_size": BATCH,
                "micro_batch_size": 1,
                "seq_len": 16,
                "output_dir": folder,
            },
            "seed": 7,
        }
    )


def make_batches(state: TrainState, dp_rank: int, dp_size: int) -> list[Microbatch]:
    """The dp rank's microbatches after `state`: random tokens that depend on the position in the run alone."""
    generator = torch.Generator().manual_seed(state.consumed_samples)
    tokens = torch.randint(263, (BATCH, 17), generator=generator)
    per_rank = BATCH // dp_size
    mine = range(dp_rank * per_rank, (dp_rank + 1) * per_rank)
    return [Microbatch(tokens[i : i + 1, :-1], tokens[i : i + 1, 1:], state.consumed_samples + i) for i in mine]


def train_part(
    layout: Layout, model: str, dtype: str, folder: str, load: str | None, stop: int
) -> tuple[list[float], list[torch.Tensor], str]:
    """Train from the start or a checkpoint to `stop`; return losses, this rank's state and the checkpoint."""
    spec = make_spec(layout, model, dtype, folder)
    parallel = spec.parallel
    axes = {axis: getattr(parallel, axis) for axis in ("pp", "dp", "cp", "tp", "ep")}
    mesh = build_mesh(**axes, shard_size=layout.shard_size, timeout_s=100)
    train_context = build_train_context(spec, mesh, torch.device("cpu"))
    state = TrainState() if load is None else load_state(train_context, Path(load))
    losses = []
    while state.step < stop:
        losses.append(train_step(train_context, make_batches(state, mesh.dp.rank, mesh.dp.size), 3e-3).loss)
        state = state.after_step(spec)
    saved = save_state(train_context, state)
    pieces = [piece.data.clone() for piece in train_context.optimizer.pieces()]
    mesh.close()
    return losses, pieces, str(saved)


@cache
def run_part(
    pool: RankPool, layout: Layout, model: str, dtype: str, folder: str, load: str | None, stop: int
) -> tuple[list[float], list[list[torch.Tensor]], str]:
    """Losses, every rank's state and the checkpoint of a part; parts that several tests begin with run once."""
    results = pool.run(
        train_part, make_spec(layout, model, dtype, folder).world_size, layout, model, dtype, folder, load, stop
    )
    assert all(losses == results[0][0] for losses, _, _ in results)
    return results[0][0], [pieces for _, pieces, _ in results], results[0][2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file are saved."""
    return tmp_path_factory.mktemp("runs")


CHANGES = [
    ("llama", TP2_PP2_DP2, SINGLE),
    ("llama", SINGLE, TP2_PP2_DP2_FULL),
    ("llama", TP2_PP2_DP2_FULL, TP2_PP2_DP2),
    ("llama", TP2_PP2_DP2, PP4),
    ("llama", PP4, TP2),
    ("llama", TP2, DP4),
    ("llama", DP4, INTERLEAVED),
    ("llama", INTERLEAVED, PP2_UNEVEN),
    ("gpt", TP2_PP2_DP2, DP2_ZERO0),
    ("gpt", DP2_ZERO0, PP2),
    ("gpt", INTERLEAVED, TP4),
    ("gpt", TP4, TP2_PP2_DP2_FULL),
    ("mixtral", DP2_EP2, TP2),
    ("mixtral", TP2, DP2_EP2),
    ("mixtral", TP2_PP2, TP2_DP2_EP2_ZERO0),
    ("mixtral", TP2_DP2_EP2_ZERO0, DP4_EP2),
]


@pytest.mark.parametrize(("model", "before", "after"), CHANGES, ids=lambda value: getattr(value, "name", value))
def test_a_checkpoint_goes_on_at_another_layout(
    model: str, before: Layout, after: Layout, folder: Path, ranks: RankPool
) -> None:
    unbroken, _, _ = run_part(ranks, SINGLE, model, "float64", str(folder / "unbroken" / model), None, NUM_STEPS)
    context = str(folder / f"{model}-{before.name}")
    first, _, checkpoint = run_part(ranks, before, model, "float64", context, None, STOP)
    assert Path(checkpoint).name == f"step-{STOP:08d}"
    second, _, _ = run_part(ranks, after, model, "float64", f"{context}-{after.name}", checkpoint, NUM_STEPS)
    # float64 keeps 1e-16 a step; sums in another order grow by some 1e-13 over these steps. 1e-9 is the promise.
    assert first + second == pytest.approx(unbroken, abs=1e-9, rel=0)
    assert unbroken[-1] != unbroken[STOP]


EXACT = [
    ("llama", TP2_PP2, "float32"),
    ("llama", TP2_PP2_DP2_FULL, "bfloat16"),
    ("gpt", DP2, "float32"),
    ("gpt", TP2_PP2_DP2_FULL, "float32"),
    ("mixtral", DP4_EP2, "bfloat16"),
]


@pytest.mark.parametrize(("model", "layout", "dtype"), EXACT, ids=lambda value: getattr(value, "name", value))
def test_resuming_on_the_same_layout_is_exact_to_the_bit(
    model: str, layout: Layout, dtype: str, folder: Path, ranks: RankPool
) -> None:
    context = str(folder / f"{model}-{layout.name}-{dtype}")
    unbroken, expected, _ = run_part(ranks, layout, model, dtype, f"{context}-unbroken", None, NUM_STEPS)
    first, _, checkpoint = run_part(ranks, layout, model, dtype, context, None, STOP)
    second, found, _ = run_part(ranks, layout, model, dtype, context, checkpoint, NUM_STEPS)
    assert first + second == unbroken
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True))


def test_a_checkpoint_loads_at_another_precision_and_layout(folder: Path, ranks: RankPool) -> None:
    _, _, checkpoint = run_part(ranks, TP2_PP2, "llama", "float32", str(folder / "narrow"), None, STOP)
    wide, _, _ = run_part(ranks, DP2, "llama", "float64", str(folder / "wide"), checkpoint, NUM_STEPS)
    narrow, _, _ = run_part(ranks, TP2_PP2, "llama", "float32", str(folder / "narrow-on"), checkpoint, NUM_STEPS)
    assert wide == pytest.approx(narrow, rel=1e-4)  # float32's digits over two steps
