"""A conversation without a real model: history, commands, Ctrl-C, files, pipes; what every wrong line is told."""

import asyncio
import errno
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.fake_backend import FakeBackend
from tests.runtime.infer.test_infer_dialogue import CHATML, text_of
from trimaran.launchers.chat.asking import Asker
from trimaran.launchers.chat.commands import COMMANDS, run_command
from trimaran.launchers.chat.loop import converse
from trimaran.launchers.chat.session import INTERRUPTED, Session
from trimaran.launchers.chat.terminal import Answers, PipeReader, TerminalReader
from trimaran.runtime.infer.batching.messages import Request
from trimaran.runtime.infer.dialogue import Dialogue, Exchange, TooLongError
from trimaran.runtime.infer.modes import ANSWER, CONTINUE, Mode
from trimaran.runtime.infer.sampling_params import SamplingParams

TEXT, PLAIN = text_of(CHATML), text_of(None)
END = TEXT.tokenizer.id_of("<|im_end|>") or 0


def says(text: str) -> Callable[[Request], Sequence[int]]:
    """Return what answers every prompt alike, letter by letter."""
    return lambda request: [token for letter in text for token in TEXT.tokenizer.encode(letter)]


class Talk:
    """A session with a fake model, and all that it has shown and told."""

    def __init__(self, backend: FakeBackend, mode: Mode = ANSWER, system: str | None = None, **sampling: Any) -> None:
        self.backend, self.shown, self.notes = backend, list[str](), list[str]()
        params = SamplingParams(**{"max_new_tokens": 50, "context": "stop", "stop_tokens": (END,), **sampling})
        text = PLAIN if mode == CONTINUE else TEXT
        self.session = Session(Asker(backend, text), mode, params, (), system, self.notes.append)

    async def ask(self, question: str) -> str:
        return await self.session.ask(question, self.shown.append)

    @property
    def prompts(self) -> list[str]:
        return [TEXT.tokenizer.decode(each.prompt) for each in self.backend.requests]

    def command(self, line: str, folder: Path = Path()) -> str:
        return run_command(line, self.session, folder).text


def run(what: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(what, 60))


def test_an_answer_streams_and_the_next_turn_computes_only_its_new_tokens() -> None:
    async def talk() -> None:
        talk = Talk(FakeBackend(says("abab")), system="be kind")
        assert await talk.ask("why?") == "stop_token"
        assert talk.shown == ["a", "b", "a", "b"]
        assert await talk.ask("and now?") == "stop_token"
        first, second = (turn.answers[0] for turn in talk.session.turns)
        assert second.cached == first.prompt_tokens + 3, "all but the last token, which was never computed"
        new = len(
            TEXT.tokenizer.encode_with_special(
                "<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"
            )
        )
        assert second.prompt_tokens - second.cached == new + 1
        assert [each["content"] for each in talk.session.dialogue.messages()] == [
            "be kind",
            "why?",
            "abab",
            "and now?",
            "abab",
        ]
        assert f"{second.cached} of them cached, 4 new tokens" in talk.command("/stats")

    run(talk())


def test_a_plain_text_goes_on_from_turn_to_turn() -> None:
    async def talk() -> None:
        talk = Talk(FakeBackend(says("ab")), CONTINUE)
        await talk.ask("To be")
        await talk.ask("Enter")
        assert talk.prompts == ["To be", "To beab\nEnter"]
        assert talk.session.turns[1].answers[0].cached == len("To beab") - 1

    run(talk())


def test_a_cancelled_answer_is_kept_as_far_as_it_got_and_its_place_is_free() -> None:
    async def talk() -> None:
        backend = FakeBackend(says("abab"), holds_after=2)
        talk = Talk(backend)
        asked = asyncio.create_task(talk.ask("why?"))
        await backend.held.wait()
        asked.cancel()
        assert await asked == INTERRUPTED
        assert backend.ended == [0]
        assert talk.session.dialogue.exchanges[-1].answer == "ab"
        backend.holds_after = None
        await talk.ask("go on")
        assert "assistant\nab<|im_end|>" in talk.prompts[-1]

    run(talk())


def test_an_answer_that_had_not_begun_leaves_the_conversation_as_it_was() -> None:
    async def talk() -> None:
        backend = FakeBackend(says("abab"), holds_after=0)
        talk = Talk(backend)
        asked = asyncio.create_task(talk.ask("why?"))
        await backend.held.wait()
        asked.cancel()
        assert await asked == INTERRUPTED
        assert talk.session.dialogue == Dialogue()

    run(talk())


def test_retry_and_undo() -> None:
    async def talk() -> None:
        talk = Talk(FakeBackend(says("ab")))
        await talk.ask("one")
        await talk.ask("two")
        await talk.session.retry(talk.shown.append)
        await talk.session.retry(talk.shown.append)
        assert talk.prompts[1] == talk.prompts[2] == talk.prompts[3]
        assert [each.sample for each in talk.backend.requests] == [0, 0, 1, 2], "other random numbers"
        assert len(talk.session.dialogue.exchanges) == 2
        assert talk.command("/undo") == "taken back: two"
        assert talk.command("/undo") == "taken back: one"
        for command in ("/undo", "/retry"):
            with pytest.raises(ValueError, match="there is no turn to take back"):
                talk.command(command)

    run(talk())


def test_in_a_full_context_the_oldest_turns_leave_and_that_is_told() -> None:
    async def talk() -> None:
        talk = Talk(FakeBackend(says("ab" * 10), context=250), system="SYSTEM")
        for number in range(8):
            await talk.ask(f"question {number}")
        assert talk.notes
        assert all("left it, and the model knows them no more" in each for each in talk.notes)
        assert all(each.startswith("<|im_start|>system\nSYSTEM<|im_end|>\n<|im_start|>user\n") for each in talk.prompts)
        assert "question 0" not in talk.prompts[-1]
        assert all(len(each.prompt) + 50 <= 250 for each in talk.backend.requests)
        with pytest.raises(TooLongError, match="the model's context of 250 has no room for it"):
            await talk.ask("x" * 300)
        assert len(talk.session.dialogue.exchanges) == 8

    run(talk())


def test_a_failed_answer_is_an_error_and_no_turn() -> None:
    async def talk() -> None:
        talk = Talk(FakeBackend(says("ab"), fails="the logits are not finite"))
        with pytest.raises(RuntimeError, match="the logits are not finite"):
            await talk.ask("why?")
        assert (talk.session.dialogue, talk.session.turns) == (Dialogue(), [])

    run(talk())


def test_settings_are_shown_changed_and_checked() -> None:
    talk = Talk(FakeBackend(says("ab")))
    assert talk.command("/set temperature 0.25") == "temperature is 0.25"
    assert talk.command("/set max-new-tokens 7") == "max-new-tokens is 7"
    assert (talk.session.sampling.temperature, talk.session.sampling.max_new_tokens) == (0.25, 7)
    assert "temperature 0.25\n" in talk.command("/set")
    for line, words in {
        "/set temprature 1": "frequency_penalty; did you mean temperature?",
        "/set top_k x": "top_k must be a whole number; got x",
        "/set top_p 2": "top_p (2.0) must be above 0",
        "/set seed": "/set seed needs a value",
        "/set max_new_tokens 0": "max_new_tokens (0) must be at least 1",
    }.items():
        with pytest.raises(ValueError, match=re.escape(words)):
            talk.command(line)


def test_the_system_message_is_shown_set_and_removed() -> None:
    talk = Talk(FakeBackend(says("ab")))
    assert talk.command("/system") == "there is no system message"
    talk.command("/system be kind")
    assert talk.command("/system") == "system message: be kind"
    talk.command("/system -")
    assert talk.session.dialogue.system is None


def test_help_names_every_command_and_an_unknown_one_gets_the_nearest() -> None:
    talk = Talk(FakeBackend(says("ab")))
    assert all(f"/{name}" in talk.command("/help") for name in COMMANDS)
    assert talk.command("/stats") == "nothing was answered yet"
    assert run_command("/quit", talk.session, Path()).quits
    with pytest.raises(ValueError, match=r"there is no command /hlep; did you mean /help\?"):
        talk.command("/hlep")
    with pytest.raises(ValueError, match="there is no command /usr/bin; /help names them, and a text that begins with"):
        talk.command("/usr/bin is a folder")


def test_a_conversation_is_saved_and_goes_on_from_its_file(tmp_path: Path) -> None:
    async def talk() -> None:
        talk = Talk(FakeBackend(says("ab")), system="be kind")
        await talk.ask("wörld 🙂\n/two lines")
        assert talk.command("/save talk.json", tmp_path).endswith("talk.json: 1 turn")
        await talk.ask("two")
        talk.command("/save talk.json", tmp_path)
        other = Talk(FakeBackend(says("ab")))
        assert other.command("/load talk.json", tmp_path).endswith("2 turns")
        assert other.session.dialogue.messages() == talk.session.dialogue.messages()
        other.command("/undo")
        assert other.command("/load talk.json", tmp_path).endswith("2 turns; of 1 turn before it not all were saved")
        assert other.command("/load talk.json", tmp_path).endswith("2 turns")
        other.command("/undo")
        other.command("/save talk.json", tmp_path)
        with pytest.raises(ValueError, match="exists and is not of this conversation; it stays as it is"):
            Talk(FakeBackend(says("ab"))).command("/save talk.json", tmp_path)
        saved = json.loads((tmp_path / "talk.json").read_text())
        assert (saved["format"], saved["version"], len(saved["messages"])) == ("trimaran conversation", 1, 3)

    run(talk())


def test_no_file_outside_the_folder_of_conversations_is_touched(tmp_path: Path) -> None:
    folder, outside = tmp_path / "talks", tmp_path / "outside.json"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "file").symlink_to(outside)
    talk = Talk(FakeBackend(says("ab")))
    for name in ("../outside.json", str(outside), "link/outside.json", "file", "", "  ", ".", "a\0b"):
        for command in ("save", "load"):
            with pytest.raises(ValueError, match=r"is not inside|name a file"):
                talk.command(f"/{command} {name}", folder)
    assert not outside.exists()
    talk.command(f"/save {folder / 'inside.json'}", folder)
    with pytest.raises(ValueError, match=r"talks/nowhere, which does not exist; make it"):
        talk.command("/save nowhere/talk.json", folder)


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
GOOD = {"format": "trimaran conversation", "version": 1, "id": "x", "messages": MESSAGES}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no saved conversation: it is not JSON"),
        ("[]", "is no saved conversation: it must be a record with"),
        ('{"messages": []}', 'it must be a record with "format": "trimaran conversation"'),
        ({**GOOD, "version": 2}, "is a conversation of version 2"),
        ({**GOOD, "more": 1}, "is no whole conversation: more: Extra inputs"),
        ({**GOOD, "messages": "none"}, "is no whole conversation: messages: "),
        ({**GOOD, "messages": [{"role": "user", "content": 3}]}, "messages.1.content: Input should be a valid string"),
        (
            {**GOOD, "messages": [{"role": "asistant", "content": ""}]},
            "unknown role 'asistant'; it must be one of system, user, assistant; did you mean assistant?",
        ),
        (
            {**GOOD, "messages": [*MESSAGES, MESSAGES[1]]},
            "message 3 is of the role assistant, and the user's turn is due",
        ),
        ({**GOOD, "messages": MESSAGES[:1]}, "the last question has no answer"),
        ({**GOOD, "messages": [MESSAGES[0], {"role": "assistant", "content": "b\ud83d"}]}, "message 2 has U+D83D at"),
        (
            {**GOOD, "messages": [{"role": "user", "content": "\ufdd1"}, MESSAGES[1]]},
            "U+FDD1 at character 1, which is no",
        ),
        ("[" * 100_000, "is no saved conversation: it is not JSON (it is nested too deep)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_conversation_is_refused_with_a_sentence(content: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(content if isinstance(content, str) else json.dumps(content))
    talk = Talk(FakeBackend(says("ab")))
    talk.session.dialogue = before = Dialogue(None, (Exchange("q", "a"),))
    with pytest.raises(ValueError, match=re.escape(words)):
        talk.command("/load talk.json", tmp_path)
    assert talk.session.dialogue == before


def test_a_long_text_is_translated_in_passages_that_are_told_and_shown_in_order() -> None:
    async def talk() -> None:
        paragraphs = [f"Paragraph {number} has words." for number in range(6)]

        def echo(request: Request) -> list[int]:
            asked = TEXT.tokenizer.decode(request.prompt).partition("Write only the translation.\n\n")[2]
            passage = asked.partition("<|im_end|>")[0]
            return TEXT.tokenizer.encode(f" {passage.upper()} \n")

        backend = FakeBackend(echo, context=300)
        talk = Talk(backend, Mode("translate", "tr"), max_new_tokens=120)
        assert await talk.ask("\n\n".join(paragraphs)) == ""
        assert talk.notes == ["the text is translated in 3 passages, each for itself"]
        assert "".join(talk.shown) == "\n\n".join(paragraphs).upper()
        assert talk.session.dialogue.exchanges[-1].answer == "".join(talk.shown)
        assert backend.most_running == 2, "as many as there are places"
        assert all("Translate the following text into Turkish." in each for each in talk.prompts)
        await talk.ask("Short.")
        assert "Paragraph" not in talk.prompts[-1], "every text stands for itself"

    run(talk())


def test_summaries_of_passages_are_summarized_and_the_last_is_shown() -> None:
    async def talk() -> None:
        backend = FakeBackend(says("ab"), context=300)
        talk = Talk(backend, Mode("summarize"), max_new_tokens=100)
        await talk.ask("A sentence of words. " * 30)
        assert "".join(talk.shown) == "ab"
        assert "then their summaries" in talk.notes[0]
        assert "ab\n\nab" in talk.prompts[-1]

    run(talk())


class Typed:
    """Lines as a terminal gives them."""

    is_terminal = True

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines = list(lines)

    async def read(self) -> str:
        await asyncio.sleep(0)
        line = self.lines.pop(0)
        if isinstance(line, str):
            return line
        raise line


def test_errors_in_a_terminal_are_told_and_the_conversation_goes_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def talk() -> None:
        talk = Talk(FakeBackend(says("ab")))
        lines = Typed(
            "/nonsense", "/load none.json", "hi", "", KeyboardInterrupt, "//hi", KeyboardInterrupt, KeyboardInterrupt
        )
        assert await converse(talk.session, lines, Answers(), tmp_path) == 0
        assert [each.question for each in talk.session.dialogue.exchanges] == ["hi", "/hi"]

    run(talk())
    captured = capsys.readouterr()
    assert captured.out == "ab\nab\n"
    assert captured.err.count("error: ") == 2
    assert "No such file" in captured.err
    assert captured.err.count("Ctrl-C again, or Ctrl-D, leaves") == 2


def test_ranks_that_end_are_an_error_and_the_conversation_can_be_saved(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def talk() -> None:
        talk = Talk(FakeBackend(says("ab")))
        await talk.ask("hi")
        await talk.backend.close()
        assert await converse(talk.session, Typed("more", "/save talk.json", EOFError), Answers(), tmp_path) == 1

    run(talk())
    assert "error: rank 0 was killed" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "talk.json").read_text())["messages"]) == 2


def test_ctrl_c_ends_the_answer_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    async def talk() -> None:
        backend = FakeBackend(says("abab"), holds_after=2)
        talk = Talk(backend)

        async def press() -> None:
            await backend.held.wait()
            os.kill(os.getpid(), signal.SIGINT)

        pressed = asyncio.create_task(press())
        assert await converse(talk.session, Typed("hi", EOFError), Answers(), tmp_path) == 0
        await pressed
        assert talk.session.dialogue.exchanges[-1].answer == "ab"

    before = signal.getsignal(signal.SIGINT)
    run(talk())
    assert signal.getsignal(signal.SIGINT) == before
    captured = capsys.readouterr()
    assert captured.out == "ab\n"
    assert "the answer was ended by Ctrl-C" in captured.err


def in_pipe(content: bytes, tmp_path: Path, mode: Mode = ANSWER) -> tuple[int, Talk]:
    talk, codes = Talk(FakeBackend(says("ab")), mode), []

    async def converse_() -> None:
        source, sink = os.pipe()
        with os.fdopen(sink, "wb") as file:
            file.write(content)
        codes.append(await converse(talk.session, PipeReader(source), Answers(), tmp_path))
        os.close(source)

    run(converse_())
    return codes[0], talk


def test_in_a_pipe_each_line_is_a_turn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, talk = in_pipe(b"hi\r\n\n/set seed 3\nyou \xff", tmp_path)
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err) == (0, "ab\nab\n", "seed is 3\n")
    assert [each.question for each in talk.session.dialogue.exchanges] == ["hi", "you \ufffd"]


def test_the_first_error_ends_a_pipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, talk = in_pipe(b"hi\n/nonsense\nyou\n", tmp_path)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "ab\n")
    assert "error: there is no command /nonsense" in captured.err
    assert len(talk.session.dialogue.exchanges) == 1


def test_a_line_without_end_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimaran.launchers.chat.terminal._MOST_BYTES", 1000)
    code, _ = in_pipe(b"x" * 5000, tmp_path)
    assert code == 2
    assert "a line of standard input has more than 0 MiB" in capsys.readouterr().err


def test_a_mark_that_a_model_writes_is_not_kept() -> None:
    async def talk() -> None:
        talk = Talk(FakeBackend(says("a\ufdd0b")))
        await talk.ask("one")
        assert talk.session.dialogue.exchanges[-1].answer == "a\ufffdb"
        assert await talk.ask("two") == "stop_token"

    run(talk())


def test_stop_strings_end_an_answer_and_its_request() -> None:
    async def talk() -> None:
        talk = Talk(FakeBackend(says("abcdef")))
        talk.session._stops = ("cd",)
        assert await talk.ask("one") == "stop_string"
        assert "".join(talk.shown) == "ab"
        assert talk.backend.ended == [0]
        assert talk.session.dialogue.exchanges[-1].written is None

    run(talk())


def test_another_try_draws_other_numbers_for_passages_too_and_none_at_temperature_0() -> None:
    async def talk() -> None:
        talk = Talk(FakeBackend(says("ab")), Mode("summarize"), seed=2**63 - 1)
        await talk.ask("one")
        await talk.session.retry(talk.shown.append)
        assert [each.sampling.seed for each in talk.backend.requests] == [2**63 - 1, 0]
        talk.command("/set temperature 0")
        await talk.session.retry(talk.shown.append)
        assert talk.notes == [
            "at temperature 0 the same question has the same answer; /set temperature 0.8 draws others"
        ]

    run(talk())


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_a_model_writes_can_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, file, text = Screen(), io.StringIO(), "a\x1b]0;title\x07b\r\n\tc\u202e\x9b1m 👩\u200d🚀\xa0"
    for stream in (screen, file):
        monkeypatch.setattr(sys, "stdout", stream)
        Answers().show(text)
    assert screen.getvalue() == "a\\x1b]0;title\\x07b\\r\n\tc\\u202e\\x9b1m 👩\u200d🚀\xa0"
    assert file.getvalue() == text


def test_what_standard_output_lacks_is_replaced_in_texts_and_escaped_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    Answers().show("süß ")
    Answers().show_json({"text": "ü"})
    assert stream.buffer.getvalue() == b's?? {"text": "\\u00fc"}\n'  # type: ignore[attr-defined]


def test_a_reader_that_has_enough_ends_the_conversation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `trimaran chat RUN < lines | head -1` does."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def fileno(self) -> int:
            raise OSError

    async def talk() -> None:
        talk = Talk(FakeBackend(says("ab")))
        with pytest.raises(BrokenPipeError):
            await converse(talk.session, Typed("hi", "more"), Answers(), tmp_path)
        assert talk.backend.ended == [0]

    monkeypatch.setattr(sys, "stdout", Gone())
    run(talk())


def test_a_terminal_without_prompt_toolkit_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'trimaran[serve]'")):
        TerminalReader([])
