"""Numbers of an imported model that its parameters here can't hold: kept beside the run, and put back by an export.

Gemma's norms lose their last bits in 1 + w, and OPT's positions and XLNet's attention have parts that the network never
reads. An export puts the original number wherever it would write what the way there and back makes of it; where
training has changed a number, the new one stays.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.weights import WeightMap
from trimaran.runtime.checkpoint.files import write_safetensors
from trimaran.runtime.files import check_regular
from trimaran.runtime.huggingface.plan import Plan, stored_dtype
from trimaran.runtime.huggingface.refusals import ConversionError
from trimaran.runtime.train.init_from import IMPORT_WEIGHTS


def keep_originals(plan: Plan, run: Path) -> list[str]:
    """Write the tensors that the way there and back would change into the folder `run`; return what they lose."""
    kept: dict[str, Tensor] = {}
    lost = []
    for unit in plan.units:
        if unit.form.is_exact:
            continue
        theirs = [plan.folder.read(plan.stored[name]) for name in unit.theirs]
        if not all(map(_same_bits, _there_and_back(unit, theirs, plan.config), theirs)):
            kept |= dict(zip(unit.theirs, theirs, strict=True))
            lost.append(unit.form.lost or "the last bits of its norms")
    if kept:
        write_safetensors(run / IMPORT_WEIGHTS, kept, {"format": "pt"})
    return list(dict.fromkeys(lost))


def put_back(run: Path, unit: WeightMap, theirs: Sequence[Tensor], config: TransformerConfig) -> list[Tensor] | None:
    """Return the tensors of a unit with the original numbers where training has not changed them.

    None where the run has no originals of this unit.

    Args:
        theirs: the tensors as converted from the run's parameters.

    Raises:
        ConversionError: the file of originals is damaged.
    """
    file = run / IMPORT_WEIGHTS
    if not file.is_file():
        return None
    try:
        with safe_open(check_regular(file), framework="pt") as opened:
            if not set(unit.theirs) <= set(opened.keys()):
                return None
            originals = [opened.get_tensor(name) for name in unit.theirs]
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{file} can't be read ({error}); copy it again from the imported run, or remove it, and the export has "
            "zeros or rounded numbers for what it holds"
        ) from error
    if [tensor.shape for tensor in originals] != [tensor.shape for tensor in theirs]:
        return None
    again = _there_and_back(unit, originals, config)
    return [
        torch.where(now == back.to(now.dtype), original.to(now.dtype), now)
        for now, back, original in zip(theirs, again, originals, strict=True)
    ]


def _there_and_back(unit: WeightMap, theirs: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    """Return what an import and an export would make of the tensors."""
    dtype = stored_dtype([tensor.dtype for tensor in theirs])
    return unit.to_theirs(unit.to_ours([tensor.to(dtype) for tensor in theirs], config), config)


def _same_bits(back: Tensor, original: Tensor) -> bool:
    return torch.equal(back.to(original.dtype), original)
