"""The losses of compared answers equal TRL's on the same weights and documents; `golden_comparisons` says how."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimaran.models.config import TransformerConfig
from trimaran.models.criterion import Criterion
from trimaran.models.parallel.group import single
from trimaran.models.parallel.parameter import LayerContext
from trimaran.models.transformer import Stage, build_stages
from trimaran.runtime.finetune.comparisons import ComparisonLoader
from trimaran.runtime.finetune.criteria import DPO, IPO, KTO, ORPO, Reward
from trimaran.runtime.finetune.criteria.batch import ComparisonBatch, document_log_probs
from trimaran.runtime.finetune.data.examples import Document, Example
from trimaran.runtime.finetune.data.loader import ExampleLoader
from trimaran.runtime.finetune.data.packing import pack
from trimaran.runtime.finetune.data.records import Origin
from trimaran.runtime.finetune.data.store import ExampleSet, write_split

GOLDEN = json.loads((Path(__file__).parent / "golden_comparisons" / "trl.json").read_text())
LOSSES = GOLDEN["losses"]
MODEL = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 24,
    "vocab_size": 258,
    "max_seq_len": 64,
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "init": "normal",
    "init_std": 0.3,
}
SEQ = 48


@cache
def model(seed: int, score_head: str = "none") -> Stage:
    config = TransformerConfig.model_validate({**MODEL, "score_head": score_head})
    context = LayerContext(single("tp"), sequence_parallel=False, dtype=torch.float32, device=torch.device("cpu"))
    (stage,) = build_stages(config, [range(2)], [0], context, seed=seed)
    return stage


def document(golden: Any) -> Document:
    return Document.of(golden[0], golden[1])


def batch_of(folder: Path, examples: Sequence[Example], reference: np.ndarray | None = None) -> ComparisonBatch:
    """All examples in one microbatch of packed rows."""
    record = write_split(folder, "train", "uint16", examples, {"a": 0})
    found = ExampleSet(folder, "train", record, "uint16", ["a"])
    rows = pack(found.example_lengths, SEQ)
    sizes = {"seq_len": SEQ, "global_batch_size": len(rows), "micro_batch_size": len(rows), "dp_rank": 0, "dp_size": 1}
    loader = ExampleLoader(found, rows, **sizes, seed=0, padding_id=9, shuffle=False)
    (batch,) = ComparisonLoader(loader, found, reference).microbatches(0)
    assert isinstance(batch, ComparisonBatch)
    return batch


def hidden_of(stage: Stage, batch: ComparisonBatch) -> torch.Tensor:
    return stage._run(None, batch.tokens, *stage._context_of(batch, 0.0))


@torch.no_grad()
def log_probs(seed: int, folder: Path, documents: Sequence[Document]) -> np.ndarray:
    folder.mkdir()
    batch = batch_of(folder, [Example((each,), Origin("a", 1)) for each in documents])
    found = document_log_probs(model(seed), hidden_of(model(seed), batch), batch)
    values = np.zeros(len(documents))
    values[batch.document_numbers.numpy()] = found.numpy()
    return values


@torch.no_grad()
def loss(criterion: Criterion, stage: Stage, batch: ComparisonBatch) -> float:
    found = criterion(stage, hidden_of(stage, batch), batch)
    return float(found) / len(batch.values)


def pairs(name: str) -> list[Example]:
    return [
        Example(tuple(map(document, pair)), Origin("a", 1), margin)
        for pair, margin in zip(GOLDEN[name], GOLDEN["margins"], strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "make"), [("dpo", lambda: DPO(0.1)), ("dpo_beta", lambda: DPO(0.3)), ("ipo", lambda: IPO(0.4))]
)
def test_the_loss_of_pairs_with_a_reference_equals_trls(
    name: str, make: Callable[[], Criterion], tmp_path: Path
) -> None:
    examples = pairs("dpo_pairs")
    reference = log_probs(2, tmp_path / "reference", [each for example in examples for each in example.documents])
    found = loss(make(), model(1), batch_of(tmp_path, examples, reference))
    assert found == pytest.approx(LOSSES[name], rel=1e-5)


def test_the_loss_of_odds_equals_trls_where_a_prompt_has_one_token(tmp_path: Path) -> None:
    assert loss(ORPO(0.5), model(1), batch_of(tmp_path, pairs("orpo_pairs"))) == pytest.approx(LOSSES["orpo"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "weights"), [("kto", {}), ("kto_weighted", {"desirable_weight": 0.5, "undesirable_weight": 1.5})]
)
def test_the_loss_of_rated_answers_equals_trls(name: str, weights: dict[str, float], tmp_path: Path) -> None:
    documents = list(map(document, GOLDEN["rated"]))
    wrong = list(map(document, GOLDEN["mismatched"]))
    criterion = KTO(0.7, **weights)
    ratios = log_probs(1, tmp_path / "wrong", wrong) - log_probs(2, tmp_path / "wrong2", wrong)
    criterion.divergence = max(0.0, float(ratios.mean()))
    examples = [
        Example((each,), Origin("a", 1), float(good)) for each, good in zip(documents, GOLDEN["good"], strict=True)
    ]
    reference = log_probs(2, tmp_path / "reference", documents)
    found = loss(criterion, model(1), batch_of(tmp_path, examples, reference))
    assert found == pytest.approx(LOSSES[name], rel=1e-5)


def test_the_loss_of_rewards_equals_trls(tmp_path: Path) -> None:
    found = loss(Reward(0.05), model(3, "only"), batch_of(tmp_path, pairs("reward_pairs")))
    assert found == pytest.approx(LOSSES["reward"], rel=1e-5)
