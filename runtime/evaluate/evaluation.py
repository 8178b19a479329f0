"""An evaluation from its options to its results: all that can be wrong first, then the questions to the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from trimaran.models.config import TransformerConfig
from trimaran.runtime.data.files import DataError
from trimaran.runtime.evaluate.answers import Answers
from trimaran.runtime.evaluate.engine.requests import ScorerProtocol
from trimaran.runtime.evaluate.options import EvaluationOptions
from trimaran.runtime.evaluate.results import TEXT, Evaluation, Origin, evaluation_of, joined
from trimaran.runtime.evaluate.tasks.load import TaskSet, load_tasks
from trimaran.runtime.evaluate.tasks.pairs import PairsTask, answer_pairs, pairs_results, pairs_task
from trimaran.runtime.evaluate.text import (
    TextDocument,
    check_stride,
    check_tokens,
    describe_difference,
    difference,
    read_documents,
    score_texts,
    text_results,
)
from trimaran.runtime.evaluate.text_codes import TextCodes
from trimaran.runtime.infer.modes import mode_of
from trimaran.runtime.infer.prompts import RunText

if TYPE_CHECKING:
    from trimaran.runtime.evaluate.harness import ChatOptions

Progress = Callable[[int, int], None]
"""Called with (requests answered, of how many)."""


@dataclass(frozen=True)
class Prepared:
    """An evaluation that is ready to run.

    Args:
        texts: documents with their tokens.
        tasks, pairs: None where there are none.
        notes: sentences for the user.
    """

    options: EvaluationOptions
    codes: TextCodes
    max_seq_len: int
    texts: Sequence[tuple[TextDocument, Sequence[int]]]
    tasks: TaskSet | None
    pairs: PairsTask | None
    notes: Sequence[str]

    def hashes(self) -> dict[str, Any]:
        """Return the digests of texts, tasks and their data."""
        found: dict[str, Any] = {} if self.tasks is None else dict(self.tasks.hashes())
        found |= {} if self.pairs is None else {"pairs": {self.pairs.name: self.pairs.digest}}
        return found | ({"texts": {document.name: document.digest for document, _ in self.texts}} if self.texts else {})


def prepare(options: EvaluationOptions, text: RunText, shape: TransformerConfig) -> Prepared:
    """Read the texts, load the tasks, and make their prompts.

    Raises:
        ValueError: a text, a task, its data or an option is wrong; a sentence.
        OSError: a file can't be read.
    """
    codes = TextCodes.of(text)
    check_stride(options.stride, shape.max_seq_len)
    documents = read_documents(options.texts)
    ids = codes.encode(document.text for document in documents)
    plain = codes.encode_continuations(document.text for document in documents)
    notes = []
    for document in documents:
        check_tokens(document, ids[document.text], shape.vocab_size)
        found = difference(document.text, text.tokenizer.decode(plain[document.text]))
        if found is not None:
            notes.append(describe_difference(document, found))
    tasks = None
    if options.tasks:
        from trimaran.runtime.evaluate.harness import check_requests  # lm-eval takes seconds to import

        tasks = _tasks(options.model_dump_json(exclude={"texts", "stride", "batch_size"}))
        if documents and TEXT in tasks.tasks:
            raise DataError(f"the task {TEXT} has the name that --text has among the results; name it otherwise")
        check_requests(tasks, codes, shape.max_seq_len, _chat(options))
    pairs = _pairs(options, text, shape.max_seq_len)
    if pairs is not None and tasks is not None and pairs.name in tasks.tasks:
        raise DataError(f"the task {pairs.name} has the name that --pairs has among the results; name it otherwise")
    texts = [(document, ids[document.text]) for document in documents]
    return Prepared(options, codes, shape.max_seq_len, texts, tasks, pairs, notes)


def _pairs(options: EvaluationOptions, text: RunText, max_seq_len: int) -> PairsTask | None:
    if options.pairs is None:
        return None
    return pairs_task(
        options.pairs,
        mode_of(options.mode or "", options.to),
        text,
        max_seq_len,
        system=options.system,
        generation=options.generation,
        limit=options.limit,
        seed=options.seed,
    )


@lru_cache(1)
def _tasks(options: str) -> TaskSet:
    """Return the tasks of options as JSON; those of the next model are the same."""
    asked = EvaluationOptions.model_validate_json(options)
    return load_tasks(
        asked.tasks,
        asked.data,
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        seed=asked.seed,
        allow_code=asked.allow_code,
        generation=asked.generation,
    )


def evaluate(
    prepared: Prepared,
    scorer: ScorerProtocol,
    answers: Answers,
    origin: Origin,
    progress: Progress = lambda done, of: None,
) -> Evaluation:
    """Ask the model all questions that the journal has no answer to; return the results.

    Raises:
        ValueError: a request can't be made; names task and document.
        NotFiniteError: the logits of a request are not finite; names task and document.
    """
    options, found = prepared.options, list[dict[str, Any]]()
    origin = replace(origin, hashes={**origin.hashes, **prepared.hashes()})
    notes = list(prepared.notes)
    if prepared.texts:
        counts = score_texts(
            prepared.texts, scorer, prepared.codes.prefix, prepared.max_seq_len, options.stride, answers, progress
        )
        documents = [document for document, _ in prepared.texts]
        found.append(text_results(documents, counts, options.stride, prepared.max_seq_len))
    if prepared.tasks is not None:
        from trimaran.runtime.evaluate.harness import run_tasks

        results = run_tasks(
            prepared.tasks,
            scorer,
            prepared.codes,
            prepared.max_seq_len,
            answers,
            chat=_chat(options),
            seed=options.seed,
            progress=progress,
        )
        notes += results.pop("notes")
        found.append(results)
    if prepared.pairs is not None:
        told, told_notes = answer_pairs(prepared.pairs, scorer, answers, progress)
        results, measured_notes = pairs_results(prepared.pairs, told)
        notes += [*told_notes, *measured_notes]
        found.append(results)
    return evaluation_of(joined(found), origin, config=options.config(), notes=notes)


def _chat(options: EvaluationOptions) -> "ChatOptions":
    from trimaran.runtime.evaluate.harness import ChatOptions

    return ChatOptions(apply=options.chat, system=options.system)
