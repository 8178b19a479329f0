"""From a user's texts to token ids: a run's tokenizer, stop tokens and chat template, and files of prompts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.tokenizer import Tokenizer
from trimaran.runtime.infer.chat import ChatError, ChatTemplate, Message, check_messages, read_json, token_text


@dataclass(frozen=True)
class Prompt:
    """One prompt: the messages of a conversation, or else a text.

    Args:
        text: the user's text, in a conversation the question; None where the user gave messages.
        name: the prompt's `id` in the file, returned with the result.
    """

    text: str | None
    messages: tuple[Message, ...] | None = None
    name: str | int | None = None


@dataclass(frozen=True)
class RunText:
    """How the model of a run reads and writes text.

    Args:
        stop_tokens: ids that end a continuation: end of text, and the ends of a turn that the model's own files name.
        template: None where the run has no chat template.
        is_imported: whether the model came with files of its own, which say which tokens precede a text.
    """

    folder: Path
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    template: ChatTemplate | None
    is_imported: bool

    @classmethod
    def open(cls, folder: Path) -> "RunText":
        """Read tokenizer.json, tokenizer_config.json, generation_config.json and the chat template of a run folder.

        Raises:
            ValueError: a file has other content than its name says (DataError for the tokenizer, ChatError for the
                others).
        """
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        path = folder / "generation_config.json"
        stops = {tokenizer.eot_id, *_end_ids(read_json(path), path, tokenizer)}
        end = tokenizer.id_of(token_text(read_json(folder / "tokenizer_config.json").get("eos_token")) or "")
        if end is not None:
            stops.add(end)
        return cls(
            folder, tokenizer, tuple(sorted(stops)), ChatTemplate.find(folder), (folder / "import.json").exists()
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids that the model continues, at least one.

        Raises:
            ChatError: the prompt has messages and the run no chat template, or the template rejects them.
        """
        if prompt.messages is not None:
            return self._template().encode(prompt.messages, self.tokenizer)
        text = prompt.text or ""
        # A model trained here saw texts with no token before them.
        ids = self.tokenizer.encode_as_prompt(text) if self.is_imported else self.tokenizer.encode(text)
        return ids or [self.tokenizer.eot_id]

    def id_of(self, token: str) -> int:
        """Return the id of a token by its name; ValueError where the vocabulary has no such token."""
        found = self.tokenizer.id_of(token)
        if found is None:
            raise DataError(
                f"{token!r} is no token of {self.folder / 'tokenizer.json'}; "
                "to end before a text, give it as a stop string"
            )
        return found

    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise ChatError(
                f"{self.folder} has no chat template, which a model that was tuned for conversations brings; "
                "give a plain --prompt, or write the template to chat_template.jinja in that folder"
            )
        return self.template


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a file: each line is JSON in a .jsonl file, and a text to continue in any other.

    A JSON line is a text, or a record with `prompt` (a text) or `messages` (records with `role` and `content`), and
    optionally `id` (a text or a number).

    Raises:
        DataError: the file has no prompt, or a line is invalid; names the line.
        OSError: it can't be read.
    """
    try:
        content = path.read_text(encoding="utf-8")  # line ends of any system become \n
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    lines = content.removesuffix("\n").split(
        "\n"
    )  # not splitlines, which splits at characters that JSON text may contain
    if not content:
        raise DataError(f"{path} has no prompt; write one a line")
    if path.suffix != ".jsonl":
        return [Prompt(line) for line in lines]
    return [_parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def conversation(question: str, system: str | None = None, name: str | int | None = None) -> Prompt:
    """Return the conversation of one question, with the system message first."""
    start: Sequence[Message] = () if system is None else ({"role": "system", "content": system},)
    return Prompt(question, (*start, {"role": "user", "content": question}), name)


def _parse_line(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{where} is not JSON ({error}); write one JSON value a line, or call the file .txt for plain lines"
        ) from error
    record: dict[str, Any] = {"prompt": value} if isinstance(value, str) else value
    if (
        not isinstance(record, dict)
        or len({"prompt", "messages"} & record.keys()) != 1
        or record.keys() - {"prompt", "messages", "id"}
    ):
        raise DataError(
            f"{where} must be a text, or a record with either prompt or messages, and perhaps id; it is {line[:200]}"
        )
    text, messages, name = record.get("prompt"), record.get("messages"), record.get("id")
    if "prompt" in record and not isinstance(text, str):
        raise DataError(f"{where}: prompt must be a text; it is {json.dumps(text)[:200]}")
    if not isinstance(name, str | int | None):
        raise DataError(f"{where}: id must be a text or a whole number; it is {json.dumps(name)[:200]}")
    if messages is None:
        return Prompt(text, None, name)
    try:
        check_messages(messages if isinstance(messages, list) else ())
    except ChatError as error:
        raise DataError(f"{where}: {error}") from error
    return Prompt(None, tuple(messages), name)


def _end_ids(config: dict[str, Any], path: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the ids in eos_token_id, which is one id, a list, or missing."""
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    wrong = [each for each in ids if not isinstance(each, int) or not 0 <= each < tokenizer.vocab_size]
    if wrong:
        raise ChatError(
            f"{path}: eos_token_id must be an id of the tokenizer, from 0 to {tokenizer.vocab_size - 1}, "
            f"or a list of them; got {wrong[0]}"
        )
    return ids
