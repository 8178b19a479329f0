"""The ranks of a served model as processes: answers, places, how they end and what they leave, whoever ends first."""

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import cast

import psutil
import pytest
import torch

from tests.launchers.forked import fork_server
from tests.launchers.runs import LEAVE_S, Command, ranks_in
from tests.launchers.test_generate import CONTEXT, make_run
from trimaran.launchers.serve.ranks import RankBackend
from trimaran.launchers.worker.serve import fitting
from trimaran.runtime.evaluate.engine.weights import load_stages, open_model
from trimaran.runtime.infer.batching.messages import (
    BackendGoneError,
    Event,
    Failed,
    NewToken,
    PromptScores,
    Request,
)
from trimaran.runtime.infer.batching.replica import Limits
from trimaran.runtime.infer.generate import generate
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.mesh import lone_mesh

GREEDY = SamplingParams(12, temperature=0.0, context="stop")
LONG = SamplingParams(2000, temperature=1.0, context="stop")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("served"))


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a test are known by their folder, and forked, not started from nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(sys, "executable", str(fork_server().shim))


def left_behind(folder: Path) -> list[str]:
    """What runs or lies in a folder after some time."""
    deadline = time.monotonic() + LEAVE_S
    while True:
        left = [f"{each.pid} {each.name()}" for each in psutil.process_iter() if _works_in(each, folder)]
        left += [each.name for each in folder.glob("trimaran-serve-*")]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.pid != os.getpid() and process.cwd() == str(folder)
    except psutil.Error:
        return False


@asynccontextmanager
async def started(run: Path, **options: int) -> AsyncIterator[RankBackend]:
    """A backend that is closed even where a test fails."""
    backend = await RankBackend.start(run, **options)
    try:
        yield backend
    finally:
        await backend.close()


async def answer(backend: RankBackend, request: Request, most: int | None = None) -> list[Event]:
    """The events of a request, up to `most` of them."""
    found: list[Event] = []
    async with aclosing(cast("AsyncGenerator[Event, None]", backend.submit(request))) as events:
        async for event in events:
            found.append(event)
            if len(found) == most:
                break
    return found


def tokens_of(events: list[Event]) -> list[int]:
    return [each.token for each in events if isinstance(each, NewToken)]


def expected(run: Path, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    model = open_model(run)
    stages = load_stages(model.origin, model.spec, lone_mesh(), torch.device("cpu"))
    return [generate(stages, lone_mesh(), model.spec, [each], GREEDY)[0].tokens for each in prompts]


PROMPTS = [tuple(range(5 * number, 5 * number + 5 + number)) for number in range(6)]


def test_two_ranks_answer_and_the_death_of_one_ends_all_by_its_name(run: Path, tmp_path: Path) -> None:
    async def talk() -> None:
        async with started(run, tp=2, slots=2) as backend:
            assert (backend.slots, backend.context) == (2, CONTEXT)
            requests = [Request(number, prompt, GREEDY) for number, prompt in enumerate(PROMPTS)]
            answers = await asyncio.gather(*(answer(backend, each) for each in requests))
            assert [tokens_of(each) for each in answers] == expected(run, PROMPTS)
            (again, *_) = await answer(backend, Request(10, (*PROMPTS[5], *tokens_of(answers[5]), 7), GREEDY))
            assert again == PromptScores(10, cached=len(PROMPTS[5]) + 11)
            # Two places are taken by texts that nobody reads to their end, and the third waits for one of them.
            for number in range(20, 26):
                assert len(await answer(backend, Request(number, (number,), LONG), most=4)) == 4
            assert (backend.active, backend.waiting) == (0, 0)
            failed = await answer(backend, Request(30, (1,) * (CONTEXT + 1), GREEDY))
            assert isinstance(failed[0], Failed)
            ranks_in(tmp_path)[1].send_signal(signal.SIGKILL)
            with pytest.raises(BackendGoneError, match=r"rank 1 .*tp 1.* was killed") as told:
                await asyncio.gather(*(answer(backend, Request(number, (3,), LONG)) for number in range(40, 4000)))
            with pytest.raises(BackendGoneError, match="rank 1"):
                await answer(backend, Request(41, (3, 4), GREEDY))
            assert str(tmp_path) not in str(told.value), "the folder of the ranks' output goes with them"
            await backend.close()
            await backend.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(talk())
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("tokens", "slots", "context"), [(10**9, 8, 4096), (8 * 4096, 8, 4096), (3 * 4096 + 5, 3, 4096), (100, 1, 100)]
)
def test_slots_and_context_are_those_that_the_memory_has_room_for(tokens: int, slots: int, context: int) -> None:
    assert fitting(Limits(8, 4096), tokens) == Limits(slots, context)


def test_a_close_lets_what_runs_end_and_takes_nothing_new(run: Path, tmp_path: Path) -> None:
    async def talk() -> None:
        async with started(run, slots=3) as backend:
            texts = [asyncio.create_task(answer(backend, Request(number, (9,), GREEDY))) for number in range(5)]
            await asyncio.sleep(0)  # all are submitted
            closing = asyncio.create_task(backend.close(drain_s=LEAVE_S))
            await asyncio.sleep(0)
            with pytest.raises(BackendGoneError, match="being closed"):
                await answer(backend, Request(7, (9,), GREEDY))
            await closing
            for each in texts:
                assert tokens_of(await each) == expected(run, [(9,)])[0]
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(talk())
    assert left_behind(tmp_path) == []


def test_a_close_without_time_cuts_texts_off(run: Path, tmp_path: Path) -> None:
    async def talk() -> None:
        async with started(run, slots=1) as backend:
            texts = [asyncio.create_task(answer(backend, Request(number, (9,), LONG))) for number in range(50)]
            await asyncio.sleep(0)
            await backend.close()
            ended = await asyncio.gather(*texts, return_exceptions=True)
            assert isinstance(ended[-1], BackendGoneError)
            assert all("closed" in str(each) for each in ended if isinstance(each, BaseException))

    asyncio.run(talk())
    assert left_behind(tmp_path) == []


def test_a_process_that_is_killed_ends_texts_by_a_sentence(run: Path, tmp_path: Path) -> None:
    async def talk() -> None:
        async with started(run, slots=1) as backend:
            text = asyncio.create_task(answer(backend, Request(0, (9,), LONG)))
            those = [each for each in psutil.process_iter() if _works_in(each, tmp_path)]
            for each in those:  # stopped first, so that none tells of the death of another
                each.suspend()
            for each in those:
                each.kill()
            with pytest.raises(BackendGoneError, match="the model's ranks were killed by SIGKILL"):
                await answer(backend, Request(1, (9,), LONG))
            (ended,) = await asyncio.gather(text, return_exceptions=True)
            assert isinstance(ended, BackendGoneError)
            await backend.close()

    asyncio.run(talk())
    assert left_behind(tmp_path) == []


def test_what_can_not_start_is_told(run: Path, tmp_path: Path) -> None:
    async def start(model: Path, **options: int) -> None:
        await RankBackend.start(model, **options)

    for options, words in (({"tp": 5}, "tp"), ({"slots": 0}, "slots"), ({"context": 1}, "context")):
        with pytest.raises(ValueError, match=words):
            asyncio.run(start(run, **options))
    with pytest.raises(ValueError, match="nothing-here is no folder"):
        asyncio.run(start(tmp_path / "nothing-here"))
    assert left_behind(tmp_path) == []


TALKER = """
    import asyncio, sys
    from pathlib import Path
    from trimaran.launchers.serve.ranks import RankBackend
    from trimaran.runtime.infer.batching.messages import Request
    from trimaran.runtime.infer.sampling_params import SamplingParams

    async def talk():
        sys.executable = sys.argv[1]
        backend = await RankBackend.start(Path(sys.argv[2]), pp=2, slots=2)
        async for event in backend.submit(Request(0, (3, 4), SamplingParams(2000, context="stop"))):
            print(event, flush=True)
        print("talked", flush=True)
        await asyncio.sleep(1000)

    asyncio.run(talk())
"""


def test_ranks_leave_with_a_talker_that_is_killed(run: Path, tmp_path: Path) -> None:
    words = [textwrap.dedent(TALKER), str(fork_server().shim), str(run)]
    with Command.start(tmp_path, words, kind="-c") as command:
        command.wait_until(lambda: "talked" in command.printed())
        assert len(command.ranks()) == 2
        command.process.send_signal(signal.SIGKILL)
        command.process.wait()
        deadline = time.monotonic() + LEAVE_S
        while any(_works_in(each, tmp_path) for each in psutil.process_iter()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [each for each in psutil.process_iter() if _works_in(each, tmp_path)]
        assert "NewToken" in command.printed()
