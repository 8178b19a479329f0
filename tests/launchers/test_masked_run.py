"""Models that predict hidden tokens, through the command line: they learn, resume bit for bit and continue no text."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.launchers.runs import Workplace, losses, make_workplace, trimaran
from trimaran.runtime.data.prepare import open_prepared
from trimaran.runtime.train.metrics import read_metrics

pytestmark = pytest.mark.slow
ENCODER = {
    "norm": "layernorm", "norm_position": "post", "activation": "gelu", "bias": True, "init": "normal",
    "init_std": 0.15, "head_bias": True, "tie_embeddings": True, "hidden_size": 32,
}  # fmt: skip
MASKED = ENCODER | {
    "objective": "masked_lm", "position": "learned", "embedding_norm": True, "num_token_types": 2,
    "head_transform": True,
}  # fmt: skip
PERMUTED = ENCODER | {
    "objective": "permutation_lm", "position": "relative", "qkv_bias": False, "out_bias": False,
}  # fmt: skip


SENTENCE = "two by two, "


def entropy_of_tokens(workplace: Workplace) -> float:
    """Nats of a token of the training text by how often each comes: what a model without a context could learn."""
    (folder,) = (workplace.folder / "cache" / "data").iterdir()
    shards = open_prepared(folder).train
    counts = np.bincount(shards.read(0, shards.num_tokens))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize("model", [MASKED, PERMUTED], ids=["masked", "permuted"])
def test_a_run_learns_resumes_at_the_same_numbers_and_writes_no_sample(
    model: dict[str, object], tmp_path: Path
) -> None:
    workplace = make_workplace(
        tmp_path / "whole",
        model=model,
        parallel={"tp": 1, "pp": 2},
        optimizer={"lr": 6e-3, "betas": [0.9, 0.98]},
        lr_schedule={"name": "linear", "warmup_steps": 20},
        train={"num_steps": 110, "global_batch_size": 16, "micro_batch_size": 8, "eval_interval": 40},
        checkpoint={"interval": 90},
    )
    (workplace.folder / "corpus.txt").write_text(f"{SENTENCE * 100}\n" * 30)
    done = workplace.train()
    assert done.code == 0, done.err
    last = [float(row["loss"] or 0) for row in workplace.rows()][-25:]
    assert sum(last) / len(last) < 0.8 * entropy_of_tokens(workplace)
    held_out = [row["held_out_loss"] for row in read_metrics(workplace.run / "metrics.jsonl") if "held_out_loss" in row]
    assert abs(float(held_out[-1] or 0) - sum(last) / len(last)) < 0.5
    assert not (workplace.run / "sample.txt").exists()
    assert "trimaran generate" not in done.err

    shutil.copytree(workplace.folder, tmp_path / "again")
    again = Workplace(tmp_path / "again")
    shutil.rmtree(again.checkpoints / "step-00000110")
    override = f"train.output_dir={again.run}"
    done = again.train(override)
    assert done.code == 0, done.err
    assert "resuming at step 90" in done.out
    assert losses(again) == losses(workplace)

    refused = trimaran(workplace.folder, "generate", str(workplace.run), "--prompt", "a")
    assert refused.code != 0
    assert (
        f"objective {model['objective']} predicts hidden tokens from both sides and continues no text"
        in refused.last_line
    )
