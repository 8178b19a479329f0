"""What a rank does with a model of transformers: apart from its tests, so that ranks need not import transformers."""

from typing import Any

import torch
from torch import Tensor

from trimaran.models.batch import Microbatch
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.group import receive, send
from trimaran.models.parallel.shard import ShardSpec
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.train_context import TrainContext, build_train_context

Tensors = dict[str, Tensor]


def make_spec(config: TransformerConfig, parallel: dict[str, Any], batch: Microbatch) -> RunSpec:
    return parse_spec(
        {
            "model": config.model_dump(exclude_unset=True),
            "parallel": parallel,
            "data": {"tokenizer": "tokenizer.json"},
            "optimizer": {"lr": 1e-3},
            "precision": {"dtype": "float64"},
            "train": {
                "num_steps": 1,
                "global_batch_size": len(batch.tokens),
                "micro_batch_size": 1,
                "seq_len": batch.tokens.shape[1],
            },
        }
    )


def steps_on_rank(
    parallel: dict[str, Any], models: list[tuple[TransformerConfig, Tensors]], batch: Microbatch
) -> list[dict[str, Any]]:
    """For each model this rank's logits, loss, and pieces of the gradients of the summed loss."""
    sizes = {axis: parallel.get(axis, 1) for axis in ("pp", "dp", "tp", "ep")}
    mesh = build_mesh(**sizes, cp=1, timeout_s=100)
    try:
        return [step(make_spec(config, parallel, batch), mesh, weights, batch) for config, weights in models]
    finally:
        mesh.close()


def step(spec: RunSpec, mesh: Mesh, weights: Tensors, batch: Microbatch) -> dict[str, Any]:
    train_context = build_train_context(spec, mesh, torch.device("cpu"))

    def read(name: str, key: str, shard: ShardSpec, local_shape: tuple[int, ...]) -> Tensor:
        local = torch.zeros(local_shape, dtype=torch.float64)
        box = shard.box(local_shape)
        local[tuple(slice(0, high - low) for low, high in box)] = weights[name][
            tuple(slice(low, high) for low, high in box)
        ]
        return local

    for stage in train_context.stages.values():
        stage.load(read)
    logits = logits_on_rank(train_context, mesh, batch.tokens)
    mine = range(mesh.dp.rank, len(batch.tokens), mesh.dp.size)
    with train_context.optimizer.accumulating():
        train_context.executor.run([Microbatch(batch.tokens[i : i + 1], batch.labels[i : i + 1], i) for i in mine])
    train_context.optimizer.finish_gradients()
    pieces = [
        (
            piece.name,
            piece.spec,
            piece.local_shape,
            piece.start,
            piece.data.clone() * train_context.target_tokens_per_step,
        )
        for piece in train_context.optimizer.gradient_pieces()
    ]
    loss = float(train_context.executor.loss)
    return {"logits": logits, "dp": mesh.dp.rank, "column": mesh.tp.rank, "loss": loss, "pieces": pieces}


@torch.no_grad()
def logits_on_rank(train_context: TrainContext, mesh: Mesh, tokens: Tensor) -> Tensor | None:
    """The last stage's columns of the logits of all samples."""
    ((index, stage),) = train_context.stages.items()
    hidden = None
    if index > 0:
        parts = mesh.tp.size if stage.context.sequence_parallel else 1
        shape = (len(tokens), tokens.shape[1] // parts, train_context.spec.transformer.hidden_size)
        hidden = receive(torch.empty(shape, dtype=torch.float64), index - 1, mesh.pp)
    hidden = stage.run_layers(hidden, tokens)
    if stage.is_last:
        return stage.logits(hidden)
    send(hidden, index + 1, mesh.pp)
    return None
