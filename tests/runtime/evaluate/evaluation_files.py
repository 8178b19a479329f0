"""Made-up documents of every evaluation set, as published on the hub and in flat files, for tests to write."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = ("Anna", "Bob", "Cem", "Deniz", "Eva", "Filiz", "Gus", "Hana")
THINGS = ("a red boat", "two old maps", "the sharp knife", "some warm bread", "a broken lamp", "nine small stones")
VERBS = ("carried", "painted", "lost", "sold", "found", "washed")
SUBJECTS = ("anatomy", "formal_logic", "sociology", "virology")
Documents = list[dict[str, Any]]


def documents(name: str, count: int = 12, seed: int = 0) -> tuple[Documents, Documents]:
    """Return documents of a set, as published, and the same ones flat; [] where a set has no flat form."""
    draw = random.Random(f"{name}{seed}")
    pairs = [_pair(name, draw, number) for number in range(count)]
    return [published for published, _ in pairs], [flat for _, flat in pairs if flat is not None]


def _pair(name: str, draw: random.Random, number: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    who, other = draw.sample(NAMES, 2)
    things, verb = draw.sample(THINGS, 4), draw.choice(VERBS)
    gold = draw.randrange(2 if name in ("piqa", "winogrande", "wsc", "wsc273", "boolq", "copa") else 4)
    question = f"What has {who} {verb} on day {number}?"
    flat: dict[str, Any] = {"query": question, "choices": things, "gold": gold}
    if name in ("arc_easy", "arc_challenge", "openbookqa"):
        key = "question_stem" if name == "openbookqa" else "question"
        choices = {"text": things, "label": list("1234" if number % 3 == 0 and key == "question" else "ABCD")}
        flat["query"] = question if name == "openbookqa" else f"Question: {question}"
        return {key: question, "choices": choices, "answerKey": choices["label"][gold]}, flat
    if name == "hellaswag":
        start, rest = (
            (f"{who} {verb} {things[0]}.", "the other man") if number % 2 else (f"{who} went [title] home.", "")
        )
        endings = [f"{thing} [step] is seen  again." for thing in things]
        flat["query"] = f"Sailing: {start} {rest}".strip().replace(" [title]", ". ").replace("  ", " ")
        flat["choices"] = [ending.replace(" [step] is seen  ", " is seen ") for ending in endings]
        published = {"activity_label": "Sailing", "ctx_a": start, "ctx_b": rest, "endings": endings, "label": str(gold)}
        return published, flat
    if name == "mmlu":
        shared = {"subject": SUBJECTS[number % len(SUBJECTS)], "question": f" {question}", "choices": things}
        return {**shared, "answer": gold}, {**shared, "gold": gold}
    if name == "truthfulqa":
        one = {"choices": things, "labels": [1, 0, 0, 0]}
        last = "" if number == 5 else "nothing"  # as one of the published answers
        many = {"choices": [*things, last], "labels": [1, 0, int(number % 2), 0, 0]}
        return {"question": question, "mc1_targets": one, "mc2_targets": many}, None
    if name == "lambada":
        context = f"{who} {verb}\n\n{things[0]} for"
        return {"text": f"{context} {other}"}, {"context": context, "continuation": other}
    if name == "piqa":
        goal, (first, second) = f"{verb} {things[0]}", things[1:3]
        flat = {"query": f"Question: {goal}\n", "choices": [first, second], "gold": gold}
        return {"goal": goal, "sol1": first, "sol2": second, "label": gold}, flat
    if name in ("winogrande", "wsc273"):
        return _winograd(name, who, other, verb, gold)
    if name == "wsc":
        text = f"{who} {verb} {things[0]} because he liked it ."
        place = text.split().index("he")
        spans = {"span1_text": who, "span2_text": "he", "span1_index": 0, "span2_index": place}
        passage = f"{who} {verb} {things[0]} because *he* liked it."
        asked = f'Question: In the passage above, does the pronoun "*he*" refer to "*{who}*"?\nAnswer:'
        flat = {"query": f"Passage: {passage}\n{asked}", "choices": ["no", "yes"], "gold": gold}
        return {"text": text, **spans, "label": gold}, flat
    if name == "boolq":
        passage, asked = f"{who} {verb} {things[0]}. {other} did not.", f"did {other.lower()} do so"
        flat = {"query": f"Passage: {passage}\nQuestion: {asked}?", "choices": ["no", "yes"], "gold": gold}
        return {"passage": passage, "question": asked, "label": gold}, flat
    if name == "copa":
        question, choices = ("cause", "effect")[number % 2], [f"He {verb} {thing}." for thing in things[:2]]
        word = {"cause": "because", "effect": "therefore"}[question]
        flat = {"query": f"{who} was glad, {word}", "choices": [f"h{choice[1:]}" for choice in choices], "gold": gold}
        published = {"premise": f"{who} was glad.", "choice1": choices[0], "choice2": choices[1], "question": question}
        return {**published, "label": gold}, flat
    assert name == "gsm8k", name
    return {"question": question, "answer": f"{number} + {gold} = {number + gold}\n#### {number + gold}"}, None


def _winograd(name: str, who: str, other: str, verb: str, gold: int) -> tuple[dict[str, Any], dict[str, Any]]:
    start, rest = f"{who} has {verb} more than {other} because ", "was late."
    flat = {"context_options": [start + who, start + other], "continuation": rest, "gold": gold}
    if name == "winogrande":
        return {"sentence": f"{start}_ {rest}", "option1": who, "option2": other, "answer": str(gold + 1)}, flat
    published = {"text": f"{start}he {rest}", "pronoun": "he", "pronoun_loc": len(start), "options": [who, other]}
    return {**published, "label": gold}, flat


PLACES = {
    "arc_easy": ("ARC-Easy/test.jsonl", "ARC-Easy/train.jsonl"),
    "arc_challenge": ("ARC-Challenge/test.jsonl", "ARC-Challenge/train.jsonl"),
    "hellaswag": ("hellaswag/validation.jsonl", "hellaswag/train.jsonl"),
    "mmlu": ("mmlu/test.jsonl", "mmlu/dev.jsonl"),
    "truthfulqa": ("truthfulqa/mc_task.json", ""),
    "lambada": ("lambada_openai.jsonl", ""),
    "piqa": ("piqa/validation.jsonl", "piqa/train.jsonl"),
    "winogrande": ("winogrande_xl/validation.jsonl", "winogrande_xl/train.jsonl"),
    "wsc": ("wsc.fixed/validation.jsonl", "wsc.fixed/train.jsonl"),
    "wsc273": ("winograd_wsc.jsonl", ""),
    "boolq": ("boolq/validation.jsonl", "boolq/train.jsonl"),
    "openbookqa": ("openbookqa/main/test.jsonl", "openbookqa/main/train.jsonl"),
    "copa": ("copa/validation.jsonl", "copa/train.jsonl"),
    "gsm8k": ("gsm8k/main/test.jsonl", "gsm8k/main/train.jsonl"),
}
"""Set -> file of the evaluated split, and of the one that few-shot examples are drawn from."""


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """Write a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_sets(folder: Path, *, flat: bool = False) -> Path:
    """Write every set, 12 documents and 30 to draw examples from; flat where it has such a form."""
    for name, places in PLACES.items():
        for seed, (place, count) in enumerate(zip(places, (12, 30), strict=True)):
            if place:
                published, flattened = documents(name, count, seed)
                write_lines(folder / place, flattened if flat and flattened else published)
    return folder
