"""Records of example files in every format: used, counted with a reason, or refused with file, line and rule."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimaran.runtime.data.files import DataError
from trimaran.runtime.finetune.data.account import ExampleAccount
from trimaran.runtime.finetune.data.formats import find_example_files, read_examples
from trimaran.runtime.finetune.data.records import Conversation, Pair, Plain, Prompt, Rated, Record, Turn

Q, A = Turn("user", "q"), Turn("assistant", "a")
ASKED: list[dict[str, Any]] = [{"role": "user", "content": "q"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "a"}]


def read(
    folder: Path, records: Sequence[Any], format: str = "auto", method: str = "sft"
) -> tuple[list[Record], ExampleAccount]:
    path = folder / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    account = ExampleAccount()
    return list(read_examples([path], format, method, account)), account


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"messages": ANSWERED}, (Q, A)),
        ({"messages": [{"role": "system", "content": "s"}, *ANSWERED]}, (Turn("system", "s"), Q, A)),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
            (Q, A),
        ),
        (
            {"messages": [*ANSWERED, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "b"}]},
            (Q, A, Turn("tool", "42"), Turn("assistant", "b")),
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, (Q, A)),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            (Turn("system", "s"), Q, A),
        ),
        ({"instruction": "q", "input": "", "output": "a"}, (Q, A)),
        ({"instruction": "q", "input": "x", "output": "a"}, (Turn("user", "q\n\nx"), A)),
        ({"question": "q", "answer": "a"}, (Q, A)),
        ({"prompt": ASKED, "completion": ANSWERED[1:]}, (Q, A)),
        ({"prompt": ASKED, "completion": "a"}, (Q, A)),
    ],
)
def test_conversations(record: dict[str, Any], turns: tuple[Turn, ...], tmp_path: Path) -> None:
    (found,), account = read(tmp_path, [record])
    assert isinstance(found, Conversation)
    assert found.turns == turns
    assert str(found.origin) == f"{tmp_path}/examples.jsonl:1"
    assert (account.records, account.counts) == (1, {})


def test_texts(tmp_path: Path) -> None:
    (found,), _ = read(tmp_path, [{"prompt": "p ", "completion": "c"}])
    assert isinstance(found, Plain)
    assert (found.prompt, found.completion) == ("p ", "c")
    (found,), _ = read(tmp_path, [{"text": "t"}])
    assert isinstance(found, Plain)
    assert (found.prompt, found.completion) == ("", "t")


@pytest.mark.parametrize(
    ("record", "prompt", "margin"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, (Q,), None),
        ({"instruction": "q", "output": "o", "chosen": "a", "rejected": "b", "margin": 2}, (Q,), 2.0),
        (
            {
                "chosen": ANSWERED,
                "rejected": [*ASKED, {"role": "assistant", "content": "b"}],
                "score_chosen": 4.5,
                "score_rejected": 2,
            },
            (Q,),
            2.5,
        ),
        (
            {
                "prompt": "q",
                "chosen": [*ANSWERED, *ASKED, *ANSWERED[1:]],
                "rejected": [*ANSWERED, *ASKED, {"role": "assistant", "content": "b"}],
            },
            (Q, A, Q),
            None,
        ),
    ],
)
def test_pairs(record: dict[str, Any], prompt: tuple[Turn, ...], margin: float | None, tmp_path: Path) -> None:
    (found,), _ = read(tmp_path, [record], method="preference")
    assert isinstance(found, Pair)
    assert (found.prompt, found.chosen, found.rejected) == (prompt, (A,), (Turn("assistant", "b"),))
    assert found.margin == margin


def test_rated_answers_and_prompts(tmp_path: Path) -> None:
    (found,), _ = read(tmp_path, [{"prompt": "q", "completion": "a", "label": False}], method="preference")
    assert isinstance(found, Rated)
    assert (found.prompt, found.answer, found.good) == ((Q,), (A,), False)
    record = {"question": "q", "answer": "#### 7"}
    (asked,), _ = read(tmp_path, [record], method="rl")
    assert isinstance(asked, Prompt)
    assert (asked.turns, asked.fields) == ((Q,), record)
    (again,), _ = read(tmp_path, [{"messages": ANSWERED}], method="rl")
    assert isinstance(again, Prompt)
    assert again.turns == (Q,)


@pytest.mark.parametrize(
    ("record", "method", "reason"),
    [
        ({"instruction": "q", "output": " "}, "sft", "empty_answer"),
        ({"messages": [*ANSWERED, *ASKED]}, "sft", "no_answer"),
        ({"prompt": "p", "completion": ""}, "sft", "empty_answer"),
        ({"text": "\n"}, "sft", "empty_text"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "preference", "equal_pair"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "reward", "empty_answer"),
    ],
)
def test_a_record_that_nothing_can_be_learned_from_is_counted(
    record: dict[str, Any], method: str, reason: str, tmp_path: Path
) -> None:
    whole = {"text": "t"} if "text" in record else {**record, "output": "a", "completion": "a", "rejected": "b"}
    whole |= {"messages": ANSWERED} if "messages" in record else {}
    found, account = read(tmp_path, [whole, record], method=method)
    assert len(found) == 1
    assert (account.records, account.counts) == (2, {reason: 1})
    assert account.first == {reason: f"{tmp_path}/examples.jsonl:2"}
    account.check(0.5)
    with pytest.raises(
        DataError, match=r"1 of 2 records would be left out: .*examples\.jsonl:2\), more than data\.max"
    ):
        account.check(0.4)
    assert ExampleAccount.read(json.loads(json.dumps(account.record))) == account


@pytest.mark.parametrize(
    ("record", "method"),
    [
        ({"messages": [{"role": "user", "content": "q\ud83d"}, *ANSWERED[1:]]}, "sft"),
        ({"prompt": "q\ud83d", "chosen": "a", "rejected": "b"}, "preference"),
        ({"prompt": "q\ud83d", "completion": "a", "label": True}, "preference"),
        ({"question": "q\ud83d", "answer": "7"}, "rl"),
        ({"text": "q\ud83d"}, "sft"),
    ],
)
def test_half_a_surrogate_pair_becomes_a_character_and_is_counted(
    record: dict[str, Any], method: str, tmp_path: Path
) -> None:
    (found,), account = read(tmp_path, [record], method=method)
    assert "q\ufffd" in repr(found)
    assert (account.records, account.counts) == (1, {"surrogate": 1})
    account.check(0.0)
    assert any("became U+FFFD (first" in words for _, words in account.rows())


def turn(role: Any, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("record", "method", "words"),
    [
        ([1], "sft", r"a record must be an object with fields, got \[1\]"),
        ({"body": "x"}, "sft", "fields body is in none of the formats that method sft learns from .messages, sharegpt"),
        ({"text": "x"}, "preference", "none of the formats that method preference learns from .preference, unpaired"),
        ({"messages": [turn("human"), turn("assistant")]}, "sft", 'turn 1 has the role "human", which is not known'),
        (
            {"conversations": [{"from": "bing", "value": "x"}]},
            "sft",
            'turn 1 has the role "bing", which is not known; write one of human, user, gpt',
        ),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "sft", r'turn 1 has the role \["gpt"\], which is not'),
        ({"conversations": [{"value": "x"}]}, "sft", "turn 1 of conversations must be a record with from and value"),
        ({"messages": [turn("user"), turn("user")]}, "sft", "turns 1 and 2 are both of the user; join them"),
        ({"messages": [turn("user"), turn("assistant"), turn("assistant")]}, "sft", "turns 2 and 3 are both of"),
        ({"messages": [turn("user"), turn("system")]}, "sft", "turn 2 is of the system, which may only speak first"),
        ({"messages": [turn("assistant")]}, "sft", "turn 1 is an answer without a question before it"),
        ({"messages": [turn("user"), turn("tool")]}, "sft", "turn 2 is of a tool, which no turn of the assistant"),
        ({"messages": [turn("user", None)]}, "sft", "turn 1 of messages must have a text as its content, got null"),
        ({"messages": []}, "sft", "messages must be a list of records with role and content"),
        ({"messages": "x"}, "sft", "messages must be a list of records with role and content, got \"x\""),
        ({"instruction": "", "output": "a"}, "sft", "instruction is empty; write the question"),
        ({"instruction": "q", "input": 3, "output": "a"}, "sft", "input must be a text, got 3"),
        ({"instruction": "q", "output": ["a"]}, "sft", r'output must be a text, got \["a"\]'),
        ({"prompt": "q", "rejected": "b"}, "preference", "chosen is missing; write it, or name another format"),
        ({"prompt": "q", "chosen": "b"}, "reward", "rejected is missing"),
        ({"chosen": "a", "rejected": "b"}, "reward", "prompt is missing; write the question that both answer"),
        (
            {"chosen": ANSWERED, "rejected": [turn("user", "other"), turn("assistant")]},
            "reward",
            "chosen and rejected must answer the same prompt",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "big"}, "reward", 'margin must be a finite number'),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10**400}, "reward", "margin must be a"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 10**400, "score_rejected": 0.5},
            "reward",
            "score_chosen and score_rejected must be finite numbers, got 1000.* and 0.5",
        ),
        ({"prompt": "q", "completion": "a", "label": "good"}, "preference", "label must be true .* got \"good\""),
        ({"messages": [turn("system")]}, "rl", "a prompt must end with a question"),
    ],
)  # fmt: skip
def test_a_record_that_breaks_a_rule_is_an_error(record: Any, method: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"examples\.jsonl:1: .*{words}"):
        read(tmp_path, [record], method=method)


def test_a_named_format_is_that_of_every_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"examples\.jsonl:2: messages is missing"):
        read(tmp_path, [{"messages": ANSWERED}, {"text": "x"}], "messages")
    (found,), _ = read(tmp_path, [{"messages": ANSWERED, "text": "x"}], "text")
    assert isinstance(found, Plain)


def test_files_of_every_kind_and_their_lines(tmp_path: Path) -> None:
    records = [{"instruction": f"q{number}", "output": f"a{number}"} for number in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(each) + "\n" for each in records))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    files = find_example_files([str(tmp_path), str(tmp_path / "a.json")])
    assert [path.name for path in files] == ["a.json", "b.jsonl", "c.jsonl.gz", "d.parquet"]
    found = [each.origin for each in read_examples(files, "auto", "sft", ExampleAccount())]
    assert [each.line for each in found] == [1, 2, 3, 1, 3, 5, 1, 3, 5, 1, 2, 3]


def test_files_that_hold_no_examples_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt' is not a \.json, \.jsonl or \.parquet file"):
        find_example_files([str(tmp_path / "a.txt")])
    with pytest.raises(DataError, match=r"holds no \.json, \.jsonl or \.parquet file .* with examples"):
        find_example_files([str(tmp_path)])
    with pytest.raises(DataError, match="does not exist"):
        find_example_files([str(tmp_path / "none.jsonl")])
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{oops\n')
    with pytest.raises(DataError, match=r"b\.jsonl as \.jsonl: line 2 is not JSON"):
        list(read_examples([tmp_path / "b.jsonl"], "auto", "sft", ExampleAccount()))
