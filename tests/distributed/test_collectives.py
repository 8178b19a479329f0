"""Every collective and parallel layer on 2 to 4 ranks equals one rank's result, by shared memory and by gloo."""

import errno
import os
import signal
import socket
import struct
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.ranks import RankPool
from trimaran.models.parallel import shared_memory
from trimaran.models.parallel.collectives import (
    gather_dim1,
    local_dim1,
    reduce_from_tp_region,
    reduce_scatter_dim1,
    reduce_scatter_to_sequence_region,
)
from trimaran.models.parallel.group import (
    Group,
    all_gather,
    all_gather_into,
    all_reduce,
    reduce_scatter,
    single,
    start_all_reduce,
    start_reduce_scatter_into,
)
from trimaran.models.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_linear
from trimaran.models.parallel.parameter import InitSpec, LayerContext, info_of, initialize
from trimaran.models.parallel.vocab import VocabParallelEmbedding
from trimaran.runtime.mesh import Mesh, build_mesh

CPU = torch.device("cpu")
SLOT_ELEMENTS = (1 << 20) // 4  # float32 elements in a slot of shared memory
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.int64: 0}
WAYS = pytest.mark.parametrize("shared", [True, False], ids=["shared-memory", "gloo"])
SIZES = pytest.mark.parametrize("size", [2, 3, 4])


def tp_mesh(shared: bool, timeout_s: float = 100) -> Mesh:
    """A mesh of tp ranks alone; its tp group has shared memory exactly when asked for."""
    mesh = build_mesh(pp=1, dp=1, cp=1, tp=dist.get_world_size(), timeout_s=timeout_s, shared_memory=shared)
    assert (mesh.tp.shared is not None) == shared
    return mesh


def operand(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, salt: int = 0) -> Tensor:
    """What `rank` contributes: any rank can make any other's."""
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    if dtype == torch.int64:
        return torch.randint(-(2**40), 2**40, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def sum_over(size: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, salt: int = 0) -> Tensor:
    """The sum in rank order, in the dtype itself."""
    return reduce(torch.add, (operand(rank, shape, dtype, salt) for rank in range(size)))


def assert_sum(got: Tensor, expected: Tensor, group: Group) -> None:
    """Shared memory adds in rank order, so to the bit; gloo in an order of its own."""
    tolerance = 0 if group.shared is not None else TOLERANCE[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[expected.dtype])


# ---------------------------------------------------------------- group.py


LENGTHS = {
    torch.float32: [0, 1, 1000, SLOT_ELEMENTS, 2 * SLOT_ELEMENTS + 5],
    torch.float64: [7, SLOT_ELEMENTS // 2 + 1],
    torch.bfloat16: [9, 2 * SLOT_ELEMENTS + 3],
    torch.int64: [5, SLOT_ELEMENTS + 1],
}


def check_plain_collectives(shared: bool) -> int:
    """all_reduce, all_gather and reduce_scatter of every length and dtype; returns how many were compared."""
    mesh = tp_mesh(shared)
    group, count = mesh.tp, 0
    for dtype, lengths in LENGTHS.items():
        for length in lengths:
            operands = [operand(rank, (length,), dtype) for rank in range(group.size)]
            x, total = operands[group.rank], reduce(torch.add, operands)
            reduced = x.clone()
            assert all_reduce(reduced, group) is reduced, "in place"
            assert_sum(reduced, total, group)
            assert all_gather(x, group).equal(torch.stack(operands))
            # All ranks hold the same bits, whichever way the sum was taken.
            assert all_gather(reduced, group).equal(reduced.expand(group.size, length))
            rows = torch.stack([x.roll(row) for row in range(group.size)])
            before = rows.clone()
            torch.testing.assert_close(
                reduce_scatter(rows, group), total.roll(group.rank), rtol=0, atol=TOLERANCE[dtype]
            )
            assert rows.equal(before), "the operand is left alone"
            count += 1
    mesh.close()
    return count


@WAYS
@SIZES
def test_plain_collectives_of_any_length_and_dtype(size: int, shared: bool, ranks: RankPool) -> None:
    assert ranks.run(check_plain_collectives, size, shared) == [11] * size


def check_shapes_and_strides(shared: bool) -> None:
    mesh = tp_mesh(shared)
    group, shape = mesh.tp, (mesh.tp.size, 3, 5)
    x = operand(group.rank, shape)
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    assert all_gather(strided, group).equal(torch.stack([operand(rank, shape) for rank in range(group.size)]))
    assert_close(reduce_scatter(strided, group), sum_over(group.size, shape)[group.rank])
    scalar = torch.tensor(float(group.rank))
    assert all_gather(scalar, group).tolist() == [float(rank) for rank in range(group.size)]
    assert all_reduce(scalar, group).item() == sum(range(group.size))
    assert all_gather(x[:, :0], group).shape == (group.size, group.size, 0, 5)
    mesh.close()


@WAYS
def test_collectives_take_any_shape_and_strides(shared: bool, ranks: RankPool) -> None:
    ranks.run(check_shapes_and_strides, 3, shared)


def check_aliased_buffers(shared: bool) -> None:
    """`out` may be the rank's own row, as the flat buckets of ZeRO use it."""
    mesh = tp_mesh(shared)
    group = mesh.tp
    for length in (3, SLOT_ELEMENTS + 7):
        flat = torch.zeros(group.size, length)
        flat[group.rank] = operand(group.rank, (length,), torch.float32)
        all_gather_into(flat, flat[group.rank], group)
        assert flat.equal(torch.stack([operand(rank, (length,), torch.float32) for rank in range(group.size)]))
        rows = operand(group.rank, (group.size, length), torch.float32)
        wait = start_reduce_scatter_into(rows[group.rank], rows, group)
        wait()
        assert_close(rows[group.rank], sum_over(group.size, (group.size, length), torch.float32)[group.rank])
    mesh.close()


@WAYS
@SIZES
def test_buffers_may_alias(size: int, shared: bool, ranks: RankPool) -> None:
    ranks.run(check_aliased_buffers, size, shared)


def check_overlapping_starts(shared: bool) -> None:
    """Several all_reduces under way, finished in any order, and other collectives in between."""
    mesh = tp_mesh(shared)
    group = mesh.tp
    lengths = (10, 2000, SLOT_ELEMENTS + 1, 3)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        tensors = [operand(group.rank, (length,), salt=salt) for salt, length in enumerate(lengths)]
        waits = [start_all_reduce(tensor, group) for tensor in tensors]
        gathered = all_gather(torch.tensor([group.rank]), group)
        for index in order:
            waits[index]()
        assert gathered.flatten().tolist() == list(range(group.size))
        for salt, (length, tensor) in enumerate(zip(lengths, tensors, strict=True)):
            assert_sum(tensor, sum_over(group.size, (length,), salt=salt), group)
        waits[order[0]]()  # waiting twice adds nothing
        assert_sum(tensors[order[0]], sum_over(group.size, (lengths[order[0]],), salt=order[0]), group)
    first, second = (operand(group.rank, (50, 4), salt=salt) for salt in (8, 9))
    outs = [torch.empty(200 // group.size) for _ in range(2)]
    wide = [
        t.to(torch.float32).view(-1)[: 200 // group.size * group.size].view(group.size, -1) for t in (first, second)
    ]
    waits = [start_reduce_scatter_into(out, rows, group) for out, rows in zip(outs, wide, strict=True)]
    for wait in reversed(waits):
        wait()
    for salt, out in zip((8, 9), outs, strict=True):
        rows = [operand(rank, (50, 4), salt=salt).to(torch.float32).view(-1) for rank in range(group.size)]
        expected = sum(row[: 200 // group.size * group.size].view(group.size, -1)[group.rank] for row in rows)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    mesh.close()


@WAYS
@SIZES
def test_overlapping_collectives_do_not_mix(size: int, shared: bool, ranks: RankPool) -> None:
    ranks.run(check_overlapping_starts, size, shared)


def check_many_exchanges(shared: bool) -> None:
    """Ranks that run ahead of each other by turns: a slot must not be filled while a peer still reads it."""
    mesh = tp_mesh(shared)
    group = mesh.tp
    for step in range(150):
        if step % group.size == group.rank:
            time.sleep(0.0005)
        x = torch.full((64 + step % 3,), float(step * (group.rank + 1)))
        assert all_reduce(x, group).eq(step * group.size * (group.size + 1) / 2).all(), step
        assert all_gather(torch.tensor([step, group.rank]), group).tolist() == [
            [step, rank] for rank in range(group.size)
        ]
    mesh.close()


@WAYS
def test_many_exchanges_stay_in_step(shared: bool, ranks: RankPool) -> None:
    ranks.run(check_many_exchanges, 3, shared)


def check_axes_do_not_mix(shared: bool) -> None:
    """tp 2 x dp 2: each collective stays within its own ranks."""
    mesh = build_mesh(pp=1, dp=2, cp=1, tp=2, timeout_s=100, shared_memory=shared)
    rank = mesh.rank
    assert mesh.tp.ranks == (rank // 2 * 2, rank // 2 * 2 + 1)
    assert mesh.dp.ranks == (rank % 2, rank % 2 + 2)
    x = torch.tensor([10.0**rank])
    in_tp, in_dp = x.clone(), x.clone()
    waits = [start_all_reduce(tensor, group) for tensor, group in ((in_tp, mesh.tp), (in_dp, mesh.dp))]
    for wait in waits:
        wait()
    assert in_tp.item() == sum(10.0**other for other in mesh.tp.ranks)
    assert in_dp.item() == sum(10.0**other for other in mesh.dp.ranks)
    assert all_reduce(x.clone(), mesh.world).item() == 1111.0
    mesh.close()


@WAYS
def test_axes_do_not_mix(shared: bool, ranks: RankPool) -> None:
    ranks.run(check_axes_do_not_mix, 4, shared)


def test_a_group_of_one_is_the_identity_without_a_copy() -> None:
    group, x = single("tp"), operand(0, (2, 4, 3))
    before = x.clone()
    start_all_reduce(x, group)()
    assert all_reduce(x, group) is x
    for same in (reduce_from_tp_region, reduce_scatter_to_sequence_region, gather_dim1, local_dim1):
        assert same(x, group) is x
    assert reduce_scatter_dim1(x, group) is x
    assert all_gather(x, group).equal(x.unsqueeze(0))
    assert reduce_scatter(x.unsqueeze(0), group).equal(x)
    out = torch.empty(1, 24, dtype=torch.float64)
    all_gather_into(out, x.view(-1), group)
    scattered = torch.empty(24, dtype=torch.float64)
    start_reduce_scatter_into(scattered, out, group)()
    assert scattered.equal(before.view(-1))
    assert x.equal(before)


# ---------------------------------------------------------------- collectives.py


def sequence_parts(x: Tensor, size: int) -> list[Tensor]:
    return list(x.chunk(size, dim=1))


def check_differentiable_pairs(shared: bool) -> None:
    """Forward and gradient of the pairs; the loss of the whole is the sum of the ranks' losses."""
    mesh = tp_mesh(shared)
    group, size, rank = mesh.tp, mesh.tp.size, mesh.tp.rank
    full = (2, 2 * size, 3)
    weights = [operand(other, full, salt=5) for other in range(size)]

    x = operand(rank, full).requires_grad_()
    y = reduce_from_tp_region(x * 1.0, group)
    assert_close(y, sum_over(size, full))
    (y * weights[0]).sum().backward()  # the same loss on every rank
    assert x.grad is not None
    assert_close(x.grad, weights[0])

    whole = operand(99, full)
    x = operand(rank, full).requires_grad_()
    y = reduce_scatter_to_sequence_region(x, group)
    assert_close(y, sequence_parts(sum_over(size, full), size)[rank])
    local_weights = [operand(other, (2, 2, 3), salt=6) for other in range(size)]
    (y * local_weights[rank]).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, torch.cat(local_weights, dim=1))

    assert local_dim1(whole, group).equal(sequence_parts(whole, size)[rank])
    assert gather_dim1(local_dim1(whole, group), group).equal(whole)
    assert_close(reduce_scatter_dim1(operand(rank, full), group), sequence_parts(sum_over(size, full), size)[rank])
    mesh.close()


@WAYS
@SIZES
def test_differentiable_pairs_and_their_gradients(size: int, shared: bool, ranks: RankPool) -> None:
    ranks.run(check_differentiable_pairs, size, shared)


# ---------------------------------------------------------------- linear.py and vocab.py


def made(build: Callable[[LayerContext], nn.Module], context: LayerContext) -> nn.Module:
    """The module with its initial weights, biases drawn too so that they are seen."""
    module = build(context)
    for parameter in module.parameters():
        info_of(parameter).init, info_of(parameter).std = "normal", 0.5
    initialize(module, seed=21)
    return module


def shard_of(name: str, whole: Tensor, parameter: Tensor) -> tuple[Tensor, int]:
    """(this rank's part of the whole tensor, length along the cut dim), padding left out."""
    spec = info_of(parameter).shard
    if spec.dim is None:
        return whole, -1
    length = spec.real_length(tuple(parameter.shape))
    return whole.narrow(spec.dim, min(spec.offset, whole.shape[spec.dim]), length), length


def assert_gradients(module: nn.Module, truth: nn.Module, group: Group, with_main_grad: bool) -> int:
    """Compare every gradient (in `.grad`, or in main_grad) with the truth's part; return how many."""
    expected = {name: p.grad for name, p in truth.named_parameters()}
    for name, parameter in module.named_parameters():
        info = info_of(parameter)
        got = info.main_grad if with_main_grad else parameter.grad
        whole = expected[name]
        assert got is not None, name
        assert whole is not None, name
        if with_main_grad and parameter.grad is not None:  # a bias or a norm: autograd's own accumulation
            got = parameter.grad
        if info.needs_tp_grad_reduce:
            got = all_reduce(got.clone(), group)
        part, length = shard_of(name, whole, parameter)
        dim = info.shard.dim
        if dim is not None:
            padding = got.narrow(dim, length, got.shape[dim] - length)
            assert not padding.any(), f"{name}: padding has no gradient"
            got = got.narrow(dim, 0, length)
        torch.testing.assert_close(got, part, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    return len(expected)


def give_main_grads(module: nn.Module) -> None:
    """Give every parameter a main_grad, as the optimizer does."""
    for parameter in module.parameters():
        info_of(parameter).main_grad = torch.zeros_like(parameter)


class Blocks(nn.Module):
    """Two column layers on one input (one of two parts) and a row layer: the collectives of an attention block."""

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        self.q = ColumnParallelLinear(6, 12, context, bias=True, init_spec=InitSpec(0.5))
        self.kv = ColumnParallelLinear(6, 12, context, bias=False, init_spec=InitSpec(0.5), parts=2)
        self.out = RowParallelLinear(12, 5, context, bias=True, init_spec=InitSpec(0.5))

    def forward(self, x: Tensor) -> Tensor:
        q, kv = column_linear(x, (self.q, self.kv))
        k, v = kv.chunk(2, dim=-1)
        return self.out(q.tanh() * k + v)  # type: ignore[no-any-return]


def check_linear(shared: bool, sequence_parallel: bool, with_main_grad: bool) -> int:
    mesh = tp_mesh(shared)
    group, size, rank = mesh.tp, mesh.tp.size, mesh.tp.rank
    truth = made(Blocks, LayerContext(single("tp"), False, torch.float64, CPU))
    module = made(Blocks, LayerContext(group, sequence_parallel, torch.float64, CPU))
    if with_main_grad:
        give_main_grads(module)
    whole = operand(50, (2, 12, 6)).requires_grad_()
    weight = operand(51, (2, 12, 5))
    expected = truth(whole)
    (expected * weight).sum().backward()
    assert whole.grad is not None

    local = (lambda t: t.chunk(size, dim=1)[rank]) if sequence_parallel else (lambda t: t)
    x = local(whole.detach()).clone().requires_grad_()
    y = module(x)
    assert_close(y, local(expected))
    (y * local(weight)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, local(whole.grad), rtol=0, atol=1e-11)
    count = assert_gradients(module, truth, group, with_main_grad)
    mesh.close()
    return count


@pytest.mark.parametrize("with_main_grad", [True, False], ids=["main_grad", "autograd"])
@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sequence-parallel", "replicated"])
@WAYS
@SIZES
def test_column_and_row_linear(
    size: int, shared: bool, sequence_parallel: bool, with_main_grad: bool, ranks: RankPool
) -> None:
    assert ranks.run(check_linear, size, shared, sequence_parallel, with_main_grad) == [5] * size


def check_main_grad_of_bfloat16() -> None:
    """The rows of a backward pass, and two such passes, add up in float32, beyond what bfloat16 can hold."""
    mesh = tp_mesh(True)
    layer = ColumnParallelLinear(
        4, 6, LayerContext(mesh.tp, False, torch.bfloat16, CPU), bias=False, init_spec=InitSpec(0.5)
    )
    initialize(layer, seed=1)
    main_grad = torch.zeros_like(layer.weight, dtype=torch.float32)
    info_of(layer.weight).main_grad = main_grad
    for scales in ((256.0, 1.0), (512.0,)):
        rows = torch.tensor(scales, dtype=torch.bfloat16)[:, None].expand(-1, 6 // mesh.tp.size)
        layer(torch.ones(1, len(rows), 4, dtype=torch.bfloat16)).backward(rows[None])
        assert main_grad.eq(257.0).all() or scales == (512.0,), "257 is not a bfloat16"
    assert layer.weight.grad is None
    assert main_grad.eq(769.0).all()
    mesh.close()


def test_bfloat16_gradients_add_up_in_float32(ranks: RankPool) -> None:
    ranks.run(check_main_grad_of_bfloat16, 2)


def check_embedding(shared: bool, vocab: int, sequence_parallel: bool, with_main_grad: bool) -> int:
    mesh = tp_mesh(shared)
    group, size, rank = mesh.tp, mesh.tp.size, mesh.tp.rank

    def build(context: LayerContext) -> nn.Module:
        return VocabParallelEmbedding(vocab, 6, context, init_spec=InitSpec(0.5))

    truth = made(build, LayerContext(single("tp"), False, torch.float64, CPU))
    module = made(build, LayerContext(group, sequence_parallel, torch.float64, CPU))
    if with_main_grad:
        give_main_grads(module)
    tokens = torch.randint(vocab, (3, 4 * size), generator=torch.Generator().manual_seed(1))  # every id several times
    weight = operand(51, (3, 4 * size, 6))
    plain = F.embedding(tokens, truth.weight)
    (plain * weight).sum().backward()

    local = (lambda t: t.chunk(size, dim=1)[rank]) if sequence_parallel else (lambda t: t)
    y = module(tokens)
    assert y.equal(local(plain)), "each row comes from one rank: the others add zeros"
    (y * local(weight)).sum().backward()
    count = assert_gradients(module, truth, group, with_main_grad)
    mesh.close()
    return count


@pytest.mark.parametrize(
    ("size", "vocab", "sequence_parallel", "with_main_grad"),
    [(2, 10, True, True), (2, 11, False, False), (3, 10, True, False), (4, 5, False, True), (4, 13, True, True)],
    ids=["even", "one-padded-row", "two-padded-rows", "a-rank-of-padding", "three-padded-rows"],
)
@WAYS
def test_embedding(
    size: int, vocab: int, sequence_parallel: bool, with_main_grad: bool, shared: bool, ranks: RankPool
) -> None:
    assert ranks.run(check_embedding, size, shared, vocab, sequence_parallel, with_main_grad) == [1] * size


# ---------------------------------------------------------------- faults


TIMEOUT_S = 1.0


def exchange_with_a_stopped_peer() -> tuple[str, float]:
    """Rank 1 is stopped by a signal in the middle of a run; return what rank 0 says and after how long."""
    mesh = tp_mesh(True, timeout_s=200)  # of the making of the groups too, where many may want the same cores
    pids = all_gather(torch.tensor([os.getpid()]), mesh.tp).flatten().tolist()
    if mesh.tp.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)  # until rank 0 has seen enough
        mesh.close()
        return "", 0.0
    assert mesh.tp.shared is not None
    peer = mesh.tp.shared._sockets[1]
    assert peer is not None
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(TIMEOUT_S), 0))
    start = time.monotonic()
    try:
        all_reduce(torch.ones(5), mesh.tp)
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    finally:
        os.kill(pids[1], signal.SIGCONT)
        mesh.close()
    raise AssertionError("the exchange came to an end without rank 1")


def test_a_stopped_peer_is_named_within_the_time_out(ranks: RankPool) -> None:
    message, seconds = ranks.run(exchange_with_a_stopped_peer, 2)[0]
    assert message.startswith("rank 0 (tp 0) waits for rank 1 (tp 1) in a shared-memory exchange of 5 torch.float32")
    assert message.endswith("no answer within the time-out")
    assert TIMEOUT_S <= seconds < 100


def exchange_with_a_rank_that_left() -> str:
    mesh = tp_mesh(True, timeout_s=200)
    if mesh.tp.rank == 1:
        mesh.close()
        return ""
    try:
        for _ in range(2):  # the first wake may still find the peer's end open
            all_gather(torch.ones(5, dtype=torch.int64), mesh.tp)
    except RuntimeError as error:
        return str(error)
    finally:
        mesh.close()
    raise AssertionError("the exchange came to an end without rank 1")


def test_a_peer_that_closed_its_end_is_named_at_once(ranks: RankPool) -> None:
    start = time.monotonic()
    message = ranks.run(exchange_with_a_rank_that_left, 2)[0]
    assert message.startswith(("rank 0 (tp 0) waits for rank 1 (tp 1)", "rank 0 (tp 0) lost rank 1 (tp 1)"))
    assert time.monotonic() - start < 150


def exchange_with_a_killed_peer() -> tuple[str, float]:
    """A child that holds rank 1's ends of the sockets is killed while the others wait; return what they say and when.

    The kernel closes a killed process's sockets: what the peers see is what they see when the rank itself is killed,
    but for the pool, which would end the survivors before they can tell.
    """
    mesh = tp_mesh(True, timeout_s=100)
    all_reduce(torch.ones(3), mesh.tp)
    if mesh.tp.rank == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; the child only waits
            child = os.fork()
        if child == 0:
            signal.pause()
        mesh.close()
        time.sleep(0.3)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "", 0.0
    start = time.monotonic()
    try:
        all_reduce(torch.ones(3), mesh.tp)
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    finally:
        mesh.close()
    raise AssertionError("the exchange came to an end without rank 1")


def test_a_killed_peer_is_named_at_once_by_every_survivor(ranks: RankPool) -> None:
    results = ranks.run(exchange_with_a_killed_peer, 3)
    for survivor in (0, 2):
        message, seconds = results[survivor]
        assert message.startswith(
            f"rank {survivor} (tp {survivor}) waits for rank 1 (tp 1) in a shared-memory exchange of 3 torch.float32"
        )
        assert "that rank is gone" in message or "reset" in message
        assert seconds < 90, "not the time-out of 100 s"


def late_to_open(timeout_s: float) -> str:
    """Rank 1 agrees to shared memory and then never connects."""
    if dist.get_rank() == 1:
        with mock.patch.object(shared_memory, "_connect_pairs", side_effect=KeyError("stuck")), pytest.raises(KeyError):
            tp_mesh(True, timeout_s=200)
        return ""
    connect = shared_memory._connect_pairs

    def in_time(*arguments: Any) -> Any:
        return connect(*arguments[:-1], timeout_s)

    with mock.patch.object(shared_memory, "_connect_pairs", in_time), pytest.raises(RuntimeError) as caught:
        tp_mesh(True, timeout_s=200)
    return str(caught.value)


def test_a_peer_that_does_not_open_shared_memory_is_named(ranks: RankPool) -> None:
    message = ranks.run(late_to_open, 2, TIMEOUT_S)[0]
    assert message == "rank 0 (tp 0) waits for rank 1 (tp 1) to open shared memory: no answer within the time-out"


# ---------------------------------------------------------------- without shared memory


def broken(where: str) -> AbstractContextManager[Any]:
    """What is wrong on the machine of this rank."""
    if where == "no /dev/shm on rank 0" and dist.get_rank() == 0:
        return mock.patch.object(shared_memory, "_FOLDER", Path("/nonexistent/shm"))
    if where == "/dev/shm of rank 0 is full" and dist.get_rank() == 0:
        return mock.patch("os.posix_fallocate", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    if where == "rank 1 is on another host" and dist.get_rank() == 1:
        return mock.patch.object(
            shared_memory, "_map_slots", side_effect=FileNotFoundError(errno.ENOENT, "No such file")
        )
    if where == "the last rank cannot map the slots" and dist.get_rank() == dist.get_world_size() - 1:
        return mock.patch("torch.from_file", side_effect=OSError(errno.ENOMEM, "Cannot allocate memory"))
    return nullcontext()


def fall_back(where: str, folder: str) -> bool:
    """Return whether the group has shared memory; whatever it has, it works, and nothing is left in the folder."""
    with mock.patch.object(shared_memory, "_FOLDER", Path(folder)), broken(where):
        mesh = build_mesh(pp=1, dp=1, cp=1, tp=dist.get_world_size(), timeout_s=100)
    x = torch.tensor([1.0 + mesh.rank])
    assert all_reduce(x, mesh.tp).item() == sum(range(1, mesh.world_size + 1))
    assert all_gather(x, mesh.tp).shape == (mesh.world_size, 1)
    dist.barrier()
    assert not list(Path(folder).iterdir()), "the slots and sockets have no name any more"
    has = mesh.tp.shared is not None
    mesh.close()
    return has


@pytest.mark.parametrize(
    "where",
    [
        "no /dev/shm on rank 0",
        "/dev/shm of rank 0 is full",
        "rank 1 is on another host",
        "the last rank cannot map the slots",
    ],
)
def test_all_ranks_fall_back_to_gloo_together(where: str, ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(fall_back, 3, where, str(tmp_path)) == [False, False, False]


def test_nothing_is_left_on_disk_while_shared_memory_is_used(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(fall_back, 3, "nothing is broken", str(tmp_path)) == [True, True, True]
