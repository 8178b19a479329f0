"""LayerNorm and RMSNorm kernels in the interpreter, alone and after a residual sum.

Its tiles hold 64 bytes: several rows of up to 8 float32, one of 16, a piece of a longer one; the backward pass of
RMSNorm takes rows of 33 to 64 float32 (65 to 128 float16) whole, loading them twice.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.covering import covering_array, label
from trimaran.kernels import norm

SHAPES = [(1, 3), (9, 6), (2, 2, 16), (5, 33), (3, 1, 1, 64), (3, 130), (0, 8), (2, 0, 8)]
NAMES = ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"]
EPS = 1e-5


def call(op: Callable[..., Tensor], name: str, eps: float = EPS) -> Callable[..., Tensor]:
    """Return `op` with its eps, and for a LayerNorm of (.., weight) alone with no bias."""
    num_inputs = 3 + name.startswith("add_")

    def run(*inputs: Tensor) -> Tensor:
        return op(*inputs, None, eps) if "layer" in name and len(inputs) < num_inputs else op(*inputs, eps)

    return run


def inputs(name: str, shape: tuple[int, ...], with_bias: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    streams = [torch.randn(shape, generator=generator, dtype=torch.float64) * scale + 0.5 for scale in (2.0, 1.0)]
    vectors = [torch.randn(shape[-1:], generator=generator, dtype=torch.float64) for _ in range(2)]
    chosen = streams[: 1 + name.startswith("add_")] + vectors[: 1 + ("layer" in name and with_bias)]
    return [x.requires_grad_() for x in chosen]


@pytest.fixture(autouse=True)
def two_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that each walks over several tiles of rows in the backward pass."""
    monkeypatch.setattr(norm, "multiprocessors", lambda device: 2)


LEVELS = {"name": NAMES, "shape": SHAPES, "dtype": [torch.float32, torch.float16]}


@pytest.mark.parametrize("case", covering_array(LEVELS), ids=label)
def test_equals_the_reference(case: dict[str, Any], equals_reference: Callable[..., None]) -> None:
    name = case["name"]
    kernel, reference = (call(getattr(norm, prefix + name), name) for prefix in ("triton_", ""))
    equals_reference(kernel, reference, inputs(name, case["shape"]), case["dtype"])


@pytest.mark.parametrize("shape", [(9, 3), (5, 33)])
@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm"])
def test_layer_norm_without_a_bias(name: str, shape: tuple[int, ...], equals_reference: Callable[..., None]) -> None:
    chosen = inputs(name, shape, with_bias=False)
    equals_reference(
        call(getattr(norm, f"triton_{name}"), name), call(getattr(norm, name), name), chosen, torch.float32
    )


@pytest.mark.parametrize(("shape", "num_programs"), [((1, 1), 2), ((5, 20), 1), ((5, 6), 132)])
@pytest.mark.parametrize("name", NAMES)
def test_a_large_eps_and_any_number_of_programs(
    name: str,
    shape: tuple[int, ...],
    num_programs: int,
    equals_reference: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(norm, "multiprocessors", lambda device: num_programs)
    equals_reference(
        call(getattr(norm, f"triton_{name}"), name, 0.5),
        call(getattr(norm, name), name, 0.5),
        inputs(name, shape),
        torch.float32,
    )


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_inputs_and_gradients(name: str, equals_reference: Callable[..., None]) -> None:
    def transposed(op: Callable[..., Tensor]) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        def run(*all_inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            out = call(op, name)(*(x.transpose(0, 1) if x.dim() == 3 else x.flip(0)[::2] for x in all_inputs))
            return out.transpose(0, 1) if isinstance(out, Tensor) else tuple(y.transpose(0, 1) for y in out)

        return run

    chosen = inputs(name, (4, 3, 10))
    chosen = [x if x.dim() == 3 else x.detach().repeat(2).requires_grad_() for x in chosen]
    equals_reference(
        transposed(getattr(norm, f"triton_{name}")), transposed(getattr(norm, name)), chosen, torch.float32
    )


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm"])
def test_one_output_alone_may_be_used(name: str, used: int, equals_reference: Callable[..., None]) -> None:
    vectors = [x.detach() for x in inputs(name, (5, 20))[2:]]

    def one(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda x, residual: op(x, residual, *(v.to(x.dtype) for v in vectors), EPS)[used]

    equals_reference(
        one(getattr(norm, f"triton_{name}")), one(getattr(norm, name)), inputs(name, (5, 20))[:2], torch.float32
    )


@pytest.mark.parametrize("shape", [(9, 3), (5, 33)])
@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm"])
def test_the_sum_is_rounded_before_it_is_normalised(name: str, shape: tuple[int, ...]) -> None:
    x, residual, *vectors = (t.detach().half() for t in inputs(name, shape))
    total, normed = getattr(norm, f"triton_{name}")(x, residual, *vectors, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, getattr(norm, "triton_" + name.removeprefix("add_"))(total, *vectors, EPS))


@pytest.mark.parametrize("width", [3, 33, 100])
@pytest.mark.parametrize("name", NAMES)
def test_float32_weights_with_float16_activations(name: str, width: int) -> None:
    chosen = [
        t.detach().half().to(torch.float32 if t.dim() == 1 else torch.float16).requires_grad_()
        for t in inputs(name, (6, width))
    ]
    wide = [t.detach().double().requires_grad_() for t in chosen]
    results = []
    for op, arguments in ((getattr(norm, f"triton_{name}"), chosen), (getattr(norm, name), wide)):
        outputs = call(op, name)(*arguments)
        last = outputs if isinstance(outputs, Tensor) else outputs[1]
        results.append([last, *torch.autograd.grad(last, arguments, torch.ones_like(last))])
    assert [t.dtype for t in results[0]] == [torch.float16, *(t.dtype for t in chosen)]
    for index, (found, expected) in enumerate(zip(*results, strict=True)):
        # A sum of float32 weights' gradients is as exact as its terms: those come from rounded activations, but are not
        # rounded themselves.
        limit = 1e-3 if found.dtype == torch.float16 or name.startswith("add_") else 1e-5
        assert (found - expected).abs().max() <= limit * expected.abs().max().clamp(min=1.0), index


def test_gradients_of_x_and_residual_do_not_share_memory() -> None:
    x, residual, weight = (t.detach().float().requires_grad_() for t in inputs("add_rms_norm", (4, 8)))
    total, normed = norm.triton_add_rms_norm(x, residual, weight, EPS)
    (total.sum() + normed.sum()).backward()
    assert x.grad is not None
    assert residual.grad is not None
    assert torch.equal(x.grad, residual.grad)
    x.grad.zero_()
    assert residual.grad.any()


def test_wrong_shapes_are_refused() -> None:
    x, weight = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"x and residual must have one shape; they have \(2, 4\) and \(1, 4\)"):
        norm.triton_add_rms_norm(x, x[:1], weight, EPS)
    with pytest.raises(ValueError, match=r"weight must have the shape \[hidden\] = \[4\]; it has \[1\]"):
        norm.triton_rms_norm(x, weight[:1], EPS)
    with pytest.raises(ValueError, match=r"bias must have the shape \[hidden\] = \[4\]; it has \[3\]"):
        norm.triton_add_layer_norm(x, x, weight, weight[:3], EPS)
    for hidden in (0, 65537):
        with pytest.raises(ValueError, match=rf"hidden \({hidden}\) must be 1 to 65536 in a Triton norm"):
            norm.triton_layer_norm(torch.zeros(1, hidden), torch.ones(hidden), None, EPS)
