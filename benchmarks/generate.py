"""Greedy generation on a CPU in one process: trimaran's against transformers', same random weights and prompts.

    python benchmarks/generate.py [--model llama-small ...] [--threads 2] [--repeats 5] [--smoke]

Both continue the same prompts by the same number of tokens; that the tokens are the same is checked first. The two take
turns, so that a slow moment meets both, and medians are printed: of the whole call, and of a pass that makes the next
token of each prompt (the difference between a whole call and one that ends with the first token, divided by the passes
between). A ratio above 1 says that trimaran is faster; that of CPU time is less disturbed by what else the machine
does. "ragged" prompts have different lengths.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface import family_of, locate, resolve
from trimaran.models.parallel.group import single
from trimaran.models.parallel.parameter import LayerContext
from trimaran.models.transformer import Stage, build_stages
from trimaran.runtime.infer.generate import generate
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec

Verbatim = argparse.RawDescriptionHelpFormatter
Prompts = Sequence[Sequence[int]]
Continue = Callable[[Prompts, int], list[list[int]]]
"""(prompts, new tokens) -> the new tokens of each prompt."""


@dataclass(frozen=True)
class Shape:
    """A model's shape in the words of TransformerConfig."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    vocab_size: int
    max_seq_len: int = 1024


MODELS = {
    "llama-100m": Shape(12, 768, 12, 4, 2048, 32000),
    "llama-small": Shape(6, 256, 4, 2, 704, 8192),
    "gpt2-124m": Shape(12, 768, 12, 12, 3072, 50257),
    "gpt2-small": Shape(6, 256, 4, 4, 1024, 8192),
}
TIE = 1e-5  # of the largest logit: closer ones are a matter of rounding
SMOKE = {"llama-smoke": Shape(2, 32, 4, 2, 64, 300), "gpt2-smoke": Shape(2, 32, 4, 4, 64, 300)}


def their_model(name: str, shape: Shape) -> Any:
    """Return transformers' model with random weights."""
    if name.startswith("llama"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocab_size,
                hidden_size=shape.hidden_size,
                intermediate_size=shape.ffn_hidden_size,
                num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.num_heads,
                num_key_value_heads=shape.num_kv_heads,
                max_position_embeddings=shape.max_seq_len,
                tie_word_embeddings=True,
                initializer_range=0.05,
                attn_implementation="sdpa",
            )
        ).eval()
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.max_seq_len,
            n_embd=shape.hidden_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            n_inner=shape.ffn_hidden_size,
            initializer_range=0.05,
            attn_implementation="sdpa",
        )
    ).eval()


def our_model(theirs: Any) -> tuple[RunSpec, Stage]:
    """Return a run spec of the same model, and the whole network with the same weights."""
    hf = theirs.config.to_dict()
    family = family_of(hf)
    config = TransformerConfig.model_validate(family.to_config(hf))
    spec = parse_spec(
        {
            "model": config.model_dump(mode="json"),
            "data": {"tokenizer_vocab_size": config.vocab_size},
            "optimizer": {"lr": 1.0},
            "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "seq_len": config.max_seq_len},
        }
    )
    context = LayerContext(single("tp"), False, torch.float32, torch.device("cpu"))
    (stage,) = build_stages(config, [range(config.num_layers)], [0], context, seed=0)
    stored, units, weights = theirs.state_dict(), resolve(family, config), {}
    names = locate(family, units, stored).names
    for unit in units:
        weights |= dict(
            zip(unit.ours, unit.to_ours([stored[names[name]] for name in unit.theirs], config), strict=True)
        )
    stage.load_state_dict(weights)
    return spec, stage


def padded(theirs: Any, prompts: Prompts, new_tokens: int) -> list[list[int]]:
    """Continue prompts by transformers' `generate`, as one padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # No token ends a text: all ways must make as many.
    out = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    found: list[list[int]] = out[:, longest:].tolist()
    return found


def make_both(theirs: Any, mesh: Mesh) -> dict[str, Continue]:
    """Return both ways to continue prompts with the weights of transformers' model."""
    spec, stage = our_model(theirs)
    stage.pack_weights()  # as the command does

    def ours(prompts: Prompts, new_tokens: int) -> list[list[int]]:
        return [
            each.tokens
            for each in generate({0: stage}, mesh, spec, prompts, SamplingParams(new_tokens, temperature=0.0))
        ]

    return {"ours": ours, "theirs": partial(padded, theirs)}


@dataclass(frozen=True)
class Figures:
    """Medians of one way: seconds and CPU seconds of a whole call, and seconds of a pass after the first."""

    seconds: float
    cpu_seconds: float
    pass_seconds: float


@torch.no_grad()
def check_same(model: Any, prompts: Prompts, ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> None:
    """Exit where the tokens differ; ends the comparison where both are equally likely within float32's rounding."""
    for prompt, our_tokens, their_tokens in zip(prompts, ours, theirs, strict=True):
        first = next(
            (index for index, (our, their) in enumerate(zip(our_tokens, their_tokens, strict=True)) if our != their),
            None,
        )
        if first is None:
            continue
        logits = model(torch.tensor([[*prompt, *our_tokens[:first]]])).logits[0, -1]
        gap = float((logits[our_tokens[first]] - logits[their_tokens[first]]).abs() / logits.abs().max())
        if gap > TIE:
            raise SystemExit(
                f"different tokens for the same prompt, {gap:.1e} of the largest logit apart:\n"
                f"{our_tokens}\n{their_tokens}"
            )


def measure(
    ways: Mapping[str, Continue], model: Any, prompts: Prompts, new_tokens: int, repeats: int
) -> dict[str, Figures]:
    """Return the figures of each way; exit where their tokens differ."""
    tokens = {name: way(prompts, new_tokens) for name, way in ways.items()}
    check_same(model, prompts, tokens["ours"], tokens["theirs"])
    times: dict[tuple[str, int], list[tuple[float, float]]] = {
        (name, count): [] for count in (new_tokens, 1) for name in ways
    }
    for _ in range(repeats):
        for (name, count), measured in times.items():
            start = time.perf_counter(), time.process_time()
            ways[name](prompts, count)
            measured.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    wall, cpu = (
        {key: statistics.median(each[which] for each in measured) for key, measured in times.items()}
        for which in (0, 1)
    )
    return {
        name: Figures(
            wall[name, new_tokens],
            cpu[name, new_tokens],
            (wall[name, new_tokens] - wall[name, 1]) / max(1, new_tokens - 1),
        )
        for name in ways
    }


def prompts_of(kind: str, length: int, vocab_size: int) -> Prompts:
    """Return random prompts: `1`, `16`, or `16 ragged`, whose lengths go from a quarter of `length` to `length`."""
    generator = torch.Generator().manual_seed(2)
    count = int(kind.split()[0])
    lengths = [
        max(1, length // 4 + (length - length // 4) * row // max(1, count - 1)) if "ragged" in kind else length
        for row in range(count)
    ]
    return [torch.randint(vocab_size, (each,), generator=generator).tolist() for each in lengths]


def options_of(parser: argparse.ArgumentParser, threads: int) -> argparse.Namespace:
    """Return the options, with those of every comparison of generation; take the threads, and begin a group of one."""
    parser.add_argument("--model", action="append", choices=list(MODELS), help="may be repeated")
    parser.add_argument("--threads", type=int, default=threads, help="of all ways")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models, to see that the benchmark runs; its figures mean nothing"
    )
    options = parser.parse_args()
    if options.smoke:
        options.repeats, options.prompt_tokens, options.new_tokens = 1, 8, 4
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return options


def main() -> None:
    """Measure and print the table."""
    options = options_of(argparse.ArgumentParser(description=__doc__, formatter_class=Verbatim), threads=2)
    if options.smoke:
        models = SMOKE
    else:
        models = {name: shape for name, shape in MODELS.items() if name in (options.model or MODELS)}
    mesh = build_mesh(pp=1, dp=1, cp=1, tp=1, timeout_s=60)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads, "
        f"{options.prompt_tokens} prompt tokens, {options.new_tokens} new tokens, medians of {options.repeats}"
    )
    print(
        "| model | batch | transformers tokens/s | ours tokens/s | ratio "
        "| theirs ms/pass | ours ms/pass | ratio | cpu ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name, shape in models.items():
        torch.manual_seed(1)
        model = their_model(name, shape)
        ways = make_both(model, mesh)
        for kind in ("1", "16", "16 ragged"):
            prompts = prompts_of(kind, options.prompt_tokens, shape.vocab_size)
            found = measure(ways, model, prompts, options.new_tokens, options.repeats)
            ours, theirs, count = found["ours"], found["theirs"], len(prompts) * options.new_tokens
            rates = f"{count / theirs.seconds:.1f} | {count / ours.seconds:.1f} | {theirs.seconds / ours.seconds:.2f}"
            their_ms, our_ms = theirs.pass_seconds * 1e3, ours.pass_seconds * 1e3
            passes = f"{their_ms:.2f} | {our_ms:.2f} | {their_ms / our_ms:.2f}"
            print(f"| {name} | {kind} | {rates} | {passes} | {theirs.cpu_seconds / ours.cpu_seconds:.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
