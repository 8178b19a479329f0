"""`trimaran serve` beside `transformers serve`, without and with its continuous batching: same weights, real clients.

    pip install 'trimaran[serve]' 'transformers[serving]' httpx psutil
    trimaran import FOLDER --output RUN
    python benchmarks/serve_http.py RUN FOLDER [--clients 8] [--repeats 3] [--threads 2]

FOLDER is a Hugging Face folder with a chat template, RUN the run made of it. Servers are started one after another; in
each, one client first asks alone (the first request after the start, and later ones of the same length), then so many
clients stream chats of different lengths at the same time. All answers are greedy, in float32, and must be the same
texts on every server, so tokens a second are those of the same tokens. Rounds of the servers alternate and medians are
printed: tokens a second by the clock, CPU-milliseconds of the server's processes a token, the first token's seconds.
The pass is that of transformers' model over the same prompt in this process with as many threads. A ratio above 1 says
that trimaran is faster.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

OURS, THEIRS, CONTINUOUS = "trimaran", "transformers", "transformers, continuous"
_START_S, _ANSWER_S = 180, 600
_TOPICS = (
    "the sea", "a city at night", "how bread is baked", "why leaves fall", "the life of bees", "old maps",
    "a long winter", "music and numbers", "the first railways", "how a clock works", "rivers", "glass",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """A streamed answer, with the seconds to its first piece of text."""

    text: str
    first_s: float


@dataclass(frozen=True)
class Round:
    """What one server did in one round: first tokens of single requests, then the answers of all clients at once."""

    after_start_s: float
    later_s: float
    texts: list[str]
    seconds: float
    cpu_seconds: float


def prompts_of(clients: int) -> list[str]:
    """Return questions of different lengths, one for each client."""
    return [
        f"Write a long story about {_TOPICS[row % len(_TOPICS)]}. " + "Describe every detail with care. " * (row * 2)
        for row in range(clients)
    ]


def long_prompt(tokenizer: Any, tokens: int) -> str:
    """Return a question of about so many tokens."""
    words = "Tell me what this list has in common: " + ", ".join(_TOPICS * (tokens // 8))
    return str(tokenizer.decode(tokenizer(words)["input_ids"][:tokens]))


def stream(client: httpx.Client, model: str, content: str, tokens: int) -> Answer:
    """Ask a server for a greedy answer and read it as it comes."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0.0,
        "max_tokens": tokens,
        "stream": True,
    }
    begin, first, pieces = time.perf_counter(), 0.0, []
    with client.stream("POST", "/v1/chat/completions", json=body, timeout=_ANSWER_S) as response:
        if response.status_code != 200:
            sys.exit(f"{client.base_url}: {response.status_code} {response.read().decode()[:500]}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            choices = json.loads(line.removeprefix("data: ")).get("choices") or [{}]
            piece = choices[0].get("delta", {}).get("content")
            if piece:
                first = first or time.perf_counter() - begin
                pieces.append(piece)
    return Answer("".join(pieces), first)


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def commands_of(run: Path, folder: Path, clients: int, port: int) -> dict[str, list[str]]:
    """Return the command of each server."""
    scripts = Path(sys.executable).parent
    theirs = [str(scripts / "transformers"), "serve", str(folder), "--device", "cpu", "--dtype", "float32"]
    theirs += ["--host", "127.0.0.1", "--port", str(port)]
    return {
        OURS: [str(scripts / "trimaran"), "serve", str(run), "--port", str(port), "--slots", str(clients)],
        THEIRS: theirs,
        # Its cache is as large as these chats need: by default it takes most of the memory, and fills it first.
        CONTINUOUS: [*theirs, "--continuous-batching", "--cb-num-blocks", str(32 * clients), "--cb-block-size", "32"],
    }


@contextmanager
def serving(command: Sequence[str], port: int, threads: int) -> Iterator[psutil.Process]:
    """Start a server, wait until it answers, and end it."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + _START_S
            while True:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"did not start: {' '.join(command)}")
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.2)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def cpu_seconds(server: psutil.Process) -> float:
    """Return the CPU-seconds of a server's processes so far."""
    times = [each.cpu_times() for each in (server, *server.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def measure(server: psutil.Process, port: int, model: str, single: str, options: argparse.Namespace) -> Round:
    """Return one server's round."""
    prompts = prompts_of(options.clients)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        alone = [stream(client, model, f"{number}. {single}", 2).first_s for number in range(4)]
        stream(client, model, prompts[0], 8)  # warm, for servers that compile or allocate at the first longer text
        begin, cpu = time.perf_counter(), cpu_seconds(server)
        with ThreadPoolExecutor(options.clients) as pool:
            answers = list(pool.map(lambda prompt: stream(client, model, prompt, options.new_tokens), prompts))
        seconds, cpu = time.perf_counter() - begin, cpu_seconds(server) - cpu
    return Round(alone[0], statistics.median(alone[1:]), [each.text for each in answers], seconds, cpu)


def pass_seconds(folder: Path, tokenizer: Any, single: str, threads: int) -> float:
    """Return the median seconds of transformers' model over the single prompt, as the chat template renders it."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": f"0. {single}"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    taken = []
    with torch.inference_mode():
        for _ in range(6):
            begin = time.perf_counter()
            model(ids, logits_to_keep=1)
            taken.append(time.perf_counter() - begin)
    print(f"a prompt of {ids.shape[1]} tokens: transformers' pass takes {statistics.median(taken[1:]):.3f} s")
    return statistics.median(taken[1:])


def report(rounds: Mapping[str, list[Round]], tokenizer: Any, prompt_s: float) -> None:
    """Print the table; exit where answers differ."""
    texts = rounds[OURS][0].texts
    for name, each in rounds.items():
        for number, one in enumerate(each):
            different = [row for row, (text, other) in enumerate(zip(texts, one.texts, strict=True)) if text != other]
            if different:
                print(f"{name}, round {number}: {len(different)} of {len(texts)} answers differ from trimaran's first")
    print("| server | tokens/s | ratio | CPU ms a token | ratio | first after start, s | later, s | over the pass |")
    print("|---|---|---|---|---|---|---|---|")
    base = None
    for name, each in rounds.items():
        counts = [sum(len(tokenizer(text)["input_ids"]) for text in one.texts) for one in each]
        rate = statistics.median(count / one.seconds for count, one in zip(counts, each, strict=True))
        cpu = statistics.median(1000 * one.cpu_seconds / count for count, one in zip(counts, each, strict=True))
        base = base or (rate, cpu)
        start, later = (statistics.median(getattr(one, key) for one in each) for key in ("after_start_s", "later_s"))
        print(
            f"| {name} | {rate:.1f} | {base[0] / rate:.2f} | {cpu:.1f} | {cpu / base[1]:.2f} | {start:.3f} "
            f"| {later:.3f} | {start / prompt_s:.2f}, {later / prompt_s:.2f} |"
        )


def main() -> None:
    """Measure the servers in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of each server")
    parser.add_argument("--server", action="append", choices=[OURS, THEIRS, CONTINUOUS], help="may be repeated")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    single = re.sub(r"\s+", " ", long_prompt(tokenizer, options.prompt_tokens))
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {options.clients} clients, "
        f"{options.new_tokens} new tokens, {options.threads} threads, medians of {options.repeats}"
    )
    prompt_s = pass_seconds(options.folder, tokenizer, single, options.threads)
    names = options.server or [OURS, THEIRS, CONTINUOUS]
    rounds: dict[str, list[Round]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name in names:
            port = free_port()
            command = commands_of(options.run, options.folder, options.clients, port)[name]
            model = options.run.name if name == OURS else str(options.folder)
            with serving(command, port, options.threads) as server:
                rounds[name].append(measure(server, port, model, single, options))
    report(rounds, tokenizer, prompt_s)


if __name__ == "__main__":
    sys.exit(main())
