"""The documents that a recipe keeps, on disk, with the manifest that says what made them and what was removed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trimaran.runtime.data.engine.task import Output, damaged_files
from trimaran.runtime.data.files import DataError
from trimaran.runtime.files import read_json

MANIFEST: Final = "recipe.json"


@dataclass(frozen=True)
class Curated:
    """The documents that a recipe keeps.

    Attributes:
        folder: has the manifest.
        outputs: what tasks have written, in source order.
    """

    folder: Path
    outputs: Sequence[Output]
    manifest: Mapping[str, Any]

    @property
    def parts(self) -> list[Path]:
        """Folders with the kept documents, in source order (`engine.parts.read_kept`)."""
        return [output.folder for output in self.outputs]

    @property
    def root(self) -> Path:
        """The folder below which tasks have written."""
        return self.folder.parents[1]


def folder_of_recipe(folder: Path) -> Path:
    """Return the folder with the manifest of a recipe: `folder` itself, or the one that a run folder names.

    Raises:
        DataError: there is none.
    """
    if folder.is_file() and folder.name not in ("data.html", MANIFEST, "data_manifest.json"):
        raise DataError(f"{folder} is no folder with a recipe; name the folder of a run, or the one with the data.html")
    folder = folder.parent if folder.is_file() else folder
    run = folder / "data_manifest.json"
    if not run.is_file():
        return folder
    try:
        recipe = read_json(run)["source"].get("recipe")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{run} is damaged ({error}); run the spec again") from error
    if recipe is None:
        raise DataError(f"the run {folder} has no recipe: its spec has no data.corpora, clean, filter or dedup")
    return Path(recipe["folder"])


def open_curated(folder: Path) -> Curated:
    """Open what `curate` has written.

    Raises:
        DataError: the manifest or a part is missing or damaged.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        root = folder.parents[1]
        parts = [root / part["folder"] for part in manifest["parts"]]
        digests = [part["sha256"] for part in manifest["parts"]]
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no recipe; name the folder of a run, or the one with the data.html that prepare has told"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged ({error}); run trimaran prepare again") from error
    outputs = []
    for part, digest in zip(parts, digests, strict=True):
        found = Output.read(part)
        if found is None or found.digest != digest:
            raise DataError(f"{part} is missing or not what its manifest says; run trimaran prepare again")
        outputs.append(found)
    for path in damaged_files(outputs, folder / "checked.json"):
        raise DataError(f"{path} is not what its manifest says; run trimaran prepare again")
    return Curated(folder, outputs, manifest)
