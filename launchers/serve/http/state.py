"""Where a server is in its life, which its requests and its end both look at."""

import asyncio
from dataclasses import dataclass, field

from trimaran.launchers.serve.errors import ApiError


@dataclass
class State:
    """The state of a server. For one event loop.

    Args:
        is_draining: whether only what runs goes on.
        gone: set once there are no ranks any more.
        gone_because: why.
        running: requests that are being answered.
        over: set once what runs may go on no longer.
    """

    is_draining: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    gone_because: str = ""
    running: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def status(self) -> str:
        """In one word."""
        return "gone" if self.gone.is_set() else "draining" if self.is_draining else "ok"

    def has_gone(self, why: str) -> None:
        """Take no request any more, as there are no ranks."""
        self.gone_because = self.gone_because or why
        self.gone.set()

    def check_open(self) -> None:
        """Raise ApiError where no request is taken any more."""
        if self.gone.is_set():
            raise ApiError(503, f"the model's ranks have ended: {self.gone_because}", code="backend_gone")
        if self.is_draining:
            headers = {"retry-after": "10", "connection": "close"}
            raise ApiError(503, "this server is about to stop", code="draining", headers=headers)
