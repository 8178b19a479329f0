"""`trimaran score`: scores of conversations or of pairs by a reward model, straight from its run, at any layout."""

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimaran.launchers.cli.common.console import Pp, RunPath, Tp, errors_as_sentences, path
from trimaran.launchers.env.exit_codes import Stopped
from trimaran.launchers.local.launch import launch_folder
from trimaran.launchers.run_folder import find_checkpoint
from trimaran.launchers.terminal import say
from trimaran.runtime.scratch import scratch_folder
from trimaran.runtime.spec import RunSpec, dump_spec, parse_spec

if TYPE_CHECKING:
    from trimaran.runtime.finetune.data.examples import Example


def score(
    run: RunPath,
    file: Annotated[
        Path,
        typer.Argument(
            parser=path,
            help="Conversations, or pairs of a chosen and a rejected answer: .json, .jsonl or .parquet, in any format "
            "that training reads.",
        ),
    ],
    tp: Tp = 1,
    pp: Pp = 1,
    dp: Annotated[int, typer.Option(min=1, help="Copies of the model that share the records.")] = 1,
) -> None:
    """Score conversations or pairs by a reward model; print a line of JSON for each record."""
    with errors_as_sentences():
        from trimaran.runtime.checkpoint.reshard import Checkpoint
        from trimaran.runtime.finetune.scoring import check_scores, read_scored
        from trimaran.runtime.train.state import spec_of

        checkpoint = find_checkpoint(run)
        spec = spec_of(Checkpoint.open(checkpoint, verify=False))
        check_scores(spec, run)
        examples, notes = read_scored(spec, checkpoint.resolve().parent.parent, file)
        for note in notes:
            say(note, style="yellow")
        _score(_at_layout(spec, examples, tp, pp, dp), checkpoint, examples)


def _at_layout(spec: RunSpec, examples: "list[Example]", tp: int, pp: int, dp: int) -> RunSpec:
    """Return the spec with the layout, and rows that hold the longest document."""
    from trimaran.runtime.evaluate.engine.weights import at_layout

    found = at_layout(spec, tp=tp, pp=pp, dp=dp)
    longest = max(len(document.tokens) for example in examples for document in example.documents)
    fields = found.model_dump(mode="json")
    fields["train"] |= {"seq_len": longest}
    return parse_spec(fields)


def _score(spec: RunSpec, checkpoint: Path, examples: "list[Example]") -> None:
    """Write the task, and run it in this process or on tp * pp * dp ranks."""
    from trimaran.launchers.worker.run import run_alone
    from trimaran.launchers.worker.score import MANIFEST, SPLIT
    from trimaran.launchers.worker.tasks import ScoreTask
    from trimaran.runtime.data.tokens.shards import dtype_for
    from trimaran.runtime.finetune.data.store import write_split

    with scratch_folder("score") as folder:
        files = sorted({example.origin.file for example in examples})
        dtype = dtype_for(spec.transformer.vocab_size)
        numbers = {file: number for number, file in enumerate(files)}
        record = write_split(folder, SPLIT, dtype, examples, numbers)
        content = {"record": record, "dtype": dtype, "files": files}
        (folder / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
        (folder / "spec.yaml").write_text(dump_spec(spec), encoding="utf-8")
        task = ScoreTask(spec=folder / "spec.yaml", checkpoint=checkpoint.resolve(), examples=folder)
        (folder / "task.json").write_text(task.model_dump_json(), encoding="utf-8")
        try:
            if spec.world_size == 1:
                run_alone(task)
            else:
                launch_folder(folder)
        except KeyboardInterrupt:
            raise Stopped(signal.SIGINT) from None
