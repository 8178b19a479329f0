"""Checks of arguments that several ops share."""

from torch import Tensor


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Raise ValueError unless x and the residual stream have one shape. Their dtypes may differ: the sum has x's."""
    if x.shape != residual.shape:
        raise ValueError(f"x and residual must have one shape; they have {tuple(x.shape)} and {tuple(residual.shape)}")
