"""Rules of learning from rewards, finetune.rl."""

from collections.abc import Iterator

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError
from trimaran.runtime.finetune.rl.reward.rewards import RewardError, parse_rewards
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules.table import Rules
from trimaran.runtime.spec.sections.finetune import RLSettings

RULES: Rules = Rules()


def _settings(spec: RunFields) -> RLSettings | None:
    """Return the settings of a run of method rl, None of any other."""
    return spec.finetune.rl if spec.finetune is not None and spec.finetune.method == "rl" else None


@RULES.needs("finetune.method", "finetune.rl", "finetune.rl.rewards")
def _rewards_are_known(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings = _settings(spec)
    if settings is None:
        return
    try:
        parse_rewards(settings.rewards)
    except RewardError as error:
        rule, _, fix = str(error).rpartition("; ")
        yield FieldError("finetune.rl.rewards", rule, settings.rewards, fix)


@RULES.needs("finetune.method", "finetune.rl", "finetune.rl.algorithm", "finetune.rl.group_size")
def _group_has_a_mean(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings = _settings(spec)
    if settings is None:
        return
    size, compares = settings.group_size, settings.algorithm == "grpo"
    if compares and size < 2:
        rule = "compares the answers to one prompt with each other, so algorithm grpo needs at least 2"
        yield FieldError("finetune.rl.group_size", rule, size, "set finetune.rl.group_size to 8")


@RULES.needs(
    "finetune.method",
    "finetune.rl",
    "finetune.rl.prompts_per_step",
    "finetune.rl.group_size",
    "finetune.rl.minibatches",
    "train.global_batch_size",
)
def _a_step_has_a_minibatch_of_answers(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings = _settings(spec)
    if settings is None:
        return
    answers, size = settings.prompts_per_step * settings.group_size, spec.train.global_batch_size
    told = f"prompts_per_step ({settings.prompts_per_step}) * group_size ({settings.group_size}) = {answers} answers"
    if answers % settings.minibatches:
        rule = f"{told} must be divisible by minibatches"
        fix = f"set finetune.rl.minibatches to {_divisors(answers)}"
        yield FieldError("finetune.rl.minibatches", rule, settings.minibatches, fix)
    elif size != answers // settings.minibatches:
        rule = f"is the answers of an optimizer step, a row each: {told} / minibatches ({settings.minibatches})"
        fix = f"set train.global_batch_size to {answers // settings.minibatches}"
        yield FieldError("train.global_batch_size", rule, size, fix)


def _divisors(number: int) -> str:
    found = [str(each) for each in range(1, min(number, 16) + 1) if number % each == 0]
    return ", ".join(found)


@RULES.needs("finetune.method", "finetune.rl", "finetune.rl.prompts_per_step", "parallel.dp")
def _prompts_are_dealt_over_dp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings, dp = _settings(spec), spec.parallel.dp
    if settings is not None and settings.prompts_per_step % dp:
        prompts = settings.prompts_per_step
        rule = f"prompts_per_step ({prompts}) must be divisible by parallel.dp ({dp}), over which they are dealt"
        fix = f"set finetune.rl.prompts_per_step to {-(-prompts // dp) * dp}"
        yield FieldError("finetune.rl.prompts_per_step", rule, prompts, fix)


@RULES.needs("finetune.method", "finetune.rl", "finetune.rl.epochs", "finetune.rl.minibatches", "train.num_steps")
def _rollouts_are_whole(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings, steps = _settings(spec), spec.train.num_steps
    if settings is None:
        return
    each = settings.epochs * settings.minibatches
    if steps % each:
        rule = f"must be a multiple of epochs ({settings.epochs}) * minibatches ({settings.minibatches}), a rollout"
        yield FieldError("train.num_steps", rule, steps, f"set train.num_steps to {-(-steps // each) * each}")


@RULES.needs("finetune.method", "finetune.rl", "finetune.rl.max_new_tokens", "train.seq_len")
def _an_answer_fits_a_row(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings, seq_len = _settings(spec), spec.train.seq_len
    if settings is not None and settings.max_new_tokens >= seq_len:
        rule = f"max_new_tokens ({settings.max_new_tokens}) leaves no room for a prompt in train.seq_len ({seq_len})"
        fix = f"set finetune.rl.max_new_tokens to less than {seq_len}, or raise train.seq_len"
        yield FieldError("finetune.rl.max_new_tokens", rule, settings.max_new_tokens, fix)


_DROPOUTS = ("embedding_dropout", "hidden_dropout", "attention_dropout")


@RULES.needs("finetune.method", "finetune.rl", *(f"model.{name}" for name in _DROPOUTS))
def _sampling_and_training_see_one_network(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if _settings(spec) is None:
        return
    for name in _DROPOUTS:
        if getattr(shape, name) > 0:
            rule = "must be 0 for method rl: with dropout the policy that samples is not the one that is trained"
            yield FieldError(f"model.{name}", rule, getattr(shape, name), f"set model.{name} to 0")


@RULES.needs("finetune.method", "finetune.rl", "model.num_experts")
def _experts_are_not_built(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if _settings(spec) is not None and shape.num_experts:
        rule = "method rl is not built for experts, whose balance would count the padding after an answer"
        yield FieldError("model.num_experts", rule, shape.num_experts, "take a model without experts")


@RULES.needs("finetune.method", "finetune.rl", "train.eval_interval")
def _rewards_need_no_held_out_text(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if _settings(spec) is not None and spec.train.eval_interval:
        rule = "evaluates a loss on held-out text, which method rl has none of; its rewards are in metrics.jsonl"
        fix = "set train.eval_interval to 0; the section evaluation has tasks"
        yield FieldError("train.eval_interval", rule, spec.train.eval_interval, fix)


@RULES.needs(
    "finetune.method",
    "finetune.rl",
    "finetune.rl.algorithm",
    "finetune.rl.value_from",
    "finetune.adapter",
    "checkpoint.init_from",
)
def _a_value_head_begins_beside_weights(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings, field = _settings(spec), "finetune.rl.value_from"
    if settings is None or settings.value_from is None:
        return
    if settings.algorithm != "ppo":
        rule = "is what a value head begins with, and algorithm grpo has none"
        yield FieldError(field, rule, settings.value_from, "take it out, or set finetune.rl.algorithm to ppo")
    if spec.checkpoint.init_from is None:
        rule = "reads the states of trained layers, and checkpoint.init_from names none"
        fix = "set checkpoint.init_from to the model that the reward run has started from, or value_from to null"
        yield FieldError(field, rule, settings.value_from, fix)
    if spec.finetune is not None and spec.finetune.adapter is not None:
        rule = "can't be read beside adapters, where a value head is learned anew"
        yield FieldError(field, rule, settings.value_from, "take it out, or finetune.adapter")


@RULES.needs("finetune.method", "finetune.rl", "finetune.rl.algorithm", "model.score_head")
def _values_have_a_head(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings = _settings(spec)
    is_ppo = settings is not None and settings.algorithm == "ppo"
    if is_ppo and shape.score_head != "beside":
        rule = "must be beside for algorithm ppo, whose values come from it"
        yield FieldError("model.score_head", rule, shape.score_head, "set model.score_head to beside")
    elif not is_ppo and shape.score_head == "beside":
        rule = "a value head (beside) learns from rewards, which needs finetune.method rl with algorithm ppo"
        yield FieldError("model.score_head", rule, shape.score_head, "set model.score_head to none")
