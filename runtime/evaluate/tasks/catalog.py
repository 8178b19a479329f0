"""The tasks that come along: lm-eval's own of these names, over our files of their data. Without lm-eval."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

FOLDERS: Final = (
    "arc",
    "hellaswag",
    "mmlu/default",
    "truthfulqa",
    "lambada",
    "piqa",
    "winogrande",
    "wsc273",
    "super_glue/boolq",
    "super_glue/copa",
    "super_glue/wsc",
    "openbookqa",
    "gsm8k",
)
"""Folders of lm-eval's tasks that have them; lm-eval's whole index takes 9 s."""
SHOTS: Final[Mapping[str, int]] = MappingProxyType({"mmlu": 5})
"""Beginning of a task's name -> few-shot examples where --num-fewshot does not say (Hendrycks et al. 2021)."""


@dataclass(frozen=True)
class Part:
    """A task of a mean.

    Args:
        task: lm-eval's name.
        name: of the task with these shots among the results.
        metric: whose value counts.
    """

    task: str
    name: str
    shots: int
    metric: str


ALIASES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"lambada": ("lambada_openai",), "truthfulqa": ("truthfulqa_mc1", "truthfulqa_mc2")}
)
"""Our name -> the tasks that it stands for."""
MEANS: Final[Mapping[str, tuple[Part, ...]]] = MappingProxyType(
    {
        "leaderboard": (
            Part("arc_challenge", "leaderboard_arc_challenge", 25, "acc_norm,none"),
            Part("hellaswag", "leaderboard_hellaswag", 10, "acc_norm,none"),
            Part("mmlu", "mmlu", 5, "acc,none"),
            Part("truthfulqa_mc2", "truthfulqa_mc2", 0, "acc,none"),
        )
    }
)
"""Name -> the tasks whose mean it is: the first Open LLM Leaderboard (Beeching et al. 2023), without its later two."""
SHIPPED: Final = (
    "arc_easy",
    "arc_challenge",
    "hellaswag",
    "mmlu",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
    "lambada",
    "piqa",
    "winogrande",
    "wsc",
    "wsc273",
    "boolq",
    "openbookqa",
    "copa",
    "gsm8k",
)
"""Names for messages and pages; `mmlu_SUBJECT` and the groups of subjects are tasks too."""

_FIGURES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        **dict.fromkeys(("arc_easy", "arc_challenge", "hellaswag", "piqa", "openbookqa"), ("acc", "acc_norm")),
        **dict.fromkeys(("truthfulqa_mc1", "truthfulqa_mc2", "winogrande", "wsc", "wsc273", "boolq", "copa"), ("acc",)),
        "lambada_openai": ("acc", "perplexity"),
        "gsm8k": ("exact_match,strict-match", "exact_match,flexible-extract"),
    }
)


def figures_of_task(name: str) -> tuple[str, ...]:
    """Return the figures that lm-eval gives of a shipped task, as metrics.jsonl calls them; none for another task."""
    return ("acc",) if name == "mmlu" or name.startswith("mmlu_") else _FIGURES.get(name, ())


def shots_of(name: str) -> int | None:
    """Return the few-shot examples of a task by our default, None where lm-eval's own holds."""
    return next((shots for start, shots in SHOTS.items() if name == start or name.startswith(f"{start}_")), None)


def means_of(names: Iterable[str], results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return lm-eval's record of each mean among `names`, from those of its tasks.

    The tasks' standard errors count as independent.
    """
    found = {}
    for name in dict.fromkeys(names):
        parts = MEANS.get(name, ())
        if not parts:
            continue
        records = [results[part.name] for part in parts]
        values = [record[part.metric] for record, part in zip(records, parts, strict=True)]
        errors = [record[part.metric.replace(",", "_stderr,")] for record, part in zip(records, parts, strict=True)]
        is_known = all(isinstance(error, float) for error in errors)
        found[name] = {
            "name": name,
            "alias": name,
            "sample_len": sum(record["sample_len"] for record in records),
            "mean,none": sum(values) / len(values),
            "mean_stderr,none": sum(error**2 for error in errors) ** 0.5 / len(errors) if is_known else "N/A",
        }
    return found


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the end of a sentence on an unknown name: the nearest ones."""
    known = list(dict.fromkeys((*SHIPPED, *ALIASES, *MEANS, *names)))
    close = difflib.get_close_matches(name.lower(), known, n=4)
    shown = f"did you mean {' or '.join(close)}?" if close else f"the tasks that come along are {', '.join(SHIPPED)}."
    return f"{shown} A task of your own is a file: --tasks NAME.yaml"
