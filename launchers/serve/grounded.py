"""Chats with a twin: a question is put with passages of its library, and the answer is held to them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trimaran.runtime.infer.chat import Message
from trimaran.runtime.twin.asking import Twin
from trimaran.runtime.twin.passages import Passage

_USUAL_ANSWER: Final = 512  # tokens that are kept free for an answer whose length the request does not say
_SHARE: Final = 4  # of the room, no more than the fourth part
_MARKUP: Final = 32  # tokens that a template may write around one turn more


@dataclass(frozen=True)
class Ground:
    """What the answer to a question rests on."""

    question: str
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class Put:
    """A conversation as the model gets it.

    Args:
        messages: with the passages; () where the texts are silent.
        silence: the whole answer in that case, else "".
    """

    messages: tuple[Message, ...]
    ground: Ground
    silence: str = ""


def put(
    twin: Twin, messages: Sequence[Message], count_tokens: Callable[[str], int], room: int, answer: int | None
) -> Put:
    """Return a conversation whose last question comes with passages, in as many tokens as there is room.

    Args:
        room: tokens of the context beside the conversation as it is.
        answer: tokens that are asked for.

    Raises:
        ValueError: the last message is no user's, or there is no room for a passage.
    """
    if messages[-1]["role"] != "user":
        raise ValueError("the last message must be the user's: it is what the texts are asked")
    question = str(messages[-1]["content"])
    told = [str(each["content"]) for each in messages if each["role"] == "system"]
    turns = [each for each in messages if each["role"] != "system"]
    kept = min(_USUAL_ANSWER, room // _SHARE) if answer is None else answer
    places = [place for place, each in enumerate(turns) if each["role"] == "user"]
    before = [str(turns[place]["content"]) for place in places[:-1]]
    found = twin.ground(question, told, count_tokens, room - kept - _MARKUP, before)
    if isinstance(found, str):
        return Put((), Ground(question, ()), found)
    system, asked = found.messages
    turns[places[-1 - found.back]] = asked
    return Put((system, *turns), Ground(question, found.passages))


def checked(twin: Twin, answer: str, ground: Ground) -> dict[str, Any]:
    """Return an answer as it is held to its passages, with those that it cites, as the API tells them."""
    found = twin.library.check(answer, ground.passages)
    cited = {each.number: each for each in reversed(found.citations)}
    return {
        "text": twin.library.mark(found, ground.question),
        "citations": [
            {
                "n": number,
                "title": ", ".join(part for part in (each.title, each.chapter) if part),
                "file": each.file,
                "lines": [each.first_line, each.last_line],
                "text": ground.passages[number - 1].text,
                "is_attached": each.is_attached,
                "is_supported": each.is_supported,
            }
            for number, each in sorted(cited.items())
        ],
        "quotes": [{"text": each.text, "is_verbatim": each.is_verbatim} for each in found.quotes],
        "invalid": list(found.invalid),
    }
