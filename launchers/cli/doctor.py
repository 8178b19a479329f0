"""`trimaran doctor`: what this machine has, and what that changes for a run. Imports no torch."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimaran.launchers.cli.common.console import errors_as_sentences, path
from trimaran.launchers.terminal import print_table, say, writing_output
from trimaran.models.fields import counted, printable

if TYPE_CHECKING:
    from rich.table import Table

    from trimaran.launchers.doctor.ask import Finding

_STYLES = {"ok": "green", "missing": "yellow", "trouble": "bold yellow", "broken": "bold red"}


def doctor(
    output: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="DIR", help="Folder of the runs, whose disk is looked at; runs by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Tell what this machine has (torch, GPUs, launchers, limits, disk, packages) and what that changes for a run. Ends
    with code 1 where something that every run needs is broken."""
    with errors_as_sentences():
        from trimaran.launchers.doctor.machine import looks_at_machine
        from trimaran.launchers.doctor.software import looks_at_software

        found = [*looks_at_software(), *looks_at_machine(output or Path("runs"))]
        broken = [each for each in found if each.status == "broken"]
        if as_json:
            with writing_output():
                print(json.dumps({"version": 1, "findings": [asdict(each) for each in found]}, indent=1))
        else:
            print_table(_table(found))
            say(f"{counted(len(broken), 'thing')} that every run needs: broken" if broken else "runs can start here")
        if broken:
            raise typer.Exit(1)


def _table(found: "list[Finding]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    before = ""
    for each in found:
        words = f"{each.found}: {each.effect}" if each.effect else each.found
        status = Text(each.status, style=_STYLES[each.status])
        table.add_row(each.group if each.group != before else "", each.name, status, printable(words))
        before = each.group
    return table
