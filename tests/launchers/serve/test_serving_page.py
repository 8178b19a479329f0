"""Every command of docs/serving.md: servers start as it says, and its requests and its program get their answers."""

import re
import shlex
from pathlib import Path

import httpx
import pytest

from tests.launchers.chat_run import chat_run
from tests.launchers.runs import run_code
from tests.launchers.serve.test_serve_command import serving
from tests.test_docs import ROOT, blocks, shell_lines

PAGE = ROOT / "docs" / "serving.md"
WRITTEN_ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    run = chat_run(tmp_path)
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs" / "assistant")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "keys.txt").write_text("sk-of-the-page\n")
    return tmp_path


def curl(line: str, url: str, key: str | None = None) -> httpx.Response:
    """Send what a line with curl sends."""
    words = shlex.split(line.replace(WRITTEN_ADDRESS, url))
    assert words.pop(0) == "curl"
    headers, content, address = {} if key is None else {"authorization": f"Bearer {key}"}, None, ""
    while words:
        word = words.pop(0)
        if word == "-H":
            name, _, value = words.pop(0).partition(":")
            headers[name] = value.strip()
        elif word == "-d":
            content = words.pop(0)
        else:
            assert not word.startswith("-"), f"{word} is not known here"
            address = word
    return httpx.request("GET" if content is None else "POST", address, headers=headers, content=content, timeout=100)


def test_every_command_of_the_page(place: Path) -> None:
    lines = shell_lines(PAGE)
    servers = [line for line in lines if line.startswith("trimaran serve ")]
    requests = [line for line in lines if line.startswith("curl ")]
    assert len(servers) == 3
    assert len(requests) == 3
    assert len(servers) + len(requests) == len(lines)
    (program,) = blocks(PAGE, "python")
    for line in servers:
        keys = "--api-key-file" in line
        with serving(place, *shlex.split(line)[2:]) as (command, url):
            for request in requests:
                if keys:
                    assert curl(request, url).status_code == 401
                answer = curl(request, url, "sk-of-the-page" if keys else None)
                assert answer.status_code == 200, answer.text
                assert "assistant" in answer.text
            program_here = program.replace(WRITTEN_ADDRESS, url).replace('"none"', '"sk-of-the-page"')
            said = run_code(place / "elsewhere", program_here)
            assert said.code == 0, said.err
            assert httpx.get(f"{url}/health").json() == {"status": "ok"}
            command.process.send_signal(15)
            outcome = command.finish()
        assert outcome.code == 0, outcome.err
        assert outcome.left == []


def test_the_page_names_what_the_server_has() -> None:
    """Every option that the page names is one of the command, and every endpoint one of the application."""
    from trimaran.launchers.cli import serve

    source = Path(serve.__file__).read_text()
    for option in set(re.findall(r"--([a-z-]+)", PAGE.read_text())):
        assert option.replace("-", "_") in source, f"--{option}"
