"""`trimaran generate` on a small run: what it prints, what each option does, and what it says to wrong ones.

All but one test run it in this process.
"""

import errno
import io
import json
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launchers.drawn_run import Answer, drawn_run, invoke, tokenizer_of_words
from tests.launchers.runs import trimaran
from trimaran.launchers.worker import generate as worker_generate
from trimaran.launchers.worker.tasks import GenerateTask
from trimaran.models.transformer import Stage
from trimaran.runtime.data.tokens.tokenizer import Tokenizer

CONTEXT = 40
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + ' ' + message.content + '<|im_end|>' }}"
    "{% endfor %}"
    "{{ '<|im_start|>' if add_generation_prompt }}"
)


def make_run(folder: Path) -> Path:
    """Write a run folder at step 0, whose tokenizer has the special tokens of conversations."""
    return drawn_run(folder / "run", tokenizer_of_words("<|im_start|>", "<|im_end|>"), CONTEXT)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("generate"))


@pytest.fixture
def generate(run: Path) -> Callable[..., Answer]:
    return partial(invoke, "generate", str(run))


def records(answer: Answer) -> list[dict[str, Any]]:
    assert answer.code == 0, answer.err
    return [json.loads(line) for line in answer.out.splitlines()]


GREEDY = ("--temperature", "0", "--min-new-tokens", "20", "--max-new-tokens", "25")


def test_one_prompt_is_printed_with_its_continuation(generate: Callable[..., Answer]) -> None:
    first, again = (generate("--prompt", "abba", *GREEDY) for _ in range(2))
    assert first.code == 0, first.err
    assert first == again
    assert first.out.startswith("abba")
    assert len(first.out) > 10
    assert first.err == ""
    drawn = [generate("--prompt", "abba", "--seed", seed).out for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert generate("--max-new-tokens", "1", "--temperature", "0").out.startswith("The ")


def test_text_is_printed_as_it_comes(generate: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []

    def record(text: str = "", *, end: str = "\n", flush: bool = False) -> None:
        assert flush
        printed.append(text + end)

    whole = generate("--prompt", "abba", *GREEDY).out
    monkeypatch.setattr(worker_generate, "print", record, raising=False)
    generate("--prompt", "abba", *GREEDY)
    assert "".join(printed) == whole
    assert sum(text != "" for text in printed) > 3


def test_a_file_of_prompts_gives_a_record_each(generate: Callable[..., Answer], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("abba\n\nthe cab\nzz\nf\n")
    found = records(generate("--prompts", str(path), *GREEDY))
    assert [(each["index"], each["prompt"]) for each in found] == list(enumerate(["abba", "", "the cab", "zz", "f"]))
    assert all(set(each) == {"index", "prompt", "text", "finish", "new_tokens"} for each in found)
    assert "abba" + found[0]["text"] + "\n" == generate("--prompt", "abba", *GREEDY).out
    assert all(
        (each["finish"], each["new_tokens"]) == ("length", 25) for each in found if each["finish"] != "stop_token"
    )


def test_draws_do_not_depend_on_the_batch(generate: Callable[..., Answer], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "ab" * length, "id": f"p{length}"}) + "\n" for length in range(1, 8)))
    options = (
        "--prompts",
        str(path),
        "--max-new-tokens",
        "12",
        "--seed",
        "5",
        "--top-p",
        "0.9",
        "--repetition-penalty",
        "1.2",
        "--min-p",
        "0.01",
    )
    found = [records(generate(*options, "--batch-size", size)) for size in ("1", "3", "16")]
    assert found[0] == found[1] == found[2]
    assert [each["id"] for each in found[0]] == [f"p{length}" for length in range(1, 8)]
    assert len({each["text"] for each in found[0]}) == 7


def test_stop_strings_end_the_text_before_them(generate: Callable[..., Answer], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("abba\nthe cab\n")
    whole = records(generate("--prompts", str(path), *GREEDY))
    stop = whole[0]["text"][4:7]
    found = records(generate("--prompts", str(path), *GREEDY, "--stop", stop, "--stop", "never there"))
    assert found[0]["text"] == whole[0]["text"][: whole[0]["text"].index(stop)]
    assert found[0]["finish"] == "stop_string"
    assert found[0]["new_tokens"] < whole[0]["new_tokens"]
    assert generate("--prompt", "abba", *GREEDY, "--stop", stop).out == "abba" + found[0]["text"] + "\n"


def test_stop_tokens_and_the_tokens_before_them(run: Path, generate: Callable[..., Answer], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("abba\n")
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    (whole,) = records(generate("--prompts", str(path), *GREEDY))
    third = tokenizer.encode(whole["text"])[2]
    name = tokenizer._inner.id_to_token(third)
    options = ("--prompts", str(path), *GREEDY, "--min-new-tokens", "1", "--stop-token", name)
    (found,) = records(generate(*options))
    assert found["finish"] == "stop_token"
    assert found["new_tokens"] < 10
    assert whole["text"].startswith(found["text"])
    (later,) = records(generate(*options, "--min-new-tokens", "10"))
    assert later["new_tokens"] > 10


def test_a_full_context_slides_or_stops_and_says_so(generate: Callable[..., Answer]) -> None:
    slid = generate("--prompt", "ab", "--max-new-tokens", "100", "--min-new-tokens", "100")
    assert "1 of 1 texts filled the model's context of 40 tokens and went on from its newer half" in slid.err
    stopped = generate("--prompt", "ab", "--max-new-tokens", "100", "--min-new-tokens", "100", "--context", "stop")
    assert "1 of 1 texts ended because the model's context of 40 tokens was full" in stopped.err
    assert slid.out.startswith(stopped.out[:-2])
    assert len(slid.out) > len(stopped.out)
    assert slid.code == stopped.code == 0


def test_a_conversation(
    run: Path, generate: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = ("--chat", "--prompt", "why<|im_end|>?", *GREEDY)
    refused = generate(*question)
    assert refused.code == 2
    assert "run has no chat template, which a model that was tuned for conversations brings" in refused.err
    monkeypatch.setattr("trimaran.launchers.worker.run.run_alone", lambda task: tasks.append(task))
    tasks: list[GenerateTask] = []
    (run / "chat_template.jinja").write_text(TEMPLATE)
    (run / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    try:
        assert generate(*question, "--system", "be kind").code == 0
        path = tmp_path / "prompts.jsonl"
        path.write_text('"why?"\n{"messages": [{"role": "poet", "content": "oh"}], "id": 3}\n')
        assert generate("--chat", "--prompts", str(path), "--system", "be kind").code == 0
    finally:
        (run / "chat_template.jinja").unlink()
        (run / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    start, end = (tokenizer.id_of(name) for name in ("<|im_start|>", "<|im_end|>"))
    (alone,) = tasks[0].prompts
    assert (
        tokenizer.decode(alone.tokens)
        == "<|im_start|>system be kind<|im_end|><|im_start|>user why<|im_end|>?<|im_end|><|im_start|>"
    )
    counts = (alone.tokens.count(start), alone.tokens.count(end))  # type: ignore[arg-type]
    assert counts == (3, 2), "the user's own spelling is text"
    assert end in tasks[0].sampling.stop_tokens
    assert [(each.text, each.name, each.is_chat) for each in tasks[1].prompts] == [
        ("why?", None, True),
        (None, 3, True),
    ]
    assert [tokenizer.decode(each.tokens) for each in tasks[1].prompts] == [
        "<|im_start|>system be kind<|im_end|><|im_start|>user why?<|im_end|><|im_start|>",
        "<|im_start|>poet oh<|im_end|><|im_start|>",
    ]


def test_the_answer_alone_is_printed(run: Path, generate: Callable[..., Answer]) -> None:
    (run / "chat_template.jinja").write_text(TEMPLATE)
    try:
        answer = generate("--chat", "--prompt", "why?", *GREEDY)
    finally:
        (run / "chat_template.jinja").unlink()
    assert answer.code == 0, answer.err
    assert "why?" not in answer.out
    assert "<|im_start|>user" not in answer.out


def test_text_that_the_terminal_lacks_is_replaced_or_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, said = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), []
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(worker_generate, "say", said.append)
    output = worker_generate.Output(is_open=True)
    output.write("süß ")
    output.write_json({"text": "🙂"})
    output.report()
    assert stream.buffer.getvalue() == b's?? {"text": "\\ud83d\\ude42"}\n'  # type: ignore[attr-defined]
    assert said[0].startswith("2 characters shown as ?, because standard output is in ascii")


def test_a_reader_that_has_enough_ends_the_command_quietly(
    generate: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `trimaran generate ... | head -1` does."""
    path, printed = tmp_path / "prompts.txt", []
    path.write_text("a\nb\nc\n")

    def print_one(text: str, *, end: str, flush: bool) -> None:
        if printed:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        printed.append(text + end)

    monkeypatch.setattr(worker_generate, "print", print_one, raising=False)
    answer = generate("--prompts", str(path), "--max-new-tokens", "2")
    assert (answer.code, answer.err, len(printed)) == (128 + signal.SIGPIPE, "", 1)


def test_weights_that_are_not_finite_are_an_error_wherever_they_are(
    generate: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the embedding of a token that the text has not, NaN would change nothing."""
    real = Stage.load

    def poisoned(stage: Stage, *arguments: Any) -> None:
        real(stage, *arguments)
        with torch.no_grad():
            stage.embedding.weight[7, 3] = torch.nan  # type: ignore[union-attr]

    monkeypatch.setattr(Stage, "load", poisoned)
    answer = generate("--prompt", "abba", "--max-new-tokens", "2")
    assert (answer.code, answer.out) == (2, "")
    assert "step-00000000 holds infinite values or NaN in embedding.weight" in answer.err


def test_a_stop_token_beyond_the_vocabulary_is_told(run: Path, generate: Callable[..., Answer]) -> None:
    (run / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4000]}))
    try:
        answer = generate("--prompt", "abba", "--max-new-tokens", "2")
    finally:
        (run / "generation_config.json").unlink()
    assert answer.code == 0
    assert "so no text ends at the stop token 4000" in answer.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--top-p", "0"), "top_p (0.0) must be above 0 and at most 1"),
        (("--min-p", "2"), "min_p (2.0) must be from 0 to 1"),
        (("--seed", "-1"), "seed (-1) must not be negative"),
        (("--seed", str(2**63)), "seed (9223372036854775808) must be at most 9,223,372,036,854,775,807"),
        (("--max-new-tokens", str(10**20)), "max_new_tokens (100000000000000000000) must be at most 2,147,483,647"),
        (("--top-k", str(2**31)), "top_k (2147483648) must be at most"),
        (("--stop", "\udcfc"), "(LC_ALL=C.UTF-8)\n"),
        (("--chat", "--prompt", "a", "--system", "\udcfc"), "(LC_ALL=C.UTF-8)\n"),
        (("--temperature", "nan"), "temperature (nan) must be a finite number"),
        (("--repetition-penalty", "0"), "repetition_penalty (0.0) must be from 1e-30 to 1e+30"),
        (("--temperature", "1e-320"), "temperature (1e-320) must be at least 1e-30, or 0"),
        (("--min-new-tokens", "300"), "min_new_tokens (300) must not be above max_new_tokens (200)"),
        (("--stop", ""), "--stop must have at least one character"),
        (("--stop-token", "nonsense"), "'nonsense' is no token of"),
        (("--prompt", "a", "--prompts", "b"), "give either --prompt or --prompts, not both"),
        (("--prompts", "nowhere.txt"), "nowhere.txt: No such file"),
        (("--system", "be kind"), "--system is for --chat"),
        (("--prompt", "s\udcfcper"), "--prompt has the byte 0xfc at character 2, which is not UTF-8"),
        (("--stop-token", "\udcfc"), "--stop-token has the byte 0xfc at character 1"),
        (("--chat",), "--chat needs a question: give --prompt or --prompts"),
        (("--prompt", "abc " * 60), "more than the 40 of the model's context (model.max_seq_len); shorten it"),
        (("--tp", "3"), "num_heads"),
        (("--pp", "3"), "pp"),
    ],
    ids=str,
)
def test_wrong_options_get_a_sentence(options: tuple[str, ...], words: str, generate: Callable[..., Answer]) -> None:
    answer = generate(*options)
    assert answer.code == 2
    assert answer.err.startswith("error: ")
    assert words in answer.err
    assert answer.out == ""


@pytest.mark.slow
def test_four_ranks_print_what_one_prints(run: Path, generate: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("abba\nthe cab\n\nab ab ab\nf\n")
    options = ("--prompts", "prompts.txt", "--max-new-tokens", "60", "--seed", "2")
    alone = generate("--prompts", str(tmp_path / "prompts.txt"), *options[2:])
    outcome = trimaran(tmp_path, "generate", str(run), *options, "--tp", "2", "--pp", "2")
    assert outcome.code == 0, outcome.err
    assert outcome.out == alone.out
    assert outcome.err == alone.err
    assert outcome.left == []
