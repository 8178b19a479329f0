"""The twelve constants by which software on a cluster of chips differs from a datasheet."""

from dataclasses import astuple, dataclass, fields
from typing import Final

import numpy as np

from trimaran.runtime.plan.cases import Array


@dataclass(frozen=True)
class Constants:
    """Shares are of the datasheet's figure; seconds are seconds.

    Attributes:
        gemm: best share of the peak that a large product reaches.
        half_depth: K0: depth of a product at which it reaches half of that.
        hbm: share of the memory's rate.
        attention: share of the peak that fused attention reaches.
        link: share of the rate of the links in a node.
        link_latency: seconds of one collective or transfer.
        nic: share of the rate of the network cards.
        dp_latency: seconds of each rank of a dp group in a step, or in a gathering.
        host: seconds in which the host launches a layer's forward.
        traffic: bytes of what is bound by memory, as a multiple of the least.
        hidden_tp: share of tp's collectives that runs beside products.
        hidden_dp: share of a backward pass beside which dp's collectives run.
    """

    gemm: float
    half_depth: float
    hbm: float
    attention: float
    link: float
    link_latency: float
    nic: float
    dp_latency: float
    host: float
    traffic: float
    hidden_tp: float
    hidden_dp: float


NAMES: Final = tuple(field.name for field in fields(Constants))
SHARES: Final = ("gemm", "hbm", "attention", "link", "nic", "hidden_tp", "hidden_dp")
"""Those that lie between 0 and 1."""

DEFAULT: Final = Constants(0.75, 60.0, 0.7, 0.4, 0.5, 3e-5, 0.8, 3e-4, 8e-4, 0.9, 0.3, 0.5)
"""Where nothing is known of a software."""


def to_free(constants: Constants) -> Array:
    """Return numbers [12] that may take any value: logits of shares, logarithms of others."""
    values = np.array(astuple(constants), dtype=np.float64)
    is_share = np.array([name in SHARES for name in NAMES])
    return np.where(is_share, np.log(values / np.where(is_share, 1 - values, 1.0)), np.log(values))


def from_free(free: Array) -> Constants:
    """Return the constants of such numbers."""
    is_share = np.array([name in SHARES for name in NAMES])
    clipped = np.clip(free, -60.0, 60.0)
    return Constants(*map(float, np.where(is_share, 1 / (1 + np.exp(-clipped)), np.exp(clipped))))
