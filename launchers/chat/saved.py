"""Conversations in files: a versioned record in JSON, inside one folder, never written over another conversation."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trimaran.runtime.files import read_json, write_text
from trimaran.runtime.infer.chat import MARKS
from trimaran.runtime.infer.dialogue import Dialogue, Exchange
from trimaran.runtime.infer.modes import did_you_mean

_MOST_BYTES: Final = 64 << 20
_ROLES: Final = ("system", "user", "assistant")
_FORMAT: Final = "trimaran conversation"
_NO_CHARACTER: Final = re.compile(f"[\ud800-\udfff]|{MARKS.pattern}")
"""Half a surrogate pair, or what chat templates keep for themselves."""


class SavedMessage(BaseModel):
    """One message."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class SavedConversation(BaseModel):
    """A conversation in a file.

    Args:
        id: the same in every file of one conversation.
        messages: perhaps a system message first, then questions and answers in turn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal["trimaran conversation"] = _FORMAT
    version: Literal[1] = 1
    id: str
    messages: tuple[SavedMessage, ...]


def place_in(folder: Path, name: str) -> Path:
    """Return the path of a conversation's file; ValueError where it would leave the folder, through a link too."""
    if not name.strip() or not name.isprintable():
        raise ValueError(f"name a file in letters that can be printed, such as /save talk.json; got {name!r}")
    path, inside = folder / name, folder.resolve()
    if not path.resolve().is_relative_to(inside) or path.resolve() == inside:
        raise ValueError(
            f"{name} is not inside {inside}, the folder of conversations; name a file in it, or start with --folder"
        )
    if not path.parent.is_dir():
        raise ValueError(f"{name} is in the folder {path.parent}, which does not exist; make it, or take another name")
    return path


def save(path: Path, dialogue: Dialogue, identity: str) -> None:
    """Write a conversation to a file that is new or of the same conversation.

    Raises:
        ValueError: the file is another one.
        OSError: it can't be written.
    """
    if path.exists() or path.is_symlink():
        try:
            is_same = _read(path).id == identity
        except (ValueError, OSError):
            is_same = False
        if not is_same:
            raise ValueError(f"{path} exists and is not of this conversation; it stays as it is: take another name")
    messages = tuple(SavedMessage(role=each["role"], content=each["content"]) for each in dialogue.messages())
    record = SavedConversation(id=identity, messages=messages)
    write_text(path, record.model_dump_json(indent=1) + "\n")


def load(path: Path) -> tuple[Dialogue, str]:
    """Return a conversation from a file, and its identity.

    Raises:
        ValueError: it is no conversation; names the message that is wrong.
        OSError: it can't be read.
    """
    record = _read(path)
    messages = list(record.messages)
    system = messages.pop(0).content if messages and messages[0].role == "system" else None
    first = 1 if system is None else 2
    for number, each in enumerate(messages):
        expected = "assistant" if number % 2 else "user"
        if each.role != expected:
            raise ValueError(
                f"{path}: message {number + first} is of the role {each.role}, and the {expected}'s turn is due: after "
                "a system message, which may be missing, user and assistant take turns"
            )
    if len(messages) % 2:
        raise ValueError(f"{path}: the last question has no answer; remove it, or add an assistant's message")
    pairs = zip(messages[::2], messages[1::2], strict=True)
    return Dialogue(system, tuple(Exchange(asked.content, told.content) for asked, told in pairs)), record.id


def _read(path: Path) -> SavedConversation:
    try:
        content = read_json(path, _MOST_BYTES)
    except ValueError as error:
        raise ValueError(f"{path} is no saved conversation: it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f'{path} is no saved conversation: it must be a record with "format": "{_FORMAT}"')
    if content.get("version") != 1:
        raise ValueError(
            f"{path} is a conversation of version {content.get('version')!r}, and this version of trimaran reads "
            "version 1; read it with the one that has written it"
        )
    _check_messages(path, content.get("messages"))
    try:
        return SavedConversation.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(each + 1) if isinstance(each, int) else each for each in first["loc"])
        raise ValueError(f"{path} is no whole conversation: {where}: {first['msg']}") from error


def _check_messages(path: Path, messages: Any) -> None:
    """Raise ValueError for a role that there is not, and for a text that no tokenizer or chat template can take."""
    for number, each in enumerate(messages if isinstance(messages, Sequence) else (), 1):
        role, content = (each.get("role"), each.get("content")) if isinstance(each, dict) else (None, None)
        if isinstance(content, str) and (found := _NO_CHARACTER.search(content)):
            raise ValueError(
                f"{path}: message {number} has U+{ord(found[0]):04X} at character {found.start() + 1}, which is no "
                "character; remove it"
            )
        if isinstance(role, str) and role not in _ROLES:
            raise ValueError(
                f"{path}: message {number} has the unknown role {role!r}; it must be one of {', '.join(_ROLES)}"
                f"{did_you_mean(role, _ROLES)}"
            )
