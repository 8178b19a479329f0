"""What a twin shall be made of: the options of the command, or a YAML file of them. No torch."""

import difflib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field, StringConstraints, ValidationError

from trimaran.models.fields import FieldError, Positive
from trimaran.runtime.data.files import DataError
from trimaran.runtime.spec import SpecError
from trimaran.runtime.spec.findings import field_error, locate
from trimaran.runtime.spec.loading import read_file
from trimaran.runtime.spec.sections.common import SECTION_CONFIG
from trimaran.runtime.spec.tree import Place
from trimaran.runtime.spec.yaml_text import read_yaml

SUFFIXES: Final = (".yaml", ".yml")
_PACKAGE: Final = "package:"
Name = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]*$")
]
Text = Annotated[str, Field(min_length=1, max_length=4096)]


class TwinRequest(BaseModel):
    """A twin that shall be made; a file of these fields is a request too."""

    model_config = SECTION_CONFIG

    sources: Annotated[list[Text], Field(min_length=1, max_length=10_000)] = Field(
        description="Files and folders of the author's texts: .txt, .md, .html, .epub, .pdf; package:NAME/PATH is a "
        "file of an installed Python package."
    )
    author: Name = Field(description="Name of the author.")
    character: Name | None = Field(
        default=None, description="Whose voice it is, a character of the texts (null: the author's)."
    )
    model: Text | None = Field(
        default=None, description="Run folder of the model that is tuned (null: tokenizer and model from scratch)."
    )
    output: Text = Field(description="Run folder of the twin.")
    language: Annotated[str, Field(pattern=r"^[a-z]{2,3}$")] | None = Field(
        default=None, description="Language of the texts, ISO 639-1 (null: found)."
    )
    method: Literal["adapter", "scratch"] | None = Field(
        default=None, description="How it is trained (null: by the texts' size and language and the model)."
    )
    epochs: Positive | None = Field(
        default=None, description="Passes over the examples (null: 2 of an adapter, 4 of a model from scratch)."
    )
    set: dict[str, Any] = Field(default={}, description="Fields of the run spec that trains it, by their paths.")

    @staticmethod
    def load(path: Path, changes: Mapping[str, object]) -> "TwinRequest":
        """Return the request of a YAML file.

        Args:
            changes: fields that are given beside it.

        Raises:
            SpecError: the file can't be read, or a field is missing, unknown or wrong.
        """
        source = str(path)
        document = read_yaml(read_file(path, source, "description of a twin"), source)
        if document.errors:
            raise SpecError(document.errors, source)
        if not isinstance(document.value, dict):
            fix = f"write fields: {', '.join(TwinRequest.model_fields)}"
            raise SpecError([FieldError(source, "must be a mapping of fields", document.value, fix)], source)
        return TwinRequest.of({**document.value, **changes}, source)

    @staticmethod
    def of(fields: Mapping[str, object], source: str) -> "TwinRequest":
        """Return the request of these fields.

        Args:
            source: what the errors name.

        Raises:
            SpecError: a field is missing, unknown or wrong.
        """
        errors = []
        for name in fields.keys() - TwinRequest.model_fields.keys():
            near = difflib.get_close_matches(str(name), TwinRequest.model_fields, n=1)
            fix = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(TwinRequest.model_fields)}"
            errors.append(FieldError(str(name), "unknown field", fields[name], fix))
        known = {name: value for name, value in fields.items() if name in TwinRequest.model_fields}
        try:
            request = TwinRequest.model_validate(known)
        except ValidationError as invalid:
            for detail in invalid.errors(include_url=False):
                finding = locate(detail, known, Place(TwinRequest))
                if finding is not None:
                    errors.append(field_error([finding]))
            raise SpecError(errors, source) from invalid
        if errors:
            raise SpecError(errors, source)
        return request


def located(sources: Sequence[str]) -> list[str]:
    """Return sources with `package:NAME/PATH` as the file of the installed package.

    Raises:
        DataError: the package is not installed or has no such file.
    """
    return [_in_package(source) if source.startswith(_PACKAGE) else source for source in sources]


def _in_package(source: str) -> str:
    name, _, inner = source.removeprefix(_PACKAGE).partition("/")
    try:
        path = Path(str(distribution(name).locate_file(f"{inner}")))
    except (PackageNotFoundError, ValueError) as error:
        raise DataError(f"{source}: the package {name!r} is not installed; pip install {name}") from error
    if not inner or ".." in Path(inner).parts or not path.exists():
        raise DataError(f"{source}: the package {name} has no such file")
    return str(path)
