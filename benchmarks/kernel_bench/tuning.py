"""Chooses launch configurations by measuring: candidates are data; the best right one goes into the chip's table."""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from compile_kernels import faults
from kernel_bench.cases import BATCH, MEMORY_OPS, ROWS, attention_case, decode_case, head_loss_case
from kernel_bench.checks import architecture
from kernel_bench.harness import Bench, Case, Draw, call, check, on_all_cores, outcome, short
from torch import Tensor

from trimaran.kernels.ahead_of_time import SHARED_LIMIT_BYTES, compiling_for
from trimaran.kernels.dispatch import TRITON, KernelSet
from trimaran.kernels.launch import chip_of, interpreting, tuned_table

Config = dict[str, int]
Table = dict[str, Any]
CASE_OF_KEY = Callable[[str, bool], Case]
"""(key of the table, whether small) -> a call that uses that configuration: large to be timed, small to be compared."""


@dataclass(frozen=True)
class Tunable:
    """One op of the tables.

    Args:
        ranges: the values that each constant is tried at; constants that are not named stay as they are.
        time: which pass the configuration shows in; None: the one that the key begins with.
        case: see `CASE_OF_KEY`.
        timed: the large call, where it is another one than the small.
    """

    ranges: dict[str, tuple[int, ...]]
    time: Literal["forward", "backward", "both"] | None
    case: CASE_OF_KEY
    timed: CASE_OF_KEY | None = None


def _memory(name: str, key: str, small: bool) -> Case:
    op = MEMORY_OPS[name]
    rows, width = (3, 32) if small else (ROWS // BATCH, op.widths[0])
    return Case(name, partial(op.make, rows=rows, width=width), op.run)


def _norm(key: str, small: bool) -> Case:
    """Keys are pass_bytes_kind: a row's bytes, rounded up to a power of two, and rms where the two norms differ."""
    found = re.fullmatch(r"(?:forward|backward)(?:_(\d+))?(?:_(rms|layer))?", key)
    assert found is not None, f"norm has a key {key} that is not understood"
    row_bytes, name = int(found[1] or 2048), "rms_norm" if found[2] == "rms" else "layer_norm"
    width = row_bytes // dtype_of(key).itemsize
    op = MEMORY_OPS[name]
    rows = 5 if small else max(64, (ROWS << 13) // row_bytes // BATCH)  # 256 MiB
    return Case(name, partial(op.make, rows=rows, width=width), op.run)


def _attention(key: str, small: bool, *, deterministic: bool = True) -> Case:
    found = re.fullmatch(r"(?:d(\d+)(_extras)?(?:_float32)?|default)", key)
    assert found is not None, f"attention has a key {key} that is not understood"
    head_dim = int(found[1] or 128)
    size: dict[str, Any] = (
        {"batch": 1, "seq": 40, "heads": 2} if small else {"batch": 4, "seq": 4096, "heads": 2048 // head_dim}
    )
    if key == "default":  # the pass over the output counts where sequences are short
        size = size if small else {"batch": 256, "seq": 64, "heads": 16}
    extras: dict[str, Any] = {"dropout": 0.1} if found[2] else {}
    return attention_case(key, **size, head_dim=head_dim, **extras, deterministic=deterministic)


def _head_loss(key: str, small: bool) -> Case:
    return head_loss_case(key, 7, 100, 16)


def _loss_pass(key: str, small: bool) -> Case:
    rows, vocab = (4, 64) if interpreting() else (4096, 50304)

    def make(draw: Draw) -> list[Tensor]:
        totals = torch.stack([torch.full((rows,), value, device=draw.device) for value in (4.0, 1e3)])
        return [draw(rows, vocab, grad=False), draw.ints(0, vocab, rows), totals]

    def run(kernels: KernelSet, logits: Tensor, labels: Tensor, totals: Tensor) -> Tensor:
        if key == "statistics":
            return kernels.cross_entropy.statistics_(logits, labels, 0, vocab)
        return kernels.cross_entropy.gradient_(logits, labels, 0, vocab, totals, totals, vocab)

    return Case(key, make, run)


DECODE_LENGTHS = (600, 8192)  # for the reference, for the clock: both of several splits, which are then combined


def _decode(key: str, small: bool) -> Case:
    found = re.fullmatch(r"(narrow|wide)_d(\d+)(?:_float32)?|combine|append", key)
    assert found is not None, f"decode has a key {key} that is not understood"
    queries = 8 if found[1] == "wide" else 1
    size: dict[str, Any] = (
        {"batch": 2, "heads": 8, "kv_heads": 2, "length": DECODE_LENGTHS[0]}
        if small
        else {"batch": 4, "heads": 32, "kv_heads": 8, "length": DECODE_LENGTHS[1]}
    )
    return decode_case(
        key, **size, queries=queries, head_dim=int(found[2] or 128), page=8 if small else 64, append=key == "append"
    )


def _decode_both(key: str, small: bool) -> Case:
    """A paged and a contiguous cache one after the other: they have stages of their own."""
    paged = _decode(key, small)
    length = DECODE_LENGTHS[0 if small else 1]

    def run(
        kernels: KernelSet, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, slopes: Tensor, table: Tensor
    ) -> tuple[Tensor, ...]:
        if key != "append":
            flat = [x[: len(q) * table.shape[1]].view(len(q), -1, *x.shape[2:])[:, :length] for x in (k, v)]
            kernels.decode_attention(q, *flat, lengths)
        found: tuple[Tensor, ...] = paged.run(kernels, q, k, v, lengths, slopes, table)
        return found

    return Case(key, paged.make, run)


_ELEMENTS = {"BLOCK": (512, 1024, 2048, 4096, 8192), "num_warps": (2, 4, 8)}
_TILES = {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
_BACKWARD_TILES = {
    "BLOCK_M": (32, 64, 128),
    "BLOCK_N": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3),
    "SPLIT": (False, True),
}
TUNABLES: dict[str, Tunable] = {
    "activation": Tunable(_ELEMENTS, "both", partial(_memory, "swiglu")),
    "adamw": Tunable(_ELEMENTS, "forward", partial(_memory, "adamw")),
    "attention_forward": Tunable(_TILES, "forward", _attention),
    "attention_backward_keys": Tunable(_BACKWARD_TILES, "backward", _attention),
    "attention_backward_queries": Tunable(_BACKWARD_TILES, "backward", _attention),
    "attention_backward_fused": Tunable(_BACKWARD_TILES, "backward", partial(_attention, deterministic=False)),
    "attention_statistics": Tunable({"ROWS": (8, 16, 32, 64, 128), "num_warps": (2, 4, 8)}, "backward", _attention),
    "cross_entropy": Tunable(
        {
            "LANES": (128, 256, 512, 1024), "VECTOR": (4, 8, 16), "BLOCK": (1024, 2048, 4096, 8192),
            "num_warps": (4, 8, 16),
        },
        "forward", _head_loss, _loss_pass,
    ),
    "decode": Tunable(
        {
            "BLOCK_N": (32, 64, 128), "PROGRAMS": (1, 2), "num_stages": (2, 3), "PAGED_STAGES": (3, 5),
            "BLOCK": (8, 16, 1024, 2048), "num_warps": (4, 8),
        },
        "forward", _decode, _decode_both,
    ),
    "dropout": Tunable(_ELEMENTS, "both", partial(_memory, "dropout_add")),
    "norm": Tunable(
        {
            "TILE": (4096, 8192, 16384, 32768), "PROGRAMS": (1, 2, 4), "STAGES": (1, 3), "RELOAD": (0, 1),
            "num_warps": (4, 8, 16, 32),
        },
        None, _norm,
    ),
    "rotary": Tunable(_ELEMENTS, "both", partial(_memory, "rotary")),
}  # fmt: skip
"""Op of the tables -> how it is tuned."""
HEADER = (
    "key",
    "candidates",
    "do not compile or spill",
    "do not run",
    "wrong",
    "before, us",
    "best, us",
    "configuration",
)
BEST = HEADER.index("best, us")
SMOKE_KEYS, SMOKE_CANDIDATES = 1, 2
# the present configuration stays where another is faster by less than this: noise alone must not change a table
KEEP = 0.99


def candidates(current: Config, ranges: dict[str, tuple[int, ...]]) -> list[Config]:
    """Return the configurations to try, the present one first."""
    names = [name for name in current if name in ranges]
    tried = [
        {**current, **dict(zip(names, values, strict=True))}
        for values in itertools.product(*(ranges[name] for name in names))
    ]
    return [current, *(config for config in tried if config != current)]


def dtype_of(key: str) -> torch.dtype:
    """Return the dtype of a key's calls."""
    only_float32 = key.endswith(("_float32", "_262144"))  # no norm is wider than 65536
    return torch.float32 if interpreting() or only_float32 else torch.bfloat16


def format_table(table: Table) -> str:
    """Return a table as its file has it, one line a key."""
    ops = []
    for op, entry in sorted(table["ops"].items()):
        rows = ",\n".join(
            f"        {json.dumps(key)}: {json.dumps(config)}" for key, config in entry["configs"].items()
        )
        ops.append(
            f'    "{op}": {{\n      "measured": {json.dumps(entry["measured"])},\n'
            f'      "configs": {{\n{rows}\n      }}\n    }}'
        )
    return f'{{\n  "chip": "{table["chip"]}",\n  "ops": {{\n' + ",\n".join(ops) + "\n  }\n}\n"


CompileJob = tuple[str, str, Config, Table, int]
"""(op, key, candidate, the table's ops, compute capability times ten)."""


def compile_candidate(job: CompileJob) -> str | None:
    """Compile a candidate, which leaves its kernels in Triton's cache on disk; return what is wrong with it."""
    op, key, config, ops, arch = job
    tunable = TUNABLES[op]
    case = (tunable.timed or tunable.case)(key, False)
    with compiling_for(arch) as kernels:
        tuned_table(chip_of(torch.device("meta")))["ops"] = {
            **ops,
            op: {**ops[op], "configs": {**ops[op]["configs"], key: config}},
        }
        error = outcome(lambda: call(case, TRITON, Draw(torch.device("meta"), dtype_of(key))))
    if isinstance(error, Exception):
        return short(error)
    return next((f"{kernel.name}: {fault}" for kernel in kernels for fault in faults(kernel)), None)


def seconds(bench: Bench, tunable: Tunable, key: str, inputs: Sequence[Tensor], run: Callable[..., Any]) -> float:
    """Return the time of what a configuration shows in."""
    which = tunable.time or key.partition("_")[0]
    if which == "forward":
        return bench.timer.seconds(lambda: run(*inputs))
    forward, backward = bench.timer.directions(run, inputs)
    assert backward is not None
    return backward if which == "backward" else forward + backward


def best_of(
    bench: Bench, op: str, key: str, configs: Sequence[Config], entry: Config
) -> tuple[list[tuple[float, Config]], int]:
    """Return (seconds, configuration) of those that ran, fastest first, and how many did not run.

    The table's own configuration stays first unless another is clearly faster.

    Args:
        entry: what the table hands out for the key: it is made into each configuration in turn.
    """
    tunable, dtype, ran = TUNABLES[op], dtype_of(key), []
    case = (tunable.timed or tunable.case)(key, bench.smoke)
    inputs = case.make(Draw(bench.device, dtype))
    for config in configs:
        entry.clear()
        entry.update(config)
        found = outcome(partial(seconds, bench, tunable, key, inputs, partial(case.run, TRITON)))
        if not isinstance(found, Exception):  # such as too much shared memory, or constants that do not fit together
            ran.append((found, config))
    return sorted(ran, key=lambda pair: pair[0] * (KEEP if pair[1] == configs[0] else 1.0)), len(configs) - len(ran)


def tune_op(bench: Bench, op: str, only: Sequence[str], table: Table) -> list[list[str]]:
    """Put the fastest right configuration of each key of `op` into the table; return the rows of the report.

    Args:
        only: the keys to tune; empty for all.
    """
    tunable, entries, arch = TUNABLES[op], table["ops"][op]["configs"], architecture(bench.device)
    keys = [key for key in entries if not only or key in only][: SMOKE_KEYS if bench.smoke else None]
    tried = {
        key: candidates(dict(entries[key]), tunable.ranges)[: SMOKE_CANDIDATES if bench.smoke else None] for key in keys
    }
    refused: dict[str, list[int]] = {key: [] for key in keys}
    if arch in SHARED_LIMIT_BYTES:
        jobs = [(op, key, config, table["ops"], arch) for key in keys for config in tried[key][1:]]
        places = [(key, index) for key in keys for index in range(1, len(tried[key]))]
        for (key, index), fault in zip(places, on_all_cores(compile_candidate, jobs), strict=True):
            if fault is not None:
                refused[key].append(index)
    rows = []
    for key in keys:
        before, fit = tried[key][0], [config for index, config in enumerate(tried[key]) if index not in refused[key]]
        ran, stopped = best_of(bench, op, key, fit, entries[key])
        was = next((time for time, config in ran if config == before), None)
        chosen, wrong = None, 0
        for time, config in ran:
            entries[key].clear()
            entries[key].update(config)
            found = outcome(partial(check, tunable.case(key, True), dtype_of(key), bench.device))
            if not isinstance(found, Exception) and found[0] <= found[1]:
                chosen = time
                break
            wrong += 1
        if chosen is None:
            entries[key] = before
            bench.failures.append(f"{op} {key}: no configuration is right")
        counts = [str(len(tried[key])), str(len(refused[key])), str(stopped), str(wrong)]
        micros = ["-" if value is None else f"{1e6 * value:.1f}" for value in (was, chosen)]
        rows.append([key, *counts, *micros, json.dumps(entries[key]).strip("{}")])
    return rows


def tune(bench: Bench, ops: Sequence[str], only: Sequence[str], folder: Path) -> None:
    """Tune `ops` (of `only` these keys, unless it is empty) and write the chip's table in `folder` after each.

    An op's date of measurement changes only where every key of it was chosen in this run.
    """
    chip = chip_of(bench.device)
    if chip == "generic":
        raise SystemExit(
            "kernels/tuned has no table of this chip's own, and generic.json must suit every chip: it is not tuned"
        )
    file = folder / f"{chip}.json"
    table = tuned_table(chip)
    table.update(json.loads(file.read_text(encoding="utf-8")))  # the very table that the ops look into
    for op in (op for op in ops if op in table["ops"]):
        rows = bench.attempt(op, partial(tune_op, bench, op, only, table))
        if rows:
            bench.report.table(f"Tuning of {op} for {chip}", HEADER, rows)
            if len(rows) == len(table["ops"][op]["configs"]) and all(row[BEST] != "-" for row in rows):
                table["ops"][op]["measured"] = datetime.now(UTC).date().isoformat()
            file.write_text(format_table(table), encoding="utf-8")
