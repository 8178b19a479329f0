"""`trimaran models`: the table of published shapes; one of them as the model section of a spec. No torch."""

from typing import TYPE_CHECKING, Annotated

import typer

from trimaran.launchers.cli.common.console import errors_as_sentences
from trimaran.launchers.terminal import print_table, writing_output
from trimaran.models.config import TransformerConfig
from trimaran.models.presets import CATALOG, PRESETS, check_preset_name, preset
from trimaran.runtime.spec.yaml_text import write_yaml

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("parameters", "layers", "hidden", "heads/kv", "ffn", "vocab", "context", "positions")


def models(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A preset to show whole, or the beginning of some names.")
    ] = None,
) -> None:
    """List the published shapes that model.preset can name; with NAME, print one whole, as it can stand in a spec."""
    with errors_as_sentences():
        if name is not None and name in PRESETS:
            with writing_output():
                print(section_of_preset(name), end="")
            return
        names = [known for known in PRESETS if name is None or known.startswith(name)]
        if not names:
            check_preset_name(name or "")
        print_table(table_of(names))


def section_of_preset(name: str) -> str:
    """Return the shape `name` as YAML of a spec's model section, with every field, below comments about its source."""
    entry, shape = CATALOG[name], preset(name)
    words = [f"{name}: {shape.num_parameters():,} parameters; published {entry.published}", entry.source]
    comments = [f"# {line}\n" for line in (*words, entry.note) if line]
    return "".join(comments) + write_yaml({"model": shape.model_dump(mode="json", exclude_none=True)})


def table_of(names: list[str]) -> "Table":
    """Return the table of these presets, one row each."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, no_wrap=True, justify="left" if column == "positions" else "right")
    table.add_column("source")
    for name in names:
        table.add_row(name, *_numbers(preset(name)), CATALOG[name].source.partition(";")[0])
    return table


def short_count(number: int) -> str:
    """Return a parameter count with three digits: `124M`, `6.74B`, `1.01T`."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        # From 999.5 units on, three digits are those of the next unit.
        if number >= unit * 0.9995:
            value = number / unit
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f}{name}"
    return f"{number:,}"


def _numbers(shape: TransformerConfig) -> list[str]:
    heads = str(shape.num_heads) if shape.num_kv_heads == shape.num_heads else f"{shape.num_heads}/{shape.num_kv_heads}"
    ffn = f"{shape.num_experts} x {shape.ffn_hidden_size}" if shape.num_experts else shape.ffn_hidden_size
    sizes = (shape.num_layers, shape.hidden_size, heads, ffn, shape.vocab_size, shape.max_seq_len)
    window = f", window {shape.attention_window}" if shape.attention_window else ""
    return [short_count(shape.num_parameters()), *map(str, sizes), shape.position + window]
