"""The commands as a list: the help of each, the version, completion, and what is imported for them."""

import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tests.launchers.forked import fork_server
from trimaran.launchers.cli.app import COMMANDS, app, main
from trimaran.launchers.cli.common.suggested_prompt import in_quotes

_SCREEN = {"COLUMNS": "100", "TERMINAL_WIDTH": "100"}
_MOST_LINES = 50


def _names() -> Iterator[tuple[str, ...]]:
    """Yield the words of every command, and of every command of a group."""
    listed = get_command(app).commands  # type: ignore[attr-defined]
    for name, command in listed.items():
        yield (name,)
        for below in getattr(command.load(), "commands", {}):
            yield name, below


def test_every_command_has_a_help_of_one_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 100)
    names = list(_names())
    assert {("data", "show"), ("tune", "best"), ("scaling", "fit"), ("train",)} <= set(names)
    for words in [(), *names]:
        result = CliRunner().invoke(app, [*words, "--help"], env=_SCREEN)
        lines = result.output.splitlines()
        assert result.exit_code == 0, words
        assert len(lines) <= _MOST_LINES, f"{words}: {len(lines)} lines"
        assert max(map(len, lines)) <= 100, words
        assert "Usage: " in result.output, words


def test_the_list_of_commands_is_grouped_and_names_each_once() -> None:
    output = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    names = [name for commands in COMMANDS.values() for name in commands]
    assert len(set(names)) == len(names)
    for panel, commands in COMMANDS.items():
        assert f"─ {panel} ─" in output
        for name, (_, summary) in commands.items():
            assert [line for line in output.splitlines() if f"│ {name} " in line and summary in line], name


def test_a_slip_in_the_name_of_a_command_is_told_the_nearest() -> None:
    result = CliRunner().invoke(app, ["trian"])
    assert result.exit_code == 2
    assert "Did you mean 'train'" in result.output


def test_a_suggested_prompt_is_one_word_for_a_shell_and_readable() -> None:
    assert in_quotes("İstanbul'un şehir ışıkları") == '"İstanbul\'un şehir ışıkları"'
    for text in ("To be", "it's $HOME", "it's `date`", "a\\'b", "'\"'", "wow!'", "*", ""):
        assert shlex.split(in_quotes(text)) == [text]
        assert not in_quotes(text).startswith('"') or not set(text) & set("$`\\!")


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"trimaran {version('trimaran')}\n")


@pytest.mark.parametrize(("shell", "file"), [("bash", ".bashrc"), ("zsh", ".zshrc"), ("fish", ".config/fish")])
def test_completion_is_installed_for_the_shell_that_is_named(
    shell: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["--install-completion", shell])
    assert result.exit_code == 0, result.output
    assert f"completion for {shell} is installed in {tmp_path}" in result.output
    assert (tmp_path / file).exists()
    (tmp_path / "full").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "full"))  # no folder, so nothing can be written there
    refused = CliRunner().invoke(app, ["--install-completion", shell])
    assert refused.exit_code == 2
    assert "error: " in refused.output


def test_a_shell_is_answered_with_the_commands_and_their_options(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYDANTIC_DISABLE_PLUGINS", "__all__")  # as `main` does, for good

    def answers(words: str) -> set[str]:
        monkeypatch.setenv("_TRIMARAN_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        monkeypatch.setattr(sys, "argv", ["trimaran"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return set(capfd.readouterr().out.split())

    assert answers("trimaran ch") == {"check", "chat"}
    assert {"--set", "--memory"} <= answers("trimaran check --")


def test_the_list_of_commands_imports_none_of_them() -> None:
    ours = {name for name in fork_server().imported["command line"] if name.startswith("trimaran.")}
    assert ours == {"trimaran.launchers", "trimaran.launchers.cli", "trimaran.launchers.cli.app",
                    "trimaran.launchers.cli.common", "trimaran.launchers.cli.common.one_screen"}  # fmt: skip


def test_check_imports_neither_numpy_nor_what_only_other_commands_need() -> None:
    """That is nearly half of its CPU-seconds; `python -X importtime` tells of what has come."""
    imported = set(fork_server().imported["check"])
    assert "trimaran.launchers.cli.planning.overview" in imported
    heavy = {"numpy", "torch", "safetensors", "tokenizers", "huggingface_hub", "matplotlib", "psutil", "asyncio",
             "http.client", "ssl", "multiprocessing", "trimaran.runtime.data.corpus"}  # fmt: skip
    assert imported & heavy == set()
