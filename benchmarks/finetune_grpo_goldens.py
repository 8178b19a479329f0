"""Writes tests/runtime/finetune/golden_rewards.json: numbers and what torchrl and TRL make of them.

    pip install trl==1.16.0 torchrl==0.14.1
    python -P benchmarks/finetune_grpo_goldens.py tests/runtime/finetune/golden_rewards.json

torchrl: generalized advantages, and the clipped losses of policy and value. TRL: GRPO's losses and advantages, by its
trainer's own methods.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ANSWERS, POSITIONS, GROUP, LONGEST, VOCAB = 6, 7, 3, 9, 5
LENGTHS = (7, 3, 5, 1, 7, 4)
# Those of torchrl are exact in float32, in which it holds them.
GAMMA, LAM, CLIP, LOW, HIGH, KL = 0.96875, 0.875, 0.25, 0.1, 0.3, 0.05


def made_numbers() -> dict[str, Tensor]:
    """Return random inputs, float64."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(POSITIONS) < torch.tensor(LENGTHS)[:, None]
    old = -normal(ANSWERS, POSITIONS).abs()
    return {
        "mask": mask.double(),
        "token_rewards": normal(ANSWERS, POSITIONS) * mask,
        "values": normal(ANSWERS, POSITIONS),
        "scores": torch.tensor([1.0, 0.0, 0.25, 2.0, 2.0, 2.0], dtype=torch.float64),
        "old": old,
        "new": old + 0.3 * normal(ANSWERS, POSITIONS),
        "reference": old + 0.3 * normal(ANSWERS, POSITIONS),
        "new_values": normal(ANSWERS, POSITIONS),
        "logits": normal(ANSWERS, VOCAB),
        "old_action": -normal(ANSWERS).abs() - 1,
        "advantage": normal(ANSWERS),
        "old_value": normal(ANSWERS),
        "value": normal(ANSWERS),
        "target": normal(ANSWERS),
    }


def of_torchrl(given: dict[str, Tensor]) -> dict[str, Any]:
    """Return what torchrl makes of the numbers."""
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torch.distributions import Categorical
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    advantages, returns = torch.zeros(ANSWERS, POSITIONS), torch.zeros(ANSWERS, POSITIONS)
    advantages, returns = advantages.double(), returns.double()
    for row, length in enumerate(LENGTHS):
        values = given["values"][row, :length, None]
        following = torch.cat((values[1:], torch.zeros(1, 1, dtype=torch.float64)))
        done = torch.zeros(length, 1, dtype=torch.bool)
        done[-1] = True
        rewards = given["token_rewards"][row, :length, None]
        advantage, target = generalized_advantage_estimate(GAMMA, LAM, values, following, rewards, done)
        advantages[row, :length], returns[row, :length] = advantage[:, 0], target[:, 0]
    head = TensorDictModule(torch.nn.Identity(), in_keys=["logits_in"], out_keys=["logits"])
    draw = ProbabilisticTensorDictModule(
        in_keys=["logits"], out_keys=["action"], distribution_class=Categorical, return_log_prob=True
    )
    critic = TensorDictModule(torch.nn.Identity(), in_keys=["value_in"], out_keys=["state_value"])
    loss = ClipPPOLoss(
        ProbabilisticTensorDictSequential(head, draw),
        critic,
        clip_epsilon=CLIP,
        clip_value=CLIP,
        entropy_bonus=False,
        critic_coeff=1.0,
        loss_critic_type="l2",
        reduction="none",
        functional=False,
    )
    action = torch.arange(ANSWERS) % VOCAB
    found = loss(
        TensorDict(
            {
                "logits_in": given["logits"],
                "action": action,
                "action_log_prob": given["old_action"],
                "advantage": given["advantage"][:, None],
                "value_target": given["target"][:, None],
                "state_value": given["old_value"][:, None],
                "value_in": given["value"][:, None],
            },
            batch_size=[ANSWERS],
        )
    )
    new = given["logits"].log_softmax(-1).gather(1, action[:, None])[:, 0]
    return {
        "advantages": advantages.tolist(),
        "returns": returns.tolist(),
        "ratios": (new - given["old_action"]).exp().tolist(),
        "policy_losses": found["loss_objective"].flatten().tolist(),
        "squared_errors": found["loss_critic"].flatten().tolist(),
    }


def of_trl(given: dict[str, Tensor]) -> dict[str, Any]:
    """Return the losses of TRL's trainer for given log-probabilities, and its gradients by them."""
    from trl import GRPOTrainer

    scores = given["scores"].view(-1, GROUP)
    centred = (scores - scores.mean(1, keepdim=True)).flatten()
    divided = centred / (scores.std(1, keepdim=True).expand_as(scores).flatten() + 1e-4)
    found: dict[str, Any] = {"advantages": divided.tolist(), "centred": centred.tolist()}
    for kind in ("grpo", "dapo", "dr_grpo"):
        new = given["new"].clone().requires_grad_()
        mask = given["mask"]
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=False),
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            loss_type=kind,
            beta=KL,
            epsilon_low=LOW,
            epsilon_high=HIGH,
            importance_sampling_level="token",
            max_completion_length=LONGEST,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            aux_loss_enabled=False,
            use_vllm=False,
            _entropy_bonus_enabled=False,
            accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
            current_gradient_accumulation_steps=1,
            _metrics={"eval": _Lists()},
            _get_per_token_logps_and_entropies=lambda *a, new=new, **k: (new, torch.zeros_like(new), None),
        )
        inputs = {
            "prompt_ids": torch.zeros(ANSWERS, 1, dtype=torch.long),
            "prompt_mask": torch.ones(ANSWERS, 1, dtype=torch.long),
            "completion_ids": torch.zeros(ANSWERS, POSITIONS, dtype=torch.long),
            "completion_mask": mask,
            "advantages": centred if kind == "dr_grpo" else divided,
            "old_per_token_logps": given["old"],
            "ref_per_token_logps": given["reference"],
            "num_items_in_batch": mask.sum(),
        }
        loss = GRPOTrainer._compute_loss(trainer, None, inputs)
        loss.backward()
        assert new.grad is not None
        found[kind] = {"loss": loss.item(), "gradients": new.grad.tolist()}
    return found


class _Lists(dict[str, list[Any]]):
    """Metrics that nobody reads."""

    def __missing__(self, key: str) -> list[Any]:
        return self.setdefault(key, [])


def main() -> None:
    """Write the file that the command line names."""
    given = made_numbers()
    trl = of_trl(given)
    packages = {name: version(name) for name in ("torch", "torchrl", "trl")}
    record = {
        "made_by": "benchmarks/finetune_grpo_goldens.py",
        "versions": {**packages, "python": platform.python_version()},
        "settings": {
            "gamma": GAMMA,
            "lam": LAM,
            "clip": CLIP,
            "low": LOW,
            "high": HIGH,
            "kl": KL,
            "group": GROUP,
            "longest": LONGEST,
        },
        "given": {name: value.tolist() for name, value in given.items()},
        "torchrl": of_torchrl(given),
        "trl": trl,
    }
    Path(sys.argv[1]).write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
