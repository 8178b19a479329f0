"""The feed-forward layer of a transformer block, cut over tp along its inner width."""

from torch import Tensor, nn

from trimaran.models.config import TransformerConfig
from trimaran.models.init import init_spec
from trimaran.models.parallel.linear import ColumnParallelLinear, RowParallelLinear
from trimaran.models.parallel.parameter import LayerContext


class MLP(nn.Module):
    """Feed-forward: hidden -> ffn_hidden_size -> hidden."""

    def __init__(self, config: TransformerConfig, context: LayerContext) -> None:
        super().__init__()
        self._activation, self._droppable = context.kernels.activations[config.activation], context.droppable
        inner, parts = config.ffn_hidden_size, 2 if config.is_gated else 1
        into, out = init_spec(config, "mlp_input"), init_spec(config, "mlp_output")
        self.up = ColumnParallelLinear(
            config.hidden_size, inner, context, bias=config.mlp_bias, init_spec=into, parts=parts
        )
        self.down = RowParallelLinear(inner, config.hidden_size, context, bias=config.mlp_bias, init_spec=out)

    def activation(self, up: Tensor) -> Tensor:
        """Return the input of `down` for the output of `up`."""
        return self._droppable.offer(self._activation(up), self._activation, up)

    def forward(self, x: Tensor, first_sample: int = 0) -> Tensor:
        """Return [batch, local seq, hidden] for x of that shape; `first_sample` as in `column_linear`."""
        out: Tensor = self.down(self.activation(self.up(x, first_sample)), first_sample)
        return out
