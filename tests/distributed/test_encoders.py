"""Encoders of transformers cut over TP2 x PP2: the same logits, and in one training step the same gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.ranks import RankPool
from tests.models.encoders import BATCH, PREDICTED, SEQ, STEPS, VOCAB, batch_of, make, their_gradients
from trimaran.models.batch import Microbatch
from trimaran.models.parallel.group import receive, send
from trimaran.models.parallel.shard import ShardSpec
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.train_context import TrainContext, build_train_context

Result = dict[str, Any]


def make_spec(model: dict[str, Any], parallel: dict[str, Any]) -> RunSpec:
    return parse_spec(
        {
            "model": model,
            "parallel": parallel,
            "data": {"tokenizer": "tokenizer.json", "mask_fraction": PREDICTED / SEQ},
            "optimizer": {"lr": 1e-3},
            "precision": {"dtype": "float64"},
            "train": {"num_steps": 1, "global_batch_size": BATCH, "micro_batch_size": 2, "seq_len": SEQ},
        }
    )


def step_on_rank(
    model: dict[str, Any], parallel: dict[str, Any], weights: dict[str, Tensor], tokens: Tensor, batch: Microbatch
) -> Result:
    """Load the global weights at the layout; return this rank's logits and its pieces of the gradients."""
    spec = make_spec(model, parallel)
    mesh = build_mesh(pp=spec.parallel.pp, dp=1, cp=1, tp=spec.parallel.tp, timeout_s=100)
    train_context = build_train_context(spec, mesh, torch.device("cpu"))

    def read(name: str, key: str, shard: ShardSpec, local_shape: tuple[int, ...]) -> Tensor:
        local = torch.zeros(local_shape, dtype=torch.float64)
        box = tuple(slice(low, high) for low, high in shard.box(local_shape))
        local[tuple(slice(0, high - low) for low, high in shard.box(local_shape))] = weights[name][box]
        return local

    for stage in train_context.stages.values():
        stage.load(read)
    logits = logits_on_rank(train_context, mesh, tokens)
    assert batch.targets is not None
    parts = [
        Microbatch(batch.tokens[i : i + 2], batch.labels[i : i + 2], batch.first_sample + i, batch.targets[i : i + 2])
        for i in (0, 2)
    ]
    with train_context.optimizer.accumulating():
        train_context.executor.run(parts)
    train_context.optimizer.finish_gradients()
    pieces = [
        (piece.name, piece.spec, piece.local_shape, piece.start, piece.data * train_context.target_tokens_per_step)
        for piece in train_context.optimizer.gradient_pieces()
    ]
    loss = float(train_context.executor.loss)
    mesh.close()
    return {
        "logits": logits,
        "first_column": mesh.tp.rank,
        "loss": loss,
        "pieces": [(*head, data.clone()) for *head, data in pieces],
    }


@torch.no_grad()
def logits_on_rank(train_context: TrainContext, mesh: Mesh, tokens: Tensor) -> Tensor | None:
    """The last stage's columns of the logits."""
    ((index, stage),) = train_context.stages.items()
    hidden = None
    if index > 0:
        parts = mesh.tp.size if stage.context.sequence_parallel else 1
        hidden = receive(
            torch.empty(len(tokens), SEQ // parts, train_context.spec.transformer.hidden_size, dtype=torch.float64),
            index - 1,
            mesh.pp,
        )
    hidden = stage.run_layers(hidden, tokens)
    if stage.is_last:
        return stage.logits(hidden)
    send(hidden, index + 1, mesh.pp)
    return None


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence-parallel"])
@pytest.mark.parametrize("name", STEPS)
def test_tp2_pp2_gives_the_logits_and_gradients_of_transformers(
    name: str, sequence_parallel: bool, ranks: RankPool
) -> None:
    build, objective, their_loss = STEPS[name]
    encoder, batch = make(build, torch.float64), batch_of(objective)
    tokens = torch.randint(VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_logits = encoder.theirs(input_ids=tokens).logits
    expected_loss = their_loss(encoder.theirs, batch)
    expected = their_gradients(encoder, expected_loss)
    parallel = {"tp": 2, "pp": 2, "sequence_parallel": sequence_parallel}
    model = encoder.config.model_dump(exclude_unset=True)
    results = ranks.run(step_on_rank, 4, model, parallel, encoder.weights(), tokens, batch)

    columns = [
        result["logits"]
        for result in sorted(results, key=lambda result: result["first_column"])
        if result["logits"] is not None
    ]
    # Both sides compute in float64; sums of another order differ by 1e-13 of numbers around 10.
    torch.testing.assert_close(torch.cat(columns, dim=-1)[..., :VOCAB], expected_logits, rtol=0, atol=1e-10)
    assert max(result["loss"] for result in results) == pytest.approx(expected_loss.item(), abs=1e-10)
    seen: dict[str, int] = {}
    for parameter, shard, local_shape, start, values in (piece for result in results for piece in result["pieces"]):
        box = shard.box(local_shape)
        padded = torch.zeros(local_shape, dtype=torch.float64)
        padded[tuple(slice(0, high - low) for low, high in box)] = expected[parameter][
            tuple(slice(low, high) for low, high in box)
        ]
        wanted = padded.flatten()[start : start + len(values)]
        torch.testing.assert_close(
            values, wanted, rtol=0, atol=1e-9, msg=lambda text, parameter=parameter: f"{parameter}: {text}"
        )
        seen[parameter] = seen.get(parameter, 0) + len(values)
    assert all(seen[parameter] >= gradient.numel() for parameter, gradient in expected.items()), (
        "every number's gradient was compared"
    )
