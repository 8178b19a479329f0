"""Models of transformers cut over TP2 x PP2, experts over EP2 too: the same logits, loss and gradients.

One pool call runs all families, one after the other. Both sides compute in float64, as in
tests/models/test_families.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.distributed.family_ranks import steps_on_rank
from tests.distributed.ranks import RankPool
from tests.models.huggingface_models import BATCH, SMALL_MODELS, VOCAB, Imported, Tensors, gradients_of, in_float64
from trimaran.models.batch import Microbatch
from trimaran.models.config import TransformerConfig

SEQ = 14  # even, for sequence parallelism
# One of every family at least; heads divide by tp, key-value heads in part do not.
MODELS = [
    "gpt2-exact-gelu",
    "gptj",
    "gpt_neo",
    "gpt_neox",
    "falcon-40b",
    "falcon-11b",
    "falcon-rw",
    "falcon-multi-query-sequential",
    "llama-grouped-biases",
    "llama-one-kv-head-tied",
    "llama-yarn",
    "mistral",
    "mixtral",
    "qwen2-windows",
    "qwen3",
    "gemma",
    "gemma2",
    "olmo",
    "olmo2",
    "bloom",
    "opt",
    "opt-post-norm-no-bias",
    "palm",
    "starcoder2",
]
LAYOUTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "tp2-pp2": ({"tp": 2, "pp": 2}, MODELS),
    "tp2-pp2-sequence-parallel": ({"tp": 2, "pp": 2, "sequence_parallel": True}, MODELS),
    "pp2-dp2-ep2": ({"pp": 2, "dp": 2, "ep": 2}, ["mixtral"]),
}


@dataclass(frozen=True)
class Case:
    """A model of transformers under our names, and what it makes of a batch."""

    name: str
    config: TransformerConfig
    weights: Tensors
    logits: Tensor
    loss: float
    gradients: Tensors


def batch() -> Microbatch:
    generator = torch.Generator().manual_seed(13)
    tokens, labels = (torch.randint(VOCAB, (BATCH, SEQ), generator=generator) for _ in range(2))
    return Microbatch(tokens, labels, 0)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    made = {}
    for name in MODELS:
        with in_float64():
            theirs = SMALL_MODELS[name]()
            logits = theirs(input_ids=batch().tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch().labels.flatten(), reduction="sum")
        loss.backward()
        imported = Imported(theirs, tmp_path_factory.mktemp("saved"))
        gradients = gradients_of(imported, Path(tmp_path_factory.mktemp("gradients")))
        made[name] = Case(name, imported.config, imported.weights, logits.detach(), loss.item(), gradients)
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_gives_transformers_logits_and_gradients_when_cut(
    layout: str, cases: dict[str, Case], ranks: RankPool
) -> None:
    parallel, names = LAYOUTS[layout]
    results = ranks.run(
        steps_on_rank, 4, parallel, [(cases[name].config, cases[name].weights) for name in names], batch()
    )
    for name, per_rank in zip(names, zip(*results, strict=True), strict=True):
        check(cases[name], list(per_rank))


def check(case: Case, results: list[dict[str, Any]]) -> None:
    loosened = 100 if case.config.position == "alibi" else 1
    last = sorted((result for result in results if result["logits"] is not None), key=lambda result: result["column"])
    for replica in {result["dp"] for result in last}:
        logits = torch.cat([result["logits"] for result in last if result["dp"] == replica], dim=-1)[..., :VOCAB]
        compare(logits, case.logits, loosened * 1e-10, f"{case.name}: logits")
    losses = {result["dp"]: result["loss"] for result in last}
    assert sum(losses.values()) == pytest.approx(case.loss, abs=loosened * 1e-9), case.name
    seen: dict[str, int] = {}
    for parameter, shard, local_shape, start, values in (piece for result in results for piece in result["pieces"]):
        box = shard.box(local_shape)
        padded = torch.zeros(local_shape, dtype=torch.float64)
        padded[tuple(slice(0, high - low) for low, high in box)] = case.gradients[parameter][
            tuple(slice(low, high) for low, high in box)
        ]
        compare(values, padded.flatten()[start : start + len(values)], loosened * 1e-9, f"{case.name}: {parameter}")
        seen[parameter] = seen.get(parameter, 0) + len(values)
    assert all(seen[parameter] >= gradient.numel() for parameter, gradient in case.gradients.items()), (
        "every number's gradient was compared"
    )


def compare(found: Tensor, expected: Tensor, atol: float, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")
