"""What short finetuning teaches a small model, on examples that are held out: by `trimaran train` on a CPU.

    trimaran import SmolLM2-135M-Instruct.Q4_1.gguf runs/base
    python benchmarks/finetune_learns.py sft --base runs/base --data instruction-data.json
    python benchmarks/finetune_learns.py dpo --base runs/base --data instruction-data-with-preference.json

FILE is a JSON list of {instruction, input, output}, for dpo with {chosen, rejected}. `sft` prints the loss of held-out
answers before and after fewer than 1,000 examples; `dpo` the share of held-out pairs whose chosen answer gains more of
its log-probability, from the reference's, than the rejected one, which is a half for a model that has learned nothing.
Before: a step of rate 1e-30 changes no weight. The settings are those below; a tenth of the records is held out.
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

SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {
        "finetune": {"method": "sft", "loss_on": "answers"},
        "optimizer": {"lr": 5e-5, "weight_decay": 0.0},
        "train": {"num_steps": 16, "global_batch_size": 4, "micro_batch_size": 1, "seq_len": 256, "eval_batches": 4},
    },
    "dpo": {
        "finetune": {"method": "preference", "preference": {"loss": "dpo", "beta": 0.1}},
        "optimizer": {"lr": 1e-5, "weight_decay": 0.0},
        "train": {"num_steps": 12, "global_batch_size": 4, "micro_batch_size": 1, "seq_len": 512, "eval_batches": 4},
    },
}
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


def spec_of(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the spec of the run in `folder`."""
    base = yaml.safe_load((arguments.base / "spec.yaml").read_text(encoding="utf-8"))
    settings = json.loads(json.dumps(SETTINGS[arguments.method]))
    settings["train"] |= {"output_dir": str(folder / "run")}
    if arguments.steps:
        settings["train"]["num_steps"] = arguments.steps
    return {
        "model": base["model"],
        "data": {
            "source": [str(folder / "records.jsonl")],
            "cache_dir": str(folder / "cache"),
            "held_out_fraction": 0.1,
        },
        "lr_schedule": {"name": "cosine", "warmup_steps": 2},
        "checkpoint": {"init_from": str(arguments.base.resolve())},
        "launcher": {"device": "cpu", "threads_per_rank": arguments.threads, "timeout_s": 3000},
        "logging": {"tensorboard": False},
        **settings,
    }


def last_figures(folder: Path, name: str, spec: dict[str, Any]) -> dict[str, float]:
    """Train the spec in a run folder of this name; return the figures of the last evaluation."""
    run = folder / name
    spec = {**spec, "train": {**spec["train"], "output_dir": str(run)}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    command = Path(sys.executable).with_name("trimaran"), "train", folder / f"{name}.yaml"
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found: dict[str, float] = [row for row in rows if "held_out_loss" in row][-1]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=SETTINGS)
    parser.add_argument(
        "--base", type=Path, required=True, help="run that `trimaran import` has made, or a trained one"
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--most", type=int, default=990, help="records that are read")
    parser.add_argument("--steps", type=int, help="in place of the settings'")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = records_of(arguments.data, arguments.method, arguments.most)
        lines = [json.dumps(each, ensure_ascii=False) for each in records]
        (folder / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        spec = spec_of(arguments, folder)
        still = {"optimizer": {**spec["optimizer"], "lr": 1e-30}, "train": {**spec["train"], "num_steps": 1}}
        before = last_figures(folder, "before", spec | still)
        begin = time.perf_counter()
        after = last_figures(folder, "after", spec)
        seconds = time.perf_counter() - begin
    figure = FIGURES[arguments.method]
    print(f"{len(records)} records, a tenth held out; {spec['train']['num_steps']} steps in {seconds:.0f} s")
    for key in sorted(after):
        print(f"  {key}: {before[key]:.4f} -> {after[key]:.4f}")
    if arguments.method == "sft":
        print(f"{figure}: {1 - after[figure] / before[figure]:.1%} lower")
    else:
        print(f"{figure}: {100 * (after[figure] - 0.5):+.1f} points from a half, which is chance")
    return 0


if __name__ == "__main__":
    sys.exit(main())
