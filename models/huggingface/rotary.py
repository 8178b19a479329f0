"""Rotary positions in a config.json: base, rotated part of a head, and scaling to longer contexts.

Since transformers 5 `rope_parameters` has them all. Before, the base was `rope_theta`, the scaling `rope_scaling`
(which still takes precedence), and the rotated part a key of its own. We read and write both forms, for old readers.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import one_of
from trimaran.models.huggingface.options import Option, Values, shown, unsupported

_KINDS: Final = {"default": None, "linear": "linear", "dynamic": "dynamic_ntk", "yarn": "yarn", "llama3": "llama3"}
_LENGTH: Final = "original_max_position_embeddings"
_LLAMA3: Final = ("low_freq_factor", "high_freq_factor")


def rotary(*, base: str = "rope_theta", part: str | None = None, unless: str | None = None) -> Option:
    """Return the option of a family's rotary positions; `base` and `part` are in the family's defaults.

    Args:
        base: key of the base in older files.
        part: key of the rotated part of a head in older files; None for a family that always rotates whole heads.
        unless: key that switches rotary positions off (Falcon's alibi).
    """
    part_key = part or "partial_rotary_factor"

    def read(hf: Mapping[str, Any]) -> Values:
        if unless is not None and hf[unless]:
            return {}
        key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
        parameters = hf.get(key) or {}
        if not isinstance(parameters, Mapping):
            raise unsupported(key, parameters, "an object with a rope_type")
        if any(isinstance(entry, Mapping) for entry in parameters.values()):
            raise ValueError(
                f"{key} for {one_of(parameters)} layers are not supported; this runtime has one rotation for all layers"
            )
        values: Values = {"position": "rotary", "rotary_base": parameters.get("rope_theta") or hf[base]}
        share = parameters.get("partial_rotary_factor", hf.get(part_key))
        if share is not None and share != 1:
            if part is None:
                raise ValueError(f"{part_key} {shown(share)} is not supported; the heads of this family turn whole")
            head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
            values["rotary_dim"] = int(head_dim * share)
        scaling = _read_scaling(key, parameters, hf)
        if scaling is None:
            return values
        if scaling["kind"] in ("dynamic_ntk", "yarn"):  # for sequences longer than max_position_embeddings may say
            longest = int(scaling["original_max_position"] * scaling["factor"])
            values["max_seq_len"] = max(hf["max_position_embeddings"], longest)
        return {**values, "rotary_scaling": scaling}

    def write(config: TransformerConfig) -> Values:
        if config.position != "rotary":
            return {}
        scaling = _write_scaling(config)
        written: Values = {base: config.rotary_base, "rope_scaling": scaling or None}
        turned: Values = {"rope_theta": config.rotary_base}
        if part is not None:
            turned["partial_rotary_factor"] = written[part] = _share(
                config.rotary_dim or config.head_dim, config.head_dim
            )
        written["rope_parameters"] = {"rope_type": "default", **scaling, **turned}
        if config.rotary_scaling is not None and config.rotary_scaling.kind == "dynamic_ntk":
            written["max_position_embeddings"] = config.rotary_scaling.original_max_position
        return written

    return Option(("rope_parameters", "rope_scaling", base, part_key), read, write)


def _share(rotary_dim: int, head_dim: int) -> float:
    """Return a number p with int(head_dim * p) == rotary_dim."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else (rotary_dim + 0.5) / head_dim


def _read_scaling(of: str, parameters: Mapping[str, Any], hf: Mapping[str, Any]) -> Values | None:
    name = parameters.get("rope_type", parameters.get("type", "default"))
    if name not in _KINDS:
        raise unsupported("rope_type", name, one_of(shown(kind) for kind in _KINDS))
    kind, longest = _KINDS[name], hf["max_position_embeddings"]
    if kind is None:
        return None
    original = hf.get(_LENGTH) or parameters.get(_LENGTH) or longest
    factor = parameters.get("factor") or (longest / original if kind == "yarn" else None)
    missing = [
        key for key in ("factor", *_LLAMA3) if (kind == "llama3" or key == "factor") and parameters.get(key) is None
    ]
    if factor is None or (missing and kind == "llama3"):
        raise ValueError(f"{of} of rope_type {shown(name)} lack {one_of(missing)}")
    values: Values = {"kind": kind, "factor": float(factor)}
    if kind == "dynamic_ntk":  # transformers scales from the model's present length
        values["original_max_position"] = longest
    elif kind in ("yarn", "llama3"):
        values["original_max_position"] = original
    if kind == "llama3":
        values |= {key: float(parameters[key]) for key in _LLAMA3}
    if kind == "yarn":
        values |= _read_yarn(parameters, factor)
    return values


def _read_yarn(parameters: Mapping[str, Any], factor: float) -> Values:
    if not parameters.get("truncate", True):
        raise ValueError(
            "truncate false of rope_type 'yarn' is not supported; this runtime's ramp begins and ends at whole pairs"
        )
    values = {
        key: float(parameters[key]) for key in ("beta_fast", "beta_slow", "attention_factor") if parameters.get(key)
    }
    scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if "attention_factor" not in values and scale and scale_all:  # DeepSeek-V2
        values["attention_factor"] = _grown(factor, scale) / _grown(factor, scale_all)
    return values


def _grown(factor: float, by: float = 1.0) -> float:
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0


def _write_scaling(config: TransformerConfig) -> Values:
    scaling = config.rotary_scaling
    if scaling is None:
        return {}
    names = {kind: name for name, kind in _KINDS.items()}
    if scaling.kind not in names:
        raise ValueError(f"rope_type has no word for rotary_scaling of kind {scaling.kind}")
    written: Values = {"rope_type": names[scaling.kind], "factor": scaling.factor}
    if scaling.kind in ("yarn", "llama3"):
        written[_LENGTH] = scaling.original_max_position
    if scaling.kind == "llama3":
        written |= {key: getattr(scaling, key) for key in _LLAMA3}
    if scaling.kind == "yarn":
        factor = scaling.attention_factor or _grown(scaling.factor)
        written |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "attention_factor": factor}
    return written
