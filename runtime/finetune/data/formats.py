"""Example files and the formats of their records. No torch.

A record is used, counted with its reason, or an error that names file, line and rule: a role that is not known or two
questions in a row are never passed over.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from trimaran.runtime.data.account import Account
from trimaran.runtime.data.corpus import repair_texts
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.records import kind_of, read_records
from trimaran.runtime.data.sources import usable_files
from trimaran.runtime.finetune.data.account import ExampleAccount
from trimaran.runtime.finetune.data.records import (
    FORMATS_OF,
    ROLES,
    Conversation,
    Origin,
    Pair,
    Plain,
    Prompt,
    Rated,
    Record,
    Turn,
    Turns,
)

_SHAREGPT_ROLES: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_READABLE: Final = ".json, .jsonl or .parquet file (or .gz of one)"
Fields = Mapping[str, Any]


class _Unusable(Exception):
    """A record that is counted; its argument is the key of the reason."""


class _Wrong(ValueError):
    """A record that breaks a rule; the message is what is wrong and what would do."""


def find_example_files(sources: Sequence[str], cache_dir: Path | None = None) -> list[Path]:
    """Return the files of the sources, each once, in their order, and in a folder sorted.

    Raises:
        DataError: a source is missing, is a file of another kind, or has no such file.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_file() and not _kind(path):
            raise DataError(f"data.source {source!r} is not a {_READABLE}, which examples are read from; convert it")
        files = [file for file, _ in usable_files(source, Account(), _kind, cache_dir)]
        if not files:
            raise DataError(f"data.source {source!r} holds no {_READABLE} with examples; name such files or a folder")
        found |= dict.fromkeys(files)
    return list(found)


def _kind(path: Path) -> str:
    kind = kind_of(path)
    return kind if kind is not None and kind != ".csv" else ""


def read_examples(
    files: Sequence[Path], format: str, method: str, account: ExampleAccount, text_field: str = "text"
) -> Iterator[Record]:
    """Yield the records of example files, and count in `account` those that can't be used.

    Args:
        format: data.format; auto finds it for each file by the fields of its first record.
        text_field: the field of format text.

    Raises:
        DataError: a file can't be read, or a record breaks the rules of its format.
    """
    for path in files:
        kind = format
        for place, value in read_records(path):
            origin = Origin(str(path), int(place.rpartition(" ")[2]))
            if not isinstance(value, Mapping):
                raise DataError(f"{origin}: a record must be an object with fields, got {_shown(value)}")
            if kind == "auto":
                kind = _format_of(value, method, text_field, origin)
            account.records += 1
            repaired, count = repair_texts(value)
            if count:
                account.note("surrogate", origin)
            try:
                yield from _READERS[kind](repaired, origin, text_field)
            except _Unusable as reason:
                account.note(str(reason), origin)
            except _Wrong as error:
                raise DataError(f"{origin}: {error}") from error


def _format_of(fields: Fields, method: str, text_field: str, origin: Origin) -> str:
    """Return the format whose fields a record has, among those that the method learns from."""
    has = {name for name, value in fields.items() if value is not None}
    pair = has & {"chosen", "rejected"}
    signs: Mapping[str, bool] = {
        "preference": bool(pair) or (method == "reward" and "margin" in has),
        "unpaired": "label" in has and "completion" in has,
        "messages": "messages" in has,
        "sharegpt": "conversations" in has,
        "alpaca": {"instruction", "output"} <= has or {"question", "answer"} <= has,
        "prompt_completion": {"prompt", "completion"} <= has,
        "text": text_field in has,
        "prompts": bool(has & {"prompt", "messages", "question", "instruction"}),
    }
    for format in FORMATS_OF[method]:
        if signs[format]:
            return format
    names = ", ".join(sorted(fields)) or "none"
    raise DataError(
        f"{origin}: a record with the fields {names} is in none of the formats that method {method} learns from "
        f"({', '.join(FORMATS_OF[method])}); rename its fields, or name its format in data.format"
    )


def _messages(fields: Fields, origin: Origin, text_field: str) -> Iterator[Record]:
    yield Conversation(_answered(_turns(_needed(fields, "messages"), "messages")), origin)


def _sharegpt(fields: Fields, origin: Origin, text_field: str) -> Iterator[Record]:
    turns = _needed(fields, "conversations")
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise _Wrong(f"conversations must be a list of records with from and value, got {_shown(turns)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise _Wrong(f"turn {number} of conversations must be a record with from and value, got {_shown(turn)}")
        if not isinstance(turn["from"], str) or turn["from"] not in _SHAREGPT_ROLES:
            raise _Wrong(_unknown_role(number, turn["from"], list(_SHAREGPT_ROLES)))
        messages.append({"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    if isinstance(fields.get("system"), str) and fields["system"].strip():
        messages.insert(0, {"role": "system", "content": fields["system"]})
    yield Conversation(_answered(_turns(messages, "conversations")), origin)


def _alpaca(fields: Fields, origin: Origin, text_field: str) -> Iterator[Record]:
    answer = _text(fields, "output" if "output" in fields or "answer" not in fields else "answer")
    turns = (*_question(fields), Turn("assistant", answer))
    yield Conversation(_answered(turns), origin)


def _question(fields: Fields) -> Turns:
    """Return the turns of a question, which has the field instruction (and perhaps input and system) or question."""
    name = "question" if "question" in fields and "instruction" not in fields else "instruction"
    text, more = _text(fields, name), fields.get("input")
    if more is not None and not isinstance(more, str):
        raise _Wrong(f"input must be a text, got {_shown(more)}")
    if not text.strip():
        raise _Wrong(f"{name} is empty; write the question")
    system = fields.get("system")
    first = (Turn("system", system),) if isinstance(system, str) and system.strip() else ()
    return (*first, Turn("user", f"{text}\n\n{more}" if more else text))


def _prompt_completion(fields: Fields, origin: Origin, text_field: str) -> Iterator[Record]:
    prompt, completion = _needed(fields, "prompt"), _needed(fields, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise _Unusable("empty_answer")
        yield Plain(prompt, completion, origin)
        return
    turns = (*_conversation(prompt, "prompt", "user"), *_conversation(completion, "completion", "assistant"))
    yield Conversation(_answered(_ordered(turns)), origin)


def _plain_text(fields: Fields, origin: Origin, text_field: str) -> Iterator[Record]:
    text = _text(fields, text_field)
    if not text.strip():
        raise _Unusable("empty_text")
    yield Plain("", text, origin)


def _preference(fields: Fields, origin: Origin, text_field: str) -> Iterator[Record]:
    chosen = _conversation(_needed(fields, "chosen"), "chosen", "assistant")
    rejected = _conversation(_needed(fields, "rejected"), "rejected", "assistant")
    prompt, chosen, rejected = _split_prompt(fields, chosen, rejected)
    for answer in (chosen, rejected):
        _answered(_ordered((*prompt, *answer)))
    if chosen == rejected:
        raise _Unusable("equal_pair")
    yield Pair(prompt, chosen, rejected, _margin(fields), origin)


def _split_prompt(fields: Fields, chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Return the prompt and what follows it in both: the prompt has a field, or both conversations begin with it."""
    if chosen[0].role == "assistant" and rejected[0].role == "assistant":
        return _prompt_of(fields), chosen, rejected
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and (shared >= min(len(chosen), len(rejected)) or chosen[shared - 1].role == "assistant"):
        shared -= 1
    if not shared:
        raise _Wrong("chosen and rejected must answer the same prompt; write it in prompt, or begin both with it")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _prompt_of(fields: Fields) -> Turns:
    if fields.get("prompt") is not None:
        return _conversation(fields["prompt"], "prompt", "user")
    if fields.get("instruction") is None and fields.get("question") is None:
        raise _Wrong("prompt is missing; write the question that both answer")
    return _question(fields)


def _margin(fields: Fields) -> float | None:
    value = fields.get("margin")
    if value is None and fields.get("score_chosen") is not None and fields.get("score_rejected") is not None:
        scores = (_finite(fields["score_chosen"]), _finite(fields["score_rejected"]))
        value = None if scores[0] is None or scores[1] is None else scores[0] - scores[1]
        if value is None or not math.isfinite(value):
            told = [_shown(fields["score_chosen"]), _shown(fields["score_rejected"])]
            raise _Wrong(f"score_chosen and score_rejected must be finite numbers, got {told[0]} and {told[1]}")
    if value is None:
        return None
    margin = _finite(value)
    if margin is None:
        raise _Wrong(f"margin must be a finite number, got {_shown(value)}")
    return margin


def _unpaired(fields: Fields, origin: Origin, text_field: str) -> Iterator[Record]:
    label = _needed(fields, "label")
    if not isinstance(label, bool) and label not in (0, 1):
        raise _Wrong(f"label must be true (a good answer) or false, got {_shown(label)}")
    prompt, answer = _prompt_of(fields), _conversation(_needed(fields, "completion"), "completion", "assistant")
    _answered(_ordered((*prompt, *answer)))
    yield Rated(prompt, answer, bool(label), origin)


def _prompts(fields: Fields, origin: Origin, text_field: str) -> Iterator[Record]:
    if fields.get("messages") is not None:
        turns = _turns(fields["messages"], "messages")
        turns = turns[:-1] if turns[-1].role == "assistant" else turns
    else:
        turns = _ordered(_prompt_of(fields))
    if not turns or turns[-1].role not in ("user", "tool"):
        raise _Wrong("a prompt must end with a question, which the model answers")
    yield Prompt(turns, origin, dict(fields))


_READERS: Final[Mapping[str, Callable[[Fields, Origin, str], Iterator[Record]]]] = {
    "text": _plain_text,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "unpaired": _unpaired,
    "prompts": _prompts,
}


def _needed(fields: Fields, name: str) -> Any:
    if fields.get(name) is None:
        raise _Wrong(f"{name} is missing; write it, or name another format in data.format")
    return fields[name]


def _text(fields: Fields, name: str) -> str:
    value = _needed(fields, name)
    if not isinstance(value, str):
        raise _Wrong(f"{name} must be a text, got {_shown(value)}")
    return value


def _conversation(value: Any, name: str, role: str) -> Turns:
    """Return turns that are written out, or one turn of `role` where the value is its text."""
    return (Turn(role, value),) if isinstance(value, str) else _turns_of(value, name)


def _turns(value: Any, name: str) -> Turns:
    return _ordered(_turns_of(value, name))


def _turns_of(value: Any, name: str) -> Turns:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _Wrong(f"{name} must be a list of records with role and content, got {_shown(value)}")
    turns = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or "role" not in message:
            raise _Wrong(f"turn {number} of {name} must be a record with role and content, got {_shown(message)}")
        if message["role"] not in ROLES:
            raise _Wrong(_unknown_role(number, message["role"], ROLES))
        turns.append(Turn(message["role"], _content(message.get("content"), number, name)))
    return tuple(turns)


def _content(value: Any, number: int, name: str) -> str:
    """Return the text of a turn, which may come as a list of parts of type text."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if texts and len(texts) == len(parts):
            return "".join(texts)
    if not isinstance(value, str):
        raise _Wrong(f"turn {number} of {name} must have a text as its content, got {_shown(value)}")
    return value


def _ordered(turns: Turns) -> Turns:
    """Return the turns where questions and answers take turns after at most one system message."""
    for number, turn in enumerate(turns, start=1):
        before = turns[number - 2].role if number > 1 else None
        if turn.role == "system" and number > 1:
            raise _Wrong(f"turn {number} is of the system, which may only speak first; take it out")
        if turn.role == before and turn.role != "tool":
            raise _Wrong(
                f"turns {number - 1} and {number} are both of the {turn.role}; join them, or add what is between"
            )
        if turn.role == "assistant" and before in (None, "system"):
            raise _Wrong(f"turn {number} is an answer without a question before it; add the question, or take it out")
        if turn.role == "tool" and before not in ("assistant", "tool"):
            raise _Wrong(f"turn {number} is of a tool, which no turn of the assistant before it has called")
    return turns


def _answered(turns: Turns) -> Turns:
    """Return the turns where they end with an answer and no answer is empty."""
    if turns[-1].role != "assistant":
        raise _Unusable("no_answer")
    if any(turn.role == "assistant" and not turn.content.strip() for turn in turns):
        raise _Unusable("empty_answer")
    return turns


def _unknown_role(number: int, role: Any, known: Sequence[str]) -> str:
    return f"turn {number} has the role {_shown(role)}, which is not known; write one of {', '.join(known)}"


def _finite(value: Any) -> float | None:
    """Return a number as a float, None where it is no number, or one that no float holds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of more than 308 digits
        return None


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}..."
