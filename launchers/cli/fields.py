"""`trimaran fields`: every field of a spec, out of the spec itself. No torch."""

from typing import TYPE_CHECKING, Annotated

import typer

from trimaran.launchers.cli.common.console import errors_as_sentences
from trimaran.launchers.terminal import print_table, writing_output

if TYPE_CHECKING:
    from rich.table import Table

    from trimaran.runtime.spec.reference import Described


def fields(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[SECTION|FIELD]", help="A section, or a field such as parallel.tp; none: all sections."
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of all fields, docs/spec.md.")] = False,
) -> None:
    """Show what a spec can say: every field of a section with type, default, rule and description."""
    with errors_as_sentences():
        from trimaran.runtime.spec.reference import as_markdown, fields_in

        if markdown:
            if name is not None:
                raise ValueError(f"--markdown prints the page of all fields; leave {name} out, or --markdown")
            with writing_output():
                print(as_markdown(), end="")
        elif name is None:
            print_table(_sections())
        else:
            found = fields_in(name.strip())
            print_table(_one(found[0]) if len(found) == 1 and found[0].path == name else _all(found))


def _sections() -> "Table":
    from rich.table import Table

    from trimaran.runtime.spec.reference import sections

    table = Table("section", "fields", "", box=None, pad_edge=False)
    table.columns[0].style = "bold cyan"
    for name, description, count in sections():
        table.add_row(name, str(count), description)
    return table


def _all(found: "list[Described]") -> "Table":
    """Return fields as rows; the rule stands below the description."""
    from rich.table import Table

    table = Table("field", "type", "default", "", box=None, pad_edge=False)
    for column, style in zip(table.columns, ("bold cyan", "green", "yellow", ""), strict=True):
        column.style, column.overflow = style, "fold"
    for each in found:
        rule = f" Rule: {each.rule}." if each.rule else ""
        table.add_row(each.path, each.kind, each.default, f"{each.description}{rule}")
    return table


def _one(field: "Described") -> "Table":
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rule = field.rule or "none beside its type"
    for name, words in (("field", field.path), ("type", field.kind), ("default", field.default), ("rule", rule)):
        table.add_row(name, words)
    table.add_row("", field.description)
    return table
