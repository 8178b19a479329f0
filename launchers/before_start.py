"""What a run needs of the machine that starts it, looked at before its data is prepared: folder, nodes and device."""

import os
import tempfile
from pathlib import Path
from types import MappingProxyType

from trimaran.models.fields import counted
from trimaran.runtime.files import check_regular
from trimaran.runtime.folder_lock import LOCK
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.sinks.start import check_packages, sinks_of

# MLflow's count of uses, and wandb's reports of its own errors.
_TELLS_NOBODY = MappingProxyType({"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"})
_FOLDERS = ("checkpoints", "logs", "tensorboard")
_FILES = (
    "data_manifest.json",
    "machine.json",
    "memory.json",
    "metrics.jsonl",
    "plan.json",
    "reference.json",
    "report.html",
    "rollouts.jsonl",
    "sample.txt",
    "sinks.json",
    "spec.yaml",
    "timeline.json",
    "tokenizer.json",
    LOCK,
)


def check_run_folder(folder: Path) -> None:
    """Refuse a run folder that can't be made or written, or in which something else stands in the place of a file."""
    check_writable("train.output_dir", folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.exists() and not path.is_dir():
            check_regular(path)  # a pipe would hold up whoever writes to it
        if path.name in (_FILES if path.is_dir() else _FOLDERS):
            kinds = ("folder", "file") if path.is_dir() else ("file", "folder")
            rule = f"{path} is a {kinds[0]}, in the place of a {kinds[1]} of the run"
            raise ValueError(f"{rule}; remove it, or choose another train.output_dir")


def check_writable(field: str, folder: Path) -> None:
    """Refuse a folder that can't be made or written; `field` of the spec names it.

    Whether it can is tried: permissions do not tell of /proc, of a read-only disk and of a full one.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        kind = "a file" if existing.exists() else "a link that leads nowhere"
        raise ValueError(f"{field} {folder} can't be made, because {existing} is {kind}; choose another folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".trimaran-", dir=existing))
    except OSError as error:
        rule = f"{field} {folder} can't be {'written' if existing == folder else 'made'}"
        raise ValueError(f"{rule}: {error.strerror} in {existing}; choose another folder") from error


def check_code(spec: RunSpec, *, allow_code: bool) -> None:
    """Refuse a run whose rewards are not there, or run a Python file of the user's, unless that is allowed.

    Raises:
        ValueError: names the reward.
    """
    if spec.finetune is None or spec.finetune.rl is None:
        return
    from trimaran.runtime.finetune.rl.reward.rewards import check_files, parse_rewards

    items = parse_rewards(spec.finetune.rl.rewards)
    check_files(items)
    code = next((item.text for item in items if item.kind == "code"), None)
    if code is not None and not allow_code:
        raise ValueError(
            f"finetune.rl.rewards has {code}, which runs that file's code as you; read it, and give --allow-code "
            "where you trust it"
        )


def check_sinks(spec: RunSpec) -> None:
    """Refuse a run with a sink whose package is not installed, and keep the others from telling their makers of it.

    What is set in the environment already, stays.

    Raises:
        SinkError: names the package.
    """
    if sinks_of(spec):
        check_packages(spec)
        for name, value in _TELLS_NOBODY.items():
            os.environ.setdefault(name, value)


def check_nodes(spec: RunSpec, kind: str) -> None:
    """Refuse a run on several nodes that the launcher `kind` can't start there."""
    nodes = counted(spec.launcher.nodes, "node")
    if spec.launcher.nodes == 1 or kind == "slurm":
        return
    here = "set launcher.nodes to 1 to start all ranks on this machine"
    if kind == "mpi":
        raise ValueError(
            f"launcher.nodes says {nodes}, and --launcher mpi starts ranks on this machine alone; {here}, or call "
            "mpirun with the hosts yourself"
        )
    if spec.launcher.rendezvous is None:
        raise ValueError(
            f"launcher.nodes says {nodes}, which must meet somewhere, and launcher.rendezvous is not set; set it to "
            f"HOST:PORT, such as n1:29400, and run the same command on each, or {here}, or take --launcher slurm"
        )


def check_device(spec: RunSpec, ranks: int) -> None:
    """Refuse a run on GPUs on a host that has fewer than one for each of its `ranks` there."""
    if spec.kernels.backend == "triton":
        field, wish, other = "kernels.backend", "triton", "auto"
    else:
        field, wish, other = "launcher.device", spec.launcher.device, "cpu"
    if wish == "cpu" or (wish == "auto" and not any(Path("/dev").glob("nvidia[0-9]*"))):
        return
    import torch

    gpus = torch.cuda.device_count()
    if gpus < ranks and (gpus or wish != "auto"):  # why torch sees none of the host's, the ranks tell
        has = f"{gpus} GPU{'s' * (gpus != 1)}" if gpus else "no GPU"
        fewer = ", lower parallel.tp, pp or dp" if gpus else ""
        raise ValueError(
            f"{field} is {wish}, and this host has {has} for {ranks} rank{'s' * (ranks != 1)}; start the run where it "
            f"has{fewer}, or set {field} to {other}"
        )
