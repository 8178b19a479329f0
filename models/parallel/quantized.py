"""Frozen matrices in 4 bits, of which each use makes a matrix of the layer's dtype for a moment."""

import torch
from torch import Tensor

from trimaran.kernels import nf4
from trimaran.models.parallel.parameter import ParameterInfo
from trimaran.models.parallel.shard import Shape, num_elements


def blocks_stay_whole(global_shape: Shape, dim: int | None, local_length: int, count: int) -> bool:
    """Whether a cut of a matrix over `count` ranks gives every rank whole blocks of `nf4.BLOCK` elements of a row.

    Only then has a shard the bits of the same elements of the whole matrix: the consecutive elements that a rank holds
    (its rows, or its part of each row) must be a multiple of the block.

    Args:
        global_shape: [out, in].
        dim: that is cut, None for no cut.
        local_length: of a shard along it.
    """
    if dim is None or count == 1:
        return True
    run = local_length * num_elements(global_shape[dim + 1 :])
    return run % nf4.BLOCK == 0


class QuantizedWeight:
    """A frozen weight in NormalFloat4, in the place of a layer's parameter; no optimizer or checkpoint knows of it.

    Stacked matrices [parts, out, in] are quantized one by one, as they are in a file of single matrices.

    Args:
        info: the record of the parameter.
        shape: of the local tensor.
        dtype: of the matrices that `dense` makes.
        device: where it is; its memory is taken, without numbers.

    Attributes:
        matrices: of each matrix the codes and the absmax of its blocks.
    """

    def __init__(self, info: ParameterInfo, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.info, self.shape, self.dtype, self.device = info, shape, dtype, device
        elements = num_elements(shape[-2:])
        sizes = -(-elements // 2), -(-elements // nf4.BLOCK)
        self.matrices = [
            (
                torch.empty(sizes[0], dtype=torch.uint8, device=device),
                torch.empty(sizes[1], dtype=torch.float32, device=device),
            )
            for _ in range(num_elements(shape[:-2]))
        ]

    def fill(self, weight: Tensor) -> None:
        """Take the numbers of `weight`, of this shape, rounded to `dtype` first."""
        weight = weight.to(self.device, self.dtype).reshape(-1, *self.shape[-2:])
        for (codes, absmax), matrix in zip(self.matrices, weight, strict=True):
            found = nf4.quantize(matrix)
            codes.copy_(found[0])
            absmax.copy_(found[1])

    def dense(self) -> Tensor:
        """Return the local tensor in `dtype`, made anew."""
        made = [nf4.dequantize(*matrix, self.shape[-2:], self.dtype) for matrix in self.matrices]
        return made[0].view(self.shape) if len(made) == 1 else torch.stack(made)

    @property
    def num_bytes(self) -> int:
        """Bytes that are held."""
        return sum(codes.nbytes + absmax.nbytes for codes, absmax in self.matrices)


def dense(weight: Tensor | QuantizedWeight) -> Tensor:
    """Return the weight as a tensor."""
    return weight.dense() if isinstance(weight, QuantizedWeight) else weight
