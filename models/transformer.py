"""A decoder-only transformer, and the stage of it that one pipeline rank holds.

Pre-norm blocks (Radford et al., GPT-2, 2019; Touvron et al., LLaMA, 2023): x + attention(norm(x)), then x + mlp(norm(x)). Shapes: `batch` sequences
of a microbatch, `local seq` = seq, or seq / tp with sequence parallelism.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimaran.kernels.rotary import rotary_tables
from trimaran.models.attention import Attention, RotaryTables
from trimaran.models.batch import Microbatch
from trimaran.models.config import TransformerConfig
from trimaran.models.mlp import MLP
from trimaran.models.parallel.collectives import local_dim1
from trimaran.models.parallel.linear import ColumnParallelLinear, ColumnParallelWeights, column_linear
from trimaran.models.parallel.parameter import Placement, info_of, initialize, new_parameter
from trimaran.models.parallel.shard import ShardSpec
from trimaran.models.parallel.vocab import VocabParallelEmbedding, head_loss


class Dropout(nn.Module):
    """Dropout of a residual branch whose mask depends on (seed, site, sample, position) alone."""

    def __init__(self, rate: float, place: Placement, *, site: str, seed: int) -> None:
        super().__init__()
        self.rate, self.site, self.seed, self.place = rate, site, seed, place

    @property
    def is_on(self) -> bool:
        """Whether anything is dropped: in training mode, with a rate above 0."""
        return self.training and self.rate > 0.0

    def forward(self, x: Tensor, first_sample: int) -> Tensor:
        """Return x [batch, local seq, hidden] with elements dropped in training mode."""
        return self.place.kernels.dropout(x, self.rate, **self._where(x, first_sample)) if self.is_on else x

    def add(self, x: Tensor, residual: Tensor, first_sample: int) -> Tensor:
        """Return residual + dropout(x)."""
        return self.place.kernels.dropout_add(x, residual, self.rate, **self._where(x, first_sample)) if self.is_on else residual + x

    def _where(self, x: Tensor, first_sample: int) -> dict[str, Any]:
        parts = self.place.tp.size if self.place.sequence_parallel else 1
        first_position = x.shape[1] * (self.place.tp.rank if parts > 1 else 0)
        position = {"first_sample": first_sample, "first_position": first_position, "seq_len": x.shape[1] * parts}
        return {"seed": self.seed, "site": self.site, **position}


Branch = tuple[Tensor, Dropout]
"""What a sub-layer adds to the residual stream [batch, local seq, hidden], and the dropout that it goes through. It is added by whoever reads the
stream next, because the norm that stands there can add in the same pass over memory."""


def join(x: Tensor, branch: Branch | None, first_sample: int) -> Tensor:
    """Return the residual stream with `branch` added."""
    return x if branch is None else branch[1].add(branch[0], x, first_sample)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the hidden dim, by the config; whole on every tp rank."""

    def __init__(self, config: TransformerConfig, place: Placement) -> None:
        super().__init__()
        shape, partial = (config.hidden_size,), place.sequence_parallel
        self.eps, self.is_rms, self.kernels = config.norm_eps, config.norm == "rmsnorm", place.kernels
        self.weight = new_parameter(shape, place, init="ones", decay=False, partial_over_tp=partial)
        has_bias = config.bias and not self.is_rms
        self.bias = new_parameter(shape, place, init="zeros", decay=False, partial_over_tp=partial) if has_bias else None

    def forward(self, x: Tensor, branch: Branch | None, first_sample: int) -> tuple[Tensor, Tensor]:
        """Return (the residual stream x with `branch` added, its normalised form), both of x's shape."""
        if branch is None or branch[1].is_on:
            x = join(x, branch, first_sample)
            if self.is_rms:
                return x, self.kernels.rms_norm(x, self.weight, self.eps)
            return x, self.kernels.layer_norm(x, self.weight, self.bias, self.eps)
        if self.is_rms:
            return self.kernels.add_rms_norm(branch[0], x, self.weight, self.eps)
        return self.kernels.add_layer_norm(branch[0], x, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """One transformer layer; `index` is its global number."""

    def __init__(self, config: TransformerConfig, place: Placement, *, index: int, seed: int) -> None:
        super().__init__()
        site = f"layers.{index}"
        # GPT-2, section 2.3: residual branches add up over 2 * num_layers outputs, so each starts smaller.
        output_std = config.init_std / math.sqrt(2 * config.num_layers) if config.depth_scaled_init else config.init_std
        self.attention_norm = Norm(config, place)
        self.attention = Attention(config, place, site=f"{site}.attention", output_std=output_std, seed=seed)
        self.attention_dropout = Dropout(config.hidden_dropout, place, site=f"{site}.attention.output", seed=seed)
        self.mlp_norm = Norm(config, place)
        self.mlp = MLP(config, place, output_std=output_std)
        self.mlp_dropout = Dropout(config.hidden_dropout, place, site=f"{site}.mlp.output", seed=seed)

    def forward(self, x: Tensor, branch: Branch | None, tables: RotaryTables | None, first_sample: int) -> tuple[Tensor, Branch]:
        """Return (the residual stream, what this layer's MLP adds to it) for the same of the layer before; x: [batch, local seq, hidden]."""
        x, normed = self.attention_norm(x, branch, first_sample)
        branch = (self.attention(normed, tables, first_sample), self.attention_dropout)
        x, normed = self.mlp_norm(x, branch, first_sample)
        return x, (self.mlp(normed), self.mlp_dropout)


class Stage(nn.Module):
    """Consecutive layers of the network, with the embedding on the first stage and the head on the last.

    Parameter names are global: `layers.7.mlp.up.weight` is layer 7 of the whole network on whichever stage holds it.

    Args:
        layers: global numbers of the layers held here.
        seed: of the dropout masks.
    """

    def __init__(self, config: TransformerConfig, layers: range, place: Placement, *, is_first: bool, is_last: bool, seed: int) -> None:
        super().__init__()
        self.config, self.place, self.is_first, self.is_last = config, place, is_first, is_last
        std, vocab, hidden = config.init_std, config.vocab_size, config.hidden_size
        if is_first or (is_last and config.tie_embeddings):
            self.embedding = VocabParallelEmbedding(vocab, hidden, place, std=std)
            info_of(self.embedding.weight).tied_copy = not is_first
            info_of(self.embedding.weight).uses = 2 if is_first and is_last and config.tie_embeddings else 1
        if is_first:
            self.position: nn.Parameter | None = None
            if config.position == "learned":
                self.position = new_parameter((config.max_seq_len, hidden), place, std=std, partial_over_tp=place.sequence_parallel)
            self.embedding_dropout = Dropout(config.embedding_dropout, place, site="embedding", seed=seed)
        self.layers = nn.ModuleDict({str(i): Block(config, place, index=i, seed=seed) for i in layers})
        if is_last:
            self.final_norm = Norm(config, place)
            if not config.tie_embeddings:
                self.head = ColumnParallelLinear(hidden, vocab, place, bias=False, std=std)
        self._tables: RotaryTables | None = None

    def forward(self, hidden: Tensor | None, batch: Microbatch) -> Tensor:
        """Return the next stage's input [batch, local seq, hidden]; on the last stage the sum of the tokens' losses, a scalar.

        Args:
            hidden: the previous stage's output; None on the first stage.
            batch: the whole microbatch, the same on every stage and tp rank.
        Collective: all ranks of the tp group must enter.
        """
        hidden = self.run_layers(hidden, batch.tokens, batch.first_sample)
        if not self.is_last:
            return hidden
        return head_loss(hidden, self._head().weight, batch.labels, self.place, kernels=self.place.kernels.cross_entropy)

    def run_layers(self, hidden: Tensor | None, tokens: Tensor, first_sample: int = 0) -> Tensor:
        """Return the output of this stage's layers [batch, local seq, hidden]; on the last stage normalised, as the head reads it.

        Args:
            hidden: the previous stage's output; None on the first stage. tokens: [batch, seq].
        """
        seq_len = tokens.shape[1]
        if hidden is None:
            hidden = self._embed(tokens, first_sample)
        tables = self._rotary(seq_len) if self.config.position == "rotary" else None
        branch: Branch | None = None
        for layer in self.layers.values():
            hidden, branch = layer(hidden, branch, tables, first_sample)
        if not self.is_last:
            return join(hidden, branch, first_sample)
        out: Tensor = self.final_norm(hidden, branch, first_sample)[1]
        return out

    @torch.no_grad()
    def load(self, read: Callable[[str, str, ShardSpec, tuple[int, ...]], Tensor]) -> None:
        """Fill the parameters through `read`: (name, "weight", shard, local shape) -> the local tensor, from a checkpoint of any layout."""
        for name, parameter in self.named_parameters():
            parameter.copy_(read(name, "weight", info_of(parameter).shard, tuple(parameter.shape)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return this tp rank's columns of the logits [batch, seq, padded vocab / tp]; hidden: of `run_layers`, [batch, local seq, hidden]."""
        (out,) = column_linear(hidden, (self._head(),))
        return out

    def _rotary(self, seq_len: int) -> RotaryTables:
        """The tables of the first `seq_len` positions; kept, and made anew when a longer sequence comes."""
        if self._tables is None or len(self._tables[0]) < seq_len:
            length = max(seq_len, self.config.max_seq_len)
            self._tables = rotary_tables(0, length, self.config.head_dim, self.config.rotary_base, self.place.dtype, self.place.device)
        cos, sin = self._tables
        return cos[:seq_len], sin[:seq_len]

    def _embed(self, tokens: Tensor, first_sample: int) -> Tensor:
        hidden: Tensor = self.embedding(tokens)
        if self.position is not None:
            rows = self.position[: tokens.shape[1]].unsqueeze(0)
            hidden = hidden + (local_dim1(rows, self.place.tp) if self.place.sequence_parallel else rows)
        out: Tensor = self.embedding_dropout(hidden, first_sample)
        return out

    def _head(self) -> ColumnParallelWeights:
        return _TiedHead(self.embedding, self.place) if self.config.tie_embeddings else self.head


class _TiedHead:
    """The output projection that reads the embedding's weight."""

    def __init__(self, embedding: VocabParallelEmbedding, place: Placement) -> None:
        self.weight, self.place = embedding.weight, place
        self.bias: nn.Parameter | None = None


def build_stages(
    config: TransformerConfig, layers: Sequence[range], stage_indices: Sequence[int], place: Placement, *, seed: int
) -> list[Stage]:
    """Return this pipeline rank's stages with their initial weights.

    Args:
        layers: the layers of every stage of the pipeline, from `pipeline.partition`.
        stage_indices: the stages that live on this rank.
        seed: of weights and dropout.
    A tied embedding whose two ends live on the same rank is one parameter.
    """
    last = len(layers) - 1
    stages = [Stage(config, layers[index], place, is_first=index == 0, is_last=index == last, seed=seed) for index in stage_indices]
    if config.tie_embeddings and len(stages) > 1 and stages[0].is_first and stages[-1].is_last:
        stages[-1].embedding = stages[0].embedding
    if place.device.type != "meta":
        for stage in stages:
            initialize(stage, seed)
    return stages


@contextmanager
def in_eval_mode(stages: Iterable[Stage]) -> Iterator[None]:
    """Switch dropout off inside the block."""
    stages = list(stages)
    for stage in stages:
        stage.eval()
    try:
        yield
    finally:
        for stage in stages:
            stage.train()


def model_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a spec's `precision.dtype`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
