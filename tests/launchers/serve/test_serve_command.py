"""`trimaran serve` as a process with real ranks: what it says, OpenAI's and lm-eval's clients, signals, bad options."""

import importlib
import json
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.launchers.chat_run import CONTEXT, chat_run
from tests.launchers.runs import Command, run_code, trimaran
from tests.runtime.evaluate.evaluation_files import write_sets
from trimaran.runtime.evaluate.results import read_evaluation

HELLO: Any = [{"role": "user", "content": "ab"}]
LONG: Any = {"model": "talker", "messages": HELLO, "temperature": 0, "max_tokens": 200, "stream": True}
MANY: Any = {"model": "talker", "prompt": ["ab"] * 4, "max_tokens": 240, "n": 8, "stream": True}
"""Texts for seconds, many times what a signal takes."""
MORE: Any = MANY | {"prompt": ["ab"] * 8}
"""Texts that nobody waits for."""
READY = re.compile(
    r"(\S+) is served at http://(?:127\.0\.0\.1|0\.0\.0\.0):(\d+) \(OpenAI's API: http://[0-9.]+:\2/v1\)"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and evaluation sets."""
    folder = tmp_path_factory.mktemp("serve")
    run = chat_run(folder)
    (run / "tokenizer_config.json").unlink()  # `evaluate` ends texts at eos_token alone, where that is named
    write_sets(folder / "sets")
    return folder


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[Command, str]]:
    """Start `trimaran serve` at a free port, and wait until it says its address."""
    with Command.start(folder, ["serve", *options, "--port", "0"]) as command:
        command.wait_until(lambda: "is served at" in command.printed())
        found = READY.search(command.printed())
        assert found is not None, command.printed()
        yield command, f"http://127.0.0.1:{found[2]}"


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    """The address of a server for several tests, on two ranks; at the end it leaves nothing behind."""
    folder = place / "one"
    folder.mkdir()
    with serving(folder, "../talker", "--tp", "2", "--slots", "3") as (command, url):
        yield url
        command.process.send_signal(signal.SIGTERM)
        outcome = command.finish()
    assert outcome.code == 0, outcome.err
    assert outcome.left == []
    assert "talker is served at" in outcome.err
    assert f"3 texts at a time, of at most {CONTEXT} tokens each" in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


def test_a_chat_a_completion_and_a_second_turn(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        (model,) = client.models.list()
        first = client.chat.completions.create(model=model.id, messages=HELLO, temperature=0, max_tokens=8)
        assert first.usage is not None
        assert first.usage.completion_tokens == 8
        answer = first.choices[0].message.content
        again = client.chat.completions.create(**LONG | {"max_tokens": 8})
        assert "".join(chunk.choices[0].delta.content or "" for chunk in again) == answer
        turn: Any = [*HELLO, {"role": "assistant", "content": answer}, {"role": "user", "content": "and?"}]
        second = client.chat.completions.create(model=model.id, messages=turn, max_tokens=1)
        assert second.usage is not None
        assert second.usage.prompt_tokens_details is not None
        assert second.usage.prompt_tokens_details.cached_tokens is not None
        assert second.usage.prompt_tokens_details.cached_tokens >= 5, "what both turns begin with is not computed again"
        seeds = [
            client.completions.create(model=model.id, prompt="ab", max_tokens=12, seed=seed).choices[0].text
            for seed in (1, 1, 2)
        ]
        assert seeds[0] == seeds[1] != seeds[2]
        many = client.completions.create(model=model.id, prompt="ab", max_tokens=12, seed=1, n=3)
        assert many.choices[0].text == seeds[0]
        assert len({choice.text for choice in many.choices}) == 3
    page = httpx.get(url)
    assert "script-src 'sha256-" in page.headers["content-security-policy"]
    assert "trimaran_generated_tokens_total" in httpx.get(f"{url}/metrics").text


def test_echoed_log_probabilities_are_those_of_the_text_as_written(url: str) -> None:
    """What a model writes greedily, scored as a prompt, has the same log-probabilities, each the highest."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        ids = [5, 6, 7]
        written = client.completions.create(model="talker", prompt=ids, max_tokens=6, temperature=0, logprobs=2)
        logprobs = written.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.top_logprobs is not None
        assert all(len(top) == 2 for top in logprobs.top_logprobs)
        text = client.completions.create(
            model="talker", prompt=[ids, ids], max_tokens=6, temperature=0, logprobs=0, echo=True
        ).choices
        for choice in text:
            assert choice.logprobs is not None
            assert choice.logprobs.token_logprobs is not None
            assert choice.logprobs.token_logprobs[3:] == pytest.approx(logprobs.token_logprobs, abs=1e-4)


@pytest.fixture(scope="module")
def local_completions() -> Any:
    """lm-eval's client."""
    return importlib.import_module("lm_eval.models.openai_completions").LocalCompletionsAPI


@pytest.mark.parametrize("tokenized", [True, False])
def test_lm_evals_client_finds_the_scores_of_evaluate(
    url: str, place: Path, tmp_path: Path, local_completions: Any, tokenized: bool
) -> None:
    from lm_eval.evaluator import evaluate

    from trimaran.runtime.evaluate.quiet import quiet
    from trimaran.runtime.evaluate.tasks.load import load_tasks
    from trimaran.runtime.evaluate.tasks.offline import offline

    ours = place / "ours"
    if not ours.exists():
        asked = ("--tasks", "arc_easy,gsm8k", "--data", "sets", "--limit", "6", "--num-fewshot", "0")
        done = trimaran(place, "evaluate", "talker", *asked, "--gen", "max_gen_toks=4", "--samples", "--output", "ours")
        assert done.code == 0, done.err
    expected = read_evaluation(ours)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copyfile(place / "talker" / "tokenizer.json", tokenizer / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    model = local_completions(
        model="talker", base_url=f"{url}/v1/completions", tokenizer=str(tokenizer), max_length=CONTEXT,
        tokenized_requests=tokenized, batch_size=4,
    )  # fmt: skip
    tasks = load_tasks(["arc_easy", "gsm8k"], place / "sets", num_fewshot=0, limit=6, generation={"max_gen_toks": 4})
    with offline(), quiet():
        found = evaluate(lm=model, task_dict={"tasks": dict(tasks.tasks), "groups": {}}, limit=6, bootstrap_iters=0)
    assert found is not None
    for task in ("arc_easy", "gsm8k"):
        scores = {name: value for name, value in expected.results["results"][task].items() if "stderr" not in name}
        theirs = found["results"][task]
        assert {name: theirs[name] for name in scores if "," in name} == {
            name: value for name, value in scores.items() if "," in name
        }
        for sample, other in zip(found["samples"][task], expected.samples[task], strict=True):
            if task == "gsm8k":
                assert sample["resps"] == other["resps"]
                continue
            for mine, its in zip(sample["resps"], other["resps"], strict=True):
                assert mine[0][0] == pytest.approx(its[0][0], abs=1e-4)
                assert mine[0][1] == its[0][1], "whether it is the greedy one"


def test_sigterm_lets_a_stream_finish_and_takes_no_request(place: Path, tmp_path: Path) -> None:
    with serving(tmp_path, str(place / "talker"), "--name", "talker") as (command, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=MANY, timeout=100) as stream:
            lines = stream.iter_lines()
            first = [next(lines) for _ in range(4)]
            command.process.send_signal(signal.SIGTERM)
            command.wait_until(lambda: "no request is taken any more" in command.printed() or has_ended(command))
            refused = try_to_ask(url)
            rest = list(lines)
        outcome = command.finish()
    assert outcome.code == 0, outcome.err
    assert outcome.left == []
    assert first[0].startswith("data: ")
    assert rest[-2:] == ["data: [DONE]", ""]
    assert refused in (None, 503)
    assert "1 answer still being written" in outcome.err


def has_ended(command: Command) -> bool:
    return command.process.poll() is not None


def try_to_ask(url: str) -> int | None:
    """The status of another request, None where nobody listens any more."""
    try:
        return httpx.post(f"{url}/v1/chat/completions", json=LONG).status_code
    except httpx.HTTPError:
        return None


def test_a_second_signal_ends_at_once(place: Path, tmp_path: Path) -> None:
    with (
        serving(tmp_path, str(place / "talker"), "--name", "talker", "--drain", "100") as (command, url),
        httpx.stream("POST", f"{url}/v1/completions", json=MORE, timeout=100) as stream,
    ):
        assert stream.status_code == 200
        next(stream.iter_lines())
        command.process.send_signal(signal.SIGINT)
        command.process.send_signal(signal.SIGTERM)
        outcome = command.finish()
    assert outcome.code in (128 + signal.SIGTERM, 128 + signal.SIGINT), outcome.err
    assert outcome.left == []
    assert "Traceback" not in outcome.err


def test_what_is_wrong_is_told_before_the_ranks_start(place: Path, tmp_path: Path) -> None:
    run = str(place / "talker")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        (tmp_path / "no-keys").write_text("# none\n")
        for options, says in (
            ((run, "--port", port), f"can't listen at 127.0.0.1 port {port}: Address already in use; choose another"),
            ((run, "--host", "0.0.0.0"), "--host 0.0.0.0 can be reached from other machines, so requests must have"),
            ((run, "--host", "192.0.2.1", "--api-key-file", "no-keys"), "no-keys has 0 API keys"),
            ((run, "--api-key-file", "nothing"), "nothing: No such file or directory"),
            ((run, "--mode", "translate"), "--mode translate needs --to"),
            (("nothing",), "nothing has no whole checkpoint"),
            ((run, "--port", "0", "--tp", "64"), "64"),
        ):
            outcome = trimaran(tmp_path, "serve", *options)
            assert outcome.code == 2, outcome.err
            assert says in outcome.err.replace("\n", " ")
            assert "Traceback" not in outcome.err
            assert outcome.left == []


def test_signals_while_the_ranks_end_change_nothing(place: Path, tmp_path: Path) -> None:
    with serving(tmp_path, str(place / "talker")) as (command, _):
        for _ in range(3):  # of one kind, they may arrive as one
            command.process.send_signal(signal.SIGTERM)
        command.process.send_signal(signal.SIGINT)
        outcome = command.finish()
    assert outcome.code == 0, outcome.err
    assert outcome.left == []
    assert "Traceback" not in outcome.err


WITHOUT = """
import sys
name, run = sys.argv[1:]
for module in list(sys.modules):
    if module.startswith("trimaran.launchers.serve."):
        del sys.modules[module]
    elif module.split(".")[0] == name:
        sys.modules[module] = None
sys.modules[name] = None
from trimaran.launchers.cli.app import main
sys.argv = ["trimaran", "serve", run]
main()
"""


@pytest.mark.parametrize("name", ["starlette", "uvicorn"])
def test_without_its_packages_the_command_says_what_to_install(place: Path, tmp_path: Path, name: str) -> None:
    outcome = run_code(tmp_path, WITHOUT, name, str(place / "talker"))
    assert outcome.code == 2, outcome.err
    assert outcome.last_line == (f"error: trimaran serve needs the package {name}: pip install 'trimaran[serve]'")


def test_ranks_that_die_end_the_server_with_their_name(place: Path, tmp_path: Path) -> None:
    with serving(tmp_path, str(place / "talker"), "--pp", "2") as (command, _):
        command.ranks()[1].send_signal(signal.SIGKILL)
        outcome = command.finish()
    assert outcome.code == 1, outcome.err
    assert outcome.left == []
    assert "the model's ranks have ended: rank 1" in outcome.err
