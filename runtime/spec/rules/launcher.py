"""Rules of the ranks over nodes and processes."""

from collections.abc import Iterator
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError, counted, nearest_divisors, nearest_multiples, one_of
from trimaran.runtime.spec.errors import SpecError
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules.table import Rules

RULES: Final = Rules()
_RANKS: Final = ("parallel.tp", "parallel.pp", "parallel.dp", "parallel.cp")


def check_world_size(spec: RunFields, world_size: int, name: str = "WORLD_SIZE") -> None:
    """Check that the processes that were started are the ranks that the spec lays out.

    Args:
        name: of the variable that has their number.

    Raises:
        SpecError: they are not; names dp degrees and world sizes that fit.
    """
    if spec.world_size == world_size:
        return
    parallel = spec.parallel
    one_replica = parallel.tp * parallel.pp * parallel.cp
    axes = f"tp({parallel.tp}) * pp({parallel.pp}) * dp({parallel.dp}) * cp({parallel.cp})"
    fix = f"start {counted(spec.world_size, 'rank')}"
    if world_size > 0 and world_size % one_replica == 0:
        fix += f", or set parallel.dp to {world_size // one_replica}"
    else:
        sizes = one_of(nearest_multiples(one_replica, world_size))
        replica = f"tp({parallel.tp}) * pp({parallel.pp}) * cp({parallel.cp})"
        fix += f"; with {replica} the world size must be a multiple of {one_replica}, such as {sizes}"
    rule = f"{axes} = {spec.world_size} != {name} {world_size}"
    raise SpecError([FieldError("parallel.dp", rule, parallel.dp, fix)])


@RULES.needs("launcher.nodes", *_RANKS)
def _nodes_share_the_ranks(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    nodes, ranks = spec.launcher.nodes, spec.world_size
    if ranks % nodes:
        product = f"the number of ranks ({ranks} = tp * pp * dp * cp)"
        rule = f"nodes ({nodes}) must divide {product}, for every node gets equally many"
        fix = f"set launcher.nodes to {one_of(nearest_divisors(ranks, nodes))}"
        yield FieldError("launcher.nodes", rule, nodes, fix)
