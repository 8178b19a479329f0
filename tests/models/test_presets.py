"""Presets: every published parameter count to its printed digits, and the error of a wrong name."""

import re

import pytest

from trimaran.models.presets import CATALOG, PRESETS, preset

# Counts of released weights and of the papers' tables, written down a second time: a slip in a data file must not pass
# by agreeing with itself.
PUBLISHED = {
    "gpt2-124m": "124,439,808",
    "gpt2-355m": "354,823,168",
    "gpt2-774m": "774,030,080",
    "gpt2-1.5b": "1,557,611,200",
    "gpt3-125m": "125M",
    "gpt3-350m": "356M",
    "gpt3-760m": "760M",
    "gpt3-1.3b": "1.32B",
    "gpt3-2.7b": "2.65B",
    "gpt3-6.7b": "6.66B",
    "gpt3-13b": "12.85B",
    "gpt3-175b": "174.6B",
    "megatron-1.7b": "1.7B",
    "megatron-3.6b": "3.6B",
    "megatron-7.5b": "7.5B",
    "megatron-18.4b": "18.4B",
    "megatron-39.1b": "39.1B",
    "megatron-76.1b": "76.1B",
    "megatron-145.6b": "145.6B",
    "megatron-310.1b": "310.1B",
    "megatron-529.6b": "529.6B",
    "megatron-1008b": "1008.0B",
    "bloom-176b": "176,247,271,424",
    "pythia-70m": "70,426,624",
    "pythia-12b": "11,846,072,320",
    "falcon-rw-1b": "1,311,625,216",
    "llama-7b": "6,738,415,616",
    "llama-13b": "13,015,864,320",
    "llama-30b": "32,528,943,616",
    "llama-65b": "65,285,660,672",
    "llama2-70b": "68,976,648,192",
    "llama3-8b": "8,030,261,248",
    "llama3-70b": "70,553,706,496",
    "llama3-405b": "405,853,388,800",
    "mistral-7b": "7,241,732,096",
    "palm-8b": "8.63B",
    "palm-62b": "62.50B",
    "opt-175b": "175B",
    "gemma-2b": "2,506,172,416",
    "gemma2-9b": "9,241,705,984",
    "smollm2-135m": "134,515,008",
    "qwen3-8b": "8.2B",
    "olmo2-7b": "7.3B",
}
# Published counts that this project's shape does not have, and by how much: see each preset's note.
DIFFERENT = {
    "falcon-7b": ("6.92B", "7.22B"),
    "falcon-40b": ("41.30B", "41.84B"),
    "falcon-180b": ("178.56B", "179.52B"),
    "gopher-280b": ("258.2B", "280B"),
    "chinchilla-70b": ("64.7B", "70B"),
    "palm-540b": ("540.356B", "540.35B"),
}


def agrees(count: int, published: str) -> bool:
    """Whether the count, rounded to the digits of the published text, is that text."""
    unit = {"M": 10**6, "B": 10**9}.get(published[-1])
    if unit is None:
        return f"{count:,}" == published
    return f"{count / unit:.{len(published[:-1].partition('.')[2])}f}{published[-1]}" == published


def count(name: str) -> int:
    """Return the parameters of a preset."""
    return preset(name).num_parameters()


def test_every_count_is_the_published_one_to_its_printed_digits() -> None:
    counts = {name: (count(name) + entry.besides, entry.published) for name, entry in CATALOG.items()}
    assert not {name: pair for name, pair in counts.items() if not agrees(*pair)}


def test_a_preset_notes_what_the_published_count_has_besides() -> None:
    words = ("count", "store", "rows")
    assert not {
        name for name, entry in CATALOG.items() if entry.besides and not any(word in entry.note for word in words)
    }


def test_the_shape_alone_has_the_published_count() -> None:
    counts = {name: (count(name), published) for name, published in PUBLISHED.items()}
    assert not {name: pair for name, pair in counts.items() if not agrees(*pair)}


def test_a_count_that_differs_is_accounted_for() -> None:
    counts = {
        name: ((count(name), ours), (count(name) + CATALOG[name].besides, published))
        for name, (ours, published) in DIFFERENT.items()
    }
    assert not {name: pairs for name, pairs in counts.items() if not all(agrees(*pair) for pair in pairs)}


def test_the_check_of_digits_can_fail() -> None:
    assert agrees(6_738_415_616, "6.74B")
    assert not agrees(6_738_415_616, "6.73B")
    assert not agrees(124_439_809, "124,439,808")


def test_every_preset_cites_its_source_and_has_no_dropout() -> None:
    origins = ("this project", *(str(year) for year in range(2017, 2027)))
    sources = {name: entry.source for name, entry in CATALOG.items()}
    assert not {name: source for name, source in sources.items() if not any(origin in source for origin in origins)}
    dropouts = ("embedding_dropout", "hidden_dropout", "attention_dropout")
    assert not {name for name in CATALOG if any(getattr(preset(name), dropout) for dropout in dropouts)}


def test_banded_attention_is_two_fields_on_top_and_no_parameter() -> None:
    dense = preset("gpt3-175b")
    banded = dense.model_copy(update={"attention_pattern": ("full", "window"), "attention_window": 256})
    assert [banded.window_of(layer) for layer in range(4)] == [None, 256, None, 256]
    assert banded.num_parameters() == dense.num_parameters()


def test_unknown_preset_names_the_nearest() -> None:
    hints = {
        "llama-7B": "did you mean llama-7b?",
        "gpt2-125m": "did you mean gpt3-125m or gpt2-124m?",
        "falcon-7": "did you mean falcon-7b?",
        "llama2": "did you mean llama2-7b, llama2-13b or llama2-70b?",
        "lama-7b": "did you mean llama-7b or llama2-7b?",
        "xyz": f"`trimaran models` lists the {len(PRESETS)} presets",
    }
    for name, hint in hints.items():
        with pytest.raises(ValueError, match=f"unknown preset .*{re.escape(hint)}"):
            preset(name)
