"""Over random shapes: a searched layout obeys the rules of a spec, and memory never rises with tp or ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from trimaran.runtime.files import write_text
from trimaran.runtime.pipeline.passes import add_communication, validate
from trimaran.runtime.plan.chips import chip_named
from trimaran.runtime.plan.forecast import Setting
from trimaran.runtime.plan.memory.ranks import memory_of
from trimaran.runtime.plan.memory.state import buckets_of
from trimaran.runtime.plan.search.search import Found, search
from trimaran.runtime.spec import RunSpec, SpecError, describe, load_spec, parse_spec
from trimaran.runtime.spec.loading import dump_spec
from trimaran.runtime.train.pipeline import schedule_of
from trimaran.runtime.zero.costs import describe_state

SETTING = Setting(chip_named("A100-80GB"), None, 25e9, 8, None, None, 1.1, 50_700.0, 300.0, 1e10)
BYTES_OF_AN_ELEMENT = 2 + 4 + 12


@st.composite
def contents(draw: st.DrawFn) -> dict[str, Any]:
    """A run on one rank: a shape, a length and a batch."""
    heads, head = draw(st.sampled_from([2, 3, 4, 6, 8, 16])), draw(st.sampled_from([8, 24, 64, 128]))
    experts = draw(st.sampled_from([0, 0, 0, 4, 8]))
    return {
        "model": {
            "num_layers": draw(st.integers(1, 24)),
            "hidden_size": heads * head,
            "num_heads": heads,
            "num_kv_heads": draw(st.sampled_from([each for each in range(1, heads + 1) if heads % each == 0])),
            "ffn_hidden_size": draw(st.sampled_from([64, 96, 256, 1024, 3000])),
            "vocab_size": draw(st.sampled_from([301, 1000, 32_000])),
            "tie_embeddings": draw(st.booleans()),
            "num_experts": experts,
            **({"experts_per_token": 2} if experts else {}),
        },
        "precision": {"dtype": "bfloat16"},
        "train": {
            "num_steps": 10,
            "seq_len": draw(st.sampled_from([33, 64, 512])),
            "global_batch_size": draw(st.sampled_from([1, 6, 8, 24, 64, 96])),
            "micro_batch_size": 1,
        },
        "data": {"source": ["quickstart"], "tokenizer_vocab_size": 300},
        "optimizer": {"lr": 1e-3},
    }


def searched(spec: RunSpec, gpus: int) -> tuple[Found | None, str]:
    try:
        return search(spec, SETTING, gpus=gpus, headroom=0.05, fixed={}, most=1).found[0], ""
    except ValueError as error:
        return None, str(error)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=contents(), gpus=st.integers(1, 48))
def test_a_searched_layout_passes_check(content: dict[str, Any], gpus: int, tmp_path: Path) -> None:
    """What `--write` writes is read again as `trimaran check` reads it, and its schedule's list is valid."""
    spec = parse_spec(content)
    found, refusal = searched(spec, gpus)
    if found is None:
        assert refusal.startswith((f"no layout of {gpus} GPUs is left: ", f"every layout of {gpus} GPUs breaks a"))
        return
    write_text(tmp_path / "best.yaml", dump_spec(found.spec))
    read = load_spec(tmp_path / "best.yaml", [])
    assert read == found.spec
    assert read.world_size == gpus
    assert describe(read)
    assert describe_state(read)
    validate(add_communication(schedule_of(read)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_random_run_is_laid_out_where_nothing_forbids_it(dtype: str) -> None:
    """So that the test above tests something."""
    content = {
        "model": {"num_layers": 6, "hidden_size": 64, "num_heads": 4, "ffn_hidden_size": 96, "vocab_size": 301},
        "precision": {"dtype": dtype},
        "train": {"num_steps": 10, "seq_len": 33, "global_batch_size": 24, "micro_batch_size": 1},
        "data": {"source": ["quickstart"], "tokenizer_vocab_size": 300},
        "optimizer": {"lr": 1e-3},
    }
    found, _ = searched(parse_spec(content), 12)
    assert found is not None
    assert found.spec.world_size == 12


def with_layout(content: dict[str, Any], **changes: int) -> RunSpec:
    parallel = {"tp": changes["tp"], "pp": changes["pp"], "dp": changes["dp"]}
    made = {**content, "parallel": parallel, "zero": {"stage": changes["zero"]}}
    made["train"] = {**content["train"], "global_batch_size": 8 * changes["dp"]}
    try:
        return parse_spec(made)
    except SpecError:
        assume(False)
        raise


def padding(spec: RunSpec, rank: int) -> float:
    """Bytes of what fills up buckets, a dp rank's share each, and the vocabulary's rows."""
    rows = spec.parallel.tp * spec.transformer.hidden_size * 2
    return BYTES_OF_AN_ELEMENT * (len(buckets_of(spec, rank)) * spec.parallel.dp + rows)


@settings(max_examples=40)
@given(content=contents(), tp=st.sampled_from([1, 2, 3, 4]), pp=st.sampled_from([1, 2]), zero=st.integers(0, 3))
def test_memory_never_rises_with_tp_but_for_padding(content: dict[str, Any], tp: int, pp: int, zero: int) -> None:
    one = with_layout(content, tp=tp, pp=pp, dp=2, zero=zero)
    two = with_layout(content, tp=2 * tp, pp=pp, dp=2, zero=zero)
    # Key and value heads that are fewer than the ranks are whole on each: there a rank's share of them rises.
    assume(one.transformer.cuts_kv_heads(tp) == two.transformer.cuts_kv_heads(2 * tp))
    for rank, (less, more) in enumerate(zip(memory_of(two), memory_of(one), strict=True)):
        assert sum(less.values()) <= sum(more.values()) + padding(two, rank)


@settings(max_examples=40)
@given(content=contents(), dp=st.sampled_from([1, 2, 3, 8]), pp=st.sampled_from([1, 2]), zero=st.integers(0, 2))
def test_memory_never_rises_with_zero_stage_but_for_buffers_of_two_buckets(
    content: dict[str, Any], dp: int, pp: int, zero: int
) -> None:
    """From stage 2 on two buckets of whole gradients are on their way, from 3 on two blocks of whole parameters."""
    before, after = (with_layout(content, tp=1, pp=pp, dp=dp, zero=stage) for stage in (zero, zero + 1))
    for rank, (less, more) in enumerate(zip(memory_of(after), memory_of(before), strict=True)):
        moving = less.pop("in transit") - more.pop("in transit")
        assert sum(less.values()) <= sum(more.values()) + padding(after, rank)
        lengths = sorted((each.length for each in buckets_of(after, rank)), reverse=True)
        assert moving <= 4 * (4 * sum(lengths[:2]) + 2 * sum(lengths[:2])) / (1 if dp > 1 else 1e18)


@pytest.mark.parametrize("dp", [8, 64])
def test_of_a_large_model_memory_falls_with_each_zero_stage(dp: int) -> None:
    path = Path(__file__).parents[2] / "examples" / "falcon-40b.yaml"
    held = []
    for stage in range(4):
        spec = load_spec(path, [f"zero.stage={stage}", f"parallel.dp={dp}", f"train.global_batch_size={8 * dp}"])
        held.append(max(sum(parts.values()) for parts in memory_of(spec)))
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == 4
