"""The attention layer of a transformer block: grouped-query heads cut over tp, rotary positions, the core through kernels/dispatch."""

from torch import Tensor, nn

from trimaran.kernels.attention import attention_keep_mask
from trimaran.kernels.dispatch import choose_attention
from trimaran.kernels.random import stream_key
from trimaran.kernels.rotary import rotary
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
        self.attend = choose_attention(place.device)

    def forward(self, x: Tensor, tables: RotaryTables | None, first_sample: int) -> Tensor:
        """Return [batch, local seq, hidden] for x of that shape; `tables` None for learned positions.

        Args:
            first_sample: global index of the first sample, for the dropout masks.
        """
        q, kv = column_linear(x, (self.q, self.kv))
        k, v = kv.chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if tables is not None:
            q, k = rotary(q, *tables), rotary(k, *tables)
        keep, rate = None, self.dropout_rate if self.training else 0.0
        if rate > 0.0:
            batch, seq = q.shape[:2]
            heads = (self.first_head, self.local_heads, self.num_heads)
            keep = attention_keep_mask(self.dropout_key, first_sample, batch, *heads, seq, rate, x.device)
        out: Tensor = self.out(self.attend(q, k, v, keep, rate).flatten(2))
        return out
