"""Options that several commands take, as records: declared once, with their defaults and what --help says of them.

A command decorated by `option_records` has a parameter whose type is such a record; on its command line each field of
the record is an option. The parameter's default holds the options' defaults. Imports no torch.
"""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from trimaran.launchers.cli.common.console import path
from trimaran.runtime.infer.sampling_params import SamplingParams


def option_records(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with the fields of its records as parameters of their own, as typer reads them."""
    parameters, records = list[inspect.Parameter](), dict[str, type[Any]]()
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        record = parameter.annotation
        if not (isinstance(record, type) and is_dataclass(record)):
            parameters.append(parameter)
            continue
        records[parameter.name] = record
        for name, hint in get_type_hints(record, include_extras=True).items():
            default = getattr(parameter.default, name)
            parameters.append(inspect.Parameter(name, parameter.KEYWORD_ONLY, default=default, annotation=hint))

    def run(**given: Any) -> None:
        for parameter, record in records.items():
            given[parameter] = record(**{field.name: given.pop(field.name) for field in fields(record)})
        command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    keyword_only = [each.replace(kind=each.KEYWORD_ONLY) for each in parameters]
    run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]  # what inspect looks at
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn: options of the commands that write text."""

    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens that are written.")]
    min_new_tokens: Annotated[int, typer.Option(help="No stop token before that many tokens.")] = 0
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens only; 0 for all.")] = 40
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that together have this probability; 1 for all.")
    ] = 1.0
    min_p: Annotated[
        float, typer.Option(help="Draw from tokens with this part of the likeliest one's probability; 0 for all.")
    ] = 0.0
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens that the text has already less likely.")
    ] = 1.0
    seed: Annotated[int, typer.Option(help="Another seed, another text.")] = 0

    def params(self, context: Literal["slide", "stop"] = "stop") -> SamplingParams:
        """Return them as generation takes them; ValueError for a value out of its range."""
        return SamplingParams(**asdict(self), context=context)


@dataclass(frozen=True)
class TwinOptions:
    """What a twin is made of and how: options of `trimaran twin` and of `trimaran twin build`."""

    author: Annotated[str | None, typer.Option(help="Name of the author.")] = None
    character: Annotated[str | None, typer.Option(help="Whose voice it is: one who speaks in the texts.")] = None
    model: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="RUN", help="Run of the model that is tuned; without it, one from scratch."),
    ] = None
    output: Annotated[Path | None, typer.Option(parser=path, metavar="RUN", help="Run folder of the twin.")] = None
    language: Annotated[str | None, typer.Option(help="Language of the texts, such as en or tr; found by default.")] = (
        None
    )
    method: Annotated[
        Literal["adapter", "scratch"] | None, typer.Option(help="How it is trained; by default as the texts ask for.")
    ] = None
    epochs: Annotated[float | None, typer.Option(help="Passes over the examples; 2 of an adapter, 4 from scratch.")] = (
        None
    )

    def given(self) -> dict[str, object]:
        """Return the options that were given, by the names of a request's fields."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
            if value is not None
        }
