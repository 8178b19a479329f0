"""`import trimaran as tm`: scripts with and without a guard, and a notebook, beside the commands that do the same."""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

import trimaran as tm
from tests.launchers.forked import fork_server
from tests.launchers.runs import TIMEOUT_S, Workplace, make_workplace, run_script, trimaran
from trimaran.launchers.local.fork_server import bare_ranks, end_outdated_fork_server
from trimaran.runtime.files import read_json

ROOT = Path(__file__).parents[2]
SHORT = {"num_steps": 6, "eval_interval": 3}
PROMPTS = ["abc def", "gh"]

FOUND = """
import json
import sys
from pathlib import Path

Path("imports").open("a").write("1")
texts = tm.generate(run, iter(["abc def", "gh"]), max_new_tokens=6, stop=iter(["zzz"]))
losses = tm.evaluate_loss(run.checkpoint, "held-out.txt", tp=2)
Path("found.json").write_text(json.dumps({
    "run": repr(run), "metrics": run.metrics(), "evaluations": run.evaluations(), "finished": run.is_finished,
    "texts": [[each.prompt, each.text, each.finish, each.new_tokens] for each in texts],
    "loss": losses[0].loss, "bits": losses[0].bits_per_byte, "tokens": losses[0].tokens,
    "checkpoints": [path.name for path in run.checkpoints], "sample": run.sample, "report": run.report.exists(),
}))
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("api")
    made = make_workplace(folder, train=SHORT | {"output_dir": "by-script"})
    (folder / "held-out.txt").write_text("abc def gh ab cd. " * 20)
    return made


@pytest.fixture(scope="module")
def found(workplace: Workplace) -> dict[str, Any]:
    """What a script without a guard has found: every block of the page, and more of the same run."""
    page = (ROOT / "docs" / "python-api.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (workplace.folder / "script.py").write_text("".join(blocks) + FOUND)
    outcome = run_script(workplace.folder, workplace.folder / "script.py")
    assert outcome.code == 0, outcome.err
    assert "parallel.tp" in outcome.out, "the error of the page's wrong spec"
    return dict(read_json(workplace.folder / "found.json"))


def test_a_script_without_a_guard_trains_as_the_command_does(workplace: Workplace, found: dict[str, Any]) -> None:
    """Its ranks don't run it again, and the losses are those of the command to the bit."""
    assert (workplace.folder / "imports").read_text() == "1"
    assert workplace.train(f"train.output_dir={workplace.run}").code == 0
    assert [row["loss"] for row in found["metrics"]] == [row["loss"] for row in workplace.rows()]
    assert len(found["metrics"]) == 6
    assert [row["step"] for row in found["evaluations"]] == [3, 6]
    assert found["run"] == "Run('by-script', 6 of 6 steps)"
    assert found["finished"]
    assert found["report"]
    assert found["sample"]
    assert found["checkpoints"] == ["step-00000004", "step-00000006"]
    ours = {path.name for path in (workplace.folder / "by-script").iterdir()}
    assert ours - {"evaluations"} == {path.name for path in workplace.run.iterdir()}


def test_texts_and_losses_are_those_of_the_commands(workplace: Workplace, found: dict[str, Any]) -> None:
    (workplace.folder / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ("--prompts", "prompts.txt", "--max-new-tokens", "6", "--stop", "zzz")
    said = trimaran(workplace.folder, "generate", "by-script", *words)
    records = [json.loads(line) for line in said.out.splitlines()]
    assert found["texts"] == [[each["prompt"], each["text"], each["finish"], each["new_tokens"]] for each in records]
    asked = trimaran(workplace.folder, "evaluate", "by-script", "--text", "held-out.txt", "--output", "results")
    assert asked.code == 0, asked.err
    row = read_json(workplace.folder / "results" / "results.json")["results"]["text"]
    assert found["loss"] == pytest.approx(row["nats_per_token,none"], rel=1e-6)  # at tp 2 and at tp 1
    assert found["bits"] == pytest.approx(row["bits_per_byte,none"], rel=1e-6)
    assert not (workplace.folder / "results" / "journal.jsonl").exists()


def test_the_example_sweeps_over_learning_rates(workplace: Workplace, found: dict[str, Any]) -> None:
    script = ROOT / "examples" / "train_from_python.py"
    outcome = run_script(workplace.folder, script, "spec.yaml", "train.num_steps=2", "train.eval_interval=2")
    assert outcome.code == 0, outcome.err
    assert re.findall("^lr (.*): step 2, loss .*, held out [0-9]", outcome.out, flags=re.MULTILINE) == [
        "0.001",
        "0.003",
    ]
    assert "best: runs/lr-0.003, report runs/lr-0.003/report.html" in outcome.out


def test_facts_of_a_run(
    workplace: Workplace, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(workplace.folder)
    run = tm.load_run("by-script")
    assert run.spec.parallel.tp == 2
    assert run.step == 6
    assert run.checkpoint == run.checkpoints[-1]
    assert run.metrics()[0]["loss"] == found["metrics"][0]["loss"]
    assert tm.check(run.spec) == []
    assert "no-such-file" in tm.check(tm.load_spec("spec.yaml", ["data.source=[no-such-file]"]))[0]
    of_now = {"rank_bytes": None}  # of the memory that is free
    assert tm.plan(run.spec) | of_now == read_json(run.folder / "plan.json") | of_now
    assert tm.plan(tm.load_spec("spec.yaml", ["launcher.device=cuda"]), "H100-SXM")["seconds"] > 0
    (tmp_path / "spec.yaml").touch()
    fresh = tm.load_run(tmp_path)
    assert (fresh.metrics(), fresh.evaluations(), fresh.step, fresh.sample, fresh.checkpoints) == ([], [], 0, None, [])
    with pytest.raises(ValueError, match="has no whole checkpoint"):
        _ = fresh.checkpoint
    with pytest.raises(ValueError, match="is no run folder: it does not exist"):
        tm.load_run("no-such-run")
    assert tm.generate(run, []) == []
    assert tm.evaluate_loss(run, []) == []


def test_errors_are_exceptions_with_the_sentences_of_the_commands(
    workplace: Workplace, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace.folder)
    with pytest.raises(tm.SpecError, match="num_heads"):
        tm.train(tm.load_spec("spec.yaml", ["parallel.tp=3"]))
    with pytest.raises(ValueError, match=r"launcher\.kind slurm .* start `trimaran train SPEC`"):
        tm.train(tm.load_spec("spec.yaml", ["launcher.kind=slurm"]))
    with pytest.raises(ValueError, match="no-such-file"):
        tm.train(tm.load_spec("spec.yaml", ["data.source=[no-such-file]", "train.output_dir=new"]))
    with pytest.raises(ValueError, match="temperature"):
        tm.generate("by-script", "a", temperature=-1)
    with pytest.raises(ValueError, match="system is for chat=True"):
        tm.generate("by-script", "a", system="Be brief.")
    with pytest.raises(ValueError, match="stop must have at least one character"):
        tm.generate("by-script", "a", stop=iter([""]))
    with pytest.raises(AttributeError, match="has no attribute 'trane'"):
        _ = tm.trane  # type: ignore[attr-defined]
    problems: list[str] = []

    def in_a_thread() -> None:
        try:
            tm.generate("by-script", "a")
        except ValueError as error:
            problems.append(str(error))

    thread = threading.Thread(target=in_a_thread, name="worker")
    thread.start()
    thread.join()
    assert "generate must be called in the main thread" in problems[0]
    assert "'worker'" in problems[0]
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="train starts ranks itself, and this process is one of several"):
        tm.train("spec.yaml")


ENDS = """
import json, os, signal, threading
from pathlib import Path
import trimaran as tm

told = {}
try:
    tm.train(tm.load_spec("spec.yaml", ["logging.sinks=[wandb]", "train.output_dir=no-sink", "parallel.dp=1"]))
except tm.LaunchError as error:
    told["sink"] = [error.exit_code, str(error)]

def end():
    rows = Path("ended/metrics.jsonl")
    while not (rows.exists() and rows.read_text().count("loss")):
        watched.wait(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

watched = threading.Event()
before = signal.getsignal(signal.SIGTERM)
threading.Thread(target=end, daemon=True).start()
try:
    tm.train(tm.load_spec("spec.yaml", ["train.num_steps=100000", "train.output_dir=ended", "parallel.dp=1"]))
except tm.Stopped as stopped:
    told["ended"] = [stopped.signal_number, str(stopped)]
told["restored"] = signal.getsignal(signal.SIGTERM) == before
told["saved"] = tm.load_run("ended").checkpoint.name
Path("told.json").write_text(json.dumps(told))
"""


def test_a_sink_that_can_t_start_and_a_sigterm_are_exceptions_with_their_sentences(
    workplace: Workplace, tmp_path: Path
) -> None:
    """Nobody is logged in to wandb, and no network is asked before that is known."""
    (workplace.folder / "ends.py").write_text(ENDS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_ERROR_REPORTING": "false"}
    outcome = run_script(workplace.folder, workplace.folder / "ends.py", environment=environment)
    assert outcome.code == 0, outcome.err
    told = read_json(workplace.folder / "told.json")
    assert told["sink"][0] == 2
    assert "failed: logging.sinks: wandb can't start: No API key configured" in told["sink"][1]
    assert "`wandb login` once, or set logging.sinks.wandb.mode to offline, or take it out" in told["sink"][1]
    assert told["ended"][0] == signal.SIGTERM
    step = int(told["saved"].removeprefix("step-"))
    assert told["ended"][1].startswith(f"stopped by SIGTERM; step {step} is saved in ended/checkpoints/{told['saved']}")
    assert told["restored"]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: tm.load_spec("a.yaml", "parallel.tp=2"), "overrides must be a list of texts such as"),
        (lambda: tm.load_spec("a.yaml", [2]), "overrides must be a list of texts such as"),
        (lambda: tm.parse_spec("a.yaml"), "a spec must be a mapping of sections, such as {'model'"),
        (lambda: tm.train({"model": {}}), "spec must be a spec (load_spec, parse_spec), or the path of its file; got"),
        (lambda: tm.check(None), "spec must be a spec (load_spec, parse_spec), or the path of its file; got None, of"),
        (lambda: tm.plan(3), "spec must be a spec (load_spec, parse_spec), or the path of its file; got 3, of"),
        (lambda: tm.load_run(3), "folder must be the path of a run's folder; got 3, of type int"),
        (lambda: tm.generate("a", b"To be"), "prompts must be a list, each of it a text; got b'To be'"),
        (lambda: tm.generate("a", ["To be", None]), "each of prompts must be a text; got None, of type NoneType"),
        (lambda: tm.generate("a", "a", stop="x"), "stop must be a list, each of it a text; got 'x', of type str"),
        (lambda: tm.generate("a", "a", tp="2"), "tp must be a whole number; got '2', of type str"),
        (lambda: tm.generate("a", "a", temperature="hot"), "temperature must be a number; got 'hot', of type str"),
        (lambda: tm.generate(None, "a"), "run must be a run, or the path of its folder; got None, of type NoneType"),
        (lambda: tm.evaluate_loss("a", [3]), "each of files must be the path of a text; got 3, of type int"),
    ],
)  # fmt: skip
def test_an_argument_of_another_type_is_told_what_would_do(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(TypeError) as raised:
        call()
    assert str(raised.value).startswith(sentence)


def test_every_name_is_there_and_the_import_is_cheap() -> None:
    assert dir(tm) == tm.__all__
    assert all(getattr(tm, name) is not None for name in tm.__all__)
    assert tm.__version__ == "0.1.0"
    outcome = fork_server().imported["command line"]
    assert "torch" not in outcome


def test_a_fork_server_of_another_environment_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimaran.launchers.local import fork_server as module

    ended: list[int] = []
    monkeypatch.setattr(module, "_server", lambda: os.getpid())
    monkeypatch.setattr(module, "children_of", lambda pid: [])
    monkeypatch.setattr(module.forkserver._forkserver, "_stop", lambda: ended.append(1))  # type: ignore[attr-defined]
    had = dict(os.environ)
    monkeypatch.setattr(module, "_environment_of", lambda pid: had | {"OMP_NUM_THREADS": "1"})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    had.pop("OMP_NUM_THREADS", None)
    end_outdated_fork_server()
    assert not ended, "the number of threads is ours"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    end_outdated_fork_server()
    assert ended == [1]


def test_only_this_thread_starts_bare_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from multiprocessing import spawn

    monkeypatch.chdir(tmp_path)
    main = sys.modules["__main__"]  # a script's: a worker of the tests has neither name nor file
    monkeypatch.setattr(main, "__spec__", None)
    monkeypatch.setattr(main, "__file__", str(tmp_path / "script.py"), raising=False)
    usual = spawn.get_preparation_data("name")
    with bare_ranks():
        bare = spawn.get_preparation_data("name")
        others: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: others.append(spawn.get_preparation_data("name")))
        thread.start()
        thread.join()
    assert {"init_main_from_name", "init_main_from_path"} & usual.keys()
    assert not {"init_main_from_name", "init_main_from_path"} & bare.keys()
    assert bare["dir"] == str(tmp_path)
    assert others == [usual] == [spawn.get_preparation_data("name")]


class ForkedKernel(AsyncKernelManager):
    """A kernel that is forked from the tests' fork server, as every command is."""

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        """Return the command that starts it; jupyter_client calls this."""
        return [str(fork_server().shim), "-m", "ipykernel_launcher", "-f", self.connection_file]


CELLS = (
    "import os\nimport trimaran as tm\nos.chdir('elsewhere')",
    """
overrides = ["train.output_dir=by-cell", "data.source=[../corpus.txt]"]
try:
    tm.train(tm.load_spec("../spec.yaml", overrides))
except KeyboardInterrupt as stop:
    print("TOLD:", stop)
""",
    "run = tm.train('by-cell/spec.yaml')\nprint('DONE:', run, len(run.metrics()))",
    "tm.train(tm.load_spec('../spec.yaml', ['parallel.tp=3']))",
)


def test_a_notebook_trains_and_its_interrupt_saves_and_ends_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in a folder to which a cell has changed. The interrupted run resumes in the next cell."""
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # in which ipykernel does not show what processes print
    make_workplace(tmp_path, train={"eval_interval": 0, "num_steps": 20}, checkpoint={"interval": 20})
    (tmp_path / "elsewhere").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    client = NotebookClient(
        notebook,
        kernel_manager_class=ForkedKernel,
        timeout=int(TIMEOUT_S),
        allow_errors=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    metrics, executed = tmp_path / "elsewhere" / "by-cell" / "metrics.jsonl", threading.Event()

    def interrupt() -> None:
        while not executed.is_set():
            if metrics.exists() and metrics.read_text().count("\n") >= 5:
                os.kill(client.km.provisioner.pid, signal.SIGINT)  # as Jupyter's "interrupt the kernel" does
                return
            time.sleep(0.02)

    watch = threading.Thread(target=interrupt)
    watch.start()
    try:
        client.execute()
    finally:
        executed.set()
        watch.join()
    shown = ["".join(str(each.get("text", each.get("evalue", ""))) for each in cell.outputs) for cell in notebook.cells]
    assert "TOLD: stopped by SIGINT; step " in shown[1]
    assert "is saved in by-cell/checkpoints/step-" in shown[1]
    assert "step 1/20" in shown[1], "the line of a step is shown in the cell"
    assert "DONE: Run('by-cell', 20 of 20 steps) 20" in shown[2]
    assert "resum" in shown[2]
    assert "num_heads" in shown[3]
