"""A server in front of a backend without a model, shared by the tests of a file."""

from collections.abc import Iterator

import openai
import pytest

from tests.launchers.serve.fake_backend import FakeBackend, writes
from tests.launchers.serve.serving import Served, make_text, served
from trimaran.runtime.infer.prompts import RunText

SENTENCE = "hello, wörld! \N{SLIGHTLY SMILING FACE} end"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> RunText:
    return make_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def sentence(text: RunText) -> list[int]:
    """The tokens of SENTENCE, which the backend writes again and again, and the end of text."""
    return [*text.tokenizer.encode(SENTENCE), text.tokenizer.eot_id]


@pytest.fixture(scope="module")
def server(text: RunText, sentence: list[int]) -> Iterator[Served]:
    with served(text, lambda: FakeBackend(writes(sentence), context=200)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
