"""The size of batches follows the free memory, within bounds, and changes no score; a request to stop is heard."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runtime.huggingface.huggingface_folders import VOCAB, llama, saved
from trimaran.runtime import processes
from trimaran.runtime.evaluate.engine import budget
from trimaran.runtime.evaluate.engine.budget import budget_of
from trimaran.runtime.evaluate.engine.replica import Engine
from trimaran.runtime.evaluate.engine.requests import AskedToStop, Continuation, Likelihood
from trimaran.runtime.evaluate.engine.scorer import Scorer
from trimaran.runtime.evaluate.engine.weights import load_stages, open_model
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.mesh import lone_mesh

GIB = 1 << 30


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    model, mesh = open_model(saved(llama(), tmp_path_factory.mktemp("budget"), tokenizer=True)), lone_mesh()
    stages = load_stages(model.origin, model.spec, mesh, torch.device("cpu"))
    return Engine(stages, mesh, model.spec, model.text.tokenizer)


def requests() -> list[Likelihood]:
    return [Likelihood((1, 2, number % VOCAB, *range(3, 40)), (number % 7, 5)) for number in range(40)]


def test_more_memory_makes_larger_batches_between_bounds(engine: Engine) -> None:
    config = engine.spec.transformer
    for device, most in (("cpu", 4096), ("cuda", 65536)):
        layout: dict[str, Any] = {"tp": 1, "pp": 1, "dtype_bytes": 4, "device": device}
        found = [budget_of(config, free, **layout) for free in (0, GIB, 64 * GIB, None)]
        tokens = [each.tokens for each in found]
        assert tokens == sorted(tokens)
        assert (tokens[0], tokens[-1]) == (256, most)
        assert [each.cache_tokens for each in found] == sorted(each.cache_tokens for each in found)
        assert found[0].cache_tokens >= 1
    big = budget_of(config, GIB // 4, tp=1, pp=1, dtype_bytes=4, device="cpu")
    assert budget_of(config, GIB // 8, tp=1, pp=1, dtype_bytes=8, device="cpu").tokens <= big.tokens


def test_scores_do_not_depend_on_the_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests()
    continued = [Continuation((1, 2, number), (), SamplingParams(4, temperature=0.0)) for number in range(6)]
    found = []
    for free in (0, None):
        monkeypatch.setattr(budget, "free_memory_bytes", lambda free=free: free)
        scorer = Scorer(engine)
        assert scorer._replica.budget.tokens == {0: 256, None: 4096}[free]
        found.append((scorer.likelihoods(asked), scorer.continuations(continued)))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-5)
        assert one.is_greedy == other.is_greedy
    assert found[0][1] == found[1][1]


def test_free_memory_is_what_host_and_control_groups_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}
    groups = {
        "memory.max": [["max", "5"], ["3000000", "2500000", "anon", "1", "inactive_file", "500000"]],
        "memory.limit_in_bytes": [],
    }
    monkeypatch.setattr(processes, "read_text", lambda path: files[str(path)])
    monkeypatch.setattr(processes, "cgroup_values", lambda *names: groups[names[0]])
    assert processes.free_memory_bytes() == 1000000
    groups["memory.max"] = []
    assert processes.free_memory_bytes() == 8000 * 1024

    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(processes, "read_text", missing)
    assert processes.free_memory_bytes() is None


def test_a_request_to_stop_leaves_between_two_batches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory_bytes", lambda: 0)
    asked = [Likelihood((number % VOCAB, *range(3, 60)), (5,)) for number in range(40)]  # no beginning in common
    told: list[int] = []
    stopping = Engine(**{**vars(engine), "stop": lambda: len(told) > 3})
    with pytest.raises(AskedToStop):
        Scorer(stopping).likelihoods(asked, lambda number, score: told.append(number))
    assert 3 < len(told) < 10
    going_on = Engine(**{**vars(engine), "stop": lambda: False})
    assert len(Scorer(going_on).likelihoods(asked)) == 40
