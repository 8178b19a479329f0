"""Dropout (Srivastava et al. 2014) whose mask is drawn by counter, so that it is the same at every layout."""

import torch
from torch import Tensor

from trimaran.kernels.random import keep_mask, stream_key


def dropout(x: Tensor, rate: float, *, seed: int, site: str, first_sample: int, first_position: int, seq_len: int) -> Tensor:
    """Return x with elements zeroed with probability `rate` and the rest divided by 1 - rate.

    Args:
        x: [batch, local seq, hidden]; its samples are first_sample, first_sample + 1, ... of the whole run, and its positions
            start at first_position of seq_len.
        site: the name of this dropout in the network, global (it holds the layer's number).
    """
    if rate == 0.0:
        return x
    batch, local_seq, hidden = x.shape
    sample = torch.arange(first_sample, first_sample + batch, device=x.device)[:, None]
    position = torch.arange(first_position, first_position + local_seq, device=x.device)[None, :]
    keep = keep_mask(stream_key(seed, site), (sample * seq_len + position).flatten(), hidden, rate)
    return x * keep.view(x.shape) / (1.0 - rate)
