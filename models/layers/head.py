"""The dense layer with activation between an encoder's last layer and its output projection (Devlin et al. 2019)."""

import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.models.config import TransformerConfig
from trimaran.models.init import init_spec
from trimaran.models.parallel.parameter import LayerContext, new_parameter


class HeadTransform(nn.Module):
    """hidden -> hidden with the activation of the feed-forward layers.

    Every tp rank holds all of it: it is small beside the output projection, and cutting it would take one more
    collective before the norm.
    """

    def __init__(self, config: TransformerConfig, context: LayerContext) -> None:
        super().__init__()
        size, partial = config.hidden_size, context.sequence_parallel
        self.activation = context.kernels.activations[config.activation]
        self.weight = new_parameter(
            (size, size), context, init_spec=init_spec(config, "head_transform"), needs_tp_grad_reduce=partial
        )
        self.bias = (
            new_parameter((size,), context, init="zeros", decay=False, needs_tp_grad_reduce=partial)
            if config.mlp_bias
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, local seq, hidden] for x of that shape."""
        return self.activation(F.linear(x, self.weight, self.bias))
