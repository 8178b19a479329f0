"""`trimaran generate` on the ranks: load the weights of a checkpoint; rank 0 prints the continuations."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from trimaran.launchers.terminal import say
from trimaran.launchers.worker.tasks import GenerateTask, TaskPrompt
from trimaran.models.transformer import Stage
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.data.tokenizer import Tokenizer
from trimaran.runtime.infer.generate import generate
from trimaran.runtime.infer.sample_group import Completion
from trimaran.runtime.infer.text import TextStream
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.state import verify_together
from trimaran.runtime.train.train_context import build_stages_of_rank


def run_generate(task: GenerateTask, spec: RunSpec, mesh: Mesh, device: torch.device) -> int:
    """Print the continuations on rank 0; return the exit code. Collective over the world."""
    tokenizer = Tokenizer.load(task.tokenizer)
    stages = build_stages_of_rank(spec, mesh, device, draws_weights=False)
    checkpoint = Checkpoint.open(task.checkpoint, verify=False)
    verify_together(checkpoint, mesh)
    for stage in stages.values():
        stage.load(checkpoint.read)
    if not task.as_json:
        completions = [_stream(task, tokenizer, stages, mesh, spec)]
    else:
        completions = []
        for first, batch in _batches(task):
            completions += _print_records(task, first, batch, tokenizer, stages, mesh, spec)
    if mesh.rank == 0:
        _report_full_contexts(completions, spec.transformer.max_seq_len)
    return 0


def _stream(
    task: GenerateTask, tokenizer: Tokenizer, stages: dict[int, Stage], mesh: Mesh, spec: RunSpec
) -> Completion:
    """Continue the one prompt and print the text token by token; a prompt that is no conversation is printed first."""
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
    """Return the prompts in batches, in order, each with the index of its first prompt."""
    for first in range(0, len(task.prompts), task.batch_size):
        yield first, task.prompts[first : first + task.batch_size]


def _report_full_contexts(completions: Sequence[Completion], max_seq_len: int) -> None:
    """Report texts that filled the model's context, which the text itself does not show."""
    slid, stopped = sum(each.slides > 0 for each in completions), sum(each.finish == "context" for each in completions)
    if slid:
        say(
            f"{slid} of {len(completions)} texts filled the model's context of {max_seq_len} tokens and went on from "
            "its newer half (--context slide)"
        )
    if stopped:
        say(
            f"{stopped} of {len(completions)} texts ended because the model's context of {max_seq_len} tokens was full "
            "(--context stop)"
        )
