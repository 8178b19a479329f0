"""A run opens no port but on loopback, no file that others may write, and keeps no secret of the environment."""

import socket
import stat
from pathlib import Path

import psutil
import pytest

from tests.launchers.runs import Hold, make_workplace, trimaran

pytestmark = pytest.mark.slow
SECRET = "hunter2-of-the-hub"
# Of `srun --pty bash` where srun's MPI plugin is pmi2: nothing is started in parallel.
SHELL = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "PMI_RANK": "0", "PMI_SIZE": "1",
}  # fmt: skip


def test_a_local_run_opens_nothing_to_others(tmp_path: Path) -> None:
    """Nor does it let a second run into its folder, by whatever path."""
    workplace = make_workplace(tmp_path, parallel={"tp": 2, "pp": 2}, train={"num_steps": 6, "eval_interval": 0})
    (tmp_path / "link").symlink_to(tmp_path)
    hold = Hold(tmp_path / "hold", 3)
    with workplace.start_training(
        "launcher.timeout_s=100000",
        environment=SHELL | hold.environment | {"HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET},
    ) as command:
        command.wait_until(lambda: hold.reached)
        family = [psutil.Process(command.process.pid), *psutil.Process(command.process.pid).children(recursive=True)]
        listening = {
            each.laddr.ip
            for process in family
            for each in process.net_connections("inet")
            if each.status == psutil.CONN_LISTEN
        }
        second = make_workplace(tmp_path / "other").train(f"train.output_dir={tmp_path / 'link' / 'run'}")
        cancelled = trimaran(tmp_path / "other", "cancel", str(workplace.run))
        hold.release()
        outcome = command.finish()
    assert outcome.code == 0, outcome.err
    assert listening == {"127.0.0.1"}
    files = list(workplace.run.rglob("*"))
    assert [file for file in files if not file.is_symlink() and file.stat().st_mode & stat.S_IWOTH] == []
    assert [file for file in files if file.is_file() and SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in outcome.out + outcome.err
    assert (second.code, cancelled.code) == (2, 2)
    assert f"run is in use: `trimaran train` on host {socket.gethostname()} (process " in second.last_line
    assert ", Slurm job 77) since " in second.last_line
    assert "run has no batch job: `trimaran train` on host " in cancelled.last_line
    assert not list(workplace.run.glob(".lock*"))
    assert len(workplace.rows()) == 6
