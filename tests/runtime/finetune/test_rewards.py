"""Rewards and what follows from them: torchrl's and TRL's advantages and losses; users' code, and answers that fail."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.runtime.huggingface.huggingface_folders import VOCAB
from tests.runtime.huggingface.test_export import make_run, write_weights
from tests.runtime.huggingface.test_export_scores import parameters_of
from trimaran.launchers.before_start import check_code
from trimaran.models.layers.score import SCORE_WEIGHT, drawn_score_weight
from trimaran.runtime.data.files import DataError
from trimaran.runtime.finetune.data.records import Origin, Prompt, Turn
from trimaran.runtime.finetune.rl.advantages import generalized_advantages, group_advantages, token_rewards, whitened
from trimaran.runtime.finetune.rl.batches import Rows
from trimaran.runtime.finetune.rl.loop import loss_of, settings_of
from trimaran.runtime.finetune.rl.losses import is_clipped, k3_divergence, policy_losses, value_losses
from trimaran.runtime.finetune.rl.prompts import PromptSet, check_lengths
from trimaran.runtime.finetune.rl.reward.math_answer import is_right
from trimaran.runtime.finetune.rl.reward.rewards import (
    Answer,
    RewardError,
    RewardItem,
    Scoring,
    check_fields,
    check_files,
    parse_reward,
    parse_rewards,
    total_rewards,
)
from trimaran.runtime.finetune.rl.targets import Recorded, minibatches_of, num_losses, targets_of
from trimaran.runtime.mesh import lone_mesh
from trimaran.runtime.processes import children_of
from trimaran.runtime.spec import RunSpec, SpecError, parse_spec
from trimaran.runtime.spec.sections.finetune import RLSettings
from trimaran.runtime.train.init_from import check_initial_weights, load_initial_weights, open_weights
from trimaran.runtime.train.state import spec_of
from trimaran.runtime.train.train_context import build_train_context

GOLDEN = Path(__file__).with_name("golden_rewards.json")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """Numbers, and what torchrl and TRL make of them: benchmarks/finetune_grpo_goldens.py."""
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    assert found["versions"]["trl"] == "1.16.0"
    assert found["versions"]["torchrl"] == "0.14.1"
    return found


def given(golden: Mapping[str, Any], *names: str) -> list[Tensor]:
    return [torch.tensor(golden["given"][name], dtype=torch.float64) for name in names]


def close(found: Any, expected: Any, atol: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=atol)


def test_generalized_advantages_are_torchrls(golden: dict[str, Any]) -> None:
    rewards, values, mask = given(golden, "token_rewards", "values", "mask")
    settings = golden["settings"]
    advantages, returns = generalized_advantages(
        rewards, values, mask.bool(), gamma=settings["gamma"], lam=settings["lam"]
    )
    close(advantages, golden["torchrl"]["advantages"])
    close(returns, golden["torchrl"]["returns"])


def test_the_clipped_losses_are_torchrls(golden: dict[str, Any]) -> None:
    clip, theirs = golden["settings"]["clip"], golden["torchrl"]
    ratios = torch.tensor(theirs["ratios"], dtype=torch.float64)
    (advantage,) = given(golden, "advantage")
    # torchrl clips the ratio's logarithm, at bounds that it holds in float32.
    close(policy_losses(ratios, advantage, clip, clip), theirs["policy_losses"], atol=1e-7)
    assert is_clipped(ratios, advantage, clip, clip).any()
    value, old, target = given(golden, "value", "old_value", "target")
    close(2 * value_losses(value, old, target, clip), theirs["squared_errors"])


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_grpos_losses_and_gradients_are_trls(kind: str, golden: dict[str, Any]) -> None:
    settings, theirs = golden["settings"], golden["trl"]
    scores, mask, old, new, reference = given(golden, "scores", "mask", "old", "new", "reference")
    answers = [[1] * int(length) for length in mask.sum(1).tolist()]
    rows = Rows.of([[1]] * len(answers), answers, 1)
    assert torch.equal(rows.mask, mask.bool())
    rl = RLSettings(
        rewards=["exact_match"],
        loss=kind,
        group_size=settings["group"],
        max_new_tokens=settings["longest"],
        minibatches=2,
        kl=settings["kl"],
    )
    targets = targets_of(rl, rows, scores.tolist(), Recorded(old, None, reference))
    expected = theirs["centred" if kind == "dr_grpo" else "advantages"]
    close(targets["advantages"][:, 0], expected)
    new.requires_grad_()
    ratios = (new - targets["old_log_probs"]).exp()
    losses = policy_losses(ratios, targets["advantages"], settings["low"], settings["high"])
    losses = losses + rl.kl * k3_divergence(new, targets["reference_log_probs"])
    loss = (losses * targets["weights"]).sum() / num_losses(rl, rows.mask)
    loss.backward()
    close(loss.detach(), theirs[kind]["loss"])
    close(new.grad, theirs[kind]["gradients"])


def test_equal_rewards_give_no_advantage() -> None:
    close(group_advantages(torch.tensor([3.0, 3.0, 3.0], dtype=torch.float64), 3), [0.0, 0.0, 0.0])


def test_the_score_is_at_the_last_token_and_the_divergence_at_each() -> None:
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    divergences = torch.tensor([[9.0, 1.0, 2.0, 9.0], [3.0, 9.0, 9.0, 9.0]], dtype=torch.float64)
    found = token_rewards(torch.tensor([10.0, 20.0], dtype=torch.float64), divergences, mask, 0.5)
    close(found, [[0.0, -0.5, 9.0, 0.0], [18.5, 0.0, 0.0, 0.0]])


def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_tokens() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = whitened(torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]], dtype=torch.float64), mask)
    close(found[mask], (torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64) - 3) / math.sqrt(7 + 1e-8))
    assert not found[~mask].any()
    assert not whitened(torch.full((1, 1), 5.0, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)).any()


def test_k3_is_the_divergence_on_average() -> None:
    p, q = (torch.randn(50, dtype=torch.float64).log_softmax(0) for _ in range(2))
    found = (p.exp() * k3_divergence(p, q)).sum()
    close(found, F.kl_div(q, p, reduction="sum", log_target=True))
    assert (k3_divergence(p, q) >= 0).all()


def test_every_row_is_in_one_minibatch_of_an_epoch() -> None:
    rl = RLSettings(rewards=["exact_match"], epochs=3, minibatches=4)
    steps = minibatches_of(rl, 20, 7, 1)
    assert [len(step) for step in steps] == [5] * 12
    epochs = [[row for step in steps[start : start + 4] for row in step] for start in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    another = [row for step in minibatches_of(rl, 20, 8, 1)[:4] for row in step]
    assert len({tuple(epoch) for epoch in (*epochs, another)}) == 4


def test_prompts_come_once_an_epoch_in_an_order_of_its_own() -> None:
    prompts = PromptSet([prompt_of(str(i)) for i in range(7)], [[1]] * 7)
    taken = [number for rollout in range(14) for number in prompts.of_rollout(rollout, 3, seed=1)]
    epochs = [tuple(taken[start : start + 7]) for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 3


def prompt_of(question: str, **fields: Any) -> Prompt:
    return Prompt((Turn("user", question),), Origin("prompts.jsonl", 3), fields)


def reward(text: str, written: str, *, tokens: int = 1, timeout_s: float = 60.0, **fields: Any) -> float:
    items = parse_rewards([text])
    with Scoring(items, timeout_s) as scoring:
        found = scoring.rewards([Answer(prompt_of("What?", **fields), written, tokens)])
    return total_rewards(items, found)[0]


@pytest.mark.parametrize(
    ("text", "answer", "expected", "found"),
    [
        ("exact_match", " Paris\n", "Paris", 1.0),
        ("exact_match", "paris", "Paris", 0.0),
        ("exact_match*-2.5", "7", 7, -2.5),
        ("math_answer", "So 3 + 4 = 7", "3 and 4 are seven\n#### 7", 1.0),
        ("math_answer", "so 1,234 dollars. That is $1,234.00.", "#### 1234", 1.0),
        ("math_answer", "It is \\boxed{\\frac{1}{2}}, not 3", "0.5", 1.0),
        ("math_answer", "\\boxed{x^{2}+1}", "$x^{2} + 1$", 1.0),
        ("math_answer", "7 or 8", "7", 0.0),
        ("math_answer", "none", "7", 0.0),
        ("math_answer", "-5", "5", 0.0),
        ("math_answer", "1/0", "1", 0.0),
        ("math_answer", "", "Paris", 0.0),
        ("math_answer", "Paris.", "paris", 1.0),
        ("regex:^[a-z]+$", "abc", None, 1.0),
        ("regex:a*b*0.5", "xb", None, 0.5),
        ("regex:^[a-z]+$", "ab c", None, 0.0),
    ],
)
def test_rewards_of_texts(text: str, answer: str, expected: Any, found: float) -> None:
    assert reward(text, answer, **({} if expected is None else {"answer": expected})) == found


@pytest.mark.parametrize(("tokens", "found"), [(10, 1.0), (5, 0.5), (15, 0.5), (20, 0.0), (99, 0.0)])
def test_the_reward_of_a_length_is_1_at_it(tokens: int, found: float) -> None:
    assert reward("length:10", "", tokens=tokens) == found


def test_math_answers_of_a_worked_solution() -> None:
    assert is_right("first 5\n#### 12 apples", "12") is False
    assert is_right("first 5\n#### 12", "a\n#### 12\n")
    assert is_right("50%", "50")
    assert is_right("1" * 5000, "1" * 5000)  # more digits than Python turns into a number
    assert not is_right(f"it is {'1' * 5000}", "1")


CODE = """
import os, sys, time
from beside import HALF

def half(answer, record):
    print("on the way", file=sys.stdout)
    return HALF * len(answer) + record["bonus"] + 1

def nothing(answer, record):
    return None

def nan(answer, record):
    return float("nan")

def huge(answer, record):
    return 1e200

def fails(answer, record):
    return record["missing"]

def sleeps(answer, record):
    time.sleep(3600)

def ends(answer, record):
    os._exit(7)

def leaves(answer, record):
    sys.exit(3)

def tells_much(answer, record):
    raise ValueError("first line\\n  second line\\r\\nthird" + 1000 * ".")
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A file of users' code."""
    (tmp_path / "beside.py").write_text("HALF = 0.5\n")
    (tmp_path / "code.py").write_text(CODE)
    return tmp_path / "code.py"


def test_users_code_runs_in_a_process_of_its_own_and_goes_on_after_each_call(code: Path) -> None:
    items = parse_rewards([f"{code}:half*2", "regex:b"])
    answers = [Answer(prompt_of("What?", bonus=10), "abc"[:length], 1) for length in range(4)] * 20
    with Scoring(items, 60.0) as scoring:
        found = scoring.rewards(answers)
    assert total_rewards(items, found)[:4] == [22.0, 23.0, 25.0, 26.0]
    assert found[f"{code}:half"] == [11.0, 11.5, 12.0, 12.5] * 20


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nan", "is nan; it must be finite"),
        ("huge", "is 1e+200; it must be finite, and at most 1e+09".replace("+", r"\+")),
        ("nothing", "is 'None'; it must be a number"),
        ("fails", r"KeyError: 'missing', .*code.py, line 19"),
        ("ends", "has ended with exit code 7"),
        ("leaves", "has ended with exit code 3"),
        ("tells_much", r"ValueError: first line second line third\.{200,500}, .*code.py, line 31$"),
        ("absent", "has no function absent"),
    ],
)
def test_code_that_fails_is_told_with_the_record(name: str, problem: str, code: Path) -> None:
    with pytest.raises(RewardError, match=rf"{name} of an answer to prompts.jsonl:3 \('abc'\) .*{problem}"):
        reward(f"{code}:{name}", "abc", bonus=1)


def test_code_that_takes_too_long_is_ended(code: Path) -> None:
    with pytest.raises(RewardError, match=r"takes longer than finetune.rl.reward_timeout_s \(0.2\); make it quicker"):
        reward(f"{code}:sleeps", "abc", timeout_s=0.2)


def test_a_pattern_that_takes_years_is_ended_and_told() -> None:
    told = r"regex:\(a\+\)\+\$ of an answer to prompts.jsonl:3 \('a{30}!'\) can't be computed: the search"
    bound = r"takes longer than finetune.rl.reward_timeout_s \(0.2\); simplify"
    with pytest.raises(RewardError, match=f"{told} for the pattern {bound}"):
        reward("regex:(a+)+$", "a" * 30 + "!", timeout_s=0.2)


def test_patterns_and_code_have_processes_of_their_own_that_end_with_the_run(code: Path) -> None:
    before = set(children_of(os.getpid()))  # other tests of this process may have a fork server
    with Scoring(parse_rewards(["regex:a", "regex:b$", f"{code}:half"]), 60.0) as scoring:
        found = scoring.rewards([Answer(prompt_of("What?", bonus=0), text, 1) for text in ("ab", "ba", "\n")])
        assert len(set(children_of(os.getpid())) - before) == 2
    assert set(children_of(os.getpid())) <= before
    assert found == {"regex:a": [1.0, 1.0, 0.0], "regex:b$": [1.0, 0.0, 0.0], f"{code}:half": [2.0, 2.0, 1.5]}


def test_code_that_can_not_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("def f(:\n")
    with pytest.raises(RewardError, match="SyntaxError"):
        reward(f"{tmp_path / 'wrong.py'}:f", "abc")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("regex:(", r"'\(' is no regular expression"),
        ("regex:a{99999999999}", "is no regular expression"),
        (f"regex:{'(' * 5000}", "is no regular expression"),
        ("regex", "lacks what follows the colon"),
        ("length:many", "'many' is no number of tokens from 1"),
        ("length:0", "'0' is no number of tokens from 1"),
        ("exact_match*1e999", "is not finite"),
        ("exact_match*-1e30", "or over 1e.09"),
    ],
)
def test_wrong_items_are_refused(text: str, problem: str) -> None:
    with pytest.raises(RewardError, match=problem):
        parse_reward(text)


def test_items_are_read_with_their_weights(tmp_path: Path) -> None:
    assert parse_reward("a/b.py:name*-1e-2") == RewardItem("code", "a/b.py:name", "a/b.py", "name", -0.01)
    assert parse_reward("runs/reward*3") == RewardItem("run", "runs/reward", "runs/reward", weight=3.0)
    with pytest.raises(RewardError, match="exact_match is there twice"):
        parse_rewards(["exact_match", "exact_match*2"])
    with pytest.raises(RewardError, match="is no reward: it is neither exact_match"):
        check_files([parse_reward(str(tmp_path / "exact-match"))])
    with pytest.raises(RewardError, match=r"gone.py of the reward .* is no file"):
        check_files([parse_reward(f"{tmp_path / 'gone.py'}:name")])


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def named(answer, record): return 1.0", None),
        ("from math import cos as named", None),
        ("from beside import *", None),
        ("named = lambda answer, record: 1.0", None),
        ("def other(answer, record): return 1.0", "code.py has no function named, which the reward .* names"),
        ("import named.path as other", "code.py has no function named"),
        ("x = 1\ndef named(:", "code.py, line 2 of finetune.rl.rewards can't be read as Python: invalid syntax"),
        ("\0", "can't be read as Python: .*null bytes"),
    ],
)
def test_the_function_of_a_reward_is_looked_for_before_any_rank_starts(
    source: str, problem: str | None, tmp_path: Path
) -> None:
    (tmp_path / "code.py").write_text(source)
    item = parse_reward(f"{tmp_path / 'code.py'}:named")
    if problem is None:
        check_files([item])
        return
    with pytest.raises(RewardError, match=problem):
        check_files([item])


@pytest.mark.parametrize("fields", [{}, {"answer": ""}, {"answer": None}, {"answer": ["7"]}, {"answer": True}])
def test_a_record_without_the_answer_that_a_reward_compares_is_refused(fields: dict[str, Any]) -> None:
    right = prompt_of("What?", answer=7)
    with pytest.raises(RewardError, match=r"prompts.jsonl:3 has no text or number in its field answer"):
        check_fields(parse_rewards(["length:3", "math_answer"]), [right, prompt_of("What?", **fields)])
    check_fields(parse_rewards(["length:3"]), [prompt_of("What?", **fields)])


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused() -> None:
    prompts = PromptSet([prompt_of("What?")], [[1] * 9])
    check_lengths(prompts, 12, 3)
    with pytest.raises(DataError, match=r"prompts.jsonl:3 has 9 tokens, and train.seq_len \(12\) less .* room for 8"):
        check_lengths(prompts, 12, 4)
    with pytest.raises(DataError, match="has no prompt to answer"):
        check_lengths(PromptSet([], []), 12, 4)


GOOD = {
    "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2},
    "data": {"source": ["prompts.jsonl"], "tokenizer": "tokenizer.json"},
    "optimizer": {"lr": 1e-3},
    "train": {"num_steps": 8, "global_batch_size": 16, "micro_batch_size": 1, "seq_len": 64},
    "finetune": {
        "method": "rl",
        "rl": {
            "rewards": ["exact_match"],
            "group_size": 8,
            "prompts_per_step": 4,
            "minibatches": 2,
            "max_new_tokens": 8,
        },
    },
}


VALUED = {"finetune.rl.algorithm": "ppo", "model.score_head": "beside"}


def spec_with(changes: dict[str, Any]) -> RunSpec:
    fields: dict[str, Any] = json.loads(json.dumps(GOOD))
    for path, value in changes.items():
        section = fields
        *names, last = path.split(".")
        for name in names:
            section = section.setdefault(name, {})
        section[last] = value
    return parse_spec(fields)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"finetune.rl.rewards": ["regex:("]}, "is no regular expression"),
        ({"finetune.rl.group_size": 1, "finetune.rl.prompts_per_step": 32}, "algorithm grpo needs at least 2"),
        ({"finetune.rl.minibatches": 3}, r"= 32 answers must be divisible by minibatches.* to 1, 2, 4, 8, 16"),
        ({"train.global_batch_size": 8}, "set train.global_batch_size to 16"),
        ({"parallel.dp": 8, "train.num_steps": 8}, "must be divisible by parallel.dp .* to 8"),
        ({"train.num_steps": 7}, "set train.num_steps to 8"),
        ({"finetune.rl.max_new_tokens": 64}, "leaves no room for a prompt in train.seq_len"),
        ({"model.hidden_dropout": 0.1}, "must be 0 for method rl"),
        ({"model.num_experts": 4}, "is not built for experts"),
        ({"train.eval_interval": 2}, "set train.eval_interval to 0"),
        ({"finetune.rl.algorithm": "ppo"}, "must be beside for algorithm ppo"),
        ({"model.score_head": "beside"}, "needs finetune.method rl with algorithm ppo"),
        ({"finetune.rl.value_from": "runs/reward"}, "value_from: .*grpo has none; take it out"),
        (VALUED | {"finetune.rl.value_from": "runs/reward"}, "and checkpoint.init_from names none"),
    ],
)
def test_rules_of_learning_from_rewards(changes: dict[str, Any], problem: str) -> None:
    spec_with({})
    with pytest.raises(SpecError) as caught:
        spec_with(changes)
    assert re.search(problem, str(caught.value)), str(caught.value)


def test_a_value_head_begins_with_the_score_head_of_a_reward_run(tmp_path: Path) -> None:
    shape: dict[str, Any] = {**GOOD["model"], "ffn_hidden_size": 24, "max_seq_len": 64}
    base = make_run(tmp_path / "base", shape)
    write_weights(base, spec_of(open_weights(base)[0]), 41, factor=0.2)  # other numbers than the reward run's
    reward_run = make_run(tmp_path / "reward", shape | {"score_head": "only"}, finetune={"method": "reward"})
    paths = {"finetune.rl.value_from": str(reward_run), "checkpoint.init_from": str(base)}
    vocabulary = {f"model.{name}": value for name, value in (shape | {"vocab_size": VOCAB}).items()}
    spec = spec_with(VALUED | vocabulary | paths | {"seed": 5})
    check_initial_weights(spec)
    context = build_train_context(spec, lone_mesh(), torch.device("cpu"), criterion=loss_of(settings_of(spec)))
    told = load_initial_weights(context)
    assert re.search(r"; the value head begins with that of .*/reward/checkpoints/", told)
    (stage,) = context.stages.values()
    theirs, ours = (parameters_of(each) for each in (reward_run, base))
    found = {name: parameter.detach() for name, parameter in stage.named_parameters()}
    assert torch.equal(found[SCORE_WEIGHT], theirs[SCORE_WEIGHT])
    assert not torch.equal(drawn_score_weight(16, 5), theirs[SCORE_WEIGHT])
    assert not torch.equal(theirs["embedding.weight"], ours["embedding.weight"])
    assert all(torch.equal(found[name], ours[name]) for name in ours)
    with pytest.raises(ValueError, match=r"value_from .*base is no reward run, so it has no head to begin with"):
        check_initial_weights(spec_with(VALUED | vocabulary | paths | {"finetune.rl.value_from": str(base)}))
    wide = make_run(tmp_path / "wide", shape | {"hidden_size": 32, "score_head": "only"}, finetune={"method": "reward"})
    with pytest.raises(ValueError, match=r"wide has model.hidden_size 32, and the model 16; name a reward run that"):
        check_initial_weights(spec_with(VALUED | vocabulary | paths | {"finetune.rl.value_from": str(wide)}))


@pytest.mark.parametrize("allow_code", [True, False])
def test_code_runs_only_where_that_is_allowed(allow_code: bool, code: Path) -> None:
    check_code(spec_with({}), allow_code=False)
    spec = spec_with({"finetune.rl.rewards": ["exact_match", f"{code}:half"]})
    if allow_code:
        check_code(spec, allow_code=True)
        return
    with pytest.raises(ValueError, match=r"code.py:half, which runs that file's code as you; .* give --allow-code"):
        check_code(spec, allow_code=False)
