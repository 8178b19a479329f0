"""Which kernels are chosen: by device, dtype and head width, or as asked for, with the reason where that can't be."""

import copy
import inspect
import pickle
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch

from trimaran.kernels.dispatch import TORCH, TRITON, KernelSet, choose_kernels

CPU, META = torch.device("cpu"), torch.device("meta")


def test_a_cpu_gets_torch() -> None:
    assert choose_kernels("auto", CPU, torch.float32, 64)[0] is TORCH
    assert choose_kernels("torch", CPU, torch.float32, 64)[0] is TORCH


def test_a_device_that_triton_compiles_for_gets_triton() -> None:
    assert choose_kernels("auto", META, torch.bfloat16, 64)[0] is TRITON
    assert choose_kernels("triton", META, torch.bfloat16, 64)[0] is TRITON
    assert choose_kernels("torch", META, torch.bfloat16, 64)[0] is TORCH


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        (CPU, torch.float32, 64, "they need a GPU and this rank's device is cpu"),
        (META, torch.float64, 64, "they work in bfloat16, float16 and float32, not in float64"),
        (META, torch.float32, 512, "attention takes a head_dim of at most 256 and this model has 512"),
    ],
)
def test_triton_where_it_cannot_run_is_an_error_with_the_reason(
    device: torch.device, dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"can't run: {reason}; set kernels.backend to auto or torch"):
        choose_kernels("triton", device, dtype, head_dim)
    told = "" if device == CPU else f" (Triton's can't run: {reason})"
    assert choose_kernels("auto", device, dtype, head_dim) == (TORCH, f"torch's kernels{told}")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels.backend \('cuda'\) must be"):
        choose_kernels("cuda", CPU, torch.float32, 64)  # type: ignore[arg-type]


def test_the_two_implementations_share_no_op() -> None:
    for field in fields(KernelSet):
        ours, theirs = getattr(TRITON, field.name), getattr(TORCH, field.name)
        if field.name == "activations":
            assert ours.keys() == theirs.keys()
            # relu alone is torch's for both: one kernel on any device, and no other op to fuse it with.
            assert {name for name in ours if ours[name] is theirs[name]} == {"relu"}
        else:
            assert ours != theirs, field.name


def test_the_two_implementations_have_the_signature_of_their_protocol() -> None:
    """mypy compares names and types; defaults it does not compare."""
    hints = get_type_hints(KernelSet)
    for field in fields(KernelSet):
        if field.name in ("name", "cross_entropy", "activations"):
            continue
        ours, theirs = (inspect.signature(getattr(kernels, field.name)) for kernels in (TRITON, TORCH))
        assert ours == theirs, field.name
        assert list(ours.parameters) == list(inspect.signature(hints[field.name].__call__).parameters)[1:], field.name


@pytest.mark.parametrize("kernels", [TORCH, TRITON], ids=["torch", "triton"])
def test_a_model_that_holds_kernels_can_be_copied_and_pickled(kernels: KernelSet) -> None:
    assert copy.deepcopy(kernels) is kernels
    assert pickle.loads(pickle.dumps(kernels)) is kernels
