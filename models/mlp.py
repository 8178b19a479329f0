"""The feed-forward layer of a transformer block, cut over tp along its inner width."""

from torch import Tensor, nn

from trimaran.kernels.activation import gelu, gelu_tanh, swiglu
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.linear import ColumnParallelLinear, RowParallelLinear
from trimaran.models.parallel.parameter import Placement

_ACTIVATIONS = {"gelu": (gelu, 1), "gelu_tanh": (gelu_tanh, 1), "swiglu": (swiglu, 2)}
"""name -> (function, matrices its input needs: SwiGLU reads a gate and an up projection)."""


class MLP(nn.Module):
    """hidden -> ffn_hidden_size -> hidden."""

    def __init__(self, config: TransformerConfig, place: Placement, *, output_std: float) -> None:
        super().__init__()
        self.activation, parts = _ACTIVATIONS[config.activation]
        inner = config.ffn_hidden_size
        self.up = ColumnParallelLinear(config.hidden_size, inner, place, bias=config.bias, std=config.init_std, parts=parts)
        self.down = RowParallelLinear(inner, config.hidden_size, place, bias=config.bias, std=output_std)

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, local seq, hidden] for x of that shape."""
        out: Tensor = self.down(self.activation(self.up(x)))
        return out
