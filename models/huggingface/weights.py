"""The weight map of one model, in units that can be converted one by one, so that a large model can be streamed."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import Form, Row
from trimaran.models.transformer import parameter_shapes

Shape = tuple[int, ...]

WRAPPERS: Final = (
    r"(?:^|(?<=\.))(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.)+"
)
"""Regular expression for what DDP, torch.compile, FSDP, activation checkpointing and Fabric add to a tensor's name."""


@dataclass(frozen=True)
class WeightMap:
    """A unit of conversion: a few tensors of a file that convert to a few of ours.

    Args:
        ours, theirs: names of parameters and of tensors.
        form: the conversion.
        our_shapes: global shapes, in the order of `ours`.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form
    our_shapes: tuple[Shape, ...]

    def to_ours(self, tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
        """Return our global tensors for theirs; they may share memory, so neither may be changed.

        Norms that multiply by 1 + w become float32 at least; other dtypes do not change.

        Raises:
            ValueError: a tensor's shape disagrees with the config.
        """
        for name, tensor, shape in zip(self.theirs, tensors, self.their_shapes(config), strict=True):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, and the config asks for {shape}")
        return self.form.to_ours(tensors, config)

    def to_theirs(self, tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
        """Return their tensors, contiguous, for our global ones."""
        for name, tensor, shape in zip(self.ours, tensors, self.our_shapes, strict=True):
            assert tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, not {shape}"
        return [tensor.contiguous() for tensor in self.form.to_theirs(tensors, config)]

    def their_shapes(self, config: TransformerConfig) -> list[Shape]:
        """Return the shapes of their tensors, in the order of `theirs`."""
        made = self.form.to_theirs([torch.empty(shape, device="meta") for shape in self.our_shapes], config)
        return [tuple(tensor.shape) for tensor in made]


def resolve(family: Family, config: TransformerConfig) -> list[WeightMap]:
    """Return the units of the whole model, in the network's order, with every parameter in exactly one.

    Raises:
        ValueError: the family has no tensor for a parameter of this config.
    """
    shapes = parameter_shapes(config)
    units = [unit for row in family.weights for unit in _expand(row, config, shapes)]
    covered = [name for unit in units for name in unit.ours]
    twice = sorted({name for name in covered if covered.count(name) > 1}) if len(set(covered)) < len(covered) else []
    assert not twice, f"{family.name} maps {twice[0]} twice"
    missing = [name for name in shapes if name not in set(covered)]
    if missing:
        raise ValueError(f"{family.architecture} has no tensor for {_listed(missing)}")
    order = {name: index for index, name in enumerate(shapes)}
    return sorted(units, key=lambda unit: order[unit.ours[0]])


def _expand(row: Row, config: TransformerConfig, shapes: dict[str, Shape]) -> Iterator[WeightMap]:
    """Yield the units of one row: one for each layer, weight and bias that the model has."""
    if row.blocks and config.block not in row.blocks:
        return
    layers = range(config.num_layers) if "{i}" in row.ours[0] else range(1)
    kinds = ("weight", "bias") if "{p}" in row.ours[0] else ("",)
    for layer in layers:
        for kind in kinds:
            ours = tuple(name.replace("{i}", str(layer)).replace("{p}", kind) for name in row.ours)
            there = [name in shapes for name in ours]
            if not any(there):
                continue
            assert all(there), f"the model has only some of {ours}"
            theirs = [name.replace("{i}", str(layer)).replace("{p}", kind) for name in row.theirs]
            experts = shapes[ours[0]][0]
            names = [
                each
                for name in theirs
                for each in ([name.replace("{e}", str(e)) for e in range(experts)] if "{e}" in name else [name])
            ]
            yield WeightMap(ours, tuple(names), row.form, tuple(shapes[name] for name in ours))


@dataclass(frozen=True)
class Stored:
    """The names of a model's tensors in a file.

    Args:
        names: name in the weight map -> name in the file.
        spare_head: name in the file of an output projection although the config ties it to the embedding, or None.
            Transformers ties the two only if they are equal, so the reader of the file must compare them.
        left_out: names in the file of tensors that the network has no place for, such as masks and other heads.
    """

    names: dict[str, str]
    spare_head: str | None
    left_out: tuple[str, ...] = ()


def lacks_head(family: Family, stored: Iterable[str]) -> bool:
    """Return whether a file, `stored`, has the network's embedding under its full name and no output projection.

    Such a model is tied. (Without the prefix it may be the network alone, of a model that has a head.)
    """
    names = {_canonical(family, name) for name in stored}
    head, embedding = (_their_name(family, ours) for ours in ("head.weight", "embedding.weight"))
    return embedding in names and head not in names


def locate(family: Family, units: Sequence[WeightMap], stored: Iterable[str]) -> Stored:
    """Return the names in a file, `stored`, of the units' tensors.

    Raises:
        ValueError: tensors are missing, or the file has further ones.
    """
    plain = {name: _canonical(family, name) for name in stored}
    left_out = [name for name in plain if any(re.search(pattern, plain[name]) for pattern in family.ignored)]
    weights = [name for name in plain if name not in set(left_out)]
    left = {plain[name]: name for name in weights}
    wanted = dict.fromkeys(name for unit in units for name in unit.theirs)
    if left and not any(name.startswith(family.prefix) for name in left):
        left = {name if name in wanted else family.prefix + name: at for name, at in left.items()}
    if len(left) < len(weights):
        double = _listed(sorted(set(weights) - set(left.values())))
        raise ValueError(f"the weights have {double} and the same tensor under another name")
    head, embedding = (_their_name(family, ours) for ours in ("head.weight", "embedding.weight"))
    spare = left.pop(head) if head in left and head not in wanted else None
    if spare is not None and embedding not in left:  # the head alone is enough: transformers ties in both directions
        left[embedding], spare = spare, None
    missing = [name for name in wanted if name not in left]
    if missing:
        raise ValueError(f"the weights lack {_listed(missing)}, which a {family.name} model of this config has")
    extra = sorted(left.keys() - wanted.keys())
    if extra:
        raise ValueError(
            f"the weights have {_listed(extra)}, which a {family.name} model of this config has no place for"
        )
    return Stored({name: left[name] for name in wanted}, spare, tuple(left_out))


def _their_name(family: Family, ours: str) -> str:
    return next(row.theirs[0] for row in family.weights if row.ours == (ours,))


def _canonical(family: Family, name: str) -> str:
    """Return a name as the weight map has it: without wrappers, the family's other spellings replaced."""
    name = re.sub(WRAPPERS, "", name)
    for other, ours in family.renamed.items():
        if name.startswith(other):
            name = ours + name.removeprefix(other)
            break
    for other, ours in family.endings.items():
        if name.endswith(other):
            return name.removesuffix(other) + ours
    return name


def _listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
