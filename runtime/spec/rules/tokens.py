"""Rules of the tokens: their vocabulary, masks, sequences and positions."""

from collections.abc import Iterator
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError, at_most, nearest_multiples, one_of
from trimaran.runtime.data.tokens.vocabulary import SMALLEST_MASKING_VOCABULARY, SMALLEST_VOCABULARY
from trimaran.runtime.spec.fields import RunFields, num_predicted
from trimaran.runtime.spec.rules.table import Rules

RULES: Final = Rules()


def _trains_tokenizer(spec: RunFields) -> bool:
    return spec.data.tokenizer is None and spec.checkpoint.init_from is None


@RULES.needs("data.tokenizer", "checkpoint.init_from", "data.tokenizer_vocab_size", "model.vocab_size")
def _vocabulary_holds_tokenizer(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    tokens, size = spec.data.tokenizer_vocab_size, shape.vocab_size
    if _trains_tokenizer(spec) and size < tokens:
        rule = f"vocab_size ({size}) must be at least data.tokenizer_vocab_size ({tokens})"
        fix = f"set model.vocab_size to {tokens} or more"
        fix += f", or data.tokenizer_vocab_size to {size} or less" if size >= SMALLEST_VOCABULARY else ""
        yield FieldError("model.vocab_size", rule, size, fix)


@RULES.needs("data.tokenizer", "checkpoint.init_from", "data.end_of_text")
def _end_of_text_is_one_of_a_tokenizer(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    token = spec.data.end_of_text
    if token is not None and _trains_tokenizer(spec):
        rule = f"end_of_text ({token}) is for data.tokenizer, which is null; a tokenizer that is trained has its own"
        yield FieldError("data.end_of_text", rule, token, "set data.tokenizer to a tokenizer.json, or this to null")


@RULES.needs("data.mask_fraction", "model.objective")
def _masks_need_an_objective(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    fraction, objective = spec.data.mask_fraction, shape.objective
    if fraction is not None and shape.is_causal:
        rule = f"mask_fraction ({fraction}) says something only where tokens are hidden, got objective {objective}"
        fix = "set model.objective to masked_lm or permutation_lm, or data.mask_fraction to null"
        yield FieldError("data.mask_fraction", rule, fraction, fix)


@RULES.needs("model.objective", "data.mask_fraction", "train.seq_len")
def _predicted_tokens_have_a_context(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    fraction, seq_len = spec.data.mask_fraction, spec.train.seq_len
    predicted = num_predicted(shape.objective, fraction, seq_len)
    if not shape.is_causal and predicted >= seq_len:
        rule = f"the {predicted} tokens that are predicted must be fewer than the {seq_len} of a sequence"
        yield FieldError("data.mask_fraction", rule, fraction, "lower data.mask_fraction, or raise train.seq_len")


@RULES.needs("parallel.sequence_parallel", "parallel.tp", "train.seq_len", "model.objective", "data.mask_fraction")
def _query_stream_by_tp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    tp, seq_len, fraction = spec.parallel.tp, spec.train.seq_len, spec.data.mask_fraction
    if not (spec.parallel.sequence_parallel and shape.has_query_stream) or seq_len % tp:
        return
    predicted = num_predicted(shape.objective, fraction, seq_len)
    if predicted % tp:
        tokens = f"the {predicted} tokens of a sequence that are predicted"
        rule = f"{tokens} must be divisible by tp ({tp}) with sequence_parallel"
        counts = f"{one_of(nearest_multiples(tp, predicted))} of {seq_len}"
        fix = f"set data.mask_fraction so that it is {counts}, or parallel.sequence_parallel to false"
        yield FieldError("data.mask_fraction", rule, fraction, fix)


@RULES.needs("data.tokenizer", "checkpoint.init_from", "data.tokenizer_vocab_size", "model.objective")
def _tokenizer_has_room_for_a_mask(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    tokens, smallest = spec.data.tokenizer_vocab_size, SMALLEST_MASKING_VOCABULARY
    if shape.objective == "masked_lm" and _trains_tokenizer(spec) and tokens < smallest:
        rule = f"tokenizer_vocab_size ({tokens}) must be at least {smallest}, for masked_lm needs a mask token too"
        fix = f"set data.tokenizer_vocab_size to {smallest} or more"
        yield FieldError("data.tokenizer_vocab_size", rule, tokens, fix)


@RULES.needs("parallel.sequence_parallel", "parallel.tp", "train.seq_len")
def _sequence_by_tp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    tp, seq_len = spec.parallel.tp, spec.train.seq_len
    if spec.parallel.sequence_parallel and seq_len % tp:
        rule = f"seq_len ({seq_len}) must be divisible by tp ({tp}) with sequence_parallel"
        fix = f"set train.seq_len to {one_of(nearest_multiples(tp, seq_len))}, or parallel.sequence_parallel to false"
        yield FieldError("train.seq_len", rule, seq_len, fix)


@RULES.needs("model.position", "model.max_seq_len", "train.seq_len")
def _sequence_has_positions(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    seq_len, longest = spec.train.seq_len, shape.max_seq_len
    if shape.position == "learned" and seq_len > longest:
        rule = f"seq_len ({seq_len}) must be at most max_seq_len ({longest}) with learned positions"
        fix = f"set train.seq_len to {at_most(longest)}, or model.max_seq_len to {seq_len} or more"
        yield FieldError("train.seq_len", rule, seq_len, fix)
