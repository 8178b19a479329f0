"""The AdamW kernel in the interpreter, against torch's fused operator."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trimaran.kernels.adamw import AdamWState, adamw_, triton_adamw_

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
PARTS = ("param", "exp_avg", "exp_avg_sq")


def make_state(size: int, dtype: torch.dtype = torch.float32, copy: torch.dtype | None = None) -> AdamWState:
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    copied = None if copy is None else torch.zeros(size, dtype=copy)
    return AdamWState(param, grad, torch.zeros_like(param), torch.zeros_like(param), torch.zeros(()), copied)


def gradient(size: int, step: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(100 + step))


@pytest.mark.parametrize("grad_factor", [1.0, 0.37])
@pytest.mark.parametrize("size", [1, 16, 61])
def test_ten_steps_equal_the_reference(size: int, grad_factor: float) -> None:
    state, reference = make_state(size, copy=torch.float16), make_state(size, copy=torch.float16)
    for step in range(10):
        for each in (state, reference):
            each.grad.copy_(gradient(size, step))
        triton_adamw_([state], **HYPER, grad_factor=grad_factor)
        adamw_([reference], **HYPER, grad_factor=grad_factor)
        assert state.grad.equal(gradient(size, step))
    for part in PARTS:
        torch.testing.assert_close(getattr(state, part), getattr(reference, part), rtol=2e-6, atol=1e-7)
    assert state.step == 10
    assert state.copy is not None
    assert state.copy.equal(state.param.half())


@pytest.mark.parametrize(
    "hyper", [{"weight_decay": 0.0}, {"beta1": 0.0}, {"beta1": 0.0, "beta2": 0.0}, {"eps": 0.1, "lr": 0.0}]
)
def test_hyperparameters_at_their_ends(hyper: dict[str, float]) -> None:
    state, reference = make_state(20), make_state(20)
    for _ in range(3):
        triton_adamw_([state], **HYPER | hyper)
        adamw_([reference], **HYPER | hyper)
    for part in PARTS:
        torch.testing.assert_close(getattr(state, part), getattr(reference, part), rtol=2e-6, atol=1e-7)


def test_far_steps_go_on_from_a_stored_count() -> None:
    state, reference = make_state(20), make_state(20)
    for each in (state, reference):
        each.step.fill_(99_999)
    triton_adamw_([state], **HYPER)
    adamw_([reference], **HYPER)
    torch.testing.assert_close(state.param, reference.param, rtol=2e-6, atol=1e-7)
    assert state.step == 100_000


def test_pieces_of_a_tensor_step_like_the_whole_to_the_bit() -> None:
    whole, cut = make_state(131, copy=torch.float16), make_state(131, copy=torch.float16)
    assert cut.copy is not None
    tensors = (cut.param, cut.grad, cut.exp_avg, cut.exp_avg_sq)
    pieces = [
        AdamWState(*(t[a:b] for t in tensors), torch.zeros(()), cut.copy[a:b])
        for a, b in pairwise([0, 1, 8, 8, 77, 131])
    ]
    for step in range(5):
        for state in (whole, cut):
            state.grad.copy_(gradient(131, step))
        triton_adamw_([whole], **HYPER)
        triton_adamw_(pieces, **HYPER)
    for part in (*PARTS, "copy"):
        assert getattr(cut, part).equal(getattr(whole, part))


def test_no_state_and_an_empty_state_are_allowed() -> None:
    triton_adamw_([], **HYPER)
    state = make_state(0)
    triton_adamw_([state], **HYPER)
    assert state.step == 1


def test_float64_and_strided_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 or less, got torch\.float64"):
        triton_adamw_([make_state(4, torch.float64)], **HYPER)
    strided = [torch.zeros(8)[::2] for _ in range(4)]
    with pytest.raises(ValueError, match=r"strides \(2,\)"):
        triton_adamw_([AdamWState(*strided, torch.zeros(()))], **HYPER)
