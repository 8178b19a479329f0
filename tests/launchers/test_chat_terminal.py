"""`trimaran chat` with real ranks, in a terminal and through pipes: keys, streaming, Ctrl-C, commands and files."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pexpect
import pytest

from tests.launchers.chat_run import chat_run
from tests.launchers.forked import fork_server
from tests.launchers.runs import TIMEOUT_S, ranks_in, trimaran, trimaran_here
from tests.twin.test_grounding import PASSAGES
from trimaran.runtime.twin.decide import Decision
from trimaran.runtime.twin.passages import Passage, write_texts
from trimaran.runtime.twin.record import TWIN, TwinRecord
from trimaran.runtime.twin.retrieval.silence import build_index

CTRL_C, CTRL_D, ALT_ENTER = "\x03", "\x04", "\x1b\r"
PROMPT = "\x1b[?2004h"  # the terminal is asked to mark pasted text: a line is read
ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    chat_run(folder)
    chat_run(folder, has_template=False)
    return folder


class Terminal:
    """A conversation on a terminal."""

    def __init__(self, place: Path, *options: str) -> None:
        shim = fork_server().make_shim("trimaran")
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.child = pexpect.spawn(
            str(shim),
            ["chat", *options],
            cwd=str(place),
            env=environment,
            timeout=TIMEOUT_S,
            encoding="utf-8",
            dimensions=(50, 200),
        )

    def wait_for(self, words: str) -> str:
        """Return what was shown before the words, without escapes."""
        self.child.expect_exact(words)
        return ESCAPES.sub("", self.child.before or "")

    def type(self, text: str, end: str = "\r") -> None:
        self.child.send(text + end)


@contextmanager
def conversation(place: Path, *options: str) -> Iterator[Terminal]:
    """A conversation with the talker that ends with the block, however that ends."""
    found = Terminal(place, "talker", *options)
    try:
        yield found
    finally:
        found.child.close(force=True)


@pytest.fixture(scope="module")
def terminal(place: Path) -> Iterator[Terminal]:
    """One process for many checks."""
    with conversation(place, "--max-new-tokens", "6", "--min-new-tokens", "6", "--temperature", "0") as found:
        found.wait_for("/help names the commands.")
        found.wait_for(PROMPT)
        yield found


def test_every_command_on_a_terminal(terminal: Terminal, place: Path) -> None:
    terminal.type("abba")
    terminal.wait_for("the answer ended at max_new_tokens (6); /set max_new_tokens changes it")
    terminal.type("one\\\r two", ALT_ENTER)
    terminal.type("three")
    terminal.wait_for("the answer ended at")
    for line, words in {
        "/stats": "history: 2 turns, 2 in the context of 256 tokens",
        "/system be kind": "the system message is set, from the next turn on",
        "/system": "system message: be kind",
        "/set temperature 0.5": "temperature is 0.5",
        "/set tempature 0.5": "did you mean temperature?",
        "/retry": "the answer ended at",
        "/hlep": "did you mean /help?",
        "/help": "goes on in a new line",
        "/save talk.json": "saved to talk.json: 2 turns",
        "/undo": "taken back: one two three",
        "/load talk.json": "loaded talk.json: 2 turns",
        "/load none.json": "none.json: No such file or directory",
        "/save ../talk.json": "is not inside",
    }.items():
        terminal.type(line)
        terminal.wait_for(words)
    saved = json.loads((place / "talk.json").read_text())
    assert [each["role"] for each in saved["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert saved["messages"][3]["content"] == "one\n two\nthree"
    terminal.wait_for(PROMPT)


def test_the_second_turn_computes_only_its_new_tokens(terminal: Terminal) -> None:
    terminal.type("/set max_new_tokens 6")
    for question in ("first", "second"):
        terminal.type(question)
        terminal.wait_for("the answer ended at")
    terminal.type("/stats")
    terminal.wait_for("last turn: ")
    words = terminal.wait_for("new tokens")
    prompt, cached = map(int, re.findall(r"(\d+) prompt tokens, (\d+) of them cached", words)[0])
    assert prompt - cached <= 40 < cached, "the new question in its turn, and the last token of the answer"
    terminal.wait_for(PROMPT)


def test_ctrl_c_ends_the_answer_alone(terminal: Terminal) -> None:
    for line in ("/set max_new_tokens 120", "/set min_new_tokens 120", "/system -"):
        terminal.type(line)
    terminal.wait_for("the system message is removed")
    terminal.wait_for(PROMPT)
    terminal.type("go on")
    terminal.wait_for("go on")
    terminal.child.expect(r"\n[^\r\n]{2}")
    terminal.child.send(CTRL_C)
    terminal.child.expect_exact(["the answer was ended by Ctrl-C", "the answer ended"])
    terminal.type("/set min_new_tokens 2")
    terminal.type("/set max_new_tokens 2")
    terminal.type("still here")
    terminal.wait_for("the answer ended at max_new_tokens (2)")
    terminal.wait_for(PROMPT)


def test_ctrl_c_twice_leaves_and_no_rank_stays(terminal: Terminal, place: Path) -> None:
    terminal.type("half a line", CTRL_C)
    terminal.wait_for("Ctrl-C again, or Ctrl-D, leaves")
    terminal.wait_for(PROMPT)
    terminal.type("/set seed 1")
    terminal.wait_for("seed is 1")
    terminal.wait_for(PROMPT)
    for _ in range(2):
        terminal.child.send(CTRL_C)
        terminal.child.expect_exact(["leaves", pexpect.EOF])
    terminal.child.expect(pexpect.EOF)
    assert terminal.child.wait() == 0
    assert ranks_in(place) == []


def in_pipe(place: Path, content: str, *options: str) -> "subprocess.CompletedProcess[str]":
    source = place / "lines.txt"
    source.write_text(content)
    words = f"trimaran chat {' '.join(options)} < lines.txt"
    shims = fork_server().make_shim("trimaran").parent
    return subprocess.run(
        ["bash", "-c", words],
        cwd=place,
        env={**os.environ, "PATH": f"{shims}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_in_a_pipe_answers_alone_are_on_standard_output(place: Path) -> None:
    done = in_pipe(place, "hi\n/stats\nyou", "talker", "--tp", "2", "--max-new-tokens", "4", "--min-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert "2 turns" not in done.stdout
    assert done.stdout.count("\n") >= 2
    assert "history: 1 turn" in done.stderr
    assert "> " not in done.stdout.split("\n")[0][:2]


def test_a_writer_is_told_to_continue_and_then_does(place: Path) -> None:
    refused = trimaran(place, "chat", "writer")
    assert refused.code == 2
    assert "this model has no chat template: it was not tuned for conversations and only continues" in refused.err
    assert "use --mode continue" in refused.err
    done = in_pipe(place, "abba\n", "writer", "--mode", "continue", "--max-new-tokens", "4")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("nowhere",), "nowhere has no whole checkpoint"),
        (("talker", "--mode", "chat"), "--mode (chat) must be one of continue, answer, translate, summarize"),
        (("talker", "--mode", "translate"), "--mode translate needs --to"),
        (("talker", "--folder", "none"), "--folder (none) does not exist"),
        (("talker", "--top-p", "0"), "top_p (0.0) must be above 0"),
        (("talker", "--stop", ""), "--stop must have at least one character"),
        (("talker", "--tp", "3"), "num_heads (2) must be divisible by tp (3)"),
    ],
    ids=str,
)
def test_wrong_options_get_a_sentence(options: tuple[str, ...], words: str, place: Path) -> None:
    outcome = trimaran(place, "chat", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err
    assert outcome.left == []


def test_generate_translates_and_summarizes_texts_in_passages(place: Path) -> None:
    """In three processes: a file, lines of JSON at another layout, and what is refused."""
    text = "\n\n".join(f"paragraph {number} is about words" for number in range(6))
    (place / "long.txt").write_text(text)
    (place / "texts.jsonl").write_text(f'"short"\n{json.dumps({"prompt": text, "id": "long"})}\n')
    asked = ("--mode", "translate", "--to", "de", "--temperature", "0", "--max-new-tokens", "64")
    one = trimaran(place, "generate", "talker", "--file", "long.txt", *asked)
    assert one.code == 0, one.err
    assert "the text is translated in 6 passages, each for itself" in one.err
    many = trimaran(place, "generate", "talker", "--prompts", "texts.jsonl", *asked, "--pp", "2")
    assert many.code == 0, many.err
    short, long = map(json.loads, many.out.splitlines())
    assert (short["index"], short["prompt"], short["passages"]) == (0, "short", 1)
    assert (long["id"], long["passages"], long["text"]) == ("long", 6, one.out.removesuffix("\n"))
    assert one.left == many.left == []


def test_mode_answer_is_chat(place: Path) -> None:
    asked = ("--prompt", "why?", "--temperature", "0", "--max-new-tokens", "5")
    found = [trimaran(place, "generate", "talker", *mode, *asked) for mode in (("--chat",), ("--mode", "answer"))]
    assert found[0].code == 0, found[0].err
    assert found[0].out == found[1].out != trimaran(place, "generate", "talker", *asked).out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mode", "translate", "--prompt", "a"), "--mode translate needs --to"),
        (("--mode", "summarize"), "--mode summarize needs a text: give --prompt or --prompts or --file"),
        (("--mode", "summarize", "--chat", "--prompt", "a"), "--chat is --mode answer, and the mode is summarize"),
        (("--file", "long.txt"), "--file is for --mode translate or summarize"),
        (("--mode", "summarize", "--file", "none.txt"), "none.txt: No such file"),
        (("--mode", "summarize", "--file", "empty.txt"), "empty.txt has no text"),
        (("--mode", "summarize", "--file", "latin.txt"), "latin.txt is not UTF-8 at byte 1"),
        (
            ("--mode", "summarize", "--prompts", "talk.jsonl"),
            "prompt 1 is a conversation, and --mode summarize takes a",
        ),
        (("--mode", "summarize", "--prompt", "a", "--stop-token", "nonsense"), "'nonsense' is no token of"),
    ],
    ids=str,
)
def test_generate_says_no_to_wrong_modes(options: tuple[str, ...], words: str, place: Path) -> None:
    (place / "empty.txt").write_text(" \n")
    (place / "latin.txt").write_bytes(b"a\xff")
    (place / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    outcome = trimaran_here(place, "generate", "talker", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err


def test_ranks_that_die_are_told_and_the_conversation_can_be_saved(place: Path) -> None:
    with conversation(place, "--tp", "2", "--max-new-tokens", "200", "--min-new-tokens", "200") as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("go on")
        terminal.child.expect(r"\n[^\r\n]{2}")
        rank, _ = ranks_in(place)
        rank.kill()
        terminal.wait_for("error:")
        terminal.type("/save kept.json")
        terminal.wait_for("saved to kept.json")
        terminal.wait_for(PROMPT)
        terminal.type("", CTRL_D)
        terminal.child.expect(pexpect.EOF)
        terminal.child.wait()
    assert terminal.child.exitstatus == 1


def test_sigterm_ends_a_conversation_and_its_ranks(place: Path) -> None:
    with conversation(place, "--tp", "2") as terminal:
        terminal.wait_for(PROMPT)
        assert len(ranks_in(place)) == 2
        terminal.child.kill(signal.SIGTERM)
        terminal.wait_for("stopped by SIGTERM")
        terminal.child.expect(pexpect.EOF)
        terminal.child.wait()
    assert terminal.child.exitstatus == 128 + signal.SIGTERM
    assert ranks_in(place) == []


def test_a_twin_answers_from_its_library_unless_told_otherwise(place: Path) -> None:
    folder = place / "talker" / TWIN
    folder.mkdir()
    write_texts(folder, ["\n\n".join(each.text for each in PASSAGES)], passages := numbered_from_0(PASSAGES))
    build_index(passages, "en").save(folder / "index")
    decision = Decision(method="adapter", talks=True, reason="a test")
    TwinRecord(
        author="Shakespeare", character=None, language="en", system="You are Hamlet.", model=None, sources=(), works=(),
        decision=decision, epochs=1.0, characters=1, held_out=(), counts={}, left={},
    ).write(folder)  # fmt: skip
    try:
        silent = in_pipe(place, "How do I repair a carburettor?\n", "talker")
        weights = in_pipe(place, "abba\n", "talker", "--no-retrieval", "--max-new-tokens", "3")
    finally:
        shutil.rmtree(folder)
    assert silent.returncode == weights.returncode == 0, silent.stderr + weights.stderr
    assert silent.stderr == "answers come from the 2 passages of its library (--no-retrieval for the weights alone)\n"
    assert "texts" in silent.stdout
    assert "library" not in weights.stderr


def numbered_from_0(passages: list[Passage]) -> list[Passage]:
    return [replace(each, id=number) for number, each in enumerate(passages)]
