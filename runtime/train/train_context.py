"""TrainContext: everything one rank holds to train, built from a run spec and a mesh; and the step it repeats."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimaran.kernels.dispatch import KernelSet, choose_kernels
from trimaran.models.adapter import AdapterPlan, adapt, draw_adapters, draw_frozen
from trimaran.models.batch import Microbatch
from trimaran.models.criterion import Criterion
from trimaran.models.parallel.group import all_reduce
from trimaran.models.parallel.low_rank import LowRankOptions
from trimaran.models.parallel.parameter import LayerContext, draw
from trimaran.models.recompute import Droppable
from trimaran.models.transformer import Stage, build_stages, in_eval_mode, model_dtype
from trimaran.runtime.checkpoint.base import Base
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.optimizer.adamw import AdamWSettings
from trimaran.runtime.pipeline.action import Action, actions_of
from trimaran.runtime.pipeline.executor import Executor
from trimaran.runtime.pipeline.partition import stage_layers
from trimaran.runtime.pipeline.passes import add_communication, validate
from trimaran.runtime.pipeline.schedule import (
    Placement,
    Schedule,
    forward_only,
    round_robin,
    stages_of_rank,
)
from trimaran.runtime.pipeline.transport import P2PTransport
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.metrics import DIVERGED
from trimaran.runtime.train.pipeline import schedule_of
from trimaran.runtime.zero.optimizer import ShardedOptimizer, clip_factor
from trimaran.runtime.zero.protocol import Optimizer


@dataclass(frozen=True, eq=False)
class TrainContext:
    """Everything one rank holds to train.

    Args:
        stages: stage index -> stage, of this rank.
        schedule: the validated training schedule of all pipeline ranks, with communication; the executor runs this one.
        target_tokens_per_step: tokens that a step predicts, over all ranks, where every row predicts as many.
        criterion: makes the loss; None for the tokens' cross entropy.
        base: the frozen weights beside which adapters are trained.
    """

    spec: RunSpec
    mesh: Mesh
    stages: dict[int, Stage]
    schedule: Schedule
    executor: Executor
    evaluator: Executor
    optimizer: Optimizer
    target_tokens_per_step: int
    criterion: Criterion | None = None
    base: Base | None = None


@dataclass(frozen=True)
class StepResult:
    """Result of one step, the same on all ranks.

    Args:
        loss: mean over the predicted tokens.
        grad_norm: before clipping.
        stop: whether any rank requested a stop.
        load_balancing_loss: unweighted mean over layers and sequences: 1 where all experts are used equally; None
            without experts.
        statistics: name -> mean over the step's losses, of a criterion.
    """

    loss: float
    grad_norm: float
    stop: bool
    load_balancing_loss: float | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)


class TrainingDiverged(RuntimeError):
    """The loss or the gradient norm of a step is not finite."""


def kernels_of(spec: RunSpec, device: torch.device) -> tuple[KernelSet, str]:
    """Return the kernels that the run uses on `device`, and a description of the choice.

    Raises ValueError where the spec's choice can't run.
    """
    return choose_kernels(spec.kernels.backend, device, model_dtype(spec.precision.dtype), spec.transformer.head_dim)


def build_mesh_of(spec: RunSpec, **options: Any) -> Mesh:
    """Return the mesh of the run's layout. Collective over the world.

    Args:
        options: those of `build_mesh` that the layout does not decide.
    """
    parallel = spec.parallel
    return build_mesh(
        pp=parallel.pp,
        dp=parallel.dp,
        cp=parallel.cp,
        tp=parallel.tp,
        ep=parallel.ep,
        shard_size=spec.zero.shard_size,
        timeout_s=spec.launcher.timeout_s,
        tied_embedding=spec.transformer.ties_head,
        **options,
    )


def build_stages_of_rank(
    spec: RunSpec,
    mesh: Mesh,
    device: torch.device,
    *,
    draws_weights: bool = True,
    draws_adapters: bool = True,
    without_storage: bool = False,
    placement: Placement | None = None,
    adapters: AdapterPlan | None = None,
) -> dict[int, Stage]:
    """Build this rank's stages, stage index -> stage. No communication.

    Args:
        adapters: freezes the parameters and adds adapters; without it a run with adapters has all weights in its
            layers, as an evaluation needs them.
        placement: stage -> pipeline rank; by default the stages go round the ranks.
        draws_weights: whether to draw initial weights; False where weights are loaded next.
        draws_adapters: whether to draw what learns beside frozen weights.
        without_storage: whether the parameters that learn get no memory, and no weights, yet.
    """
    parallel = spec.parallel
    dtype = model_dtype(spec.precision.dtype)
    kernels, _ = kernels_of(spec, device)
    sequence_parallel = parallel.sequence_parallel and mesh.tp.size > 1
    context = LayerContext(
        mesh.tp,
        sequence_parallel,
        dtype,
        device,
        kernels,
        deterministic=spec.kernels.deterministic,
        ep=mesh.ep,
        recompute=spec.train.recompute_every,
        droppable=Droppable(is_on=spec.train.recompute == "selective"),
        without_storage=without_storage if adapters is None else adapters.is_quantized,
    )
    layers = stage_layers(spec.transformer, spec.train.seq_len, spec.num_stages, parallel.layers_per_stage)
    mine = stages_of_rank(placement or round_robin(mesh.pp.size, parallel.virtual_stages), mesh.pp.rank)
    draws = draws_weights and not context.without_storage and adapters is None
    stages = build_stages(spec.transformer, layers, mine, context, seed=spec.seed, draws_weights=draws)
    if adapters is not None:
        for stage in stages:
            adapt(stage, adapters, without_storage=without_storage)
            if draws_weights and device.type != "meta":
                draw_frozen(stage, spec.seed)
            if draws_adapters and not without_storage and device.type != "meta":
                draw_adapters(stage, spec.seed)
    return dict(zip(mine, stages, strict=True))


def adapter_plan(spec: RunSpec) -> AdapterPlan | None:
    """Return the adapters that the run trains, None where it trains all weights."""
    settings = None if spec.finetune is None else spec.finetune.adapter
    if settings is None:
        return None
    options = LowRankOptions(settings.rank, settings.scale, settings.dropout, spec.seed)
    return AdapterPlan(options, tuple(settings.targets), settings.base == "nf4")


def build_train_context(
    spec: RunSpec,
    mesh: Mesh,
    device: torch.device,
    *,
    draws_weights: bool = True,
    draws_adapters: bool = True,
    criterion: Criterion | None = None,
) -> TrainContext:
    """Build stages with initial weights, the validated schedule, executors and the optimizer.

    No communication, except with zero.backend deepspeed: then collective over the world.

    Args:
        draws_weights: whether to draw initial weights; False where weights are loaded next, and for tensors without
            numbers.
        draws_adapters: whether to draw what learns beside frozen weights, in a run that has those.
        criterion: makes the loss; None for the tokens' cross entropy.
    """
    schedule = add_communication(schedule_of(spec))
    evaluation = add_communication(forward_only(schedule.placement, spec.num_microbatches))
    for each in (schedule, evaluation):
        validate(each, num_stages=spec.num_stages, num_microbatches=spec.num_microbatches)
    is_native = spec.zero.backend == "native"
    shards_parameters = is_native and spec.zero.stage == 3 and mesh.sharding.shard.size > 1
    plan = adapter_plan(spec)
    stages = build_stages_of_rank(
        spec,
        mesh,
        device,
        draws_weights=draws_weights,
        draws_adapters=draws_adapters,
        without_storage=shards_parameters,
        placement=schedule.placement,
        adapters=plan,
    )
    for stage in stages.values():
        stage.criterion = criterion if stage.is_last else None
    context = next(iter(stages.values())).context
    draws = draws_weights if plan is None else draws_adapters
    drawing = partial(draw, seed=spec.seed) if draws else lambda name, parameter: None
    actions = actions_of(schedule.actions[mesh.pp.rank])
    optimizer = build_optimizer(spec, stages, mesh, actions, drawing if shards_parameters else None)
    transport = P2PTransport.of(mesh, schedule.placement, spec.transformer, context)
    weight = 1.0 / spec.target_tokens_per_step
    executor = Executor(
        stages, schedule.actions[mesh.pp.rank], transport, loss_weight=weight * _gradient_factor(spec, mesh)
    )
    evaluator = Executor(stages, evaluation.actions[mesh.pp.rank], transport, loss_weight=weight)
    targets = spec.target_tokens_per_step
    return TrainContext(spec, mesh, stages, schedule, executor, evaluator, optimizer, targets, criterion)


def _gradient_factor(spec: RunSpec, mesh: Mesh) -> int:
    """Return what losses are multiplied by: DeepSpeed averages gradients over dp, where our own optimizer sums."""
    return 1 if spec.zero.backend == "native" else mesh.dp.size


def build_optimizer(
    spec: RunSpec,
    stages: dict[int, Stage],
    mesh: Mesh,
    actions: Iterable[Action],
    drawing: Callable[[str, nn.Parameter], None] | None,
) -> Optimizer:
    """Return the optimizer of this rank's stages. With zero.backend deepspeed collective over the world.

    Args:
        actions: this rank's list of a step.
        drawing: fills a parameter by its name, where the stages have no storage yet.

    Raises:
        RuntimeError: zero.backend is deepspeed, and the package is missing or too old.
    """
    beta1, beta2 = spec.optimizer.betas
    settings = AdamWSettings(beta1, beta2, spec.optimizer.eps, spec.optimizer.weight_decay)
    bucket_bytes = int(spec.zero.bucket_size_mib * 2**20)
    if spec.zero.backend == "deepspeed":
        from trimaran.runtime.zero.deepspeed_backend import DeepSpeedOptimizer
        from trimaran.runtime.zero.deepspeed_setup import DeepSpeedOptions
        from trimaran.runtime.zero.deepspeed_stage3 import DeepSpeedStage3

        folder, timeout_s = extensions_of(spec), spec.launcher.timeout_s
        options = DeepSpeedOptions(spec.zero.stage, bucket_bytes, spec.zero.offload, timeout_s, folder)
        kind = DeepSpeedStage3 if spec.zero.stage == 3 else DeepSpeedOptimizer
        return kind(stages, mesh, settings, options)
    return ShardedOptimizer(
        stages,
        mesh,
        settings,
        zero_stage=spec.zero.stage,
        bucket_bytes=bucket_bytes,
        num_microbatches=spec.num_microbatches,
        actions=actions,
        draw=drawing,
    )


def extensions_of(spec: RunSpec) -> Path:
    """Return the folder of what a run compiles."""
    return Path(spec.train.output_dir) / "extensions"


def train_step(
    train_context: TrainContext,
    batches: Sequence[Microbatch],
    lr: float,
    *,
    stop: bool = False,
    num_losses: int | None = None,
) -> StepResult:
    """Run one optimizer step over the global batch. Collective over the world.

    Args:
        batches: this dp rank's microbatches of the global batch.
        stop: whether this rank requests a stop after the step; the result says whether any rank does.
        num_losses: the losses of the global batch whose mean is the step's loss: of tokens, or of what a criterion
            counts; at least 1. None: `target_tokens_per_step`. No layout, micro batch or packing changes it.

    Raises:
        TrainingDiverged: the loss or the gradient norm is not finite; the parameters are then still those of the
            previous step.
    """
    num_losses = train_context.target_tokens_per_step if num_losses is None else num_losses
    # The one device sync of a step.
    sums: list[float] = accumulate(train_context, batches, num_losses, stop=stop).tolist()
    return finish_step(train_context, sums, lr, num_losses)


def accumulate(
    train_context: TrainContext, batches: Sequence[Microbatch], num_losses: int, *, stop: bool = False
) -> Tensor:
    """Run the step's forwards and backwards and reduce the gradients. Collective over the world; waits for no device.

    Returns:
        What `finish_step` reads, summed over the world: loss, squared norm of the gradients, ranks that stop, load
            balancing loss, the criterion's statistics.
    """
    weight = 1.0 / num_losses * _gradient_factor(train_context.spec, train_context.mesh)
    with train_context.optimizer.accumulating():
        train_context.executor.run(batches, weight)
    squared_norm = train_context.optimizer.finish_gradients()
    balance = torch.stack([stage.take_load_balancing_loss() for stage in train_context.stages.values()]).sum()
    others = (squared_norm, torch.tensor(float(stop)), balance)
    return _sum_over_world(train_context, train_context.executor.loss, *others)


def finish_step(train_context: TrainContext, sums: Sequence[float], lr: float, num_losses: int) -> StepResult:
    """Take the optimizer step with what `accumulate` has returned. Collective over dp. Raises as `train_step`."""
    loss_sum, squared_norm_sum, stops, balance_sum, *statistics = sums
    loss, grad_norm = loss_sum / num_losses, math.sqrt(squared_norm_sum)
    criterion = train_context.criterion
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise TrainingDiverged(
            f"{DIVERGED} {train_context.optimizer.num_steps + 1}: loss {loss}, grad_norm {grad_norm}; "
            "lower optimizer.lr or lengthen lr_schedule.warmup_steps, and resume from the last checkpoint"
        )
    train_context.optimizer.step(lr, clip_factor(grad_norm, train_context.spec.optimizer.max_grad_norm))
    shape = train_context.spec.transformer
    num_balances = train_context.spec.train.global_batch_size * shape.num_layers
    return StepResult(
        loss,
        grad_norm,
        stops > 0,
        balance_sum / num_balances if shape.num_experts else None,
        {name: value / num_losses for name, value in zip(criterion.names, statistics, strict=True)}
        if criterion
        else {},
    )


def evaluate(train_context: TrainContext, global_batches: Sequence[Sequence[Microbatch]]) -> float:
    """Return the mean loss a predicted token over the global batches; see `evaluate_losses`."""
    return evaluate_losses(train_context, global_batches)[0]


@torch.no_grad()
def evaluate_losses(
    train_context: TrainContext, global_batches: Sequence[Sequence[Microbatch]], num_losses: int | None = None
) -> tuple[float, dict[str, float]]:
    """Return the mean loss over the global batches, and the criterion's statistics. Collective over the world.

    Args:
        global_batches: for each global batch, this dp rank's microbatches.
        num_losses: the losses of all of them; None: `target_tokens_per_step` each.
    """
    total = torch.zeros((), dtype=torch.float64, device=train_context.executor.transport.device)
    with in_eval_mode(train_context.stages.values()):
        for batches in global_batches:
            train_context.evaluator.run(batches)
            total += train_context.evaluator.loss
    loss_sum, *statistics = _sum_over_world(train_context, total).tolist()
    if num_losses is None:
        num_losses = len(global_batches) * train_context.target_tokens_per_step
    criterion = train_context.criterion
    names = criterion.names if criterion is not None else ()
    return loss_sum / num_losses, {name: value / num_losses for name, value in zip(names, statistics, strict=True)}


def _sum_over_world(train_context: TrainContext, loss: Tensor, *others: Tensor) -> Tensor:
    """Return the sums of scalars over the world, float64, by one all_reduce: loss, others, statistics.

    The loss and the statistics of the criterion are counted on one rank of each tp group.
    """
    device, criterion = train_context.executor.transport.device, train_context.criterion
    counted = [loss.to(device, torch.float64).view(1)]
    if criterion is not None:
        counted.append(criterion.take_sums().to(device, torch.float64))
    if train_context.mesh.tp.rank != 0:
        counted = [torch.zeros_like(each) for each in counted]
    scalars = [value.to(device, torch.float64).view(1) for value in others]
    return all_reduce(torch.cat([counted[0], *scalars, *counted[1:]]), train_context.mesh.world)
