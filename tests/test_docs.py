"""Every command that README, docs/ and the examples show is run here, shortened, and every link to a file leads somewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
ENTRY = [sys.executable, "-m", "trimaran.launchers.cli.app"]
SHORT = {
    "parallel.dp": 1,
    "train.num_steps": 4,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 1,
    "train.eval_interval": 2,
    "train.eval_batches": 1,
    "checkpoint.interval": 2,
    "lr_schedule.warmup_steps": 1,
    "data.source": "[my-texts]",
    "data.tokenizer_vocab_size": 300,
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
    return ENTRY + words[1:]


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=280, check=False)


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


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page: Path, folder: Path) -> None:
    for command in shell_lines(page):
        if command in NOT_RUN or command.startswith("python benchmarks/"):  # tests of benchmarks/ run those
            continue
        command, _, target = command.partition(" > ")
        done = run(shortened(command), folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if target:
            assert done.stdout.strip(), f"{command} printed nothing to put into {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_output_is_what_the_command_prints(page: Path, folder: Path) -> None:
    for block in blocks(page, ""):
        if block.startswith("$ "):
            command, _, shown = block[2:].partition("\n")
            done = run(ENTRY + shlex.split(command)[1:], folder)
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
    done = run([*ENTRY, "check", f"examples/{example.name}"], folder)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout


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
    spec["train"] |= {"num_steps": 5, "eval_interval": 0, "output_dir": str(folder / "runs" / "short")}
    (folder / "short.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    environment = {**os.environ, "MAKEFLAGS": ""}
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
