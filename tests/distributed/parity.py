"""What the parity tests share: models, layouts, and the comparison of a layout's training with that of one process.

The layouts of one world size train in the same ranks, one after the other, each on a mesh of its own: a start of the
ranks costs more than most layouts.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from tests import counting
from tests.distributed.ranks import RankFailed, RankPool
from tests.session import made_once
from trimaran.models.batch import Microbatch
from trimaran.models.parallel.parameter import info_of
from trimaran.runtime.data.samples.objectives import MaskedTokens, Objective, PermutedTokens
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.pipeline import placement_of
from trimaran.runtime.train.train_context import (
    TrainContext,
    accumulate,
    build_train_context,
    evaluate,
    finish_step,
)

FULL_STEPS, SHORT_STEPS = 20, 4
STEPS_VARIABLE = "TRIMARAN_PROOF_STEPS"


def proof_steps(usual: int) -> int:
    """Return how many steps a comparison of layouts trains: `usual`, or more where somebody wants the whole proof."""
    return max(usual, int(os.environ.get(STEPS_VARIABLE, "0")))


LLAMA: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 24,
    "vocab_size": 263,
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "tie_embeddings": False,
    "init_std": 0.2,
}
GPT: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 16,
    "num_heads": 4,
    "ffn_hidden_size": 24,
    "vocab_size": 263,
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "bias": True,
    "tie_embeddings": True,
    "init_std": 0.2,
}
DROPOUT = {"embedding_dropout": 0.1, "hidden_dropout": 0.1, "attention_dropout": 0.1}

Result = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """One case: the parallel section, the model, and what else differs."""

    name: str
    parallel: dict[str, Any]
    model: dict[str, Any] = field(default_factory=lambda: LLAMA)
    zero_stage: int = 1
    shard_size: int | None = None
    recompute: str = "none"
    dtype: str = "float64"
    shared_memory: bool = True
    p2p_groups: bool = False  # as on NCCL: a group for each direction of a link instead of a tag
    global_batch_size: int = 4
    num_steps: int = SHORT_STEPS

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return make_spec(self).world_size

    def in_one_process(self) -> "Layout":
        """The run that this one is compared with; the same for all layouts that must agree with each other."""
        return Layout(
            "one-process",
            {},
            self.model,
            dtype=self.dtype,
            global_batch_size=self.global_batch_size,
            num_steps=self.num_steps,
        )

    def options(self) -> frozenset[str]:
        """The options that are on, for counting which pairs of them the layouts cover."""
        parallel, model = self.parallel, self.model
        on = {axis: parallel.get(axis, 1) > 1 for axis in ("tp", "pp", "dp", "ep")}
        on |= {
            "virtual_stages": parallel.get("virtual_stages", 1) > 1,
            "sequence_parallel": parallel.get("sequence_parallel", False),
            "uneven_heads": parallel.get("uneven_heads", False),
            "uneven_layers": parallel.get("layers_per_stage") is not None,
            "zero0": self.zero_stage == 0,
            "zero2": self.zero_stage == 2,
            "zero3": self.zero_stage == 3,
            "shard_size": self.shard_size is not None,
            "recompute": self.recompute != "none",
            "without_shared_memory": not self.shared_memory,
            "p2p_groups": self.p2p_groups,
            "tied": model.get("tie_embeddings", False),
            "dropout": any(model.get(name, 0) for name in DROPOUT),
            "experts": "num_experts" in model,
            "encoder": "objective" in model,
        }
        return frozenset(name for name, is_on in on.items() if is_on)


def full(layouts: Sequence[Layout], names: Iterable[str]) -> list[Layout]:
    """Return the layouts, those named with FULL_STEPS."""
    names = set(names)
    assert names <= {layout.name for layout in layouts}
    return [replace(layout, num_steps=FULL_STEPS) if layout.name in names else layout for layout in layouts]


def make_spec(layout: Layout) -> RunSpec:
    return parse_spec(
        {
            "model": layout.model,
            "parallel": layout.parallel,
            # Small buckets: several a stage.
            "zero": {"stage": layout.zero_stage, "shard_size": layout.shard_size, "bucket_size_mib": 0.01},
            "data": {
                "tokenizer_vocab_size": 258,
                "mask_fraction": None if layout.model.get("objective") is None else 0.25,
            },
            "optimizer": {"lr": 3e-3, "max_grad_norm": 1.0},
            "precision": {"dtype": layout.dtype},
            "train": {
                "num_steps": layout.num_steps,
                "global_batch_size": layout.global_batch_size,
                "micro_batch_size": 1,
                "seq_len": 16,
                "recompute": layout.recompute,
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


def train_on_rank(layout: Layout) -> Result:
    """Train; return losses, norms, a held-out loss, and this rank's shards of gradients and parameters."""
    spec = make_spec(layout)
    parallel = spec.parallel
    sizes = {axis: getattr(parallel, axis) for axis in ("pp", "dp", "cp", "tp", "ep")}
    has_tags = not layout.p2p_groups
    options = {"shared_memory": layout.shared_memory, "has_tags": has_tags, "placement": placement_of(spec)}
    mesh = build_mesh(**sizes, shard_size=spec.zero.shard_size, timeout_s=100, **options)
    assert bool(mesh.p2p_groups) == layout.p2p_groups
    assert all((group.shared is not None) == layout.shared_memory for group in (mesh.tp, mesh.dp) if group.size > 1)
    train_context = build_train_context(spec, mesh, torch.device("cpu"))
    losses, norms = [], []
    for step in range(layout.num_steps):
        batches = make_batches(spec, step, mesh.dp.rank, mesh.dp.size)
        sums = accumulate(train_context, batches, train_context.target_tokens_per_step).tolist()
        gradients = gradients_of(train_context) if step == layout.num_steps - 1 else {}
        result = finish_step(train_context, sums, 3e-3, train_context.target_tokens_per_step)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    batches = range(2 if layout.num_steps == FULL_STEPS else 1)
    held_out = evaluate(train_context, [make_batches(spec, 1000 + i, mesh.dp.rank, mesh.dp.size) for i in batches])
    parameters = parameters_of(train_context)
    mesh.close()
    return {"losses": losses, "norms": norms, "held_out": held_out, "parameters": parameters, "gradients": gradients}


def parameters_of(train_context: TrainContext) -> dict[str, tuple[torch.Tensor, Any]]:
    """This rank's parameters and their shards by name, as a forward pass has them. Collective over dp."""
    found = {}
    for stage in train_context.stages.values():
        for block, parameters in stage.blocks().items():
            train_context.optimizer.before_forward(block)
            found |= {name: (each.detach().clone(), info_of(each).shard) for name, each in parameters.items()}
    return found


def gradients_of(train_context: TrainContext) -> dict[str, list[Any]]:
    """The reduced gradients of the owned slices, before the step changes the weights.

    Returns: parameter name -> [(local shape, shard, start, values)].
    """
    found: dict[str, list[Any]] = {}
    for piece in train_context.optimizer.gradient_pieces():
        found.setdefault(piece.name, []).append((piece.local_shape, piece.spec, piece.start, piece.data.clone()))
    return found


def train_all_on_rank(layouts: list[Layout]) -> list[Result]:
    """This rank's results of layouts of one world size, one after the other."""
    results = []
    for layout in layouts:
        try:
            results.append(train_on_rank(layout))
        except Exception as error:
            error.add_note(f"in the layout {layout.name}")
            raise
    return results


_REFERENCES: dict[str, Result] = {}


def references_of(layouts: Sequence[Layout], pool: RankPool) -> list[Result]:
    """The runs of one process that the layouts are compared with, each made once a session."""
    return [reference_of(json.dumps(vars(layout.in_one_process()), sort_keys=True), pool) for layout in layouts]


def reference_of(key: str, pool: RankPool) -> Result:
    """The run of the layout that is described by the key."""

    def train(layout: str) -> Result:
        alone = Layout(**json.loads(layout))
        record_steps([alone])
        ((result,),) = pool.run(train_all_on_rank, 1, [alone])
        return result

    if key not in _REFERENCES:
        _REFERENCES[key] = made_once(train, key)
    return _REFERENCES[key]


def record_steps(layouts: Iterable[Layout]) -> None:
    """Count the steps for the bound of the whole session."""
    for layout in layouts:
        counting.record("parity step", layout.name, layout.num_steps)


def results_of(layouts: Sequence[Layout], pool: RankPool) -> list[list[Result] | RankFailed]:
    """Every layout's results by rank, or how its ranks failed. The layouts have one world size."""
    (world_size,) = {layout.world_size for layout in layouts}
    record_steps(layouts)
    try:
        by_rank = pool.run(train_all_on_rank, world_size, list(layouts))
        return [list(results) for results in zip(*by_rank, strict=True)]
    except RankFailed as error:
        if len(layouts) == 1:
            return [error]
    return [each for layout in layouts for each in results_of([layout], pool)]  # to name every layout that fails


MOST_LAYOUTS = 6
"""Layouts of one test: more would take it over half a minute."""


def by_world_size(layouts: Iterable[Layout]) -> dict[str, list[Layout]]:
    """The layouts that can run in the same ranks, in parts of MOST_LAYOUTS."""
    found: dict[int, list[Layout]] = {}
    for layout in layouts:
        found.setdefault(layout.world_size, []).append(layout)
    return {
        f"{size} ranks, {first}": alike[first : first + MOST_LAYOUTS]
        for size, alike in sorted(found.items())
        for first in range(0, len(alike), MOST_LAYOUTS)
    }


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


def assert_equal(results: list[Result], reference: Result) -> None:
    """Compare losses, norms, the held-out loss, and every gradient and parameter with those of one process."""
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


def assert_all_train_like_one_process(
    layouts: Sequence[Layout], pool: RankPool, compare: Callable[[list[Result], Result], None] = assert_equal
) -> None:
    """Compare each layout, all of one world size, with one process; the error names every layout that differs."""
    problems = []
    references = references_of(layouts, pool)
    for layout, reference, results in zip(layouts, references, results_of(layouts, pool), strict=True):
        try:
            if isinstance(results, RankFailed):
                raise results
            compare(results, reference)
        except (AssertionError, RankFailed) as error:
            problems.append(f"{layout.name}: {error}")
    assert not problems, f"{len(problems)} of {len(layouts)} layouts\n" + "\n".join(problems)
