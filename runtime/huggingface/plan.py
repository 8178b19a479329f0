"""Which stored tensors become which parameters: a folder checked against a family's weight map before any write."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.options import TIED, shown
from trimaran.models.huggingface.registry import family_of
from trimaran.models.huggingface.weights import WRAPPERS, Stored, WeightMap, lacks_head, locate, resolve
from trimaran.models.transformer import parameter_shapes
from trimaran.runtime.huggingface.refusals import ConversionError
from trimaran.runtime.huggingface.scores import architecture_of, is_classifier, units_of, without_scores
from trimaran.runtime.huggingface.source import DTYPES, ModelFolder, StoredTensor

_MOST_SHOWN = 5


@dataclass(frozen=True)
class Plan:
    """How a folder is imported: every unit of the family's weight map, and the stored names of the tensors it reads.

    Attributes:
        folder: the folder, with the values in config.json that were meant where it lacks them.
        shapes: our parameter name -> global shape.
        stored: name in the family's map -> name in the folder.
        notes: sentences for the user about what was read otherwise than it stands in the folder, or not at all.
    """

    folder: ModelFolder
    family: Family
    config: TransformerConfig
    units: Sequence[WeightMap]
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """Name of the class in transformers."""
        return architecture_of(self.family, self.config)

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
        """Return the parameters of a unit, name -> [*global shape], in the dtype in which they are stored.

        Raises:
            ConversionError: a tensor can't be read, or is not finite.
        """
        theirs = [self.folder.read(self.stored[name]) for name in unit.theirs]
        for name, tensor in zip(unit.theirs, theirs, strict=True):
            if not bool(torch.isfinite(tensor).all()):
                raise ConversionError(
                    f"{self._tensor(name).file}: tensor {self.stored[name]} holds infinite values or NaN, so the model "
                    "would compute nothing; copy the file again, or take an earlier checkpoint of the model"
                )
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

    Where config.json does not say whether the head is tied to the embedding, the stored tensors do.

    Raises:
        ConversionError: the architecture is unknown, an option of it is not supported, or tensors are missing,
            unexpected, quantized or of another shape.
    """
    plan, spare_head = _plan(folder, ())
    if spare_head is None or not plan.config.has_head or _is_embedding(plan, spare_head):
        return plan
    if _may_tie(plan.family, folder):
        notes = (f"config.json does not say whether {spare_head} is tied to the embedding; it is not, for they differ",)
        return _plan(folder.described_as(tie_word_embeddings=False), notes)[0]
    raise ConversionError(
        f"{folder.path}: config.json ties the output projection to the embedding, but {spare_head} and the embedding "
        "are both stored and differ; set tie_word_embeddings to false in config.json if the model has "
        "an output projection of its own"
    )


def _plan(folder: ModelFolder, notes: tuple[str, ...]) -> tuple[Plan, str | None]:
    """Return the plan for the folder, and the name of a stored head that config.json ties to the embedding."""
    described = folder.path / "config.json"
    try:
        family = family_of(folder.config)
        _refuse_many_parts(folder)
        values, scores = family.to_config(folder.config), is_classifier(folder.config)
        if scores:
            values["score_head"] = "only"
        elif _may_tie(family, folder) and not values["tie_embeddings"] and lacks_head(family, folder.tensors):
            notes += ("config.json does not say whether the head is tied to the embedding; it is, for none is stored",)
            folder = folder.described_as(tie_word_embeddings=True)
            values = family.to_config(folder.config)
        config = TransformerConfig.model_validate(values)
        units = units_of(resolve(family, without_scores(config)), config)
    except ValidationError as error:
        raise ConversionError(
            f"{described} describes no network that can be built: "
            + "; ".join(family.in_their_words(problem, folder.config) for problem in _problems(error))
        ) from error
    except (
        ValueError,
        TypeError,
        KeyError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
    ) as error:  # a config.json may hold any type under a known name, and sizes beyond torch's
        raise ConversionError(f"{described}: {error}") from error
    try:
        found = locate(family, units, folder.tensors)
    except ValueError as error:
        raise ConversionError(f"{folder.path}: {error}; {_remedy(folder, family)}") from error
    shapes = parameter_shapes(config)
    plan = Plan(folder, family, config, units, shapes, found.names, (*notes, *_notes_on(found)))
    _refuse_problems(plan)
    return plan, found.spare_head


def _may_tie(family: Family, folder: ModelFolder) -> bool:
    """Whether the family has models with a tied head and with one of their own, and config.json does not choose."""
    return TIED in family.options and folder.config.get("tie_word_embeddings") is None


def _remedy(folder: ModelFolder, family: Family) -> str:
    """Return what to do about tensors that are not those of the config."""
    named = folder.config.get("architectures")
    if isinstance(named, list) and named and family.architecture not in named:
        return (
            f"config.json says that the model is a {named[0]}, and of model_type {folder.config.get('model_type')} "
            f"only {family.architecture}, and a classifier of one label, can be imported"
        )
    return "put config.json and weights of the same model together, or copy them again"


def _notes_on(found: Stored) -> list[str]:
    """Return sentences about names that were read without a wrapper's part, and about tensors that were not read."""
    notes = []
    wrapped = [name for name in found.names.values() if re.search(WRAPPERS, name)]
    if wrapped:
        notes.append(
            f"the names of {len(wrapped)} tensors are read without what torch.compile, DDP or FSDP has added to them, "
            f"such as {wrapped[0]}"
        )
    if found.left_out:
        notes.append(f"not read, because the network has no place for them: {_listed(found.left_out)}")
    return notes


def _refuse_many_parts(folder: ModelFolder) -> None:
    """Raise ConversionError for a number of layers or experts that the stored tensors can't have.

    A typo would otherwise use all memory before a missing name is found.
    """
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_local_experts", "num_experts"):
        parts, stored = folder.config.get(name), len(folder.tensors)
        if isinstance(parts, int | float) and parts > stored:
            raise ValueError(
                f"{name} is {parts}, and the folder has {stored} tensors; "
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


def _is_embedding(plan: Plan, head: str) -> bool:
    """Whether the stored head has the values of the embedding."""
    embedding = next(plan.stored[unit.theirs[0]] for unit in plan.units if "embedding.weight" in unit.ours)
    first, second = plan.folder.read(embedding), plan.folder.read(head)
    return first.dtype == second.dtype and torch.equal(first, second)


def _problems(error: ValidationError) -> list[str]:
    """pydantic's errors, each with its field, without those of fields derived from wrong ones."""
    found = []
    for problem in error.errors(include_url=False):
        if problem["type"] != "default_factory_not_called":
            field = ".".join(str(part) for part in problem["loc"])
            place = f"{field} {shown(problem['input'])}: " if field else ""
            found.append(place + problem["msg"].removeprefix("Value error, "))
    return found[:_MOST_SHOWN]


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MOST_SHOWN} more" if len(items) > _MOST_SHOWN else ""
    return ", ".join(items[:_MOST_SHOWN]) + more
