"""Greedy continuations of prompts of different lengths are those of transformers' `generate`, for every family."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.huggingface_models import SMALL_MODELS, VOCAB, Imported
from trimaran.models.cache.key_value import KeyValueCache
from trimaran.models.parallel.group import single
from trimaran.models.parallel.parameter import LayerContext
from trimaran.models.transformer import Stage, build_stages, in_eval_mode
from trimaran.runtime.infer.generate import generate
from trimaran.runtime.infer.sampling_params import SamplingParams

PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2, 1], [44, 3, 60, 12, 12]]
NEW_TOKENS = 12
ALONE: Any = SimpleNamespace(pp=single("pp"), p2p_groups={})  # what generation needs of a mesh
# transformers stretches their rotary tables by the length of the padded batch, which ours do not depend on.
BY_LENGTH = ("llama-dynamic",)


def stage_of(imported: Imported, dtype: torch.dtype = torch.float32) -> Stage:
    context = LayerContext(single("tp"), False, dtype, torch.device("cpu"))
    (stage,) = build_stages(imported.config, [range(imported.config.num_layers)], [0], context, seed=0)
    stage.load_state_dict(imported.weights)
    return stage


def their_tokens(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    out = model.generate(ids, attention_mask=mask, **settings)
    found: list[list[int]] = out[:, longest:].tolist()
    return found


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = SMALL_MODELS[name]()
    imported = Imported(theirs, tmp_path)
    stage = stage_of(imported)
    spec: Any = SimpleNamespace(num_stages=1, transformer=imported.config)
    prompts = PROMPTS[:1] if name in BY_LENGTH else PROMPTS
    expected = their_tokens(theirs, prompts)
    found = generate({0: stage}, ALONE, spec, prompts, SamplingParams(NEW_TOKENS, temperature=0.0))
    assert [each.tokens for each in found] == expected
    if name not in BY_LENGTH:  # whose keys in the cache were rotated by the tables of a shorter text
        assert largest_difference(stage_of(imported, torch.float64)) < 1e-10


@torch.no_grad()
def largest_difference(stage: Stage) -> float:
    """Between logits of whole sequences and those with a cache, in float64, of samples of different lengths."""
    ids = torch.randint(VOCAB, (3, 14), generator=torch.Generator().manual_seed(1))
    cache = KeyValueCache(3, 14, stage.config, stage.context)
    worst, lengths = 0.0, [4, 1, 11]
    with in_eval_mode([stage]):
        whole = stage.logits(stage.run_layers(None, ids))
        for new in (11, 1, 1, 3):
            cache.set_lengths(lengths)
            rows = [
                torch.cat((torch.zeros(max(0, new - n), dtype=torch.int64), ids[row, max(0, n - new) : n]))
                for row, n in enumerate(lengths)
            ]
            found: Tensor = stage.logits(stage.extend(None, torch.stack(rows), cache))
            for row, length in enumerate(lengths):
                real = min(new, length)
                worst = max(worst, float((found[row, -real:] - whole[row, length - real : length]).abs().max()))
            lengths = [length + 1 for length in lengths]
    return worst


@pytest.mark.parametrize("name", ["llama-grouped-biases", "gpt2"])
def test_a_penalty_and_stop_tokens_that_must_wait_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = SMALL_MODELS[name]()
    imported = Imported(theirs, tmp_path)
    spec: Any = SimpleNamespace(num_stages=1, transformer=imported.config)
    stops = (3, 11, 24, 37, 40, 58)
    expected = their_tokens(theirs, PROMPTS, repetition_penalty=1.7, min_new_tokens=5, eos_token_id=list(stops))
    sampling = SamplingParams(NEW_TOKENS, temperature=0.0, repetition_penalty=1.7, min_new_tokens=5, stop_tokens=stops)
    found = generate({0: stage_of(imported)}, ALONE, spec, PROMPTS, sampling)
    assert {each.finish for each in found} == {"stop_token", "length"}
    assert [
        each.tokens + [0] * (len(row) - len(each.tokens)) for each, row in zip(found, expected, strict=True)
    ] == expected


def test_training_goes_on_after_text_was_generated(tmp_path: Path) -> None:
    """What generation has made and a stage keeps, such as rotary tables, must be fit for a backward pass."""
    imported = Imported(SMALL_MODELS["llama"](), tmp_path)
    stage = stage_of(imported)
    spec: Any = SimpleNamespace(num_stages=1, transformer=imported.config)
    generate({0: stage}, ALONE, spec, PROMPTS, SamplingParams(2))
    assert stage.training
    tokens = torch.tensor(PROMPTS[2:3])
    stage.logits(stage.run_layers(None, tokens)).square().sum().backward()
    fresh = stage_of(imported)
    fresh.logits(fresh.run_layers(None, tokens)).square().sum().backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, fresh.get_parameter(name).grad, rtol=0, atol=0)
