"""A twin's folder: works, passages, index, examples, and the record of it all, which is written last."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from trimaran.models.fields import counted
from trimaran.runtime.checkpoint.folder import newest_checkpoint
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.state import spec_of
from trimaran.runtime.twin.decide import MOST_EPOCHS, Decision, GivenModel, decide
from trimaran.runtime.twin.decide import Texts as Sizes
from trimaran.runtime.twin.passages import Passage, write_texts
from trimaran.runtime.twin.persona.examples import write_examples
from trimaran.runtime.twin.persona.make import make_persona
from trimaran.runtime.twin.persona.phrases import phrases_of
from trimaran.runtime.twin.record import (
    RECORD,
    TWIN,
    TwinRecord,
    WorkRecord,
    check_same_twin,
    source_record,
)
from trimaran.runtime.twin.request import TwinRequest, located
from trimaran.runtime.twin.retrieval.library import INDEX
from trimaran.runtime.twin.retrieval.silence import build_index
from trimaran.runtime.twin.texts.passages import COPY_SHARE, LEAK_SHARE, Passages, make_passages
from trimaran.runtime.twin.texts.read import Texts, read_works
from trimaran.runtime.twin.texts.sources import find_sources
from trimaran.runtime.twin.texts.work import Left

HELD_OUT: Final = "held_out.txt"
"""The held-out text in a twin's folder, for `trimaran evaluate --text`."""
_PARTS: Final = ("works", "passages.jsonl", "persona", INDEX, HELD_OUT)
_ADAPTER_EPOCHS: Final = 2.0
_SAMPLE_PASSAGES: Final = 50
Say = Callable[[str], None]


def model_spec(model: str) -> tuple[Path, RunSpec]:
    """Return the newest checkpoint of the run that `--model` names, and its spec.

    Raises:
        ValueError: it has no whole checkpoint, or its model can't continue a text.
    """
    checkpoint = newest_checkpoint(Path(model))
    if checkpoint is None:
        raise ValueError(
            f"--model {model} has no whole checkpoint; name the folder of a run that trimaran train or import has made"
        )
    spec = spec_of(Checkpoint.open(checkpoint, verify=False))
    if not (spec.transformer.is_causal and spec.transformer.has_head):
        raise ValueError(f"--model {model} can't continue a text; name a run of a causal language model")
    return checkpoint, spec


def build_twin(request: TwinRequest, say: Say) -> TwinRecord:
    """Make the twin's folder in the run folder `request.output`; one that is whole is only read, others are made anew.

    The caller holds the run folder's lock.

    Args:
        say: called with sentences on what was found.

    Raises:
        ValueError: the texts can't be used, the character never speaks, the model can't be tuned, or the folder is
            another twin's or run's.
    """
    output, folder = Path(request.output), Path(request.output) / TWIN
    if request.model is not None:
        model_spec(request.model)  # before the texts, which may be many
    names = located(request.sources)
    files, _ = find_sources(names)
    sources = [source_record(each.path, each.name) for each in files]
    if (folder / RECORD).exists():
        record = TwinRecord.read(folder)
        check_same_twin(record, request, [each.sha256 for each in sources])
        request = request.model_copy(update={"epochs": request.epochs or record.epochs})
        missing = next((name for name in _PARTS if not (folder / name).exists()), None)
        if missing is None:
            say(f"the twin in {folder} is whole already")
            if request.epochs != record.epochs:
                record = record.model_copy(update={"epochs": request.epochs})
                record.write(folder)
            return record
        say(f"{folder / missing} is missing: the twin is made of its sources once more")
    elif (output / "checkpoints").exists():
        raise ValueError(f"--output {output} is the folder of a run that is no twin; choose another --output")
    texts = read_works(names, request.language or "")
    made = make_passages(texts.works, texts.language)
    say(
        f"{counted(len(texts.works), 'work')} in language {texts.language}, {counted(len(made.passages), 'passage')}; "
        f"held out: {', '.join(made.held_out) or 'nothing, for the text is too short'}"
    )
    _check_can_learn(made)
    decision = _decide(request, texts, made.passages)
    say(decision.reason)
    persona = make_persona(made.passages, request.character, texts.language, talks=decision.talks)
    _clear(folder)
    write_texts(folder, [work.text for work in texts.works], made.passages)
    (folder / HELD_OUT).write_text(
        "\n\n".join(each.text for each in made.passages if each.is_held_out), encoding="utf-8"
    )
    build_index(made.passages, texts.language).save(folder / INDEX)
    system = phrases_of(texts.language).system(request.author, request.character)
    written = write_examples(folder / "persona", persona.examples, system)
    if not written:
        found = f" ({_told(persona.counts)})" if persona.counts else ""
        raise ValueError(f"the texts give no example to learn from{found}; give more text")
    say("examples: " + "; ".join(_told(each) for each in (written, persona.counts) if each))
    default = _ADAPTER_EPOCHS if decision.method == "adapter" else float(MOST_EPOCHS)
    record = TwinRecord(
        author=request.author,
        character=request.character,
        language=texts.language,
        system=system,
        model=request.model,
        sources=tuple(sources),
        works=_works(texts),
        decision=decision,
        epochs=request.epochs or default,
        characters=sum(len(each.answer.text) + len(each.asked or "") for each in persona.examples),
        held_out=made.held_out,
        counts={**written, **persona.counts},
        left=_left(texts, made.left),
    )
    record.write(folder)
    return record


def _check_can_learn(made: Passages) -> None:
    """Raise ValueError where nothing is left to learn from, as in a text that says the same again and again."""
    if not all(each.is_held_out for each in made.passages):
        return
    times = Counter[str]()
    for each in made.left:
        times[each.reason] += each.times
    copies, stay = (counted(number, "passage") for number in (times["passage.copy"], len(made.passages)))
    raise ValueError(
        f"the texts repeat themselves: {copies} left out as copies ({COPY_SHARE:.0%} of five words in a row come "
        f"before), and what stays, {stay}, is held out, {times['passage.like_held_out']:,} of it for what it shares "
        f"with the rest ({LEAK_SHARE:.0%}), so nothing is left to learn from; give more of the author's text, with "
        "less that comes again"
    )


def _decide(request: TwinRequest, texts: Texts, passages: Sequence[Passage]) -> Decision:
    """Return how the twin is trained, by what may be trained on."""
    used = [each.text for each in passages if not each.is_held_out]
    sizes = Sizes(sum(map(len, used)), sum(len(text.split()) for text in used), texts.language)
    model = None if request.model is None else _given(request.model, used)
    return decide(sizes, model, request.method)


def _given(model: str, texts: Sequence[str]) -> GivenModel:
    checkpoint, spec = model_spec(model)
    text = RunText.open(checkpoint.parent.parent)
    sample = texts[:: max(1, len(texts) // _SAMPLE_PASSAGES)][:_SAMPLE_PASSAGES]
    return GivenModel(
        parameters=spec.transformer.num_parameters(),
        has_template=text.template is not None,
        tokens=sum(len(text.tokenizer.encode(each)) for each in sample),
        sample_words=sum(len(each.split()) for each in sample),
    )


def _works(texts: Texts) -> tuple[WorkRecord, ...]:
    return tuple(
        WorkRecord(
            number=work.number,
            file=work.file,
            title=work.title,
            author=work.author,
            language=work.language,
            characters=len(work.text),
        )
        for work in texts.works
    )


def _left(texts: Texts, passages: Sequence[Left]) -> dict[str, int]:
    """Return how often each reason was met for which something was left out or changed."""
    counts = Counter(texts.totals())
    for each in passages:
        counts[each.reason] += each.times
    return dict(sorted(counts.items()))


def _clear(folder: Path) -> None:
    """Remove what an interrupted build has left: it is made again from the same sources."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in counts.items())
