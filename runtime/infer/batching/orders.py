"""What is asked of the leader of a replica, and what it asks of its other ranks: records and lines. No torch."""

import json
from dataclasses import dataclass
from typing import Protocol

from trimaran.runtime.infer.batching.messages import Event, Request, decode_request, encode_request


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants the text of this request any more. One that has ended already is passed over."""

    request: int


@dataclass(frozen=True, slots=True)
class End:
    """Cancel what runs, and leave."""


Order = Request | Cancel | End


@dataclass(frozen=True, slots=True)
class Ready:
    """A replica has its weights, and has computed once.

    Args:
        slots, context: see messages.Backend.
    """

    slots: int
    context: int


class Desk(Protocol):
    """Where the leader of a replica gets its orders, and tells what comes of them."""

    def poll(self, timeout_s: float) -> list[Order]:
        """Return the orders that have come; waits for the first of them, if there is none, up to that time."""
        ...

    def ready(self, ready: Ready) -> None:
        """Take the leader's word that requests are welcome."""
        ...

    def tell(self, events: list[Event]) -> None:
        """Take events, in their order."""
        ...


def encode_order(order: Order) -> bytes:
    """Return an order as one line of JSON."""
    if isinstance(order, Request):
        return encode_request(order)
    return json.dumps({"cancel": order.request} if isinstance(order, Cancel) else {"end": True}).encode() + b"\n"


def decode_order(line: bytes) -> Order:
    """Return the order of a line of `encode_order`."""
    fields = json.loads(line)
    if "prompt" in fields:
        return decode_request(fields)
    return Cancel(fields["cancel"]) if "cancel" in fields else End()


def encode_ready(ready: Ready) -> bytes:
    """Return the leader's first line."""
    return json.dumps({"slots": ready.slots, "context": ready.context}).encode() + b"\n"


def decode_ready(line: bytes) -> Ready:
    """Return the record of a leader's first line."""
    return Ready(**json.loads(line))
