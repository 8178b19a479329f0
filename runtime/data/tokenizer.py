"""Byte-level BPE: train it, save it, load it, and use one somebody else trained. The only file that imports `tokenizers`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trimaran.runtime.data.files import DataError

END_OF_TEXT = "<|endoftext|>"
# How published tokenizers call the token that separates documents: GPT-2, Llama 3, Llama 1 and 2, Gemma.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
# Every byte has a token, so that any text can be written, and one more ends a document.
SMALLEST_VOCABULARY = 256 + 1


class Tokenizer:
    """Text to token ids and back. Text is only ever text: a document that spells out a special token gets the bytes of its name."""

    def __init__(self, inner: tokenizers.Tokenizer, origin: str) -> None:
        """Wrap a tokenizer of the `tokenizers` package; `origin` names it in errors. DataError without an end-of-text token."""
        self._inner = inner
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        vocabulary = inner.get_vocab(with_added_tokens=True)
        name = next((name for name in _END_OF_TEXT_NAMES if name in vocabulary), None)
        if name is None:
            raise DataError(f"{origin} has no end-of-text token; add one of {', '.join(_END_OF_TEXT_NAMES)} to its special tokens")
        self.eot_token = name
        self.eot_id = vocabulary[name]
        # Ids may have holes; an embedding must reach the largest.
        self.vocab_size = max(vocabulary.values()) + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train byte-level BPE on the texts (Radford et al., "Language models are unsupervised multitask learners", 2019, section 2.2).

        The same texts give the same tokenizer. A corpus too small to have `vocab_size` different pairs gives a smaller one.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            rule = f"must be at least {SMALLEST_VOCABULARY}: 256 bytes and {END_OF_TEXT}"
            raise DataError(f"data.tokenizer_vocab_size ({vocab_size}) {rule}; set it to {SMALLEST_VOCABULARY} or more")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner, "the trained tokenizer")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Return the tokenizer of a tokenizer.json; DataError when the file can't be read or isn't one."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read tokenizer {path}: {error.strerror}; set data.tokenizer to a tokenizer.json, or leave it out"
            ) from error
        try:
            inner = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises plain Exception and ValueError for a file it can't parse
            raise DataError(
                f"{path} is not a tokenizer.json ({error}); export one with the `tokenizers` package, or leave data.tokenizer out"
            ) from error
        return cls(inner, str(path))

    def save(self, path: Path) -> None:
        """Write a tokenizer.json that `load` and the `tokenizers` package read."""
        path.write_text(self._inner.to_str(pretty=True), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one text, with nothing added before or after."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, in order, on all cores."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; end-of-text tokens are shown by name, bytes that aren't UTF-8 yet as U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=False)
