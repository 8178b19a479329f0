"""Which device a rank takes, and what it does not import."""

import pytest
import torch

from tests.launchers.forked import fork_server
from trimaran.launchers.worker.process_group import choose_device


@pytest.mark.parametrize(("num_gpus", "wish"), [(0, "auto"), (1, "auto"), (4, "cpu")])
def test_cpu_where_there_are_too_few_gpus_or_it_is_asked_for(
    num_gpus: int, wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert choose_device(wish, 0, 2) == torch.device("cpu")  # type: ignore[arg-type]


def test_too_few_gpus_for_cuda_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="this host has 1 GPUs for 8 ranks"):
        choose_device("cuda", 0, 8)


def test_a_rank_with_a_gpu_of_its_own_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert choose_device("auto", 3, 8) == torch.device("cuda", 3)
    assert taken == [torch.device("cuda", 3)]


def test_a_rank_starts_without_the_compiler() -> None:
    """torch._dynamo and the sympy that it brings take as long to import as half of torch."""
    imported = set(fork_server().imported["rank"])
    assert {"torch", "trimaran.launchers.worker.run"} <= imported
    assert not {"torch._dynamo", "sympy", "matplotlib", "transformers"} & imported


def test_the_command_line_starts_without_torch() -> None:
    """A spec that is wrong is refused before the seconds that torch takes to import."""
    imported = set(fork_server().imported["command line"])
    assert "trimaran.launchers.cli.app" in imported
    assert not {"torch", "numpy", "matplotlib", "tokenizers", "transformers"} & imported
