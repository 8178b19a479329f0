"""An out-of-memory error of a rank ends with what was planned and what it held; other errors stay as they are."""

import json
from pathlib import Path

import pytest
import torch

from tests.plan.test_calibrate import spec
from trimaran.runtime.mesh import lone_mesh
from trimaran.runtime.plan.brief import FILE, Place, brief_of
from trimaran.runtime.train.monitor.held import is_out_of_memory, record_memory, resident_bytes, telling_memory
from trimaran.runtime.train.train_context import build_train_context
from trimaran.runtime.zero.protocol import Optimizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def optimizer() -> Optimizer:
    return build_train_context(spec(), lone_mesh(), CPU).optimizer


def test_what_a_rank_holds_is_what_was_planned(optimizer: Optimizer) -> None:
    found = json.loads(record_memory(optimizer, lone_mesh(), CPU, resident_bytes()))
    planned = brief_of(spec(), Place("here", None, None)).memory[0]
    for name in ("parameters", "gradients", "optimizer"):
        assert found["by_pipeline_rank"][0][name] == planned[name]
    assert found["by_pipeline_rank"][0]["peak"] >= 0
    assert found["peak_is"].startswith("resident")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), "Tried to allocate 2.00 GiB"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "can't allocate memory"),
        (MemoryError(), "memory has run out"),
    ],
)
def test_an_error_of_memory_ends_with_the_table(
    tmp_path: Path, optimizer: Optimizer, error: BaseException, says: str
) -> None:
    (tmp_path / FILE).write_text(brief_of(spec(), Place("here", None, None)).model_dump_json())
    with pytest.raises(RuntimeError) as told, telling_memory(tmp_path, lone_mesh(), CPU, lambda: optimizer, 0):
        raise error
    lines = str(told.value).splitlines()
    assert lines[0].startswith("out of memory: ")
    assert says in lines[0]
    parameters = next(line.split() for line in lines if line.strip().startswith("parameters"))
    assert parameters[1:3] == parameters[3:5], "planned as measured"
    assert lines[-1].strip().startswith("tensors in all, at most")


def test_without_a_plan_or_an_optimizer_the_error_is_told_all_the_same(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"^out of memory: gone$"),
        telling_memory(tmp_path, lone_mesh(), CPU, lambda: None, 0),
    ):
        raise torch.OutOfMemoryError("gone")


def test_other_errors_pass(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"^shapes differ$"),
        telling_memory(tmp_path, lone_mesh(), CPU, lambda: None, 0),
    ):
        raise RuntimeError("shapes differ")
    assert not is_out_of_memory(ValueError("out of memory"))
