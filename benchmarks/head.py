"""The language-model head on a CPU, forward and backward: ours, in chunks, against F.linear with F.cross_entropy.

    python benchmarks/head.py [--threads 2] [--rounds 20] [TOKENS,HIDDEN,VOCABULARY ...]

Prints, for each shape, the median times of both (measured in turns, so that a slow moment meets both), their ratio, and
the most memory that each holds at once above what was held before, by torch's own count of its allocations.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.models.parallel.group import Group
from trimaran.models.parallel.parameter import InitSpec, LayerContext, info_of, new_parameter
from trimaran.models.parallel.vocab import head_loss

SHAPES = ["512,256,8192", "4096,256,8192", "4096,256,32768"]
Step = Callable[[], None]


def make_steps(shape: str) -> dict[str, Step]:
    """Return the two ways to make the loss and add its gradients, over the same numbers."""
    tokens, hidden, vocabulary = map(int, shape.split(","))
    context = LayerContext(Group("tp", (0,), 0), False, torch.float32, torch.device("cpu"))
    weight = new_parameter((vocabulary, hidden), context, dim=0, init_spec=InitSpec(0.02))
    nn.init.normal_(weight, std=0.02)
    info_of(weight).main_grad = torch.zeros(vocabulary, hidden)
    plain = nn.Parameter(weight.detach().clone())
    plain.grad = torch.zeros(vocabulary, hidden)
    x = torch.randn(1, tokens, hidden)
    labels = torch.randint(vocabulary, (1, tokens))

    def run(loss: Callable[[Tensor], Tensor]) -> None:
        loss(x.detach().requires_grad_()).backward()

    return {
        "torch": lambda: run(lambda x: F.cross_entropy(F.linear(x[0], plain), labels[0], reduction="sum")),
        "ours": lambda: run(lambda x: head_loss(x, weight, labels, context)),
    }


def median_ms(shape: str, rounds: int) -> dict[str, float]:
    """Return the median time of each way in milliseconds."""
    steps = make_steps(shape)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(measured[1:]) for name, measured in times.items()}


def peak_mib(shape: str, name: str) -> float:
    """Return the most memory that torch's allocator holds at once in one step, above what it held before, in MiB."""
    step = make_steps(shape)[name]
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return max(accumulate(change for _, change in changes)) / 2**20


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="TOKENS,HIDDEN,VOCABULARY")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(args.threads)
    print(
        "| tokens, hidden, vocabulary | torch ms | ours ms | torch / ours | torch peak MiB | ours peak MiB |\n"
        "|---|---|---|---|---|---|"
    )
    for shape in args.shapes:
        times = median_ms(shape, args.rounds)
        peaks = {name: peak_mib(shape, name) for name in times}
        ratio = times["torch"] / times["ours"]
        print(
            f"| {shape} | {times['torch']:.1f} | {times['ours']:.1f} | {ratio:.2f} "
            f"| {peaks['torch']:.0f} | {peaks['ours']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
