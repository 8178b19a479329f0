"""Texts of an evaluation to token ids, exactly as lm-eval's `hf` backend does it. Without lm-eval and torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from trimaran.runtime.data.tokens.end_of_text import token_text
from trimaran.runtime.evaluate.requests import Likelihood
from trimaran.runtime.infer.chat import read_json
from trimaran.runtime.infer.prompts import RunText

_BATCH = 512
_SPECIAL = ("special_tokens_map.json", "tokenizer_config.json")


@dataclass(frozen=True)
class TextCodes:
    """What makes token ids of contexts and continuations.

    Args:
        prefix: the token that a text without a context follows: begin of text, end of text where there is none.
        end: text of the token that ends a text.
        stops: ids that end a continuation: those that the model's own files name, else the end of text.
    """

    text: RunText
    prefix: int
    end: str
    stops: tuple[int, ...]

    @classmethod
    def of(cls, text: RunText) -> "TextCodes":
        """Return the one of a run's or model's folder, by its tokenizer_config.json or special_tokens_map.json."""
        tokenizer, named = text.tokenizer, dict[str, str]()
        for file in _SPECIAL:
            config = read_json(text.folder / file)
            for name in ("bos_token", "eos_token"):
                token = token_text(config.get(name))
                if token is not None and tokenizer.id_of(token) is not None:
                    named[name] = token
        end = named.get("eos_token", tokenizer.eot_token)
        prefix = tokenizer.id_of(named.get("bos_token", end))
        assert prefix is not None, "every name was looked up"
        # RunText adds the tokenizer's end of text, which a model tuned for conversations may write within a turn.
        stops = set(text.stop_tokens) - ({tokenizer.eot_id} if end != tokenizer.eot_token else set())
        return cls(text, prefix, end, tuple(sorted(stops)))

    def without_special(self, text: str) -> str:
        """Return a continuation without the names of special tokens."""
        for name in self._special:
            text = text.replace(name, "")
        return text

    @cached_property
    def _special(self) -> list[str]:
        return [name for name, is_special in self.text.tokenizer.added_tokens().items() if is_special]

    @cached_property
    def _prefix_text(self) -> str:
        return self.text.tokenizer.decode([self.prefix])

    def encode(self, texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Return the ids of each text; special tokens in it are such, and those that begin a text are added once."""
        unique = list(dict.fromkeys(texts))
        begun = [text for text in unique if self._prefix_text and text.startswith(self._prefix_text)]
        others = [text for text in unique if not (self._prefix_text and text.startswith(self._prefix_text))]
        return self._ids(begun, add_special_tokens=False) | self._ids(others, add_special_tokens=True)

    def encode_continuations(self, texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Return the ids of texts that follow the prefix token."""
        return self._ids(list(dict.fromkeys(texts)), add_special_tokens=False)

    def _ids(self, texts: Sequence[str], *, add_special_tokens: bool) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        same = self._numbers
        for first in range(0, len(texts), _BATCH):
            batch = texts[first : first + _BATCH]
            rows = self.text.tokenizer.encode_batch_with_special(batch, add_special_tokens=add_special_tokens)
            found |= {text: tuple(map(same.__getitem__, ids)) for text, ids in zip(batch, rows, strict=True)}
        return found

    @cached_property
    def _numbers(self) -> list[int]:
        """One object for each id: tuples of the same objects take a quarter of the memory."""
        return list(range(self.text.tokenizer.vocab_size))

    def pairs(self, requests: Sequence[tuple[str, str]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return context and continuation of each request in ids; a continuation without any stays empty.

        White space that ends a context goes to the continuation, and both are encoded as one text, which is cut after
        as many tokens as the context alone has.
        """
        pairs = [moved(*request) for request in requests]
        with_context = [(context, rest) for context, rest in pairs if context]
        whole = self.encode(text for context, rest in with_context for text in (context, context + rest))
        alone = self.encode_continuations(rest for context, rest in pairs if not context)
        # Equal contexts are one object, as `encode` has it.
        return [
            (whole[context], whole[context + rest][len(whole[context]) :]) if context else self._begun(alone[rest])
            for context, rest in pairs
        ]

    def _begun(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (ids[:1], ids[1:]) if ids[:1] == (self.prefix,) else ((self.prefix,), ids)


def moved(context: str, continuation: str) -> tuple[str, str]:
    """Return context and continuation with the white space that ends the context before the continuation."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def cut(context: tuple[int, ...], continuation: tuple[int, ...], max_seq_len: int) -> tuple[Likelihood, bool]:
    """Return a request that the model can take, and whether the left of its context was cut off.

    Args:
        continuation: at most `max_seq_len` tokens.
    """
    over = len(context) + len(continuation) - (max_seq_len + 1)
    return Likelihood(context[over:] if over > 0 else context, continuation), over > 0
