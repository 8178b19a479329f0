"""Byte-level BPE: train, save and load tokenizers, also published ones. The only file that imports `tokenizers`."""

import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.tokens.end_of_text import END_OF_TEXT, USUAL_NAMES, find_end_of_text, keep_end_of_text
from trimaran.runtime.data.tokens.fast_encode import FastEncoder, why_not
from trimaran.runtime.data.tokens.vocabulary import SMALLEST_MASKING_VOCABULARY, SMALLEST_VOCABULARY
from trimaran.runtime.files import read_bytes

MASK = "[MASK]"
_MOST_SHOWN = 8
# Names of the mask token: BERT, RoBERTa and XLNet.
_MASK_NAMES = (MASK, "<mask>")


class Tokenizer:
    """Text to token ids and back.

    A document that spells out a special token is plain text and gets the tokens of its characters.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, origin: str, end_of_text: str | None = None, folder: Path | None = None
    ) -> None:
        """Wrap a tokenizer of the `tokenizers` package; `origin` names it in errors.

        DataError without an end-of-text token: `end_of_text`, or as `find_end_of_text` says.
        """
        self._inner, self._origin = inner, origin
        self._seen: set[str] = set()  # characters that are known to vanish or not
        self._vanishing: dict[int, None] = {}
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        vocabulary = inner.get_vocab(with_added_tokens=True)
        special = {token.content for token in inner.get_added_tokens_decoder().values() if token.special}
        name = end_of_text or find_end_of_text(vocabulary, special, folder)
        if name not in vocabulary:
            shown = ", ".join(sorted(special)[:_MOST_SHOWN]) or "none"
            fault = f"{origin} has no token {end_of_text!r}; name one of its tokens in data.end_of_text"
            if end_of_text is None:
                fault = (
                    f"{origin} does not say which token ends a text: it has none of {', '.join(USUAL_NAMES)}, and the "
                    "files beside it name no other; name the token in data.end_of_text, or as eos_token in a "
                    "tokenizer_config.json beside it"
                )
            raise DataError(f"{fault} (special tokens: {shown})")
        self.eot_token = name
        self.eot_id = vocabulary[name]
        self._tells_end_of_text = find_end_of_text(vocabulary, special) == name
        self.mask_id: int | None = next((vocabulary[name] for name in _MASK_NAMES if name in vocabulary), None)
        # Ids may have gaps; the embedding must include the largest.
        self.vocab_size = max(vocabulary.values()) + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, with_mask: bool = False) -> "Tokenizer":
        """Train byte-level BPE on the texts.

        Radford et al., "Language models are unsupervised multitask learners", 2019, section 2.2. The same texts give
        the same tokenizer. A corpus with too few different pairs for `vocab_size` gives a smaller one.

        Args:
            with_mask: whether the vocabulary includes a mask token.
        """
        special = [END_OF_TEXT, MASK] if with_mask else [END_OF_TEXT]
        smallest = SMALLEST_MASKING_VOCABULARY if with_mask else SMALLEST_VOCABULARY
        if vocab_size < smallest:
            rule = f"must be at least {smallest}: 256 bytes and {' and '.join(special)}"
            raise DataError(f"data.tokenizer_vocab_size ({vocab_size}) {rule}; set it to {smallest} or more")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner, "the trained tokenizer")

    @classmethod
    def load(cls, path: Path, end_of_text: str | None = None) -> "Tokenizer":
        """Return the tokenizer of a tokenizer.json; DataError when the file can't be read or isn't one.

        Args:
            end_of_text: name of the token that ends a document; None to find it (`find_end_of_text`).
        """
        try:
            content = read_bytes(path)
        except OSError as error:
            raise DataError(
                f"cannot read tokenizer {path}: {error.strerror}; "
                "set data.tokenizer to a tokenizer.json, or leave it out"
            ) from error
        try:
            inner = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises plain Exception and ValueError for a file it can't parse
            raise DataError(
                f"{path} is not a tokenizer.json ({error}); export one with the `tokenizers` "
                "package, or leave data.tokenizer out"
            ) from error
        return cls(inner, str(path), end_of_text, path.parent)

    def with_special_tokens(self, names: Sequence[str]) -> "Tokenizer":
        """Return the tokenizer with more special tokens, whose ids follow the last one; the end of text is the same."""
        inner = tokenizers.Tokenizer.from_str(self.definition)
        inner.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in names])
        return Tokenizer(inner, self._origin, self.eot_token)

    def required_mask_id(self) -> int:
        """Return the id of the mask token.

        Raises:
            DataError: there is none.
        """
        if self.mask_id is None:
            names = " or ".join(_MASK_NAMES)
            raise DataError(
                f"the tokenizer has no mask token, which masked_lm hides tokens with; add {names} to its special tokens"
            )
        return self.mask_id

    def save(self, path: Path) -> None:
        """Write a tokenizer.json that `load` and the `tokenizers` package read."""
        path.write_text(self._inner.to_str(pretty=True), encoding="utf-8")
        self.keep_end_of_text(path.parent)

    @property
    def unusual_end_of_text(self) -> str | None:
        """The end-of-text token where tokenizer.json alone does not tell it, None where it does."""
        return None if self._tells_end_of_text else self.eot_token

    def keep_end_of_text(self, folder: Path) -> None:
        """Note the end-of-text token beside the tokenizer.json in `folder`, where that does not tell it."""
        if not self._tells_end_of_text:
            keep_end_of_text(folder, self.eot_token)

    @property
    def definition(self) -> str:
        """The whole tokenizer as text: two tokenizers with the same definition give the same tokens."""
        return self._inner.to_str()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one text, with nothing added before or after."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, in order, on all cores."""
        try:
            encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the package raises plain Exception
            raise self._cannot_write(error) from error
        return [encoding.ids for encoding in encodings]

    def why_not_fast(self) -> str:
        """Return why `fast_encoder` could give other ids, "" where it gives the same. It takes a second to find out."""
        return why_not(self._inner)

    def fast_encoder(self, threads: int | None = None) -> Callable[[Sequence[str]], list[list[int]]]:
        """Return what encodes as `encode_batch` does several times faster; see `FastEncoder`."""
        return FastEncoder(self._inner, threads).encode_batch

    def _cannot_write(self, error: Exception) -> DataError:
        return DataError(
            f"{self._origin} can't write this text ({error}): it has no token for what it does not know; add its "
            "unknown token to its vocabulary, or take a byte-level tokenizer (data.tokenizer: null trains one)"
        )

    def lost_characters(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[int]:
        """Return, of each text and its ids, how many characters the ids don't hold: unknown ones, and vanished ones."""
        unknown_id, may_vanish = self._losses
        lost = [0] * len(texts)
        unknown = [index for index, each in enumerate(ids) if unknown_id in each]
        encodings = self._inner.encode_batch([texts[index] for index in unknown], add_special_tokens=False)
        for index, encoding in zip(unknown, encodings, strict=True):
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            lost[index] = sum(end - start for token, (start, end) in spans if token == unknown_id)
        if may_vanish:
            for index, text in enumerate(texts):
                for character in set(text).difference(self._seen):
                    self._seen.add(character)
                    if self._vanishes(character):
                        self._vanishing[ord(character)] = None
                lost[index] += len(text) - len(text.translate(self._vanishing))
        return lost

    @cached_property
    def _losses(self) -> tuple[int | None, bool]:
        """The id of the unknown token, and whether characters may have no token at all."""
        definition = json.loads(self.definition)
        model: dict[str, Any] = definition["model"]
        if model.get("type") == "Unigram":
            return model.get("unk_id"), False
        name = model.get("unk_token")
        if name is not None or model.get("type") != "BPE":
            return self.id_of(name) if name is not None else None, False
        if "ByteLevel" in json.dumps([definition["normalizer"], definition["pre_tokenizer"]]):
            letters = pre_tokenizers.ByteLevel.alphabet()
        elif model.get("byte_fallback"):
            letters = [f"<0x{byte:02X}>" for byte in range(256)]
        else:
            return None, True
        return None, any(self.id_of(letter) is None for letter in letters)

    def _vanishes(self, character: str) -> bool:
        """Whether a character that is no white space or control character has no token, or not for all its bytes."""
        if character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cf", "Zs", "Zl", "Zp"):
            return False
        ids = self.encode(character)
        return not ids or "\ufffd" in self.decode(ids)

    def encode_with_special(self, text: str) -> list[int]:
        """Return the token ids of a text in which special tokens are encoded as such.

        For chat templates, never for users' text.
        """
        return self.encode_batch_with_special([text], add_special_tokens=False)[0]

    def encode_batch_with_special(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of each text as the transformers package does: special tokens in it are such.

        Args:
            add_special_tokens: whether the tokens that the tokenizer adds, such as beginning-of-text, come along.
        """
        self._inner.encode_special_tokens = False
        try:
            encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except Exception as error:  # the package raises plain Exception
            raise self._cannot_write(error) from error
        finally:
            self._inner.encode_special_tokens = True
        return [encoding.ids for encoding in encodings]

    def encode_as_prompt(self, text: str) -> list[int]:
        """Return the token ids of one text with the tokens that the tokenizer adds, such as beginning-of-text."""
        return self._ids(text, add_special_tokens=True)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)
        except Exception as error:  # the package raises plain Exception
            raise self._cannot_write(error) from error

    def encode_spelled(self, token: str) -> list[int]:
        """Return the ids of plain text that spells an added token; none of them is that token's id."""
        ids = self.encode(token)
        # An added token that isn't special matches in plain text too; encoding the name in two parts prevents that.
        return ids if self.id_of(token) not in ids else self.encode(token[:1]) + self.encode(token[1:])

    def added_tokens(self) -> dict[str, bool]:
        """Return the added tokens, which are not part of the trained vocabulary -> whether each is special."""
        return {token.content: bool(token.special) for token in self._inner.get_added_tokens_decoder().values()}

    def first_difference(self, other: "Tokenizer") -> str | None:
        """Return, in words, the first token of `other` that has another id here, or none; None without such a token."""
        ours, theirs = (each._inner.get_vocab(with_added_tokens=True) for each in (self, other))
        for token, number in sorted(theirs.items(), key=lambda item: item[1]):
            if ours.get(token) != number:
                here = f"{ours[token]} in the former" if token in ours else "missing in the former"
                return f"token {token!r} is {here} and {number} in the latter"
        return None

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its name in the vocabulary; None where there is none."""
        found: int | None = self._inner.token_to_id(token)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids. End-of-text tokens appear by name, incomplete UTF-8 as U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=False)
