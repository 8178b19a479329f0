"""The attention layer of a transformer block: grouped-query heads cut over tp, rotary positions, the core through kernels/dispatch."""

from torch import Tensor, nn

from trimaran.kernels.attention import AttentionDropout, AttentionOptions
from trimaran.kernels.random import stream_key
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_linear
from trimaran.models.parallel.parameter import Placement

RotaryTables = tuple[Tensor, Tensor]
"""(cos, sin), each [seq, head_dim / 2]."""


class Attention(nn.Module):
    """Causal self-attention; this tp rank computes heads / tp query heads and kv_heads / tp key-value heads."""

    def __init__(self, config: TransformerConfig, place: Placement, *, site: str, output_std: float, seed: int) -> None:
        super().__init__()
        self.head_dim, self.num_heads = config.head_dim, config.num_heads
        self.local_heads = config.num_heads // place.tp.size
        self.first_head = self.local_heads * place.tp.rank
        self.dropout_rate, self.dropout_key = config.attention_dropout, stream_key(seed, f"{site}.probabilities")
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = ColumnParallelLinear(config.hidden_size, width, place, bias=config.bias, std=config.init_std)
        self.kv = ColumnParallelLinear(config.hidden_size, kv_width, place, bias=config.bias, std=config.init_std, parts=2)
        self.out = RowParallelLinear(width, config.hidden_size, place, bias=config.bias, std=output_std)
        self.kernels, self.options = place.kernels, AttentionOptions(deterministic=place.deterministic)

    def forward(self, x: Tensor, tables: RotaryTables | None, first_sample: int) -> Tensor:
        """Return [batch, local seq, hidden] for x of that shape; `tables` None for learned positions.

        Args:
            first_sample: global index of the first sample, for the dropout masks.
        """
        q, kv = column_linear(x, (self.q, self.kv))
        k, v = kv.chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if tables is not None:
            q, k = self.kernels.rotary(q, *tables), self.kernels.rotary(k, *tables)
        dropout = None
        if self.training and self.dropout_rate > 0.0:
            dropout = AttentionDropout(self.dropout_rate, self.dropout_key, first_sample, self.first_head, self.num_heads)
        out: Tensor = self.out(self.kernels.attention(q, k, v, self.options, dropout=dropout).flatten(2))
        return out
