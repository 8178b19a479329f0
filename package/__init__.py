"""Megatron-style 3D-parallel training of transformer language models, from one validated run spec.

    import trimaran as tm

    run = tm.train(tm.load_spec("spec.yaml", ["parallel.tp=2"]))
    run.metrics()
    tm.generate(run, "To be")

docs/python-api.md is the page about it. The import is cheap: each name is imported at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimaran.launchers.api.evaluate import TextLoss, evaluate_loss
    from trimaran.launchers.api.generate import Continuation, generate
    from trimaran.launchers.api.run import Run, load_run
    from trimaran.launchers.api.train import check, plan, train
    from trimaran.launchers.env.exit_codes import LaunchError, Stopped
    from trimaran.runtime.folder_lock import FolderInUse
    from trimaran.runtime.spec import RunSpec, SpecError, load_spec, parse_spec

    __version__: str

_PLACES = {
    "launchers.api.evaluate": ("TextLoss", "evaluate_loss"),
    "launchers.api.generate": ("Continuation", "generate"),
    "launchers.api.run": ("Run", "load_run"),
    "launchers.api.train": ("check", "plan", "train"),
    "launchers.env.exit_codes": ("LaunchError", "Stopped"),
    "runtime.folder_lock": ("FolderInUse",),
    "runtime.spec": ("RunSpec", "SpecError", "load_spec", "parse_spec"),
}

__all__ = [
    "Continuation",
    "FolderInUse",
    "LaunchError",
    "Run",
    "RunSpec",
    "SpecError",
    "Stopped",
    "TextLoss",
    "__version__",
    "check",
    "evaluate_loss",
    "generate",
    "load_run",
    "load_spec",
    "parse_spec",
    "plan",
    "train",
]


def __getattr__(name: str) -> object:
    """Import a name at its first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("trimaran")
    place = next((place for place, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{place}"), name)


def __dir__() -> list[str]:
    return __all__
