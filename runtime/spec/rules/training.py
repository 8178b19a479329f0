"""Rules of evaluation and of the learning rate over the steps."""

import math
from collections.abc import Iterator
from typing import Any, Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError, at_most
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules.table import Rules
from trimaran.runtime.train.lr_schedule import ENDING, REQUIRED_FIELDS, wsd_decay_steps

RULES: Final = Rules()


@RULES.needs("train.eval_interval", "data.held_out_fraction")
def _evaluation_has_text(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    interval = spec.train.eval_interval
    if interval > 0 and spec.data.held_out_fraction == 0:
        rule = f"eval_interval ({interval}) needs held-out text, but held_out_fraction is 0"
        fix = "set data.held_out_fraction to 0.02, or train.eval_interval to 0"
        yield FieldError("train.eval_interval", rule, interval, fix)


@RULES.needs("logging.sinks")
def _sinks_name_one(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    sinks = spec.logging.sinks
    # One that is wrong itself is missing here, and has an error of its own.
    if sinks is not None and not any(getattr(sinks, name, True) for name in type(sinks).model_fields):
        rule = "names no sink: a name with nothing behind it is null, which is off"
        yield FieldError("logging.sinks", rule, None, "write logging.sinks: [wandb], or wandb: true")


@RULES.needs("evaluation.tasks", "model.objective")
def _evaluation_continues_text(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.evaluation is not None and not shape.is_causal:
        rule = f"a model of objective {shape.objective} gives a text no likelihood, which tasks are evaluated by"
        fix = "leave the section evaluation out, or set model.objective to causal_lm"
        yield FieldError("evaluation", rule, spec.evaluation.tasks, fix)


@RULES.needs("train.num_steps", "finetune.epochs")
def _run_has_a_length(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if not spec.train.num_steps and (spec.finetune is None or spec.finetune.epochs is None):
        rule = f"num_steps is required, and at least 1; got {spec.train.num_steps}"
        fix = "set it to the optimizer steps of the run, or with a section finetune set finetune.epochs"
        yield FieldError("train.num_steps", rule, spec.train.num_steps, fix)


@RULES.needs("lr_schedule.warmup_steps", "train.num_steps")
def _warmup_ends(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    warmup, steps = spec.lr_schedule.warmup_steps, spec.train.num_steps
    if steps and warmup >= steps:  # 0 where the examples will tell it
        rule = f"warmup_steps ({warmup}) must be smaller than num_steps ({steps})"
        fix = f"set lr_schedule.warmup_steps to {at_most(steps - 1, 0)}, or train.num_steps to {warmup + 1} or more"
        yield FieldError("lr_schedule.warmup_steps", rule, warmup, fix)


@RULES.needs("lr_schedule.name", "lr_schedule.decay_steps", "lr_schedule.warmup_steps")
def _decay_follows_warmup(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    end, warmup = spec.lr_schedule.decay_steps, spec.lr_schedule.warmup_steps
    if spec.lr_schedule.name in ENDING and end is not None and end <= warmup:
        rule = f"decay_steps ({end}) must be larger than warmup_steps ({warmup}), which it includes"
        fix = f"set lr_schedule.decay_steps to {warmup + 1} or more, or null for train.num_steps"
        yield FieldError("lr_schedule.decay_steps", rule, end, fix)


_EXAMPLES: Final = {"step_interval": "a third of train.num_steps", "decay_rate": "0.999"}


@RULES.needs("lr_schedule.name", may_read=tuple(f"lr_schedule.{name}" for name in _EXAMPLES))
def _schedule_has_its_field(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    schedule = spec.lr_schedule.name
    name, meaning = REQUIRED_FIELDS.get(schedule, ("", ""))
    if name and getattr(spec.lr_schedule, name, "invalid") is None:
        fix = f"set it to {meaning}, such as {_EXAMPLES[name]}"
        yield FieldError(f"lr_schedule.{name}", f"is required by the {schedule} schedule", None, fix)


_WSD: Final = ("name", "warmup_steps", "decay_steps", "wsd_decay_fraction")


@RULES.needs(*(f"lr_schedule.{name}" for name in _WSD), may_read=("train.num_steps",))
def _wsd_parts_fit(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    schedule = spec.lr_schedule
    warmup, fraction = schedule.warmup_steps, schedule.wsd_decay_fraction
    total: Any = schedule.decay_steps or getattr(getattr(spec, "train", None), "num_steps", None)
    if schedule.name != "wsd" or not total:
        return
    decay = wsd_decay_steps(fraction, total)
    # Without a warmup that ends inside the run, the rules above have the better words.
    if warmup < total < warmup + decay:
        parts = f"warmup_steps ({warmup}) and the decay of wsd_decay_fraction ({fraction}) * {total} = {decay} steps"
        largest = math.floor((total - warmup) / total * 1000) / 1000
        fix = f"set lr_schedule.wsd_decay_fraction to {largest} or less"
        fix += f", or lr_schedule.warmup_steps to {at_most(total - decay, 0)}"
        yield FieldError("lr_schedule.wsd_decay_fraction", f"{parts} must fit into {total} steps", fraction, fix)
