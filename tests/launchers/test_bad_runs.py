"""What goes wrong with a run is told in a sentence, ends every process, and spares what was saved before."""

import json
import os
import shutil
import signal
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launchers.runs import RAISE_AT_STEP_6, Hold, Outcome, Workplace, fault, losses, make_workplace, text_of
from tests.session import made_once, session_folder
from trimaran.runtime.checkpoint.folder import find_checkpoints
from trimaran.runtime.checkpoint.reshard import Checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def short() -> Workplace:
    """A finished run of 8 steps on 2 ranks, with the checkpoints of steps 4 and 8."""
    return made_once(short_run)


def short_run() -> Workplace:
    workplace = make_workplace(session_folder() / "short", train={"num_steps": 8, "eval_interval": 0})
    outcome = workplace.train()
    assert outcome.code == 0, outcome.err
    return workplace


@pytest.fixture
def copied(short: Workplace, tmp_path: Path) -> Workplace:
    """A copy of that run, to be damaged; its spec file has the copy's output_dir."""
    shutil.copytree(short.folder, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "spec.yaml").read_text()
    (tmp_path / "spec.yaml").write_text(text.replace(str(short.folder), str(tmp_path)))
    return Workplace(tmp_path)


def assert_sentence(outcome: Outcome, *words: str, code: int = 2) -> None:
    """A failure that is told: words of the last sentence, no traceback, no wall of text, nothing left running."""
    assert outcome.code == code, outcome.out + outcome.err
    sentence = outcome.err[outcome.err.rindex("error: ") :]
    assert all(word in sentence for word in words), sentence
    assert "Traceback" not in outcome.out + outcome.err
    assert "elastic" not in outcome.out + outcome.err
    assert len(sentence.splitlines()) <= 6
    assert outcome.left == []


# --- the text


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "corpus.txt").unlink(), ("corpus.txt", "does not exist")),
        (lambda folder: (folder / "corpus.txt").write_text(""), ("corpus.txt", "passed over 1 empty file")),
        (lambda folder: (folder / "corpus.txt").write_text(" \n \n"), ("corpus.txt", "holds no text")),
        (
            lambda folder: (folder / "corpus.txt").write_text("abc"),
            ("tokens", "one sample of train.seq_len (16) needs 17"),
        ),
    ],
    ids=["missing", "empty", "blank", "shorter-than-a-sample"],
)
def test_text_that_is_not_enough(damage: Callable[[Path], object], words: tuple[str, ...], tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, data={"held_out_fraction": 0.0}, train={"eval_interval": 0})
    damage(tmp_path)
    assert_sentence(workplace.train(), *words)
    assert not workplace.run.exists()


def test_bytes_that_are_not_utf8_are_counted_and_training_goes_on(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, parallel={"tp": 1}, train={"num_steps": 1, "eval_interval": 0})
    with (tmp_path / "corpus.txt").open("ab") as file:
        file.write(b"\xff\xfe broken \x80 line\n")
    outcome = workplace.train()
    assert outcome.code == 0, outcome.err
    manifest = json.loads((workplace.run / "data_manifest.json").read_text())
    assert manifest["corpus"]["noticed"]["not_utf8"]["count"] == 3
    assert "replaced  3 bytes outside UTF-8" in outcome.err
    assert "corpus.txt, line 3001" in outcome.err
    assert outcome.left == []


# --- the checkpoint


def flip_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def test_a_flipped_byte_is_found_by_the_ranks_and_the_older_checkpoint_named(copied: Workplace) -> None:
    flip_byte(copied.checkpoints / "step-00000008" / "rank-00001.safetensors")
    outcome = copied.train("train.num_steps=12")
    assert_sentence(outcome, "rank-00001.safetensors of checkpoint step-00000008", "sha256", "step-00000004", code=1)
    assert [row["step"] for row in copied.rows()] == list(range(1, 9))


def test_a_missing_shard_file_falls_back_to_the_older_checkpoint_and_says_so(copied: Workplace) -> None:
    (copied.checkpoints / "step-00000008" / "rank-00001.safetensors").unlink()
    before = copied.rows()
    outcome = copied.train()
    assert outcome.code == 0, outcome.err
    assert "resuming at step 4" in outcome.out
    assert "ignoring broken checkpoint step-00000008" in " ".join(outcome.err.split())
    assert [row["loss"] for row in copied.rows()] == [row["loss"] for row in before]


def test_missing_shard_files_of_every_checkpoint_are_refused(copied: Workplace) -> None:
    for step in (4, 8):
        (copied.checkpoints / f"step-{step:08d}" / "rank-00000.safetensors").unlink()
    assert_sentence(
        copied.train(), "no checkpoint in", "rank-00000.safetensors is missing", "step-00000004", "step-00000008"
    )


def test_a_spec_that_differs_from_the_checkpoint_is_refused_with_the_differences(copied: Workplace) -> None:
    outcome = copied.train("model.ffn_hidden_size=32", "seed=5", "optimizer.lr=1e-3")
    assert_sentence(
        outcome, "step 8", "model.ffn_hidden_size: 24 -> 32", "seed: 1234 -> 5", "choose another train.output_dir"
    )
    assert "optimizer.lr" not in outcome.err, "the learning rate may change"


def test_text_that_changed_since_the_checkpoint_is_refused(copied: Workplace) -> None:
    (copied.folder / "corpus.txt").write_text(text_of(3000, seed=1))
    tokenizer = (copied.run / "tokenizer.json").read_bytes()
    outcome = copied.train("train.num_steps=12")
    assert_sentence(outcome, "the files of data.source have changed since this run began", "put the former files back")
    assert "tokeniz" not in outcome.err, "that takes long"
    assert (copied.run / "tokenizer.json").read_bytes() == tokenizer


def test_a_checkpoint_is_not_overwritten_when_resuming_is_off(copied: Workplace) -> None:
    assert_sentence(
        copied.train("checkpoint.resume=false"), "step-00000008 is there already", "checkpoint.resume is false"
    )


# --- the disk


def test_an_output_folder_that_cannot_be_made(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path)
    (tmp_path / "file").write_text("")
    assert_sentence(
        workplace.train("train.output_dir=file/run"), "train.output_dir file/run can't be made", "is a file"
    )


def write_that_fails(folder: Path, name: str) -> dict[str, str]:
    """Return the environment in which rank 1 finds no space for files whose path holds `name`."""
    return fault(
        folder,
        f"""
        import errno
        import trimaran.runtime.checkpoint.files as files

        real = os.write

        def write(descriptor, data):
            if {name!r} in os.readlink(f"/proc/self/fd/{{descriptor}}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(descriptor, data)

        files.os.write = write
        """,
    )


@contextmanager
def full_disk(workplace: Workplace) -> Iterator[None]:
    """Put the run's checkpoints on a file system of their own with room for no third one. Needs root."""
    saved = workplace.folder / "saved"
    workplace.checkpoints.rename(saved)
    workplace.checkpoints.mkdir()
    size = sum(file.stat().st_size + 4096 for file in saved.rglob("*"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(workplace.checkpoints)], check=True)
    try:
        shutil.copytree(saved, workplace.checkpoints, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", str(workplace.checkpoints)], check=True)


def can_mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    allowed = os.geteuid() == 0 and shutil.which("mount") is not None
    return allowed and subprocess.run(command, check=False, capture_output=True).returncode == 0


def assert_spared(workplace: Workplace, environment: dict[str, str]) -> None:
    """Train on to a checkpoint that finds no space: it is told, nothing of it stays, and the earlier ones are whole."""
    outcome = workplace.train("train.num_steps=16", environment=environment)
    assert_sentence(
        outcome,
        "the checkpoint of step 12 was not saved",
        "No space left on device",
        "Earlier checkpoints are untouched",
        code=1,
    )
    assert [(found.step, found.broken) for found in find_checkpoints(workplace.checkpoints)] == [(4, None), (8, None)]
    Checkpoint.open(workplace.checkpoints / "step-00000008", verify=True)
    assert not list(workplace.checkpoints.glob("*.tmp"))


def test_a_full_disk_spares_the_earlier_checkpoints(
    copied: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The disk is really full where this user may mount one; elsewhere one rank's writes find no space."""
    probe = tmp_path_factory.mktemp("mount")
    if can_mount(probe):
        subprocess.run(["umount", str(probe)], check=True)
        with full_disk(copied):
            assert_spared(copied, {})
    else:
        assert_spared(copied, write_that_fails(copied.folder, "step-00000012"))


# --- the ranks


def test_the_message_of_a_rank_that_raises_comes_first_and_the_others_end(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, parallel={"tp": 2, "pp": 2})
    environment = fault(tmp_path, RAISE_AT_STEP_6, rank=2)
    outcome = workplace.train("launcher.timeout_s=100000", environment=environment)  # no rank waits for it
    assert_sentence(
        outcome,
        "rank 2 (host ",
        "pp 1, dp 0, cp 0, tp 0) failed at step 6: KeyError: 'made to fail'",
        "traceback.txt",
        code=1,
    )
    assert workplace.saved_steps() == [4]
    details = Path(outcome.last_line.rpartition(" ")[2])
    assert "in train_step" in details.read_text()


def test_a_rank_that_fails_while_it_starts_ends_the_others(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path)
    code = """
        import trimaran.launchers.worker.run as run
        def join_world(*_):
            raise ValueError("no such place")
        run.join_world = join_world
        """
    assert_sentence(
        workplace.train(environment=fault(tmp_path, code)),
        "rank 1 (host ",
        "pp 0, dp 0, cp 0, tp 1) failed: no such place",
        code=1,
    )


def test_a_rank_that_is_killed_is_named_and_the_others_end_at_once(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, parallel={"tp": 2, "pp": 2})
    hold = Hold(tmp_path, 5)  # the others wait for rank 0, and would for launcher.timeout_s
    with workplace.start_training("launcher.timeout_s=100000", environment=hold.environment) as command:
        command.wait_until(lambda: hold.reached)
        command.ranks()[3].kill()
        outcome = command.finish()
    assert_sentence(
        outcome, "rank 3 (host ", "pp 1, dp 0, cp 0, tp 1) ", " at step ", "killed", "left no message", code=137
    )


def test_a_rank_that_is_stopped_is_named_and_ends_the_run_soon_after_the_time_out(tmp_path: Path) -> None:
    """SIGTERM does nothing to it, and the ranks that wait for it could name each other."""
    workplace = make_workplace(tmp_path, parallel={"tp": 2, "pp": 2}, train={"num_steps": 100_000, "eval_interval": 0})
    with workplace.start_training("launcher.timeout_s=15") as command:
        command.wait_for_steps(2)
        command.ranks()[3].suspend()
        outcome = command.finish()
    assert_sentence(
        outcome, "rank 3 (host ", "pp 1, dp 0, cp 0, tp 1) failed at step ", "was stopped (by SIG", code=137
    )


def test_ranks_start_anew_after_a_failure_where_that_is_asked_for(short: Workplace, tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, train={"num_steps": 8, "eval_interval": 0}, launcher={"max_restarts": 1})
    once = "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n" + textwrap.indent(RAISE_AT_STEP_6, "    ")
    outcome = workplace.train(environment=fault(tmp_path, once))
    assert outcome.code == 0, outcome.err
    assert "resuming at step 4" in outcome.out
    assert losses(workplace) == losses(short)
    assert outcome.left == []


def test_a_run_that_diverges_says_so_once(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, optimizer={"lr": 1e30, "max_grad_norm": 0.0})
    outcome = workplace.train()
    assert_sentence(outcome, "training diverged at step", "lower optimizer.lr", code=1)


def test_a_save_that_fails_after_a_signal_is_told(copied: Workplace) -> None:
    environment = write_that_fails(copied.folder, ".safetensors")
    with copied.start_training("train.num_steps=2000", "checkpoint.interval=0", environment=environment) as command:
        command.wait_for_steps(2)
        os.kill(command.process.pid, signal.SIGTERM)
        outcome = command.finish()
    assert outcome.code == 143
    assert outcome.left == []
    assert outcome.last_line.startswith("stopped by SIGTERM, but rank ")
    assert "No space left on device" in outcome.last_line
    assert "step 8 is saved in" in outcome.last_line
