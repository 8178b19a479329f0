"""benchmarks/first_minutes.py times a clone that is set up and trains; figures are not tested"""

import subprocess
from pathlib import Path

import pytest

from tests.benchmarks.scripts import load_script

ROOT = Path(__file__).parents[2]
MAKEFILE = """
.venv/.trimaran-runtime:
	@mkdir -p .venv/lib/python3.11/site-packages/torch-2.13.0.dist-info && head -c 2500000 /dev/zero > $@
train: .venv/.trimaran-runtime
	@mkdir -p runs/quickstart
	@echo '$(ARGS)' | grep -q num_steps=7
	@echo '{"step": 1, "loss": 7.6}' > runs/quickstart/metrics.jsonl
	@echo 'step 1: loss 7.6' >&2
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    (folder / "Makefile").write_text(MAKEFILE)
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "--quiet"], ["add", "."], [*name, "commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    return folder


def test_the_table(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_script("first_minutes").main(["--repository", str(repository), "--steps", "7"])
    clone, size = capfd.readouterr().out.strip().split("\n\n")
    seconds = {name.strip(): float(s) for _, name, s, *_ in (line.split("|") for line in clone.splitlines()[2:])}
    assert list(seconds)[:2] == ["git clone", "install"]
    step, loss, end = list(seconds.values())[2:]
    assert max(step, loss) <= end, "counted from the start of make train"
    assert size == "The environment: 2 MB, 1 packages."


def test_a_run_that_fails_is_told_with_what_it_printed(repository: Path) -> None:
    with pytest.raises(SystemExit, match=r"make train ended with 2 and was seen at \[\] alone:\n(.*\n)*.*Error 1"):
        load_script("first_minutes").main(["--repository", str(repository)])


def test_the_targets_are_those_of_our_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "RUNTIME := $(VENV)/.trimaran-runtime\n" in makefile
    assert "VENV := .venv\n" in makefile
    assert "\ntrain: $(RUNTIME)\n" in makefile
    assert load_script("first_minutes").RUNTIME == ".venv/.trimaran-runtime"
