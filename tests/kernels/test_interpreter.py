"""Runs the files of tests/kernels/interpreted in Triton's interpreter, in three processes of their own."""

import os
from pathlib import Path

import pytest

from tests.kernels.interpreter import start_interpreted

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))
PARTS = {  # about as much work each
    "attention": {"test_attention.py"},
    "decode": {"test_decode.py", "test_dropout.py", "test_random.py", "test_rotary.py"},
}
PARTS["others"] = {file.name for file in FILES} - PARTS["attention"] - PARTS["decode"]

TIMEOUT_S = 600  # half a minute of work: only for what hangs, however busy the machine is


def test_there_are_files() -> None:
    assert set.union(*PARTS.values()) == {file.name for file in FILES}
    assert all(PARTS.values())


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 20)
@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part: str, tmp_path: Path) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
    # NumPy's: exp() may well be infinite, as it may on a GPU.
    options += ["-W", "ignore:overflow encountered:RuntimeWarning"]
    # The process is forked from one that may have imported a plugin's module already.
    options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    options += [str(file) for file in FILES if file.name in PARTS[part]]
    code = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    with Path(os.devnull).open() as nothing, (tmp_path / "out").open("w") as out:
        process = start_interpreted(code, options, (nothing, out, out), preload=["pytest"])
        status = process.wait(TIMEOUT_S)
    printed = (tmp_path / "out").read_text(encoding="utf-8")
    assert status == 0, printed[-10000:]
    assert " passed" in printed
    assert " skipped" not in printed
