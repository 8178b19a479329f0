"""The feed-forward layer of a transformer block, cut over tp along its inner width."""

from torch import Tensor, nn

from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.linear import ColumnParallelLinear, RowParallelLinear
from trimaran.models.parallel.parameter import Placement


class MLP(nn.Module):
    """hidden -> ffn_hidden_size -> hidden."""

    def __init__(self, config: TransformerConfig, place: Placement, *, output_std: float) -> None:
        super().__init__()
        self.activation = place.kernels.activations[config.activation]
        inner, parts = config.ffn_hidden_size, 2 if config.is_gated else 1
        self.up = ColumnParallelLinear(config.hidden_size, inner, place, bias=config.mlp_bias, std=config.init_std, parts=parts)
        self.down = RowParallelLinear(inner, config.hidden_size, place, bias=config.mlp_bias, std=output_std)

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, local seq, hidden] for x of that shape."""
        out: Tensor = self.down(self.activation(self.up(x)))
        return out
