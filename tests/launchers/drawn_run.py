"""Runs of a tiny model with random weights, and commands on them in this process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import tokenizers
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from tests.launchers.runs import text_of
from trimaran.launchers.cli.app import app
from trimaran.launchers.rendezvous.store import single_process
from trimaran.launchers.worker.process_group import join_world
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.spec import dump_spec, parse_spec
from trimaran.runtime.train.state import TrainState, save_state
from trimaran.runtime.train.train_context import TrainContext, build_train_context


def tokenizer_of_words(*special: str) -> tokenizers.Tokenizer:
    """Return a tokenizer of 300 tokens and the special ones."""
    inner = tokenizers.Tokenizer.from_str(Tokenizer.train([text_of(300)], 300).definition)
    inner.add_special_tokens(list(special))
    return inner


def drawn_run(
    folder: Path,
    tokenizer: tokenizers.Tokenizer,
    context: int,
    *,
    init_std: float = 0.4,
    steps: Sequence[int] = (0,),
    change: Callable[[TrainContext, int], None] = lambda train_context, step: None,
) -> Path:
    """Write a run folder with a spec, a tokenizer and checkpoints of random weights; return it.

    Args:
        context: tokens, the longest text of the model.
        steps: of the checkpoints, before each of which `change` gets at the weights.
    """
    spec = parse_spec(
        {
            "model": {
                "num_layers": 2, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24,
                "vocab_size": tokenizer.get_vocab_size(), "max_seq_len": context, "init_std": init_std,
            },
            "data": {"tokenizer_vocab_size": 300},
            "optimizer": {"lr": 1e-3},
            "train": {
                "num_steps": max(1, *steps), "global_batch_size": 2, "micro_batch_size": 1, "seq_len": context,
                "output_dir": str(folder),
            },
            "launcher": {"device": "cpu", "threads_per_rank": 1, "timeout_s": 200},
        }
    )  # fmt: skip
    mesh = join_world(spec, torch.device("cpu"), single_process())
    train_context = build_train_context(spec, mesh, torch.device("cpu"))
    for step in steps:
        change(train_context, step)
        save_state(train_context, TrainState(step=step, tokens_seen=1000 * step))
    mesh.close()
    dist.destroy_process_group()
    (folder / "spec.yaml").write_text(dump_spec(spec))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class Answer(NamedTuple):
    """How a command ended in this process."""

    code: int
    out: str
    err: str


def invoke(*words: str) -> Answer:
    """Run a command of one rank in this process, on one thread: more are slow where other tests want the cores."""
    with patch("trimaran.launchers.worker.run.threads_of_rank", lambda spec, found, rank: 1), torch_as_it_was():
        result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    return Answer(result.exit_code, result.stdout, result.stderr)


@contextmanager
def torch_as_it_was() -> Iterator[None]:
    """Undo what a command does to the whole process, which would have been its own."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if dist.is_initialized():  # an error left it
            dist.destroy_process_group()
