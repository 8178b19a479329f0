"""What gives an answer its reward: the items of finetune.rl.rewards, read and computed. No torch."""

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Literal, Self

from trimaran.runtime.files import read_bytes
from trimaran.runtime.finetune.data.records import Prompt
from trimaran.runtime.finetune.rl.reward.math_answer import is_right
from trimaran.runtime.finetune.rl.reward.reward_process import RewardProcess

Kind = Literal["exact_match", "math_answer", "regex", "length", "code", "run"]
_WEIGHT: Final = re.compile(r"(?s)(.+)\*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")
_CODE: Final = re.compile(r"(.+\.py):([A-Za-z_][A-Za-z0-9_]*)")
_READS_ANSWER: Final = ("exact_match", "math_answer")
_PATTERNS: Final = Path(__file__).with_name("patterns.py")
_MOST_CODE_BYTES: Final = 1 << 20
_LARGEST: Final = 1e9  # of a reward and of a weight: far from where sums and squares of float32 overflow
_SHOWN = 80  # characters of an answer in an error


class RewardError(ValueError):
    """A reward that can't be computed; the message is a sentence."""


@dataclass(frozen=True)
class RewardItem:
    """One item of finetune.rl.rewards.

    Args:
        text: as written, without the weight: its name in rollouts.jsonl.
        argument: the pattern, the number of tokens, the file of the code, or the folder of the run.
        function: of the code, "" otherwise.
    """

    kind: Kind
    text: str
    argument: str = ""
    function: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Answer:
    """What a reward reads.

    Args:
        text: without special tokens at its end.
        num_tokens: of the answer, its stop token included.
    """

    prompt: Prompt
    text: str
    num_tokens: int


def parse_reward(text: str) -> RewardItem:
    """Return an item of finetune.rl.rewards.

    Raises:
        RewardError: it is none.
    """
    found = _WEIGHT.fullmatch(text)
    name, weight = (found[1], float(found[2])) if found else (text, 1.0)
    if not abs(weight) <= _LARGEST:
        raise RewardError(f"the weight of {text} is not finite, or over {_LARGEST:g}; write a number such as *0.5")
    kind, colon, argument = name.partition(":")
    if name in _READS_ANSWER:
        return RewardItem("exact_match" if name == "exact_match" else "math_answer", name, weight=weight)
    if kind == "regex" and colon:
        try:
            re.compile(argument)
        except (re.error, OverflowError, RecursionError) as error:  # the last two: huge repeats, deep groups
            raise RewardError(f"{argument!r} is no regular expression ({error}); mend the pattern of {text}") from error
        return RewardItem("regex", name, argument, weight=weight)
    if kind == "length" and colon:
        if not re.fullmatch(r"[1-9]\d{0,8}", argument):
            raise RewardError(f"{argument!r} is no number of tokens from 1; write length:TOKENS, such as length:50")
        return RewardItem("length", name, argument, weight=weight)
    code = _CODE.fullmatch(name)
    if code:
        return RewardItem("code", name, code[1], code[2], weight)
    if name in ("regex", "length"):
        raise RewardError(f"{name} lacks what follows the colon; write regex:PATTERN or length:TOKENS")
    return RewardItem("run", name, name, weight=weight)


def parse_rewards(texts: Sequence[str]) -> list[RewardItem]:
    """Return all items; RewardError where one is wrong, or two have one name."""
    items = [parse_reward(text) for text in texts]
    names = [item.text for item in items]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RewardError(f"{twice} is there twice; write it once, with the sum of the weights")
    return items


def check_files(items: Sequence[RewardItem]) -> None:
    """Raise RewardError where the file of an item's code lacks its function, or the folder of its run is not there."""
    for item in items:
        if item.kind == "code" and not Path(item.argument).is_file():
            raise RewardError(f"{item.argument} of the reward {item.text} is no file; write FILE.py:name")
        if item.kind == "code" and not _binds(Path(item.argument), item.function):
            raise RewardError(
                f"{item.argument} has no function {item.function}, which the reward {item.text} names; write it there"
            )
        if item.kind == "run" and not Path(item.argument).is_dir():
            raise RewardError(
                f"{item.text} is no reward: it is neither exact_match, math_answer, regex:PATTERN, length:TOKENS, "
                "FILE.py:name, nor the folder of a reward run"
            )


def _binds(file: Path, name: str) -> bool:
    """Return whether the source of a Python file gives `name` a value, as far as can be told without running it.

    Raises:
        RewardError: it is no Python.
    """
    try:
        nodes = list(ast.walk(ast.parse(read_bytes(file, _MOST_CODE_BYTES), str(file))))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise RewardError(f"{file}{line} of finetune.rl.rewards can't be read as Python: {reason}; mend it") from error
    names: set[str] = set()
    for node in nodes:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.alias():
                names.add((node.asname or node.name).partition(".")[0])
            case ast.Name():
                names.add(node.id)
    return name in names or "*" in names


def check_fields(items: Sequence[RewardItem], prompts: Sequence[Prompt]) -> None:
    """Raise RewardError where a record lacks the field that a reward compares answers with."""
    reader = next((item.kind for item in items if item.kind in _READS_ANSWER), None)
    if reader is None:
        return
    for prompt in prompts:
        value = prompt.fields.get("answer")
        if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
            has = ", ".join(sorted(prompt.fields)) or "none"
            raise RewardError(
                f"{prompt.origin} has no text or number in its field answer, which the reward {reader} compares "
                f"answers with (its fields beside the prompt: {has}); add it, or choose another reward"
            )


def _exact_match(item: RewardItem, answer: Answer) -> float:
    return float(answer.text.strip() == str(answer.prompt.fields["answer"]).strip())


def _math_answer(item: RewardItem, answer: Answer) -> float:
    return float(is_right(answer.text, str(answer.prompt.fields["answer"])))


def _length(item: RewardItem, answer: Answer) -> float:
    return max(0.0, 1.0 - abs(answer.num_tokens - int(item.argument)) / int(item.argument))


_FUNCTIONS: Final[Mapping[str, Callable[[RewardItem, Answer], float]]] = MappingProxyType(
    {"exact_match": _exact_match, "math_answer": _math_answer, "length": _length}
)


class Scoring:
    """Computes the rewards that need no model; a context manager that ends the processes of code and patterns.

    Args:
        items: those of kind run are left out.
        timeout_s: longest that users' code, or the search of a pattern, may take for one answer.
    """

    def __init__(self, items: Sequence[RewardItem], timeout_s: float) -> None:
        self._items = [item for item in items if item.kind != "run"]
        self._processes = {
            item.text: RewardProcess(Path(item.argument), item.function, timeout_s)
            for item in self._items
            if item.kind == "code"
        }
        self._patterns = RewardProcess(
            _PATTERNS,
            "is_found",
            timeout_s,
            name="the search for the pattern",
            mend="simplify the pattern, for a repeat within a repeat can take years",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (self._patterns, *self._processes.values()):
            process.close()

    def rewards(self, answers: Sequence[Answer]) -> dict[str, list[float]]:
        """Return the rewards of the answers by the name of each item, without its weight.

        Raises:
            RewardError: a reward is not finite, or code or a search fails, ends or takes too long; names the record.
        """
        return {item.text: [self._reward(item, answer) for answer in answers] for item in self._items}

    def _reward(self, item: RewardItem, answer: Answer) -> float:
        where = f"the reward {item.text} of an answer to {answer.prompt.origin} ({_shown(answer.text)})"
        if item.kind in _FUNCTIONS:
            return _FUNCTIONS[item.kind](item, answer)
        try:
            if item.kind == "regex":
                value = self._patterns.call([item.argument, answer.text])
            else:
                value = self._processes[item.text].call([answer.text, dict(answer.prompt.fields)])
        except ValueError as error:
            raise RewardError(f"{where} can't be computed: {error}") from error
        return checked(value, where)


def checked(value: Any, where: str) -> float:
    """Return a reward as a number; RewardError where it is none, or not finite.

    Args:
        where: of what it is the reward.
    """
    if not isinstance(value, int | float):
        raise RewardError(f"{where} is {str(value)[:_SHOWN]!r}; it must be a number")
    if not abs(value) <= _LARGEST:
        raise RewardError(
            f"{where} is {value}; it must be finite, and at most {_LARGEST:g}, so that advantages can be computed "
            "from it"
        )
    return float(value)


def total_rewards(items: Sequence[RewardItem], parts: Mapping[str, Sequence[float]]) -> list[float]:
    """Return the weighted sum of the rewards of each answer, in the order of the items."""
    columns = [(item.weight, parts[item.text]) for item in items]
    return [math.fsum(weight * column[row] for weight, column in columns) for row in range(len(columns[0][1]))]


def _shown(text: str) -> str:
    short = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return repr(short)
