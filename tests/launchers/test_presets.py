"""`trimaran models` and `trimaran coordinate-check`: what they print, draw and refuse."""

import math
from pathlib import Path

import pytest
import yaml

from tests.launchers.runs import make_workplace, trimaran, trimaran_here
from trimaran.launchers.cli.planning.presets import section_of_preset, short_count
from trimaran.models.presets import CATALOG, PRESETS, preset
from trimaran.runtime.spec import parse_spec
from trimaran.runtime.train.checks.rate_check import RateCurves

SMALL = [
    "--set",
    "model.num_layers=1",
    "--set",
    "train.global_batch_size=2",
    "--set",
    "train.micro_batch_size=1",
    "--set",
    "train.seq_len=8",
]


def test_models_lists_every_preset_with_its_source(tmp_path: Path) -> None:
    outcome = trimaran(tmp_path, "models")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert len(lines) == len(PRESETS) + 1
    assert lines[0].split()[:5] == ["name", "parameters", "layers", "hidden", "heads/kv"]
    (falcon,) = [line for line in lines if line.startswith("falcon-40b ")]
    assert falcon.split()[:8] == ["falcon-40b", "41.3B", "60", "8192", "128/8", "32768", "65024", "2048"]
    assert "Almazrouei et al. 2023" in falcon


def test_models_lists_the_names_that_begin_so(tmp_path: Path) -> None:
    outcome = trimaran_here(tmp_path, "models", "gemma2")
    assert outcome.code == 0, outcome.err
    assert [line.split()[0] for line in outcome.out.splitlines()[1:]] == ["gemma2-2b", "gemma2-9b", "gemma2-27b"]


def test_models_shows_one_whole(tmp_path: Path) -> None:
    outcome = trimaran_here(tmp_path, "models", "llama3.1-8b")
    assert outcome.code == 0, outcome.err
    assert outcome.out == section_of_preset("llama3.1-8b")
    assert "# llama3.1-8b: 8,030,261,248 parameters" in outcome.out


def test_models_names_the_nearest(tmp_path: Path) -> None:
    outcome = trimaran_here(tmp_path, "models", "falcn-40b")
    assert outcome.code == 2
    assert outcome.last_line == "error: unknown preset 'falcn-40b'; did you mean falcon-40b?"


def test_what_is_shown_is_a_model_section_of_the_same_shape() -> None:
    rest = {
        "optimizer": {"lr": 1e-3},
        "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "seq_len": 8},
    }
    for name in CATALOG:
        shown = yaml.safe_load(section_of_preset(name))
        spec = parse_spec({**shown, "data": {"tokenizer_vocab_size": 258}, **rest})
        assert spec.transformer == preset(name), name


@pytest.mark.parametrize(
    ("count", "text"),
    [(950, "950"), (124_439_808, "124M"), (999_600_000, "1.00B"), (6_738_415_616, "6.74B"), (41_303_293_952, "41.3B"),
     (1_008_038_707_200, "1.01T")],
)  # fmt: skip
def test_counts_have_three_digits(count: int, text: str) -> None:
    assert short_count(count) == text


def test_coordinate_check_prints_slopes_and_draws(tmp_path: Path) -> None:  # docs/initialization.md draws a .png
    make_workplace(tmp_path)
    mup = ["--set", "model.init=mup", "--set", "model.mup_base_width=32", *SMALL]
    options = ["--data", "--widths", "32,64", "--steps", "2", "--picture", "sizes.svg"]
    outcome = trimaran(tmp_path, "coordinate-check", "spec.yaml", *options, *mup)
    assert outcome.code == 0, outcome.err
    assert "data\n  read      1 document in 1 file" in outcome.err
    assert outcome.out.split()[:3] == ["slope", "over", "the"]
    for words in (
        "embedding",
        "layers.0.attention",
        "logits",
        "mup: after 2 steps the slope farthest from 0 is",
        "normal: after 2 steps",
    ):
        assert words in outcome.out
    assert "<svg" in (tmp_path / "sizes.svg").read_text()
    assert not (tmp_path / "run").exists()


def test_coordinate_check_compares_rates(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    changes = ["model.init=mup", "model.mup_base_width=32", "train.num_steps=3", "data.held_out_fraction=0.1"]
    mup = [*SMALL, *(word for change in changes for word in ("--set", change))]
    options = ["--widths", "32,64", "--rates", "1e-3,3e-3,1e18", "--picture", "rates.svg"]
    outcome = trimaran(tmp_path, "coordinate-check", "spec.yaml", *options, *mup)
    assert outcome.code == 0, outcome.err
    for words in ("init mup", "init normal", "mup: the best rate is ", "normal: the best rate is ", "width 64"):
        assert words in outcome.out, outcome.out
    assert outcome.err.count("held-out loss") == 2 * 2 * 3
    assert "<svg" in (tmp_path / "rates.svg").read_text()
    assert not (tmp_path / "run").exists()


def test_the_shift_of_the_best_rate_is_a_factor() -> None:
    curves = RateCurves(
        (64, 128, 256),
        (1e-3, 2e-3, 4e-3, 8e-3),
        ((3.0, 2.0, 1.0, 2.0), (3.0, 1.0, 2.0, math.inf), (1.0, 2.0, 3.0, 4.0)),
    )
    assert [curves.best(width) for width in curves.widths] == [4e-3, 2e-3, 1e-3]
    assert curves.shift == 0.25
    assert curves.edges() == [256]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rates", "1e-3,2e-3"], "--rates must be three or more numbers above 0 with commas between them"),
        (["--rates", "1e-3,2e-3,-1"], "--rates must be three or more numbers above 0"),
        (
            ["--rates", "1e-3,2e-3,4e-3", "--widths", "32,64", "--set", "data.held_out_fraction=0", "--set",
             "train.eval_interval=0"],
            "data.held_out_fraction is 0, so there is no text to compare rates on; set it to 0.02",
        ),
        (
            ["--widths", "64"],
            "--widths must be two or more whole numbers with commas between them, such as 64,128,256; got '64'",
        ),
        (["--widths", "64,wide"], "--widths must be two or more whole numbers"),
        (["--picture", "sizes.gif"], "--picture must end in .svg or .png; got sizes.gif"),
        (["--widths", "32,33", *SMALL], "no whole number; give --widths that are multiples of"),
    ],
)  # fmt: skip
def test_coordinate_check_refuses(arguments: list[str], words: str, tmp_path: Path) -> None:
    make_workplace(tmp_path)
    outcome = trimaran_here(tmp_path, "coordinate-check", "spec.yaml", *arguments)
    assert outcome.code == 2
    assert words in outcome.last_line
