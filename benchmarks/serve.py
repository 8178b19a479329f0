"""Serving on a CPU: the engine of continuous batching in one process beside transformers', same random weights.

    python benchmarks/serve.py batch [--model llama-small ...] [--threads 1] [--repeats 5] [--smoke]

`batch`: greedy continuations of 1 and of 8 prompts of different lengths that come at the same time, as streams: each
token is told as it is made. The ways are ours, transformers' `generate` on the padded batch (which streams to nobody),
and its continuous batching. That the tokens are the same is checked first. The ways take turns, on new prompts each
time, and medians are printed, without what an engine does before its first request. A ratio is theirs over ours: above
1, trimaran is faster. CPU ratios are less disturbed by what else the machine does.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from generate import MODELS, SMOKE, Prompts, Verbatim, check_same, options_of, our_model, padded, their_model
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from trimaran.models.transformer import Stage
from trimaran.runtime.infer.batching.messages import Event, Finished, NewToken, Request
from trimaran.runtime.infer.batching.orders import End, Order, Ready
from trimaran.runtime.infer.batching.replica import Limits, serve
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.spec import RunSpec

STREAMS = 8


@dataclass(frozen=True)
class Round:
    """The tokens of every prompt, and what they took."""

    tokens: list[list[int]]
    seconds: float
    cpu_seconds: float


@dataclass
class BenchmarkDesk:
    """Asks for all texts when the engine is ready, and ends it after the last token."""

    requests: list[Request]
    tokens: dict[int, list[int]] = field(default_factory=dict)
    begin: tuple[float, float] = (0.0, 0.0)
    end: tuple[float, float] = (0.0, 0.0)
    is_ready: bool = False
    missing: int = 0

    def poll(self, timeout_s: float) -> list[Order]:
        """Return the requests once, and End once they have ended."""
        if not self.is_ready:
            return []
        if self.missing == 0 and not self.requests:
            return [End()]
        orders, self.requests = list(self.requests), []
        return list(orders)

    def ready(self, ready: Ready) -> None:
        """Begin to count."""
        self.is_ready, self.missing = True, len(self.requests)
        self.begin = time.perf_counter(), time.process_time()

    def tell(self, events: list[Event]) -> None:
        """Take tokens."""
        for event in events:
            if isinstance(event, NewToken):
                self.tokens.setdefault(event.request, []).append(event.token)
            elif isinstance(event, Finished):
                self.missing -= 1
        self.end = time.perf_counter(), time.process_time()


def ours(spec: RunSpec, stage: Stage, mesh: Mesh, prompts: Prompts, new_tokens: int) -> Round:
    """Continue prompts by the engine."""
    sampling = SamplingParams(new_tokens, temperature=0.0, context="stop")
    desk = BenchmarkDesk([Request(number, tuple(prompt), sampling) for number, prompt in enumerate(prompts)])
    serve({0: stage}, mesh, spec, Limits(len(prompts), spec.transformer.max_seq_len), desk)
    seconds, cpu_seconds = (end - begin for begin, end in zip(desk.begin, desk.end, strict=True))
    return Round([desk.tokens[number] for number in range(len(prompts))], seconds, cpu_seconds)


def timed(work: Callable[[], list[list[int]]]) -> Round:
    """Return what a way's work has taken."""
    begin = time.perf_counter(), time.process_time()
    tokens = work()
    return Round(tokens, time.perf_counter() - begin[0], time.process_time() - begin[1])


def continuous(model: Any, prompts: Prompts, new_tokens: int) -> Round:
    """Continue prompts by transformers' continuous batching, whose cache is as large as they need and no larger."""
    page, most = 32, max(map(len, prompts)) + new_tokens
    engine = model.continuous_batching_context_manager(
        generation_config=GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=page, num_blocks=(-(-most // page) + 1) * len(prompts), max_batch_tokens=512
        ),
    )
    with engine as manager:

        def work() -> list[list[int]]:
            names = manager.add_requests([list(each) for each in prompts], max_new_tokens=new_tokens)
            found: dict[str, list[int]] = {}
            while len(found) < len(prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    found[result.request_id] = result.generated_tokens
            return [found[name] for name in names]

        return timed(work)


def prompts_of(count: int, longest: int, vocab_size: int, seed: int) -> Prompts:
    """Return random prompts of lengths from half of `longest` to `longest`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [longest - longest // 2 * row // max(1, count - 1) for row in range(count)]
    return [torch.randint(vocab_size, (each,), generator=generator).tolist() for each in lengths]


def ways_of(name: str, mesh: Mesh, new_tokens: int) -> tuple[Any, dict[str, Callable[[Prompts], Round]]]:
    """Return transformers' model of a name with random weights, and the ways to continue prompts with them."""
    torch.manual_seed(1)
    model = their_model(name, (SMOKE | MODELS)[name])
    spec, stage = our_model(model)
    stage.pack_weights()  # as the ranks of a served model do
    return model, {
        "ours": lambda prompts: ours(spec, stage, mesh, prompts, new_tokens),
        "generate": lambda prompts: timed(lambda: padded(model, prompts, new_tokens)),
        "continuous": lambda prompts: continuous(model, prompts, new_tokens),
    }


def rounds_of(
    model: Any, ways: Mapping[str, Callable[[Prompts], Round]], streams: int, options: argparse.Namespace
) -> dict[str, list[Round]]:
    """Return the rounds of each way; exit where their tokens differ. One round before them warms up."""
    found: dict[str, list[Round]] = {way: [] for way in ways}
    for number in range(options.repeats + 1):
        prompts = prompts_of(streams, options.prompt_tokens, model.config.vocab_size, number)
        rounds = {way: run(prompts) for way, run in ways.items()}
        for way in ("generate", "continuous"):
            check_same(model, prompts, rounds["ours"].tokens, rounds[way].tokens)
        if number:
            for way, each in rounds.items():
                found[way].append(each)
    return found


def batch(options: argparse.Namespace) -> None:
    """Print the table of the engine beside transformers."""
    mesh = build_mesh(pp=1, dp=1, cp=1, tp=1, timeout_s=60)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads, up to "
        f"{options.prompt_tokens} prompt tokens, {options.new_tokens} new tokens, medians of {options.repeats}"
    )
    print(
        "| model | streams | ours tokens/s | generate tokens/s | continuous tokens/s | generate ratio | cpu ratio "
        "| continuous ratio | cpu ratio | ours over one stream, by cpu |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in SMOKE if options.smoke else options.model or ["llama-100m", "llama-small"]:
        model, ways = ways_of(name, mesh, options.new_tokens)
        one_stream = 0.0
        for streams in (1, STREAMS):
            found = rounds_of(model, ways, streams, options)
            wall = {way: statistics.median(each.seconds for each in rounds) for way, rounds in found.items()}
            cpu = {way: statistics.median(each.cpu_seconds for each in rounds) for way, rounds in found.items()}
            one_stream = one_stream or cpu["ours"]
            rates = " | ".join(f"{streams * options.new_tokens / wall[way]:.1f}" for way in ways)
            ratios = " | ".join(
                f"{each[way] / each['ours']:.2f}" for way in ("generate", "continuous") for each in (wall, cpu)
            )
            print(f"| {name} | {streams} | {rates} | {ratios} | {streams * one_stream / cpu['ours']:.2f} |", flush=True)


def main() -> None:
    """Run one of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Verbatim)
    parser.add_argument("mode", choices=["batch"])
    options = options_of(parser, threads=1)
    batch(options)


if __name__ == "__main__":
    sys.exit(main())
