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
_COLUMNS = {
    "tp": "tp", "pp": "pp", "dp": "dp", "ep": "ep", "schedule": "schedule", "virtual_stages": "stages a rank",
    "microbatch": "microbatch", "zero": "ZeRO", "recompute": "recompute",
}  # fmt: skip


def print_search(
    spec: "RunSpec",
    setting: "Setting",
    *,
    gpus: int | None,
    headroom: float,
    fix: Sequence[str],
    write: Path | None,
    picture: Path | None,
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
    found = search(spec, setting, gpus=count, headroom=headroom, fixed=fixed_values(spec, fix), most=_MOST)
    _print_table(found, setting)
    if write is not None:
        write_text(write, dump_spec(found.found[0].spec))
        say(f"the spec of the first is in {write}")
    if picture is not None:
        from trimaran.launchers.report.plan_charts import search_picture

        write_text(picture, search_picture(found, setting))
        say(f"search drawn in {picture}")


def fixed_values(spec: "RunSpec", fix: Sequence[str]) -> Mapping[str, object]:
    """Return what `--fix FIELD=VALUE` says, by name in a layout.

    Raises:
        ValueError: one is no field that is searched, is fixed twice, or has a value that it can't have.
    """
    import difflib

    from trimaran.runtime.plan.search.layouts import FIELDS, Layout, check_value

    found: dict[str, object] = {}
    for each in fix:
        field, is_one, text = each.partition("=")
        if not is_one or field not in FIELDS:
            nearest = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.0)[0]
            raise ValueError(f"--fix {each}: write FIELD=VALUE of a field that is searched, such as {nearest}=...; "
                             f"they are {', '.join(FIELDS)}")  # fmt: skip
        if FIELDS[field] in found:
            raise ValueError(f"--fix {each}: {field} is fixed already; fix a field once")
        kind = Layout.__annotations__[FIELDS[field]]
        if kind is str:
            found[FIELDS[field]] = text
        elif kind is bool and text in ("true", "false"):
            found[FIELDS[field]] = text == "true"
        elif kind is int and text.isdigit():
            found[FIELDS[field]] = int(text)
        else:
            raise ValueError(f"--fix {each}: {field} takes {'true or false' if kind is bool else 'a whole number'}")
        try:
            check_value(spec, field, found[FIELDS[field]])
        except ValueError as error:
            raise ValueError(f"--fix {each}: {error}") from error
    return found


def _print_table(found: "Search", setting: "Setting") -> None:
    from rich.table import Table

    table = Table("", *_COLUMNS.values(), "seconds", "slower by", "GiB", "MFU", "spends more on", box=None)
    first = found.found[0].plan.seconds
    for number, each in enumerate(found.found, 1):
        own = each.layout
        cells = [str(getattr(own, name)) for name in _COLUMNS]
        memory = each.plan.total(each.plan.fullest) / 2**30
        table.add_row(
            str(number), *cells, f"{each.plan.seconds:.4g}", f"{each.plan.seconds / first - 1:.1%}",
            f"{memory:.1f}", f"{each.plan.figures['MFU']:.1%}", each.lost,
        )  # fmt: skip
    print_table(table)
    fit = f"about {found.fitting:,} fit {setting.chip.name}"
    say(f"{found.tried:,} layouts were timed, of which {fit}; the fastest of those were planned")
    say(
        f"largest microbatch of the first that fits: {found.largest_microbatch}; "
        f"fewest GPUs that hold the run: {found.fewest.gpus} ({found.fewest})"
    )
    beside = Table("beside the first", "lost by", box=None)
    for neighbour, verdict in found.beside:
        beside.add_row(neighbour.change, verdict)
    print_table(beside)
