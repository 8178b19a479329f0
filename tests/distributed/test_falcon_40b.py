"""Falcon-40B at its reference layout: what each of its 384 ranks owns, and layers of its full width in training."""

import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import FalconConfig, FalconForCausalLM

from tests.distributed.ranks import RankPool
from trimaran.models.batch import Microbatch
from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface import family_of
from trimaran.models.huggingface.weights import resolve
from trimaran.models.presets import preset
from trimaran.models.transformer import parameter_shapes
from trimaran.runtime.checkpoint.boxes import volume
from trimaran.runtime.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    dump_manifest,
    load_manifest,
    tensor_records,
)
from trimaran.runtime.checkpoint.store import PieceRecord, stored_piece, tiling_problems
from trimaran.runtime.mesh import Sharding, build_mesh
from trimaran.runtime.optimizer.adamw import AdamWSettings
from trimaran.runtime.spec import parse_spec
from trimaran.runtime.train.train_context import build_stages_of_rank, build_train_context, evaluate, train_step
from trimaran.runtime.zero.optimizer import ShardedOptimizer

TP, PP, DP = 8, 4, 12


def optimizers_of_every_rank() -> Iterator[tuple[int, ShardedOptimizer]]:
    """Yield (rank, optimizer) of all 384 ranks, on the meta device.

    The dp ranks of one place in the network have the same stage, so it is built once for them.
    """
    spec = parse_spec(
        {
            "model": {"preset": "falcon-40b"},
            "parallel": {"tp": TP, "pp": PP, "dp": DP, "sequence_parallel": True},
            "precision": {"dtype": "bfloat16"},
            "optimizer": {"lr": 1e-4},
            "train": {"num_steps": 1, "global_batch_size": 1152, "micro_batch_size": 1, "seq_len": 2048},
        }
    )
    settings = AdamWSettings(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    bucket_bytes = int(spec.zero.bucket_size_mib * 2**20)
    for pp_rank, tp_rank in product(range(PP), range(TP)):
        dist.init_process_group("fake", rank=pp_rank * DP * TP + tp_rank, world_size=PP * DP * TP, store=FakeStore())
        try:
            mesh = build_mesh(pp=PP, dp=DP, cp=1, tp=TP, timeout_s=100)
            stages = build_stages_of_rank(spec, mesh, torch.device("meta"))
            for dp_rank, rank in enumerate(mesh.dp.ranks):
                dp = replace(mesh.dp, rank=dp_rank)
                sharding = Sharding(dp, mesh.sharding.replica)
                of_rank = replace(mesh, rank=rank, dp=dp, expert_dp=dp, sharding=sharding, expert_sharding=sharding)
                yield (
                    rank,
                    ShardedOptimizer(
                        stages, of_rank, settings, zero_stage=1, bucket_bytes=bucket_bytes, num_microbatches=1
                    ),
                )
        finally:
            dist.destroy_process_group()


def check_manifest(records: list[PieceRecord], folder: Path) -> None:
    """Write the manifest of a checkpoint that has these pieces under five keys, and read it in under a second."""
    names = sorted({record.file for record in records})
    files = tuple(FileRecord(file=name, size_bytes=2**40, sha256="0" * 64) for name in names)
    tensors = tensor_records(records, files)
    assert {piece for each in tensors for piece in each.pieces(files)} == set(records)
    five = tuple(each.model_copy(update={"key": f"key{number}"}) for number in range(5) for each in tensors)
    assert sum(len(each.file) for each in five) > 40_000
    manifest = Manifest(step=1, world_size=len(files), state={}, files=files, tensors=five)
    (folder / MANIFEST_NAME).write_text(dump_manifest(manifest))
    before = time.process_time()
    assert load_manifest(folder) == manifest
    assert time.process_time() - before < 1.0


@pytest.fixture(scope="module")
def shape() -> TransformerConfig:
    return preset("falcon-40b")


@pytest.mark.slow
def test_384_ranks_own_every_weight_exactly_once(shape: TransformerConfig, tmp_path: Path) -> None:
    records: list[PieceRecord] = []
    most_bytes = 0
    for rank, optimizer in optimizers_of_every_rank():
        stored = [
            stored_piece(each, f"rank-{rank:05d}.safetensors") for each in optimizer.pieces() if each.key == "weight"
        ]
        records += [each[0] for each in stored if each is not None]
        most_bytes = max(most_bytes, sum(optimizer.state_bytes().values()))
    assert tiling_problems(records) == []
    assert len({record.file for record in records}) == 384, "every rank owns a part"
    owned: dict[str, int] = {}
    for record in records:
        owned[record.name] = owned.get(record.name, 0) + sum(map(volume, record.boxes()))
    assert owned == {name: torch.Size(size).numel() for name, size in parameter_shapes(shape).items()}
    assert sum(owned.values()) == shape.num_parameters()
    check_manifest(records, tmp_path)
    # 12 bytes a parameter (float32 gradient, main copy, two moments, of which the last three are shared out over dp)
    # and the bfloat16 weights.
    assert most_bytes < 12 * 2**30


def test_the_published_weights_are_the_ones_that_the_ranks_own(shape: TransformerConfig) -> None:
    """transformers builds the released configuration on the meta device; its tensors and ours map one to one."""
    released = FalconConfig(
        vocab_size=65024,
        hidden_size=8192,
        num_hidden_layers=60,
        num_attention_heads=128,
        num_kv_heads=8,
        new_decoder_architecture=True,
        bias=False,
        parallel_attn=True,
        alibi=False,
    )
    with torch.device("meta"):
        theirs = FalconForCausalLM(released)
    index = {
        name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"
    }  # tied
    family = family_of(released.to_dict())
    config = TransformerConfig.model_validate(family.to_config(released.to_dict()))
    assert {**config.model_dump(), "init_std": 0.02} == {**shape.model_dump(), "init_std": 0.02}
    units = resolve(family, config)
    assert sorted(name for unit in units for name in unit.theirs) == sorted(index)
    assert sorted(name for unit in units for name in unit.ours) == sorted(parameter_shapes(config))
    for unit in units:
        assert [tuple(size) for size in unit.their_shapes(config)] == [index[name] for name in unit.theirs]
    assert sum(torch.Size(size).numel() for size in index.values()) == shape.num_parameters()


def fill_with_repeated_numbers_(tensor: torch.Tensor, *, std: float, **_: object) -> None:
    """Fill a parameter with a million random numbers again and again: drawing 340 million takes half a minute."""
    numbers = torch.randn(1_000_003, generator=torch.Generator().manual_seed(1)) * std  # a prime: no two rows are equal
    for part in tensor.view(-1).split(len(numbers)):
        part.copy_(numbers[: len(part)])


def train_one_step_at_full_width(num_layers: int) -> tuple[list[float], int]:
    """Losses before and after a step of layers with Falcon-40B's width and heads, on two tp ranks.

    Vocabulary and inner width of the MLP, whose products look alike at every size, are smaller.
    """
    smaller = {"vocab_size": 512, "ffn_hidden_size": 1024, "max_seq_len": 32}
    spec = parse_spec(
        {
            "model": {"preset": "falcon-40b", "num_layers": num_layers, **smaller},
            "data": {"tokenizer_vocab_size": 512},
            "parallel": {"tp": 2, "sequence_parallel": True},
            "optimizer": {"lr": 1e-3},
            "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "seq_len": 16},
        }
    )
    mesh = build_mesh(pp=1, dp=1, cp=1, tp=2, timeout_s=200)
    with mock.patch("trimaran.models.parallel.parameter.fill_normal_", fill_with_repeated_numbers_):
        train_context = build_train_context(spec, mesh, torch.device("cpu"))
    tokens = torch.randint(512, (1, 17), generator=torch.Generator().manual_seed(1))
    batch = Microbatch(tokens[:, :-1], tokens[:, 1:], 0)
    losses = [train_step(train_context, [batch], 1e-5).loss, evaluate(train_context, [[batch]])]
    numbers = sum(parameter.numel() for stage in train_context.stages.values() for parameter in stage.parameters())
    mesh.close()
    del train_context
    gc.collect()  # parameters, buckets and their hooks refer to each other; the process lives on for other tests
    return losses, numbers


@pytest.mark.slow
def test_a_layer_of_full_width_trains(ranks: RankPool) -> None:
    """One layer takes 3 GB, 16 bytes a parameter.

    With the published MLP one takes 11 GB and two take 21 GB: run by hand, they train as well (7.82 to 0.001).
    """
    (losses, numbers), _ = ranks.run(train_one_step_at_full_width, 2, 1, timeout_s=280.0)
    assert numbers > 155e6 / 2
    assert losses[1] < losses[0] < 9.0
