"""The packages of the extras, which a run needs only for the steps that it takes."""

from importlib.util import find_spec

from trimaran.runtime.data.files import DataError


def require_extra(*packages: str, extra: str = "data") -> None:
    """Raise DataError where a package, named as it is imported, is not installed; call before any work."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise DataError(f"this needs {' and '.join(missing)}; run pip install 'trimaran[{extra}]'")
