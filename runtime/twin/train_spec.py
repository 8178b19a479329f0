"""The run spec that trains a twin. No torch."""

import math
from pathlib import Path
from typing import Any, Final

from trimaran.runtime.data.files import DataError
from trimaran.runtime.files import write_text
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.spec.yaml_text import write_yaml
from trimaran.runtime.twin.decide import shape_of
from trimaran.runtime.twin.record import TWIN, TwinRecord

SPEC: Final = "train.yaml"
_ROW_TOKENS: Final = 512
_SCRATCH_ROW_TOKENS: Final = 256
_ROWS: Final = 4
_CHECKPOINTS: Final = 8
"""Along the run, all of them kept: the report measures each on held-out text, and picks."""
_CHARACTERS_PER_TOKEN: Final = 3.5
_HELD_OUT_FRACTION: Final = 0.05


def write_train_spec(output: Path, record: TwinRecord, base: RunSpec | None) -> Path:
    """Write the run spec of a twin into its folder and return its path.

    Args:
        output: the run folder.
        base: the spec of the model that is tuned; None for a model from scratch.

    Raises:
        DataError: the twin has no examples.
    """
    files = sorted((output / TWIN / "persona").glob("*.jsonl"))
    if not files:
        raise DataError(f"{output / TWIN / 'persona'} has no examples; build the twin again")
    spec = _scratch(output, record) if base is None else _adapter(output, record, base)
    spec["data"] = {
        "source": [str(path) for path in files],
        "cache_dir": str(output / TWIN / "cache"),
        "held_out_fraction": _HELD_OUT_FRACTION,
        **spec.get("data", {}),
    }
    path = output / TWIN / SPEC
    heading = f"# The training of a twin; trimaran twin train {output} runs it."
    write_text(path, f"{heading}\n{write_yaml(spec)}")
    return path


def _adapter(output: Path, record: TwinRecord, base: RunSpec) -> dict[str, Any]:
    """Return low-rank matrices beside the model's frozen weights (examples/lora.yaml)."""
    assert record.model is not None, "an adapter is of a model"
    seq_len = min(_ROW_TOKENS, base.transformer.max_seq_len)
    steps = math.ceil(record.epochs * record.characters / _CHARACTERS_PER_TOKEN / (seq_len * _ROWS))
    return {
        # What follows from other sections there, such as the size of a vocabulary, is written out.
        "model": base.model.model_dump(mode="json")
        | {"vocab_size": base.transformer.vocab_size, "max_seq_len": base.transformer.max_seq_len},
        "finetune": {
            "method": "sft",
            "truncation": "left",  # an answer stays whole
            "epochs": record.epochs,
            "adapter": {"rank": 16, "alpha": 32, "dropout": 0.05},
        },
        "optimizer": {"lr": 2e-4, "weight_decay": 0.0},
        **_common(output, steps, seq_len),
        "checkpoint": {"interval": _interval(steps), "keep_last": 2 * _CHECKPOINTS, "init_from": record.model},
    }


def _scratch(output: Path, record: TwinRecord) -> dict[str, Any]:
    steps = math.ceil(record.epochs * record.characters / _CHARACTERS_PER_TOKEN / (_SCRATCH_ROW_TOKENS * 2 * _ROWS))
    common = _common(output, steps, _SCRATCH_ROW_TOKENS)
    common["train"] |= {"num_steps": steps, "global_batch_size": 2 * _ROWS, "micro_batch_size": _ROWS}
    return {
        "model": shape_of(record.decision),
        "data": {"tokenizer_vocab_size": record.decision.vocabulary},
        "optimizer": {"lr": 2e-3, "weight_decay": 0.1},
        **common,
        "checkpoint": {"interval": _interval(steps), "keep_last": 2 * _CHECKPOINTS},
    }


def _common(output: Path, steps: int, seq_len: int) -> dict[str, dict[str, Any]]:
    return {
        "lr_schedule": {"name": "cosine", "warmup_steps": min(10, max(1, steps // 10)), "min_lr_ratio": 0.1},
        "train": {
            "global_batch_size": _ROWS,
            "micro_batch_size": 1,
            "seq_len": seq_len,
            "output_dir": str(output),
            "eval_interval": _interval(steps),
        },
    }


def _interval(steps: int) -> int:
    return max(1, steps // _CHECKPOINTS)
