"""Actions of a pipeline schedule: the table of their kinds, one of a stage and a microbatch, and two that overlap."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias


class ActionKind(Enum):
    """What an action does; the value is the text between stage and microbatch in `str(action)`."""

    F = "F"  # forward of one microbatch through one stage
    B = "B"  # full backward: gradients of the stage's input and of its weights
    I = "I"
    W = "W"  # the rest of that backward: gradients of the weights
    SEND_F = "SEND_F"  # start sending the stage's output to the next stage
    RECV_F = "RECV_F"  # post the receive of the stage's input
    SEND_B = "SEND_B"  # start sending the gradient of the stage's input to the previous stage
    RECV_B = "RECV_B"  # post the receive of the gradient of the stage's output

    # Members are singletons, so identity is a valid hash. Enum's own hash hashes the name in Python, which is most of
    # the cost of looking up an Action in a set.
    __hash__ = object.__hash__

    def __init__(self, text: str) -> None:
        # Whether the action occupies the rank's compute; sends and receives only start a transfer.
        self.is_compute = text in ("F", "B", "I", "W")
        self.is_send = text.startswith("SEND")
        self.is_receive = text.startswith("RECV")
        # Whether it computes the gradient of the stage's input.
        self.gives_input_gradient = text in ("B", "I")
        self.gives_weight_gradients = text in ("B", "W")


@dataclass(frozen=True, slots=True)
class KindRow:
    """What a kind of action means, for everything that reads schedules.

    Attributes:
        words: for a reader.
        shades: fill colours of a rank's chunks (its stages), from the first on.
        after: kinds of which the same stage and microbatch has one; that one runs before.
        step: stages from the action's to the one whose result it takes, or, of a transfer, to its other end. None where
            no other stage matters.
        receive: the transfer that brings the input of a compute action.
        send: the transfer that takes its result to the stage at -step.
        partner: the kind at the other end of a transfer.
    """

    words: str
    shades: tuple[str, ...]
    after: tuple[ActionKind, ...] = ()
    step: int | None = None
    receive: ActionKind | None = None
    send: ActionKind | None = None
    partner: ActionKind | None = None


_K = ActionKind
_BLUE = ("#2563eb", "#60a5fa", "#93c5fd", "#bfdbfe")
_GREEN = ("#15803d", "#4ade80", "#86efac", "#bbf7d0")
_TEAL = ("#0f766e", "#2dd4bf", "#5eead4", "#99f6e4")
_VIOLET = ("#7e22ce", "#c084fc", "#d8b4fe", "#e9d5ff")
_WIRE = ("#f59e0b",)
KINDS: Final[dict[ActionKind, KindRow]] = {
    _K.F: KindRow("forward", _BLUE, step=-1, receive=_K.RECV_F, send=_K.SEND_F),
    _K.B: KindRow("backward", _GREEN, (_K.F,), step=1, receive=_K.RECV_B, send=_K.SEND_B),
    _K.I: KindRow("input gradient", _TEAL, (_K.F,), step=1, receive=_K.RECV_B, send=_K.SEND_B),
    _K.W: KindRow("weight gradients", _VIOLET, (_K.I,)),
    _K.SEND_F: KindRow("send of the output", _WIRE, (_K.F,), step=1, partner=_K.RECV_F),
    _K.RECV_F: KindRow("receive of the input", _WIRE, step=-1, partner=_K.SEND_F),
    _K.SEND_B: KindRow("send of the input gradient", _WIRE, (_K.B, _K.I), step=-1, partner=_K.RECV_B),
    _K.RECV_B: KindRow("receive of the output gradient", _WIRE, step=1, partner=_K.SEND_B),
}
"""The table of kinds. Forwards go up the stages, backwards down."""

_KIND_NAMES = "|".join(sorted((kind.value for kind in ActionKind), key=len, reverse=True))
_ACTION_PATTERN = re.compile(rf"([0-9]{{1,9}})({_KIND_NAMES})([0-9]{{1,9}})")
_MOST_SHOWN = 60
_OVERLAP_PATTERN = re.compile(r"\((.*);(.*)\)OVERLAP_F_B")


@dataclass(frozen=True, slots=True)
class Action:
    """One action of one rank: `kind` on pipeline stage `stage` (global index) for microbatch `microbatch`.

    `str` gives `2F0` (stage 2, forward, microbatch 0) or `2SEND_F0`; `Action.parse` is its inverse.
    """

    kind: ActionKind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @property
    def parts(self) -> "tuple[Action, ...]":
        """The actions of this entry of a list: itself. See `Overlap`."""
        return (self,)

    @property
    def is_compute(self) -> bool:
        """Whether the entry occupies the rank's compute."""
        return self.kind.is_compute

    @staticmethod
    def parse(text: str) -> "Action":
        """Return the action of the text that `str` wrote.

        Raises:
            ValueError: `text` is not `<stage><kind><microbatch>`.
        """
        match = _ACTION_PATTERN.fullmatch(text.strip())
        if match is None:
            kinds = ", ".join(kind.value for kind in ActionKind)
            raise ValueError(
                f"an action is <stage><kind><microbatch>, such as 2F0 or 2SEND_F0, with a kind of {kinds}; "
                f"got {text[:_MOST_SHOWN]!r}"
            )
        stage, kind, microbatch = match.groups()
        return Action(ActionKind(kind), int(stage), int(microbatch))


@dataclass(frozen=True, slots=True)
class Overlap:
    """A forward and a backward of different microbatches that run at the same time (DeepSeek-AI 2024, section 3.2.1).

    `str` gives `(0F3;3B1)OVERLAP_F_B`, as torch.distributed.pipelining writes it; `parse_entry` is its inverse.

    Raises:
        ValueError: `forward` is not a forward, or `backward` computes no input gradient.
    """

    forward: Action
    backward: Action

    def __post_init__(self) -> None:
        if self.forward.kind is not ActionKind.F or not self.backward.kind.gives_input_gradient:
            raise ValueError(f"an overlap is of a forward (F) and a backward (B or I), in this order; got {self}")

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"

    @property
    def parts(self) -> tuple[Action, ...]:
        """The two actions."""
        return (self.forward, self.backward)

    @property
    def is_compute(self) -> bool:
        """Whether the entry occupies the rank's compute, which it does."""
        return True


Entry: TypeAlias = Action | Overlap
"""One entry of a rank's list."""


def parse_entry(text: str) -> Entry:
    """Return the action or overlap of the text that `str` wrote.

    Raises:
        ValueError: `text` is neither.
    """
    match = _OVERLAP_PATTERN.fullmatch(text.strip())
    if match is None:
        return Action.parse(text)
    return Overlap(Action.parse(match[1]), Action.parse(match[2]))


def actions_of(entries: Sequence[Entry]) -> list[Action]:
    """Return the actions of a list, those of overlaps one after the other."""
    return [action for entry in entries for action in entry.parts]
