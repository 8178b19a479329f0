"""On torch's fake backend, 8 to 384 ranks of NCCL's path enter every group's collectives in one order, first use too.

The ranks run one after the other in this process: set-up, a training step and an evaluation of a tiny model. What each
enters is recorded; the records must fit together.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.distributed.parity import GPT, LLAMA, make_batches
from trimaran.models.parallel.group import ALL_GATHER, REDUCE_SCATTER
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.train_context import build_train_context, evaluate, train_step


@dataclass(frozen=True)
class Entry:
    """One operation that a rank enters.

    Args:
        operation: "make" for making the group, "send" and "receive" with a peer, else torch's name of the collective.
        peer: the other rank of a transfer.
    """

    group: str
    ranks: tuple[int, ...]
    operation: str
    sizes: tuple[tuple[int, ...], ...] = ()
    dtype: torch.dtype | None = None
    peer: int | None = None


@dataclass
class Record:
    """What one rank entered: until its groups were connected, and after that."""

    set_up: list[Entry] = field(default_factory=list)
    training: list[Entry] = field(default_factory=list)


class _Spy:
    """Records the calls of torch.distributed that a rank makes, and gives it finite numbers for what would arrive."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def _note(self, operation: str, tensors: tuple[torch.Tensor, ...], group: Any, peer: int | None = None) -> None:
        ranks = tuple(dist.get_process_group_ranks(group))
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if operation == "all_to_all_single":  # the rows depend on the text
            shapes = tuple(shape[1:] for shape in shapes)
        other = None if peer is None else ranks[peer]
        self.entries.append(Entry(group.group_name, ranks, operation, shapes, tensors[0].dtype, other))

    def collective(self, name: str) -> Any:
        real = getattr(dist, name)

        def call(out: torch.Tensor, *others: Any, group: Any, **options: Any) -> Any:
            operands = (out, *[each for each in others if isinstance(each, torch.Tensor)])
            self._note(name, operands, group)
            if name == "all_to_all_single":  # as if all ranks had the same text
                out.copy_(operands[1]) if out.shape == operands[1].shape else out.zero_()
                return _DONE
            work = real(out, *others, group=group, **options)
            out.nan_to_num_(0.0, 0.0, 0.0)
            return work

        return call

    def isend(self, x: torch.Tensor, *, group: Any, group_dst: int, tag: int = 0) -> Any:
        assert tag == 0, "NCCL has no tags"
        self._note("send", (x,), group, group_dst)
        return _DONE

    def irecv(self, x: torch.Tensor, *, group: Any, group_src: int, tag: int = 0) -> Any:
        assert tag == 0, "NCCL has no tags"
        self._note("receive", (x.zero_(),), group, group_src)
        return _DONE

    def new_group(self, ranks: list[int], **options: Any) -> Any:
        group = _NEW_GROUP(ranks, **options)
        self.entries.append(Entry(group.group_name, tuple(dist.get_process_group_ranks(group)), "make"))
        return group

    @contextmanager
    def watching(self) -> Iterator[None]:
        collectives = ("all_reduce", ALL_GATHER, REDUCE_SCATTER, "all_to_all_single")
        calls = {name: self.collective(name) for name in collectives}
        calls |= {"isend": self.isend, "irecv": self.irecv, "new_group": self.new_group}
        with mock.patch.multiple(dist, **calls, batch_isend_irecv=None, broadcast=None):
            yield


_NEW_GROUP = dist.new_group
_DONE = mock.Mock(is_completed=lambda: True, wait=lambda: None)


def fill(module: torch.nn.Module, seed: int) -> None:
    """Fill the parameters in no time: the numbers do not matter."""
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 0.01)


def record(spec: RunSpec, rank: int) -> Record:
    """Run one rank: make its mesh, train one step and evaluate."""
    spy, sizes = _Spy(), spec.axis_sizes
    dist.init_process_group("fake", rank=rank, world_size=spec.world_size, store=FakeStore())
    try:
        with spy.watching(), mock.patch("trimaran.models.transformer.initialize", fill):
            tied = spec.transformer.tie_embeddings
            mesh = build_mesh(**sizes, ep=spec.parallel.ep, timeout_s=100, tied_embedding=tied)
            set_up, spy.entries = spy.entries, []
            train_context = build_train_context(spec, mesh, torch.device("cpu"))
            batches = make_batches(spec, 0, mesh.dp.rank, mesh.dp.size)
            train_step(train_context, batches, 1e-3)
            if spec.world_size < 64:
                evaluate(train_context, [batches])
    finally:
        dist.destroy_process_group()
    return Record(set_up, spy.entries)


def problems_of(records: list[Record]) -> list[str]:
    """Return what does not fit together: sentences, [] where every group's ranks agree."""
    found: list[str] = []
    for phase in ("set_up", "training"):
        entered: dict[str, dict[int, list[Entry]]] = {}
        transfers: dict[tuple[str, int, int], dict[str, list[Any]]] = {}
        for rank, each in enumerate(records):
            for entry in getattr(each, phase):
                by_rank = entered.setdefault(entry.group, {other: [] for other in entry.ranks})
                if entry.peer is None:
                    by_rank[rank].append(entry)
                    continue
                pair = (rank, entry.peer) if entry.operation == "send" else (entry.peer, rank)
                ends = transfers.setdefault((entry.group, *pair), {"send": [], "receive": []})
                ends[entry.operation].append((entry.sizes, entry.dtype))
        for group, lists in entered.items():
            first, *others = lists.values()
            if any(other != first for other in others):
                found.append(f"{phase}: group {group} of ranks {list(lists)}: {sorted(map(len, lists.values()))}")
        for (group, source, target), ends in transfers.items():
            if ends["send"] != ends["receive"]:
                found.append(f"{phase}: group {group}: what {source} sends is not what {target} receives")
    return found + stuck(records) + unconnected(records)


def stuck(records: list[Record]) -> list[str]:
    """Play the set-up with every operation holding its rank until all others of it are there; return who never ends."""
    lists, position = [each.set_up for each in records], [0] * len(records)
    arrived: Counter[Any] = Counter()
    waiting: dict[Any, list[int]] = {}
    count: list[Counter[Any]] = [Counter() for _ in records]
    awake = list(range(len(records)))
    while awake:
        rank = awake.pop()
        if position[rank] == len(lists[rank]):
            continue
        entry = lists[rank][position[rank]]
        members = entry.ranks if entry.peer is None else tuple(sorted((rank, entry.peer)))
        count[rank][entry.group, members] += 1
        turn = (entry.group, members, count[rank][entry.group, members])
        arrived[turn] += 1
        waiting.setdefault(turn, []).append(rank)
        if arrived[turn] == len(members):
            for other in waiting.pop(turn):
                position[other] += 1
                awake.append(other)
    return [f"rank {rank} stays in {lists[rank][at]}" for rank, at in enumerate(position) if at < len(lists[rank])]


def unconnected(records: list[Record]) -> list[str]:
    """Return the uses, in training, of a group or link that the set-up has not connected."""
    found = []
    for rank, each in enumerate(records):
        known = {(entry.group, entry.peer) for entry in each.set_up if entry.operation != "make"}
        found += [
            f"rank {rank} uses for the first time {entry}"
            for entry in each.training
            if (entry.group, entry.peer) not in known
        ]
    return found


TINY = {"hidden_size": 16, "num_heads": 8, "num_kv_heads": 8, "ffn_hidden_size": 16, "vocab_size": 260}
EXPERTS = LLAMA | {"num_experts": 4}
INTERLEAVED = {"virtual_stages": 2, "schedule": "interleaved_1f1b"}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {  # parallel, model, microbatches
    "8-tp2-pp2-dp2-tied": ({"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, GPT, 2),
    "8-pp8-gpipe-tied": ({"pp": 8, "schedule": "gpipe"}, GPT | {"num_layers": 8}, 3),
    "8-pp4-dp2-interleaved": ({"pp": 4, "dp": 2} | INTERLEAVED, LLAMA | {"num_layers": 8}, 4),
    "8-dp8": ({"dp": 8}, LLAMA, 1),
    "12-pp3-tp2-dp2-interleaved-tied": ({"pp": 3, "tp": 2, "dp": 2} | INTERLEAVED, GPT | {"num_layers": 6}, 3),
    "64-tp2-pp2-dp16-ep2": ({"tp": 2, "pp": 2, "dp": 16, "ep": 2} | INTERLEAVED, EXPERTS, 2),
    "384-tp8-pp4-dp12-tied": ({"tp": 8, "pp": 4, "dp": 12, "sequence_parallel": True}, GPT | TINY, 1),
}


def spec_of(name: str) -> RunSpec:
    parallel, model, num_microbatches = LAYOUTS[name]
    batch = parallel.get("dp", 1) * num_microbatches
    return parse_spec(
        {
            "model": model,
            "parallel": parallel,
            "data": {"tokenizer_vocab_size": 258},
            "optimizer": {"lr": 1e-3},
            "train": {"num_steps": 1, "global_batch_size": batch, "micro_batch_size": 1, "seq_len": 8},
        }
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_of_every_group_enter_it_in_the_same_order(name: str) -> None:
    spec = spec_of(name)
    assert str(spec.world_size) == name.split("-")[0]
    records = [record(spec, rank) for rank in range(spec.world_size)]
    assert problems_of(records) == []
    assert all(each.training for each in records)
    made = {sum(entry.operation == "make" for entry in each.set_up) for each in records}
    assert len(made) == 1, "torch numbers a rank's groups, and the numbers are in their names"
    assert made.pop() <= (8 if spec.world_size == 384 else 10)  # it was 944 of 384 ranks


def test_what_does_not_fit_together_is_found() -> None:
    spec = spec_of("8-pp4-dp2-interleaved")
    records = [record(spec, rank) for rank in range(spec.world_size)]

    def problems_with(changed: list[Entry], phase: str) -> str:
        return "; ".join(problems_of([replace(records[0], **{phase: changed}), *records[1:]]))

    training, set_up = records[0].training, records[0].set_up
    send, receive = (next(i for i, e in enumerate(training) if e.operation == kind) for kind in ("send", "receive"))
    reduce = next(i for i, entry in enumerate(training) if entry.operation == "all_reduce")
    assert "sends is not what" in problems_with([*training[:send], *training[send + 1 :]], "training")
    other_dtype = replace(training[receive], dtype=torch.float16)
    assert "sends is not what" in problems_with(
        [*training[:receive], other_dtype, *training[receive + 1 :]], "training"
    )
    other_size = replace(training[reduce], sizes=((3,),))
    assert "training: group" in problems_with([*training[:reduce], other_size, *training[reduce + 1 :]], "training")
    assert "rank 0 stays in" in problems_with(set_up[1:], "set_up")
    links = [entry for entry in set_up if entry.peer is None]
    assert "rank 0 uses for the first time" in problems_with(links, "set_up")
