"""The names of fields: former ones, and which field a wrong name was meant to be."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import takewhile
from types import MappingProxyType
from typing import Any, Final

from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.tree import Place, above, is_given, name_in, parts_of, step

RENAMED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "optimizer.beta1": "optimizer.betas",
        "optimizer.beta2": "optimizer.betas",
        "slurm.nodes": "launcher.nodes",
        "slurm.preflight": "slurm.preflight_min_free_gib",
    }
)
"""Former path of a field -> its path today, both `section.field`; specs and checkpoints are read through it."""


def _betas(given: Mapping[str, Any]) -> Any:
    if "optimizer.betas" in given:
        raise ValueError
    return [given.get("optimizer.beta1", 0.9), given.get("optimizer.beta2", 0.95)]  # the defaults of then


def _nodes(given: Mapping[str, Any]) -> Any:
    """launcher.nodes was that of runs started by hand and slurm.nodes that of jobs; both were written out, mostly 1."""
    counts = [count for count in given.values() if isinstance(count, bool) or count != 1] or [1]
    if counts != counts[:1] * len(counts):
        raise ValueError
    return counts[0]


def _min_free_gib(given: Mapping[str, Any]) -> Any:
    least = given.get("slurm.preflight_min_free_gib", 1.0)  # the default of then
    if not isinstance(given["slurm.preflight"], bool) or (given["slurm.preflight"] and least is None):
        raise ValueError
    return least if given["slurm.preflight"] else None


_MERGED: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = MappingProxyType(
    {
        "optimizer.betas": _betas,
        "launcher.nodes": _nodes,
        "slurm.preflight_min_free_gib": _min_free_gib,
    }
)
"""Path today -> its value from those that are given under former names and this one; ValueError: they contradict."""

# What other trainers call these fields; nearness of spelling would not find them.
_OTHER_NAMES: Final = MappingProxyType(
    {
        "learning_rate": "optimizer.lr",
        "max_lr": "optimizer.lr",
        "adam_eps": "optimizer.eps",
        "epsilon": "optimizer.eps",
        "adam_beta1": "optimizer.betas",
        "adam_beta2": "optimizer.betas",
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
        "nnodes": "launcher.nodes",
        "num_nodes": "launcher.nodes",
        "data_path": "data.source",
        "num_workers": "data.workers",
        "random_seed": "seed",
    }
)


SPEC: Final = Place(RunFields)


def place_of(path: str) -> Place | None:
    """Return what may stand at a path, None where nothing may."""
    place: Place | None = SPEC
    for part in parts_of(path):
        place = place and place.inside(part)
    return place


def with_new_names(raw: Mapping[str, Any], lines: dict[str, int | None]) -> dict[str, Any]:
    """Return `raw` with every field of RENAMED under its name of today, unless that contradicts what is given there.

    Args:
        lines: the line of each path, to which those of the new names are added.
    """
    found = dict(raw)
    for today in dict.fromkeys(RENAMED.values()):
        section = today.partition(".")[0]
        former = {old: _value(found, old) for old, new in RENAMED.items() if new == today and is_given(found, old)}
        if not former or not isinstance(found.get(section) or {}, Mapping):
            continue
        given = {today: _value(found, today), **former} if is_given(found, today) else former
        try:
            value = _MERGED.get(today, _only)(given)
        except ValueError:
            continue
        for old in former:
            _remove(found, old)
        found[section] = {**(found.get(section) or {}), today.partition(".")[2]: value}
        for old in lines.keys() & former.keys():
            lines.setdefault(today, lines[old])
    return found


def _value(raw: Mapping[str, Any], path: str) -> Any:
    section, _, name = path.partition(".")
    return raw[section][name]


def _remove(raw: dict[str, Any], path: str) -> None:
    """Remove a field, and its section where that is gone too and now empty; the section itself may be shared."""
    section, _, name = path.partition(".")
    raw[section] = {key: value for key, value in raw[section].items() if key != name}
    if not raw[section] and place_of(section) is None:
        del raw[section]


def _only(given: Mapping[str, Any]) -> Any:
    if len(given) > 1:
        raise ValueError
    return next(iter(given.values()))


def name_of_today(path: str) -> str | None:
    """Return the path today of a field that `path` named formerly, None where it named none."""
    return RENAMED.get(path)


@cache
def known_paths() -> tuple[str, ...]:
    """Return every path that a spec may hold, in order: sections, their fields, and the fields of records in these."""
    return tuple(SPEC.paths())


def nearest_path(path: str) -> str | None:
    """Return the known path that the unknown `path` was most likely meant to be, or None.

    In this order: its name of today, a slip in a name of the same record, another trainer's name for one of the same
    section, the same name in another record, a former name in another section, another trainer's name for it, a near
    spelling in the same record, a near spelling anywhere.
    """
    if (today := name_of_today(path)) is not None:
        return today
    name, record = name_in(path), getattr(place_of(above(path)), "record", None)
    siblings = [step(above(path), each) for each in record.model_fields] if record else []
    if slip := _nearest(name, siblings, cutoff=0.9):
        return slip
    other = _OTHER_NAMES.get(name.lower())
    if other is not None and above(other) == above(path):  # as train.batch_size, though another section has that name
        return other
    same_name = [candidate for candidate in known_paths() if name_in(candidate) == name]
    if same_name:
        parts = path.split(".")

        def distance(candidate: str) -> tuple[int, int, str]:
            shared = len(
                list(takewhile(lambda pair: pair[0] == pair[1], zip(parts, candidate.split("."), strict=False)))
            )
            return -shared, candidate.count("."), candidate

        return min(same_name, key=distance)
    former = [today for old, today in RENAMED.items() if name_in(old) == name]
    if former:
        return former[0]
    return other or _nearest(name, siblings, cutoff=0.6) or _nearest(name, known_paths(), cutoff=0.7)


def _nearest(name: str, paths: Iterable[str], cutoff: float) -> str | None:
    by_name: dict[str, str] = {}
    for path in paths:
        by_name.setdefault(name_in(path), path)
    close = difflib.get_close_matches(name.lower(), by_name, n=1, cutoff=cutoff)
    return by_name[close[0]] if close else None
