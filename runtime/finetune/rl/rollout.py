"""Rollouts: answers to a number of prompts, sampled on the training weights in place, with their rewards."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.finetune.rl.prompts import PromptSet
from trimaran.runtime.finetune.rl.reward.reward_run import RewardModels
from trimaran.runtime.finetune.rl.reward.rewards import Answer, RewardError, RewardItem, Scoring, total_rewards
from trimaran.runtime.infer.generate import generate
from trimaran.runtime.infer.sample_group import Completion
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.spec.sections.finetune import RLSettings
from trimaran.runtime.train.train_context import TrainContext

_CACHE_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # of the key-value cache of answers that are sampled together


@dataclass(frozen=True)
class Sample:
    """A sampled answer.

    Args:
        prompt: its number among the prompts.
        tokens: of the answer, at least one; the stop token that ended it is the last one.
        log_probs: of each token, by the sampler: at the temperature, before top_p.
        finish: see `Completion`.
        text: without the stop token.
        rewards: by the name of each item.
    """

    prompt: int
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: str
    text: str
    rewards: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """The answers of one rollout, the same on every rank: those to a prompt one after the other.

    Args:
        number: of the rollout, from 0.
    """

    number: int
    samples: tuple[Sample, ...]

    def rewards(self, items: Sequence[RewardItem]) -> list[float]:
        """Return the weighted sum of each answer's rewards."""
        parts = {item.text: [sample.rewards[item.text] for sample in self.samples] for item in items}
        return total_rewards(items, parts)


class Sampler:
    """Samples answers on the weights that are trained, and has them rewarded.

    Args:
        stop_tokens: ids that end an answer.
        scoring: of the rewards without a model.
        models: of the reward runs.
    """

    def __init__(
        self,
        train_context: TrainContext,
        prompts: PromptSet,
        tokenizer: Tokenizer,
        stop_tokens: Sequence[int],
        settings: RLSettings,
        scoring: Scoring,
        models: RewardModels,
    ) -> None:
        self._context, self._prompts, self._tokenizer = train_context, prompts, tokenizer
        self._settings, self._scoring, self._models = settings, scoring, models
        spec, mesh = train_context.spec, train_context.mesh
        # Blocks gathered over dp one by one make dp ranks keep step: each then samples all answers.
        self._in_step = spec.zero.stage == 3 and mesh.sharding.shard.size > 1
        self._sampling = SamplingParams(
            settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=spec.seed,
            stop_tokens=tuple(stop_tokens),
            context="stop",
        )

    def sample(self, number: int) -> Rollout:
        """Return the rollout of a number, which alone decides it with seed, prompts and weights.

        Collective over the world.

        Raises:
            RewardError: a reward can't be computed; on all ranks.
            NotFiniteError: the logits are not finite.
        """
        settings, mesh = self._settings, self._context.mesh
        chosen = self._prompts.of_rollout(number, settings.prompts_per_step, self._context.spec.seed)
        share = settings.prompts_per_step // mesh.dp.size
        mine = range(mesh.dp.rank * share, (mesh.dp.rank + 1) * share)
        asked = range(settings.prompts_per_step) if self._in_step else mine
        first = number * settings.prompts_per_step
        found = self._answers([chosen[place] for place in asked], [first + place for place in asked])
        group = settings.group_size
        if self._in_step:
            found = found[mine.start * group : mine.stop * group]
        samples = self._exchange([chosen[place] for place in mine for _ in range(group)], found)
        scores = self._models.rewards([[*self._prompts.tokens[each.prompt], *each.tokens] for each in samples])
        return Rollout(number, tuple(_with_rewards(samples, scores)))

    def _answers(self, prompts: Sequence[int], numbers: Sequence[int]) -> list[Completion]:
        """Return group_size answers to each prompt.

        Args:
            numbers: of the prompts among all that the run samples answers to, for the random numbers.
        """
        context, group = self._context, self._settings.group_size
        found: list[Completion] = []
        together = self._prompts_together(prompts)
        for start in range(0, len(prompts), together):
            part = slice(start, start + together)
            found += generate(
                context.stages,
                context.mesh,
                context.spec,
                [self._prompts.tokens[prompt] for prompt in prompts[part] for _ in range(group)],
                self._sampling,
                numbers=[number * group + copy for number in numbers[part] for copy in range(group)],
                placement=context.schedule.placement,
                copies=group,
                tells_log_probs=True,
            )
        return found

    def _prompts_together(self, prompts: Sequence[int]) -> int:
        """Return how many prompts are answered in one batch: as many as the key-value cache may hold."""
        spec, settings = self._context.spec, self._settings
        layer_context = next(iter(self._context.stages.values())).context
        shape = spec.transformer
        layers = sum(len(stage.layers) for stage in self._context.stages.values())
        heads = -(-shape.num_kv_heads // layer_context.tp.size)
        token = 2 * layers * heads * shape.head_dim * layer_context.dtype.itemsize
        longest = max(len(self._prompts.tokens[prompt]) for prompt in prompts) + settings.max_new_tokens
        most = _CACHE_BYTES[layer_context.device.type] // max(1, token * longest * settings.group_size)
        # The stages of other ranks may have other sizes; all must agree.
        return min(int(text) for text in self._context.mesh.gather_text(str(max(1, most))))

    def _exchange(self, prompts: Sequence[int], completions: Sequence[Completion]) -> tuple[Sample, ...]:
        """Return the answers of all replicas with their rewards. Collective over the world.

        Args:
            prompts: of this replica's completions.
        """
        mesh = self._context.mesh
        samples = [
            Sample(prompt, tuple(each.tokens), tuple(each.log_probs), each.finish, self._text(each))
            for prompt, each in zip(prompts, completions, strict=True)
        ]
        message: dict[str, Any] = {}
        if mesh.pp.rank == 0 and mesh.tp.rank == 0:
            try:
                message = {"samples": [asdict(sample) for sample in self._rewarded(samples)]}
            except RewardError as error:
                message = {"error": str(error)}
        told = [json.loads(text) for text in mesh.gather_text(json.dumps(message) if message else "") if text]
        problem = next((each["error"] for each in told if "error" in each), None)
        if problem is not None:
            raise RewardError(problem)
        return tuple(_sample_of(each) for one in told for each in one["samples"])

    def _rewarded(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the answers with the rewards that need no model."""
        records = self._prompts.records
        answers = [Answer(records[each.prompt], each.text, len(each.tokens)) for each in samples]
        return _with_rewards(samples, self._scoring.rewards(answers))

    def _text(self, completion: Completion) -> str:
        tokens = completion.tokens[:-1] if completion.finish == "stop_token" else completion.tokens
        return self._tokenizer.decode(tokens)


def _with_rewards(samples: Sequence[Sample], found: Mapping[str, Sequence[float]]) -> list[Sample]:
    """Return the answers with further rewards, each by the name of its item."""
    return [
        replace(sample, rewards={**sample.rewards, **{name: values[row] for name, values in found.items()}})
        for row, sample in enumerate(samples)
    ]


def _sample_of(record: dict[str, Any]) -> Sample:
    return Sample(**{**record, "tokens": tuple(record["tokens"]), "log_probs": tuple(record["log_probs"])})
