"""Small random encoders made by transformers and as ours, and one training step of both for the tests to compare."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, XLNetConfig, XLNetLMHeadModel

from trimaran.models.batch import Microbatch
from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface import Family, family_of, resolve
from trimaran.models.parallel.group import single
from trimaran.models.parallel.parameter import LayerContext
from trimaran.models.transformer import Stage, build_stages
from trimaran.runtime.data.samples.objectives import MaskedTokens, Objective, PermutedTokens

BATCH, SEQ, VOCAB, HIDDEN, LAYERS, HEADS, FFN = 4, 14, 61, 24, 2, 4, 40
PREDICTED = 4
Tensors = Mapping[str, Tensor]


def bert(activation: str = "gelu") -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=FFN,
            hidden_act=activation,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=20,
            initializer_range=0.2,
            pad_token_id=None,  # else transformers gives that token's embedding no gradient
        )
    )


def xlnet() -> nn.Module:
    return XLNetLMHeadModel(
        XLNetConfig(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            d_inner=FFN,
            dropout=0.0,
            initializer_range=0.2,
            mem_len=None,
        )
    )


def distances_in_float64(qlen: int, klen: int, bsz: int | None = None, device: object = None) -> Tensor:
    """XLNetModel.relative_positional_encoding, whose angles are float32.

    Returns: R of klen, klen - 1 ... 1 - qlen, [klen + qlen, bsz, hidden].
    """
    frequencies = 10000.0 ** (-torch.arange(0, HIDDEN, 2, dtype=torch.float64) / HIDDEN)
    angles = torch.arange(klen, -qlen, -1, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[:, None].expand(-1, bsz or 1, -1)


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model of transformers and what it is here."""

    theirs: nn.Module
    family: Family
    config: TransformerConfig

    def to_ours(self, tensors: Tensors) -> dict[str, Tensor]:
        """Weights, or gradients, of theirs under our names, through the family's weight map."""
        found: dict[str, Tensor] = {}
        for unit in resolve(self.family, self.config):
            found |= zip(unit.ours, unit.to_ours([tensors[name] for name in unit.theirs], self.config), strict=True)
        return found

    def to_theirs(self, tensors: Tensors) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for unit in resolve(self.family, self.config):
            found |= zip(unit.theirs, unit.to_theirs([tensors[name] for name in unit.ours], self.config), strict=True)
        return found

    def weights(self) -> dict[str, Tensor]:
        return self.to_ours({name: parameter.detach() for name, parameter in self.theirs.named_parameters()})


def make(build: Callable[[], nn.Module], dtype: torch.dtype) -> Encoder:
    """The model with random weights, norms and biases among them: as ones and zeros a swap of two would not show."""
    torch.manual_seed(11)
    theirs = build().to(dtype).eval()
    if isinstance(theirs, XLNetLMHeadModel) and dtype == torch.float64:
        encoder = theirs.transformer
        encoder.relative_positional_encoding = distances_in_float64  # type: ignore[method-assign, assignment]
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    family = family_of(theirs.config.to_dict())  # type: ignore[operator]
    config = TransformerConfig.model_validate(family.to_config(theirs.config.to_dict()))  # type: ignore[operator]
    return Encoder(theirs, family, config)


def batch_of(objective: Objective) -> Microbatch:
    spans = np.random.default_rng(12).integers(0, VOCAB, (BATCH, SEQ + 1))
    return objective.microbatch(spans, np.arange(3, 3 + BATCH))


MASKING = MaskedTokens(seed=5, num_predicted=PREDICTED, mask_id=VOCAB - 1, eot_id=0, vocab_size=VOCAB)


def their_masked_loss(theirs: nn.Module, batch: Microbatch) -> Tensor:
    """The sum of the losses of the predicted tokens."""
    assert batch.targets is not None
    labels = torch.full_like(batch.tokens, -100).scatter(1, batch.targets, batch.labels)
    return F.cross_entropy(theirs(input_ids=batch.tokens).logits.flatten(0, 1), labels.flatten(), reduction="sum")


def their_permuted_loss(theirs: nn.Module, batch: Microbatch) -> Tensor:
    """The sum of the losses of the predicted tokens, with the masks of transformers written out one by one."""
    assert batch.targets is not None
    num_targets = batch.targets.shape[1]
    hidden_from = torch.zeros(BATCH, SEQ, SEQ, dtype=torch.float64)
    mapping = torch.zeros(BATCH, num_targets, SEQ, dtype=torch.float64)
    for sample, targets in enumerate(batch.targets.tolist()):
        for turn, target in enumerate(targets):
            mapping[sample, turn, target] = 1.0
            hidden_from[sample, :, target] = 1.0  # from all ...
            hidden_from[sample, targets[turn + 1 :], target] = 0.0  # ... but those predicted after it
    logits = theirs(input_ids=batch.tokens, perm_mask=hidden_from, target_mapping=mapping).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")


Step = tuple[Callable[..., nn.Module], Objective, Callable[[nn.Module, Microbatch], Tensor]]
"""What makes the model of transformers, the objective that makes a batch, and the loss of that model on it."""
STEPS: dict[str, Step] = {
    "bert": (bert, MASKING, their_masked_loss),
    "bert-tanh": (lambda: bert("gelu_new"), MASKING, their_masked_loss),
    "xlnet": (xlnet, PermutedTokens(seed=5, num_predicted=PREDICTED, eot_id=0), their_permuted_loss),
}


def stage_with(config: TransformerConfig, weights: Tensors, dtype: torch.dtype) -> Stage:
    """The whole network on one rank with the given weights: every one of them is used, and no other is left."""
    context = LayerContext(single("tp"), False, dtype, torch.device("cpu"))
    (stage,) = build_stages(config, [range(config.num_layers)], [0], context, seed=0)
    parameters = dict(stage.named_parameters())
    assert parameters.keys() == weights.keys()
    assert sum(p.numel() for p in parameters.values()) == config.num_parameters()
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])
    return stage


def their_gradients(encoder: Encoder, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of a loss of theirs under our names."""
    loss.backward()
    named: dict[str, Any] = dict(encoder.theirs.named_parameters())
    return encoder.to_ours({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()})
