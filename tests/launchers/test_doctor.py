"""`trimaran doctor`: what it says of a machine, of programs that hang or fail, and of packages that are missing."""

import errno
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from trimaran.launchers.cli.app import app
from trimaran.launchers.doctor import machine, software, torch_probe
from trimaran.launchers.doctor.ask import Answer, Finding, ask
from trimaran.launchers.doctor.machine import looks_at_machine
from trimaran.launchers.doctor.software import looks_at_software

CPU = {"version": "2.13.0+cpu", "cuda": None, "hip": None, "gpus": 0, "nccl": None, "gloo": True}
CUDA = {"version": "2.13.0", "cuda": "12.8", "hip": None, "gpus": 2, "nccl": "2.27.5", "gloo": True}
H100 = "NVIDIA H100 80GB HBM3, 81559 MiB, 570.86.10"

Place = Callable[[str, str], None]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A PATH with the programs that are placed on it, and a torch that is what the test says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(software, "_TORCH", torch_that(f"print({json.dumps(json.dumps(CPU))})"))
    monkeypatch.setattr(software, "find_mpirun", lambda: str(folder / "mpirun"))
    monkeypatch.setattr(software.shutil, "which", lambda name: str(folder / name) if (folder / name).exists() else None)

    def place(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (folder / name).chmod(0o755)

    place("mpirun", "echo HYDRA build details:; echo '    Version:     5.0.2'")
    return place


def torch_that(code: str) -> tuple[str, ...]:
    """What stands for the probe of torch, which takes seconds."""
    return (sys.executable, "-S", "-P", "-c", code)


def of(found: list[Finding], name: str) -> Finding:
    (one,) = [each for each in found if each.name == name]
    return one


def test_a_machine_without_gpus_and_clusters_is_told_what_it_does(programs: Place) -> None:
    result = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for words in ("no GPU: runs on gloo CPU ranks", "built for CPU alone", "MPICH 5.0.2 at", "--launcher slurm needs",
                  "/dev/shm", "CPU cores", "checkpoints of up to", "extra [twin]"):  # fmt: skip
        assert words in result.stdout
    assert result.stderr == "runs can start here\n"


def test_findings_are_json_too(programs: Place) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    content = json.loads(result.stdout)
    assert (result.exit_code, content["version"]) == (0, 1)
    assert {tuple(each) for each in content["findings"]} == {("group", "name", "found", "effect", "status")}
    assert {"Python", "torch", "GPUs", "Slurm", "MPI", "disk", "memory"} <= {
        each["name"] for each in content["findings"]
    }


def test_gpus_and_nccl_are_told(programs: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    programs("nvidia-smi", f"echo '{H100}'; echo '{H100}'")
    programs("sinfo", "echo slurm 24.11.5")
    monkeypatch.setattr(software, "_TORCH", torch_that(f"print('a warning'); print({json.dumps(json.dumps(CUDA))})"))
    found = list(looks_at_software())
    assert of(found, "GPUs") == Finding("software", "GPUs", f"2 x {H100}", "up to 2 ranks here run on a GPU each")
    assert of(found, "NCCL").found == "2.27.5"
    assert of(found, "torch").found == "2.13.0, built for CUDA 12.8"
    assert (of(found, "Slurm").found, of(found, "Slurm").status) == ("slurm 24.11.5", "ok")


def test_gpus_that_torch_does_not_see_are_trouble(programs: Place) -> None:
    programs("nvidia-smi", f"echo '{H100}'")
    gpus = of(list(looks_at_software()), "GPUs")
    assert (gpus.status, gpus.found) == ("trouble", f"1 x {H100}")
    assert gpus.effect.startswith("torch sees none of them: install a torch built for CUDA")


def test_programs_that_fail_are_told(programs: Place) -> None:
    programs("sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    programs("mpirun", "exit 3")
    found = list(looks_at_software())
    slurm, mpi = of(found, "Slurm"), of(found, "MPI")
    assert slurm.found == "sinfo ended with code 1: slurm_load_partitions: Unable to contact slurm controller"
    assert (slurm.status, mpi.status) == ("trouble", "trouble")
    assert mpi.found.endswith("mpirun ended with code 3: without a message")


def test_a_program_that_hangs_is_told_and_not_waited_for(tmp_path: Path) -> None:
    """Nor is a child of it that would hold its output open."""
    hanging = tmp_path / "nvidia-smi"
    hanging.write_text("#!/bin/sh\ntrap '' TERM INT\n(trap '' TERM INT; sleep 1000) &\nsleep 1000\n", encoding="utf-8")
    hanging.chmod(0o755)
    answer = ask([str(hanging)], limit_s=0.2)
    assert answer.problem == f"{hanging} has not answered within 0.2 s"
    gpus = software._gpus(answer, CPU)
    assert (gpus.status, gpus.found) == ("trouble", answer.problem)
    assert "the driver does not answer" in gpus.effect


def test_what_every_run_needs_and_is_broken_ends_with_1(programs: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "_TORCH", torch_that("raise ImportError('libtorch.so: cannot open')"))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "ImportError: libtorch.so: cannot open" in result.stdout
    assert result.stderr == "1 thing that every run needs: broken\n"


def test_packages_that_are_missing_or_too_old_are_named(programs: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    before = software.version

    def version(name: str) -> str:
        if name in ("bm25s", "safetensors"):
            raise PackageNotFoundError(name)
        return "0.1" if name == "optuna" else before(name)

    monkeypatch.setattr(software, "version", version)
    found = list(looks_at_software())
    twin, tune = of(found, "extra [twin]"), of(found, "extra [tune]")
    assert (twin.found, twin.effect) == ("missing: bm25s", "pip install 'trimaran[twin]' for trimaran twin")
    assert tune.found == "missing: optuna>=5 (is 0.1)"
    assert [each.found for each in found if each.status == "broken"] == ["missing: safetensors"]
    assert of(found, "extra [wandb]").effect == "logging.sinks: wandb"
    assert not [each.name for each in found if "of another version" in each.effect], "each extra of ours is told"


def test_the_probe_of_torch_tells_what_torch_is(capsys: pytest.CaptureFixture[str]) -> None:
    torch_probe.main()
    told = json.loads(capsys.readouterr().out)
    assert (told["version"], told["gpus"]) == (torch.__version__, torch.cuda.device_count())
    assert set(told) == set(CPU)


def test_limits_of_the_machine_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (64, 64))
    monkeypatch.setattr(machine, "low_shared_memory", lambda ranks: ["/dev/shm is read-only"])
    monkeypatch.setattr(machine, "interfaces", dict)
    found = list(looks_at_machine(tmp_path / "file" / "runs"))
    assert of(found, "/dev/shm") == Finding("machine", "/dev/shm", "can't be used", "/dev/shm is read-only", "broken")
    assert (of(found, "open files").status, of(found, "disk").status) == ("broken", "broken")
    assert "is a file; choose another folder" in of(found, "disk").effect
    assert of(found, "network").effect == "runs of one machine only"
    assert of(found, "CPU cores").found.startswith(f"{len(os.sched_getaffinity(0))} of")


def test_what_a_sandbox_hides_is_told_and_the_rest_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/proc/net/dev")

    whole = [each.name for each in looks_at_machine(tmp_path)]
    monkeypatch.setattr(machine, "interfaces", hidden)
    monkeypatch.setattr(machine.shutil, "disk_usage", hidden)
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: None)
    found = list(looks_at_machine(tmp_path))
    assert [each.name for each in found] == whole
    hid = {
        each.name
        for each in found
        if (each.found, each.effect) == ("can't be told", "/proc/net/dev: Permission denied")
    }
    assert hid == {"disk", "network"}
    assert of(found, "memory").found.endswith("of which how much is free can't be told")


def test_a_program_that_is_not_there_is_no_answer() -> None:
    answer: Any = ask(["/nowhere/program"])
    assert answer == Answer(problem="/nowhere/program can't be started: No such file or directory")
