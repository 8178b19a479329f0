"""ShardSpec: what it allows, and the boxes it describes."""

import dataclasses

import pytest

from trimaran.models.parallel.shard import ShardSpec, cut_evenly, num_elements, whole


def test_an_even_cut_tiles_the_global_tensor_in_order() -> None:
    cuts = [cut_evenly((8, 6), "tp", 1, index, 3) for index in range(3)]
    assert [shape for _, shape in cuts] == [(8, 2)] * 3
    assert [spec.box(shape) for spec, shape in cuts] == [((0, 8), (0, 2)), ((0, 8), (2, 4)), ((0, 8), (4, 6))]
    assert {spec.axis for spec, _ in cuts} == {"tp"}


def test_an_uneven_cut_pads_the_last_shards_and_may_leave_one_with_padding_alone() -> None:
    cuts = [cut_evenly((5, 3), "tp", 0, index, 4) for index in range(4)]
    assert [shape for _, shape in cuts] == [(2, 3)] * 4
    assert [spec.real_length(shape) for spec, shape in cuts] == [2, 2, 1, 0]
    assert sum(spec.num_real_elements(shape) for spec, shape in cuts) == 15


def test_a_whole_tensor_is_its_own_box() -> None:
    spec = whole((4, 2))
    assert (spec.axis, spec.dim, spec.offset) == (None, None, 0)
    assert spec.box((4, 2)) == ((0, 4), (0, 2))
    assert whole(()).box(()) == ()
    assert num_elements(()) == 1


@pytest.mark.parametrize(
    ("axis", "dim", "shape", "offset", "rule"),
    [
        ("tp", None, (4,), 0, "must both be given"),
        (None, 0, (4,), 0, "must both be given"),
        (None, None, (4,), 2, r"offset \(2\) must be 0"),
        ("tp", 1, (4,), 0, r"dim \(1\) must be in \[0, 1\)"),
        ("tp", -1, (4,), 0, r"dim \(-1\) must be in"),
        ("tp", 0, (4,), -1, "must not be negative"),
    ],
)
def test_a_contradictory_spec_is_refused_with_its_values(
    axis: str | None, dim: int | None, shape: tuple[int, ...], offset: int, rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        ShardSpec(axis, dim, shape, offset)


def test_a_local_shape_may_differ_in_the_cut_dim_only() -> None:
    spec = ShardSpec("tp", 0, (8, 6), 4)
    spec.check((4, 6))
    with pytest.raises(ValueError, match="differ only in dim 0"):
        spec.check((4, 5))
    with pytest.raises(ValueError, match="must equal global_shape"):
        whole((8, 6)).check((4, 6))
    with pytest.raises(ValueError, match="differ only"):
        spec.check((4,))


def test_cut_evenly_refuses_an_index_or_dim_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"index \(3\) must be in \[0, 3\)"):
        cut_evenly((6,), "tp", 0, 3, 3)
    with pytest.raises(ValueError, match=r"dim \(1\)"):
        cut_evenly((6,), "tp", 1, 0, 3)


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole((3,)).offset = 1  # type: ignore[misc]
