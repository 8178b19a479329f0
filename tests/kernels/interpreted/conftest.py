"""Tests of the Triton kernels in Triton's interpreter, on CPU tensors.

tests/kernels/test_interpreter.py runs them in processes with TRITON_INTERPRET=1, since the mode is fixed when a kernel
is decorated. Elsewhere they are not collected.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
import triton
from torch import Tensor

from tests.kernels import interpreter

if triton.knobs.runtime.interpret:
    interpreter.speed_up()
collect_ignore_glob = [] if triton.knobs.runtime.interpret else ["test_*.py"]

Op = Callable[..., Tensor | tuple[Tensor, ...]]
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3}
"""Largest error over the largest value: some tens of roundings of the dtype (float32 2^-24, float16 2^-11)."""


def run(op: Op, inputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return the outputs of `op` and the gradients of those inputs that want one, under random output gradients."""
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    # Rounded to float16, so that every dtype gets the same output gradients.
    grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64).half() for out in outputs]
    wanted = [x for x in inputs if x.requires_grad]
    pairs = [(out, grad.to(out.dtype)) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    found = torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs]) if wanted else ()
    return [*(out.detach() for out in outputs), *found]


def assert_equals_reference(
    op: Op, reference: Op, inputs: Sequence[Tensor], dtype: torch.dtype, tolerance: float | None = None
) -> None:
    """Compare every output and gradient of `op` in `dtype` with `reference` in float64 on the same rounded inputs.

    Args:
        inputs: floating-point ones are rounded to `dtype`, and those that require a gradient are compared by theirs.
    """
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance

    def cast(x: Tensor, to: torch.dtype) -> Tensor:
        if not x.is_floating_point():
            return x
        return x.detach().to(dtype).to(to).requires_grad_(x.requires_grad)

    found = run(op, [cast(x, dtype) for x in inputs], seed=7)
    expected = run(reference, [cast(x, torch.float64) for x in inputs], seed=7)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, f"tensor {index}: {a.shape} against {b.shape}"
        scale = max(b.abs().max().item(), 1e-6) if b.numel() else 1.0
        error = (a.double() - b).abs().max().item() / scale if b.numel() else 0.0
        assert error <= tolerance, (
            f"tensor {index} of shape {tuple(b.shape)}: error {error:.2e} of the largest value, over {tolerance:.0e}"
        )


@pytest.fixture
def equals_reference() -> Callable[..., None]:
    """`assert_equals_reference`, for tests."""
    return assert_equals_reference
