"""DeepSpeed's engine over our stages and mesh: its configuration, its update rule, and what it may not do."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from trimaran.models.parallel.parameter import LayerContext
from trimaran.runtime.mesh import Mesh, model_group
from trimaran.runtime.optimizer.adamw import AdamWSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeepSpeedOptions:
    """What a run spec says of DeepSpeed.

    Args:
        zero_stage: 1, 2 or 3.
        bucket_bytes: most bytes of gradients that are reduced at a time.
        offload: where the float32 weights and the moments are, and where they are updated.
        timeout_s: bound of every wait.
        build_folder: where DeepSpeedCPUAdam is compiled.
    """

    zero_stage: int
    bucket_bytes: int
    offload: Literal["none", "cpu"]
    timeout_s: float
    build_folder: Path


def start_engine(
    modules: nn.Module,
    groups: Sequence[dict[str, Any]],
    settings: AdamWSettings,
    mesh: Mesh,
    context: LayerContext,
    options: DeepSpeedOptions,
) -> tuple[Any, str]:
    """Return DeepSpeed's engine, and a line about it for the reader of a run's log. Collective over the world.

    Args:
        groups: of the parameters of `modules`, as torch's optimizers take them.

    Raises:
        RuntimeError: the package is missing, or too old.
    """
    deepspeed = import_deepspeed()
    adam, what = _adam(groups, settings, mesh, options)
    with quiet():
        engine, *_ = deepspeed.initialize(
            model=modules,
            optimizer=adam,
            config=_config(options, context.dtype, sum(parameter.numel() for parameter in modules.parameters())),
            mpu=_model_parallel_unit(mesh, options.timeout_s, context.device),
            dist_init_required=False,
        )
    return engine, f"the optimizer is DeepSpeed {deepspeed.__version__}, ZeRO stage {options.zero_stage}, with {what}"


def check_installed() -> None:
    """Raise RuntimeError where the package is missing."""
    if find_spec("deepspeed") is None:
        raise RuntimeError(
            "zero.backend deepspeed needs the package deepspeed: in trimaran's own folder, "
            "pip install -c constraints.txt deepspeed; or set zero.backend to native"
        )


def import_deepspeed() -> Any:
    """Return the module deepspeed, set to compile nothing for its communication and to log through our logger.

    Raises:
        RuntimeError: the package is missing, or too old.
    """
    check_installed()
    with _without_mlflow():
        import deepspeed

    if not hasattr(deepspeed.DeepSpeedEngine, "coalesce_grad_reduction"):
        raise RuntimeError(
            f"deepspeed {deepspeed.__version__} has no coalesce_grad_reduction, which zero.backend deepspeed needs: "
            "in trimaran's own folder, pip install -c constraints.txt --upgrade deepspeed"
        )
    # On a CPU each rank would else compile this extension, and wait for ever for one that died while compiling. Looking
    # for what else can be compiled starts compilers, whose errors the user would see.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    _import_muon_uncompiled()
    theirs = logging.getLogger("DeepSpeed")  # it has a handler of its own, to the standard output
    theirs.handlers.clear()
    theirs.setLevel(logging.WARNING)
    theirs.propagate, theirs.parent = True, logger
    return deepspeed


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """Let MLflow seem to be missing: DeepSpeed's autotuner imports it where it is not, seconds on every rank."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which any optimizer of it imports, without torch.compile of its functions.

    That would import torch._inductor: three seconds of CPU time on every rank, for what no run uses.
    """
    from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings about collectives that torch has renamed, at every call of which it warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+_tensor` is deprecated")
        yield


def _config(options: DeepSpeedOptions, dtype: torch.dtype, num_parameters: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration. Its batch sizes are without effect: the executor feeds the microbatches."""
    elements = max(2, min(options.bucket_bytes // 4, num_parameters))  # stage 3 allocates them
    zero: dict[str, Any] = {
        "stage": options.zero_stage,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements // 2 * 2,  # it must be even
        "overlap_comm": False,
        "memory_efficient_linear": False,  # it replaces torch.nn.functional.linear
        "stage3_param_persistence_threshold": 0,  # all parameters are gathered and released by block
    }
    if options.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "steps_per_print": 2**62,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
        if options.zero_stage > 1:  # stage 1 with such gradients is another optimizer, which can't coalesce
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _model_parallel_unit(mesh: Mesh, timeout_s: float, device: torch.device) -> SimpleNamespace:
    """Return the mesh as DeepSpeed asks for it, in the words of Megatron-LM's `mpu`. Collective over the world."""
    model = model_group(mesh, timeout_s, device)
    dp = mesh.dp.process_group
    if dp is None:  # to torch that is the group of all ranks
        dp = dist.new_group([mesh.rank], timeout=timedelta(seconds=timeout_s), use_local_synchronization=True)
    return SimpleNamespace(
        get_model_parallel_rank=lambda: mesh.tp.rank,
        get_model_parallel_world_size=lambda: model.size,
        get_model_parallel_group=lambda: model.process_group,
        get_data_parallel_rank=lambda: mesh.dp.rank,
        get_data_parallel_world_size=lambda: mesh.dp.size,
        get_data_parallel_group=lambda: dp,
        get_data_parallel_group_ranks=lambda: list(mesh.dp.ranks),
    )


def _adam(
    groups: Sequence[dict[str, Any]], settings: AdamWSettings, mesh: Mesh, options: DeepSpeedOptions
) -> tuple[torch.optim.Optimizer, str]:
    """Return the update rule and its name: torch's AdamW, or DeepSpeed's for CPUs where it can be compiled."""
    numbers: dict[str, Any] = {"lr": 0.0, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    what, problem = "torch's AdamW", ""
    if options.offload == "cpu":
        problem = _compile_cpu_adam(mesh, options)
        if not problem:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, **numbers), "its state on the CPU and DeepSpeedCPUAdam"
        what = f"its state on the CPU and torch's AdamW ({problem}, so no DeepSpeedCPUAdam)"
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True, **numbers), what


_BEAT_S = 5.0
_COMPILE = """
import os, signal, sys
from trimaran.runtime.processes import exit_with_parent

def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)  # ninja, which stops its compilers
    os._exit(1)

signal.signal(signal.SIGTERM, stop)
exit_with_parent(int(sys.argv[1]))
from deepspeed.ops.op_builder import CPUAdamBuilder
CPUAdamBuilder().load(verbose=False)
"""


def _compile_cpu_adam(mesh: Mesh, options: DeepSpeedOptions) -> str:
    """Compile DeepSpeed's extension on rank 0, while the others wait; return "" or why it can't be compiled.

    The ranks meet every few seconds meanwhile, for the compiler may take longer than any of their waits. Collective
    over the world.
    """
    problem = _why_not_compiled() if mesh.rank == 0 else ""
    with ExitStack() as stack:
        compiler: subprocess.Popen[str] | None = None
        if mesh.rank == 0 and not problem:
            print("compiling DeepSpeedCPUAdam, which takes a minute or two", flush=True)
            (options.build_folder / "cpu_adam" / "lock").unlink(missing_ok=True)  # of a start that was killed meanwhile
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, "-c", _COMPILE, str(os.getpid())]
            compiler = subprocess.Popen(command, stdout=errors, stderr=errors, text=True, start_new_session=True)
        while True:
            is_done = True
            if compiler is not None:
                try:
                    code = compiler.wait(min(_BEAT_S, options.timeout_s / 4))
                    errors.seek(0)
                    problem = f"it does not compile: {errors.read().strip()}" if code else ""
                except subprocess.TimeoutExpired:
                    is_done = False
            is_done, problem = json.loads(mesh.gather_text(json.dumps([is_done, problem]))[0])
            if is_done:
                return str(problem)


def _why_not_compiled() -> str:
    """Return what is missing to compile an extension, "" for nothing."""
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    if which(get_cxx_compiler()) is None:
        return f"no C++ compiler {get_cxx_compiler()} on the PATH"
    return "" if is_ninja_available() else "no ninja on the PATH"
