"""A mixture-of-experts layer on a CPU, forward and backward: ours against transformers' Mixtral with the same weights.

    python benchmarks/experts.py [--threads 1] [--rounds 15] [--dtype float32] [HIDDEN,FFN,EXPERTS,PER_TOKEN,TOKENS ...]

Prints, for each shape, the tokens a second of CPU time of a training step of the layer, and of its forward pass alone:
ours, and transformers' with a loop over the experts (eager) and with its grouped matrix products. They are measured in
turns and the best of the rounds counts. CPU time and not the clock's: other work on the same cores stretches the latter
at random; with one thread the two are the same on an idle machine. Ours adds the gradients to the float32 buffers of
the optimizer, theirs to `.grad`.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from trimaran.models.config import TransformerConfig
from trimaran.models.layers.experts import ExpertMLP
from trimaran.models.parallel.group import single
from trimaran.models.parallel.parameter import LayerContext, info_of, initialize

SHAPES = ["256,512,8,2,1024", "512,1024,8,2,2048", "256,128,32,4,1024"]
Layer = Callable[[Tensor], Tensor]


def ours(hidden: int, ffn: int, experts: int, per_token: int, dtype: torch.dtype) -> ExpertMLP:
    """Return our layer, with the buffers that the optimizer would give it."""
    config = TransformerConfig(
        num_layers=1, hidden_size=hidden, num_heads=1, ffn_hidden_size=ffn, vocab_size=1, max_seq_len=1,
        num_experts=experts, experts_per_token=per_token
    )  # fmt: skip
    layer = ExpertMLP(config, LayerContext(single("tp"), False, dtype, torch.device("cpu")))
    initialize(layer, seed=0)
    for weight in (layer.experts.up, layer.experts.down):
        info_of(weight).main_grad = torch.zeros_like(weight, dtype=torch.float32)
    return layer


def theirs(layer: ExpertMLP, kind: str) -> nn.Module:
    """Return transformers' block with the weights of `layer` and its experts computed the given way."""
    up, down = layer.experts.up, layer.experts.down
    config = MixtralConfig(
        hidden_size=down.shape[1], intermediate_size=down.shape[2],
        num_local_experts=len(down), num_experts_per_tok=layer.router.num_chosen
    )  # fmt: skip
    config._experts_implementation = kind
    block = MixtralSparseMoeBlock(config).to(down.dtype)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(up.flatten(1, 2))
        block.experts.down_proj.copy_(down)
    return block


def best_tokens_per_second(shape: str, dtype: torch.dtype, rounds: int) -> dict[str, tuple[float, float]]:
    """Return (training step, forward pass) by name, in tokens a CPU second.

    Raises:
        RuntimeError: the layers do not agree.
    """
    hidden, ffn, experts, per_token, tokens = map(int, shape.split(","))
    layer = ours(hidden, ffn, experts, per_token, dtype)
    layers: dict[str, Layer] = {
        "ours": layer,
        "eager": theirs(layer, "eager"),
        "grouped_mm": theirs(layer, "grouped_mm"),
    }
    x, dy = (torch.randn(1, tokens, hidden).to(dtype) for _ in range(2))
    outputs = [run(x).detach() for run in layers.values()]
    if any(not torch.allclose(outputs[0], other, rtol=0.05, atol=0.05 * float(other.abs().max())) for other in outputs):
        raise RuntimeError(f"the layers of shape {shape} do not give the same")

    def train(run: Layer) -> None:
        run(x.detach().requires_grad_()).backward(dy)

    @torch.no_grad()
    def forward(run: Layer) -> None:
        run(x)

    best = {name: [float("inf")] * 2 for name in layers}
    for _ in range(rounds + 1):  # the first also warms up
        for name, run in layers.items():
            for index, step in enumerate((train, forward)):
                begin = time.process_time()
                step(run)
                best[name][index] = min(best[name][index], time.process_time() - begin)
    return {name: (tokens / seconds[0], tokens / seconds[1]) for name, seconds in best.items()}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="HIDDEN,FFN,EXPERTS,PER_TOKEN,TOKENS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(args.threads)
    print(
        "| hidden, ffn, experts, per token, tokens | pass | ours | eager "
        "| grouped_mm | ours / eager | ours / grouped_mm |\n"
        "|---|---|---|---|---|---|---|"
    )
    for shape in args.shapes:
        rates = best_tokens_per_second(shape, getattr(torch, args.dtype), args.rounds)
        for index, words in enumerate(("training", "forward")):
            mine, eager, grouped = (rates[name][index] for name in ("ours", "eager", "grouped_mm"))
            print(
                f"| {shape} | {words} | {mine:.0f} | {eager:.0f} | {grouped:.0f} "
                f"| {mine / eager:.2f} | {mine / grouped:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
