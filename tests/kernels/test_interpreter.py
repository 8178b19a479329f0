"""Runs the files of tests/kernels/interpreted in Triton's interpreter, in two processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import counting

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))
FIRST_HALF = {"test_attention.py", "test_dropout.py", "test_random.py"}  # about as much work as all the others
HALVES = {
    "first": [file for file in FILES if file.name in FIRST_HALF],
    "second": [file for file in FILES if file.name not in FIRST_HALF],
}

TIMEOUT_S = 600  # half a minute of work: only for what hangs, however busy the machine is


def test_there_are_files() -> None:
    assert {file.name for file in FILES} > FIRST_HALF


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 20)
@pytest.mark.parametrize("half", HALVES)
def test_in_the_interpreter(half: str) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
    # NumPy's: exp() may well be infinite, as it may on a GPU.
    command += ["-W", "ignore:overflow encountered:RuntimeWarning", *map(str, HALVES[half])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    counting.record("cold start", "tests/kernels/interpreted")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
