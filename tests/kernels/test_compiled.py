"""Every kernel configuration that ships compiles for each chip, without spills, within its registers and its shared memory."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compile_kernels.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compile_kernels = load_script()


@pytest.mark.slow
@pytest.mark.parametrize("chip", compile_kernels.CHIPS)
@pytest.mark.parametrize("op", compile_kernels.CASES)
def test_kernels_of_an_op_compile_and_fit(op: str, chip: str) -> None:
    kernels = compile_kernels.compile_all(chip, [op])
    assert kernels
    wrong = [f"{kernel.name} {kernel.constants}: {fault}" for kernel in kernels for fault in compile_kernels.faults(kernel)]
    assert not wrong, "\n".join(wrong)
    if chip == "sm_90" and op in ("attention", "attention_extras"):
        without = [kernel.name for kernel in kernels if "HGMMA" not in kernel.tensor_instructions and kernel.name != "attention_statistics"]
        assert not without, f"no warp-group matrix products in {without}"
