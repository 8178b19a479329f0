"""A twin in a conversation: passages enter the prompt, sources are told, and silent texts end without the model."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.fake_backend import FakeBackend
from tests.launchers.test_chat import END, TEXT, Typed, run, says
from tests.twin.test_grounding import PASSAGES
from trimaran.launchers.chat.asking import Asker
from trimaran.launchers.chat.loop import converse
from trimaran.launchers.chat.session import INTERRUPTED, Session
from trimaran.launchers.chat.terminal import Answers
from trimaran.runtime.infer.modes import ANSWER
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.twin.asking import Twin
from trimaran.runtime.twin.retrieval.library import Library
from trimaran.runtime.twin.retrieval.silence import build_index

QUESTION = "Who was Yorick, whom Horatio knew?"


def talk(backend: FakeBackend, **options: Any) -> Session:
    twin = Twin(Library(build_index(PASSAGES, "en")), "You are Hamlet.")
    params = SamplingParams(max_new_tokens=200, context="stop", stop_tokens=(END,))
    return Session(Asker(backend, TEXT), ANSWER, params, (), None, [].append, twin, **options)


def asked_and_told(session: Session, folder: Path, *lines: str) -> int:
    codes = []

    async def hold() -> None:
        codes.append(await converse(session, Typed(*lines, EOFError), Answers(), folder))

    run(hold())
    return codes[0]


def test_an_answer_rests_on_passages_and_its_sources_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    backend = FakeBackend(says('I knew Yorick [1]. He said "to sleep all day" [7, 1].'), context=4000)
    session = talk(backend)
    assert asked_and_told(session, tmp_path, QUESTION, "And what did Yorick have?", "Tell me more.") == 0
    first, second, third = (TEXT.tokenizer.decode(each.prompt) for each in backend.requests)
    assert first.startswith("<|im_start|>system\nYou are Hamlet.\n\n")
    assert "[1] Hamlet, ACT 9\nHAMLET.\nAlas, poor Yorick!" in first
    assert "<|im_start|>user\nWho was Yorick, whom Horatio knew?<|im_end|>" in second, "history without its passages"
    assert third.startswith(second), "what goes on with a question has its passages in the turn of that"
    assert third.endswith("<|im_start|>user\nTell me more.<|im_end|>\n<|im_start|>assistant\n")
    captured = capsys.readouterr()
    assert captured.out.startswith('I knew Yorick [1]. He said "to sleep all day" [1].\n')
    assert "[1] Hamlet, ACT 9, lines 500 to 503 (hamlet.md)" in captured.err
    assert "[7] is no passage of the prompt, and is taken out of the answer" in captured.err
    assert "no passage has these words as they are: to sleep all day" in captured.err
    kept = session.dialogue.exchanges[0].answer
    assert "[7]" not in kept
    assert "[1]" in kept


def test_in_a_pipe_the_checked_answer_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    session = talk(FakeBackend(says("I knew Yorick [1]. [7]"), context=4000), streams=False)
    asked_and_told(session, tmp_path, QUESTION)
    assert capsys.readouterr().out.strip() == session.dialogue.exchanges[0].answer == "I knew Yorick [1]."


def test_where_the_texts_are_silent_the_model_is_not_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    backend = FakeBackend(says("ab"), context=4000)
    session = talk(backend)
    asked_and_told(session, tmp_path, "How do I repair a carburettor?")
    assert backend.requests == []
    assert capsys.readouterr().out.strip() == session.dialogue.exchanges[0].answer != ""


def test_passages_whose_turn_has_left_the_context_come_with_the_question(tmp_path: Path) -> None:
    backend = FakeBackend(says("ab"), context=4000)
    session = talk(backend)
    asked_and_told(session, tmp_path, QUESTION)
    session.dialogue = replace(session.dialogue, first=1)
    asked_and_told(session, tmp_path, "Why?")
    told = TEXT.tokenizer.decode(backend.requests[-1].prompt)
    assert told.count("Alas, poor Yorick!") == 1
    assert told.endswith(f"{QUESTION}\n\nWhy?<|im_end|>\n<|im_start|>assistant\n")


def test_a_context_without_room_for_a_passage_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    session = talk(FakeBackend(says("ab"), context=300))
    asked_and_told(session, tmp_path, QUESTION)
    assert "has no room for a passage" in capsys.readouterr().err
    assert session.dialogue.exchanges == ()


def test_an_interrupted_answer_of_a_twin_is_kept() -> None:
    async def interrupted() -> None:
        backend = FakeBackend(says("I knew Yorick"), context=4000, holds_after=6)
        session = talk(backend)
        asked = asyncio.create_task(session.ask(QUESTION, [].append))
        await backend.held.wait()
        asked.cancel()
        assert await asked == INTERRUPTED
        assert session.dialogue.exchanges[-1].answer.startswith("I knew")

    run(interrupted())


def test_a_run_that_is_no_twin_has_no_library(tmp_path: Path) -> None:
    assert Twin.find(tmp_path) is None
