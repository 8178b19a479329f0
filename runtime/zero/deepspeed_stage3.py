"""DeepSpeed's ZeRO stage 3: parameters are sharded too, and gathered for the time of a block."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from trimaran.models.boundary import FINAL, HEAD
from trimaran.models.transformer import Stage
from trimaran.runtime.zero.deepspeed_backend import DeepSpeedOptimizer, Member
from trimaran.runtime.zero.deepspeed_setup import quiet


class DeepSpeedStage3(DeepSpeedOptimizer):
    """AdamW over the parameters of this rank's stages by DeepSpeed's ZeRO stage 3, and the listener of their blocks.

    DeepSpeed gathers the parameters of a module in hooks on its forward. Those do not see what layers here do without
    their modules' forwards (several linear layers share one collective), so they are removed, and whole blocks are
    gathered and released by the same methods of DeepSpeed.
    """

    def _take_over(self, stages: Mapping[int, Stage]) -> list[Tensor]:
        self._zero.parameter_offload.destroy()  # its hooks
        self._blocks = {
            block: list(parameters.values())
            for stage in stages.values()
            for block, parameters in stage.blocks().items()
        }
        self._gathered: dict[int, Any] = {}  # id -> parameter
        for stage in stages.values():
            stage.boundary.listener, stage.boundary.takes_gradients = self, False
        flats: list[Tensor] = self._zero.fp32_partitioned_groups_flat
        return flats

    def _find_members(self) -> Iterator[Member]:
        for name, parameter in self._named:
            group, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start, shape = padded * self._mesh.dp.rank, tuple(parameter.ds_shape)  # type: ignore[attr-defined]
            length = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if length > 0:
                yield Member(name, parameter, shape, start, group, offset, length)

    def _gradient(self, member: Member) -> Tensor:
        found: Tensor = self._zero.get_local_fp32_grad_for_param(member.parameter)
        return found.flatten()[: member.length].float()

    def _norm(self) -> float:
        return math.hypot(*map(float, self._zero._get_norm_groups()))

    def step(self, lr: float, grad_factor: float = 1.0) -> None:
        """Take an AdamW step with gradients times `grad_factor`. Collective over dp."""
        self._release()
        super().step(lr, grad_factor)

    def _publish(self) -> None:
        self._release()
        for index in range(len(self._flats)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)

    def _sizes(self) -> tuple[int, int, int]:
        parameters: list[Any] = [parameter for _, parameter in self._named]
        gathered = sum(each.nbytes for each in self._gathered.values())
        return sum(each.ds_tensor.nbytes for each in parameters), sum(each.ds_numel for each in parameters), gathered

    def _release(self) -> None:
        """Free what is gathered."""
        held, self._gathered = list(self._gathered.values()), {}
        if held:
            held[0].partition(param_list=held)

    def _gather(self, *blocks: str) -> None:
        """Gather the parameters of `blocks`, and free all others. Collective over dp."""
        needed: dict[int, Any] = {id(each): each for block in blocks for each in self._blocks[block]}
        old = [each for key, each in self._gathered.items() if key not in needed]
        new = [each for key, each in needed.items() if key not in self._gathered]
        self._gathered = needed
        if old:
            old[0].partition(param_list=old)
        if new:
            with quiet():
                new[0].all_gather_coalesced(new).wait()

    # The listener of the blocks.

    def before_forward(self, block: str) -> None:
        """Gather the block's parameters. Collective over dp."""
        self._gather(block)

    def after_forward(self, block: str) -> None:
        """Nothing: parameters are freed when the next ones are gathered."""

    def before_backward(self, block: str) -> None:
        """Gather the block's parameters. Collective over dp."""
        # The head's gradient, which its forward has computed, reaches its parameters at the begin of the backward pass.
        self._gather(*([block, HEAD] if block == FINAL else [block]))

    def after_backward(self, block: str) -> None:
        """Nothing: parameters are freed when the next ones are gathered."""

    def before_gradients(self, block: str) -> None:
        """Nothing: gradients go to `.grad`."""

    def after_gradients(self, block: str) -> None:
        """Nothing: gradients are reduced after the last backward pass."""
