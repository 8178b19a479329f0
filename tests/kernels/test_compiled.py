"""Every kernel configuration that ships compiles for each chip, without spills, within its registers and its shared memory."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from triton.runtime.jit import JITFunction

from trimaran.kernels.ahead_of_time import compiling_for
from trimaran.kernels.launch import tuned_table

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compile_kernels.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compile_kernels = load_script()


# Compiling takes minutes. Here: what the reference runs use on their chip, and a small op for its neighbours. The rest,
# and the generic table, is for `python benchmarks/compile_kernels.py`; that it leaves no tuned configuration out is the
# next test.
RARE = {"attention_extras", "attention_float32"}
COMPILED = [(op, "sm_90") for op in compile_kernels.CASES if op not in RARE] + [
    ("norm", chip) for chip in ("sm_80", "sm_100")
]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "chip"), COMPILED)
def test_kernels_of_an_op_compile_and_fit(op: str, chip: str) -> None:
    kernels = compile_kernels.compile_all(chip, [op])
    assert kernels
    wrong = [
        f"{kernel.name} {kernel.constants}: {fault}" for kernel in kernels for fault in compile_kernels.faults(kernel)
    ]
    assert not wrong, "\n".join(wrong)
    if chip == "sm_90" and op == "attention":
        without = [
            kernel.name
            for kernel in kernels
            if "wgmma" not in kernel.matrix_instructions and kernel.name != "attention_statistics"
        ]
        assert not without, f"no warp-group matrix products in {without}"


class NotedConfigs(dict[str, object]):
    """Configurations of an op that remember which were asked for."""

    def __init__(self, configs: dict[str, object]) -> None:
        super().__init__(configs)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> object:
        self.asked.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("chip", compile_kernels.CHIPS)
def test_the_cases_ask_for_every_tuned_configuration(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tuned_table(chip)
    noted = {op: NotedConfigs(entry["configs"]) for op, entry in table["ops"].items()}
    for op, configs in noted.items():
        monkeypatch.setitem(table["ops"][op], "configs", configs)
    with compiling_for(compile_kernels.CHIPS[chip]), monkeypatch.context() as inner:
        inner.setattr(
            JITFunction, "run", lambda self, *args, **options: None
        )  # what is asked for, without the time to compile it
        for case in compile_kernels.CASES.values():
            case()
    missing = {
        op: sorted(configs.keys() - configs.asked) for op, configs in noted.items() if configs.keys() - configs.asked
    }
    assert not missing, f"benchmarks/compile_kernels.py never compiles {missing}"
