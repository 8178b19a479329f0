"""Every command that README, docs/ and the examples show runs, shortened, and every link to a file leads somewhere."""

import functools
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from html import escape
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import counting
from tests.launchers.forked import fork_server
from tests.launchers.runs import trimaran
from tests.runtime.evaluate.evaluation_files import write_sets
from tests.session import made_once, session_folder
from trimaran.runtime.spec.names import known_paths, place_of
from trimaran.runtime.spec.reference import default_of, in_code

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
SEARCHES = {
    "tune-lr.yaml": {"search": {"trials": 2}, "prune": {"first_step": 2}},
    "ladder.yaml": {
        "space": {"optimizer.lr": [0.01, 0.03, 0.1, 0.2]},
        "ladder": {"tokens_per_parameter": [0.05]},
    },
}
"""Examples that are searches, not runs, and what makes them short."""
TWINS = ("twin-hamlet.yaml",)
"""Examples that are twins; tests/twin/test_twin_command.py builds them."""
EXAMPLES = [
    path for path in sorted((ROOT / "examples").glob("*.yaml")) if path.name not in SEARCHES and path.name not in TWINS
]
AS_A_SHELL_WOULD = "generation.md"
"""The page whose first `train` and first `generate` run as a user starts them; other commands are forked."""
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
SMALLER = {
    "llama-1gpu.yaml": {
        "launcher.device": "cpu", "model.num_layers": 2, "model.hidden_size": 96, "model.ffn_hidden_size": 256,
    },
    "falcon-40b.yaml": {"model.num_layers": 4},
    "web-corpus.yaml": {
        "data.corpora.plays.source": "[texts/plays]", "data.workers": 1, "parallel.tp": 1, "parallel.pp": 1,
    },
}  # fmt: skip
FEW_TOKENS = {"train.num_steps": 2, "train.global_batch_size": 2, "train.seq_len": 32}
"""Of each of the many runs that a check of rates trains."""
RECIPES = ("web-corpus.yaml",)
SHORT_REWARDS: dict[str, object] = {
    "finetune.epochs": 0.2,
    "finetune.rl.prompts_per_step": 2,
    "finetune.rl.group_size": 4,
    "finetune.rl.max_new_tokens": 8,
    "train.eval_interval": 0,
}
BASE_MODEL = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24, "vocab_size": 300}
FINETUNES: dict[str, dict[str, object]] = {
    "sft.yaml": {"finetune.epochs": 2},
    "lima.yaml": {"finetune.epochs": 2},
    "lora.yaml": {"finetune.epochs": 2, "finetune.adapter.rank": 4},
    "dpo.yaml": {"finetune.epochs": 2},
    "grpo.yaml": SHORT_REWARDS,
}
"""Examples that start from a model and have examples of their own -> what makes them short."""
STARTS_FROM_BASE = {
    "model.preset": "null",
    **{f"model.{name}": value for name, value in BASE_MODEL.items()},
    "checkpoint.init_from": "runs/base",
    "train.seq_len": 512,
}
SHORT_TWIN: dict[str, object] = {
    "finetune.epochs": "null",
    "launcher.device": "cpu",
    **{name: SHORT[name] for name in SHORT if name.partition(".")[0] in ("checkpoint", "lr_schedule", "launcher")},
    **{f"train.{name}": SHORT[f"train.{name}"] for name in ("num_steps", "eval_interval", "eval_batches")},
}
SHORT_ANSWERS = {
    "ask": ["--max-new-tokens", "5"],
    "report": ["--questions", "2", "--answer-tokens", "5", "--prefixes", "2", "--characters", "500"],
}
NOT_OF_FINETUNES = ("data.source", "train.num_steps")
EXTRAS = {
    "data.md": "data",
    "adapters.md": "huggingface",
    "chat.md": "serve",
    "alignment.md": "huggingface",
    "finetuning.md": "huggingface",
    "web-corpus.yaml": "data",
    "evaluation.md": "evaluate",
    "tuning.md": "tune",
    "twin.md": "twin,data",
}
"""Page or example -> the extras that it tells its readers to install."""
NOT_RUN = {
    "make train": "test_make_train runs it with a shortened spec",
    "make test": "it is what runs this test",
    "make twin": "it fetches a model; its commands are those of docs/twin.md, which are run",
    "sh examples/web-corpus.sh": "it fetches packages; the tests have a stand-in of them",
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
    words = shlex.split(command.rpartition(" | ")[2])
    assert words[0] == "trimaran", f"{command!r} is not a trimaran command; run it here or list it in NOT_RUN"
    example = Path(words[2]).name if len(words) > 2 else ""
    changes: dict[str, object] = {}
    if example in FINETUNES:
        changes = {name: value for name, value in SHORT.items() if name not in NOT_OF_FINETUNES}
        changes |= STARTS_FROM_BASE | FINETUNES[example]
    elif words[1] == "twin":
        changes = {} if words[2] in ("build", "ask", "report") else SHORT_TWIN
        words += SHORT_ANSWERS.get(words[2], [])
    elif words[1] in ("train", "schedules", "prepare") or "--rates" in words or example in RECIPES:
        changes = {name: value for name, value in SHORT.items() if name != "data.source" or example not in RECIPES}
        changes |= FEW_TOKENS if "--rates" in words else {}
    if changes or "--memory" in words:
        changes |= SMALLER.get(example, {})
    words += [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    if "--memory" in words and words[1] == "check" and "--rank" not in words:
        words += ["--rank", "0"]
    if words[1] == "calibrate":
        words += ["--smoke", "--ranks", "1", "--dtype", "float32"]
    if words[1] in ("generate", "chat"):
        words += ["--max-new-tokens", "5"]
    for option in {"--widths", "--rates"}.intersection(words):  # the narrowest two, and three rates
        place = words.index(option) + 1
        words[place] = ",".join(words[place].split(",")[: 2 if option == "--widths" else 3])
    return words[1:]


def make_base(folder: Path, commands: list[str]) -> None:
    """Put the small models there that examples of finetuning, and twins, start from, where a command is of one."""

    def begins_some(names: Iterable[str]) -> bool:
        return any(f"examples/{name}" in command for name in names for command in commands)

    if begins_some(FINETUNES):
        go_on_in(folder, made_once(base_run, {}, "runs/base"))
    if begins_some(TWINS):  # a model that takes turns, with room for passages
        taker = "runs/smollm2-135m"
        go_on_in(folder, made_once(base_run, {"position": "rotary", "max_seq_len": 3072}, taker))
        shutil.copyfile(folder / "examples" / "turns.jinja", folder / taker / "chat_template.jinja")


def go_on_in(folder: Path, made: Path) -> None:
    """Give the folder the runs, and the prepared text, of another one."""
    for name in ("runs", ".cache"):
        shutil.copytree(made / name, folder / name, dirs_exist_ok=True)


def base_run(changes: dict[str, object], output: str) -> Path:
    """Train a small model for one step; return the folder that its run lies in."""
    train = {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "seq_len": 64, "output_dir": output}
    spec = {
        "model": BASE_MODEL | changes,
        "data": {"source": ["my-texts"], "tokenizer_vocab_size": 300},
        "optimizer": {"lr": 1e-3},
        "train": train,
        "launcher": {"device": "cpu", "threads_per_rank": 1},
    }
    folder = session_folder() / output.replace("/", "-")
    write_texts(folder)
    (folder / "base.yaml").write_text(yaml.safe_dump(spec))
    outcome = trimaran(folder, "train", "base.yaml")
    assert outcome.code == 0, outcome.err
    return folder


def shared_training(command: str) -> Path:
    """Run a training command that several pages show; return the folder that its run lies in."""
    folder = session_folder() / f"shared-{SHARED.index(command)}"
    shutil.copytree(made_once(whole_folder), folder)
    (hidden := folder / "environment").mkdir()
    outcome = trimaran(folder, *shortened(command), environment=environment_of(ROOT / "README.md", hidden))
    assert outcome.code == 0, f"{command}\n{outcome.out}\n{outcome.err}"
    return folder


def shorten_searches(folder: Path) -> None:
    """Make the searches among the examples short: their base as a training run's command, few trials and tokens."""
    for name in SEARCHES.keys() & {path.name for path in (folder / "examples").iterdir()}:
        search = yaml.safe_load((folder / "examples" / name).read_text())
        base = yaml.safe_load((folder / search["base"]).read_text())
        for path, value in SHORT.items():
            section, _, field = path.partition(".")
            base.setdefault(section, {})[field] = yaml.safe_load(str(value))
        short = folder / "examples" / f"short-{name}"
        short.write_text(yaml.safe_dump(base))
        search["base"] = f"examples/{short.name}"
        for section, fields in SEARCHES[name].items():
            search[section] |= fields
        if "ladder" in search:
            search["ladder"]["rungs"] = search["ladder"]["rungs"][:3]
        (folder / "examples" / name).write_text(yaml.safe_dump(search))


def run_in_shell(
    line: str, folder: Path, interpreters: int, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a line in a shell where `trimaran` is on the PATH, as after `source .venv/bin/activate`."""
    if interpreters:
        counting.record("cold start", line.partition(" --set")[0], interpreters)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_WAIT_POLICY": "passive", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the examples and a small corpus."""
    shutil.copytree(made_once(whole_folder), tmp_path, dirs_exist_ok=True)
    return tmp_path


def whole_folder() -> Path:
    """Make the folder of which every test has a copy."""
    folder = session_folder() / "documents"
    shutil.copytree(ROOT / "examples", folder / "examples")
    write_texts(folder)
    write_sets(folder / "evaluation-sets")
    write_pages(folder / "texts")
    shorten_searches(folder)
    return folder


SENTENCE = "the quick brown fox jumps over the lazy dog while autumn leaves fall slowly into cold rivers"


def write_texts(folder: Path) -> None:
    """Write the corpus that stands for a user's, and a text to evaluate."""
    (folder / "my-texts").mkdir(parents=True)
    words = SENTENCE.split()
    text = "\n\n".join(" ".join(words[(i * k + k) % len(words)] for k in range(90)) for i in range(1, 900))
    (folder / "my-texts" / "fox.txt").write_text(text, encoding="utf-8")
    (folder / "held-out.txt").write_text(text[:2000], encoding="utf-8")


def write_pages(folder: Path) -> None:
    """Write what stands for the texts that examples/web-corpus.sh fetches: this project's own pages."""
    pages = folder / "pages" / "doc" / "git-doc"
    pages.mkdir(parents=True)
    for page in (ROOT / "docs").glob("*.md"):
        paragraphs = "".join(f"<p>{escape(each)}</p>" for each in page.read_text(encoding="utf-8").split("\n\n"))
        html = f"<html><body><main><h1>{page.stem}</h1>{paragraphs}</main></body></html>"
        (pages / f"{page.stem}.html").write_text(html, encoding="utf-8")
    shutil.copyfile(ROOT / "docs" / "parallelism.md", pages / "git-add.txt")
    (folder / "plays").mkdir()
    for name in ("clusters", "memory", "run-folder"):
        (pages / f"{name}.html").rename(folder / "plays" / f"{name}.html")
    item = {"prompt": "def double(x):", "canonical_solution": "return 2 * x"}
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(item))


def commands_of(page: Path) -> list[str]:
    """The commands that a test of the page runs; tests of benchmarks/ run those, tests of serve those of a server."""
    elsewhere = ("python benchmarks/", "trimaran serve ", "curl ")
    return [line for line in shell_lines(page) if line not in NOT_RUN and not line.startswith(elsewhere)]


SHARED = ("trimaran train examples/gpt2-cpu.yaml",)
"""Trainings that several pages show: one run serves them all, but for the page that a shell runs."""


def commands_in(example: Path) -> list[str]:
    return re.findall(r"^#\s+(trimaran .*)$", example.read_text(encoding="utf-8"), flags=re.MULTILINE)


@functools.cache
def modules_outside(extras: tuple[str, ...]) -> frozenset[str]:
    """Return the modules that an environment with trimaran and these extras does not have."""
    installed = {"pip", "setuptools"}  # which every new environment has
    waiting = [Requirement(f"trimaran[{','.join(extras)}]")]
    while waiting:
        wanted = waiting.pop()
        try:
            lines = requires(wanted.name) or []
        except PackageNotFoundError:  # of another system or version of Python
            continue
        installed.add(canonicalize_name(wanted.name))
        for needed in map(Requirement, lines):
            choices = [{"extra": each} for each in ("", *wanted.extras)]
            holds = needed.marker is None or any(map(needed.marker.evaluate, choices))
            if holds and (canonicalize_name(needed.name) not in installed or needed.extras):
                waiting.append(needed)
    owners = packages_distributions().items()
    return frozenset(name for name, packages in owners if installed.isdisjoint(map(canonicalize_name, packages)))


def environment_of(text: Path, folder: Path) -> dict[str, str]:
    """Return the environment of a page's commands: the packages that it tells to install, and none of the tests'."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile[makefile.index("\n$(RUNTIME):") : makefile.index("\n$(TESTS):")]
    extras = re.findall(r"-e '?\.\[(\w+)\]", recipe) + [each for each in EXTRAS.get(text.name, "").split(",") if each]
    place = folder / "hidden"
    place.mkdir()
    (place / "sitecustomize.py").write_text(f"HIDDEN = {set(modules_outside(tuple(extras)))!r}\n{HIDE}")
    return {"PYTHONPATH": str(place)}


def test_an_environment_has_what_its_extras_name() -> None:
    plain, readme = modules_outside(()), modules_outside(("huggingface",))
    assert {"pytest", "hypothesis", "mypy"} <= readme <= plain
    assert {"transformers", "gguf"} <= plain - readme
    assert not {"torch", "trimaran", "safetensors", "yaml"} & plain


HIDE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *arguments):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, *arguments)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in [name for name in sys.modules if name.partition(".")[0] in HIDDEN]:
    del sys.modules[name]
"""


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page: Path, folder: Path) -> None:
    environment = environment_of(page, folder)
    cold = (
        {"train": 2, "generate": 1} if page.name == AS_A_SHELL_WOULD else {}
    )  # ranks have an interpreter of their own
    make_base(folder, commands_of(page))
    for command in commands_of(page):
        line, _, target = command.partition(" > ")
        words = shortened(line)
        if interpreters := cold.pop(words[0], 0):
            done = run_in_shell(shlex.join(["trimaran", *words]), folder, interpreters)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            continue
        if command in SHARED:
            go_on_in(folder, made_once(shared_training, command))
            continue
        if " | " in line:
            before, shim = line.rpartition(" | ")[0], fork_server().make_shim("trimaran")
            piped = run_in_shell(f"{before} | {shlex.join([str(shim), *words])}", folder, 0, environment)
            assert piped.returncode == 0, f"{command}\n{piped.stdout}\n{piped.stderr}"
            continue
        outcome = trimaran(folder, *words, environment=environment)
        assert outcome.code == 0, f"{command}\n{outcome.out}\n{outcome.err}"
        if target:
            assert outcome.out.strip(), f"{command} printed nothing to put into {target}"
            (folder / target).write_text(outcome.out, encoding="utf-8")


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
    assert commands_in(example), f"{example.name} shows how to run it"
    for command in commands_in(example):
        assert f"examples/{example.name}" in shlex.split(command)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_can_start_where_its_device_is(example: Path, folder: Path) -> None:
    command = f"trimaran check examples/{example.name} --set launcher.device=auto"
    make_base(folder, [command])
    outcome = trimaran(folder, *(shortened(command) if example.name in FINETUNES else command.split()[1:]))
    assert outcome.code == 0, outcome.err
    assert "parameters" in outcome.out


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs_by_its_own_command(example: Path, folder: Path) -> None:
    """A page's commands run the others."""
    if any(f"trimaran train examples/{example.name}" in line for page in PAGES for line in commands_of(page)):
        return
    environment = environment_of(example, folder)
    make_base(folder, commands_in(example))
    for command in commands_in(example):
        outcome = trimaran(folder, *shortened(command), environment=environment)
        assert outcome.code == 0, outcome.err
        assert " train " not in command or (folder / "runs" / example.stem / "report.html").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")
def test_example_for_a_gpu_is_refused_at_once_on_a_host_without_one(folder: Path) -> None:
    sentence = "launcher.device is cuda, and this host has no GPU for 1 rank; start the run where it has, or set"
    for command in ("check", "train"):
        outcome = trimaran(folder, command, "examples/llama-1gpu.yaml", "--set", "data.source=[my-texts]")
        assert outcome.code == 2
        assert sentence in outcome.err
    assert not (folder / "runs").exists()
    assert not (folder / ".cache").exists(), "no text was prepared"


@pytest.mark.slow
def test_make_train(folder: Path) -> None:
    """`make train` in the repository's own environment, on an example as it is, made short by --set.

    Its `trimaran` is forked: test_every_command_of_a_page_runs starts the one that is installed.
    """
    if not (ROOT / ".venv" / ".trimaran-runtime").exists():
        pytest.skip("no .venv made by make: these tests run in another environment")
    places = {
        "data.source": f"[{folder}/my-texts]",
        "data.cache_dir": f"{folder}/cache",
        "train.output_dir": f"{folder}/runs/short",
    }
    options = " ".join(f"--set {name}={value}" for name, value in {**SHORT, **places}.items())
    shims = fork_server().make_shim("trimaran").parent
    environment = {**os.environ, "MAKEFLAGS": ""}
    done = subprocess.run(
        ["make", "-C", str(ROOT), "train", f"BIN={shims}", "SPEC=examples/gpt2-cpu.yaml", f"ARGS={options}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report" in done.stderr


@pytest.mark.parametrize(
    ("section", "page"), [("data", "data.md"), ("evaluation", "evaluation.md"), ("logging", "logging.md")]
)
def test_the_table_of_fields_is_that_of_the_spec(section: str, page: str) -> None:
    places = [(path, place_of(path)) for path in known_paths() if path.startswith(f"{section}.")]
    rows = [
        f"| `{path.removeprefix(f'{section}.')}` | {in_code(default_of(place))} | {place.field.description} |"
        for path, place in places
        if place is not None and place.field is not None and not place.is_item
    ]
    table = "\n".join(["| field | default | |", "|---|---|---|", *rows])
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert table in text, f"docs/{page}, the fields of {section}, must be\n\n{table}"
