"""benchmarks/commands.py: what a command's process takes, and nothing where it fails; figures are not tested."""

import sys
from pathlib import Path

import pytest

from tests.benchmarks.scripts import load_script


def test_seconds_of_a_command_and_none_where_a_checkout_lacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"  # in its place: the command's words are the last
    python.write_text('#!/bin/sh\nshift 2\n[ "$1" = --help ]\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    cpu_seconds = load_script("commands").cpu_seconds
    assert cpu_seconds(["--help"], tmp_path, tmp_path) >= 0
    assert cpu_seconds(["fields", "parallel"], tmp_path, tmp_path) is None
