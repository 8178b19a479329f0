"""What short finetuning teaches a small model, on examples that are held out: by `trimaran train` on a CPU.

    python benchmarks/finetune_learns.py sft --data instruction-data.json
    python benchmarks/finetune_learns.py dpo --data instruction-data-with-preference.json
    python benchmarks/finetune_learns.py sft --data instruction-data.json --base runs/smollm2-135m

FILE is a JSON list of {instruction, input, output}, for dpo with {chosen, rejected}. Without --base (a run that
`trimaran import` or `train` has made) a small model is trained on the quickstart's text first, and for dpo on the
chosen answers of two fifths of the pairs, which it does not see again: a reference must write answers.
`sft` prints the loss of held-out answers before and after fewer than 1,000 examples; `dpo` the share of held-out pairs
whose chosen answer gains more log-probability from the reference's than the rejected one, which is a half for a model
that has learned nothing. Before: a step of rate 1e-30 changes no weight. The settings are those below; a tenth of the
records, for dpo a fifth, is held out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Sections = dict[str, dict[str, Any]]
PRETRAINING: Sections = {
    "model": {
        "num_layers": 4, "hidden_size": 128, "num_heads": 4, "ffn_hidden_size": 344, "max_seq_len": 256,
        "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": True,
    },
    "data": {"source": ["quickstart"], "tokenizer_vocab_size": 1024},
    "optimizer": {"lr": 2e-3},
    "train": {"num_steps": 150, "global_batch_size": 8, "micro_batch_size": 8, "seq_len": 128},
}  # fmt: skip
SETTINGS: dict[str, Sections] = {
    "sft": {
        "finetune": {"method": "sft", "loss_on": "answers", "chat_template": "chatml"},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0},
        "train": {"num_steps": 60, "global_batch_size": 16, "micro_batch_size": 16, "seq_len": 256},
    },
    "dpo": {
        "finetune": {"method": "preference", "preference": {"loss": "dpo", "beta": 0.1}, "chat_template": "chatml"},
        "optimizer": {"lr": 3e-4, "weight_decay": 0.0},
        "data": {"held_out_fraction": 0.2},
        "train": {"num_steps": 40, "global_batch_size": 16, "micro_batch_size": 16, "seq_len": 256},
    },
}
LARGE: dict[str, Sections] = {
    "sft": {"optimizer": {"lr": 5e-5}, "train": {"num_steps": 16, "global_batch_size": 4, "micro_batch_size": 1}},
    "dpo": {"optimizer": {"lr": 1e-5}, "train": {"num_steps": 12, "global_batch_size": 4, "micro_batch_size": 1}},
}
"""What changes with --base, which is meant for a model of the size of SmolLM2-135M."""
FIGURES = {"sft": "held_out_loss", "dpo": "held_out_accuracy"}


def records_of(file: Path, method: str, most: int) -> list[dict[str, str]]:
    """Return the first records of the file, as trimaran reads them; pairs of two equal answers are left out."""
    raw = json.loads(file.read_text(encoding="utf-8"))[:most]
    if method == "sft":
        return [{key: each[key] for key in ("instruction", "input", "output")} for each in raw]
    return [
        {
            "prompt": "\n".join(filter(None, (each["instruction"], each["input"]))),
            "chosen": each["chosen"],
            "rejected": each["rejected"],
        }
        for each in raw
        if each["chosen"] != each["rejected"]
    ]


def merged(*parts: Sections) -> Sections:
    """Return sections with the fields of all parts, of which later ones count more."""
    found: Sections = {}
    for part in parts:
        for section, fields in part.items():
            found[section] = {**found.get(section, {}), **fields}
    return found


def train(folder: Path, name: str, spec: Sections, threads: int) -> dict[str, float]:
    """Train the spec in a run folder of this name; return the figures of the last evaluation."""
    common: Sections = {
        "data": {
            "cache_dir": str(folder / "cache"),
            "held_out_fraction": 0.02 if name == "base" else 0.1,
            "max_lost_fraction": 0.2,
        },
        "lr_schedule": {"name": "cosine", "warmup_steps": 0},
        "train": {"output_dir": str(folder / name), "eval_batches": 8, "eval_interval": 1000000},
        "launcher": {"device": "cpu", "threads_per_rank": threads, "timeout_s": 3000},
        "logging": {"tensorboard": False, "interval": 10},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(merged(common, spec)), encoding="utf-8")
    command = sys.executable, "-m", "trimaran.launchers.cli.app", "train", folder / f"{name}.yaml"
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found: dict[str, float] = [row for row in rows if "held_out_loss" in row][-1]
    return found


def started_from(base: Path, records: Path, settings: Sections) -> Sections:
    """Return the spec of a run that starts from `base` and learns from the records."""
    spec = yaml.safe_load((base / "spec.yaml").read_text(encoding="utf-8"))
    tokenizer = {"tokenizer_vocab_size": spec["data"]["tokenizer_vocab_size"]}
    data = {"source": [str(records)], **tokenizer}
    return merged({"model": spec["model"], "checkpoint": {"init_from": str(base)}, "data": data}, settings)


def write_records(file: Path, records: Sequence[dict[str, str]]) -> Path:
    """Write a JSONL file; return it."""
    file.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), encoding="utf-8")
    return file


def small_base(method: str, records: Sequence[dict[str, str]], folder: Path, threads: int) -> Path:
    """Train a small model, which for dpo learns to answer from the chosen answers of `records`; return its run."""
    train(folder, "base", PRETRAINING, threads)
    if method == "sft":
        return folder / "base"
    answers = [{"prompt": each["prompt"], "completion": each["chosen"]} for each in records]
    file = write_records(folder / "answers.jsonl", answers)
    train(folder, "answers", started_from(folder / "base", file, SETTINGS["sft"]), threads)
    return folder / "answers"


def main(argv: Sequence[str] | None = None) -> int:
    """Train and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=SETTINGS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--most", type=int, default=990, help="records that are read")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    method, threads = arguments.method, arguments.threads
    records = records_of(arguments.data, method, arguments.most)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, settings = arguments.base, SETTINGS[method]
        if base is None:
            count = len(records) if method == "sft" else len(records) * 3 // 5
            base = small_base(method, records[count:], folder, threads)
            records = records[:count]
        else:
            settings = merged(settings, LARGE[method])
        file = write_records(folder / "records.jsonl", records)
        spec = started_from(base.resolve(), file, settings)
        still: Sections = {"optimizer": {"lr": 1e-30}, "train": {"num_steps": 1}}
        before = train(folder, "before", merged(spec, still), threads)
        begin = time.perf_counter()
        after = train(folder, "after", spec, threads)
        seconds = time.perf_counter() - begin
    figure = FIGURES[method]
    print(f"{len(records)} records, some of them held out; {spec['train']['num_steps']} steps in {seconds:.0f} s")
    for key in sorted(after):
        print(f"  {key}: {before[key]:.4f} -> {after[key]:.4f}")
    if method == "sft":
        print(f"{figure}: {1 - after[figure] / before[figure]:.1%} lower")
    else:
        print(f"{figure}: {100 * (after[figure] - 0.5):+.1f} points from a half, which is chance")
    return 0


if __name__ == "__main__":
    sys.exit(main())
