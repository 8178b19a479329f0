"""Chat templates: from messages to token ids, ready for the assistant's turn.

A template is a Jinja program that comes with a model (chat_template.jinja, or the field chat_template of
tokenizer_config.json) and writes the messages with the model's special tokens around them. It runs in Jinja's sandbox,
with the functions that templates expect from the `transformers` package.

Only the template may write special tokens. Where a message spells one out, the spelling is marked before the template
runs, and encoded as plain text after it. The marks are noncharacter code points of Unicode, reserved for internal
use.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from trimaran.runtime.data.tokens.end_of_text import token_text
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.files import parse_json, read_bytes, read_text

_START, _END = "\ufdd0", "\ufdd1"
GENERATED, GENERATED_END = "\ufdd2", "\ufdd3"
"""Around what the template marks as the assistant's words by {% generation %}, where that is asked for."""
MARKS = re.compile(f"[{_START}{_END}{GENERATED}{GENERATED_END}]")
"""What no message may have."""
Message = Mapping[str, Any]
"""One turn: `role` (system, user, assistant, ...), `content` (text), and any other fields that the template reads."""


class ChatError(ValueError):
    """A chat template that can't be used, or messages that it rejects; the message is a sentence."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Args:
        source: the Jinja text.
        origin: the file it was read from, for errors.
        names: special tokens that the template may name, such as bos_token -> "<s>".
    """

    source: str
    origin: str
    names: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls, folder: Path) -> "ChatTemplate | None":
        """Return the template in a run folder; None where it has none. ChatError where its files can't be read."""
        config, names = read_json(folder / "tokenizer_config.json"), cls.names_in(folder)
        path = folder / "chat_template.jinja"
        if path.exists():
            return cls(read_text(path), str(path), names)
        source, origin = config.get("chat_template"), str(folder / "tokenizer_config.json")
        if isinstance(source, list):
            source = _default_of(source, origin)
        if source is None:
            return None
        if not isinstance(source, str):
            raise ChatError(f"{origin}: chat_template must be a text or a list of named texts")
        return cls(source, origin, names)

    @staticmethod
    def names_in(folder: Path) -> dict[str, str]:
        """Return the special tokens that the tokenizer_config.json in a folder names; ChatError where it is damaged."""
        return {
            name: text
            for name, value in read_json(folder / "tokenizer_config.json").items()
            if name.endswith("_token") and (text := token_text(value)) is not None
        }

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, marks_generation: bool = False
    ) -> str:
        """Return the text of the conversation; ChatError where the template is wrong or rejects the messages.

        Args:
            add_generation_prompt: whether the beginning of an assistant's turn follows.
            marks_generation: whether GENERATED and GENERATED_END stand around the blocks {% generation %}.
        """
        program = self._marking if marks_generation else self._plain
        import jinja2

        known = {
            **self.names,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text: str = program.render(known)
        except jinja2.TemplateError as error:
            raise ChatError(f"the chat template of {self.origin} refuses these messages: {error}") from error
        except (
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
            MemoryError,
        ) as error:  # errors of a template's own expressions
            reason = str(error) or "it runs out of memory"  # MemoryError alone has no words
            raise ChatError(f"the chat template of {self.origin} fails on these messages: {reason}") from error
        return text

    @cached_property
    def _plain(self) -> Any:
        return self._compiled(marks_generation=False)

    @cached_property
    def _marking(self) -> Any:
        return self._compiled(marks_generation=True)

    def _compiled(self, *, marks_generation: bool) -> Any:
        """Return the program; ChatError where it is wrong."""
        environment = _environment(marks_generation)
        import jinja2

        try:
            return environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatError(
                f"the chat template of {self.origin} is wrong at line {error.lineno}: {error.message}"
            ) from error
        except (jinja2.TemplateError, RecursionError) as error:
            raise ChatError(f"the chat template of {self.origin} is wrong: {error}") from error

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the token ids of the conversation.

        Special tokens written by the template are encoded as such, those in messages as plain text.

        Raises ChatError for invalid messages, and as `render` does.
        """
        check_messages(messages)
        pattern = self.control_pattern(tokenizer)
        marked = [marked_message(message, pattern) for message in messages]
        return encode_marked(self.render(marked, add_generation_prompt=add_generation_prompt), pattern, tokenizer)

    def control_pattern(self, tokenizer: Tokenizer) -> re.Pattern[str]:
        """Return what matches the tokens that only the template may write."""
        # Longer ones first: a token takes precedence over one that it contains.
        control = sorted(self.control_tokens(tokenizer), key=len, reverse=True)
        return re.compile("|".join(re.escape(token) for token in control) or "(?!)")

    def control_tokens(self, tokenizer: Tokenizer) -> list[str]:
        """Special tokens, and other added tokens that the template writes. Blank ones are layout and stay text."""
        return [
            text
            for text, is_special in tokenizer.added_tokens().items()
            if text.strip() and (is_special or text in self.source)
        ]


def check_messages(messages: Sequence[Message]) -> None:
    """Raise ChatError, with the number of the message, where one is not a record with texts `role` and `content`."""
    if not messages:
        raise ChatError("a conversation must have at least one message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ChatError(
                f"message {number} must be a record with the texts role and content; "
                f"it is {json.dumps(message, default=str)[:200]}"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} where there is no file; ChatError where it isn't an object."""
    if not path.exists():
        return {}
    try:
        content = parse_json(read_bytes(path))
    except ValueError as error:
        raise ChatError(f"{path} is not JSON ({error}); put the file of the model there again, or remove it") from error
    if not isinstance(content, dict):
        raise ChatError(f"{path} must hold a JSON object")
    return content


def _default_of(named: Iterable[Any], origin: str) -> str:
    templates = {each.get("name"): each.get("template") for each in named if isinstance(each, dict)}
    if not isinstance(templates.get("default"), str):
        raise ChatError(
            f"{origin} has the chat templates {', '.join(map(str, templates))} and none called default; "
            "write one to chat_template.jinja"
        )
    return str(templates["default"])


def marked_message(value: Any, pattern: re.Pattern[str]) -> Any:
    """Return a message with marks around every control token that its texts spell."""
    if isinstance(value, str):
        if MARKS.search(value):
            raise ChatError("a message has a code point from U+FDD0 to U+FDD3, which is no character; remove it")
        return pattern.sub(f"{_START}\\g<0>{_END}", value)
    if isinstance(value, Mapping):
        return {key: marked_message(each, pattern) for key, each in value.items()}
    return [marked_message(each, pattern) for each in value] if isinstance(value, list | tuple) else value


def encode_marked(text: str, pattern: re.Pattern[str], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of what the template has made of marked messages."""
    if _START not in text and _END not in text:
        return tokenizer.encode_with_special(text)
    ids: list[int] = []
    for number, piece in enumerate(re.split(f"{_START}({pattern.pattern}){_END}|[{_START}{_END}]", text)):
        if piece:  # None stands for a mark that the template separated from its other half
            ids += tokenizer.encode_spelled(piece) if number % 2 else tokenizer.encode_with_special(piece)
    return ids


def _environment(marks_generation: bool) -> Any:
    """Return the sandbox that templates run in."""
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ChatError("chat templates need the package jinja2: pip install jinja2") from error

    class Generation(Extension):
        """The block tag `generation`, which marks the assistant's words for training."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own attribute

        def parse(self, parser: Any) -> Any:
            """Return the content of the block, between marks where they are wanted."""
            next(parser.stream)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (GENERATED, GENERATED_END))
            return [start, *body, end] if marks_generation else body

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson  # jinja2's own filter escapes HTML characters
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment
