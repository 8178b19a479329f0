"""Initial weights for a vocabulary that has grown: tokens that the weights don't know begin as the mean of the others.

A token with random numbers would have a logit far from the others'. From their mean the model gives it about the
probability of an average token, whatever it has read (Hewitt, "Initializing new word embeddings for pretrained language
models", 2021).
"""

from functools import lru_cache

import torch
from torch import Tensor

from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.shard import ShardSpec
from trimaran.models.transformer import parameter_shapes
from trimaran.runtime.adapters.merged import Weights
from trimaran.runtime.zero.protocol import ReadRange


def grown_reader(checkpoint: Weights, config: TransformerConfig, known: int) -> ReadRange:
    """Return a reader of a checkpoint in which the rows of the tokens from `known` on are the mean of the others.

    Args:
        config: of the run, whose vocabulary may be larger than the checkpoint's.
        known: the tokens that the weights have learned, at most those of both vocabularies.
    """
    shapes = parameter_shapes(config)
    larger = parameter_shapes(config.model_copy(update={"vocab_size": config.vocab_size + 1}))
    of_tokens = {name for name, shape in shapes.items() if larger[name] != shape}

    @lru_cache(maxsize=1)  # a tensor is read in several ranges, one after the other
    def grown(name: str, key: str) -> Tensor:
        stored = checkpoint.read_global(name, key)
        mean = stored[:known].double().mean(0).to(stored.dtype)
        rows = mean.expand(config.vocab_size - known, *stored.shape[1:])
        return torch.cat((stored[:known], rows))

    def read(name: str, key: str, shard: ShardSpec, local_shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        if name not in of_tokens:
            return checkpoint.read_range(name, key, shard, local_shape, start, stop)
        rows = grown(name, key)
        local = rows.new_zeros(local_shape)
        count = len(local) if shard.dim is None else shard.real_length(local_shape)
        local[:count] = rows[shard.offset : shard.offset + count]
        return local.flatten()[start:stop]

    return read
