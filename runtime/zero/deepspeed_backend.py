"""DeepSpeed in the place of our own sharded optimizer (`zero.backend: deepspeed`).

DeepSpeed keeps and updates the float32 weights and the moments, reduces the gradients over dp and gathers the new
weights. The pipeline, tensor parallelism, clipping, learning rates and checkpoints stay ours: the executor runs inside
`DeepSpeedEngine.coalesce_grad_reduction`, which leaves all gradients in `.grad` until it closes.

DeepSpeed averages over dp where our own optimizer sums, so the loss must be scaled by dp too.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimaran.models.parallel.group import all_reduce
from trimaran.models.parallel.parameter import ParameterInfo, info_of
from trimaran.models.parallel.shard import ShardPiece
from trimaran.models.transformer import Stage
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.optimizer.adamw import AdamWSettings
from trimaran.runtime.zero.deepspeed_setup import DeepSpeedOptions, quiet, start_engine
from trimaran.runtime.zero.optimizer import squared_norm
from trimaran.runtime.zero.protocol import ReadRange

_NORM_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""Largest relative difference between two sums of the same gradients: of the order, and of rounding to bfloat16."""
_GroupKey = tuple[bool, bool, float]
"""Key of a parameter group: (tied to another stage's, decay, lr_scale)."""


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter, and the part of it whose state this rank keeps.

    Args:
        shape: of the whole parameter.
        start: the part's first element in the flat parameter.
        flat: index of the flat float32 tensor that has the part at [offset, offset + length).
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    flat: int
    offset: int
    length: int

    @property
    def info(self) -> ParameterInfo:
        """The parameter's record."""
        return info_of(self.parameter)


class DeepSpeedOptimizer:
    """AdamW over the parameters of this rank's stages by DeepSpeed's ZeRO stages 1 and 2.

    Collective over the world. The launcher has set LOCAL_RANK and DS_ACCELERATOR, which DeepSpeed reads.

    Args:
        stages: stage index -> stage, of this rank.

    Attributes:
        description: one line for the reader of a run's log.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        mesh: Mesh,
        settings: AdamWSettings,
        options: DeepSpeedOptions,
    ) -> None:
        self._mesh, self._settings = mesh, settings
        first = next(iter(stages.values()))
        context, self._has_copies = first.context, first.config.ties_head and mesh.embedding.size > 1
        self._dtype, self._device = context.dtype, context.device
        # A tied embedding may be one parameter of two stages of this rank.
        named = [item for stage in stages.values() for item in stage.named_parameters()]
        self._named = list({id(parameter): (name, parameter) for name, parameter in named}.values())
        modules = nn.ModuleDict({str(index): stage for index, stage in stages.items()})
        groups = self._parameter_groups(modules)
        self._engine, self.description = start_engine(modules, groups, settings, mesh, context, options)
        self._zero = self._engine.optimizer
        self._flats = self._take_over(stages)
        by_torch = isinstance(self._zero.optimizer, torch.optim.AdamW)  # which counts its steps in a tensor
        for flat in self._flats:
            step = torch.zeros((), device=flat.device) if by_torch else 0
            moments = {"exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
            self._zero.state[flat] = {"step": step, **moments}
        self._members = list(self._find_members())
        self._norm_is_checked = False
        self.num_steps = 0

    def _parameter_groups(self, modules: nn.ModuleDict) -> list[dict[str, Any]]:
        """Return the parameters by decay and factor of the learning rate, in the same groups on every rank.

        DeepSpeed sums the norm of each group over the ranks of the pipeline. A rank without a parameter for a group
        gets one of its own, in `modules`, whose gradient is always None.
        """
        members: dict[_GroupKey, list[nn.Parameter]] = {}
        for name, parameter in self._named:
            info = info_of(parameter)
            if hasattr(parameter, "grad_dtype"):  # sums over microbatches are not rounded to bfloat16
                parameter.grad_dtype = torch.float32
            parameter.tensor_model_parallel = info.shard.axis is not None  # type: ignore[attr-defined]
            parameter.ds_pipe_replicated = info.tied_copy  # type: ignore[attr-defined]
            key = (self._is_tied(name, info), info.decay, info.init_spec.lr_scale)
            members.setdefault(key, []).append(parameter)
        everywhere = {
            (bool(tied), bool(decay), float(lr_scale))
            for text in self._mesh.gather_text(json.dumps(list(members)))
            for tied, decay, lr_scale in json.loads(text)
        }
        missing = nn.ParameterDict()
        for key in sorted(everywhere - members.keys()):
            parameter = missing[str(len(missing))] = nn.Parameter(
                torch.zeros(1, dtype=self._dtype, device=self._device)
            )
            members[key] = [parameter]
        if missing:
            modules["missing"] = missing
        return [{"params": members[key], "decay": key[1], "lr_scale": key[2]} for key in sorted(everywhere)]

    def _is_tied(self, name: str, info: ParameterInfo) -> bool:
        """Whether another rank has a copy of the parameter, in the embedding's other end."""
        return self._has_copies and (info.tied_copy or name == "embedding.weight")

    def _holds(self, info: ParameterInfo) -> bool:
        """Whether this rank counts and stores the parameter, as its copies on other tp ranks or stages do not."""
        return not info.tied_copy and (info.shard.axis is not None or self._mesh.tp.rank == 0)

    def _take_over(self, stages: Mapping[int, Stage]) -> list[Tensor]:
        """Return the flat float32 tensors that DeepSpeed updates on this rank."""
        flats: list[Tensor] = self._zero.single_partition_of_fp32_groups
        return flats

    def _find_members(self) -> Iterator[Member]:
        for name, parameter in self._named:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                shape = tuple(parameter.shape)
                yield Member(name, parameter, shape, there.start, mapping.param_group_index, here.start, here.numel)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Clear the gradients, then reduce over dp those of the backward passes inside the block. Collective over dp.

        Raises:
            RuntimeError: at the first step, DeepSpeed's norm of the gradients is not that of our own sum of them.
        """
        self._zero.zero_grad()
        own_norm: float | None = None
        with quiet(), self._engine.coalesce_grad_reduction():
            try:
                yield
                self._complete_gradients()
                if not self._norm_is_checked:
                    own_norm = self._sum_of_norms()
            except BaseException:
                self._zero.zero_grad()  # so that closing the context waits for no peer
                raise
        if own_norm is not None:
            self._check_norm(own_norm)
            self._norm_is_checked = True

    def _complete_gradients(self) -> None:
        """Sum the gradients that are partial over tp, in one collective, and those of a tied embedding's two ends."""
        there = [(name, info_of(each), each.grad) for name, each in self._named if each.grad is not None]
        partial = [grad for _, info, grad in there if info.needs_tp_grad_reduce]
        if partial and self._mesh.tp.size > 1:
            total = all_reduce(torch.cat([grad.flatten() for grad in partial]), self._mesh.tp)
            for grad, summed in zip(partial, total.split([grad.numel() for grad in partial]), strict=True):
                grad.copy_(summed.view_as(grad))
        for name, info, grad in there:
            if self._is_tied(name, info):
                all_reduce(grad, self._mesh.embedding)

    def _sum_of_norms(self) -> float:
        """Return the norm of the gradients averaged over dp, by our own sums of `.grad`. Collective over the world."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for _, parameter in self._named:
            if parameter.grad is not None:
                gradient = parameter.grad.float().flatten() / self._mesh.dp.size
                all_reduce(gradient, self._mesh.dp)
                if self._mesh.dp.rank == 0 and self._holds(info_of(parameter)):
                    total += squared_norm(gradient)
        all_reduce(total, self._mesh.world)
        return total.sqrt().item()

    def _check_norm(self, own: float) -> None:
        found = self._norm()
        if math.isfinite(own) and abs(found - own) > _NORM_TOLERANCE[self._dtype] * own:
            raise RuntimeError(
                f"DeepSpeed's gradient norm of the first step is {found:.6g} and that of our own sum of the same "
                f"gradients is {own:.6g}, so its reduction is wrong here; set zero.backend to native"
            )

    def _norm(self) -> float:
        """Return DeepSpeed's norm of the reduced gradients. Collective over the world."""
        return float(self._zero.scaled_global_norm())

    def finish_gradients(self) -> Tensor:
        """Return this rank's part of the squared gradient norm, scalar float64.

        The sum over the world is the square of the global norm.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for member in self._members:
            if self._holds(member.info):
                total += squared_norm(self._gradient(member)).to(self._device)
        return total

    def _gradient(self, member: Member) -> Tensor:
        """Return the reduced gradient of the member's part, float32 [length]."""
        parameter: Any = member.parameter
        found: Tensor = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return found.flatten().float()

    def step(self, lr: float, grad_factor: float = 1.0) -> None:
        """Take an AdamW step with gradients times `grad_factor`, and gather the new parameters. Collective over dp."""
        for group in self._zero.param_groups:
            group["lr"] = lr * group["lr_scale"]
            # AdamW subtracts lr * weight_decay: divided by lr_scale, that is the same at every width.
            group["weight_decay"] = self._settings.weight_decay / group["lr_scale"] if group["decay"] else 0.0
        self._zero.override_loss_scale(1.0 / grad_factor)  # DeepSpeed divides the gradients by it
        with quiet():
            self._engine.step()
        self.num_steps += 1

    def pieces(self) -> Iterator[ShardPiece]:
        """Yield the weights and moments of this rank's part, each element of the model from exactly one rank."""
        for member in self._members:
            for key, tensor in self._state_of(member).items():
                yield from self._piece(member, key, tensor)

    def gradient_pieces(self) -> Iterator[ShardPiece]:
        """Yield the reduced gradients of this rank's part (key "grad") between `accumulating` and `step`."""
        for member in self._members:
            yield from self._piece(member, "grad", self._gradient(member))

    def _piece(self, member: Member, key: str, data: Tensor) -> Iterator[ShardPiece]:
        if self._holds(member.info):
            yield ShardPiece(member.name, key, data, member.info.shard, member.shape, member.start)

    def _state_of(self, member: Member) -> dict[str, Tensor]:
        """Return the float32 weight and the moments of the member's part."""
        flat = self._flats[member.flat]
        state = self._zero.state[flat]
        whole = {"weight": flat.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        return {key: tensor.narrow(0, member.offset, member.length) for key, tensor in whole.items()}

    def load(self, read: ReadRange, num_steps: int, *, weights_only: bool = False) -> None:
        """Read weights and moments through `read` and refresh the parameters. Collective over dp.

        Args:
            num_steps: optimizer steps taken when the state was stored, for AdamW's bias correction.
            weights_only: leave the moments unchanged, which are zero in a fresh optimizer.
        """
        for member in self._members:
            where = (member.info.shard, member.shape, member.start, member.start + member.length)
            for key, tensor in self._state_of(member).items():
                if key == "weight" or not weights_only:
                    tensor.copy_(read(member.name, key, *where))
        for flat in self._flats:
            state = self._zero.state[flat]
            state["step"] = torch.full_like(state["step"], num_steps) if torch.is_tensor(state["step"]) else num_steps
        self.num_steps = num_steps
        with quiet():
            self._publish()

    def _publish(self) -> None:
        """Make the parameters equal to the float32 weights. Collective over dp."""
        self._zero.update_lp_params()

    def state_bytes(self) -> dict[str, int]:
        """Bytes on this rank: `parameters`, `gradients`, `optimizer` (float32 weights, moments), and what is gathered.

        The gradients are whole at every stage: DeepSpeed reduces them after the last backward pass.
        """
        parameters, num_gradients, gathered = self._sizes()
        width = 4 if hasattr(nn.Parameter, "grad_dtype") else self._dtype.itemsize
        optimizer = sum(3 * flat.nbytes for flat in self._flats)
        gradients = width * num_gradients
        return {"parameters": parameters, "gradients": gradients, "optimizer": optimizer, "transit": gathered}

    def _sizes(self) -> tuple[int, int, int]:
        """Return bytes of the parameters that are always here, elements of gradients, bytes of gathered parameters."""
        return sum(flat.nbytes for flat in self._zero.bit16_groups_flat), sum(p.numel() for _, p in self._named), 0
