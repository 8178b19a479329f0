"""Generation gives the same tokens at every layout, and with the key-value cache the logits of whole sequences."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.ranks import RankPool
from trimaran.models.cache.key_value import KeyValueCache
from trimaran.models.transformer import Stage, in_eval_mode
from trimaran.runtime.infer.generate import generate
from trimaran.runtime.infer.sample_group import NotFiniteError
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.train_context import build_stages_of_rank

VOCAB = 263  # not a multiple of 2: the last tp rank has a padded row
MAX_SEQ_LEN = 9
PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4], [250, 3], [4, 4, 4, 4, 4, 4, 4, 4, 4]]
NEW_TOKENS = 12  # past the model's context, twice

ROTARY: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "rotary": ROTARY,
    "learned-tied": {
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
    },
    "alibi-window": {
        "position": "alibi",
        "attention_window": 3,
        "attention_pattern": ["full", "window"],
        "block": "parallel_one_norm",
    },
    "one-kv-head-softcap": {
        "num_heads": 5,
        "head_dim": 4,
        "num_kv_heads": 1,
        "attention_softcap": 2.0,
        "logits_softcap": 3.0,
        "head_bias": True,
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2-sequence-parallel": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp4": {"pp": 4},
    "pp2-interleaved": {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b"},
    "pp1-interleaved": {"virtual_stages": 2, "schedule": "interleaved_1f1b"},
    "tp2-pp2-dp2-sequence-parallel": {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True},
    "tp2-pp2-interleaved-without-shared-memory": {
        "tp": 2, "pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b", "sequence_parallel": True,
        "shared_memory": False,
    },
}  # fmt: skip
SAMPLINGS = {
    "greedy": SamplingParams(NEW_TOKENS, temperature=0.0),
    "greedy-with-penalty": SamplingParams(
        NEW_TOKENS, temperature=0.0, repetition_penalty=1.5, min_new_tokens=2, stop_tokens=(3, 5)
    ),
    "drawn": SamplingParams(NEW_TOKENS, temperature=1.0, seed=3),
    "filtered": SamplingParams(
        NEW_TOKENS, 1.2, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=4, stop_tokens=tuple(range(20))
    ),
    "stopping-at-the-context": SamplingParams(NEW_TOKENS, temperature=1.0, seed=5, context="stop"),
}


def ranks_of(parallel: dict[str, Any]) -> int:
    return int(parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("dp", 1))


def make(parallel: dict[str, Any], model: dict[str, Any]) -> tuple[RunSpec, Mesh, dict[int, Stage]]:
    shape = {
        "num_layers": 4,
        "hidden_size": 16,
        "num_heads": 2,
        "vocab_size": VOCAB,
        "max_seq_len": MAX_SEQ_LEN,
        "init_std": 0.3,
    }
    spec = parse_spec(
        {
            "model": shape | model,
            "parallel": {"uneven_heads": True, **parallel},
            "data": {"tokenizer_vocab_size": 257},
            "optimizer": {"lr": 1e-3},
            "precision": {"dtype": "float64"},
            "train": {"num_steps": 1, "global_batch_size": 4, "micro_batch_size": 1, "seq_len": 8},
        }
    )
    axes = {axis: getattr(spec.parallel, axis) for axis in ("pp", "dp", "cp", "tp")}
    mesh = build_mesh(**axes, timeout_s=100, shared_memory=spec.parallel.shared_memory)
    return spec, mesh, build_stages_of_rank(spec, mesh, torch.device("cpu"))


Answer = list[tuple[list[int], str, int]]


def continue_prompts(parallel: dict[str, Any], model: dict[str, Any], settings: tuple[str, ...]) -> dict[str, Answer]:
    """The tokens, finish and slides of every prompt, by setting.

    "alone": of each prompt by itself, under the number it has in the batch.
    """
    spec, mesh, stages = make(parallel, model)
    found: dict[str, Answer] = {}
    for name in settings:
        if name != "alone":
            completions = generate(stages, mesh, spec, PROMPTS, SAMPLINGS[name])
        else:
            numbered = enumerate(PROMPTS)
            completions = [
                generate(stages, mesh, spec, [each], SAMPLINGS["drawn"], first_sample=number)[0]
                for number, each in numbered
            ]
        found[name] = [(each.tokens, each.finish, each.slides) for each in completions]
    assert all(stage.training for stage in stages.values()), "training mode is back"
    mesh.close()
    return found


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> dict[str, dict[str, Answer]]:
    """What one process says, by model."""
    return {name: ranks.alone(continue_prompts, {}, model, (*SAMPLINGS, "alone")) for name, model in MODELS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_tokens_at_every_layout_on_every_rank(
    layout: str, expected: dict[str, dict[str, Answer]], ranks: RankPool
) -> None:
    is_small = layout in ("tp2", "pp2")  # the others try less: that they hang together is what they show
    one_model = ("rotary", "learned-tied")[list(LAYOUTS).index(layout) % 2]
    for name in MODELS if is_small else (one_model,):
        settings = tuple(SAMPLINGS) if is_small else ("greedy-with-penalty", "filtered")
        for found in ranks.run(continue_prompts, ranks_of(LAYOUTS[layout]), LAYOUTS[layout], MODELS[name], settings):
            assert found == {setting: expected[name][setting] for setting in settings}


def test_the_settings_of_these_tests_reach_every_end(expected: dict[str, dict[str, Answer]]) -> None:
    answers = [answer for each in expected.values() for setting in each.values() for answer in setting]
    assert {finish for _, finish, _ in answers} == {"length", "stop_token", "context"}
    assert max(slides for _, _, slides in answers) >= 2
    assert all(0 <= token < VOCAB for tokens, _, _ in answers for token in tokens)


def test_a_sample_does_not_depend_on_its_batch(expected: dict[str, dict[str, Answer]]) -> None:
    for each in expected.values():
        assert each["alone"] == each["drawn"]
        assert each["greedy"] != each["drawn"]


def continue_alike(parallel: dict[str, Any], together: bool) -> list[Answer]:
    """The continuations of prompts that begin alike, by model; together, or each by itself."""
    found = []
    for name in ("rotary", "learned-tied"):
        spec, mesh, stages = make(parallel, MODELS[name])
        prompts = [[5, 6, 7, 8, 9, *range(number % 4)] for number in range(34)]
        parts = [slice(0, 34)] if together else [slice(number, number + 1) for number in range(34)]
        completions = [
            each
            for part in parts
            for each in generate(stages, mesh, spec, prompts[part], SAMPLINGS["drawn"], first_sample=part.start)
        ]
        found.append([(each.tokens, each.finish, each.slides) for each in completions])
        mesh.close()
    return found


@pytest.fixture(scope="module")
def one_by_one(ranks: RankPool) -> list[Answer]:
    return ranks.alone(continue_alike, {}, False)


@pytest.mark.parametrize("layout", ["one", "tp2-sequence-parallel", "pp2", "pp2-interleaved"])
def test_what_prompts_have_in_common_changes_no_token(layout: str, one_by_one: list[Answer], ranks: RankPool) -> None:
    parallel = LAYOUTS.get(layout, {})
    for found in ranks.run(continue_alike, ranks_of(parallel), parallel, True):
        assert found == one_by_one


def logits_both_ways(parallel: dict[str, Any], model: dict[str, Any]) -> float:
    """The largest difference of logits with a cache from whole sequences', with samples of different lengths."""
    _, mesh, stages = make(parallel, model)
    (stage,) = stages.values()
    parts = mesh.tp.size if stage.context.sequence_parallel else 1
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (3, MAX_SEQ_LEN), generator=generator)
    cache = KeyValueCache(3, 8, stage.config, stage.context)
    worst = 0.0
    with in_eval_mode([stage]), torch.no_grad():
        whole = stage.logits(stage.run_layers(None, ids[:, :8]))
        lengths = [4, 1, 6]
        for new in (6, 1, 1, 2):
            new = -(-new // parts) * parts
            cache.set_lengths(lengths)
            rows = [
                torch.cat((torch.zeros(max(0, new - n), dtype=torch.int64), ids[row, max(0, n - new) : n]))
                for row, n in enumerate(lengths)
            ]
            found: Tensor = stage.logits(stage.extend(None, torch.stack(rows), cache))
            for row, length in enumerate(lengths):
                real = min(new, length)
                worst = max(worst, float((found[row, -real:] - whole[row, length - real : length]).abs().max()))
            lengths = [min(length + 1, 8) for length in lengths]
    mesh.close()
    return worst


@pytest.mark.parametrize(
    "parallel", [{}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}], ids=["one", "tp2", "tp2-sequence-parallel"]
)
def test_logits_with_a_cache_are_those_of_whole_sequences(parallel: dict[str, Any], ranks: RankPool) -> None:
    for model in MODELS.values():
        assert max(ranks.run(logits_both_ways, ranks_of(parallel), parallel, model)) < 1e-12


def logits_not_finite(parallel: dict[str, Any]) -> str:
    spec, mesh, stages = make(parallel, ROTARY)
    with torch.no_grad():
        for stage in stages.values():
            if stage.is_last:
                stage.head.weight[-1] = torch.nan
    try:
        generate(stages, mesh, spec, PROMPTS, SAMPLINGS["drawn"])
    except NotFiniteError as error:
        return str(error)
    finally:
        mesh.close()
    return ""


def test_logits_that_are_not_finite_are_an_error_on_every_rank(ranks: RankPool) -> None:
    found = ranks.run(logits_not_finite, 4, {"tp": 2, "pp": 2})
    assert all("the model's logits for new token 1 of sample 0 are not finite" in message for message in found)


def bad_prompts() -> None:
    spec, mesh, stages = make({}, ROTARY)
    for prompts, words in (
        ([[]], "the prompt has no tokens"),
        ([[1], [2] * 10], "prompt 2 has 10 tokens, more than the 9 of the model's context"),
        ([[VOCAB]], "the prompt has the token 263, and the model's vocabulary has 263"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(stages, mesh, spec, prompts, SAMPLINGS["greedy"])
    assert generate(stages, mesh, spec, [], SAMPLINGS["greedy"]) == []
    assert [each.tokens for each in generate(stages, mesh, spec, PROMPTS, SamplingParams(0))] == [[]] * len(PROMPTS)
    mesh.close()


def test_prompts_that_cannot_be_continued_are_told(ranks: RankPool) -> None:
    ranks.run(bad_prompts, 1)


COPIES, COPIED = 9, [[9, 8, 7, 6, 5, 4], [250, 3], [5, 6, 7, 1]]


def continue_copies(parallel: dict[str, Any], model: dict[str, Any]) -> dict[str, list[tuple[list[int], list[float]]]]:
    """Tokens and log-probabilities of each prompt continued several times, its cache shared or not."""
    spec, mesh, stages = make(parallel, model)
    sampling = SamplingParams(6, temperature=0.7, top_p=0.8, seed=6, context="stop", stop_tokens=tuple(range(20)))
    prompts = [prompt for prompt in COPIED for _ in range(COPIES)]
    found = {
        name: generate(stages, mesh, spec, prompts, sampling, copies=copies, tells_log_probs=True)
        for name, copies in {"shared": COPIES, "apart": 1}.items()
    }
    mesh.close()
    return {name: [(each.tokens, each.log_probs) for each in completions] for name, completions in found.items()}


def log_probs_of(prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
    """The log-probabilities of the answers' tokens by whole sequences, temperature 0.7."""
    _, mesh, stages = make({}, ROTARY)
    stage = stages[0]
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt + answer])
        logits = stage.logits(stage.run_layers(None, tokens))[0, len(prompt) - 1 : -1, :VOCAB]
        found.append((logits / 0.7).log_softmax(-1).gather(1, tokens[0, len(prompt) :, None]).flatten().tolist())
    mesh.close()
    return found


@pytest.mark.parametrize("layout", ["tp2", "tp2-sequence-parallel", "pp2", "tp2-pp2-dp2-sequence-parallel"])
def test_copies_of_a_prompt_share_its_cache_and_know_their_tokens_log_probabilities(
    layout: str, ranks: RankPool
) -> None:
    alone = ranks.alone(continue_copies, {}, ROTARY)
    answers = [tokens for tokens, _ in alone["apart"]]
    assert len({tuple(tokens) for tokens in answers}) > 20
    assert {len(tokens) for tokens in answers} >= {1, 6}
    expected = ranks.alone(log_probs_of, [prompt for prompt in COPIED for _ in range(COPIES)], answers)
    torch.testing.assert_close([found for _, found in alone["apart"]], expected, rtol=0, atol=1e-12)
    for found in (alone, *ranks.run(continue_copies, ranks_of(LAYOUTS[layout]), LAYOUTS[layout], ROTARY)):
        for name in ("shared", "apart"):
            assert [tokens for tokens, _ in found[name]] == answers
            torch.testing.assert_close([each for _, each in found[name]], expected, rtol=0, atol=1e-12)
