"""`trimaran plan --search`: the layouts that fit, fastest first, why the others lost, and the spec of the fastest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trimaran.launchers.terminal import print_table, say
from trimaran.runtime.files import write_text
from trimaran.runtime.spec.loading import dump_spec

if TYPE_CHECKING:
    from trimaran.runtime.plan.forecast import Setting
    from trimaran.runtime.plan.search.search import Search
    from trimaran.runtime.spec import RunSpec

_MOST = 10


def print_search(
    spec: "RunSpec", setting: "Setting", *, gpus: int | None, headroom: float, fix: Sequence[str], write: Path | None
) -> None:
    """Search, print the fastest layouts, and write the spec of the first.

    Raises:
        ValueError: an option is wrong, or nothing is found.
    """
    from trimaran.runtime.plan.search.search import search

    if not 0 <= headroom < 1:
        raise ValueError(f"--headroom must be at least 0 and below 1, a share of the chip's memory; got {headroom}")
    count = spec.world_size if gpus is None else gpus
    if count < 1:
        raise ValueError(f"--gpus must be at least 1; got {count}")
    found = search(spec, setting, gpus=count, headroom=headroom, fixed=fixed_values(fix), most=_MOST)
    _print_table(found, setting)
    if write is not None:
        write_text(write, dump_spec(found.found[0].spec))
        say(f"the spec of the first is in {write}")


def fixed_values(fix: Sequence[str]) -> Mapping[str, object]:
    """Return what `--fix FIELD=VALUE` says, by name in a layout.

    Raises:
        ValueError: one is no field that is searched, or no value of it.
    """
    import difflib

    from trimaran.runtime.plan.search.search import FIELDS, Layout

    found: dict[str, object] = {}
    for each in fix:
        field, is_one, text = each.partition("=")
        if not is_one or field not in FIELDS:
            nearest = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.0)[0]
            raise ValueError(f"--fix {each}: write FIELD=VALUE of a field that is searched, such as {nearest}=...; "
                             f"they are {', '.join(FIELDS)}")  # fmt: skip
        kind = Layout.__annotations__[FIELDS[field]]
        if kind is str:
            found[FIELDS[field]] = text
        elif kind is bool and text in ("true", "false"):
            found[FIELDS[field]] = text == "true"
        elif kind is int and text.isdigit():
            found[FIELDS[field]] = int(text)
        else:
            raise ValueError(f"--fix {each}: {field} takes {'true or false' if kind is bool else 'a whole number'}")
    return found


def _print_table(found: "Search", setting: "Setting") -> None:
    from rich.table import Table

    columns = ("tp", "pp", "dp", "ep", "stages a rank", "microbatch", "ZeRO", "recompute")
    table = Table("", *columns, "seconds", "slower by", "GiB", "MFU", "spends more on", box=None)
    first = found.found[0].plan.seconds
    for number, each in enumerate(found.found, 1):
        own = each.layout
        cells = (own.tp, own.pp, own.dp, own.ep, own.virtual_stages, own.microbatch, own.zero, own.recompute)
        memory = each.plan.total(each.plan.fullest) / 2**30
        table.add_row(
            str(number), *map(str, cells), f"{each.plan.seconds:.4g}", f"{each.plan.seconds / first - 1:.1%}",
            f"{memory:.1f}", f"{each.plan.figures['MFU']:.1%}", each.lost,
        )  # fmt: skip
    print_table(table)
    fit = f"about {found.fitting:,} fit {setting.chip.name}"
    say(f"{found.tried:,} layouts were timed, of which {fit}; the fastest of those were planned")
