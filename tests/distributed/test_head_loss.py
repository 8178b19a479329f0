"""The head and its loss, fused with their gradients in chunks, on 1 to 4 tp ranks equal one process's cross entropy."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.distributed.parity import GPT, Layout, make_batches, make_spec
from tests.distributed.ranks import RankPool
from trimaran.kernels.cross_entropy import IGNORED_LABEL, TORCH_CROSS_ENTROPY, CrossEntropyKernels
from trimaran.models.parallel.group import all_gather, single
from trimaran.models.parallel.parameter import InitSpec, LayerContext, info_of, initialize, new_parameter
from trimaran.models.parallel.vocab import VocabParallelEmbedding, head_loss
from trimaran.models.transformer import build_stages, in_eval_mode
from trimaran.runtime.mesh import build_mesh

CPU = torch.device("cpu")
BATCH, SEQ, HIDDEN = 2, 24, 6
FACTOR = 0.37
"""The gradient of the loss, as a pipeline would seed it."""


@dataclass(frozen=True)
class Case:
    """What is compared; `options` are those of `head_loss`."""

    vocab: int
    sequence_parallel: bool = False
    with_main_grad: bool = True
    tied: bool = False
    shared: bool = True
    options: dict[str, float] = field(default_factory=dict)


def inputs(vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, weight, tokens, labels), whole."""
    generator = torch.Generator().manual_seed(vocab)
    x = torch.randn(BATCH, SEQ, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, HIDDEN, generator=generator, dtype=torch.float64)
    tokens, labels = torch.randint(vocab, (2, BATCH, SEQ), generator=generator)
    labels[:, ::5] = IGNORED_LABEL
    return x, weight, tokens, labels


def truth(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of x, gradient of the weight) in one process, by torch."""
    x, weight, tokens, labels = inputs(case.vocab)
    x.requires_grad_()
    weight.requires_grad_()
    hidden = x + F.embedding(tokens, weight) if case.tied else x
    logits = (hidden @ weight.t()).flatten(0, 1)
    smoothing, z_loss = case.options.get("label_smoothing", 0.0), case.options.get("z_loss", 0.0)
    target = labels.flatten()
    loss = F.cross_entropy(logits, target, reduction="sum", ignore_index=IGNORED_LABEL, label_smoothing=smoothing)
    loss = loss + z_loss * (logits.logsumexp(-1).square() * (target != IGNORED_LABEL)).sum()
    (loss * FACTOR).backward()
    assert x.grad is not None
    assert weight.grad is not None
    return loss.detach(), x.grad, weight.grad


def check(case: Case) -> None:
    mesh = build_mesh(pp=1, dp=1, cp=1, tp=dist.get_world_size(), timeout_s=100, shared_memory=case.shared)
    group, size, rank = mesh.tp, mesh.tp.size, mesh.tp.rank
    assert size == 1 or (group.shared is not None) == case.shared
    context = LayerContext(group, case.sequence_parallel, torch.float64, CPU)
    x, whole_weight, tokens, labels = inputs(case.vocab)
    embedding = VocabParallelEmbedding(case.vocab, HIDDEN, context, init_spec=InitSpec(0.5))
    weight, info = embedding.weight, info_of(embedding.weight)
    first, real = info.shard.offset, info.shard.real_length(tuple(weight.shape))
    with torch.no_grad():
        weight.fill_(5.0)  # what stands in padded rows must not matter
        weight[:real] = whole_weight[first : first + real]
    if case.with_main_grad:
        info.main_grad = torch.ones_like(weight)

    local = (lambda t: t.chunk(size, dim=1)[rank]) if case.sequence_parallel else (lambda t: t)
    leaf = local(x).clone().requires_grad_()
    hidden = leaf + embedding(tokens) if case.tied else leaf
    with torch.no_grad():
        evaluated = head_loss(hidden, weight, labels, context, **case.options)  # type: ignore[arg-type]
    loss = head_loss(hidden, weight, labels, context, loss_weight=FACTOR, **case.options)  # type: ignore[arg-type]
    assert loss.shape == ()
    assert evaluated.equal(loss.detach())
    assert not evaluated.requires_grad
    assert all_gather(loss.detach(), group).equal(loss.detach().expand(size)), "the same bits on every rank"
    (loss * FACTOR).backward()

    expected, expected_dx, expected_dweight = truth(case)
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=1e-10)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, local(expected_dx), rtol=0, atol=1e-10)
    if case.with_main_grad:
        assert info.main_grad is not None
        assert weight.grad is None
        dweight = info.main_grad - 1
    else:
        assert weight.grad is not None
        dweight = weight.grad
    torch.testing.assert_close(dweight[:real], expected_dweight[first : first + real], rtol=0, atol=1e-10)
    assert not dweight[real:].any(), "padded rows have no gradient"
    mesh.close()


TERMS = {"label_smoothing": 0.1, "z_loss": 1e-2}


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sequence-parallel", "replicated"])
@pytest.mark.parametrize(("size", "vocab"), [(1, 11), (2, 12), (3, 13), (4, 12), (4, 5)])
def test_equals_one_process(size: int, vocab: int, sequence_parallel: bool, ranks: RankPool) -> None:
    ranks.run(check, size, Case(vocab, sequence_parallel))


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sequence-parallel", "replicated"])
@pytest.mark.parametrize("chunk_rows", [1, 7, 16, 48, 100])
def test_any_chunk_gives_the_same(chunk_rows: int, sequence_parallel: bool, ranks: RankPool) -> None:
    ranks.run(check, 2, Case(11, sequence_parallel, options={"chunk_rows": chunk_rows}))


@pytest.mark.parametrize(("size", "vocab"), [(1, 11), (2, 12), (3, 13), (4, 5)])
def test_label_smoothing_and_z_loss(size: int, vocab: int, ranks: RankPool) -> None:
    ranks.run(check, size, Case(vocab, options=TERMS | {"chunk_rows": 20}))


@pytest.mark.parametrize(("size", "vocab"), [(1, 11), (3, 13), (4, 5)])
def test_gradients_that_autograd_collects(size: int, vocab: int, ranks: RankPool) -> None:
    ranks.run(check, size, Case(vocab, with_main_grad=False, tied=True, options={"chunk_rows": 20}))


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sequence-parallel", "replicated"])
@pytest.mark.parametrize(("size", "vocab"), [(1, 11), (2, 11), (4, 5)])
def test_a_weight_tied_to_the_embedding(size: int, vocab: int, sequence_parallel: bool, ranks: RankPool) -> None:
    ranks.run(check, size, Case(vocab, sequence_parallel, tied=True))


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sequence-parallel", "replicated"])
def test_through_gloo(sequence_parallel: bool, ranks: RankPool) -> None:
    ranks.run(check, 3, Case(13, sequence_parallel, shared=False, options={"chunk_rows": 20}))


# ---------------------------------------------------------------- one process


def lone(
    vocab: int, dtype: torch.dtype = torch.float64, main_grad: torch.dtype | None = None
) -> tuple[LayerContext, Tensor]:
    """The place of one rank and a head's weight on it."""
    context = LayerContext(single("tp"), False, dtype, CPU)
    weight = new_parameter((vocab, HIDDEN), context, dim=0, init_spec=InitSpec(0.5))
    module = torch.nn.Module()
    module.weight = weight
    initialize(module, seed=1)
    if main_grad is not None:
        info_of(weight).main_grad = torch.zeros_like(weight, dtype=main_grad)
    return context, weight


@pytest.mark.parametrize("options", [{}, TERMS], ids=["plain", "smoothing-and-z-loss"])
def test_gradcheck(options: dict[str, float]) -> None:
    context, weight = lone(7)
    x, _, _, labels = inputs(7)
    x = x[:1, :6].clone().requires_grad_()
    terms = {"chunk_rows": 4, **options}
    assert torch.autograd.gradcheck(
        lambda x, w: head_loss(x, weight_like(w, weight), labels[:1, :6], context, **terms), (x, weight)
    )  # type: ignore[arg-type]


def weight_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor` with the parameter's record: gradcheck hands over copies."""
    tensor.trimaran_info = info_of(parameter)  # type: ignore[attr-defined]
    return tensor


class Watch:
    """Kernels that note every chunk they see."""

    def __init__(self) -> None:
        self.chunks: list[tuple[int, tuple[int, ...]]] = []
        self.gradients = 0

    def statistics_(self, logits: Tensor, *args: object) -> Tensor:
        self.chunks.append((logits.data_ptr(), tuple(logits.shape)))
        return TORCH_CROSS_ENTROPY.statistics_(logits, *args)

    def gradient_(self, logits: Tensor, *args: object) -> Tensor:
        self.gradients += 1
        return TORCH_CROSS_ENTROPY.gradient_(logits, *args)


def test_no_more_logits_than_a_chunk_exist_and_evaluation_computes_no_gradient() -> None:
    context, weight = lone(11)
    x, _, _, labels = inputs(11)
    for evaluating in (True, False):
        watch = Watch()
        kernels = CrossEntropyKernels(watch.statistics_, watch.gradient_)
        with torch.set_grad_enabled(not evaluating):
            head_loss(x, weight, labels, context, kernels=kernels, chunk_rows=20, skips_rows=True)
        # On a CPU the rows without a label are left out.
        assert [shape[0] for _, shape in watch.chunks] == [20, int((labels != IGNORED_LABEL).sum()) - 20]
        assert len({pointer for pointer, _ in watch.chunks}) == 1, "one buffer"
        assert watch.gradients == (0 if evaluating else 2)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_the_gradients_that_are_wanted(frozen: str) -> None:
    context, weight = lone(11)
    x, _, _, labels = inputs(11)
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    head_loss(x, weight, labels, context).backward()
    assert (x.grad is None) == (frozen == "x")
    assert (weight.grad is None) == (frozen == "weight")


def test_no_tokens() -> None:
    context, weight = lone(11, main_grad=torch.float64)
    x = torch.zeros(0, 4, HIDDEN, dtype=torch.float64, requires_grad=True)
    loss = head_loss(x, weight, torch.zeros(0, 4, dtype=torch.int64), context)
    loss.backward()
    main_grad = info_of(weight).main_grad
    assert loss.item() == 0
    assert main_grad is not None
    assert not main_grad.any()


@pytest.mark.parametrize("chunk_rows", [48, 13])
def test_bfloat16_adds_up_in_float32(chunk_rows: int) -> None:
    context, weight = lone(11, torch.bfloat16, main_grad=torch.float32)
    x, _, _, labels = inputs(11)
    low = x.bfloat16().requires_grad_()
    factor = torch.tensor(1 / 3)  # no bfloat16: rounded to one it would be wrong by 1e-3 for all
    loss = head_loss(low, weight, labels, context, chunk_rows=chunk_rows, loss_weight=1 / 3)
    assert loss.dtype == torch.float32
    loss.backward(factor)
    main_grad = info_of(weight).main_grad
    assert low.grad is not None
    assert main_grad is not None

    wide, whole = low.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = F.cross_entropy(
        (wide @ whole.t()).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED_LABEL
    )
    expected.backward(factor.double())
    assert wide.grad is not None
    assert whole.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    for got, truth_ in ((low.grad, wide.grad), (main_grad, whole.grad)):
        assert (got.double() - truth_).norm() < 5e-3 * truth_.norm()
    scale = (low.grad.double() * wide.grad).sum() / wide.grad.square().sum()
    assert scale.item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing \(1.0\) must be in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing \(-0.1\) must be in \[0, 1\)"),
        ({"z_loss": -1e-4}, r"z_loss \(-0.0001\) must not be negative"),
        ({"chunk_rows": 0}, r"chunk_rows \(0\) must be at least 1"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, float], message: str) -> None:
    context, weight = lone(11)
    x, _, _, labels = inputs(11)
    with pytest.raises(ValueError, match=message):
        head_loss(x, weight, labels, context, **options)  # type: ignore[arg-type]


def test_held_out_losses_have_no_terms_of_training() -> None:
    """With and without smoothing and z-loss a stage that evaluates gives the same; in training it does not."""
    found = []
    for terms in ({}, TERMS):
        spec = make_spec(Layout("one", {}, {**GPT, **terms}))
        context = LayerContext(single("tp"), False, torch.float64, CPU)
        config = spec.transformer
        (stage,) = build_stages(config, [range(config.num_layers)], [0], context, seed=1)
        batch = make_batches(spec, 0, 0, 1)[0]
        with in_eval_mode([stage]):
            evaluated = stage(None, batch).item()
        found.append((evaluated, stage(None, batch).item()))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]
