"""What `trimaran score` reads: conversations, or pairs, as the tokens that a reward model has learned to score."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimaran.models.fields import counted
from trimaran.runtime.data.files import DataError
from trimaran.runtime.finetune.data.account import ExampleAccount
from trimaran.runtime.finetune.data.examples import Example
from trimaran.runtime.finetune.data.formats import read_examples
from trimaran.runtime.finetune.data.prepare import encoder_of, example_of
from trimaran.runtime.finetune.data.store import ExampleSet
from trimaran.runtime.spec import RunSpec

SCORED = "score"
"""Stands for a method among `records.FORMATS_OF`: the formats that are scored."""


@dataclass(frozen=True)
class Tally:
    """How many pairs have the chosen answer above the rejected one."""

    pairs: int
    right: int

    def __str__(self) -> str:
        return f"the chosen answer has the higher score in {self.right} of {counted(self.pairs, 'pair')}"


def check_scores(spec: RunSpec, run: Path) -> None:
    """Raise ValueError where a run gives no scores."""
    if spec.transformer.score_head == "none" or spec.finetune is None:
        raise ValueError(
            f"{run} has no score head, so it scores nothing; give a run of finetune.method reward (model.score_head "
            "only)"
        )


def read_scored(spec: RunSpec, run: Path, file: Path) -> tuple[list[Example], list[str]]:
    """Return the examples of a file as the run reads them, and sentences about records that are not scored.

    Args:
        run: its folder, with tokenizer and chat template.

    Raises:
        DataError: a record can't be read, is longer than the model's context, or none can be scored.
    """
    account = ExampleAccount()
    encoder = encoder_of(spec.model_copy(update={"data": _own_data(spec)}), run, run / "tokenizer.json")
    examples = []
    most = spec.transformer.max_seq_len
    for record in read_examples([file], "auto", SCORED, account):
        example = example_of(record, encoder, "answers")
        longest = max(len(document.tokens) for document in example.documents)
        if longest > most:
            raise DataError(
                f"{example.origin}: it has {longest} tokens, and the model's context {most}; shorten it, or take it out"
            )
        account.used += 1
        examples.append(example)
    if not examples:
        raise DataError(f"{file} has no record that can be scored; give conversations or pairs, one on a line")
    return examples, [" ".join(row) for row in account.rows()] if account.used < account.records else []


def _own_data(spec: RunSpec) -> Any:
    """Return the section data of a run that reads by its own folder's tokenizer."""
    return spec.data.model_copy(update={"tokenizer": None})


def score_records(examples: ExampleSet, scores: npt.NDArray[np.float64]) -> Iterator[dict[str, Any]]:
    """Yield for each example what is printed of it: `line` of its file, and `score`, or `chosen` and `rejected`.

    Args:
        scores: [documents] of `examples`.
    """
    for number in range(examples.num_examples):
        found = [float(scores[document]) for document in examples.documents_of(number)]
        names: Sequence[str] = ("score",) if len(found) == 1 else ("chosen", "rejected")
        yield {"index": number, "line": examples.origin(number).line, **dict(zip(names, found, strict=True))}


def tally_of(records: Iterable[dict[str, Any]]) -> Tally | None:
    """Return how the pairs among records of `score_records` came out; None without a pair."""
    pairs = [record for record in records if "chosen" in record]
    return Tally(len(pairs), sum(pair["chosen"] > pair["rejected"] for pair in pairs)) if pairs else None
