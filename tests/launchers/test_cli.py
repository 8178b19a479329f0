"""The commands that start no rank: check, schema, and what every command says to a wrong argument."""

import importlib
import inspect
import json
import logging
import os
import pkgutil
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jsonschema
import pytest
import typer
import yaml
from rich.table import Table
from typer.testing import CliRunner

from tests.launchers.runs import make_workplace, trimaran, trimaran_here
from trimaran.launchers.before_start import check_device, check_nodes
from trimaran.launchers.cli.app import COMMANDS, app
from trimaran.launchers.cli.common.console import errors_as_sentences, path
from trimaran.launchers.cli.planning.check import schema
from trimaran.launchers.problems import problems_here
from trimaran.launchers.slurm.commands import SlurmError, submit
from trimaran.launchers.terminal import TerminalHandler, print_table, run_main, say, say_error, sentence
from trimaran.launchers.worker.generate import Output
from trimaran.models.fields import FieldError
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.pipeline.csv_text import read_csv
from trimaran.runtime.spec import load_spec


def test_check_prints_the_resolved_run_and_starts_nothing(tmp_path: Path) -> None:
    make_workplace(tmp_path, parallel={"tp": 2, "pp": 2})
    outcome = trimaran(tmp_path, "check", "spec.yaml", "--set", "parallel.dp=2")
    assert outcome.code == 0, outcome.err
    for words in ("tp 2 x pp 2 x dp 2", "8 ranks", "1f1b", "parameters", "total tokens"):
        assert words in outcome.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["schedule.svg", "schedule.png"])
def test_check_draws_the_schedule(name: str, tmp_path: Path) -> None:
    make_workplace(tmp_path, parallel={"tp": 1, "pp": 2})
    outcome = trimaran_here(tmp_path, "check", "spec.yaml", "--picture", name)
    assert outcome.code == 0, outcome.err
    assert name in outcome.err
    data = (tmp_path / name).read_bytes()
    assert data.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in data[:200]


def test_check_refuses_a_picture_of_another_kind(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    outcome = trimaran_here(tmp_path, "check", "spec.yaml", "--picture", "schedule.gif")
    assert outcome.code == 2
    assert outcome.last_line == "error: --picture must end in .svg or .png; got schedule.gif"


def test_check_counts_the_memory_of_ranks_on_a_machine_that_has_none_of_them(tmp_path: Path) -> None:
    make_workplace(tmp_path, parallel={"tp": 2, "pp": 2, "dp": 2}, precision={"dtype": "bfloat16"})
    command = ["check", "spec.yaml", "--memory", "--set", "launcher.device=cuda"]
    outcome = trimaran(tmp_path, *command)
    assert outcome.code == 0, outcome.err
    assert "on GPUs with Triton's kernels" in outcome.err
    found = re.findall(r"^ rank (\d+) \(pp \d", outcome.out, flags=re.MULTILINE)
    assert found == ["0", "1", "4", "5"], "the ends of each pipeline rank's tp group"
    one = trimaran(tmp_path, *command, "--rank", "5")
    assert one.code == 0, one.err
    table = one.out.partition(" peak of ")[2]
    assert [row.split()[0] for row in table.splitlines()[1:3]] == ["1F0", "1B0"]
    assert "optimizer step" in table


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "--rank", "2"], "--rank 2: the run has 2 ranks; give one from 0 to 1"),
        (["--memory", "--rank", "-1"], "--rank -1: the run has 2 ranks; give one from 0 to 1"),
        (["--rank", "0"], "--rank chooses a rank for --memory; add --memory, or leave it out"),
    ],
)
def test_check_refuses_a_rank_that_is_not_there(options: list[str], words: str, tmp_path: Path) -> None:
    make_workplace(tmp_path, parallel={"tp": 2})
    outcome = trimaran_here(tmp_path, "check", "spec.yaml", *options)
    assert (outcome.code, outcome.last_line) == (2, f"error: {words}")


def test_schedules_tell_the_bytes_of_each(tmp_path: Path) -> None:
    make_workplace(tmp_path, parallel={"pp": 2}, precision={"dtype": "bfloat16"})
    outcome = trimaran(tmp_path, "schedules", "spec.yaml", "--memory", "--set", "launcher.device=cuda")
    assert outcome.code == 0, outcome.err
    header, *rows = outcome.out.splitlines()
    assert header.split("  ")[-1].strip() == "bytes at most"
    assert all(row.rstrip().endswith("MiB") for row in rows)


def test_schedules_are_compared_printed_and_drawn(tmp_path: Path) -> None:
    make_workplace(tmp_path, model={"num_layers": 3}, parallel={"tp": 1, "pp": 2})
    run = tmp_path / "run"
    run.mkdir()
    measured = [[0, "0F0", 100.0, 101.5], [1, "1F0", 101.5, 103.0]]
    (run / "timeline.json").write_text(json.dumps({"num_ranks": 2, "measured": measured}))
    traced = ("--trace", "trace.json", "--run", "run")
    outcome = trimaran_here(tmp_path, "schedules", "spec.yaml", "--picture", "drawings", *traced)
    assert outcome.code == 0, outcome.err
    # Three layers do not fill two stages a rank.
    assert [line.split()[0] for line in outcome.out.splitlines()[1:]] == ["gpipe", "1f1b", "zb_h1", "zb_h2"]
    assert sorted(path.stem for path in (tmp_path / "drawings").iterdir()) == ["1f1b", "gpipe", "zb_h1", "zb_h2"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names[:3] == ["run, measured: pipeline rank 0", "run, measured: pipeline rank 1",
                         "gpipe, simulated: pipeline rank 0"]  # fmt: skip
    assert len({event["pid"] for event in events}) == len(names)
    (run / "timeline.json").write_text(json.dumps({"num_ranks": 2, "measured": [[7, "0F0", 0, 1]]}))
    refused = trimaran_here(tmp_path, "schedules", "spec.yaml", *traced)
    assert refused.last_line.startswith("error: run/timeline.json is no timeline: ValueError, rank 7 of action 0F0 is")
    printed = trimaran_here(tmp_path, "schedules", "spec.yaml", "--csv", "zb_h1").out
    assert len(printed.splitlines()) == 2
    assert read_csv(printed, "printed").placement == (0, 1)
    refused = trimaran_here(tmp_path, "schedules", "spec.yaml", "--csv", "zbv")
    assert refused.code == 2
    assert refused.last_line == "error: --csv zbv: the schedules that fit this spec are gpipe, 1f1b, zb_h1, zb_h2"


def test_schedules_tell_where_the_layers_that_are_given_say_nothing(tmp_path: Path) -> None:
    make_workplace(tmp_path, model={"num_layers": 6}, parallel={"tp": 1, "pp": 2, "layers_per_stage": [4, 2]})
    outcome = trimaran_here(tmp_path, "schedules", "spec.yaml")
    header, *rows = outcome.out.splitlines()
    assert header.rstrip().endswith("layers (given for 2 stages)"), outcome.err
    cut = {row.split()[0]: row.rstrip().rpartition("  ")[2] for row in rows}
    assert cut == dict.fromkeys(["gpipe", "1f1b", "zb_h1", "zb_h2"], "as given") | dict.fromkeys(
        ["interleaved_1f1b", "zbv", "dualpipev"], "balanced by cost"
    )
    assert trimaran_here(tmp_path, "schedules", "spec.yaml", "--csv", "1f1b").err == ""
    assert trimaran_here(tmp_path, "schedules", "spec.yaml", "--csv", "zbv").last_line == (
        "parallel.layers_per_stage is for 2 stages; the 4 stages of zbv have layers balanced by cost"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["schedules", "spec.yaml", "--picture", ""],
        ["check", "spec.yaml", "--picture", " "],
        ["coordinate-check", "spec.yaml", "--picture", ""],
        ["check", ""],
        ["train", ""],
        ["report", ""],
        ["status", ""],
        ["import", "spec.yaml", ""],
        ["import", ""],
        ["export", "run", ""],
        ["generate", "run", "--prompts", ""],
    ],
)
def test_an_empty_path_is_not_the_current_folder(words: list[str]) -> None:
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 2
    assert "the path is empty; write one" in outcome.output


def test_every_path_of_a_command_is_refused_where_it_is_empty() -> None:
    for command in (each for commands in COMMANDS.values() for each, _ in commands.values()):
        module, _, attribute = command.partition(":")
        function = getattr(importlib.import_module(f"trimaran.launchers.cli.{module}"), attribute)
        hints = {} if isinstance(function, typer.Typer) else get_type_hints(function, include_extras=True)
        for name, hint in hints.items():
            kind, *marks = get_args(hint) or (hint,)
            if Path in (kind, *get_args(kind)):
                assert [mark.parser for mark in marks] == [path], f"{attribute}: {name}"


TRITON = ["kernels.backend=triton", "launcher.device=auto"]
CANNOT_START = {
    "source": (["data.source=[nowhere.txt]"], "data.source 'nowhere.txt' does not exist"),
    "pipe": (["data.source=[pipe.txt]"], "data.source 'pipe.txt' is not a .txt"),
    "short text": (["data.source=[short.txt]"], "the text of data.source has at most 4 tokens, too few for one sample"),
    "held-out text": (
        ["train.seq_len=200000"],
        "the held-out text will have at most 1",
    ),
    "tokenizer": (["data.tokenizer=nowhere.json"], "cannot read tokenizer nowhere.json: No such file"),
    "large tokenizer": (
        ["data.tokenizer=tokenizer.json", "model.vocab_size=256"],
        "the tokenizer has 257 tokens, the model's vocabulary only 256",
    ),
    "mask": (["data.tokenizer=tokenizer.json", "model.objective=masked_lm"], "the tokenizer has no mask token"),
    "weights": (["checkpoint.init_from=nowhere"], "nowhere does not exist; give the folder of a run"),
    "linked folder": (["data.source=[linked]"], "linked/up leads to /, which holds far more than a corpus; remove it"),
    "run folder": (["train.output_dir=corpus.txt/run"], "can't be made, because"),
    "run folder of the kernel": (["train.output_dir=/proc/x/y"], "train.output_dir /proc/x/y can't be made: "),
    "cache of the kernel": (["data.cache_dir=/proc/x"], "data.cache_dir /proc/x can't be made: "),
    "broken link": (["train.output_dir=broken"], "broken can't be made, because broken is a link that leads"),
    "folder as lock": (["train.output_dir=odd"], "odd/.lock is a folder, in the place of a file of the run; remove it"),
    "file as folder": (["train.output_dir=odder"], "odder/logs is a file, in the place of a folder of the run; remove"),
    "pipe in the run folder": (["train.output_dir=piped"], "metrics.jsonl: it is a pipe"),
    "device": (["launcher.device=cuda"], "launcher.device is cuda, and this host has no GPU for 2 ranks"),
    "kernels": (
        TRITON,
        "kernels.backend is triton, and this host has no GPU for 2 ranks",
    ),
    "no schedule": (
        ["parallel.schedule_file=nowhere.csv"],
        "parallel.schedule_file nowhere.csv can't be read: No such file",
    ),
    "schedule of another shape": (
        ["parallel.schedule_file=two.csv"],
        "two.csv has 2 ranks, 2 stages and 1 microbatch, but the spec has 1 rank, 1 stage and 4 microbatches",
    ),
    "schedule that DeepSpeed can't run": (
        ["parallel.schedule_file=split.csv", "zero.backend=deepspeed"],
        "split.csv computes weight gradients (W) apart from the backward pass, where DeepSpeed takes them",
    ),
    "no DeepSpeed": (
        ["zero.backend=deepspeed", "launcher.kind=local"],
        "zero.backend deepspeed needs the package deepspeed: in trimaran's own folder, pip install -c",
    ),
    "slurm": (["launcher.kind=slurm"], "sbatch is not on this machine's PATH"),
}


@pytest.mark.parametrize("name", CANNOT_START)
def test_check_tells_what_would_end_the_run_before_its_first_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, sentence = CANNOT_START[name]
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("trimaran.launchers.problems.shutil.which", lambda program: None)
    Path("piped").mkdir()
    os.mkfifo("piped/metrics.jsonl")
    for folder in ("linked", "odd/.lock", "odder"):
        Path(folder).mkdir(parents=True)
    for link, target in (("linked/up", "/"), ("broken", "nowhere")):
        Path(link).symlink_to(target)
    Path("odder/logs").touch()
    os.mkfifo("pipe.txt")
    Path("short.txt").write_text("ab")
    if name == "no DeepSpeed":
        monkeypatch.setitem(sys.modules, "deepspeed", None)
    Path("two.csv").write_text("0F0,0B0\n1F0,1B0\n")
    Path("split.csv").write_text(",".join(f"0F{i},0I{i},0W{i}" for i in range(4)))
    Tokenizer.train([], 257).save(Path("tokenizer.json"))
    spec = load_spec("spec.yaml", changes)
    found = problems_here(spec, spec.launcher.kind)
    assert len(found) == 1, found
    assert sentence in found[0]
    assert problems_here(load_spec("spec.yaml"), "local") == []


@pytest.mark.parametrize(
    ("changes", "gpus", "ranks", "sentence"),
    [
        (
            ["launcher.device=cuda"],
            1,
            2,
            "has 1 GPU for 2 ranks; start the run where it has, lower",
        ),
        (
            TRITON,
            3,
            4,
            "has 3 GPUs for 4 ranks; .* or set kernels.backend to auto",
        ),
        (
            ["launcher.device=cuda"],
            0,
            1,
            "has no GPU for 1 rank; .* or set launcher.device to cpu",
        ),
        (["launcher.device=cuda"], 2, 2, ""),
        (["launcher.device=cpu"], 0, 2, ""),
        (["launcher.device=auto"], 0, 2, ""),
    ],
)
def test_a_run_needs_a_gpu_for_every_rank(
    changes: list[str], gpus: int, ranks: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_workplace(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(ValueError, match=sentence) if sentence else nullcontext():
        check_device(load_spec(tmp_path / "spec.yaml", changes), ranks)


@pytest.mark.parametrize(
    ("kind", "rendezvous", "sentence"),
    [
        ("local", "n1:29400", ""),
        ("local", "null", "2 nodes, which must meet somewhere, and launcher.rendezvous is not set; .*such as n1:29400"),
        ("slurm", "null", ""),
        ("mpi", "n1:29400", "2 nodes, and --launcher mpi starts ranks on this machine alone; set launcher.nodes to 1"),
    ],
)
def test_several_nodes_are_for_launchers_that_reach_them(
    kind: str, rendezvous: str, sentence: str, tmp_path: Path
) -> None:
    make_workplace(tmp_path, parallel={"tp": 2})
    spec = load_spec(tmp_path / "spec.yaml", ["launcher.nodes=2", f"launcher.rendezvous={rendezvous}"])
    with pytest.raises(ValueError, match=sentence) if sentence else nullcontext():
        check_nodes(spec, kind)
    assert any("launcher.nodes says 2 nodes" in each for each in problems_here(spec, kind)) == bool(sentence)


def test_check_tells_all_of_it_at_once_after_the_table(tmp_path: Path) -> None:
    make_workplace(tmp_path, parallel={"tp": 1})
    changes = ("data.source=[nowhere.txt]", "data.tokenizer=nowhere.json")
    words = [word for change in changes for word in ("--set", change)]
    outcome = trimaran_here(tmp_path, "check", "spec.yaml", *words, "--launcher", "mpi")
    assert outcome.code == 2
    assert "total tokens" in outcome.out
    first, *lines = outcome.err.splitlines()
    assert first == "error: this run can't start on this machine:"
    assert [line.split("; ")[0].split(" (")[0] for line in lines] == [
        "  data.source 'nowhere.txt' does not exist",
        "  cannot read tokenizer nowhere.json: No such file or directory",
    ]


def test_schema_is_a_json_schema_that_the_spec_obeys(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    outcome = trimaran_here(tmp_path, "schema")
    assert outcome.code == 0
    schema = json.loads(outcome.out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load((tmp_path / "spec.yaml").read_text()), schema)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere.yaml"], ["nowhere.yaml", "cannot be read: No such file"]),
        (["check", "nowhere.yaml"], ["nowhere.yaml", "cannot be read: No such file"]),
        (
            ["train", "spec.yaml", "--set", "parallel.pt=2"],
            ["parallel.pt: unknown field; the fields of parallel are tp, pp"],
        ),
        (
            ["train", "spec.yaml", "--set", "train.num_step=2"],
            ["train.num_step: unknown field; did you mean train.num_steps?"],
        ),
        (["train", "spec.yaml", "--set", "trian.num_steps=2"], ["trian: unknown field; did you mean train?"]),
        (["train", "spec.yaml", "--set", "train.num_steps"], ["is not FIELD=VALUE"]),
        (["train", "spec.yaml", "--set", "parallel.tp=two"], ["parallel.tp", "two"]),
        (["train", "spec.yaml", "--set", "parallel.tp=3"], ["num_heads", "parallel.tp"]),
        (["generate", "nowhere"], ["nowhere has no whole checkpoint", "trimaran train"]),
        (["generate", "."], ["has no whole checkpoint"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in ("train", "check", "generate") else "",
)
def test_a_wrong_argument_gets_a_sentence(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    make_workplace(tmp_path)
    outcome = trimaran_here(tmp_path, *arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert all(word in outcome.err for word in words), outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["notes", "notes/run"])
def test_a_file_in_the_place_of_a_folder_is_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("mine")
    with pytest.raises(OSError, match=r"File exists|Not a directory") as refused:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    assert sentence(refused.value).startswith(f"{file} is a file, and a folder is needed there; choose another folder")


def test_every_error_of_a_spec_is_told_at_once(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    outcome = trimaran_here(
        tmp_path, "check", "spec.yaml", "--set", "parallel.pt=2", "--set", "optimizer.lr=-1", "--set", "train.seq_len=0"
    )
    assert outcome.code == 2
    assert all(name in outcome.err for name in ("parallel.pt", "optimizer.lr", "train.seq_len"))


# --- errors


def error_classes() -> Iterator[type[BaseException]]:
    """Every exception class that a module of ours defines."""
    for room in ("kernels", "models", "runtime", "launchers"):
        package = importlib.import_module(f"trimaran.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith("__main__"):
                continue
            for _, found in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
                if issubclass(found, BaseException) and found.__module__ == module.name:
                    yield found


def example(kind: type[BaseException]) -> BaseException:
    """One error of a class, whatever its constructor takes."""
    values: dict[str, Any] = {
        "signal_number": signal.SIGTERM, "number": signal.SIGINT, "exit_code": 7,
        "errors": [FieldError("train.seq_len", "must be positive", 0, "write 128")],
    }  # fmt: skip
    parameters = inspect.signature(kind).parameters.values()
    needed = [each for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    return kind(*(values.get(each.name, "it is wrong") for each in needed)) if needed else kind("it is wrong")


def test_no_error_of_ours_reaches_the_terminal_as_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = sorted(set(error_classes()), key=lambda kind: kind.__name__)
    assert {"SlurmError", "CheckpointError", "TrainingDiverged", "FolderInUse", "SpecError"} <= {
        kind.__name__ for kind in kinds
    }
    for kind in kinds:
        with pytest.raises(typer.Exit) as caught, errors_as_sentences():
            raise example(kind)
        assert 0 < caught.value.exit_code < 256, kind
        said = capsys.readouterr().err
        assert said.strip(), kind
        assert "Traceback" not in said, kind
        if issubclass(kind, Exception):

            def main(kind: type[BaseException] = kind) -> int:
                raise example(kind)

            assert run_main(main) == 2, "of the programs of a batch job"
            assert capsys.readouterr().err.startswith("error: "), kind


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError), errors_as_sentences():
        raise KeyError("a bug")
    with pytest.raises(KeyError):
        run_main(lambda: {}["a bug"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(28, "No space left on device", "/run/metrics.jsonl"),
            "/run/metrics.jsonl: No space left on device; free",
        ),
        (OSError(24, "Too many open files"), "Too many open files; raise the limit of open files (ulimit -n 65536"),
        (OSError(11, "Resource temporarily unavailable"), "raise the limit of processes (ulimit -u"),
        (RuntimeError("can't start new thread"), "raise the limit of processes (ulimit -u"),
        (
            OSError(27, "File too large", "rank-0"),
            "rank-0: File too large; raise the limit of a file's size (ulimit -f",
        ),
        (FileNotFoundError(2, "No such file or directory", "spec.yaml"), "spec.yaml: No such file or directory"),
    ],
)
def test_the_systems_errors_name_file_and_remedy(error: Exception, words: str) -> None:
    assert words in sentence(error)


def test_what_others_have_named_is_shown_as_it_is_and_moves_no_cursor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "runs/:bug:[/bold]\x1b[31m\udcff"
    shown = r"runs/:bug:[/bold]\x1b[31m\udcff"
    say(name)
    say_error(ValueError(name))
    long = f"{'word ' * 60}{name}"
    TerminalHandler().emit(logging.LogRecord("", logging.INFO, "", 0, long, None, None))
    assert capsys.readouterr().err == f"{shown}\nerror: {shown}\n{'word ' * 60}{shown}\n"
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    name = f"runs/{'x' * 99}:bug:[/b]"
    result = CliRunner().invoke(app, ["check", "spec.yaml", "--set", rf'train.output_dir="{name}\e[31m"'])
    assert result.exit_code == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if "  output  " in line)
    assert line.split() == ["files", "output", rf"{name}\x1b[31m"], "and cells of a pipe are not wrapped"


@pytest.mark.parametrize("write", [lambda: print_table(Table("a")), lambda: Output(is_open=True).write("text")])
def test_a_full_standard_output_is_named(write: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left on device: 'standard output'"):
            write()


def test_a_reader_that_has_enough_ends_any_command_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(typer.Exit) as caught:
            schema()
    assert (caught.value.exit_code, capsys.readouterr().err) == (128 + signal.SIGPIPE, "")


def test_a_folder_that_is_no_run_has_no_status_and_gets_no_report(tmp_path: Path) -> None:
    for command in ("status", "report"):
        for folder, words in ((tmp_path, "has none of its files"), (tmp_path / "nowhere", "does not exist")):
            result = CliRunner().invoke(app, [command, str(folder)])
            assert (result.exit_code, result.stdout) == (2, "")
            assert f"error: {folder} is no run folder: it {words}; give the train.output_dir of" in result.stderr
    assert list(tmp_path.iterdir()) == []
    for content in ('{"jobs": [5]}', '{"jobs": [{}]}', "[]"):
        (tmp_path / "slurm.json").write_text(content)
        result = CliRunner().invoke(app, ["status", str(tmp_path)])
        assert (result.exit_code, result.stdout) == (2, "")
        assert "slurm.json is damaged" in result.stderr
    (tmp_path / "slurm.json").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5, "tokens_per_second": null}\n')
    result = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert (result.exit_code, result.stdout[:40]) == (0, "step 3, loss 1.5000, nan tokens/s, 0 s a")


PARTITION = "Batch job submission failed: Invalid partition name specified"
CONTROLLER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            f"sbatch: error: invalid partition specified: nope\\nsbatch: error: {PARTITION}",
            f"invalid partition specified: nope; {PARTITION}; set slurm.partition to one that `sinfo` lists",
        ),
        (CONTROLLER, f"{CONTROLLER}; ask those who run the cluster, or try again when `scontrol ping` says UP"),
        ("sbatch: error: something new", "something new"),
    ],
)
def test_what_slurm_refuses_is_one_sentence(
    said: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\nprintf '{said}\\n' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(SlurmError) as caught:
        submit("#!/bin/sh")
    assert str(caught.value) == f"sbatch failed: {words}"


def test_slurms_absence_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_workplace(tmp_path)
    (tmp_path / "my run").mkdir()
    environment = {"PATH": f"{Path(sys.executable).parent}:/nowhere"}
    outcome = trimaran(tmp_path, "train", "spec.yaml", "--launcher", "slurm", environment=environment)
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert outcome.err.startswith("error: sbatch is not on this machine's PATH; run this where jobs are submitted")
    for command in ("logs", "cancel"):
        outcome = trimaran(tmp_path, command, "my run", environment=environment)
        assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
        assert (
            "error: my run has no batch job, and no process runs there; `trimaran logs 'my run' --rank" in outcome.err
        )
