"""What each rank does for `trimaran generate`: load the weights of a checkpoint and print continuations on rank 0."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from trimaran.launchers.cli.console import say
from trimaran.models.transformer import Stage
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.data.tokenizer import Tokenizer
from trimaran.runtime.infer.generate import generate
from trimaran.runtime.infer.sample_group import Completion
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.infer.text import TextStream
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.state import verify_together
from trimaran.runtime.train.train_context import build_stages_of_rank


class TaskPrompt(BaseModel):
    """One prompt as token ids; `text` as the user gave it, None where that was messages; `name` of the file of prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tokens: tuple[int, ...]
    text: str | None
    is_chat: bool
    name: str | int | None


class GenerateTask(BaseModel):
    """Continue prompts from a checkpoint; the layout is that of `spec`, whatever wrote the checkpoint.

    Args:
        as_json: print each result as a line of JSON; else there is one prompt, and its text is printed as it comes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["generate"] = "generate"
    spec: Path
    checkpoint: Path
    tokenizer: Path
    prompts: tuple[TaskPrompt, ...]
    sampling: SamplingParams
    stop_strings: tuple[str, ...]
    batch_size: int
    as_json: bool


def run_generate(task: GenerateTask, spec: RunSpec, mesh: Mesh, device: torch.device) -> int:
    """Print the continuations on rank 0; return the exit code. Collective over the world."""
    tokenizer = Tokenizer.load(task.tokenizer)
    stages = build_stages_of_rank(spec, mesh, device, draws_weights=False)
    checkpoint = Checkpoint.open(task.checkpoint, verify=False)
    verify_together(checkpoint, mesh)
    for stage in stages.values():
        stage.load(checkpoint.read)
    if not task.as_json:
        completions = [_print_as_it_comes(task, tokenizer, stages, mesh, spec)]
    else:
        completions = []
        for first, batch in _batches(task):
            completions += _print_records(task, first, batch, tokenizer, stages, mesh, spec)
    if mesh.rank == 0:
        _tell_of_full_contexts(completions, spec.transformer.max_seq_len)
    return 0


def _print_as_it_comes(
    task: GenerateTask, tokenizer: Tokenizer, stages: dict[int, Stage], mesh: Mesh, spec: RunSpec
) -> Completion:
    """Continue the one prompt; print it, unless it is a conversation, and the continuation."""
    (prompt,) = task.prompts
    stream, shown = TextStream(tokenizer, prompt.tokens, task.stop_strings), 0

    def show() -> None:
        nonlocal shown
        if mesh.rank == 0:
            print(stream.text[shown:], end="", flush=True)
        shown = len(stream.text)

    def watch(sample: int, token: int) -> bool:
        stopped = stream.add(token)
        show()
        return stopped

    if mesh.rank == 0:
        print("" if prompt.is_chat else prompt.text or "", end="", flush=True)
    (completion,) = generate(stages, mesh, spec, [prompt.tokens], task.sampling, watch)
    stream.finish()
    show()
    if mesh.rank == 0:
        print(flush=True)
    return completion


def _print_records(
    task: GenerateTask,
    first: int,
    batch: Sequence[TaskPrompt],
    tokenizer: Tokenizer,
    stages: dict[int, Stage],
    mesh: Mesh,
    spec: RunSpec,
) -> list[Completion]:
    """Continue prompts together and print a line of JSON for each."""
    streams = [TextStream(tokenizer, prompt.tokens, task.stop_strings) for prompt in batch]

    def watch(sample: int, token: int) -> bool:
        return streams[sample - first].add(token)

    completions = generate(
        stages, mesh, spec, [prompt.tokens for prompt in batch], task.sampling, watch, first_sample=first
    )
    for index, (prompt, stream, completion) in enumerate(zip(batch, streams, completions, strict=True), first):
        stream.finish()
        record: dict[str, Any] = {"index": index} | ({} if prompt.name is None else {"id": prompt.name})
        record |= {} if prompt.text is None else {"prompt": prompt.text}
        record |= {"text": stream.text, "finish": completion.finish, "new_tokens": len(completion.tokens)}
        if mesh.rank == 0:
            print(json.dumps(record, ensure_ascii=False), flush=True)
    return completions


def _batches(task: GenerateTask) -> Iterator[tuple[int, Sequence[TaskPrompt]]]:
    """The prompts in batches, in order, each with the number of its first."""
    for first in range(0, len(task.prompts), task.batch_size):
        yield first, task.prompts[first : first + task.batch_size]


def _tell_of_full_contexts(completions: Sequence[Completion], max_seq_len: int) -> None:
    """Say what was left out of the model's sight, which the text does not show."""
    slid, stopped = sum(each.slides > 0 for each in completions), sum(each.finish == "context" for each in completions)
    if slid:
        say(
            f"{slid} of {len(completions)} texts filled the model's context of {max_seq_len} tokens and went on from its newer half (--context slide)"
        )
    if stopped:
        say(
            f"{stopped} of {len(completions)} texts ended because the model's context of {max_seq_len} tokens was full (--context stop)"
        )
