"""AdamW over flat tensors against torch.optim.AdamW and against the formula."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trimaran.kernels.adamw import AdamWState, adamw_

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def make_state(size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> AdamWState:
    generator = torch.Generator().manual_seed(seed)
    param, grad = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return AdamWState(param, grad, torch.zeros_like(param), torch.zeros_like(param), torch.zeros(()))


def gradient(size: int, step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_ten_steps_equal_torch_optim_adamw(size: int, dtype: torch.dtype, weight_decay: float) -> None:
    state = make_state(size, dtype)
    theirs = torch.nn.Parameter(state.param.clone())
    optimizer = torch.optim.AdamW(
        [theirs],
        lr=HYPER["lr"],
        betas=(0.9, 0.95),
        eps=HYPER["eps"],
        weight_decay=weight_decay,
        foreach=False,
        fused=False,
    )
    for step in range(10):
        state.grad.copy_(gradient(size, step, dtype))
        theirs.grad = state.grad.clone()
        adamw_([state], **HYPER | {"weight_decay": weight_decay})
        optimizer.step()
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6  # the fused operator rounds in another order
    torch.testing.assert_close(state.param, theirs.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.exp_avg, optimizer.state[theirs]["exp_avg"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.exp_avg_sq, optimizer.state[theirs]["exp_avg_sq"], rtol=tolerance, atol=tolerance)
    assert state.step == 10


def test_one_step_is_the_formula() -> None:
    state = make_state(50)
    p, g = state.param.clone(), state.grad.clone()
    adamw_([state], **HYPER)
    # After one step both bias corrections cancel: m / (1 - b1) = g and sqrt(v / (1 - b2)) = |g|.
    expected = p - HYPER["lr"] * (g / (g.abs() + HYPER["eps"]) + HYPER["weight_decay"] * p)
    torch.testing.assert_close(state.param, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(state.exp_avg, 0.1 * g, rtol=0, atol=1e-15)
    torch.testing.assert_close(state.exp_avg_sq, 0.05 * g.square(), rtol=0, atol=1e-15)


def test_the_gradient_is_left_alone() -> None:
    state = make_state(9)
    before = state.grad.clone()
    adamw_([state], **HYPER)
    assert state.grad.equal(before)


def test_a_gradient_factor_is_a_scaled_gradient() -> None:
    factored, scaled = make_state(33), make_state(33)
    scaled.grad.mul_(0.25)
    adamw_([factored], **HYPER, grad_factor=0.25)
    adamw_([scaled], **HYPER)
    assert factored.param.equal(scaled.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_copy_is_the_new_parameter_in_its_own_dtype(dtype: torch.dtype) -> None:
    state = replace(make_state(40, torch.float32), copy=torch.zeros(40, dtype=dtype))
    plain = make_state(40, torch.float32)
    adamw_([state, make_state(3, torch.float32)], **HYPER)
    adamw_([plain], **HYPER)
    assert state.copy is not None
    assert state.param.equal(plain.param)
    assert state.copy.equal(plain.param.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_of_a_tensor_step_like_the_whole(dtype: torch.dtype) -> None:
    whole, cut = make_state(131, dtype), make_state(131, dtype)
    bounds = [0, 1, 8, 8, 77, 131]  # odd lengths, odd addresses, an empty piece
    pieces = [
        AdamWState(cut.param[a:b], cut.grad[a:b], cut.exp_avg[a:b], cut.exp_avg_sq[a:b], torch.zeros(()))
        for a, b in pairwise(bounds)
    ]
    for step in range(5):
        for state in (whole, cut):
            state.grad.copy_(gradient(131, step, dtype))
        adamw_([whole], **HYPER)
        adamw_(pieces, **HYPER)
    # Not to the bit: torch's fused operator multiplies and adds in one rounding in its vector loop, in two in the
    # scalar tail of a piece.
    tolerance = 8 * torch.finfo(dtype).eps
    for got, expected in ((cut.param, whole.param), (cut.exp_avg, whole.exp_avg), (cut.exp_avg_sq, whole.exp_avg_sq)):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_steps_go_on_from_a_stored_count() -> None:
    straight, resumed = make_state(20), make_state(20)
    for _ in range(6):
        adamw_([straight], **HYPER)
    for _ in range(3):
        adamw_([resumed], **HYPER)
    copy = AdamWState(
        *(t.clone() for t in (resumed.param, resumed.grad, resumed.exp_avg, resumed.exp_avg_sq)), torch.tensor(3.0)
    )
    for _ in range(3):
        adamw_([copy], **HYPER)
    assert copy.param.equal(straight.param)


def test_a_zero_gradient_only_decays_and_an_empty_tensor_is_allowed() -> None:
    state, empty = make_state(5), make_state(0)
    state.grad.zero_()
    before = state.param.clone()
    adamw_([state, empty], **HYPER)
    torch.testing.assert_close(state.param, before * (1 - HYPER["lr"] * HYPER["weight_decay"]), rtol=0, atol=1e-15)
    assert empty.param.shape == (0,)
