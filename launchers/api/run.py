"""A run folder as a Python object. Imports no torch."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from trimaran.launchers.api.calls import expect
from trimaran.launchers.run_folder import find_checkpoint, require_run
from trimaran.runtime.spec import RunSpec, load_spec
from trimaran.runtime.train.metrics import Row, read_metrics


@dataclass(frozen=True)
class Run:
    """A run on disk: what it has done so far is read anew each time, so a run that goes on may be looked at.

    Attributes:
        folder: its train.output_dir.
    """

    folder: Path

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.step} of {self.spec.train.num_steps} steps)"

    @property
    def spec(self) -> RunSpec:
        """The spec that its ranks read, every field written out. Raises SpecError where it can't be read."""
        return load_spec(self.folder / "spec.yaml")

    @property
    def report(self) -> Path:
        """The page about the run, one self-contained HTML file."""
        return self.folder / "report.html"

    def metrics(self) -> list[Row]:
        """Return a dictionary for each step, which pandas.DataFrame takes as it is.

        It has step, loss, lr, grad_norm, tokens_seen, tokens_per_second, step_time_ms and mfu; what is unknown is None.

        Raises:
            ValueError: a line of metrics.jsonl is no row.
        """
        return [row for row in self._rows() if "loss" in row]

    def evaluations(self) -> list[Row]:
        """Return a dictionary for each evaluation on held-out text: step, held_out_loss, held_out_perplexity."""
        return [row for row in self._rows() if "held_out_loss" in row]

    @property
    def step(self) -> int:
        """Steps that it has finished, 0 before the first."""
        return max((int(row["step"] or 0) for row in self.metrics()), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether it has finished the steps of its spec; a run that has not resumes at its newest checkpoint."""
        return self.step >= self.spec.train.num_steps

    @property
    def checkpoint(self) -> Path:
        """The folder of its newest whole checkpoint. Raises ValueError where it has none."""
        return find_checkpoint(self.folder)

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of its whole checkpoints, oldest first."""
        from trimaran.runtime.checkpoint.folder import list_checkpoints

        return list_checkpoints(self.folder / "checkpoints")

    @property
    def sample(self) -> str | None:
        """The text that it wrote at its end; None where it has written none."""
        from trimaran.runtime.files import read_text

        file = self.folder / "sample.txt"
        return read_text(file, errors="replace") if file.exists() else None

    def _rows(self) -> list[Row]:
        try:
            return read_metrics(self.folder / "metrics.jsonl")
        except FileNotFoundError:
            return []


def load_run(folder: str | PathLike[str]) -> Run:
    """Return the run of a folder that `trimaran train`, or `train`, has made.

    Raises:
        ValueError: the folder has nothing of a run.
    """
    expect("folder", folder, (str, PathLike), "the path of a run's folder")
    path = Path(folder)
    require_run(path)
    return Run(path)


def place_of(run: "Run | str | PathLike[str]") -> Path:
    """Return the folder of a run, or the folder that a user has named."""
    expect("run", run, (Run, str, PathLike), "a run, or the path of its folder")
    return run.folder if isinstance(run, Run) else Path(run)
