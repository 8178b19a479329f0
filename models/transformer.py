"""A transformer language model, and the stages of it that a pipeline rank holds.

Blocks of attention and feed-forward on a residual stream. The config places the norms: before the branches (Radford et
al., GPT-2, 2019; Touvron et al., LLaMA, 2023), after the sums (Vaswani et al. 2017) or elsewhere. Shapes: `batch` is
the number of sequences in a microbatch, `local seq` is seq, or seq / tp with sequence parallelism.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trimaran.kernels import rotary
from trimaran.kernels.cross_entropy import IGNORED_LABEL
from trimaran.models.batch import Microbatch
from trimaran.models.boundary import EMBEDDING, FINAL, HEAD, Boundary
from trimaran.models.cache.key_value import ForwardContext, KeyValueCache, RotaryTables
from trimaran.models.cache.prefix import PackedAttention
from trimaran.models.config import TransformerConfig
from trimaran.models.criterion import Criterion, loss_with_gradients
from trimaran.models.init import init_spec
from trimaran.models.layers.block import Block
from trimaran.models.layers.experts import ExpertMLP
from trimaran.models.layers.head import HeadTransform
from trimaran.models.layers.residual import Dropout, Norm, PendingResidual, add_residual
from trimaran.models.layers.score import ScoreHead
from trimaran.models.parallel.collectives import gather_dim1, gather_sequence, local_dim1
from trimaran.models.parallel.entropy import token_entropies
from trimaran.models.parallel.group import single
from trimaran.models.parallel.likelihood import Scored, log_likelihoods
from trimaran.models.parallel.linear import (
    ColumnParallelLinear,
    ColumnParallelWeights,
    RowParallelLinear,
    column_linear,
)
from trimaran.models.parallel.low_rank import LowRank
from trimaran.models.parallel.packed import pack, unpack
from trimaran.models.parallel.parameter import LayerContext, info_of, initialize, new_parameter
from trimaran.models.parallel.quantized import QuantizedWeight
from trimaran.models.parallel.shard import ShardSpec
from trimaran.models.parallel.vocab import VocabParallelEmbedding, head_loss, token_log_probs
from trimaran.models.shape.choices import RotaryScaling


class Stage(nn.Module):
    """Consecutive layers of the network, with the embedding on the first stage and the head on the last.

    Parameter names are global: `layers.7.mlp.up.weight` is in layer 7 of the whole network, on any stage.

    Args:
        layers: global numbers of this stage's layers.
        seed: of the dropout masks.

    Attributes:
        criterion: makes the loss; None for the sum of the tokens' cross entropies.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layers: range,
        context: LayerContext,
        *,
        is_first: bool,
        is_last: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.config, self.context, self.is_first, self.is_last = config, context, is_first, is_last
        vocab, hidden = config.vocab_size, config.hidden_size
        if is_first or (is_last and config.ties_head):
            self.embedding = VocabParallelEmbedding(vocab, hidden, context, init_spec=init_spec(config, "embedding"))
            info_of(self.embedding.weight).tied_copy = not is_first
        if is_first:
            self.position: nn.Parameter | None = None
            if config.position == "learned":
                start = init_spec(config, "position")
                self.position = new_parameter(
                    (config.max_seq_len, hidden),
                    context,
                    init_spec=start,
                    needs_tp_grad_reduce=context.sequence_parallel,
                )
            self.token_type: nn.Parameter | None = None
            if config.num_token_types:
                shape, start = (config.num_token_types, hidden), init_spec(config, "position")
                self.token_type = new_parameter(
                    shape, context, init_spec=start, needs_tp_grad_reduce=context.sequence_parallel
                )
            self.query_embedding: nn.Parameter | None = None
            if config.has_query_stream:
                start = init_spec(config, "position")
                self.query_embedding = new_parameter(
                    (hidden,), context, init_spec=start, decay=False, needs_tp_grad_reduce=context.sequence_parallel
                )
            self.embedding_norm = Norm(config, context) if config.embedding_norm else None
            self.embedding_dropout = Dropout(config.embedding_dropout, context, site="embedding", seed=seed)
        self.layers = nn.ModuleDict({str(i): Block(config, context, index=i, seed=seed) for i in layers})
        if is_last:
            self.final_norm = Norm(config, context) if config.has_final_norm else None
            self.head_transform = HeadTransform(config, context) if config.head_transform else None
            self.head_transform_norm = Norm(config, context) if config.head_transform else None
            has_bias = config.head_bias and config.has_head
            self.head_bias = new_parameter((vocab,), context, dim=0, init="zeros", decay=False) if has_bias else None
            if config.has_head and not config.tie_embeddings:
                self.head = ColumnParallelLinear(
                    hidden, vocab, context, bias=False, init_spec=init_spec(config, "head")
                )
            self.score = ScoreHead(config, context) if config.score_head != "none" else None
        self.criterion: Criterion | None = None
        self._tables: RotaryTables | None = None
        self._tables_stretch = 0
        self._boundary: Boundary | None = None

    @property
    def boundary(self) -> Boundary:
        """What tells a listener where blocks begin and end."""
        if self._boundary is None:
            parameters = {block: list(own.values()) for block, own in self.blocks().items()}
            self._boundary = Boundary(parameters, self.context.queue)
        return self._boundary

    def blocks(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the parameters that learn by global name, by block, in the order of the network.

        A tied embedding is also in the head's block, where this stage has one.
        """
        blocks: dict[str, dict[str, nn.Parameter]] = {EMBEDDING: {}} if self.is_first else {}
        blocks |= {f"layers.{number}": {} for number in self.layers}
        if self.is_last:
            blocks |= {FINAL: {}, HEAD: {}}
        for name, parameter in self.named_parameters():
            part = name.split(".")[0]
            if not parameter.requires_grad:
                continue
            if part == "layers":
                blocks[".".join(name.split(".")[:2])][name] = parameter
            elif part in ("final_norm", "head_transform", "head_transform_norm"):
                blocks[FINAL][name] = parameter
            elif part in ("head", "head_bias", "score"):
                blocks[HEAD][name] = parameter
            else:
                if self.is_first:
                    blocks[EMBEDDING][name] = parameter
                if self.is_last and self.config.ties_head and part == "embedding":
                    blocks[HEAD][name] = parameter
        return blocks

    def forward(
        self,
        hidden: Tensor | None,
        batch: Microbatch,
        loss_weight: float = 1.0,
        sequence_weight: float | None = None,
    ) -> Tensor:
        """Return the next stage's input [batch, local seq, hidden]; on the last stage the sum of the losses.

        Args:
            hidden: the previous stage's output; None on the first stage.
            batch: the whole microbatch, the same on every stage and tp rank.
            loss_weight: the caller's weight of each token's loss, or of that of each unit of the criterion.
            sequence_weight: that of a row's load-balancing losses; None: `loss_weight` for each of its labels.
        Collective over tp, and with experts over ep.
        """
        if sequence_weight is None:
            sequence_weight = loss_weight * batch.labels.shape[1]
        hidden = self._run(hidden, batch.tokens, *self._context_of(batch, sequence_weight))
        if not self.is_last:
            return hidden
        if self.criterion is not None:
            with self.boundary.forward(HEAD):
                parameters = self.boundary.parameters[HEAD]
                return loss_with_gradients(hidden, lambda x: self._criterion_loss(x, batch), parameters, loss_weight)
        hidden, labels = self._predicted(hidden, batch)
        hidden = self._head_input(hidden)
        with self.boundary.forward(HEAD):
            return head_loss(
                hidden,
                self._head().weight,
                labels,
                self.context,
                bias=self.head_bias,
                kernels=self.context.kernels.cross_entropy,
                softcap=self.config.logits_softcap,
                # Held-out losses are plain: they are compared between runs with other terms in training.
                label_smoothing=self.config.label_smoothing if self.training else 0.0,
                z_loss=self.config.z_loss if self.training else 0.0,
                loss_weight=loss_weight,
                skips_rows=batch.documents is not None,  # prompts of packed examples
            )

    def _criterion_loss(self, hidden: Tensor, batch: Microbatch) -> Tensor:
        assert self.criterion is not None
        return self.criterion(self, hidden, batch)

    def token_log_probs(self, hidden: Tensor, batch: Microbatch, temperature: float = 1.0) -> Tensor:
        """Return the log-probability of each label [batch, seq], 0 where there is none, on all tp ranks.

        They are float32 (float64 for float64), and no z-loss or label smoothing is in them. Collective over tp.

        Args:
            hidden: [batch, local seq, hidden], of the last stage's layers.
            temperature: the logits are divided by it.
        """
        if self.context.sequence_parallel:
            hidden = gather_sequence(hidden, self.context.tp)
        labels = batch.labels.flatten()
        rows = (labels != IGNORED_LABEL).nonzero().squeeze(1)
        found = token_log_probs(
            self._head_input(hidden.flatten(0, 1).index_select(0, rows)),
            self._head().weight,
            labels[rows],
            self.context,
            bias=self.head_bias,
            kernels=self.context.kernels.cross_entropy,
            softcap=self.config.logits_softcap,
            temperature=temperature,
        )
        return found.new_zeros(labels.shape).index_put((rows,), found).view_as(batch.labels)

    def scores(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the scores of positions [rows]; see `ScoreHead`. Only with a score head."""
        assert self.score is not None, "model.score_head is none"
        found: Tensor = self.score(hidden, rows)
        return found

    @torch.no_grad()
    def token_entropies(self, hidden: Tensor, batch: Microbatch, temperature: float = 1.0) -> Tensor:
        """Return the entropy, in nats, of what is predicted at each label [batch, seq], 0 where there is none.

        Arguments and dtype as in `token_log_probs`; no gradient flows. Collective over tp.
        """
        if self.context.sequence_parallel:
            hidden = gather_dim1(hidden, self.context.tp)
        labels = batch.labels.flatten()
        rows = (labels != IGNORED_LABEL).nonzero().squeeze(1)
        found = token_entropies(
            self._head_input(hidden.flatten(0, 1).index_select(0, rows)),
            self._head().weight,
            self.context,
            bias=self.head_bias,
            softcap=self.config.logits_softcap,
            temperature=temperature,
        )
        return found.new_zeros(labels.shape).index_put((rows,), found).view_as(batch.labels)

    def backward(self, output: Tensor, grad: Tensor) -> None:
        """Run the backward pass of `output`, which `forward` has returned, from its gradient `grad`.

        Collective over tp, and with experts over ep.
        """
        self.boundary.backward(output, grad)

    def run_layers(self, hidden: Tensor | None, tokens: Tensor) -> Tensor:
        """Return the output of this stage's layers [batch, local seq, hidden]; on the last stage after the final norm.

        Args:
            hidden: the previous stage's output; None on the first stage.
            tokens: [batch, seq], a document each.
        """
        return self._run(hidden, tokens, *self._context_of(Microbatch(tokens, tokens, 0), 0.0))

    def _context_of(self, batch: Microbatch, sequence_weight: float) -> tuple[slice | Tensor, ForwardContext]:
        """Return the positions of the tokens, and what all layers share.

        Rows of a query stream, where there is one, follow the tokens' rows in every stage's output.
        """
        seq_len = batch.tokens.shape[1]
        positions: slice | Tensor = slice(0, seq_len) if batch.positions is None else batch.positions
        return positions, ForwardContext(
            batch.first_sample,
            self._rotary(positions, seq_len),
            sequence_weight=sequence_weight,
            targets=batch.targets if self.config.has_query_stream else None,
            documents=batch.documents,
        )

    @torch.no_grad()
    def extend(self, hidden: Tensor | None, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return `run_layers` of each sample's last tokens, reading earlier ones from the cache; append these to it.

        Args:
            hidden: the previous stage's output [batch, local new, hidden]; None on the first stage.
            tokens: [batch, new], the last ones of samples with `cache.host_lengths` tokens, these included. Token i of
                sample b has position lengths[b] - new + i. Negative positions are padding: they are not cached, and
                their output is meaningless. With sequence parallelism `new` must be a multiple of tp. Tokens that are
                in the cache may be passed again.
        No gradient flows and no dropout applies. Collective over tp.
        """
        new, lengths = tokens.shape[1], cache.host_lengths
        positions: slice | Tensor = slice(lengths[0] - new, lengths[0])
        if min(lengths) < max(lengths) or lengths[0] < new:
            positions = (cache.lengths[:, None].long() - new + torch.arange(new, device=tokens.device)).clamp_(min=0)
        return self._run(hidden, tokens, positions, ForwardContext(0, self._rotary(positions, max(lengths)), cache))

    @torch.no_grad()
    def run_packed(self, hidden: Tensor | None, packed: PackedAttention) -> Tensor:
        """Return `run_layers` of a packed batch [1, local tokens, hidden]; the output of padding is meaningless.

        Args:
            hidden: the previous stage's output; None on the first stage.
        No gradient flows. Collective over tp.
        """
        positions = packed.positions
        forward_context = ForwardContext(0, self._rotary(positions, packed.packing.longest), packed=packed)
        return self._run(hidden, packed.tokens, positions, forward_context)

    @torch.no_grad()
    def log_likelihoods(self, hidden: Tensor, scored: Scored) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of each scored token, and whether it is the likeliest; see `vocab.log_likelihoods`.

        Args:
            hidden: `run_packed` of the last stage.
        Collective over tp.
        """
        full = gather_dim1(hidden, self.context.tp) if self.context.sequence_parallel else hidden
        rows = self._head_input(full[0].index_select(0, scored.rows))
        with self.boundary.forward(HEAD):
            return log_likelihoods(
                rows, self._head().weight, scored, self.context, self.head_bias, self.config.logits_softcap
            )

    def _run(
        self, hidden: Tensor | None, tokens: Tensor, positions: slice | Tensor, forward_context: ForwardContext
    ) -> Tensor:
        boundary, before = self.boundary, ""
        if hidden is None:
            with boundary.forward(EMBEDDING):
                hidden = self._embed(tokens, positions, forward_context)
            before = EMBEDDING
        pending: PendingResidual | None = None
        for number, layer in self.layers.items():
            block = f"layers.{number}"
            if torch.is_grad_enabled() and layer.is_recomputed and not hidden.requires_grad:
                hidden.requires_grad_()  # of a frozen embedding: else a layer that is computed again would not learn
            hidden, pending = self._cross(block, before, hidden, pending)
            with boundary.forward(block):
                hidden, pending = layer(hidden, pending, forward_context)
            before = block
        assert hidden is not None
        if not self.is_last:
            out: Tensor = add_residual(hidden, pending, forward_context.first_sample)
            if torch.is_grad_enabled() and not out.requires_grad:  # a frozen embedding without a layer
                out.requires_grad_()
            return out
        hidden, pending = self._cross(FINAL, before, hidden, pending)
        if self.final_norm is None:
            return add_residual(hidden, pending, forward_context.first_sample)
        with boundary.forward(FINAL):
            normed: Tensor = self.final_norm(hidden, pending, forward_context.first_sample)[1]
        return normed

    def _cross(
        self, block: str, before: str, hidden: Tensor, pending: PendingResidual | None
    ) -> tuple[Tensor, PendingResidual | None]:
        """Return the two as the input of `block`; `before` precedes it, "" where nothing of this stage does."""
        if not before:
            return hidden, pending
        if pending is None:
            return self.boundary.cross(block, before, hidden)[0], None
        hidden, residual = self.boundary.cross(block, before, hidden, pending[0])
        return hidden, (residual, pending[1])

    @torch.no_grad()
    def load(self, read: Callable[[str, str, ShardSpec, tuple[int, ...]], Tensor]) -> None:
        """Fill the parameters by `read` (name, "weight", shard, local shape) -> local tensor."""
        for name, parameter in self.named_parameters():
            parameter.copy_(read(name, "weight", info_of(parameter).shard, tuple(parameter.shape)))

    def pack_weights(self) -> bool:
        """Keep copies of the linear layers' weights for products without gradients; return whether there are any.

        See `packed.pack`; weights that change later are used as they are.
        """
        layers: list[ColumnParallelWeights | RowParallelLinear] = [
            layer for layer in self.modules() if isinstance(layer, ColumnParallelLinear | RowParallelLinear)
        ]
        if self.is_last and self.config.has_head and self.config.tie_embeddings:
            layers.append(self._head())
        packed = [pack(layer.weight) for layer in layers if layer.quantized is None]
        return any(packed)

    def unpack_weights(self) -> None:
        """Drop the copies of `pack_weights`."""
        for parameter in self.parameters():
            unpack(parameter)

    def take_load_balancing_loss(self) -> Tensor:
        """Return the sum of the layers' `ExpertMLP.take_load_balancing_loss` [scalar], 0 without any."""
        parts = [
            layer.mlp.take_load_balancing_loss() for layer in self.layers.values() if isinstance(layer.mlp, ExpertMLP)
        ]
        return sum((part for part in parts if part is not None), torch.zeros((), device=self.context.device))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return this tp rank's columns of the logits [batch, seq, padded vocab / tp]; hidden: from `run_layers`."""
        hidden = self._head_input(hidden)
        with self.boundary.forward(HEAD):
            (out,) = column_linear(hidden, (self._head(),))
            if self.head_bias is not None:
                out = out + self.head_bias
        cap = self.config.logits_softcap
        return out if cap is None else (out / cap).tanh() * cap

    def _predicted(self, hidden: Tensor, batch: Microbatch) -> tuple[Tensor, Tensor]:
        """Return the rows of `hidden` that predict a token, and their labels: all rows, or those of the targets."""
        if batch.targets is None:
            return hidden, batch.labels
        rows = batch.targets
        if self.config.has_query_stream:
            rows = torch.arange(
                batch.tokens.shape[1], batch.tokens.shape[1] + rows.shape[1], device=rows.device
            ).expand_as(rows)
        if self.context.sequence_parallel:  # each rank has other rows, so all rows stay, most without a label
            labels = batch.labels.new_full((len(rows), hidden.shape[1] * self.context.tp.size), IGNORED_LABEL)
            return hidden, labels.scatter(1, rows, batch.labels)
        return hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])), batch.labels

    def _head_input(self, hidden: Tensor) -> Tensor:
        """Return the head's input, scaled by the factor of the logits, which costs least here."""
        if self.head_transform is not None and self.head_transform_norm is not None:
            with self.boundary.forward(FINAL):
                hidden = self.head_transform_norm(self.head_transform(hidden), None, 0)[1]
        return hidden if self.config.logits_scale == 1.0 else hidden * self.config.logits_scale

    def _rotary(self, positions: slice | Tensor, seq_len: int) -> RotaryTables | None:
        """Return the tables of the positions, cached for max_seq_len positions or the longest sequence so far.

        Args:
            positions: of all samples, or [batch, seq] of each.
            seq_len: of the longest sequence; dynamic scaling depends on it.
        """
        config = self.config
        if config.position != "rotary":
            return None
        scaling, stretch = rotary_scaling(config.rotary_scaling), 0
        if isinstance(scaling, rotary.DynamicNTKScaling) and seq_len > scaling.original_max_position:
            stretch = seq_len
        if self._tables is None or len(self._tables[0]) < seq_len or stretch != self._tables_stretch:
            length, rot = max(seq_len, config.max_seq_len), config.rotary_dim or config.head_dim
            # In bfloat16 the tables would turn by angles that are off by some thousandths.
            where = (torch.promote_types(self.context.dtype, torch.float32), self.context.device)
            # Up to its original length dynamic scaling changes nothing: the table's length must not count as seq_len.
            with torch.inference_mode(False):  # the tables are cached, and training may read them later
                self._tables = rotary.rotary_tables(
                    0, length, rot, config.rotary_base, *where, scaling=scaling, seq_len=stretch or 1
                )
            self._tables_stretch = stretch
        cos, sin = self._tables
        return cos[positions], sin[positions]

    def _embed(self, tokens: Tensor, positions: slice | Tensor, forward_context: ForwardContext) -> Tensor:
        num_tokens, first_sample = tokens.shape[1], forward_context.first_sample
        if forward_context.targets is not None:  # placeholders of the query rows, so that tp cuts them with the others
            tokens = torch.cat((tokens, torch.zeros_like(forward_context.targets)), dim=1)
        hidden: Tensor = self.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            hidden = hidden * self.config.embedding_scale
        if self.token_type is not None:
            hidden = hidden + self.token_type[0]
        if self.position is not None:
            rows = self.position[positions]
            rows = rows if rows.ndim == 3 else rows.unsqueeze(0)
            hidden = hidden + (local_dim1(rows, self.context.tp) if self.context.sequence_parallel else rows)
        if forward_context.targets is not None and self.query_embedding is not None:
            first = hidden.shape[1] * self.context.tp.rank if self.context.sequence_parallel else 0
            is_query = torch.arange(first, first + hidden.shape[1], device=hidden.device) >= num_tokens
            hidden = torch.where(is_query[:, None], self.query_embedding, hidden)
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden, None, first_sample)[1]
        out: Tensor = self.embedding_dropout(hidden, first_sample)
        return out

    def _head(self) -> ColumnParallelWeights:
        assert self.config.has_head, "model.score_head is only: there is no projection to the vocabulary"
        return _TiedHead(self.embedding, self.context) if self.config.tie_embeddings else self.head


class _TiedHead:
    """An output projection with the embedding's weight."""

    def __init__(self, embedding: VocabParallelEmbedding, context: LayerContext) -> None:
        self.weight, self.context = embedding.weight, context
        self.bias: nn.Parameter | None = None
        self.adapter: LowRank | None = None
        self.quantized: QuantizedWeight | None = None


def build_stages(
    config: TransformerConfig,
    layers: Sequence[range],
    stage_indices: Sequence[int],
    context: LayerContext,
    *,
    seed: int,
    draws_weights: bool = True,
) -> list[Stage]:
    """Return this pipeline rank's stages with their initial weights.

    Args:
        layers: the layers of every stage of the pipeline, from `pipeline.partition`.
        stage_indices: the stages on this rank.
        seed: of weights and dropout.
        draws_weights: False leaves the weights uninitialized, for a caller that loads them next.
    A tied embedding with both ends on this rank is one parameter.
    """
    last = len(layers) - 1
    stages = [
        Stage(config, layers[index], context, is_first=index == 0, is_last=index == last, seed=seed)
        for index in stage_indices
    ]
    if config.ties_head and len(stages) > 1 and stages[0].is_first and stages[-1].is_last:
        stages[-1].embedding = stages[0].embedding
    if draws_weights and context.device.type != "meta":
        for stage in stages:
            initialize(stage, seed)
    return stages


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Return the global shape of every parameter by name, in the network's order; a tied head has no parameter."""
    context = LayerContext(single("tp"), sequence_parallel=False, dtype=torch.float32, device=torch.device("meta"))
    (stage,) = build_stages(config, [range(config.num_layers)], [0], context, seed=0)
    return {name: info_of(parameter).shard.global_shape for name, parameter in stage.named_parameters()}


def rotary_scaling(config: RotaryScaling | None) -> rotary.RotaryScaling | None:
    """Return the kernels' record of a config's scaling."""
    if config is None:
        return None
    factor, original = config.factor, config.original_max_position or 0
    match config.kind:
        case "linear":
            return rotary.LinearScaling(factor)
        case "ntk":
            return rotary.NTKScaling(factor)
        case "dynamic_ntk":
            return rotary.DynamicNTKScaling(factor, original)
        case "yarn":
            return rotary.YarnScaling(factor, original, config.beta_fast, config.beta_slow, config.attention_factor)
        case "llama3":
            return rotary.Llama3Scaling(factor, config.low_freq_factor, config.high_freq_factor, original)


@contextmanager
def in_eval_mode(stages: Iterable[Stage]) -> Iterator[None]:
    """Switch dropout, and what training adds to the loss, off inside the block."""
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
