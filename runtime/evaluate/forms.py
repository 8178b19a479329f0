"""Documents of evaluation sets in the fields that lm-eval's tasks read, from the published fields or from flat ones.

Flat files ({query, choices, gold}, {context_options, continuation, gold}, {context, continuation}) hold prompts that
are formatted already, as mosaicml's llm-foundry or lm-eval itself writes them. The published fields are taken out of
them again, so that lm-eval's own templates make the prompt.
"""

import re
from collections.abc import Callable, Mapping
from string import ascii_uppercase
from typing import Any, Final

from trimaran.runtime.evaluate.fields import Row

Document = dict[str, Any]
_QUESTION: Final = re.compile(r"(?:Question:\s)?(.*?)\s*(?:\nAnswer:)?\s*", re.DOTALL)
_BOOLQ: Final = re.compile(r"(?:Passage:\s)?(.*)\nQuestion:\s(.*?)\??\s*(?:\nAnswer:)?\s*", re.DOTALL)
_COPA: Final = re.compile(r"(.*?),?\s(because|therefore)\s*", re.DOTALL)
_WSC: Final = re.compile(r'(?:Passage:\s)?(.*)\nQuestion:\s.*"\*(.+?)\*".*"\*(.+?)\*".*', re.DOTALL)
_SENTENCE_END: Final = re.compile(r"""[.!?]["')\]]*\s+""")
_NO_TEXT: Final = frozenset(("label", "answerKey", "span1_text", "span2_text", "mc1_targets", "activity_label"))
"""Fields that are no question and no answer, or have those of another field."""
_CONNECTORS: Final[Mapping[str, str]] = {"because": "cause", "therefore": "effect"}


def _flat(row: Row) -> tuple[str, list[str], int]:
    choices = row.texts("choices")
    return row.text("query"), choices, row.index("gold", len(choices))


def _matched(row: Row, pattern: re.Pattern[str], rule: str) -> tuple[str, ...]:
    found = pattern.fullmatch(row.text("query"))
    if found is None:
        raise row.error("query", rule)
    return found.groups()


def _lettered(choices: list[str]) -> dict[str, list[str]]:
    return {"text": choices, "label": list(ascii_uppercase[: len(choices)])}


def _lettered_choices(row: Row) -> dict[str, list[str]]:
    """Return the field `choices` of ARC and OpenBookQA: {text, label}, or the list of {text, label} of older files."""
    value = row.record("choices")
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        value = {key: [each.get(key) for each in value] for key in ("text", "label")}
    if not isinstance(value, dict) or not {"text", "label"} <= value.keys():
        raise row.error("choices", "a record of the lists text and label")
    texts, labels = row.texts("choices", value["text"]), row.texts("choices", value["label"])
    if len(texts) != len(labels):
        raise row.error("choices", "as many of text as of label")
    return {"text": texts, "label": labels}


def _of_science(question: str) -> Callable[[Row], Document]:
    """Return what reads ARC and OpenBookQA, whose published question is the field `question`."""

    def read(row: Row) -> Document:
        if row.has("query", "gold"):
            _, choices, gold = _flat(row)
            (text,) = _matched(row, _QUESTION, "a question")
            return {question: text, "choices": _lettered(choices), "answerKey": ascii_uppercase[gold]}
        labelled = _lettered_choices(row)
        return {
            question: row.text(question),
            "choices": labelled,
            "answerKey": row.among("answerKey", labelled["label"]),
        }

    return read


def _hellaswag(row: Row) -> Document:
    if row.has("query", "gold"):
        query, endings, gold = _flat(row)
        activity, separator, context = query.partition(": ")
        if not separator:
            raise row.error("query", 'an activity and a context, such as "Roof shingle removal: A man is sitting"')
        # lm-eval writes the unfinished sentence at the end, ctx_b, with a capital letter.
        ends = [found.end() for found in _SENTENCE_END.finditer(context)]
        cut = ends[-1] if ends and not re.search(r"""[.!?]["')\]]*\s*$""", context) else len(context)
        first, second = context[:cut].rstrip(), context[cut:]
        return {"activity_label": activity, "ctx_a": first, "ctx_b": second, "endings": endings, "label": str(gold)}
    endings = row.texts("endings")
    return {
        "activity_label": row.text("activity_label", may_be_empty=True),
        "ctx_a": row.text("ctx_a", may_be_empty=True),
        "ctx_b": row.text("ctx_b", may_be_empty=True),
        "endings": endings,
        "label": str(row.index("label", len(endings))),
    }


def _mmlu(row: Row) -> Document:
    is_csv = row.has("A", "B", "C", "D")
    choices = [row.text(letter) for letter in "ABCD"] if is_csv else row.texts("choices", least=4)
    if len(choices) != 4:
        raise row.error("choices", "a list of four texts")
    name = "gold" if row.has("gold") else "answer"
    value = row.get(name)
    letter = value.strip().upper() if isinstance(value, str) else ""
    answer = "ABCD".index(letter) if letter in set("ABCD") else row.index(name, 4)
    question = row.text("query" if row.has("query") and not row.has("question") else "question")
    return {"question": question, "choices": choices, "answer": answer}


def _targets(row: Row, name: str) -> dict[str, list[Any]]:
    """Return mc1_targets or mc2_targets; of mc1 the right answer first, which lm-eval takes for the right one."""
    value = row.record(name)
    if not isinstance(value, dict):
        raise row.error(name, "a record of the lists choices and labels")
    is_listed = value.keys() >= {"choices", "labels"}
    labels: Any = value["labels"] if is_listed else list(value.values())
    # One published answer is empty; lm-eval scores it as the space before it.
    texts = row.texts(name, value["choices"] if is_listed else list(value), least=1, may_be_empty=True)
    if not isinstance(labels, list) or len(labels) != len(texts) or not all(each in (0, 1) for each in labels):
        raise row.error(name, "labels of 0 or 1, one for each answer")
    if 1 not in labels or (name == "mc1_targets" and sum(labels) != 1):
        raise row.error(name, "answers of which one is right" if name == "mc1_targets" else "answers with a right one")
    labels = [int(label) for label in labels]
    return _right_first(texts, labels) if name == "mc1_targets" else {"choices": texts, "labels": labels}


def _right_first(texts: list[str], labels: list[int]) -> dict[str, list[Any]]:
    order = sorted(range(len(texts)), key=lambda index: -labels[index])
    return {"choices": [texts[index] for index in order], "labels": [labels[index] for index in order]}


def _truthfulqa(row: Row) -> Document:
    if not row.has("query", "gold"):
        return {
            "question": row.text("question"),
            **{name: _targets(row, name) for name in ("mc1_targets", "mc2_targets")},
        }
    choices, gold = row.texts("choices"), row.get("gold")
    right = gold if isinstance(gold, list) else [row.index("gold", len(choices))]
    if not right or not all(isinstance(each, int) and 0 <= each < len(choices) for each in right):
        raise row.error("gold", f"a whole number from 0 to {len(choices) - 1}, or a list of them")
    first = right[0]
    one = [(text, int(index == first)) for index, text in enumerate(choices) if index == first or index not in right]
    return {
        "question": row.text("query"),
        "mc1_targets": _right_first([text for text, _ in one], [label for _, label in one]),
        "mc2_targets": {"choices": choices, "labels": [int(index in right) for index in range(len(choices))]},
    }


def _lambada(row: Row) -> Document:
    if row.has("context", "continuation"):
        word = row.text("continuation").strip()
        if " " in word:
            raise row.error("continuation", "one word: the task predicts the last word of a text")
        return {"text": f"{row.text('context').rstrip(' ')} {word}"}
    text = row.text("text")
    if not text.split(" ")[-1].strip() or " " not in text:
        raise row.error("text", "two words at least, with none after the last: the task predicts the last word")
    return {"text": text}


def _piqa(row: Row) -> Document:
    if row.has("query", "gold"):
        _, choices, gold = _flat(row)
        (goal,) = _matched(row, _QUESTION, "a goal")
        _check_two(row, "choices", choices)
        return {"goal": goal, "sol1": choices[0], "sol2": choices[1], "label": gold}
    return {**{name: row.text(name) for name in ("goal", "sol1", "sol2")}, "label": row.index("label", 2)}


def _check_two(row: Row, name: str, texts: list[str]) -> None:
    if len(texts) != 2:
        raise row.error(name, "a list of two texts")


def _halves(row: Row) -> tuple[str, list[str], str, int]:
    """Return what both options of a flat Winograd schema begin with, what each goes on with, the rest, and the gold."""
    options = row.texts("context_options")
    _check_two(row, "context_options", options)
    words = [option.split(" ") for option in options]
    common = 0
    while common < min(map(len, words)) - 1 and words[0][common] == words[1][common]:
        common += 1
    if "_" in "".join(words[0][:common]):  # the blank is the first "_" of a sentence
        common = 0
    start = " ".join(words[0][:common]) + " " * (common > 0)
    return start, [" ".join(each[common:]) for each in words], row.text("continuation").strip(), row.index("gold", 2)


def _winogrande(row: Row) -> Document:
    if row.has("context_options", "continuation"):
        start, options, rest, gold = _halves(row)
        return {"sentence": f"{start}_ {rest}", "option1": options[0], "option2": options[1], "answer": str(gold + 1)}
    sentence = row.text("sentence")
    if "_" not in sentence or not sentence.partition("_")[2].strip():
        raise row.error("sentence", "a text with a blank (_) and words after it: they are scored")
    document = {"sentence": sentence, **{name: row.text(name) for name in ("option1", "option2")}}
    return {**document, "answer": row.among("answer", ("1", "2"))}


def _wsc273(row: Row) -> Document:
    if row.has("context_options", "continuation"):
        start, options, rest, gold = _halves(row)
        # lm-eval's clean-up of options is done in such a file already.
        flat = {"text": f"{start}_ {rest}", "pronoun": "_", "pronoun_loc": len(start), "options": options}
        return {**flat, "label": gold}
    text, pronoun, options = row.text("text"), row.text("pronoun"), row.texts("options")
    _check_two(row, "options", options)
    place = row.index("pronoun_loc", len(text))
    if not text[place + len(pronoun) :].strip():
        raise row.error("pronoun_loc", "the place of a pronoun with words after it: they are scored")
    return {
        "text": text,
        "pronoun": pronoun,
        "pronoun_loc": place,
        "options": options,
        "label": row.index("label", 2),
    }


def _wsc(row: Row) -> Document:
    if row.has("query", "gold"):
        passage, pronoun, noun = _matched(row, _WSC, 'as the task writes it: Passage: ... does the pronoun "*he*" ...')
        before, mark, _ = passage.partition(f"*{pronoun}*")
        if not mark:
            raise row.error("query", f"a passage that has the pronoun *{pronoun}* between stars")
        _, choices, gold = _flat(row)
        return {
            "text": passage.replace(mark, pronoun, 1),
            "span1_text": noun,
            "span2_text": pronoun,
            "span2_index": len(before.split()),
            "label": _of_yes_and_no(row, choices, gold),
        }
    text = row.text("text")
    document = {"text": text, **{name: row.text(name) for name in ("span1_text", "span2_text")}}
    return {**document, "span2_index": row.index("span2_index", len(text.split())), "label": row.index("label", 2)}


def _of_yes_and_no(row: Row, choices: list[str], gold: int) -> int:
    words = [choice.strip().lower() for choice in choices]
    if sorted(words) != ["no", "yes"]:
        raise row.error("choices", "no and yes")
    return int(words[gold] == "yes")


def _boolq(row: Row) -> Document:
    if row.has("query", "gold"):
        passage, question = _matched(row, _BOOLQ, "a passage and, on a line of its own, Question: ...")
        _, choices, gold = _flat(row)
        return {"passage": passage, "question": question, "label": _of_yes_and_no(row, choices, gold)}
    label = "answer" if row.has("answer") and not row.has("label") else "label"
    return {"passage": row.text("passage"), "question": row.text("question"), "label": row.index(label, 2)}


def _copa(row: Row) -> Document:
    if row.has("query", "gold"):
        premise, connector = _matched(row, _COPA, "a sentence that ends with because or therefore")
        _, choices, gold = _flat(row)
        _check_two(row, "choices", choices)
        flat = {"premise": f"{premise}.", "question": _CONNECTORS[connector], "choice1": choices[0]}
        return {**flat, "choice2": choices[1], "label": gold}
    document: Document = {name: row.text(name) for name in ("premise", "choice1", "choice2")}
    return {**document, "question": row.among("question", ("cause", "effect")), "label": row.index("label", 2)}


def _gsm8k(row: Row) -> Document:
    answer = row.text("answer")
    if not re.search(r"#### \S", answer):
        raise row.error("answer", "a text that ends with #### and the number")
    return {"question": row.text("question"), "answer": answer}


READ: Final[Mapping[str, Callable[[Row], Document]]] = {
    "arc_easy": _of_science("question"),
    "arc_challenge": _of_science("question"),
    "openbookqa": _of_science("question_stem"),
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
    "truthfulqa": _truthfulqa,
    "lambada": _lambada,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "wsc": _wsc,
    "wsc273": _wsc273,
    "boolq": _boolq,
    "copa": _copa,
    "gsm8k": _gsm8k,
}
"""Set -> what makes lm-eval's document of a record."""


def texts_of(name: str, document: Document) -> list[str]:
    """Return question and answers of a document, as a page that has them would write them; a blank is filled."""
    if name == "winogrande":
        return [document["sentence"].replace("_", document[f"option{document['answer']}"], 1)]
    if name == "wsc273":
        start, pronoun = document["pronoun_loc"], document["pronoun"]
        filled = document["options"][document["label"]] if pronoun == "_" else pronoun
        return [document["text"][:start] + filled + document["text"][start + len(pronoun) :]]
    found: list[str] = []
    for key, value in document.items():
        if key in _NO_TEXT or (name == "copa" and key == "question") or isinstance(value, int):
            continue
        if isinstance(value, dict):
            value = value["text"] if "text" in value else value["choices"]
        found += value if isinstance(value, list) else [value]
    return found
