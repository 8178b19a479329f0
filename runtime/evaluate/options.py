"""What is asked of an evaluation, as a record. Imports no torch."""

import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from trimaran.runtime.evaluate.results import TEXT, evaluation_name

SEED = 1234
"""Of the draw of few-shot examples in lm-eval."""
_MOST_DOCUMENTS = 2**31 - 1


class EvaluationOptions(BaseModel):
    """What is evaluated, and how.

    Args:
        texts: files whose perplexity is measured, with windows that are `stride` tokens apart (None: disjoint).
        tasks: names, groups and files of own tasks; what follows is theirs.
        pairs: file of texts and what they should become, which are asked for in `mode`, into the language `to`.
        data: folder of the tasks' data, None for the cache of lm-eval's own.
        limit: most documents of a task, below 1 their share.
        num_fewshot: examples before each question, None for as many as the task says.
        batch_size: requests that are computed at once, None to fill the memory.
        chat: whether prompts are turns of a conversation, by the chat template.
        generation: settings of generation in the place of a task's own.
        keep_prompts: whether samples.jsonl holds the prompts too.
        seed: of few-shot examples, and of draws where a task asks for sampling.
        allow_code: whether a file of a task may name functions to run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    texts: tuple[Path, ...] = ()
    stride: int | None = None
    tasks: tuple[str, ...] = ()
    pairs: Path | None = None
    mode: str | None = None
    to: str | None = None
    data: Path | None = None
    limit: int | float | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    chat: bool = False
    system: str | None = None
    generation: dict[str, Any] = {}
    keep_prompts: bool = False
    seed: int = SEED
    allow_code: bool = False

    def name(self, step: int | None) -> str:
        """Return the name of the folder of the evaluation of a checkpoint's step."""
        chosen = {
            "limit": None if self.limit is None else f"{self.limit:g}",
            "num_fewshot": self.num_fewshot,
            "stride": self.stride,
            "chat": self.chat,
            "system": None if self.system is None else hashlib.sha256(self.system.encode()).hexdigest()[:8],
            "gen": "+".join(f"{name}={value}" for name, value in sorted(self.generation.items())) or None,
            "seed": None if self.seed == SEED else self.seed,
        }
        texts = [f"{TEXT}-{each.stem}" for each in self.texts]
        pairs = [] if self.pairs is None else ["-".join(filter(None, (self.mode, self.to, self.pairs.stem)))]
        return evaluation_name([*texts, *self.tasks, *pairs], step, chosen)

    def config(self) -> dict[str, Any]:
        """Return the options as lm-eval's `config` has them."""
        return {
            "batch_size": "auto" if self.batch_size is None else self.batch_size,
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "gen_kwargs": self.generation or None,
            "fewshot_seed": self.seed,
            "apply_chat_template": self.chat,
            "system_instruction": self.system,
            "fewshot_as_multiturn": self.chat,
            "texts": [str(each) for each in self.texts],
            "data": None if self.data is None else str(self.data),
            **({} if self.pairs is None else {"pairs": str(self.pairs), "mode": self.mode, "to": self.to}),
        }


def check_limit(limit: float | None) -> None:
    """Raise ValueError for a limit that is neither a number of documents nor a share of them."""
    if limit is not None and not (0 < limit < 1 or (1 <= limit <= _MOST_DOCUMENTS and float(limit).is_integer())):
        raise ValueError(f"--limit ({limit:g}) must be a whole number of documents, or a share of them between 0 and 1")
