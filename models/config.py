"""TransformerConfig: the shape of a transformer language model, checked whole and free of torch.

It holds the size of every matrix and the structure of the blocks, not how they are cut over ranks. It imports no torch,
so that a wrong shape is refused before torch is loaded.
"""

import math
from typing import Self

from pydantic import model_validator

from trimaran.models.shape.record import TransformerShape
from trimaran.models.shape.rules import SHAPE_RULES


class TransformerConfig(TransformerShape):
    """The shape of a transformer language model: embedding, blocks, projection to the vocabulary.

    Raises pydantic's ValidationError (a ValueError) on construction when a rule is broken, with every broken rule in
    it.
    """

    @model_validator(mode="after")
    def _obeys_the_shape_rules(self) -> Self:
        errors = SHAPE_RULES.broken(type(self).model_fields, self)
        if errors:
            raise ValueError("\n".join(str(error) for error in errors))
        return self

    def num_parameters(self) -> int:
        """Return the exact number of trainable numbers, without vocabulary padding; tied weights count once."""
        layers = self.num_layers * self.layer_parameters()
        return self.embedding_parameters() + layers + self.head_parameters()

    def embedding_parameters(self) -> int:
        """Return the parameters before the first layer."""
        positions = self.max_seq_len if self.position == "learned" else 0
        vectors = self.vocab_size + positions + self.num_token_types + int(self.has_query_stream)
        return vectors * self.hidden_size + int(self.embedding_norm) * self._norm_parameters()

    def layer_parameters(self) -> int:
        """Return the parameters of one layer."""
        norms = self.norms_per_layer * self._norm_parameters()
        return self._layer_matrix_parameters() + self._layer_vectors() + norms

    def layer_expert_parameters(self) -> int:
        """Return those of one layer's parameters that are in experts."""
        return self._layer_matrix_parameters() - self._layer_matrix_parameters(0) if self.num_experts else 0

    def head_parameters(self) -> int:
        """Return the parameters after the last layer, without a tied projection."""
        projection = self.vocab_size * self.hidden_size if self.has_head and not self.tie_embeddings else 0
        score = self.hidden_size if self.score_head != "none" else 0
        transform = self.hidden_size * (self.hidden_size + int(self.mlp_bias)) if self.head_transform else 0
        norms = (int(self.has_final_norm) + int(self.head_transform)) * self._norm_parameters()
        return projection + (self.vocab_size if self.head_bias and self.has_head else 0) + score + transform + norms

    def num_active_parameters(self) -> int:
        """Return how many of the parameters one token meets: of the experts only those that it goes through."""
        unused = self._layer_matrix_parameters() - self._layer_matrix_parameters(self.experts_per_token)
        return self.num_parameters() - self.num_layers * unused

    def num_parameters_without_embeddings(self) -> int:
        """Return the parameters but the tables of tokens and positions and an untied projection to the vocabulary."""
        positions = self.max_seq_len if self.position == "learned" else 0
        head = self.vocab_size if self.has_head and not self.tie_embeddings else 0
        return self.num_parameters() - (self.vocab_size + positions + head) * self.hidden_size

    def flops_per_token(self, seq_len: int) -> float:
        """Return the matrix-multiplication FLOPs of training on one token, forward and backward.

        6 FLOPs per matrix parameter that the token meets (one multiply-add forward, two backward) plus the attention
        scores and their product with the values, 12 * layers * heads * head_dim * seq_len; the causal half is not taken
        off. PaLM paper, appendix B; the same count as Megatron-LM (Narayanan et al. 2021, section 5.1) without its
        recomputed forward. What relative positions and a query stream add is not counted.

        Args:
            seq_len: tokens of one sequence.
        """
        return 3.0 * (self.num_layers * self.layer_forward_flops(seq_len) + self.head_forward_flops())

    def layer_forward_flops(self, seq_len: int) -> float:
        """Return the forward matrix-multiplication FLOPs of one layer for one token, the causal half not taken off."""
        return (
            2.0 * self._layer_matrix_parameters(self.experts_per_token) + 4.0 * self.num_heads * self.head_dim * seq_len
        )

    def head_forward_flops(self) -> float:
        """Return the forward FLOPs of the output projection, and of the dense layer before it, for one token."""
        outputs = (self.vocab_size if self.has_head else 0) + (1 if self.score_head != "none" else 0)
        return 2.0 * (outputs + (self.hidden_size if self.head_transform else 0)) * self.hidden_size

    def padded_vocab_size(self, tp: int) -> int:
        """Return vocab_size rounded up to a multiple of tp, so that every tp rank holds the same number of rows."""
        return math.ceil(self.vocab_size / tp) * tp

    def cuts_kv_heads(self, tp: int) -> bool:
        """Return whether every tp rank has key-value heads of its own, with the query heads that read them.

        Otherwise every rank holds all key-value heads, and the query heads are cut by themselves.
        """
        return _leaves_no_rank_idle(self.num_kv_heads, tp)

    def heads_can_be_cut(self, tp: int) -> bool:
        """Return whether every tp rank gets query heads, evenly or not."""
        return self.cuts_kv_heads(tp) or _leaves_no_rank_idle(self.num_heads, tp)

    def heads_per_rank(self, tp: int) -> int:
        """Return the query heads of a tp rank; where they can't be shared out evenly, the last rank has fewer."""
        if self.cuts_kv_heads(tp):
            return self.kv_heads_per_rank(tp) * (self.num_heads // self.num_kv_heads)
        return _share(self.num_heads, tp)

    def kv_heads_per_rank(self, tp: int) -> int:
        """Return the key-value heads of a tp rank where they are cut; the last rank may have fewer."""
        return _share(self.num_kv_heads, tp)

    def _layer_matrix_parameters(self, experts_used: int | None = None) -> int:
        """Matrix parameters of one layer; of the experts only `experts_used`, where given."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (queries + 2 * keys) + queries * self.hidden_size
        matrices = (3 if self.is_gated else 2) * self.hidden_size * self.ffn_hidden_size
        if self.num_experts == 0:
            return attention + matrices
        used = self.num_experts if experts_used is None else experts_used
        return attention + self.num_experts * self.hidden_size + used * matrices

    def _layer_vectors(self) -> int:
        """Parameters of one layer that no token is multiplied by: biases, scales of norms, projection of distances."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        into_ffn = 2 if self.is_gated else 1
        total = (queries + 2 * keys if self.qkv_bias else 0) + (self.hidden_size if self.out_bias else 0)
        total += into_ffn * self.ffn_hidden_size + self.hidden_size if self.mlp_bias else 0
        total += queries * self.hidden_size + 2 * queries if self.position == "relative" else 0
        return total + {"none": 0, "head": 2 * self.head_dim, "width": queries + keys}[self.query_key_norm]

    def _norm_parameters(self) -> int:
        return self.hidden_size * (int(self.norm_weight) + int(self.norm == "layernorm" and self.norm_bias))


def _share(heads: int, tp: int) -> int:
    return -(-heads // tp)


def _leaves_no_rank_idle(heads: int, tp: int) -> bool:
    """Whether each of the first tp - 1 ranks can take its share, rounded up, and the last still has a head."""
    return _share(heads, tp) * (tp - 1) < heads
