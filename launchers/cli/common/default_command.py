"""Groups of commands that take an argument of no command's name for one of their command `run`. Imports no torch."""

import difflib
from pathlib import Path
from typing import Any, ClassVar

from typer.core import TyperGroup


class RunByDefault(TyperGroup):
    """`trimaran GROUP ARGUMENT` is `trimaran GROUP run ARGUMENT`; a mistyped name of a command is told."""

    takes: ClassVar = "command or file"
    """What the first word may be, for the message."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the command before its argument; typer calls this."""
        if args and args[0] not in self.commands and args[0] != "--help":
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            if near and not Path(args[0]).exists():
                ctx.fail(f"No such {self.takes} {args[0]!r}; did you mean {near[0]}?")
            args = ["run", *args]
        return super().parse_args(ctx, args)
