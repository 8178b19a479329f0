"""What a run needs of the machine that starts it, looked at before its data is prepared: its folder and its device."""

import os
from pathlib import Path

from trimaran.runtime.files import check_regular
from trimaran.runtime.spec import RunSpec


def check_run_folder(folder: Path) -> None:
    """Refuse a run folder that can't be made or written, or in which something else stands in the place of a file."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(
            f"train.output_dir {folder} can't be made, because {existing} is a file; choose another folder"
        )
    for path in folder.iterdir() if existing == folder else ():
        if path.exists() and not path.is_dir():
            check_regular(path)  # a pipe would hold up whoever writes to it
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"train.output_dir {folder} can't be written: no permission to write in {existing}; choose another folder"
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
