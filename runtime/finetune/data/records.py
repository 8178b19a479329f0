"""What a record of an example file says, whatever its format. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

ROLES: Final = ("system", "user", "assistant", "tool")

FORMATS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "sft": ("messages", "sharegpt", "alpaca", "prompt_completion", "text"),
    "reward": ("preference",),
    "preference": ("preference", "unpaired"),
    "rl": ("prompts",),
    "score": ("preference", "messages", "sharegpt", "alpaca", "prompt_completion"),
}
"""The formats that each method learns from, in the order in which `auto` looks for them; and those that are scored."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: `role` is of ROLES, `content` a text."""

    role: str
    content: str

    @property
    def message(self) -> dict[str, str]:
        """The turn as a chat template reads it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record stands.

    Args:
        file: its path, as found.
        line: from 1; in a .json list or a .parquet table the number of the record.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


Turns = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that end with an answer."""

    turns: Turns
    origin: Origin


@dataclass(frozen=True, slots=True)
class Plain:
    """A text without turns, or a prompt and its completion, which no chat template changes.

    Args:
        prompt: "" where the whole text is learned.
    """

    prompt: str
    completion: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, of which the first is better.

    Args:
        chosen, rejected: what follows the prompt; ends with an answer.
        margin: by how much the first is better; None where the record does not say.
    """

    prompt: Turns
    chosen: Turns
    rejected: Turns
    margin: float | None
    origin: Origin


@dataclass(frozen=True, slots=True)
class Rated:
    """An answer to a prompt, and whether it is good."""

    prompt: Turns
    answer: Turns
    good: bool
    origin: Origin


@dataclass(frozen=True, slots=True)
class Prompt:
    """Turns to be answered by the model.

    Args:
        fields: the other fields of the record, which rewards read, such as `answer`.
    """

    turns: Turns
    origin: Origin
    fields: Mapping[str, Any] = field(default_factory=dict)


Record = Conversation | Plain | Pair | Rated | Prompt
