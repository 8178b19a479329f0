"""CPU-seconds of commands that start no rank, each in a process of its own, beside those of another checkout.

    python benchmarks/commands.py [--base FOLDER] [--rounds N]

FOLDER is another checkout of this repository. The least of the rounds counts, for other programs on the machine only
add; commands and checkouts take turns, so that they meet the same ones. Bytecode is compiled before.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPEC = str(ROOT / "examples" / "quickstart.yaml")
COMMANDS = (
    ["--version"], ["--help"], ["check", "--help"], ["fields", "parallel"], ["check", SPEC],
    ["check", SPEC, "--json"], ["check", SPEC, "--chip", "H100-SXM"], ["plan", SPEC], ["doctor"],
)  # fmt: skip


def cpu_seconds(words: list[str], path: Path, cache: Path) -> float | None:
    """Return the CPU-seconds of a command and its children, None where the checkout has no such command.

    Args:
        path: folder in which `trimaran` is the checkout.
    """
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONPYCACHEPREFIX": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", "from trimaran.launchers.cli.app import main; main()", *words]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return taken if done.returncode == 0 else None


def main() -> None:
    """Measure and print a row for each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="another checkout, measured in the same rounds")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, checkout in enumerate([options.base, ROOT] if options.base else [ROOT]):
            paths.append(Path(folder, str(number)))
            paths[-1].mkdir()
            (paths[-1] / "trimaran").symlink_to(checkout.resolve())
        for words in COMMANDS:
            found: list[list[float | None]] = [[] for _ in paths]
            for _ in range(options.rounds + 1):  # the first compiles
                for path, taken in zip(paths, found, strict=True):
                    taken.append(cpu_seconds(words, path, Path(folder)))
            least = [min((each for each in taken[1:] if each is not None), default=None) for taken in found]
            shown = [Path(word).name if "/" in word else word for word in words]
            print(" ".join(shown), *("none" if each is None else f"{each:.3f}" for each in least), sep=" | ")


if __name__ == "__main__":
    main()
