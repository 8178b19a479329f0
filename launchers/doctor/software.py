"""Looks at the software: Python, torch and its GPUs, launchers of other packages, our own packages and extras."""

import json
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from types import MappingProxyType
from typing import Any, Final

from trimaran.launchers.doctor.ask import ANSWER_S, Answer, Finding, ask
from trimaran.launchers.env.commands import find_mpirun
from trimaran.models.fields import counted

_TORCH_S: Final = 60.0  # of importing it from a slow disk
_TORCH: Final = (sys.executable, "-P", "-m", "trimaran.launchers.doctor.torch_probe")
_GPUS: Final = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
_USES: Final = MappingProxyType(
    {
        "huggingface": "trimaran import, export and adapters in PEFT's folders",
        "data": "recipes: web pages, tables, filters, deduplication",
        "s3": "sources on S3",
        "evaluate": "trimaran evaluate --tasks",
        "tune": "trimaran tune",
        "serve": "trimaran serve, and line editing in chat",
        "twin": "trimaran twin",
        "wandb": "logging.sinks: wandb",
        "mlflow": "logging.sinks: mlflow",
        "trackio": "logging.sinks: trackio",
        "test": "the tests",
    }
)


def looks_at_software(limit_s: float = ANSWER_S) -> Iterator[Finding]:
    """Yield what is installed; programs are asked at the same time, each within `limit_s`, torch within a minute."""
    with ThreadPoolExecutor() as pool:
        torch = pool.submit(ask, _TORCH, max(limit_s, _TORCH_S))
        gpus = pool.submit(_asked, _GPUS, limit_s)
        slurm = pool.submit(_asked, ("sinfo", "--version"), limit_s)
        mpi = pool.submit(_mpi, limit_s)
        packages = pool.submit(lambda: [*_packages(), *_extras()])
        yield Finding("software", "Python", f"{platform.python_version()} at {sys.executable}")
        yield from _torch(torch.result(), gpus.result())
        yield _slurm(slurm.result())
        yield mpi.result()
        yield from packages.result()


def _asked(words: Sequence[str], limit_s: float) -> Answer | None:
    """Return the answer of a program, None where it is not on the PATH."""
    return ask(words, limit_s) if shutil.which(words[0]) else None


def _torch(answer: Answer, gpus: Answer | None) -> Iterator[Finding]:
    """Yield torch, the GPUs and NCCL."""
    found: dict[str, Any] = {}
    if not answer.problem:
        found = json.loads(answer.text.splitlines()[-1])
    if not found:
        yield Finding("software", "torch", "can't be imported", answer.problem, "broken")
    else:
        build = f"CUDA {found['cuda']}" if found["cuda"] else f"ROCm {found['hip']}" if found["hip"] else "CPU alone"
        yield Finding("software", "torch", f"{found['version']}, built for {build}")
    if found and not found["gloo"]:
        yield Finding("software", "gloo", "not in this build of torch", "CPU ranks can't meet", "broken")
    yield _gpus(gpus, found)
    if found.get("nccl"):
        yield Finding("software", "NCCL", found["nccl"], "ranks on GPUs exchange tensors by it")


def _gpus(gpus: Answer | None, torch: dict[str, Any]) -> Finding:
    seen, lines = torch.get("gpus", 0), [] if gpus is None else gpus.text.splitlines()
    if gpus is not None and gpus.problem:
        effect = "the driver does not answer: runs on GPUs would hang or fail; launcher.device=cpu does without"
        return Finding("software", "GPUs", gpus.problem, effect, "trouble")
    if not lines and not seen:
        return Finding("software", "GPUs", "none", "no GPU: runs on gloo CPU ranks", "missing")
    kinds = ", ".join(f"{lines.count(line)} x {line.strip()}" for line in dict.fromkeys(lines))
    kinds = kinds or f"{seen} seen by torch"
    if not seen:
        effect = "torch sees none of them: install a torch built for CUDA that this driver knows; else runs on the CPU"
        return Finding("software", "GPUs", kinds, effect, "trouble")
    return Finding("software", "GPUs", kinds, f"up to {seen} ranks here run on a GPU each")


def _slurm(answer: Answer | None) -> Finding:
    if answer is None:
        return Finding("software", "Slurm", "none", "--launcher slurm needs a machine of a cluster", "missing")
    if answer.problem:
        return Finding("software", "Slurm", answer.problem, "no batch job can be submitted from here", "trouble")
    return Finding("software", "Slurm", answer.text, "--launcher slurm submits a batch job")


def _mpi(limit_s: float) -> Finding:
    try:
        mpirun = find_mpirun()
    except ValueError as error:
        return Finding("software", "MPI", "none", str(error).partition("; ")[2], "missing")
    answer = ask((mpirun, "--version"), limit_s)
    if answer.problem:
        return Finding("software", "MPI", answer.problem, "--launcher mpi would not start", "trouble")
    lines = [line.strip() for line in answer.text.splitlines()]
    # MPICH tells it below "HYDRA build details:".
    mpich = next((line.split()[-1] for line in lines if line.startswith("Version:")), None)
    words = f"MPICH {mpich}" if mpich is not None else lines[0] if lines else "some MPI"
    return Finding("software", "MPI", f"{words} at {mpirun}", "--launcher mpi starts ranks by it")


def _packages() -> Iterator[Finding]:
    """Yield our own version, and the packages that every run needs."""
    yield Finding("packages", "trimaran", version("trimaran"))
    there, lacking = _of_extra("")
    yield Finding("packages", "needed", ", ".join(there))
    if lacking:
        fix = f"pip install {' '.join(lacking)}"
        yield Finding("packages", "needed", f"missing: {', '.join(lacking)}", fix, "broken")


def _extras() -> Iterator[Finding]:
    for extra in metadata("trimaran").get_all("Provides-Extra") or []:
        there, lacking = _of_extra(extra)
        name, use = f"extra [{extra}]", _USES.get(extra, "of another version")
        if lacking:
            fix = f"pip install 'trimaran[{extra}]' for {use}"
            yield Finding("packages", name, f"missing: {', '.join(lacking)}", fix, "missing")
        else:
            yield Finding("packages", name, counted(len(there), "package"), use)


def _of_extra(extra: str) -> tuple[list[str], list[str]]:
    """Return the packages of an extra, or of none, with their versions, and those that are not there or too old."""
    from packaging.requirements import Requirement

    there, lacking = [], []
    for line in requires("trimaran") or []:
        wanted = Requirement(line)
        of_all = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if (wanted.marker is not None and not wanted.marker.evaluate({"extra": extra})) or of_all != (extra == ""):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            lacking.append(wanted.name)
            continue
        if wanted.specifier.contains(found, prereleases=True):
            there.append(f"{wanted.name} {found}")
        else:
            lacking.append(f"{wanted.name}{wanted.specifier} (is {found})")
    return there, lacking
