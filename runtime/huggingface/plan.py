"""Which stored tensors become which parameters: a folder checked against a family's weight map before any write."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.registry import family_of
from trimaran.models.huggingface.weights import WeightMap, locate, resolve
from trimaran.models.transformer import parameter_shapes
from trimaran.runtime.huggingface.source import DTYPES, ConversionError, ModelFolder, StoredTensor

_MOST_SHOWN = 5


@dataclass(frozen=True)
class Plan:
    """How a folder is imported: every unit of the family's weight map, and the stored names of the tensors it reads.

    Attributes:
        shapes: our parameter name -> global shape.
        stored: name in the family's map -> name in the folder.
    """

    folder: ModelFolder
    family: Family
    config: TransformerConfig
    units: Sequence[WeightMap]
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors to read."""
        return sum(self.bytes_of(unit) for unit in self.units)

    @property
    def dtypes(self) -> dict[str, int]:
        """dtype -> number of elements stored in it, the most common dtype first."""
        counts: dict[str, int] = {}
        for name in self.stored:
            tensor = self._tensor(name)
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.num_bytes // DTYPES[tensor.dtype].itemsize
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def checkpoint_bytes(self) -> int:
        """Approximate bytes of the parameters in the checkpoint."""
        return sum(count * stored_dtype([DTYPES[dtype]]).itemsize for dtype, count in self.dtypes.items())

    def bytes_of(self, unit: WeightMap) -> int:
        """Bytes of the tensors of one unit."""
        return sum(self._tensor(name).num_bytes for name in unit.theirs)

    def read(self, unit: WeightMap) -> dict[str, Tensor]:
        """Return the parameters of a unit, name -> [*global shape], in the dtype in which they are stored."""
        theirs = [self.folder.read(self.stored[name]) for name in unit.theirs]
        dtype = stored_dtype([tensor.dtype for tensor in theirs])
        ours = unit.to_ours([tensor.to(dtype) for tensor in theirs], self.config)
        found = dict(zip(unit.ours, ours, strict=True))
        for name, tensor in found.items():
            assert tuple(tensor.shape) == self.shapes[name], (
                f"{name} came out as {tuple(tensor.shape)}, not {self.shapes[name]}"
            )
        return found

    def _tensor(self, name: str) -> StoredTensor:
        return self.folder.tensors[self.stored[name]]


def stored_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype in which tensors that become one parameter are stored: their widest.

    float16 becomes float32, because checkpoints have no float16.
    """
    widest = torch.bfloat16
    for dtype in dtypes:
        widest = torch.promote_types(widest, torch.float32 if dtype == torch.float16 else dtype)
    return widest


def make_plan(folder: ModelFolder) -> Plan:
    """Return how `folder` is imported. Reads tensors only where a tied head is stored a second time.

    Raises:
        ConversionError: the architecture is unknown, an option of it is not supported, or tensors are missing,
            unexpected, quantized or of another shape.
    """
    described = folder.path / "config.json"
    try:
        family = family_of(folder.config)
        _refuse_many_layers(folder)
        config = TransformerConfig.model_validate(family.to_config(folder.config))
        units = resolve(family, config)
    except ValidationError as error:
        raise ConversionError(
            f"{described} describes no network that can be built: {'; '.join(_problems(error))}"
        ) from error
    except (
        ValueError,
        TypeError,
        KeyError,
        ArithmeticError,
        AttributeError,
    ) as error:  # a config.json may hold any type under a known name
        raise ConversionError(f"{described}: {error}") from error
    try:
        found = locate(family, units, folder.tensors)
    except ValueError as error:
        raise ConversionError(
            f"{folder.path}: {error}; put config.json and weights of the same model together, or copy them again"
        ) from error
    plan = Plan(folder, family, config, units, parameter_shapes(config), found.names)
    _refuse_problems(plan)
    if found.spare_head is not None:
        _refuse_other_head(plan, found.spare_head)
    return plan


def _refuse_many_layers(folder: ModelFolder) -> None:
    """Raise ConversionError for a number of layers that the stored tensors can't have.

    A typo would otherwise use all memory before a missing name is found.
    """
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        layers, stored = folder.config.get(name), len(folder.tensors)
        if isinstance(layers, int) and layers > stored:
            raise ValueError(
                f"{name} is {layers}, and the folder has {stored} tensors; "
                "put config.json and weights of the same model together"
            )


def _refuse_problems(plan: Plan) -> None:
    """Raise ConversionError naming the tensors of another shape, and those that are not weights."""
    expected = {
        name: tuple(shape)
        for unit in plan.units
        for name, shape in zip(unit.theirs, unit.their_shapes(plan.config), strict=True)
    }
    tensors = {name: plan.folder.tensors[plan.stored[name]] for name in expected}
    shapes = [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if tensors[name].shape != shape
    ]
    dtypes = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in DTYPES]
    if shapes:
        raise ConversionError(
            f"{plan.folder.path}: tensors have another shape than config.json asks for: {_listed(shapes)}; "
            "put config.json and weights of the same model together"
        )
    if dtypes:
        raise ConversionError(
            f"{plan.folder.path}: tensors are quantized, which can't be trained: {_listed(dtypes)}; "
            "import the model they were made from"
        )


def _refuse_other_head(plan: Plan, head: str) -> None:
    """Raise ConversionError where a head that config.json ties to the embedding is stored with other values."""
    embedding = next(plan.stored[unit.theirs[0]] for unit in plan.units if "embedding.weight" in unit.ours)
    first, second = plan.folder.read(embedding), plan.folder.read(head)
    if first.dtype != second.dtype or not torch.equal(first, second):
        raise ConversionError(
            f"{plan.folder.path}: config.json ties the output projection to the embedding, but {head} and {embedding} "
            "are both stored and differ; set tie_word_embeddings to false in config.json if the model has "
            "an output projection of its own"
        )


def _problems(error: ValidationError) -> list[str]:
    """pydantic's errors, each with its field, without those of fields derived from wrong ones."""
    found = []
    for problem in error.errors(include_url=False):
        if problem["type"] != "default_factory_not_called":
            field = ".".join(str(part) for part in problem["loc"])
            found.append((f"{field}: " if field else "") + problem["msg"].removeprefix("Value error, "))
    return found[:_MOST_SHOWN]


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MOST_SHOWN} more" if len(items) > _MOST_SHOWN else ""
    return ", ".join(items[:_MOST_SHOWN]) + more
