"""`trimaran generate` on the ranks: load the weights of a checkpoint; rank 0 prints the continuations."""

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trimaran.launchers.env.exit_codes import Stopped
from trimaran.launchers.terminal import say, writing_output
from trimaran.launchers.worker.tasks import GenerateTask, TaskPrompt
from trimaran.models.fields import counted
from trimaran.models.transformer import Stage
from trimaran.runtime.adapters.merged import open_whole
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.files import naming
from trimaran.runtime.infer.generate import check_weights, generate
from trimaran.runtime.infer.packing import pack_weights
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
    checkpoint = open_whole(task.checkpoint)
    verify_together(checkpoint, mesh)
    for stage in stages.values():
        stage.load(checkpoint.read)
    check_weights(stages, mesh, str(checkpoint.path))
    pack_weights(stages, mesh)
    output = Output(task.output, is_open=mesh.rank == 0)
    if not task.as_json:
        completions = [_stream(task, tokenizer, stages, mesh, spec, output)]
    else:
        completions = []
        for first, batch in _batches(task):
            completions += _print_records(task, first, batch, tokenizer, stages, mesh, spec, output)
    if mesh.rank == 0:
        output.report()
        _report_full_contexts(completions, spec.transformer.max_seq_len)
    return 0


class Output:
    """A file, or standard output in whatever encoding it has, on the rank that writes it.

    Characters that the encoding lacks become "?" in plain text, and \\uXXXX in JSON.

    Args:
        file: None for standard output.
        is_open: whether this rank writes.
    """

    def __init__(self, file: Path | None = None, *, is_open: bool) -> None:
        self._is_open, self._replaced, self._file = is_open, 0, file
        self._encoding = (file is None and getattr(sys.stdout, "encoding", None)) or "utf-8"

    def write(self, text: str, end: str = "") -> None:
        """Write text at once. Raises Stopped where the reader is gone."""
        if not self._is_open:
            return
        shown = text.encode(self._encoding, "replace").decode(self._encoding)
        self._replaced += sum(first != second for first, second in zip(text, shown, strict=False))
        if self._file is not None:
            with naming(self._file), self._file.open("a", encoding="utf-8") as file:
                file.write(shown + end)
            return
        try:
            with writing_output():
                print(shown, end=end, flush=True)
        except BrokenPipeError:
            raise Stopped(signal.SIGPIPE) from None

    def write_json(self, record: dict[str, Any]) -> None:
        """Write a record as a line. Raises Stopped where the reader is gone."""
        line = json.dumps(record, ensure_ascii=False)
        try:
            line.encode(self._encoding)
        except UnicodeEncodeError:
            line = json.dumps(record)
        self.write(line, end="\n")

    def report(self) -> None:
        """Say how many characters were replaced."""
        if self._replaced:
            say(
                f"{counted(self._replaced, 'character')} shown as ?, because standard output is in {self._encoding}, "
                "which lacks them; set PYTHONIOENCODING=utf-8, or the locale to UTF-8"
            )


def _stream(
    task: GenerateTask, tokenizer: Tokenizer, stages: dict[int, Stage], mesh: Mesh, spec: RunSpec, output: Output
) -> Completion:
    """Continue the one prompt and print the text token by token; a prompt that is no conversation is printed first."""
    (prompt,) = task.prompts
    stream, shown = TextStream(tokenizer, prompt.tokens, task.stop_strings), 0

    def show() -> None:
        nonlocal shown
        output.write(stream.text[shown:])
        shown = len(stream.text)

    def watch(sample: int, token: int) -> bool:
        stopped = stream.add(token)
        show()
        return stopped

    output.write("" if prompt.is_chat else prompt.text or "")
    (completion,) = generate(stages, mesh, spec, [prompt.tokens], task.sampling, watch)
    stream.finish()
    show()
    output.write("", end="\n")
    return completion


def _print_records(
    task: GenerateTask,
    first: int,
    batch: Sequence[TaskPrompt],
    tokenizer: Tokenizer,
    stages: dict[int, Stage],
    mesh: Mesh,
    spec: RunSpec,
    output: Output,
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
        output.write_json(record)
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
