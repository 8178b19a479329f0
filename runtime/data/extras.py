"""Packages of an extra, which a run without the engine's steps does not need."""

from importlib.util import find_spec


def require_extra(*packages: str, extra: str = "data") -> None:
    """Raise where a package is missing.

    Raises:
        DataError: says how to install it.
    """
    from trimaran.runtime.data.files import DataError

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise DataError(f"this needs {', '.join(missing)}; install it by: pip install 'trimaran[{extra}]'")
