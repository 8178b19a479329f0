"""The section `finetune`: learning from examples, preferences and rewards."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from trimaran.models.fields import Count, Positive
from trimaran.runtime.spec.sections.common import SECTION_CONFIG, FilePath, Fraction, PositiveFraction, switch

Method = Literal["sft", "reward", "preference", "rl"]
Module = Annotated[str, Field(min_length=1, max_length=1000)]
Reward = Annotated[str, Field(min_length=1, max_length=10_000)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PreferenceSettings(BaseModel):
    """How a model learns which of two answers is better, or which answers are good."""

    model_config = SECTION_CONFIG

    loss: Literal["dpo", "ipo", "orpo", "kto"] = Field(
        default="dpo",
        description="dpo (Rafailov et al. 2023), ipo (Azar et al. 2023), orpo (Hong et al. 2024), kto (Ethayarajh et "
        "al. 2024).",
    )
    beta: Positive = Field(
        default=0.1, description="Strength of the pull to the reference; orpo: weight of the odds ratio."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5, allow_inf_nan=False)] = Field(
        default=0.0, description="dpo: share of the pairs whose preference is taken to be wrong."
    )
    reference: FilePath | None = Field(
        default=None, description="Run or checkpoint folder of the reference (null: the weights the run starts from)."
    )
    sft_weight: NonNegative = Field(
        default=0.0, description="Weight of the cross entropy of the chosen answers' tokens beside the loss."
    )
    desirable_weight: Positive = Field(default=1.0, description="kto: weight of the loss of a good answer.")
    undesirable_weight: Positive = Field(default=1.0, description="kto: weight of the loss of a bad answer.")


class RLSettings(BaseModel):
    """How a model learns from rewards of answers that it samples."""

    model_config = SECTION_CONFIG

    algorithm: Literal["grpo", "ppo"] = Field(
        default="grpo", description="grpo (Shao et al. 2024) or ppo (Schulman et al. 2017; Ouyang et al. 2022)."
    )
    loss: Literal["grpo", "dapo", "dr_grpo"] = Field(
        default="grpo",
        description="grpo: how tokens are averaged: grpo (an answer first), dapo (all tokens; Yu et al. 2025), dr_grpo "
        "(by max_new_tokens, advantages not divided by their deviation; Liu et al. 2025).",
    )
    rewards: Annotated[list[Reward], Field(min_length=1, max_length=100)] = Field(
        description="What gives an answer its reward, summed: a reward run's folder, exact_match, math_answer, "
        "regex:PATTERN, length:TOKENS or FILE.py:name; each may end in *WEIGHT."
    )
    group_size: Count = Field(default=8, description="Answers sampled for each prompt.")
    prompts_per_step: Count = Field(default=8, description="Prompts of one rollout, over all ranks.")
    max_new_tokens: Count = Field(default=256, description="Most tokens of an answer.")
    temperature: Positive = Field(default=1.0, description="Temperature of sampling and of the log-probabilities.")
    top_p: PositiveFraction = Field(default=1.0, description="Share of the probability that is sampled from.")
    clip_low: Fraction = Field(default=0.2, description="How far a ratio may fall below 1 before it is clipped.")
    clip_high: NonNegative = Field(default=0.2, description="How far a ratio may rise above 1 before it is clipped.")
    kl: NonNegative = Field(default=0.0, description="Weight of the divergence from the reference.")
    epochs: Count = Field(default=1, description="Passes over the answers of one rollout.")
    minibatches: Count = Field(default=1, description="Optimizer steps of one pass.")
    gamma: Fraction = Field(default=1.0, description="ppo: discount of later rewards.")
    lam: Fraction = Field(default=0.95, description="ppo: lambda of the advantages (GAE; Schulman et al. 2016).")
    value_from: FilePath | None = Field(
        default=None, description="ppo: reward run whose score head the value head begins with (null: random numbers)."
    )
    value_coef: NonNegative = Field(default=0.1, description="ppo: weight of the value head's loss.")
    reward_timeout_s: Positive = Field(
        default=10.0, description="Longest that FILE.py:name or regex:PATTERN may take for one answer."
    )


class AdapterSettings(BaseModel):
    """Low-rank matrices beside frozen weights (LoRA; Hu et al. 2022)."""

    model_config = SECTION_CONFIG

    rank: Count = Field(default=16, description="Rank of the matrices.")
    alpha: Positive = Field(default=32.0, description="Their product is multiplied by alpha over rank.")
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        default=0.0, description="Dropout of their input."
    )
    targets: Annotated[list[Module], Field(min_length=1, max_length=100)] = Field(
        default=["attention", "mlp"],
        description="Linear layers that get one: attention, mlp, or by name attention.q, attention.kv, attention.out, "
        "mlp.up, mlp.down.",
    )
    scaling: Literal["lora", "rslora"] = Field(
        default="lora", description="lora: alpha / rank; rslora: alpha / sqrt(rank) (Kalajdzievski 2023)."
    )
    base: Literal["full", "nf4"] = Field(
        default="full",
        description="How the frozen weights are held: full, or in 4 bits (nf4; QLoRA, Dettmers et al. 2023).",
    )

    @property
    def scale(self) -> float:
        """Factor of the product of the two matrices."""
        return self.alpha / (self.rank if self.scaling == "lora" else math.sqrt(self.rank))


class FinetuneSection(BaseModel):
    """Learning from examples, preferences and rewards, in place of a text."""

    model_config = SECTION_CONFIG

    method: Method = Field(
        default="sft",
        description="sft: from answers; reward: a score from pairs; preference: from pairs or rated answers; rl: from "
        "rewards of sampled answers.",
    )
    chat_template: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None, description="chatml, llama3, or a Jinja file (null: the one that comes with the model)."
    )
    loss_on: Literal["answers", "last_answer", "all"] = Field(
        default="answers", description="sft: which tokens are learned: all answers, the last one, or all tokens."
    )
    packing: Literal["documents", "none"] = Field(
        default="documents",
        description="documents: several examples fill a row, which don't see each other; none: one a row, padded.",
    )
    truncation: Literal["drop", "left", "right"] = Field(
        default="drop",
        description="What happens to an example longer than train.seq_len: left out, or cut at its left or right end.",
    )
    epochs: Positive | None = Field(
        default=None, description="Passes over the examples, in place of train.num_steps (null: by that)."
    )
    centering: NonNegative = Field(
        default=0.0,
        description="reward: weight of the square of a pair's summed scores, which keeps them around 0 (Eisenstein et "
        "al. 2023: 0.01).",
    )
    preference: Annotated[PreferenceSettings | None, switch(PreferenceSettings)] = Field(
        default=None, description="Of method preference (null: the defaults)."
    )
    rl: RLSettings | None = Field(default=None, description="Of method rl.")
    adapter: Annotated[AdapterSettings | None, switch(AdapterSettings)] = Field(
        default=None, description="Train low-rank adapters of frozen weights (null: all weights)."
    )
