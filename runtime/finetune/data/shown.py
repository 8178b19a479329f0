"""Prepared examples for people: the table of what became of the records, and examples token by token. No torch."""

from collections.abc import Iterator
from typing import NamedTuple

from trimaran.models.fields import counted
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.finetune.data.examples import Document, Example
from trimaran.runtime.finetune.data.prepare import PreparedExamples


class ShownToken(NamedTuple):
    """A token's text, and whether it is learned."""

    text: str
    learned: bool


def table_of_examples(data: PreparedExamples) -> str:
    """Return what became of the records, a line each."""
    splits = data.manifest["splits"]
    rows = list(data.account.rows())
    for name, words in (("train", "for training"), ("held_out", "held out")):
        found = splits[name]
        rows.append(
            (
                counted(found["examples"], "example"),
                f"{words}: {found['tokens']:,} tokens, {found['learned']:,} of them learned",
            )
        )
    width = max(len(count) for count, _ in rows)
    return "examples\n" + "\n".join(f"  {count.ljust(width)}  {words}" for count, words in rows)


def shown_documents(example: Example, tokenizer: Tokenizer) -> Iterator[list[ShownToken]]:
    """Yield each document of an example as tokens."""
    for document in example.documents:
        yield shown_tokens(document, tokenizer)


def shown_tokens(document: Document, tokenizer: Tokenizer) -> list[ShownToken]:
    """Return the tokens of a document; several that make one character together are one."""
    found: list[ShownToken] = []
    pending: list[int] = []
    learned = False
    for token, is_learned in zip(document.tokens.tolist(), document.learned.tolist(), strict=True):
        pending.append(token)
        learned = learned or is_learned
        text = tokenizer.decode(pending)
        if "\ufffd" not in text or len(pending) == _MOST_PIECES:
            found.append(ShownToken(text, learned))
            pending, learned = [], False
    if pending:
        found.append(ShownToken(tokenizer.decode(pending), learned))
    return found


_MOST_PIECES = 4
"""Tokens of one character at most: one for each byte of UTF-8."""
