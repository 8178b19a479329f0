"""Whether a model is the one that an adapter of PEFT was trained beside: by a hash of its weights, or else by name.

Shapes and names of modules don't tell a model from its own finetuned one. A folder that `trimaran export --adapter` has
written holds the hash; one of PEFT only names the model.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from trimaran.runtime.adapters.merged import Merged, Weights
from trimaran.runtime.files import check_regular
from trimaran.runtime.huggingface.refusals import ConversionError

BASE_HASH: Final = "trimaran_base_sha256"
"""Key of the hash in the metadata of adapter_model.safetensors, which PEFT does not read."""


@dataclass(frozen=True)
class NamedBase:
    """What an adapter's folder says of its base.

    Args:
        name, revision: of adapter_config.json; "" for none.
        sha256: see `hash_of_weights`; "" where the folder has none.
    """

    name: str
    revision: str
    sha256: str


def hash_of_weights(weights: Weights) -> str:
    """Return the sha256 of all weights, "" for those that adapters make with a base, whose last bits may differ.

    It does not depend on files and layouts, nor on whether float32 weights were written in bfloat16 meanwhile: names,
    shapes, and the numbers rounded to bfloat16. Reads every weight, one at a time.
    """
    if isinstance(weights, Merged):
        return ""
    found = hashlib.sha256()
    for name in weights.names():
        rounded = weights.read_global(name, "weight").to(torch.bfloat16).contiguous()
        found.update(f"{name} {list(rounded.shape)}\n".encode())
        found.update(rounded.flatten().view(torch.uint8).numpy().data)
    weights.close()
    return found.hexdigest()


def named_base(config: Mapping[str, Any], file: Path) -> NamedBase:
    """Return what adapter_config.json and the file of the matrices say. Raises ConversionError for a damaged file."""
    try:
        with safe_open(check_regular(file), framework="pt") as opened:
            sha256 = (opened.metadata() or {}).get(BASE_HASH, "")
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{file} can't be read: {error}") from error
    name, revision = (config.get(key) for key in ("base_model_name_or_path", "revision"))
    return NamedBase(name if isinstance(name, str) else "", revision if isinstance(revision, str) else "", sha256)


def check_base(named: NamedBase, weights: Weights, record: Mapping[str, Any], base: Path) -> str:
    """Return what a user should know of the base that was given for an adapter, "" where it is the right one for sure.

    Args:
        weights: of the base that was given.
        record: of the import that made its run, empty for none.
        base: as it was given.

    Raises:
        ConversionError: the adapter was trained beside other weights.
    """
    held = hash_of_weights(weights) if named.sha256 else ""
    if held and held != named.sha256:
        raise ConversionError(
            f"the adapter was trained beside other weights (sha256 {named.sha256[:12]}, of {named.name or 'no name'}) "
            f"than those of {base} ({held[:12]}), though their shapes are equal; give the run of that model"
        )
    if held:
        return ""
    if not named.name:
        return f"the adapter does not name its base: that it was trained beside {base} can't be known"
    config = record.get("config")
    known = [record.get("source"), config.get("_model_name_or_path") if isinstance(config, Mapping) else None, base]
    called = f"{named.name}{f' at revision {named.revision}' if named.revision else ''}"
    if any(_are_alike(named.name, str(each)) for each in known if each):
        which = ", and the revision of an imported model is not known" if named.revision else ""
        return f"the adapter names {called} as its base, as {base} is called; weights can't be compared{which}"
    origin = known[0] or "a run that was trained here"
    return (
        f"the adapter names {called} as its base, and {base} is of {origin}: whether they are one model can't be "
        "known, for only their shapes could be compared"
    )


def _are_alike(first: str, second: str) -> bool:
    """Return whether two names of a model, paths or names on a hub, are one place or end alike."""
    return Path(first).resolve() == Path(second).resolve() or Path(first).name.lower() == Path(second).name.lower()
