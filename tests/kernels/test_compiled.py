"""Kernel configurations that ship compile for their chips without spills, within registers and shared memory."""

import dataclasses
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from tests import counting
from trimaran.kernels.ahead_of_time import CompiledKernel, compiling_for
from trimaran.kernels.launch import tuned_table

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "compile_kernels.py"
CACHE = ROOT / ".cache" / "tests" / "compiled"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compile_kernels = load_script()


# Compiling takes minutes. Here: what the reference runs use on their chip, and a small op for its neighbours. The rest,
# and the generic table, is for `python benchmarks/compile_kernels.py`; a later test shows that it leaves no tuned
# configuration out.
RARE = {"attention_extras", "attention_float32"}
COMPILED = [(op, "sm_90") for op in compile_kernels.CASES if op not in RARE] + [
    ("norm", chip) for chip in ("sm_80", "sm_100")
]


def sources() -> list[Path]:
    """Return the files that decide what is compiled: the kernels, their tuned configurations and the cases."""
    files = [file for pattern in ("*.py", "*.json") for file in (ROOT / "kernels").rglob(pattern)]
    return sorted([*files, SCRIPT])


def cache_file(op: str, chip: str) -> Path:
    """Return where the facts about an op's compiled kernels are kept; the name depends on all that they depend on."""
    digest = hashlib.sha256(f"{op} {chip} triton {triton.__version__} torch {torch.__version__}".encode())
    for file in sources():
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return CACHE / f"{op}-{chip}-{digest.hexdigest()[:32]}.json"


def compiled(op: str, chip: str) -> list[CompiledKernel]:
    """Return the kernels of an op, each distinct configuration once, compiled now or in an earlier session."""
    file = cache_file(op, chip)
    if file.exists():
        return [CompiledKernel(**kernel) for kernel in json.loads(file.read_text(encoding="utf-8"))]
    kernels: list[CompiledKernel] = compile_kernels.compile_all(chip, [op])
    counting.record("kernel compiled", f"{op} {chip}", len(kernels))
    CACHE.mkdir(parents=True, exist_ok=True)
    for earlier in CACHE.glob(f"{op}-{chip}-*.json"):
        earlier.unlink(missing_ok=True)
    new = file.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps([dataclasses.asdict(kernel) for kernel in kernels]), encoding="utf-8")
    new.replace(file)
    return kernels


@pytest.mark.slow
@pytest.mark.timeout(920)  # minutes of compiling on a busy machine where nothing is kept
@pytest.mark.parametrize(("op", "chip"), COMPILED)
def test_kernels_of_an_op_compile_and_fit(op: str, chip: str) -> None:
    kernels = compiled(op, chip)
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


def test_what_is_kept_of_a_compilation_is_all_of_it_and_found_by_the_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []
    kernel = CompiledKernel("norm", 90, "bfloat16 BLOCK=16", 32, 0, 64, {"wgmma": 2})

    def compile_all(chip: str, ops: list[str]) -> list[CompiledKernel]:
        calls.extend(ops)
        return [kernel]

    monkeypatch.setattr(compile_kernels, "compile_all", compile_all)
    monkeypatch.setattr(f"{__name__}.CACHE", tmp_path)
    monkeypatch.delenv(counting.FOLDER, raising=False)
    assert compiled("norm", "sm_90") == compiled("norm", "sm_90") == [kernel]
    assert calls == ["norm"]
    changed = tmp_path / "changed.py"
    changed.write_text("1")
    monkeypatch.setattr(f"{__name__}.SCRIPT", changed)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert compiled("norm", "sm_90") == [kernel]
    assert calls == ["norm", "norm"]


class NotedConfigs(dict[str, object]):
    """Configurations of an op that remember which were looked up."""

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
        )  # the look-ups alone, without the time to compile
        for case in compile_kernels.CASES.values():
            case()
    missing = {
        op: sorted(configs.keys() - configs.asked) for op, configs in noted.items() if configs.keys() - configs.asked
    }
    assert not missing, f"benchmarks/compile_kernels.py never compiles {missing}"
