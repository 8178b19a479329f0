"""The loop of learning from rewards: sample a rollout, reward it, and take its optimizer steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from trimaran.models.fields import counted
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.finetune.rl.batches import Rows
from trimaran.runtime.finetune.rl.criterion import PolicyLoss, PolicySettings
from trimaran.runtime.finetune.rl.journal import Journal
from trimaran.runtime.finetune.rl.prompts import PromptSet, check_lengths
from trimaran.runtime.finetune.rl.recording import ForwardOnly, Recorder, share_of
from trimaran.runtime.finetune.rl.reference import build_reference
from trimaran.runtime.finetune.rl.reward.reward_run import RewardModels
from trimaran.runtime.finetune.rl.reward.rewards import Scoring, check_fields, parse_rewards
from trimaran.runtime.finetune.rl.rollout import Rollout, Sampler
from trimaran.runtime.finetune.rl.targets import (
    Recorded,
    is_on_policy,
    mean_of,
    minibatches_of,
    num_losses,
    targets_of,
)
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.spec.sections.finetune import RLSettings
from trimaran.runtime.train.init_from import draws_weights, start_from
from trimaran.runtime.train.loop import StepLog, tell_shape
from trimaran.runtime.train.lr_schedule import lr_at
from trimaran.runtime.train.signals import StopRequest
from trimaran.runtime.train.state import TrainState, load_state, resume_path, save_state
from trimaran.runtime.train.train_context import (
    StepResult,
    TrainContext,
    accumulate,
    build_train_context,
    finish_step,
    kernels_of,
    train_step,
)

LARGEST_GAP: Final = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 0.25, "float16": 0.05}
"""How far a ratio of probabilities may be from 1 before the first update, by precision.dtype."""


class RatioError(RuntimeError):
    """The policy that has sampled and the one that is trained differ before the first update."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the loop reads.

    Args:
        stop_tokens: ids that end an answer.
        data: digest of the prompts, which a resumed run must have again.
    """

    prompts: PromptSet
    tokenizer: Tokenizer
    stop_tokens: Sequence[int]
    data: str


def steps_per_rollout(settings: RLSettings) -> int:
    """Return the optimizer steps of one rollout."""
    return settings.epochs * settings.minibatches


def settings_of(spec: RunSpec) -> RLSettings:
    """Return finetune.rl of a run of method rl."""
    assert spec.finetune is not None, "a run of method rl"
    assert spec.finetune.rl is not None, "a rule of the spec"
    return spec.finetune.rl


def loss_of(settings: RLSettings) -> PolicyLoss:
    """Return the loss of a run's answers."""
    is_ppo = settings.algorithm == "ppo"
    told = ["tokens", "clipped", "entropy", "old_kl", *(["kl"] if settings.kl > 0 else [])]
    return PolicyLoss(
        PolicySettings(
            settings.temperature,
            settings.clip_low,
            settings.clip_high,
            0.0 if is_ppo else settings.kl,  # ppo has it in the rewards
            settings.value_coef,
        ),
        [*told, *(["value_loss"] if is_ppo else [])],
    )


def train_on_rewards(
    spec: RunSpec,
    mesh: Mesh,
    device: torch.device,
    inputs: Inputs,
    stop: StopRequest,
    at_step: Callable[[int, bool], None] = lambda step, saves: None,
) -> TrainState:
    """Train to spec.train.num_steps, or until any rank has a stop request; then save. Collective over the world.

    A checkpoint is taken between rollouts alone, so a rollout that was cut short is sampled again, with the same
    numbers.

    Args:
        stop: already installed: a signal lets every rank finish the rollout and save.
        at_step: as in `train`.

    Returns:
        The state at the end.

    Raises:
        RewardError: a reward can't be computed.
        RatioError: before the first update a ratio is not 1.
    """
    settings = settings_of(spec)
    items = parse_rewards(settings.rewards)
    check_lengths(inputs.prompts, spec.train.seq_len, settings.max_new_tokens)
    check_fields(items, inputs.prompts.records)
    path = resume_path(spec)
    draws = draws_weights(spec, path)
    if mesh.rank == 0:
        tell_shape(spec, path)
    context = build_train_context(spec, mesh, device, draws_weights=draws, criterion=loss_of(settings))
    state = TrainState(data=inputs.data) if path is None else load_state(context, path)
    if state.data != inputs.data:
        raise ValueError(
            f"the prompts of data.source have changed since the checkpoint of step {state.step}; put the files back, "
            "or choose another train.output_dir for a new run"
        )
    context, started_from = start_from(context, inputs.tokenizer, path)
    reference = build_reference(context, inputs.tokenizer) if settings.kl > 0 else None
    with StepLog(spec, mesh, device, state, path, at_step) as log, Scoring(items, settings.reward_timeout_s) as scoring:
        log.say(f"computing on {device.type} with {kernels_of(spec, device)[1]}")
        for told in (context.optimizer.description, started_from):
            if told:
                log.say(told)
        asked = f"{counted(settings.prompts_per_step, 'prompt')} x {counted(settings.group_size, 'answer')} a rollout"
        log.say(f"{counted(len(inputs.prompts), 'prompt')}; {asked}")
        models = RewardModels(items, spec, inputs.tokenizer, mesh, device)
        sampler = Sampler(context, inputs.prompts, inputs.tokenizer, inputs.stop_tokens, settings, scoring, models)
        return RewardLoop(context, sampler, reference, inputs.prompts, log).run(state, stop)


class RewardLoop:
    """The rollouts of a run and their updates. Collective over the world.

    Args:
        reference: None without a divergence from it.
    """

    def __init__(
        self,
        context: TrainContext,
        sampler: Sampler,
        reference: ForwardOnly | None,
        prompts: PromptSet,
        log: StepLog,
    ) -> None:
        self._context, self._sampler, self._reference = context, sampler, reference
        self._prompts, self._log = prompts, log
        self._settings = settings_of(context.spec)
        self._items = parse_rewards(self._settings.rewards)
        self._is_checked = False
        assert isinstance(context.criterion, PolicyLoss)
        self._loss = context.criterion
        self._policy = ForwardOnly(context.spec, context.mesh, context.stages, context.evaluator)

    def run(self, state: TrainState, stop: StopRequest) -> TrainState:
        """Train from `state` to the last step, or until the ranks agree to stop; return the state there."""
        spec, stopped = self._context.spec, False
        per_rollout = steps_per_rollout(self._settings)
        is_first = self._context.mesh.rank == 0
        journal = Journal(Path(spec.train.output_dir), state.step // per_rollout) if is_first else None
        while state.step < spec.train.num_steps and not stopped:
            before = state.step
            self._log.at_step(state.step + 1, False)
            rollout = self._sampler.sample(state.step // per_rollout)
            state, stopped = self._update(state, rollout, stop, journal)
            interval = spec.checkpoint.interval
            is_due = interval > 0 and state.step // interval > before // interval
            if is_due or stopped or state.step >= spec.train.num_steps:
                self._log.at_step(state.step, True)
                if stopped:
                    self._log.say(f"saving step {state.step}")
                save_state(self._context, state)
                self._log.at_step(state.step, False)
            self._log.restart_clock()
        return state

    def _update(
        self, state: TrainState, rollout: Rollout, stop: StopRequest, journal: Journal | None
    ) -> tuple[TrainState, bool]:
        """Take the optimizer steps of a rollout; return the state after them, and whether any rank wants to stop."""
        settings, spec, samples = self._settings, self._context.spec, rollout.samples
        prompts = [self._prompts.tokens[sample.prompt] for sample in samples]
        rows = Rows.of(prompts, [sample.tokens for sample in samples], self._width_multiple())
        rewards = rollout.rewards(self._items)
        recorded = self._record(rows)
        checked = None if self._is_checked else recorded.log_probs
        if checked is not None:
            self._check_sampler(rows, rollout, checked)
        targets = targets_of(settings, rows, rewards, recorded)
        if journal is not None:
            journal.write(self._records(rollout, rewards, targets["advantages"], rows))
        told, stopped = _told(settings, rollout, rewards), False
        for number, chosen in enumerate(minibatches_of(settings, len(samples), rollout.number, spec.seed)):
            if number:
                self._log.at_step(state.step + 1, False)
            lr = lr_at(state.step, base_lr=spec.optimizer.lr, section=spec.lr_schedule, num_steps=spec.train.num_steps)
            extra = targets if checked is None else {**targets, "checked_log_probs": checked}
            result = self._step(rows, chosen, extra, state, lr, stop.requested, is_checked=checked is not None)
            checked, self._is_checked, stopped = None, True, stopped or result.stop
            lengths = [len(prompts[row]) + len(samples[row].tokens) for row in chosen]
            state = replace(state.after_step(spec), tokens_seen=state.tokens_seen + sum(lengths))
            self._log.step(
                state, replace(result, statistics={}), lr, sum(lengths), more={**told, **_told_of_step(result)}
            )
            self._log.restart_clock()
        return state, stopped

    def _step(
        self,
        rows: Rows,
        chosen: Sequence[int],
        extra: dict[str, Tensor],
        state: TrainState,
        lr: float,
        stop: bool,
        *,
        is_checked: bool,
    ) -> StepResult:
        """Take one optimizer step on these rows; with `is_checked` only where no ratio is off before it."""
        context, train = self._context, self._context.spec.train
        mine = share_of(0, train.global_batch_size, context.mesh)
        first = state.consumed_samples + mine[0]
        batches = rows.batches([chosen[place] for place in mine], train.micro_batch_size, first, extra)
        losses = num_losses(self._settings, rows.mask[torch.tensor(chosen)])
        if not is_checked:
            return train_step(context, batches, lr, stop=stop, num_losses=losses)
        sums: list[float] = accumulate(context, batches, losses, stop=stop).tolist()
        gaps = [float(text) for text in context.mesh.gather_text(repr(float(self._loss.largest_gap)))]
        self._refuse(max(gaps), "the forward pass of the first step and the one that recorded the policy")
        return finish_step(context, sums, lr, losses)

    def _record(self, rows: Rows) -> Recorded:
        """Return what the loss needs to know of every token before the rollout's first update."""
        settings = self._settings
        is_ppo, reference, log_probs, values = settings.algorithm == "ppo", None, None, None
        if is_ppo or not is_on_policy(settings) or not self._is_checked:
            found = self._policy.record(rows, Recorder(settings.temperature, reads_values=is_ppo))
            log_probs, values = found[0], found[1] if is_ppo else None
        if self._reference is not None:
            reference = self._reference.record(rows, Recorder(settings.temperature))[0]
        return Recorded(log_probs, values, reference)

    def _check_sampler(self, rows: Rows, rollout: Rollout, log_probs: Tensor) -> None:
        """Raise RatioError where the sampler and the training engine give an answer's token other probabilities."""
        sampled = rows.spread([sample.log_probs for sample in rollout.samples])
        gaps = torch.where(rows.mask, sampled - log_probs, 0.0).expm1().abs()
        self._refuse(float(gaps.max()), "sampling with the key-value cache and a forward pass of training")

    def _refuse(self, gap: float, between: str) -> None:
        dtype = self._context.spec.precision.dtype
        if not gap <= LARGEST_GAP[dtype]:
            raise RatioError(
                f"before the first update the ratio of a token's probabilities is {gap:.3g} away from 1, over "
                f"{LARGEST_GAP[dtype]:g} for precision.dtype {dtype}, between {between}; the loss would correct for "
                "a policy that did not sample: use precision.dtype float32, or kernels.backend torch, and report it"
            )

    def _width_multiple(self) -> int:
        return next(iter(self._context.stages.values())).context.tp.size

    def _records(
        self, rollout: Rollout, rewards: Sequence[float], advantages: Tensor, rows: Rows
    ) -> list[dict[str, Any]]:
        """Return the lines of rollouts.jsonl."""
        weights = rows.mask.double()
        means = ((advantages * weights).sum(1) / weights.sum(1)).tolist()
        group = self._settings.group_size
        return [
            {
                "rollout": rollout.number,
                "prompt": str(self._prompts.records[sample.prompt].origin),
                "sample": row % group,
                "answer": sample.text,
                "tokens": len(sample.tokens),
                "finish": sample.finish,
                "reward": rewards[row],
                "rewards": dict(sample.rewards),
                "advantage": means[row],
            }
            for row, sample in enumerate(rollout.samples)
        ]


def _told(settings: RLSettings, rollout: Rollout, rewards: Sequence[float]) -> dict[str, float | None]:
    """Return the columns of metrics.jsonl that all steps of a rollout share."""
    count, mean = len(rewards), math.fsum(rewards) / len(rewards)
    tokens = sum(len(sample.tokens) for sample in rollout.samples)
    return {
        "reward": mean,
        "reward_std": math.sqrt(math.fsum((each - mean) ** 2 for each in rewards) / count),
        "answer_tokens": tokens / count,
        "cut_share": sum(sample.finish != "stop_token" for sample in rollout.samples) / count,
    }


def _told_of_step(result: StepResult) -> dict[str, float | None]:
    """Return the columns of metrics.jsonl of one step: means over its tokens."""
    names = {"kl": "kl", "old_kl": "old_kl", "entropy": "entropy", "clip_share": "clipped", "value_loss": "value_loss"}
    return {column: mean_of(result.statistics, name) for column, name in names.items()}
