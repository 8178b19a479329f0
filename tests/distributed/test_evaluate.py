"""Log-likelihoods at any layout, batch size and sharing of prefixes are those of transformers' logits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.evaluate_ranks import BatchSize, requests_of, score_families, score_small, stop_on
from tests.distributed.ranks import RankPool
from tests.distributed.test_generate import ranks_of
from tests.models.huggingface_models import SMALL_MODELS, VOCAB, in_float64
from trimaran.runtime.evaluate.engine.requests import Likelihood, LikelihoodScore

MODELS = ["gpt2", "llama-grouped-biases", "falcon-40b", "gemma2", "bloom", "mixtral"]
TOLERANCE = 1e-9  # of a token in float64; bloom's slopes are float32 there, and its own tests loosen theirs too
LAYOUTS: dict[str, tuple[dict[str, int], list[BatchSize], list[str]]] = {
    "one": ({}, [1, 7, "auto"], MODELS),
    "tp2": ({"tp": 2}, ["auto"], MODELS[:2]),
    "pp2": ({"pp": 2}, [1, "auto"], MODELS[:2]),
    "dp2": ({"dp": 2}, [7], MODELS[:2]),
    "tp2-pp2-dp2": ({"tp": 2, "pp": 2, "dp": 2}, ["auto"], MODELS),
}
REQUESTS = requests_of(VOCAB, 32)
Expected = list[tuple[list[float], bool]]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Expected]]:
    """By model its folder, and what transformers says of every request, each by itself."""
    made = {}
    for name in MODELS:
        with in_float64(), torch.no_grad():
            model = SMALL_MODELS[name]()
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = folder, [reference(model, request) for request in REQUESTS]
    return made


def reference(model: Any, request: Likelihood) -> tuple[list[float], bool]:
    ids = torch.tensor([request.context + request.continuation])
    rows = model(input_ids=ids[:, :-1]).logits[0, len(request.context) - 1 :].log_softmax(-1)
    targets = torch.tensor(request.continuation)
    return rows.gather(1, targets[:, None])[:, 0].tolist(), bool((rows.argmax(-1) == targets).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_scores_like_transformers(
    layout: str, expected: dict[str, tuple[Path, Expected]], ranks: RankPool
) -> None:
    parallel, sizes, models = LAYOUTS[layout]
    folders = [expected[name][0] for name in models]
    found = ranks.run(score_families, ranks_of(parallel), parallel, folders, REQUESTS, sizes)[0]
    for name, by_size in zip(models, found, strict=True):
        for scores in by_size:
            check(scores, expected[name][1], name)


def check(scores: list[LikelihoodScore], expected: Expected, what: str) -> None:
    for score, (tokens, is_greedy) in zip(scores, expected, strict=True):
        assert score.token_log_likelihoods == pytest.approx(tokens, abs=TOLERANCE), what
        assert score.log_likelihood == pytest.approx(sum(tokens), abs=TOLERANCE * len(tokens)), what
        assert score.is_greedy == is_greedy, what


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> Any:
    return ranks.alone(score_small, {})


@pytest.mark.parametrize(
    "parallel",
    [
        {"tp": 2, "dp": 2, "sequence_parallel": True},
        {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b"},
        {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b", "tp": 2, "shared_memory": False},
    ],
    ids=["sequence-parallel-in-step", "interleaved", "tp2-interleaved-without-shared-memory"],
)
def test_layouts_of_training_score_like_one_rank(parallel: dict[str, Any], alone: Any, ranks: RankPool) -> None:
    found: Any = ranks.run(score_small, ranks_of(parallel), parallel)[0]
    for scores in found:
        check(scores, [(list(score.token_log_likelihoods), score.is_greedy) for score in alone[0]], "alone")


@pytest.mark.parametrize("parallel", [{}, {"pp": 2, "dp": 2}], ids=["one", "pp2-dp2"])
def test_logits_that_are_not_finite_name_the_request(parallel: dict[str, Any], ranks: RankPool) -> None:
    found = ranks.run(score_small, ranks_of(parallel), parallel, True)[0]
    assert isinstance(found, str)
    assert "the model's logits for request" in found
    assert "are not finite" in found


@pytest.mark.parametrize(
    ("parallel", "rank", "in_step"),
    [
        ({"tp": 2, "pp": 2}, 3, False),
        ({"pp": 2, "dp": 2}, 0, False),
        ({"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b", "dp": 2}, 1, False),
        ({"tp": 2, "dp": 2, "sequence_parallel": True}, 2, True),
    ],
    ids=["tp2-pp2", "pp2-dp2", "interleaved-dp2", "in-step"],
)
def test_a_request_to_stop_of_any_rank_ends_all(
    parallel: dict[str, Any], rank: int, in_step: bool, ranks: RankPool
) -> None:
    assert ranks.run(stop_on, ranks_of(parallel), parallel, rank, in_step) == [True] * ranks_of(parallel)
