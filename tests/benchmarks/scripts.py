"""A benchmark as a module: the folder of benchmarks is no package, and its files import each other by name."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load_script(name: str) -> ModuleType:
    """Return benchmarks/NAME.py, imported as benchmarks_NAME."""
    found = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # where its dataclasses look for their own module
    sys.path.insert(0, str(FOLDER))
    try:
        found.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module
