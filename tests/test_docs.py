"""Every command that README, docs/ and the examples show runs, shortened, and every link to a file leads somewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import counting
from tests.launchers.runs import trimaran

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
AS_A_SHELL_WOULD = "generation.md"  # commands of the other pages are forked, see tests/launchers/fork_server.py
SHORT = {
    "parallel.dp": 1,
    "train.num_steps": 4,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 1,
    "train.seq_len": 64,
    "train.eval_interval": 2,
    "train.eval_batches": 1,
    "checkpoint.interval": 2,
    "lr_schedule.warmup_steps": 1,
    "data.source": "[my-texts]",
    "data.tokenizer_vocab_size": 300,
    "launcher.threads_per_rank": 1,
}
NOT_RUN = {
    "make train": "test_make_train runs it with a shortened spec",
    "make test": "it is what runs this test",
    "source .venv/bin/activate": "the tests run inside the environment",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [command for command in commands if command and not command.startswith("#")]


def shortened(command: str) -> list[str]:
    """The command's arguments, a training run made short and its corpus small."""
    words = shlex.split(command)
    assert words[0] == "trimaran", f"{command!r} is not a trimaran command; run it here or list it in NOT_RUN"
    if words[1] == "train":
        words += [word for name, value in SHORT.items() for word in ("--set", f"{name}={value}")]
    if words[1] == "generate":
        words += ["--max-new-tokens", "5"]
    return words[1:]


def run_in_shell(line: str, folder: Path, interpreters: int) -> subprocess.CompletedProcess[str]:
    """Run a line in a shell where `trimaran` is on the PATH, as after `source .venv/bin/activate`."""
    counting.record("cold start", line.partition(" --set")[0], interpreters)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the examples and a small corpus."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "my-texts").mkdir()
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "while",
        "autumn",
        "leaves",
        "fall",
        "slowly",
        "into",
        "cold",
        "rivers",
    ]
    text = "\n\n".join(" ".join(words[(i * k + k) % len(words)] for k in range(90)) for i in range(1, 900))
    (tmp_path / "my-texts" / "fox.txt").write_text(text, encoding="utf-8")
    return tmp_path


def commands_of(page: Path) -> list[str]:
    """The commands that a test of the page runs; tests of benchmarks/ run those."""
    return [line for line in shell_lines(page) if line not in NOT_RUN and not line.startswith("python benchmarks/")]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page: Path, folder: Path) -> None:
    for command in commands_of(page):
        line, _, target = command.partition(" > ")
        words = shortened(line)
        if page.name == AS_A_SHELL_WOULD:
            has_ranks = words[0] == "train" or "--tp" in words  # they are forked from an interpreter of their own
            done = run_in_shell(shlex.join(["trimaran", *words]), folder, interpreters=2 if has_ranks else 1)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            continue
        outcome = trimaran(folder, *words)
        assert outcome.code == 0, f"{command}\n{outcome.out}\n{outcome.err}"
        if target:
            assert outcome.out.strip(), f"{command} printed nothing to put into {target}"


def test_the_page_that_a_shell_runs_trains_and_generates() -> None:
    (page,) = (page for page in PAGES if page.name == AS_A_SHELL_WOULD)
    assert {command.split()[1] for command in commands_of(page)} == {"train", "generate"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_output_is_what_the_command_prints(page: Path, folder: Path) -> None:
    for block in blocks(page, ""):
        if block.startswith("$ "):
            command, _, shown = block[2:].partition("\n")
            done = run_in_shell(command, folder, interpreters=1)
            assert (done.stdout + done.stderr).strip() == shown.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_command_shown_in_an_example_names_the_example(example: Path) -> None:
    commands = re.findall(r"^#\s+(trimaran .*)$", example.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert commands, f"{example.name} shows how to run it"
    for command in commands:
        assert f"examples/{example.name}" in shlex.split(command)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_a_valid_spec(example: Path, folder: Path) -> None:
    outcome = trimaran(folder, "check", f"examples/{example.name}")
    assert outcome.code == 0, outcome.err
    assert "parameters" in outcome.out


@pytest.mark.slow
def test_make_train(folder: Path) -> None:
    """`make train` in the repository's own environment, on an example made short."""
    if not (ROOT / ".venv" / ".trimaran-runtime").exists():
        pytest.skip("no .venv made by make: these tests run in another environment")
    spec = yaml.safe_load((folder / "examples" / "gpt2-cpu.yaml").read_text(encoding="utf-8"))
    spec["data"] = {
        "source": [str(folder / "my-texts")],
        "tokenizer_vocab_size": 300,
        "cache_dir": str(folder / "cache"),
    }
    spec["lr_schedule"]["warmup_steps"] = 2
    spec["launcher"] = {"threads_per_rank": 1}
    spec["train"] |= {"num_steps": 3, "seq_len": 64, "eval_interval": 0, "output_dir": str(folder / "runs" / "short")}
    (folder / "short.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    counting.record("cold start", "make train", 2)
    environment = {**os.environ, "MAKEFLAGS": "", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        ["make", "-C", str(ROOT), "train", f"SPEC={folder}/short.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report" in done.stderr
