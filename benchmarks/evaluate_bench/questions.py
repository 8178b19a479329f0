"""The questions of a task's first documents as token ids, and a model to ask."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.evaluate.engine.requests import Likelihood

LETTERS = "ABCD"


def records(data: Path, name: str) -> list[dict[str, Any]]:
    """Return the records of a file of lines of JSON, found by its name."""
    found = next((file for suffix in ("", ".gz") for file in data.glob(f"**/{name}.jsonl{suffix}")), None)
    if found is None:
        raise SystemExit(f"{data} has no {name}.jsonl or {name}.jsonl.gz")
    text = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def with_shots(data: Path, documents: int) -> Iterator[tuple[str, list[str]]]:
    """Return MMLU's questions with five shots each: `documents` in all, of as many subjects as have them whole."""

    def question(record: dict[str, Any]) -> str:
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, record["choices"], strict=True))
        return f"{record['question'].strip()}\n{choices}\nAnswer:"

    shots: dict[str, list[str]] = {}
    for record in records(data, "mmlu/dev"):
        shots.setdefault(record["subject"], []).append(f"{question(record)} {LETTERS[record['gold']]}\n\n")
    for record in records(data, "mmlu/test")[:documents]:
        subject = record["subject"]
        title = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        yield title + "".join(shots[subject]) + question(record), [f" {letter}" for letter in LETTERS]


def questions(data: Path, task: str, documents: int) -> Iterator[tuple[str, list[str]]]:
    """Return (context, continuations) of a task's first documents."""
    if task == "mmlu":
        yield from with_shots(data, documents)
        return
    name, end = {"arc_easy": ("arc_easy", "\nAnswer:"), "hellaswag": ("hellaswag/val", "")}[task]
    for record in records(data, name)[:documents]:
        yield record["query"] + end, [f" {choice}" for choice in record["choices"]]


def requests_of(tokenizer: Tokenizer, asked: Iterator[tuple[str, list[str]]], most: int) -> list[Likelihood]:
    """Return the requests; a context that is too long loses its beginning."""
    made = []
    for context, continuations in asked:
        for continuation in continuations:
            start = tokenizer.encode(context)
            whole = tokenizer.encode(context + continuation)[-most - 1 :]
            length = max(1, len(whole) - len(start))
            made.append(Likelihood(tuple(whole[:-length]), tuple(whole[-length:])))
    return made


def smoke_requests() -> Sequence[Likelihood]:
    """Return requests for a tiny model."""
    return [Likelihood((1, 2, 3, number), (choice, number)) for number in range(9) for choice in range(4)]
