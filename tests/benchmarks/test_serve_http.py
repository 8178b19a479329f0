"""benchmarks/serve_http.py reads streams as both servers write them and prints its table; figures are not tested."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.benchmarks.scripts import load_script

bench = load_script("serve_http")


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text: str) -> dict[str, list[str]]:
        return {"input_ids": text.split()}


def stream_of(*deltas: dict[str, Any]) -> bytes:
    chunks = [json.dumps({"choices": [{"index": 0, "delta": each}]}) for each in deltas]
    return "".join(
        f"data: {each}\n\n" for each in [*chunks, json.dumps({"choices": [], "usage": {}}), "[DONE]"]
    ).encode()


def test_an_answer_is_the_text_of_its_pieces_and_a_refusal_ends_the_benchmark() -> None:
    asked: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        if asked[-1]["model"] == "none":
            return httpx.Response(404, text="no such model")
        return httpx.Response(200, content=stream_of({"role": "assistant"}, {"content": "one "}, {"content": "two"}))

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server") as client:
        found = bench.stream(client, "small", "Count.", 5)
        with pytest.raises(SystemExit, match="404 no such model"):
            bench.stream(client, "none", "Count.", 5)
    assert found.text == "one two"
    assert found.first_s > 0
    assert asked[0]["messages"] == [{"role": "user", "content": "Count."}]
    assert (asked[0]["temperature"], asked[0]["max_tokens"], asked[0]["stream"]) == (0.0, 5, True)


def test_the_table_has_medians_and_ratios_and_tells_answers_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    def rounds(seconds: float, text: str) -> list[Any]:
        return [bench.Round(0.5, 0.4, [text, "a b"], seconds * each, 2 * seconds * each) for each in (1, 3, 2)]

    bench.report({"trimaran": rounds(1, "x y"), "transformers": rounds(4, "x z")}, Words(), 0.4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"transformers, round {n}: 1 of 2 answers differ from trimaran's first" for n in range(3)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[5:]]
    assert rows == [
        ["trimaran", "2.0", "1.00", "1000.0", "1.00", "0.500", "0.400", "1.25, 1.00"],
        ["transformers", "0.5", "4.00", "4000.0", "4.00", "0.500", "0.400", "1.25, 1.00"],
    ]


def test_every_client_has_a_prompt_of_its_own_and_every_server_a_command() -> None:
    assert len(set(bench.prompts_of(20))) == 20
    commands = bench.commands_of(Path("run"), Path("folder"), 8, 1234)
    assert list(commands) == ["trimaran", "transformers", "transformers, continuous"]
    assert all("1234" in command for command in commands.values())
