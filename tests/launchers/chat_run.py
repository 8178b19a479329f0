"""A run of a tiny model with random weights and a chat template, which several files talk to."""

import json
import shutil
from pathlib import Path

import tokenizers
import torch
import torch.distributed as dist

from tests.launchers.runs import text_of
from tests.runtime.test_infer_dialogue import CHATML
from tests.session import made_once, session_folder
from trimaran.launchers.rendezvous.store import single_process
from trimaran.launchers.worker.process_group import join_world
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.spec import dump_spec, parse_spec
from trimaran.runtime.train.state import TrainState, save_state
from trimaran.runtime.train.train_context import build_train_context

CONTEXT = 256


def chat_run(folder: Path, *, has_template: bool = True) -> Path:
    """Return a copy of the run in a folder, with or without its chat template."""
    run = folder / ("talker" if has_template else "writer")
    shutil.copytree(made_once(_make), run)
    if not has_template:
        (run / "chat_template.jinja").unlink()
    return run


def _make() -> Path:
    inner = tokenizers.Tokenizer.from_str(Tokenizer.train([text_of(300)], 300).definition)
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    run = session_folder() / "talker"
    spec = parse_spec(
        {
            "model": {
                "num_layers": 2, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24,
                "vocab_size": inner.get_vocab_size(), "max_seq_len": CONTEXT, "init_std": 0.4,
            },
            "data": {"tokenizer_vocab_size": 300},
            "optimizer": {"lr": 1e-3},
            "train": {
                "num_steps": 1, "global_batch_size": 2, "micro_batch_size": 1, "seq_len": CONTEXT,
                "output_dir": str(run),
            },
            "launcher": {"device": "cpu", "threads_per_rank": 1, "timeout_s": 200},
        }
    )  # fmt: skip
    mesh = join_world(spec, torch.device("cpu"), single_process())
    save_state(build_train_context(spec, mesh, torch.device("cpu")), TrainState())
    mesh.close()
    dist.destroy_process_group()
    (run / "spec.yaml").write_text(dump_spec(spec))
    inner.save(str(run / "tokenizer.json"))
    (run / "chat_template.jinja").write_text(CHATML)
    (run / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return run
