"""The names of fields: former ones, and which field a wrong name was meant to be."""

import difflib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from pydantic import BaseModel

from trimaran.runtime.spec.fields import RunFields

RENAMED: Final[Mapping[str, str]] = MappingProxyType({})
"""Former path of a field -> its path today, both `section.field`; specs and checkpoints are read through it."""

# What other trainers call these fields; nearness of spelling would not find them.
_OTHER_NAMES: Final = MappingProxyType(
    {
        "learning_rate": "optimizer.lr",
        "max_lr": "optimizer.lr",
        "adam_eps": "optimizer.eps",
        "epsilon": "optimizer.eps",
        "betas": "optimizer.beta1",
        "clip_grad": "optimizer.max_grad_norm",
        "grad_clip": "optimizer.max_grad_norm",
        "min_lr": "lr_schedule.min_lr_ratio",
        "lr_decay_style": "lr_schedule.name",
        "lr_warmup_iters": "lr_schedule.warmup_steps",
        "n_layer": "model.num_layers",
        "n_layers": "model.num_layers",
        "num_hidden_layers": "model.num_layers",
        "d_model": "model.hidden_size",
        "n_embd": "model.hidden_size",
        "dim": "model.hidden_size",
        "n_head": "model.num_heads",
        "n_heads": "model.num_heads",
        "num_attention_heads": "model.num_heads",
        "n_kv_heads": "model.num_kv_heads",
        "num_key_value_heads": "model.num_kv_heads",
        "num_query_groups": "model.num_kv_heads",
        "intermediate_size": "model.ffn_hidden_size",
        "d_ff": "model.ffn_hidden_size",
        "block_size": "train.seq_len",
        "seq_length": "train.seq_len",
        "sequence_length": "train.seq_len",
        "max_position_embeddings": "model.max_seq_len",
        "rope_theta": "model.rotary_base",
        "dropout": "model.hidden_dropout",
        "tensor_parallel": "parallel.tp",
        "tensor_model_parallel_size": "parallel.tp",
        "pipeline_parallel": "parallel.pp",
        "pipeline_model_parallel_size": "parallel.pp",
        "data_parallel": "parallel.dp",
        "data_parallel_size": "parallel.dp",
        "context_parallel_size": "parallel.cp",
        "pipeline_schedule": "parallel.schedule",
        "vpp": "parallel.virtual_stages",
        "max_steps": "train.num_steps",
        "max_iters": "train.num_steps",
        "train_iters": "train.num_steps",
        "batch_size": "train.global_batch_size",
        "train_batch_size": "train.global_batch_size",
        "micro_batch": "train.micro_batch_size",
        "zero_stage": "zero.stage",
        "data_parallel_shard_degree": "zero.shard_size",
        "zero_hpz_partition_size": "zero.shard_size",
        "output": "train.output_dir",
        "out_dir": "train.output_dir",
        "save_dir": "train.output_dir",
        "save_interval": "checkpoint.interval",
        "log_interval": "logging.interval",
        "nproc_per_node": "parallel.dp",
        "random_seed": "seed",
    }
)


def section_of(name: str) -> type[BaseModel] | None:
    """Return the model of the section called `name`, or None where there is no such section."""
    field = RunFields.model_fields.get(name)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def with_new_names(raw: Mapping[str, Any], lines: dict[str, int]) -> dict[str, Any]:
    """Return `raw` with every field of RENAMED under its name of today, unless that is given as well.

    Args:
        lines: the line of each path, to which those of the new names are added.
    """
    found = dict(raw)
    for old, new in RENAMED.items():
        (old_section, old_name), (section, name) = old.split("."), new.split(".")
        former, target = found.get(old_section), found.get(section) or {}
        if isinstance(former, Mapping) and old_name in former and isinstance(target, Mapping) and name not in target:
            found[old_section] = {key: value for key, value in former.items() if key != old_name}
            found[section] = {**(found.get(section) or {}), name: former[old_name]}
            if not found[old_section] and section_of(old_section) is None:
                del found[old_section]
            if old in lines:
                lines[new] = lines[old]
    return found


def known_paths() -> Iterator[str]:
    """Yield every path that a spec may hold: sections, their fields and the top-level fields, in order."""
    for name in RunFields.model_fields:
        yield name
        section = section_of(name)
        yield from (f"{name}.{field}" for field in section.model_fields) if section else ()


def nearest_path(path: str) -> str | None:
    """Return the known path that the unknown `path` was most likely meant to be, or None.

    In this order: its name of today, the same name in another section, another trainer's name for it, a near spelling
    in the same section, a near spelling anywhere.
    """
    section, _, name = path.rpartition(".")
    if path in RENAMED:
        return RENAMED[path]
    known = list(known_paths())
    same_name = [candidate for candidate in known if candidate.rpartition(".")[2] == name]
    if same_name:
        return min(same_name, key=lambda candidate: (candidate.count("."), candidate))
    if name.lower() in _OTHER_NAMES:
        return _OTHER_NAMES[name.lower()]
    siblings = [candidate for candidate in known if candidate.rpartition(".")[0] == section]
    return _nearest(name, siblings, cutoff=0.6) or _nearest(name, known, cutoff=0.7)


def _nearest(name: str, paths: list[str], cutoff: float) -> str | None:
    by_name: dict[str, str] = {}
    for path in paths:
        by_name.setdefault(path.rpartition(".")[2], path)
    close = difflib.get_close_matches(name.lower(), by_name, n=1, cutoff=cutoff)
    return by_name[close[0]] if close else None
