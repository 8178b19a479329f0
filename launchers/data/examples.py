"""Examples of a run that finetunes: preparing them, and showing the first ones token by token."""

import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from trimaran.launchers.terminal import say, writing_output
from trimaran.models.fields import printable
from trimaran.runtime.spec import RunSpec

if TYPE_CHECKING:
    from rich.text import Text

    from trimaran.runtime.data.tokens.tokenizer import Tokenizer
    from trimaran.runtime.finetune.data.examples import Example
    from trimaran.runtime.finetune.data.prepare import PreparedExamples
    from trimaran.runtime.finetune.data.shown import ShownToken

_MOST_TOKENS = 2_000
"""Of a document that is shown."""


def prepare_examples_of(spec: RunSpec, *, resumed: bool) -> "PreparedExamples":
    """Prepare the examples of a spec that finetunes, and tell what became of the records.

    Args:
        resumed: whether the run has begun, so that its own folder has the tokenizer and the chat template.
    """
    from trimaran.runtime.finetune.data.prepare import prepare_examples
    from trimaran.runtime.finetune.data.shown import table_of_examples

    folder, tokenizer = _model_of(spec, resumed)
    prepared = prepare_examples(spec, folder, tokenizer, os.environ)
    say(table_of_examples(prepared))
    return prepared


def first_examples(spec: RunSpec, count: int) -> "tuple[list[Example], Tokenizer]":
    """Return the first examples of a spec that finetunes, and the tokenizer that wrote them; prepares nothing.

    Raises:
        ValueError: they, the chat template or the tokenizer can't be used.
    """
    from trimaran.runtime.finetune.data.account import ExampleAccount
    from trimaran.runtime.finetune.data.formats import find_example_files
    from trimaran.runtime.finetune.data.prepare import encoder_of, tokenized

    folder, tokenizer = _model_of(spec, resumed=False)
    encoder = encoder_of(spec, folder, tokenizer)
    files = find_example_files(spec.data.source, Path(spec.data.cache_dir))
    return list(islice(tokenized(spec, files, encoder, ExampleAccount()), count)), encoder.tokenizer


def print_examples(spec: RunSpec, count: int) -> None:
    """Print the first examples token by token; the learned ones in green, or where there is no colour in « »."""
    from trimaran.runtime.finetune.data.shown import shown_documents

    try:
        examples, tokenizer = first_examples(spec, count)
    except (ValueError, OSError, RuntimeError):
        return  # told among the problems
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    with writing_output():
        for example in examples:
            for number, tokens in enumerate(shown_documents(example, tokenizer)):
                name = "" if len(example.documents) == 1 else ("chosen ", "rejected ")[number]
                learned = sum(token.learned for token in tokens)
                console.print(f"\n{name}{example.origin}: {len(tokens)} tokens, {learned} learned", style="bold")
                console.print(_text_of(tokens[:_MOST_TOKENS], console.color_system is not None), soft_wrap=True)


def _text_of(tokens: "list[ShownToken]", has_colours: bool) -> "Text":
    """Return tokens with lines between them; learned ones stand out."""
    from rich.text import Text

    text, was_learned = Text(), False
    for token in tokens:
        if not has_colours and token.learned != was_learned:
            text.append("«" if token.learned else "»")
        elif len(text):
            text.append("|", style="dim")
        # A line end is shown, and ends the line.
        shown = printable(token.text.replace("\n", "\\n"))
        text.append(shown + "\n" * token.text.count("\n"), style="bold green" if token.learned else "")
        was_learned = token.learned
    if was_learned and not has_colours:
        text.append("»")
    return text


def _model_of(spec: RunSpec, resumed: bool) -> tuple[Path | None, Path | None]:
    """Return the run folder whose chat template the run goes on with, and its tokenizer.json; None without a model."""
    if spec.checkpoint.init_from is None:
        return (Path(spec.train.output_dir) if resumed else None), None
    from trimaran.runtime.train.init_from import open_weights, tokenizer_of_weights

    tokenizer = tokenizer_of_weights(spec, resumed=resumed)
    return Path(spec.train.output_dir) if resumed else open_weights(Path(spec.checkpoint.init_from))[1], tokenizer
