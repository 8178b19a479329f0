"""The train loop, the same for one rank and for hundreds. Axes of size 1 are the general case."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch._C._distributed_c10d import Store

from trimaran.models.fields import counted
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.data.opening import opening_of
from trimaran.runtime.files import write_text
from trimaran.runtime.finetune.comparisons import Comparisons, comparisons_of
from trimaran.runtime.finetune.data.prepare import PreparedExamples
from trimaran.runtime.infer.generate import generate
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.plan.brief import MEASURED, peak_of_run
from trimaran.runtime.plan.chips import Peak
from trimaran.runtime.spec import RunSpec, describe
from trimaran.runtime.train.feed import BatchFeed, pinned
from trimaran.runtime.train.hardware import mfu
from trimaran.runtime.train.init_from import draws_weights, start_from
from trimaran.runtime.train.lr_schedule import lr_at
from trimaran.runtime.train.metrics import MetricsLogger
from trimaran.runtime.train.monitor.held import record_memory, resident_bytes, telling_memory
from trimaran.runtime.train.monitor.peak_memory import PeakMemory
from trimaran.runtime.train.monitor.timeline import record_timeline
from trimaran.runtime.train.samples import BatchSource, HeldOut, TrainingData, held_out_of, train_loader
from trimaran.runtime.train.signals import StopRequest
from trimaran.runtime.train.sinks.start import sinks_of, start_sinks
from trimaran.runtime.train.state import (
    TrainState,
    changed_fields,
    check_same_data,
    fingerprint,
    load_state,
    resume_path,
    save_state,
)
from trimaran.runtime.train.task_evaluation import TaskEvaluation
from trimaran.runtime.train.train_context import (
    StepResult,
    TrainContext,
    build_train_context,
    evaluate_losses,
    kernels_of,
    train_step,
)

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 150


def train(
    spec: RunSpec,
    mesh: Mesh,
    device: torch.device,
    data: TrainingData,
    stop: StopRequest,
    at_step: Callable[[int, bool], None] = lambda step, saves: None,
    store: Store | None = None,
) -> TrainState:
    """Train to spec.train.num_steps, or until any rank has a stop request; then save the state.

    Collective over the world.

    Args:
        stop: already installed: a signal lets every rank finish the step and save.
        at_step: called with a step's number, from 1, and whether it is saved now: at its start, and before and after
            a save.
        store: of this start, for an evaluation of tasks by several ranks.

    Returns:
        The state at the end.
    """
    path, comparisons = resume_path(spec), comparisons_of(spec, data)
    if mesh.rank == 0:
        tell_shape(spec, path)
    criterion, before = None if comparisons is None else comparisons.criterion, resident_bytes()
    draws = draws_weights(spec, path, needs_reference=comparisons is not None and comparisons.needs_reference)
    folder = Path(spec.train.output_dir)
    with telling_memory(folder, mesh, device, lambda: None, before):
        train_context = build_train_context(spec, mesh, device, draws_weights=draws, criterion=criterion)
    reference = "" if comparisons is None else comparisons.begin(train_context, resumed=path is not None)
    loader = train_loader(spec, data, mesh.dp, comparisons)
    held_out = held_out_of(spec, data, mesh.dp, comparisons)
    state = TrainState(data=fingerprint(data)) if path is None else load_state(train_context, path)
    check_same_data(state, data)
    train_context, started_from = start_from(train_context, data.tokenizer, path)
    tasks = None
    if spec.evaluation is not None:
        tasks = TaskEvaluation(spec.evaluation, train_context, data, store, lambda: stop.requested)
    with StepLog(spec, mesh, device, state, path, at_step) as log:
        log.say(f"computing on {device.type} with {kernels_of(spec, device)[1]}")
        if train_context.optimizer.description:
            log.say(train_context.optimizer.description)
        for line in filter(None, (started_from, reference)):
            log.say(line)
        if path is None:
            log.say(describe_samples(spec, loader, data))
        if state.step < spec.train.num_steps:
            log.say(f"training begins at step {state.step + 1} of {spec.train.num_steps}")
        optimizer = train_context.optimizer
        with telling_memory(folder, mesh, device, lambda: optimizer, before):
            state = run_steps(train_context, state, loader, held_out, stop, log, data, tasks, comparisons)
        log.write(MEASURED, record_memory(optimizer, mesh, device, before))
    return state


def run_steps(
    train_context: TrainContext,
    state: TrainState,
    loader: BatchSource,
    held_out: HeldOut,
    stop: StopRequest,
    log: "StepLog",
    data: TrainingData,
    tasks: TaskEvaluation | None = None,
    comparisons: Comparisons | None = None,
) -> TrainState:
    """Train from `state` to the last step, or until the ranks agree to stop; return the state there.

    Collective over the world.
    """
    spec, device, stopped = train_context.spec, train_context.executor.transport.device, False
    evaluated = [pinned(batches, device) for batches in held_out.batches]
    feed = BatchFeed(loader.microbatches, spec.train.global_batch_size, device)
    saved_step = state.step
    while state.step < spec.train.num_steps and not stopped:
        log.at_step(state.step + 1, False)
        consumed = state.consumed_samples
        batches, num_losses = feed.at(consumed), loader.num_losses(consumed)
        lr = lr_at(state.step, base_lr=spec.optimizer.lr, section=spec.lr_schedule, num_steps=spec.train.num_steps)
        if comparisons is not None:
            comparisons.before_step(train_context, loader, consumed)
        result = train_step(train_context, batches, lr, stop=stop.requested, num_losses=num_losses)
        state, stopped = state.after_step(spec), result.stop
        log.step(state, result, lr, loader.num_tokens(consumed), num_losses)
        if evaluated and (due(state.step, spec.train.eval_interval) or state.step == spec.train.num_steps):
            if comparisons is not None:
                comparisons.before_evaluation(train_context, held_out.members)
            log.evaluation(state, *evaluate_losses(train_context, evaluated, held_out.num_losses))
        if tasks is not None and tasks.is_due(state.step):
            scores = None if stopped else tasks.scores(state.step, state.tokens_seen)
            log.scores(state, scores, tasks.told)
            stopped = scores is None
        if due(state.step, spec.checkpoint.interval) or state.step == spec.train.num_steps or stopped:
            log.at_step(state.step, True)
            if stopped:
                log.say(f"saving step {state.step}")
            save_state(train_context, state)
            log.at_step(state.step, False)
            saved_step = state.step
        log.restart_clock()
    feed.close()
    assert saved_step == state.step, "a run that ends has saved its last step"
    # On a GPU the host's clock around an action would measure kernel launches, not kernels.
    if train_context.executor.spans and spec.logging.timeline and device.type == "cpu":
        log.write("timeline.json", json.dumps({"step": state.step, **record_timeline(train_context)}))
    # Not `stop.requested`, which is local to this rank: the sample is collective, so all ranks must skip it or none.
    if not stopped and spec.transformer.is_causal and spec.transformer.has_head:
        log.write("sample.txt", sample(train_context, data))
    return state


def tell_shape(spec: RunSpec, resumed: Path | None) -> None:
    """Print the model's shape, size and layout, and where its weights come from.

    The weights of a large model take a minute on a CPU, and its first step several.
    """
    told, source = dict(describe(spec)), resumed or spec.checkpoint.init_from
    print(f"model: {told['model']}, vocabulary {told['vocabulary']}")
    print(f"layout: {told['layout']}")
    sizes = f"{told['parameters']} parameters, {counted(spec.tokens_per_step, 'token')} a step"
    print(f"{sizes}: {'making the weights' if source is None else f'reading {source}'}", flush=True)


def due(step: int, interval: int) -> bool:
    """Whether an action with an interval of `interval` steps (0: never) is due after `step`."""
    return interval > 0 and step % interval == 0


def describe_samples(spec: RunSpec, loader: BatchSource, data: TrainingData) -> str:
    """Return a sentence about the samples of an epoch."""
    if isinstance(data, PreparedExamples):
        examples, learned = data.train.num_examples, int(data.train.num_learned.sum())
        rows = counted(loader.num_samples, "row")
        share = int(data.train.example_lengths.sum()) / (loader.num_samples * spec.train.seq_len)
        return (
            f"{counted(examples, 'example')} in {rows} of {spec.train.seq_len} tokens, {share:.1%} of them filled; "
            f"{counted(learned, 'token')} to learn"
        )
    return (
        f"{counted(loader.num_samples, 'sample')} of {counted(spec.train.seq_len, 'token')} "
        f"({counted(loader.unused_tail_tokens, 'token')} at the end fill none)"
    )


def sample(train_context: TrainContext, data: TrainingData) -> str:
    """Return the trained model's continuation of the held-out text's first words. Collective over the world.

    Where it learns from examples, the prompt is that of a held-out example, or else of the first.
    """
    if isinstance(data, PreparedExamples):
        return sample_answer(train_context, data)
    prompt = data.tokenizer.encode(opening_of(data))
    prompt = prompt[: train_context.spec.transformer.max_seq_len] or [data.tokenizer.eot_id]
    return _continued(train_context, data, prompt)


def sample_answer(train_context: TrainContext, data: PreparedExamples) -> str:
    """Return the prompt of an example and the model's answer. Collective over the world."""
    document = (data.held_out if data.held_out.num_examples else data.train).document(0)
    first = int(document.learned.argmax()) if document.num_learned else len(document.tokens)
    most = train_context.spec.transformer.max_seq_len
    return _continued(train_context, data, document.tokens[:first].tolist()[-most:], (data.end_of_turn,))


def _continued(
    train_context: TrainContext, data: TrainingData, prompt: list[int], stop_tokens: tuple[int, ...] = ()
) -> str:
    seed = train_context.spec.seed
    sampling = SamplingParams(SAMPLE_TOKENS, temperature=0.8, top_k=40, seed=seed, stop_tokens=stop_tokens)
    context, placement = train_context, train_context.schedule.placement
    (completion,) = generate(context.stages, context.mesh, context.spec, [prompt], sampling, placement=placement)
    return data.tokenizer.decode(prompt + completion.tokens)


class StepLog:
    """Reports the run. On rank 0: metrics, the live line, files of the run folder. On every rank: the current step."""

    def __init__(
        self,
        spec: RunSpec,
        mesh: Mesh,
        device: torch.device,
        state: TrainState,
        resumed: Path | None,
        at_step: Callable[[int, bool], None],
    ) -> None:
        self._at_step = at_step
        self._spec, self._folder, self._world_size = spec, Path(spec.train.output_dir), mesh.world_size
        # Forward and gradients of inputs: beside adapters those of the weights are a third that is not computed.
        share = 1.0 if spec.finetune is None or spec.finetune.adapter is None else 2 / 3
        self._flops_per_token = spec.transformer.flops_per_token(spec.train.seq_len) * share
        self._peak: Peak | None = None
        if device.type == "cuda":
            self._peak = peak_of_run(self._folder, torch.cuda.get_device_name(device), spec.precision.dtype)
        self._memory = PeakMemory(mesh, device)
        self._metrics: MetricsLogger | None = None
        if mesh.rank == 0:
            self._metrics = MetricsLogger(
                self._folder,
                num_steps=spec.train.num_steps,
                resume_step=state.step,
                interval=spec.logging.interval,
                tensorboard=spec.logging.tensorboard or "tensorboard" in sinks_of(spec),
                sinks=start_sinks(spec, state.step),
                peak="" if self._peak is None else self._peak.words,
            )
            if self._peak is not None:
                self.say(f"MFU: {self._peak.words}" + f" ({self._peak.source})" * bool(self._peak.source))
            if resumed is not None:
                changes = changed_fields(Checkpoint.open(resumed, verify=False), spec)
                finished = "; nothing is left to train" if state.step >= spec.train.num_steps else ""
                self.say("\n  ".join([f"resuming at step {state.step} from {resumed}{finished}", *changes]))
            self._metrics.log_time(step=state.step, name="started_at", seconds=time.time())
        self.restart_clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._metrics is not None:
            self._metrics.close(failed=exception[0] is not None)

    def restart_clock(self) -> None:
        """Restart the timing of the next step, so that evaluations and checkpoints don't count as step time."""
        self._start = self._since = time.perf_counter()
        self._saving = False

    def at_step(self, step: int, saves: bool) -> None:
        """Tell the step, from 1, and whether it is saved now; how long a save took is logged."""
        if self._saving:
            self._log_time(step, "save_s")
        self._since, self._saving = time.perf_counter(), saves
        self._at_step(step, saves)

    def _log_time(self, step: int, name: str) -> None:
        """Log the seconds since the end of what was timed before."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._do(lambda metrics: metrics.log_time(step=step, name=name, seconds=seconds))

    def step(
        self,
        state: TrainState,
        result: StepResult,
        lr: float,
        num_tokens: int,
        num_losses: int | None = None,
        more: Mapping[str, float | None] = MappingProxyType({}),
    ) -> None:
        """Log a finished step. Collective over the world.

        Args:
            num_tokens: of its global batch, without padding.
            num_losses: whose mean its loss is; None where every step has as many.
            more: further columns of its row.
        """
        self._since = time.perf_counter()
        seconds = self._since - self._start
        tokens_per_second = num_tokens / seconds
        counts = {} if num_losses is None else {"num_losses": float(num_losses)}
        peak = None if self._peak is None else self._peak.flops
        if peak is not None:
            counts["peak_flops"] = peak
        self._memory.after_step()
        self._do(
            lambda metrics: metrics.log(
                step=state.step,
                loss=result.loss,
                lr=lr,
                grad_norm=result.grad_norm,
                tokens_seen=state.tokens_seen,
                tokens_per_second=tokens_per_second,
                step_time_ms=seconds * 1e3,
                mfu=mfu(tokens_per_second, self._flops_per_token, peak, self._world_size),
                load_balancing_loss=result.load_balancing_loss,
                more={**counts, **result.statistics, **more, **self._memory.columns()},
            )
        )

    def evaluation(self, state: TrainState, held_out_loss: float, statistics: Mapping[str, float]) -> None:
        """Log an evaluation."""
        self._log_time(state.step, "evaluation_s")
        self._do(
            lambda metrics: metrics.log_evaluation(step=state.step, held_out_loss=held_out_loss, statistics=statistics)
        )

    def scores(self, state: TrainState, scores: Mapping[str, float | None] | None, told: str) -> None:
        """Log an evaluation of tasks, None for one that was left; `told` belongs beside the scores."""
        if scores is None:
            self.say(
                f"step {state.step}: the tasks are not evaluated, for the run was asked to stop; trimaran evaluate"
            )
        else:
            self._log_time(state.step, "evaluation_s")
            self._do(lambda metrics: metrics.log_scores(step=state.step, scores=scores, told=told))

    def say(self, text: str) -> None:
        """Print a line."""
        self._do(lambda metrics: metrics.say(text))

    def write(self, name: str, text: str) -> None:
        """Write a file of the run folder."""
        self._do(lambda metrics: write_text(self._folder / name, text))

    def _do(self, action: Callable[[MetricsLogger], object]) -> None:
        if self._metrics is not None:
            action(self._metrics)
