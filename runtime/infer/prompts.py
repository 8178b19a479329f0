"""From a user's texts to token ids: a run's tokenizer, stop tokens and chat template, and files of prompts."""

import bz2
import codecs
import gzip
import json
import lzma
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trimaran.models.fields import counted
from trimaran.runtime.data.corpus import check_is_text, check_nul, decode_utf8, repair_texts
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.tokens.end_of_text import token_text
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.files import parse_json, read_bytes
from trimaran.runtime.infer.chat import ChatError, ChatTemplate, Message, check_messages, read_json

STANDARD_INPUT: Final = Path("-")
_DECOMPRESS: Final[dict[str, Callable[[bytes], bytes]]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_NOTES: Final = {
    "byte": "outside UTF-8 replaced by U+FFFD",
    "half surrogate pair": "replaced by U+FFFD",
    "blank line": "passed over",
}
"""What is counted, and what became of it."""


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
        stop_tokens: ids that end a continuation: end of text, and the ends of a turn that the model's own files name,
            which may be beyond the tokenizer.
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
        stops = {tokenizer.eot_id, *_end_ids(read_json(path), path)}
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
            return self.required_template().encode(prompt.messages, self.tokenizer)
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

    def required_template(self) -> ChatTemplate:
        """Return the chat template; ChatError where the run has none."""
        if self.template is None:
            raise ChatError(
                f"{self.folder} has no chat template, which a model that was tuned for conversations brings; "
                "give a plain --prompt, or write the template to chat_template.jinja in that folder"
            )
        return self.template


def read_prompts(path: Path, say: Callable[[str], None] = lambda text: None) -> list[Prompt]:
    """Return the prompts of a file: each line is JSON in a .jsonl file, and a text to continue in any other.

    The file "-" is the standard input.

    A JSON line is a text, or a record with `prompt` (a text) or `messages` (records with `role` and `content`), and
    optionally `id` (a text or a number). What the reader of a corpus forgives is forgiven here: compression (.gz, .bz2,
    .xz), a byte order mark, line ends of any system, blank lines of a .jsonl file, and bytes that are not UTF-8.

    Args:
        say: called with a sentence about what was replaced or passed over.

    Raises:
        DataError: the file has no prompt, or a line is invalid; names the line.
        OSError: it can't be read.
    """
    counts: Counter[str] = Counter()
    lines = _lines_of(path, counts)
    if path.name.removesuffix(path.suffix if path.suffix in _DECOMPRESS else "").endswith(".jsonl"):
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        counts["blank line"] = len(lines) - len(numbered)
        prompts = [_parse_line(line, f"{path}, line {number}", counts) for number, line in numbered]
    else:
        prompts = [Prompt(line) for line in lines]
    if not prompts:
        raise DataError(f"{path} has no prompt; write one a line")
    for what, words in _NOTES.items():
        if counts[what]:
            say(f"{path}: {counted(counts[what], what)} {words}")
    return prompts


def _lines_of(path: Path, counts: Counter[str]) -> list[str]:
    """Return the lines of a text file, without their ends; [] for an empty one."""
    if path == STANDARD_INPUT and sys.stdin is None:
        raise DataError("standard input is closed, and prompts are to be read from it; give a file of them")
    data = sys.stdin.buffer.read() if path == STANDARD_INPUT else read_bytes(path)
    if path.suffix in _DECOMPRESS:
        try:
            data = _DECOMPRESS[path.suffix](data)
        except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
            raise DataError(f"{path} is not a whole {path.suffix} file ({error}); copy it again") from error
    check_is_text(path, data)
    if data.startswith(_UTF16):
        text = data.decode("utf-16", "replace")
    else:
        text, counts["byte"] = decode_utf8(data)
        check_nul(path, text)
    # Not splitlines, which splits at characters that JSON text may contain.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    return lines if text else []


def check_typed_text(option: str, text: str | None) -> None:
    """Raise DataError where a text of the command line has bytes that are not in the encoding of the locale.

    Args:
        option: its name, such as --prompt.
    """
    if text is None or not any("\udc80" <= character <= "\udcff" for character in text):
        return
    start = next(index for index, character in enumerate(text) if "\udc80" <= character <= "\udcff")
    file = ", or give the text in a file with --prompts" if option == "--prompt" else ""
    raise DataError(
        f"{option} has the byte 0x{ord(text[start]) & 0xFF:02x} at character {start + 1}, which is not UTF-8; set the "
        f"terminal and the locale to UTF-8 (LC_ALL=C.UTF-8){file}"
    )


def conversation(question: str, system: str | None = None, name: str | int | None = None) -> Prompt:
    """Return the conversation of one question, with the system message first."""
    start: Sequence[Message] = () if system is None else ({"role": "system", "content": system},)
    return Prompt(question, (*start, {"role": "user", "content": question}), name)


def _parse_line(line: str, where: str, counts: Counter[str]) -> Prompt:
    try:
        value, repaired = repair_texts(parse_json(line))
        counts["half surrogate pair"] += repaired
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


def _end_ids(config: dict[str, Any], path: Path) -> list[int]:
    """Return the ids in eos_token_id, which is one id, a list, or missing. A negative one stands for none."""
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    wrong = [each for each in ids if not isinstance(each, int)]
    if wrong:
        raise ChatError(f"{path}: eos_token_id must be a whole number or a list of them; got {wrong[0]!r}")
    return [each for each in ids if each >= 0]
