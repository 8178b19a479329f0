"""Published laws of the loss: their optimum is the least loss of its compute, and their figures are the papers'."""

import numpy as np
import pytest

from trimaran.runtime.plan.scaling.laws import DEFAULT, LAWS, LossFormula, read_count


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("flops", [1e19, 5.76e23])
def test_no_other_size_is_better_at_the_same_compute(law: LossFormula, flops: float) -> None:
    size, tokens = law.best(flops)
    assert 6 * size * tokens == pytest.approx(flops)
    for factor in np.geomspace(0.3, 3, 9):
        assert law.loss(size * factor, tokens / factor) >= law.loss(size, tokens)
    assert law.tokens_for(size) == pytest.approx(tokens)
    assert law.parameters_for(tokens) == pytest.approx(size)
    assert law.flops_for(law.loss(size, tokens)) == pytest.approx(flops, rel=1e-6)
    assert law.waste(size, tokens) == pytest.approx(1, rel=1e-6)


def test_the_rounded_constants_give_32b_where_others_say_63b_to_67b() -> None:
    rounded = next(law for law in LAWS if "rounded" in law.name)
    assert rounded.best(5.76e23)[0] == pytest.approx(32e9, rel=0.02)
    assert rounded is not DEFAULT
    assert rounded.note
    assert 60e9 < DEFAULT.best(5.76e23)[0] < 75e9
    assert DEFAULT.best(5.76e23)[1] / DEFAULT.best(5.76e23)[0] == pytest.approx(20, rel=0.15)


def test_training_longer_or_shorter_than_best_wastes_compute() -> None:
    best = DEFAULT.tokens_for(7e9)
    waste = [DEFAULT.waste(7e9, best * factor) for factor in (0.1, 0.5, 1, 2, 10)]
    assert waste[0] > waste[1] > waste[2] < waste[3] < waste[4]


@pytest.mark.parametrize(("text", "value"), [("7b", 7e9), ("7e9", 7e9), ("1.4T", 1.4e12), ("400M", 4e8), ("12", 12)])
def test_a_count_is_read(text: str, value: float) -> None:
    assert read_count(text, "N") == value


@pytest.mark.parametrize(
    ("text", "hint"),
    [("7 GB", "size in bytes"), ("7GiB", "size in bytes"), ("many", "a count"), ("0", "a count"), ("-7b", "a count")],
)
def test_what_is_no_count_is_refused(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"^N '{text}': .*{hint}.*, such as 7b or 7e9$"):
        read_count(text, "N")
