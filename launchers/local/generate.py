"""The task of continuing prompts from a checkpoint, for whoever asks for it: the command line or Python."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trimaran.launchers.terminal import say
from trimaran.launchers.worker.tasks import GenerateTask, TaskPrompt
from trimaran.runtime.infer.prompts import Prompt
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.spec import dump_spec, fields_at_layout, parse_spec


@dataclass(frozen=True)
class Prompts:
    """What to continue, and how.

    Args:
        stop_strings: texts before which a continuation ends.
        stop_tokens: names of tokens after which it ends, beside the model's own.
        batch_size: how many are continued together.
    """

    inputs: Sequence[Prompt]
    sampling: SamplingParams
    stop_strings: Sequence[str] = ()
    stop_tokens: Sequence[str] = ()
    batch_size: int = 16


def write_generate_task(
    folder: Path, checkpoint: Path, asked: Prompts, *, as_json: bool, tp: int, pp: int, output: Path | None = None
) -> GenerateTask:
    """Write the task of ranks at tp x pp as folder/task.json, with everything checked that precedes the weights.

    Args:
        folder: for temporary files.
        as_json, output: as of GenerateTask.

    Raises:
        ValueError: the layout is impossible, or a prompt does not fit the model.
        CheckpointError: a file of the checkpoint is missing or cut.
    """
    from trimaran.runtime.checkpoint.reshard import Checkpoint
    from trimaran.runtime.infer.generate import check_prompts
    from trimaran.runtime.infer.prompts import RunText
    from trimaran.runtime.train.state import spec_of

    trained = spec_of(Checkpoint.open(checkpoint, verify=False))
    shared_memory = trained.parallel.shared_memory
    spec = parse_spec(fields_at_layout(trained, tp=tp, pp=pp, shared_memory=shared_memory, uneven_heads=True))
    text, vocab_size = RunText.open(checkpoint.parent.parent), spec.transformer.vocab_size
    stops = {*text.stop_tokens, *(text.id_of(name) for name in asked.stop_tokens)}
    if beyond := sorted(token for token in stops if token >= vocab_size):
        say(f"the model's vocabulary has {vocab_size} tokens, so no text ends at the stop token {beyond[0]}")
    encoded = [text.encode(each) for each in asked.inputs]
    check_prompts(encoded, spec.transformer)
    (folder / "spec.yaml").write_text(dump_spec(spec), encoding="utf-8")
    task = GenerateTask(
        spec=folder / "spec.yaml",
        checkpoint=checkpoint.resolve(),
        tokenizer=(text.folder / "tokenizer.json").resolve(),
        prompts=tuple(
            TaskPrompt(tokens=tokens, text=each.text, is_chat=each.messages is not None, name=each.name)
            for tokens, each in zip(encoded, asked.inputs, strict=True)
        ),
        sampling=replace(asked.sampling, stop_tokens=tuple(sorted(token for token in stops if token < vocab_size))),
        stop_strings=tuple(asked.stop_strings),
        batch_size=asked.batch_size,
        as_json=as_json,
        output=output,
    )
    (folder / "task.json").write_text(task.model_dump_json(), encoding="utf-8")
    return task
