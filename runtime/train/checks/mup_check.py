"""The coordinate check: activation sizes at several widths during training (Yang et al. 2022, appendix D.1).

A parametrization is right when the mean size of each module's output does not depend on the width, before the first
step and after the next few: only then does the best learning rate of a narrow model hold for a wide one. The slope of
log(size) over log(width) measures the dependence.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimaran.models.batch import Microbatch
from trimaran.models.parallel.group import Group
from trimaran.models.transformer import Stage, in_eval_mode
from trimaran.runtime.data.prepare import PreparedData
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec, fields_at_layout, parse_spec
from trimaran.runtime.train.samples import build_loader
from trimaran.runtime.train.train_context import build_train_context, train_step

Growth = Literal["heads", "head_dim"]
MakeBatches = Callable[[RunSpec], list[Microbatch]]
"""The microbatches of one global batch for a spec; every step of the check trains on them again."""


@dataclass(frozen=True)
class ActivationSizes:
    """Activation sizes by module.

    `sizes[module][step][i]` is the mean absolute output at `widths[i]` after `step` steps, 0 before the first.
    """

    widths: tuple[int, ...]
    sizes: dict[str, list[list[float]]]

    def slope(self, module: str, step: int) -> float:
        """Return the slope of log(size) over log(width).

        0 where the width has no effect, 0.5 where the size grows with its square root, NaN where a size is 0 or not
        finite.
        """
        x, sizes = [math.log(width) for width in self.widths], self.sizes[module][step]
        if not all(size > 0 and math.isfinite(size) for size in sizes):
            return math.nan
        y = [math.log(size) for size in sizes]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def spec_at_width(spec: RunSpec, width: int, growth: Growth) -> RunSpec:
    """Return the spec with hidden_size `width`, everything else in proportion, for one process.

    Args:
        growth: whether the number of heads grows, or their width; a single key-value head stays single.

    Raises ValueError where the proportion gives no whole number of heads.
    """
    shape = spec.transformer
    changes: dict[str, Any] = {
        "hidden_size": width,
        "ffn_hidden_size": _in_proportion("ffn_hidden_size", shape.ffn_hidden_size, width, shape.hidden_size),
    }
    if growth == "heads":
        changes["head_dim"] = shape.head_dim
        changes["num_heads"] = _in_proportion("num_heads", shape.num_heads, width, shape.hidden_size)
        kv_heads = shape.num_kv_heads
        changes["num_kv_heads"] = (
            1 if kv_heads == 1 else _in_proportion("num_kv_heads", kv_heads, width, shape.hidden_size)
        )
    else:
        changes["head_dim"] = _in_proportion("head_dim", shape.head_dim, width, shape.hidden_size)
        if shape.init == "mup" and shape.mup_base_width is not None and spec.model.mup_base_head_dim is None:
            changes["mup_base_head_dim"] = _in_proportion(
                "head_dim", shape.head_dim, shape.mup_base_width, shape.hidden_size
            )
    raw = fields_at_layout(spec)
    raw["model"] |= changes
    return parse_spec(raw)


def plain_spec(spec: RunSpec) -> RunSpec:
    """Return the spec with the same initial deviation at every width, the baseline of the comparison."""
    raw = spec.model_dump(mode="json")
    raw["model"] |= {"init": "normal", "mup_base_width": None, "mup_base_head_dim": None}
    return parse_spec(raw)


def measure(
    spec: RunSpec,
    widths: Sequence[int],
    num_steps: int,
    growth: Growth,
    make_batches: MakeBatches,
    mesh: Mesh,
    device: torch.device,
) -> ActivationSizes:
    """Train the model at every width for `num_steps` steps on one global batch and return the activation sizes.

    Args:
        spec: its optimizer's lr is used from the first step on; there is no warmup.
        mesh: of one process.

    Raises ValueError where a width does not fit the model, and TrainingDiverged.
    """
    specs = [spec_at_width(spec, width, growth) for width in widths]
    sizes: dict[str, list[list[float]]] = {}
    for at_width in specs:
        train_context = build_train_context(at_width, mesh, device)
        batches = [batch.to(device) for batch in make_batches(at_width)]
        (stage,) = train_context.stages.values()
        for step in range(num_steps + 1):
            for module, size in sizes_of(stage, batches[0].tokens).items():
                sizes.setdefault(module, [[] for _ in range(num_steps + 1)])[step].append(size)
            if step < num_steps:
                train_step(train_context, batches, at_width.optimizer.lr)
    return ActivationSizes(tuple(widths), sizes)


@torch.no_grad()
def sizes_of(stage: Stage, tokens: Tensor) -> dict[str, float]:
    """Return the mean absolute output of each module of a whole network.

    The modules are the embedding, attention and layer of every block, the final norm and the logits. A layer's output
    is what it adds to the residual stream last; where a norm follows the sum, it is the stream.

    Args:
        tokens: [batch, seq].
    """
    with in_eval_mode([stage]), _listening(stage) as sizes:
        logits = stage.logits(stage.run_layers(None, tokens))
    return {**sizes, "logits": _size(logits[..., : stage.config.vocab_size])}


@contextmanager
def _listening(stage: Stage) -> Iterator[dict[str, float]]:
    """Record the sizes of the modules' outputs inside the block."""
    sizes: dict[str, float] = {}

    def listen(name: str, part: Callable[[Any], Tensor]) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            sizes[name] = _size(part(output))

        return note

    hooks = [stage.embedding.register_forward_hook(listen("embedding", lambda output: output))]
    for number, layer in stage.layers.items():
        attention: nn.Module = layer.get_submodule("attention")
        hooks.append(attention.register_forward_hook(listen(f"layers.{number}.attention", lambda output: output)))
        hooks.append(
            layer.register_forward_hook(
                listen(f"layers.{number}", lambda output: output[0] if output[1] is None else output[1][0])
            )
        )
    if stage.final_norm is not None:
        hooks.append(stage.final_norm.register_forward_hook(listen("final_norm", lambda output: output[1])))
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def _size(x: Tensor) -> float:
    return float(x.abs().double().mean())


def _in_proportion(name: str, size: int, width: int, hidden_size: int) -> int:
    scaled, rest = divmod(size * width, hidden_size)
    if rest or scaled == 0:
        step = hidden_size // math.gcd(size, hidden_size)
        raise ValueError(
            f"at width {width} the model's {name} ({size} at hidden_size {hidden_size}) would be "
            f"{size * width / hidden_size:g}, no whole number; give --widths that are multiples of {step}"
        )
    return scaled


def batches_of_text(spec: RunSpec, data: PreparedData) -> MakeBatches:
    """Return a function that gives the first global batch of the spec's text.

    Raises DataError or ValueError where it is too short.
    """
    batches = build_loader(spec, data.train, data.tokenizer, Group("dp", (0,), 0)).microbatches(0)
    return lambda at_width: batches


def random_batches(spec: RunSpec) -> list[Microbatch]:
    """Return a global batch of random tokens, the same for every width.

    Raises ValueError where the model does not predict the next token.
    """
    if not spec.transformer.is_causal:
        raise ValueError(
            f"random tokens have nothing to learn for objective {spec.transformer.objective}; "
            "give --data to train on the spec's text"
        )
    train, generator = spec.train, torch.Generator().manual_seed(spec.seed)
    tokens = torch.randint(
        spec.transformer.vocab_size, (train.global_batch_size, train.seq_len + 1), generator=generator
    )
    firsts = range(0, train.global_batch_size, train.micro_batch_size)
    parts = [tokens[first : first + train.micro_batch_size] for first in firsts]
    return [
        Microbatch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), first)
        for first, part in zip(firsts, parts, strict=True)
    ]
