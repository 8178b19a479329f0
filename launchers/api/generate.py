"""`generate`: continuations of prompts from a checkpoint, as records."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from os import PathLike
from types import NoneType
from typing import Literal

from trimaran.launchers.api.calls import expect, list_of, ranks_of_a_call
from trimaran.launchers.api.run import Run, place_of
from trimaran.launchers.local.launch import launch_folder
from trimaran.launchers.run_folder import find_checkpoint
from trimaran.runtime.files import parse_json, read_text
from trimaran.runtime.scratch import scratch_folder

_MOST_BYTES = 1 << 30  # of all continuations


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt.

    Attributes:
        prompt: as it was given.
        text: without the prompt.
        finish: why it ended: "length", "stop" or "context".
        new_tokens: how many.
    """

    prompt: str
    text: str
    finish: str
    new_tokens: int

    def __str__(self) -> str:
        return self.text


def generate(
    run: Run | str | PathLike[str],
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 200,
    min_new_tokens: int = 0,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[str] = (),
    context: Literal["slide", "stop"] = "slide",
    chat: bool = False,
    system: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
    tp: int = 1,
    pp: int = 1,
) -> list[Continuation]:
    """Continue prompts straight from a training checkpoint, at any layout, as `trimaran generate --prompts` does.

    The same seed gives the same texts as that command. The model is in processes of its own, which end with the call.

    Args:
        run: a run, its folder, or the folder of one of its checkpoints.
        prompts: a text, or several.
        temperature: 0 takes the likeliest token.
        top_k, top_p, min_p, repetition_penalty: which tokens may be drawn, see `trimaran generate --help`.
        stop: texts before which a continuation ends.
        stop_tokens: names of tokens after which it ends, beside the model's own.
        context: what happens when a text fills the model's context: go on from its newer half, or stop.
        chat: put the prompts to the model as a user's questions, by its chat template.
        system: with `chat`, what the model is told first.
        batch_size: how many are continued together.
        tp, pp: the layout to run at.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is no such checkpoint, an option is out of its range, or a prompt does not fit the model.
        LaunchError: a rank failed.
        KeyboardInterrupt: Ctrl-C, or a notebook's interrupt, once the ranks have ended.
    """
    from trimaran.launchers.local.generate import Prompts, write_generate_task
    from trimaran.runtime.infer.prompts import Prompt, check_typed_text, conversation
    from trimaran.runtime.infer.sampling_params import SamplingParams

    texts = list_of("prompts", [prompts] if isinstance(prompts, str) else prompts, str, "a text")
    stop, stop_tokens = list_of("stop", stop, str, "a text"), list_of("stop_tokens", stop_tokens, str, "a text")
    expect("system", system, (str, NoneType), "a text or None")
    counts = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "top_k": top_k, "seed": seed}
    for name, count in {**counts, "batch_size": batch_size, "tp": tp, "pp": pp}.items():
        expect(name, count, Integral, "a whole number")
    shares = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    for name, share in shares.items():
        expect(name, share, Real, "a number")
    if system is not None and not chat:
        raise ValueError("system is for chat=True: give that too, or put the text into the prompts")
    if "" in stop:
        raise ValueError("stop must have at least one character")
    for name, text in (*(("prompts", each) for each in texts), ("system", system), *(("stop", each) for each in stop)):
        check_typed_text(name, text)
    sampling = SamplingParams(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, min_new_tokens, seed, (), context
    )
    if not texts:
        return []
    inputs = [conversation(each, system, None) if chat else Prompt(each) for each in texts]
    with ranks_of_a_call("generate"), scratch_folder("generate") as folder:
        output = folder / "continuations.jsonl"
        asked = Prompts(inputs, sampling, stop, stop_tokens, batch_size)
        checkpoint = find_checkpoint(place_of(run))
        write_generate_task(folder, checkpoint, asked, as_json=True, tp=tp, pp=pp, output=output)
        launch_folder(folder)
        records = [parse_json(line) for line in read_text(output, _MOST_BYTES).split("\n") if line]
    return [
        Continuation(prompt, record["text"], record["finish"], record["new_tokens"])
        for prompt, record in zip(texts, records, strict=True)
    ]
