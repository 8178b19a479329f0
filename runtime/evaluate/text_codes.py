"""Texts of an evaluation to token ids, exactly as lm-eval's `hf` backend does it. Without lm-eval and torch."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from trimaran.runtime.data.tokens.end_of_text import token_text
from trimaran.runtime.evaluate.engine.requests import Likelihood
from trimaran.runtime.infer.chat import read_json
from trimaran.runtime.infer.prompts import RunText

_BATCH = 512
_MANY = 4096
"""Texts from which on it pays to find out whether a faster engine gives the same ids, which takes a second."""
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
        return dict(zip(unique, self._rows(unique, len(unique) > _MANY), strict=True))

    def encode_continuations(self, texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Return the ids of texts that follow the prefix token."""
        unique = list(dict.fromkeys(texts))
        return dict(zip(unique, map(self._shared, self._ids(unique, False, False)), strict=True))

    def pairs(self, requests: Sequence[tuple[str, str]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return context and continuation of each request in ids; a continuation without any stays empty.

        White space that ends a context goes to the continuation, and both are encoded as one text, which is cut after
        as many tokens as the context alone has. Equal contexts are one object.
        """
        pairs = [moved(*request) for request in requests]
        contexts = self.encode(context for context, _ in pairs if context)
        alone = self.encode_continuations(rest for context, rest in pairs if not context)
        whole = self._rows((context + rest for context, rest in pairs if context), len(pairs) > _MANY)
        return [
            (contexts[context], next(whole)[len(contexts[context]) :]) if context else self._begun(alone[rest])
            for context, rest in pairs
        ]

    def _rows(self, texts: Iterable[str], is_fast: bool) -> Iterator[tuple[int, ...]]:
        """Yield the ids of each text, a batch at a time; those that begin a text are not added where it has them."""
        waiting = iter(texts)
        while batch := list(islice(waiting, _BATCH)):
            begun = [bool(self._prefix_text) and text.startswith(self._prefix_text) for text in batch]
            rows = {
                has: iter(
                    self._ids([text for text, each in zip(batch, begun, strict=True) if each is has], not has, is_fast)
                )
                for has in (False, True)
            }
            yield from (self._shared(next(rows[has])) for has in begun)

    def _ids(self, texts: Sequence[str], adds: bool, is_fast: bool) -> list[list[int]]:
        """Return the ids of texts.

        Args:
            adds: whether the tokens that the tokenizer adds come along.
            is_fast: whether the faster engine is taken where it gives the same ids.
        """
        tokenizer = self.text.tokenizer
        if not is_fast or self._fast is None or any(self._spells_special(text) for text in texts):
            return tokenizer.encode_batch_with_special(texts, add_special_tokens=adds)
        encode, before, after = self._fast
        return [[*before, *ids, *after] if adds else ids for ids in encode(texts)]

    @cached_property
    def _fast(self) -> tuple[Callable[[Sequence[str]], list[list[int]]], list[int], list[int]] | None:
        """A faster engine that gives the same ids of plain text, and what the tokenizer adds before and after."""
        tokenizer = self.text.tokenizer
        if tokenizer.why_not_fast():
            return None
        (plain,), (whole,) = (
            tokenizer.encode_batch_with_special(["a"], add_special_tokens=adds) for adds in (False, True)
        )
        start = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
        return tokenizer.fast_encoder(), whole[:start], whole[start + len(plain) :]

    def _spells_special(self, text: str) -> bool:
        return self._special_pattern.search(text) is not None

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        names = sorted(self.text.tokenizer.added_tokens(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def _shared(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return ids as a tuple of shared numbers, which takes a quarter of the memory."""
        return tuple(map(self._numbers.__getitem__, ids))

    @cached_property
    def _numbers(self) -> list[int]:
        return list(range(self.text.tokenizer.vocab_size))

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
