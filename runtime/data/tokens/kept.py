"""The corpus that a recipe keeps: tasks measure and encode its parts; this process trains a tokenizer and merges."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np

from trimaran.runtime.data.account import Account
from trimaran.runtime.data.dedup.arrays import SavedArrays
from trimaran.runtime.data.engine.task import Output, Progress, Task, TaskRunner, installed_versions, run_stage
from trimaran.runtime.data.engine.watch import Watch
from trimaran.runtime.data.tokens.shards import ShardWriter
from trimaran.runtime.data.tokens.tasks import TOKENIZER, UNITS, pack_mask
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.data.tokens.units import SPLITS, Encoding, Mask, Units

_TASKS: Final = "trimaran.runtime.data.tokens.tasks"
# Raised whenever the same settings would give other tokens.
_FORMAT: Final = 1
_PACKAGES: Final = ("tokenizers", "tiktoken")


@dataclass(frozen=True)
class KeptCorpus:
    """What a recipe keeps; implements `Corpus`.

    Attributes:
        parts: what its tasks have written, with the name of the corpus of each.
        runner: does the tasks.
    """

    parts: Sequence[tuple[Output, str]]
    runner: TaskRunner
    progress: Progress

    def measure(self, limit: int) -> Units:
        """Read the corpus in sections of at most so many characters."""
        tasks = [self._task("units", "measure_part", {"limit": limit}, [part]) for part in self._outputs]
        found = run_stage(self.runner, "units", tasks, self.progress)
        account, digest, sizes = Account(), hashlib.sha256(), [np.zeros(0, np.int64)]
        for output in found:
            saved = SavedArrays(output.folder / UNITS, {})
            sizes.append(saved["sizes"])
            digest.update(saved["digests"].tobytes())
            account.totals.update(Account.read(output.result["account"]).totals)
        counts = [(corpus, output.result["units"]) for (_, corpus), output in zip(self.parts, found, strict=True)]
        first = next((output.result["first_tokens"] for output in found if output.result["first_tokens"]), "")
        return Units(account, np.concatenate(sizes), counts, limit, digest.hexdigest(), first)

    def train(self, units: Units, chosen: Mask, vocab_size: int, *, with_mask: bool) -> Tokenizer:
        """Train a tokenizer on the chosen units, in this process on all cores."""
        masks = [pack_mask(mask) for mask in units.of_parts(chosen)]
        arguments = {"chosen": masks, "limit": units.limit, "vocab_size": vocab_size, "with_mask": with_mask}
        task = self._task("tokenizer", "train_tokenizer", arguments, self._outputs)
        return Tokenizer.load(task.run(self.runner.root, Watch()).folder / TOKENIZER)

    def encode(self, folder: Path, units: Units, held_out: Mask, encoding: Encoding) -> dict[str, dict[str, Any]]:
        """Write the shards of both splits into a folder; return the manifest's record of each."""
        given = {"definition": encoding.tokenizer.definition, "end_of_text": encoding.tokenizer.eot_token}
        tokenizer = self._task("tokenizer", "save_tokenizer", given, []).run(self.runner.root, Watch())
        tasks = []
        for part, mask in zip(self._outputs, units.of_parts(held_out), strict=True):
            identity = {"limit": units.limit, "held_out": pack_mask(mask), "dtype": encoding.dtype}
            arguments = {**identity, "fast": encoding.fast}
            tasks.append(self._task("tokens", "encode_part", arguments, [part, tokenizer], identity))
        lost = Account(units.account.totals)

        def check(output: Output) -> None:
            _note(output, lost)
            encoding.check(lost)

        found = run_stage(self.runner, "tokens", tasks, self.progress, check)
        for output in found:
            _note(output, units.account)
        return self._merge(folder, found, encoding.dtype)

    def _merge(self, folder: Path, found: Sequence[Output], dtype: str) -> dict[str, dict[str, Any]]:
        """Write the tokens of the parts one after the other, each corpus to files of its own."""
        splits: dict[str, dict[str, Any]] = {
            name: {"units": 0, "characters": 0, "bytes": 0, "tokens": 0, "shards": []} for name in SPLITS
        }
        of_parts = zip((corpus for _, corpus in self.parts), found, strict=True)
        for corpus, outputs in groupby(of_parts, key=lambda part: part[0]):
            with ExitStack() as stack:
                writers = {
                    name: stack.enter_context(ShardWriter(folder, name, dtype, corpus=corpus)) for name in SPLITS
                }
                for _, output in outputs:
                    for name, split in output.result["splits"].items():
                        for key in ("units", "characters", "bytes", "tokens"):
                            splits[name][key] += split[key]
                        for shard in split["shards"]:
                            writers[name].append(output.folder / shard["file"])
                for name, writer in writers.items():
                    splits[name]["shards"] += [shard.record for shard in writer.close()]
        return splits

    @property
    def _outputs(self) -> list[Output]:
        return [output for output, _ in self.parts]

    @staticmethod
    def _task(
        stage: str,
        function: str,
        arguments: Mapping[str, Any],
        inputs: Sequence[Output],
        identity: Mapping[str, Any] | None = None,
    ) -> Task:
        about = f"what the recipe keeps, {inputs[0].folder}" if inputs else stage
        versions = {"format": str(_FORMAT)} | installed_versions(_PACKAGES)
        return Task(stage, f"{_TASKS}:{function}", arguments, about, tuple(inputs), identity, versions)


def _note(output: Output, account: Account) -> None:
    """Note what the tokenizer can't write of a part."""
    for reason, notice in Account.read(output.result["account"]).noticed.items():
        account.note(reason, notice.first, notice.count, notice.amount)
