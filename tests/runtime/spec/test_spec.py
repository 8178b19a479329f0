"""Good run specs are accepted, bad ones say what to write instead. Files: test_spec_files; rules: test_spec_rules."""

import copy
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trimaran.models.config import TransformerConfig
from trimaran.models.presets import PRESETS
from trimaran.runtime.evaluate.datasets import SETS
from trimaran.runtime.spec import (
    ModelSection,
    RunSpec,
    SpecError,
    ZeroSection,
    check_world_size,
    describe,
    fields_at_layout,
    parse_spec,
)
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.names import known_paths, place_of
from trimaran.runtime.spec.rules import broken_rules
from trimaran.runtime.spec.tree import above, parts_of

BASE: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 12, "hidden_size": 768, "num_heads": 12},
    "optimizer": {"lr": 1e-3},
    "train": {"num_steps": 100, "global_batch_size": 32, "micro_batch_size": 4, "seq_len": 128},
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """Return BASE with `section.field: value` changes; a value of ... removes the field."""
    raw: dict[str, Any] = copy.deepcopy(BASE)
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        target = raw.setdefault(section, {}) if section else raw
        if value is ...:
            target.pop(name)
        else:
            target[name] = value
    return raw


def errors_of(changes: dict[str, Any]) -> list[str]:
    """Return the sentences about BASE with the changes."""
    with pytest.raises(SpecError) as caught:
        parse_spec(changed(changes))
    return [str(error) for error in caught.value.errors]


WEB = {"web": {"source": ["web.warc.gz"]}}
BASED: dict[str, Any] = {"checkpoint.init_from": "run", "data.source": ["answers.jsonl"]}


def adapter(**fields: Any) -> dict[str, Any]:
    """Changes for a run with adapters."""
    return BASED | {"finetune": {"adapter": fields}}


EXAMPLES = {"data.source": ["pairs.jsonl"], "data.tokenizer": "tokenizer.json"}
PREFERENCE = {**EXAMPLES, "finetune": {"method": "preference"}}
REWARD = {**EXAMPLES, "finetune": {"method": "reward"}}


def preferring(**settings: Any) -> dict[str, Any]:
    """Return the changes to BASE of a run that learns from preferences with these settings."""
    return {**EXAMPLES, "finetune": {"method": "preference", "preference": settings}}


BAD: list[tuple[dict[str, Any], str]] = [
    # adapters
    (
        {"data.source": ["answers.jsonl"], "data.tokenizer": "tokenizer.json", "finetune": {"adapter": {}}},
        (
            "checkpoint.init_from: is needed by finetune.adapter, whose frozen weights it names; set it to the folder "
            "of a trained or imported run"
        ),
    ),
    (
        adapter(targets=["attention", "q_proj"]),
        "finetune.adapter.targets[1]: 'q_proj' is no linear layer of a block of this model; did you mean attention.q?",
    ),
    (
        adapter(targets=["mpl.up"]),
        "finetune.adapter.targets[0]: 'mpl.up' is no linear layer of a block of this model; did you mean mlp.up, mlp?",
    ),
    (
        adapter() | {"model.num_experts": 4},
        (
            "finetune.adapter.targets[1]: 'mlp' is no linear layer of a block of this model, whose feed-forward layers "
            "are experts, which get none; did you mean attention, attention.q, attention.kv, attention.out?"
        ),
    ),
    (
        adapter(rank=300) | {"model.num_kv_heads": 4},
        (
            "finetune.adapter.rank: rank (300) is larger than the rank of attention.kv, a matrix of 256 x 768; set "
            "finetune.adapter.rank to 256 or less, or leave attention.kv out of finetune.adapter.targets"
        ),
    ),
    (
        adapter() | {"zero.backend": "deepspeed"},
        (
            "zero.backend: DeepSpeed's engine takes all parameters of the model, and with finetune.adapter most are "
            "frozen; set zero.backend to native"
        ),
    ),
    (
        adapter(base="nf4") | {"precision.dtype": "float64"},
        (
            "finetune.adapter.base: nf4 holds 16 levels times a float32 scale, which float64 adds nothing to; set "
            "precision.dtype to bfloat16 or float32, or finetune.adapter.base to full"
        ),
    ),
    (
        adapter(base="nf4") | {"model.head_dim": 20, "parallel.tp": 2},
        (
            "parallel.tp: tp (2) cuts attention.out into pieces of 120 consecutive elements, and nf4 scales 64 of them "
            "together, so pieces must be multiples of that; set parallel.tp to 1, or finetune.adapter.base to full"
        ),
    ),
    # preferences and rewards
    (
        REWARD,
        (
            "model.score_head: a reward model scores answers, so it has a score head in place of the projection to the "
            "vocabulary; set it to only"
        ),
    ),
    (
        {**PREFERENCE, "model.score_head": "only"},
        (
            "model.score_head: a model with a score head alone writes no text, so it learns by finetune.method reward "
            "alone; set it to none, or finetune.method to reward"
        ),
    ),
    (
        {**PREFERENCE, "model.score_head": "beside"},
        (
            "model.score_head: a value head (beside) learns from rewards, which needs finetune.method rl with "
            "algorithm ppo; set model.score_head to none"
        ),
    ),
    (
        {**EXAMPLES, "finetune": {"method": "sft", "centering": 0.01}},
        (
            "finetune.centering: centers the scores of method reward, and finetune.method is sft; set it to 0, or the "
            "method to reward"
        ),
    ),
    (
        preferring(loss="ipo", label_smoothing=0.1),
        (
            "finetune.preference.label_smoothing: smooths the labels of dpo, and the loss is ipo; set it to 0, or the "
            "loss to dpo"
        ),
    ),
    (
        preferring(undesirable_weight=1.5),
        (
            "finetune.preference.undesirable_weight: weighs good or bad answers, which kto learns from, and the loss "
            "is dpo; set it to 1, or the loss to kto"
        ),
    ),
    (
        {**preferring(loss="orpo", reference="runs/sft"), "checkpoint.init_from": "runs/sft"},
        ("finetune.preference.reference: orpo compares the answers without a reference; take it out"),
    ),
    (
        preferring(loss="orpo", sft_weight=0.5),
        (
            "finetune.preference.sft_weight: orpo has the cross entropy of the chosen answers already, with weight 1; "
            "set it to 0"
        ),
    ),
    (
        preferring(reference="runs/sft"),
        (
            "finetune.preference.reference: is another model than the one that the run starts from, and "
            "checkpoint.init_from names none; set checkpoint.init_from to the run to start from, or reference to null"
        ),
    ),
    # evaluation
    (
        {"model.objective": "masked_lm", "evaluation": {"tasks": ["piqa"]}},
        (
            "evaluation: a model of objective masked_lm gives a text no likelihood, which tasks are evaluated by; "
            "leave the section evaluation out, or set model.objective to causal_lm"
        ),
    ),
    # tensor parallelism
    (
        {"parallel.tp": 8},
        "parallel.tp: num_heads (12) must be divisible by tp (8); set parallel.tp to 1, 2, 3, 4, 6 or 12",
    ),
    (
        {"parallel.tp": 4, "model.num_kv_heads": 6},
        (
            "parallel.tp: num_kv_heads (6) must be divisible by tp (4), or tp by num_kv_heads; "
            "set parallel.tp to 1, 2, 3, 6 or 12, or parallel.uneven_heads to true"
        ),
    ),
    (
        {"data.end_of_text": "</s>"},
        (
            "data.end_of_text: end_of_text (</s>) is for data.tokenizer, which is null; a tokenizer that is trained "
            "has its own; set data.tokenizer to a tokenizer.json, or this to null"
        ),
    ),
    (
        {"parallel.tp": 2, "model.ffn_hidden_size": 2049},
        "parallel.tp: ffn_hidden_size (2049) must be divisible by tp (2); set parallel.tp to 1 or 3",
    ),
    (
        {"parallel.tp": 4, "model.vocab_size": 3, "data.tokenizer": "tokenizer.json"},
        (
            "model.vocab_size: vocab_size (3) must be at least tp (4), or a tp rank would hold padding only; "
            "set model.vocab_size to 4 or more"
        ),
    ),
    (
        {"parallel.tp": 4, "parallel.sequence_parallel": True, "train.seq_len": 126},
        (
            "train.seq_len: seq_len (126) must be divisible by tp (4) with sequence_parallel; "
            "set train.seq_len to 124 or 128, or parallel.sequence_parallel to false"
        ),
    ),
    # the model
    (
        {"model.num_kv_heads": 5},
        (
            "model.num_kv_heads: num_heads (12) must be divisible by num_kv_heads (5); "
            "set num_kv_heads to 1, 2, 3, 4, 6 or 12"
        ),
    ),
    (
        {"model.hidden_size": 770},
        (
            "model.hidden_size: hidden_size (770) must be divisible by num_heads (12) when head_dim is not given; "
            "set hidden_size to 768 or 780, or num_heads to 5, 7, 10, 11, 14 or 22, or give head_dim"
        ),
    ),
    (
        {"model.num_heads": 256},
        (
            "model.head_dim: head_dim (3) must be even, because rotary positions turn pairs of numbers; "
            "set head_dim to 2 or 4, or position to learned"
        ),
    ),
    (
        {"model.preset": "gpt2-124m", "train.seq_len": 2048},
        (
            "train.seq_len: seq_len (2048) must be at most max_seq_len (1024) with learned positions; "
            "set train.seq_len to 1024 or less, or model.max_seq_len to 2048 or more"
        ),
    ),
    (
        {"model.vocab_size": 2048},
        (
            "model.vocab_size: vocab_size (2048) must be at least data.tokenizer_vocab_size (4096); "
            "set model.vocab_size to 4096 or more, or data.tokenizer_vocab_size to 2048 or less"
        ),
    ),
    ({"model.preset": "llama-7"}, "model.preset: unknown preset 'llama-7'; did you mean llama-7b?"),
    (
        {"model.num_heads": ...},
        (
            "model: needs num_layers, hidden_size and num_heads, or a preset; missing: num_heads; "
            f"set model.num_heads, or model.preset to one of {len(PRESETS)} shapes such as llama-tiny"
        ),
    ),
    (
        {"model.hidden_dropout": 1.0},
        "model.hidden_dropout: must be below 1, got 1.0; set model.hidden_dropout to a number below 1",
    ),
    ({"model.num_layers": 0}, "model.num_layers: must be at least 1, got 0; set model.num_layers to 1 or more"),
    (
        {"model.num_layers": 3_000_000_000},
        "model.num_layers: must be at most 2147483647, got 3000000000; set model.num_layers to 2147483647 or less",
    ),
    # the objective
    (
        {"data.mask_fraction": 0.2},
        (
            "data.mask_fraction: mask_fraction (0.2) says something only where tokens are hidden, got objective "
            "causal_lm; "
            "set model.objective to masked_lm or permutation_lm, or data.mask_fraction to null"
        ),
    ),
    (
        {"model.objective": "masked_lm", "data.tokenizer_vocab_size": 257},
        (
            "data.tokenizer_vocab_size: tokenizer_vocab_size (257) must be at least 258, for masked_lm needs a "
            "mask token too; "
            "set data.tokenizer_vocab_size to 258 or more"
        ),
    ),
    (
        {"model.objective": "masked_lm", "data.mask_fraction": 1.0},
        (
            "data.mask_fraction: the 128 tokens that are predicted must be fewer than the 128 of a sequence; "
            "lower data.mask_fraction, or raise train.seq_len"
        ),
    ),
    (
        {"model.objective": "permutation_lm"},
        (
            "model.objective: objective permutation_lm and position relative need each other, got permutation_lm "
            "and rotary; "
            "set both of them, or neither"
        ),
    ),
    (
        {"model.objective": "permutation_lm", "model.position": "relative", "model.num_kv_heads": 4},
        "model.num_kv_heads: relative positions need as many key-value heads (4) as heads (12); set num_kv_heads to 12",
    ),
    (
        {"model.objective": "permutation_lm", "model.position": "relative", "model.attention_window": 8},
        "model.attention_window: relative positions do not go with attention_window (8); leave out attention_window",
    ),
    (
        {
            "model.objective": "permutation_lm",
            "model.position": "relative",
            "parallel.tp": 2,
            "parallel.sequence_parallel": True,
        },
        (
            "data.mask_fraction: the 21 tokens of a sequence that are predicted must be divisible by tp (2) with "
            "sequence_parallel; "
            "set data.mask_fraction so that it is 20 or 22 of 128, or parallel.sequence_parallel to false"
        ),
    ),
    (
        {"model.position": "rotery"},
        "model.position: must be learned, rotary, alibi, relative or none, got 'rotery'; did you mean rotary?",
    ),
    # pipeline
    (
        {"parallel.pp": 16},
        (
            "parallel.pp: num_layers (12) must be at least pp (16) * virtual_stages (1) = 16 stages, one layer a "
            "stage; "
            "set model.num_layers to 16 or more, or parallel.pp to 12 or less"
        ),
    ),
    (
        {"parallel.pp": 4, "parallel.virtual_stages": 4, "parallel.schedule": "interleaved_1f1b"},
        (
            "parallel.pp: num_layers (12) must be at least pp (4) * virtual_stages (4) = 16 stages, one layer a stage; "
            "set model.num_layers to 16 or more, or parallel.pp to 3 or less, or parallel.virtual_stages to 3 or less"
        ),
    ),
    (
        {"parallel.pp": 2, "parallel.layers_per_stage": [4, 4, 4]},
        (
            "parallel.layers_per_stage: layers_per_stage must have pp (2) * virtual_stages (1) = 2 entries, got 3; "
            "write 2 numbers, or null to balance them by cost"
        ),
    ),
    (
        {"parallel.pp": 2, "parallel.layers_per_stage": [5, 5]},
        (
            "parallel.layers_per_stage: layers_per_stage must add up to num_layers (12), got 5 + 5 = 10; "
            "add 2, or write null to balance them by cost"
        ),
    ),
    (
        {"parallel.pp": 2, "parallel.layers_per_stage": [12, 0]},
        "parallel.layers_per_stage[1]: must be at least 1, got 0; set parallel.layers_per_stage[1] to 1 or more",
    ),
    (
        {"parallel.pp": 2, "parallel.virtual_stages": 2},
        (
            "parallel.schedule: schedule 1f1b needs virtual_stages 1, got 2; "
            "set parallel.virtual_stages to 1, or parallel.schedule to interleaved_1f1b, zbv or dualpipev"
        ),
    ),
    (
        {"train.recompute": True},
        (
            "train.recompute: must be none, selective, full, or a whole number k from 1 on, for every k-th block, "
            "got true; write one of these"
        ),
    ),
    (
        {"train.global_batch_size": 2**23},
        (
            "train.global_batch_size: num_microbatches (2,097,152) * 1 stages must be at most 1,048,576; "
            "set train.global_batch_size to 4194304 or less"
        ),
    ),
    (
        {"parallel.pp": 2, "parallel.schedule": "zbv"},
        (
            "parallel.schedule: schedule zbv needs virtual_stages 2, got 1; set parallel.virtual_stages to 2, or "
            "parallel.schedule to gpipe, 1f1b, interleaved_1f1b, zb_h1 or zb_h2"
        ),
    ),
    (
        {"parallel.pp": 6, "parallel.virtual_stages": 2, "parallel.schedule": "dualpipev"},
        (
            "train.global_batch_size: num_microbatches (8) = global_batch_size (32) / (micro_batch_size (4) * dp "
            "(1)) must be at least 12 = 2 * pp (6) with schedule dualpipev; set train.global_batch_size to 48 or more"
        ),
    ),
    (
        {"parallel.pp": 3, "parallel.virtual_stages": 2, "parallel.schedule": "interleaved_1f1b"},
        (
            "train.global_batch_size: num_microbatches (8) = global_batch_size (32) / (micro_batch_size (4) * dp "
            "(1)) must be divisible by pp (3) "
            "with virtual_stages above 1; set train.global_batch_size to 24 or 36"
        ),
    ),
    (
        {"parallel.schedule": "1F1B"},
        (
            "parallel.schedule: must be gpipe, 1f1b, interleaved_1f1b, zb_h1, zb_h2, zbv or dualpipev, got '1F1B'; "
            "did you mean 1f1b?"
        ),
    ),
    # batch
    (
        {"train.global_batch_size": 30, "parallel.dp": 2},
        (
            "train.global_batch_size: global_batch_size (30) must be micro_batch_size (4) * num_microbatches * "
            "dp (2), a multiple of 4 * 2 = 8; "
            "set train.global_batch_size to 24 or 32"
        ),
    ),
    (
        {"train.global_batch_size": 2},
        (
            "train.global_batch_size: global_batch_size (2) must be micro_batch_size (4) * num_microbatches * dp "
            "(1), a multiple of 4 * 1 = 4; "
            "set train.global_batch_size to 4"
        ),
    ),
    (
        {"train.micro_batch_size": True},
        "train.micro_batch_size: must be a whole number, got true; set train.micro_batch_size to a whole number",
    ),
    ({"train.seq_len": 100.5}, "train.seq_len: must be a whole number, got 100.5; set train.seq_len to 100 or 101"),
    ({"train.num_steps": "100"}, "train.num_steps: must be a whole number, got '100'; write it without quotes"),
    # not built yet
    ({"parallel.cp": 2}, "parallel.cp: context parallelism is not built yet, got 2; set parallel.cp to 1"),
    # experts
    ({"parallel.ep": 4}, "parallel.ep: ep (4) shares experts, and model.num_experts is 0; set parallel.ep to 1"),
    (
        {"parallel.ep": 4, "parallel.dp": 2, "model.num_experts": 8},
        "parallel.ep: ep (4) must divide dp (2), for the ep ranks are data-parallel ranks; set parallel.ep to 1 or 2",
    ),
    (
        {"parallel.ep": 8, "parallel.dp": 8, "parallel.tp": 2, "model.num_experts": 8},
        (
            "parallel.ep: num_experts (8) must be divisible by ep (8) * tp (2), for each of these ranks holds "
            "some of them whole; "
            "set parallel.ep to 1, 2 or 4"
        ),
    ),
    (
        {"model.num_experts": 4, "model.experts_per_token": 5},
        (
            "model.experts_per_token: experts_per_token (5) must be at most num_experts (4); "
            "set experts_per_token to 4 or less"
        ),
    ),
    (
        {"model.num_experts": 4, "model.block": "parallel"},
        (
            "model.block: experts need a block of kind sequential, got parallel; "
            "set block to sequential, or num_experts to 0"
        ),
    ),
    (
        {"model.num_experts": 4, "model.mlp_bias": True},
        "model.mlp_bias: experts have no bias, and mlp_bias is true; set mlp_bias to false, or num_experts to 0",
    ),
    (
        {"model.router_aux_loss": 0.01},
        (
            "model.router_aux_loss: router_aux_loss (0.01) needs experts, and num_experts is 0; "
            "set num_experts to 2 or more, or router_aux_loss to 0"
        ),
    ),
    ({"zero.stage": 4}, "zero.stage: must be at most 3, got 4; set zero.stage to 3 or less"),
    (
        {"zero.backend": "deepsped"},
        "zero.backend: must be native or deepspeed, got 'deepsped'; did you mean deepspeed?",
    ),
    (
        {"zero.offload": "cpu"},
        (
            "zero.offload: offload cpu is DeepSpeed's alone, and zero.backend is native; "
            "set zero.offload to none, or zero.backend to deepspeed"
        ),
    ),
    (
        {"zero.backend": "deepspeed", "zero.stage": 0},
        (
            "zero.stage: backend deepspeed has stages 1 to 3: with 0 nothing is shared out, which the native backend "
            "does; set zero.stage to 1, 2 or 3, or zero.backend to native"
        ),
    ),
    (
        {"zero.backend": "deepspeed", "zero.stage": 3, "parallel.pp": 2},
        (
            "zero.stage: DeepSpeed's stage 3 deadlocks in a pipeline, and pp is 2; "
            "set zero.stage to 1 or 2, parallel.pp to 1, or zero.backend to native"
        ),
    ),
    (
        {"zero.backend": "deepspeed", "zero.shard_size": 1},
        (
            "zero.shard_size: with backend deepspeed all dp ranks share out the state, got 1; "
            "set zero.shard_size to null, or zero.backend to native"
        ),
    ),
    (
        {"zero.backend": "deepspeed", "parallel.dp": 2, "parallel.ep": 2, "model.num_experts": 4},
        (
            "parallel.ep: with zero.backend deepspeed every dp rank must hold all experts (ep 1), got 2; "
            "set parallel.ep to 1, or zero.backend to native"
        ),
    ),
    (
        {"zero.backend": "deepspeed", "parallel.pp": 2, "parallel.schedule": "zb_h1"},
        (
            "parallel.schedule: schedule zb_h1 computes weight gradients apart from the backward pass, where DeepSpeed "
            "takes them; set parallel.schedule to gpipe, 1f1b or interleaved_1f1b, or zero.backend to native"
        ),
    ),
    (
        {"zero.backend": "deepspeed", "precision.dtype": "float64"},
        (
            "precision.dtype: DeepSpeed keeps weights and optimizer state in float32, so float64 would be lost; "
            "set precision.dtype to float32 or bfloat16, or zero.backend to native"
        ),
    ),
    (
        {"launcher.kind": "ray"},
        "launcher.kind: must be local, slurm or mpi, got 'ray'; set launcher.kind to local, slurm or mpi",
    ),
    (
        {"launcher.nodes": 3},
        (
            "launcher.nodes: nodes (3) must divide the number of ranks (1 = tp * pp * dp * cp), for every node gets "
            "equally many; set launcher.nodes to 1"
        ),
    ),
    (
        {"launcher.nodes": 1, "launcher.rendezvous": "n1"},
        "launcher.rendezvous: must be HOST:PORT, got 'n1'; write one such as n1:29400",
    ),
    (
        {"launcher.rendezvous": "$(id):1"},
        "launcher.rendezvous: must be HOST:PORT, got '$(id):1'; write one such as n1:29400",
    ),
    (
        {"slurm.partition": "gpu; rm"},
        "slurm.partition: must be one word as sbatch takes it, without spaces, quotes and dollar signs, got 'gpu; rm'",
    ),
    (
        {"slurm.time": "tomorrow"},
        "slurm.time: must be a time limit such as 90 (minutes), 12:00:00 or 2-00:00:00, got 'tomorrow'",
    ),
    ({"slurm.memory": "64 G"}, "slurm.memory: must be an amount of memory such as 64G, got '64 G'"),
    (
        {"slurm.options": ["nightly"]},
        "slurm.options[0]: must be an option of sbatch such as --comment=nightly, got 'nightly'",
    ),
    (
        {"train.output_dir": "runs/../../elsewhere"},
        "train.output_dir: must not climb by .., got 'runs/../../elsewhere'; write the folder out in full",
    ),
    # optimizer and learning rate
    ({"optimizer.lr": ...}, "optimizer.lr: is required; write lr under optimizer: peak learning rate"),
    ({"optimizer.lr": 0}, "optimizer.lr: must be above 0, got 0; set optimizer.lr to a number above 0"),
    (
        {"optimizer.lr": float("nan")},
        "optimizer.lr: must be a finite number, got nan; set optimizer.lr to a finite number",
    ),
    (
        {"optimizer.betas": [0.9, 1.0]},
        "optimizer.betas[1]: must be below 1, got 1.0; set optimizer.betas[1] to a number below 1",
    ),
    *(
        (
            {"optimizer.betas": wrong},
            f"optimizer.betas: must be a list of 2 items, got {wrong}; write it as [0.9, 0.95]",
        )
        for wrong in (0.9, [0.9], [0.9, 0.95, 0.99])
    ),
    (
        {"slurm.preflight_min_free_gib": -1},
        (
            "slurm.preflight_min_free_gib: must be at least 0, got -1; "
            "set slurm.preflight_min_free_gib to a number at least 0, such as 1.0"
        ),
    ),
    ({"optimizer.name": "adam"}, "optimizer.name: must be adamw, got 'adam'; did you mean adamw?"),
    (
        {"lr_schedule.warmup_steps": 100},
        (
            "lr_schedule.warmup_steps: warmup_steps (100) must be smaller than num_steps (100); "
            "set lr_schedule.warmup_steps to 99 or less, or train.num_steps to 101 or more"
        ),
    ),
    (
        {"train.num_steps": 1, "lr_schedule.warmup_steps": 1, "lr_schedule.name": "constant"},
        (
            "lr_schedule.warmup_steps: warmup_steps (1) must be smaller than num_steps (1); "
            "set lr_schedule.warmup_steps to 0, or train.num_steps to 2 or more"
        ),
    ),
    (
        {"lr_schedule.warmup_steps": 50, "lr_schedule.decay_steps": 40},
        (
            "lr_schedule.decay_steps: decay_steps (40) must be larger than warmup_steps (50), which it includes; "
            "set lr_schedule.decay_steps to 51 or more, or null for train.num_steps"
        ),
    ),
    (
        {"lr_schedule.name": "step"},
        (
            "lr_schedule.step_interval: is required by the step schedule; "
            "set it to the steps between two drops, such as a third of train.num_steps"
        ),
    ),
    (
        {"lr_schedule.name": "exponential"},
        (
            "lr_schedule.decay_rate: is required by the exponential schedule; "
            "set it to the factor of every step, such as 0.999"
        ),
    ),
    (
        {"lr_schedule.name": "wsd", "lr_schedule.warmup_steps": 60, "lr_schedule.wsd_decay_fraction": 0.5},
        (
            "lr_schedule.wsd_decay_fraction: warmup_steps (60) and the decay of wsd_decay_fraction (0.5) * 100 = "
            "50 steps must fit into 100 steps; "
            "set lr_schedule.wsd_decay_fraction to 0.4 or less, or lr_schedule.warmup_steps to 50 or less"
        ),
    ),
    (
        {"lr_schedule.name": "cos"},
        "lr_schedule.name: must be constant, cosine, linear, step, exponential or wsd, got 'cos'; did you mean cosine?",
    ),
    # the rest
    (
        {"precision.dtype": "fp16"},
        "precision.dtype: must be float32, bfloat16 or float64, got 'fp16'; did you mean bfloat16?",
    ),
    (
        {"train.output_dir": ""},
        "train.output_dir: must name a file or folder, got an empty text; write a path such as runs/first",
    ),
    (
        {"train.output_dir": "~/runs"},
        (
            "train.output_dir: must be a path as it is, because ~ is not expanded, got '~/runs'; "
            "write the home folder out in full"
        ),
    ),
    (
        {"train.output_dir": "./"},
        "train.output_dir: must be a folder of its own, got './'; write a path such as runs/first",
    ),
    ({"train.output_dir": 3}, 'train.output_dir: must be text, got 3; write it in quotes: "3"'),
    (
        {"train.eval_interval": 10, "data.held_out_fraction": 0.0},
        (
            "train.eval_interval: eval_interval (10) needs held-out text, but held_out_fraction is 0; "
            "set data.held_out_fraction to 0.02, or train.eval_interval to 0"
        ),
    ),
    (
        {"data.source": "my.txt"},
        "data.source: must be a list with at least one item, got 'my.txt'; write it as [my.txt]",
    ),
    (
        {"data.text_field": "a\ud800"},
        r"data.text_field: has half a surrogate pair, which is no character, got 'a\ud800'; write the character itself",
    ),
    ({"data.source": []}, "data.source: must be a list with at least one item, got []; write it as [item, item]"),
    (
        {"data.tokenizer_vocab_size": 200},
        "data.tokenizer_vocab_size: must be at least 257, got 200; set data.tokenizer_vocab_size to 257 or more",
    ),
    # corpora and stages
    (
        {"data.corpora": WEB, "data.source": ["my.txt"]},
        (
            "data.source: source and corpora exclude each other, and both are given; give the source a name: write it "
            "as data.corpora.NAME.source and take data.source out"
        ),
    ),
    (
        {"data.corpora": WEB, "data.text_field": "body"},
        (
            "data.text_field: text_field (body) is that of data.source, and every corpus has one of its own; write it "
            "as text_field of the corpora that need it, and take data.text_field out"
        ),
    ),
    (
        {"data.stages": [{"tokens": 0, "weights": {"web": 1}}]},
        (
            "data.stages: stages change the weights of corpora, and data.corpora has none; "
            "name the corpora in data.corpora, or set this to null"
        ),
    ),
    (
        {"data.corpora": WEB, "data.stages": [{"tokens": 0, "weights": {"web": 1, "wbe": 1}}]},
        "data.stages[0].weights.wbe: wbe is no corpus; did you mean web?",
    ),
    (
        {"data.corpora": WEB, "data.stages": [{"tokens": 0, "weights": {"web": 1, "code": 1}}]},
        "data.stages[0].weights.code: code is no corpus; write one of data.corpora: web",
    ),
    (
        {"data.corpora": WEB, "data.stages": [{"tokens": 5, "weights": {"web": 1}}]},
        ("data.stages[0].tokens: the first stage must begin at 0 tokens, got 5; set it to 0, or put a stage before it"),
    ),
    (
        {"data.decontaminate": {"against": [{"file": "sets", "set": "gsm8"}]}},
        "data.decontaminate.against[0].set: gsm8 is no set that is known by name; did you mean gsm8k?",
    ),
    (
        {"data.decontaminate": {"against": [{"file": "sets", "set": "gsm8k", "fields": ["question"]}]}},
        (
            "data.decontaminate.against[0].fields: the fields of gsm8k are known; take the fields out: file is then "
            "the folder that has the set's files"
        ),
    ),
    (
        {"data.decontaminate": {"against": [{"file": "sets/a.jsonl"}]}},
        (
            "data.decontaminate.against[0].fields: a file needs the fields that make an item; name its fields, such as "
            f"[question, answer], or name a known set ({', '.join(SETS)}) in set"
        ),
    ),
    (
        {"data.corpora": WEB, "data.stages": [{"tokens": each, "weights": {"web": 1}} for each in (0, 9, 8)]},
        (
            "data.stages[2].tokens: tokens (8) must be above those of the stage before (9); "
            "put the stages in order, or set it to 10 or more"
        ),
    ),
    *(
        ({"data.corpora": WEB, "data.stages": [{"tokens": 0, "weights": weights}]}, f"data.stages[0].weights{words}")
        for weights, words in (
            ({"web": 0}, ": must have a weight above 0, and all are 0; give one corpus 1"),
            ({}, ": must have a weight above 0, and all are 0; give one corpus 1"),
            ([1], ": must be a mapping of names, got [1]; write names below it, indented, each with its value"),
            ({"web": -1}, ".web: must be at least 0, got -1; set data.stages[0].weights.web to a number at least 0"),
            (
                {"web": float("nan")},
                ".web: must be a finite number, got nan; set data.stages[0].weights.web to a finite number",
            ),
        )
    ),
    *(
        ({"data.corpora": {"web": {"source": ["a"], **corpus}}}, f"data.corpora.web{words}")
        for corpus, words in (
            ({"wieght": 2}, ".wieght: unknown field; did you mean data.corpora.web.weight?"),
            (
                {"zzz": 2},
                (
                    ".zzz: unknown field; "
                    "the fields of data.corpora.web are source, format, text_field, weight, max_epochs"
                ),
            ),
            (
                {"weight": 0},
                ".weight: must be above 0, got 0; set data.corpora.web.weight to a number above 0, such as 1.0",
            ),
            (
                {"max_epochs": 0},
                ".max_epochs: must be above 0, got 0; set data.corpora.web.max_epochs to a number above 0",
            ),
            (
                {"format": "jsonll"},
                (
                    ".format: must be warc, wet, html, txt, lines, jsonl, json, csv, tsv, parquet, arrow or megatron, "
                    "got 'jsonll'; did you mean jsonl?"
                ),
            ),
            ({"source": "a.txt"}, ".source: must be a list with at least one item, got 'a.txt'; write it as [a.txt]"),
        )
    ),
    *(
        ({"data.corpora": {name: {"source": ["a"]}}}, f"data.corpora.{name}: {words}")
        for name, words in (
            (
                "my texts",
                (
                    "a name must be a plain word of at most 100 letters, digits, - and _, got 'my texts'; "
                    "write one such as web-2024"
                ),
            ),
            (2024, 'must be text, got 2024; write it in quotes: "2024"'),
        )
    ),
    (
        {"data.corpora": {"web": None}},
        (
            "data.corpora.web.source: is required; write source under data.corpora.web: files, folders or globs of its "
            "text, also addresses such as s3://"
        ),
    ),
    (
        {"data.corpora": {"source": ["a"]}},
        (
            "data.corpora.source: must be a section with fields, got ['a']; "
            "write source below a name of your choice, as data.corpora.NAME.source"
        ),
    ),
    (
        {"data.corpora": ["a"]},
        (
            "data.corpora: must be a mapping of names, got ['a']; write names below it, indented, and below each its "
            "fields: source, format, text_field, weight, max_epochs"
        ),
    ),
    (
        {"data.workers": 0},
        "data.workers: must be at least 1, got 0; set data.workers to 1 or more",
    ),
    (
        {"data.worker_memory": 0},
        "data.worker_memory: must be at least 0.5, got 0; set data.worker_memory to a number at least 0.5",
    ),
    # records below a section
    (
        {"model.rotary_scaling": {"kind": "ntk", "factr": 2}},
        "model.rotary_scaling.factr: unknown field; did you mean model.rotary_scaling.factor?",
    ),
    (
        {"model.rotary_scaling": {"kind": "ntk", "factor": 0.5}},
        (
            "model.rotary_scaling.factor: must be at least 1, got 0.5; "
            "set model.rotary_scaling.factor to a number at least 1"
        ),
    ),
    (
        {"model.attention_pattern": ["ful"], "model.attention_window": 8},
        "model.attention_pattern[0]: must be full or window, got 'ful'; did you mean full?",
    ),
    (
        {"checkpoint.resume": "yes"},
        "checkpoint.resume: must be true or false, got 'yes'; set checkpoint.resume to true",
    ),
    ({"seed": -1}, "seed: must be at least 0, got -1; set seed to 0 or more"),
    (
        {"launcher": "local"},
        (
            "launcher: must be a section with fields, got 'local'; "
            "write its fields below it, indented: kind, device, threads_per_rank, "
            "timeout_s, max_restarts, nodes, rendezvous, start_timeout_s, interface"
        ),
    ),
    # unknown names
    ({"parallel.tpp": 2}, "parallel.tpp: unknown field; did you mean parallel.tp?"),
    ({"train.lr": 1e-3}, "train.lr: unknown field; did you mean optimizer.lr?"),
    ({"lr": 1e-3}, "lr: unknown field; did you mean optimizer.lr?"),
    ({"optimizer.learning_rate": 1e-3}, "optimizer.learning_rate: unknown field; did you mean optimizer.lr?"),
    ({"model.n_layers": 4}, "model.n_layers: unknown field; did you mean model.num_layers?"),
    ({"train.seed": 1}, "train.seed: unknown field; did you mean seed?"),
    ({"paralel": {"tp": 2}}, "paralel: unknown field; did you mean parallel?"),
    (
        {"zero.qqqq": 4},
        "zero.qqqq: unknown field; the fields of zero are stage, shard_size, backend, offload, bucket_size_mib",
    ),
]


def test_bad_spec_says_exactly_what_to_write_instead() -> None:
    found = [(changes, sentence, spec_or_error(changed(changes))) for changes, sentence in BAD]
    wrong = [
        f"{changes}:\n  wanted {sentence}\n  got {got}"
        for changes, sentence, got in found
        if not isinstance(got, SpecError) or [str(error) for error in got.errors] != [sentence]
    ]
    assert not wrong, "\n".join(wrong)


def test_all_errors_come_at_once_names_types_and_rules() -> None:
    errors = errors_of(
        {
            "parallel.tp": 8,
            "parallel.pp": "four",
            "train.global_batch_size": 30,
            "train.batch": 1,
            "lr_schedule.warmup_steps": 200,
            "optimizer.eps": 0,
            "zero.stage": 4,
        }
    )
    fields = [error.partition(":")[0] for error in errors]
    assert sorted(fields) == sorted(
        [
            "train.batch",
            "parallel.pp",
            "optimizer.eps",
            "zero.stage",
            "parallel.tp",
            "train.global_batch_size",
            "lr_schedule.warmup_steps",
        ]
    )


@pytest.mark.parametrize(
    ("zero", "parallel", "message"),
    [
        ({"stage": 1, "shard_size": 2}, {"dp": 4}, None),
        ({"stage": 3, "shard_size": 4}, {"dp": 4, "ep": 2}, None),
        ({"stage": 2, "shard_size": 2}, {"dp": 8, "ep": 4}, None),
        ({"shard_size": 3}, {"dp": 4}, "shard_size (3) must divide dp (4); set zero.shard_size to 1, 2, 4 or null"),
        (
            {"stage": 0, "shard_size": 2},
            {"dp": 2},
            (
                "shard_size (2) is for stages that share something out, and zero.stage is 0; "
                "set zero.shard_size to null, or zero.stage to 1 or more"
            ),
        ),
        (
            {"shard_size": 3},
            {"dp": 12, "ep": 2},
            (
                "one of shard_size (3) and ep (2) must divide the other, for both group consecutive dp ranks; "
                "set zero.shard_size to 1, 2, 4, 6, 12 or null"
            ),
        ),
    ],
)
def test_shares_of_the_state_fit_the_ranks(zero: dict[str, int], parallel: dict[str, int], message: str | None) -> None:
    raw = copy.deepcopy(BASE) | {"zero": zero, "parallel": parallel}
    found = broken_rules(RunFields.model_validate(raw))
    errors = [str(error) for error in found if error.field.startswith("zero")]
    assert errors == ([] if message is None else [f"zero.shard_size: {message}"])


def test_a_run_of_several_nodes_and_shares_is_valid_at_another_layout() -> None:
    layout = {"tp": 2, "dp": 4, "layers_per_stage": [12]}
    spec = parse_spec(BASE | {"parallel": layout, "zero": {"stage": 2, "shard_size": 2}, "launcher": {"nodes": 8}})
    alone = parse_spec(fields_at_layout(spec, pp=3))
    assert (alone.world_size, alone.launcher.nodes, alone.zero) == (3, 1, ZeroSection())
    assert (alone.model, alone.optimizer, alone.data, alone.seed) == (spec.model, spec.optimizer, spec.data, spec.seed)


def test_the_size_of_a_new_tokenizer_does_not_matter_where_that_of_other_weights_is_taken() -> None:
    small = {"model.vocab_size": 300, "data.tokenizer_vocab_size": 4096}
    assert errors_of(small)
    assert parse_spec(changed({**small, "checkpoint.init_from": "runs/other"})).transformer.vocab_size == 300


def test_a_rule_that_needs_an_invalid_field_stays_silent() -> None:
    assert errors_of({"train.micro_batch_size": "three", "train.global_batch_size": 31}) == [
        "train.micro_batch_size: must be a whole number, got 'three'; set train.micro_batch_size to a whole number"
    ]


def test_a_required_field_under_a_wrong_name_is_reported_once() -> None:
    assert errors_of({"optimizer.lr": ..., "optimizer.learning_rate": 1e-3}) == [
        "optimizer.learning_rate: unknown field; did you mean optimizer.lr?"
    ]


def test_a_misspelled_section_is_checked_as_the_one_it_was_meant_to_be() -> None:
    assert errors_of({"optimizer": ..., "optimiser": {"lr": -1}}) == [
        "optimiser: unknown field; did you mean optimizer?",
        "optimizer.lr: must be above 0, got -1; set optimizer.lr to a number above 0",
    ]


def test_rules_speak_of_the_corpora_and_stages_that_are_right_beside_wrong_ones() -> None:
    corpora = {"web": {"source": ["a"], "weight": -1}, "books": 5, "a b": {"source": ["a"]}}
    stages = [
        {"tokens": 3, "weights": {"web": 1, "books": 1, "code": 1}},
        {"tokens": "x", "weights": {"web": 1}},
    ]
    found = [error.partition(": ")[0] for error in errors_of({"data.corpora": corpora, "data.stages": stages})]
    wrong = ["data.corpora.web.weight", "data.corpora.books", "data.corpora.a b", "data.stages[1].tokens"]
    assert found == [*wrong, "data.stages[0].weights.code"]


def test_corpora_are_described_with_their_shares() -> None:
    corpora = {"web": {"source": ["a"], "weight": 1e308}, "books": {"source": ["b"], "weight": 1e308}}
    stages = [{"tokens": 0, "weights": {"web": 2}}, {"tokens": 1000, "weights": {"web": 2, "books": 1}}]
    described = [
        dict(describe(parse_spec({**BASE, "data": {"corpora": corpora, **more}})))["data"]
        for more in ({}, {"stages": stages})
    ]
    assert described == [
        "web 50%, books 50% of the samples; 0.02 of it held out",
        "from 0 tokens on web 100%; from 1,000 tokens on web 66.7%, books 33.3%; 0.02 of it held out",
    ]


def test_errors_carry_field_rule_value_and_suggestion() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(changed({"parallel.tp": 8}))
    (error,) = caught.value.errors
    assert (error.field, error.value, error.line) == ("parallel.tp", 8, None)
    assert error.rule == "num_heads (12) must be divisible by tp (8)"
    assert error.suggestion == "set parallel.tp to 1, 2, 3, 4, 6 or 12"


def test_spec_error_is_a_value_error_and_survives_pickling() -> None:
    with pytest.raises(ValueError, match="1 error in the run spec:\n  seed: ") as caught:
        parse_spec(changed({"seed": -1}))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_building_a_run_spec_directly_checks_the_same_rules() -> None:
    with pytest.raises(ValidationError, match=r"num_heads \(12\) must be divisible by tp \(8\)"):
        RunSpec.model_validate(changed({"parallel.tp": 8}))


GOOD: list[dict[str, Any]] = [
    {**REWARD, "model.score_head": "only", "finetune": {"method": "reward", "centering": 0.01}},
    {**preferring(label_smoothing=0.1, reference="runs/other"), "checkpoint.init_from": "runs/sft"},
    {"parallel.sequence_parallel": True},  # nothing to cut at tp 1
    {"parallel.schedule": "interleaved_1f1b", "parallel.pp": 2},  # one virtual stage
    {"parallel.schedule": "interleaved_1f1b", "parallel.virtual_stages": 3},  # three stages on one rank
    {"parallel.pp": 2, "parallel.layers_per_stage": [7, 5]},
    {"parallel.tp": 3, "parallel.dp": 8, "train.micro_batch_size": 2},
    {"train.num_steps": 1e3, "seed": 2**63 - 1},
    {"lr_schedule.decay_steps": 1000},
    {"optimizer.max_grad_norm": 0, "model.hidden_dropout": 0},
    {"model.hidden_size": 100, "model.head_dim": 32},
    {
        "model.preset": "llama2-70b",
        "model.num_layers": ...,
        "model.hidden_size": ...,
        "model.num_heads": ...,
        "parallel.tp": 8,
    },
    {"zero.stage": 0, "precision.dtype": "float64"},
    {"logging": None, "parallel": None},
    {"data.corpora": None},
    {
        "data.corpora": {"web": {"source": ["s3://crawl/*.warc.gz"], "weight": 2}, "2024": {"source": ["b.zst"]}},
        "data.stages": [{"tokens": 0, "weights": {"web": 1}}, {"tokens": 1e9, "weights": {"web": 0, "2024": 0.5}}],
        "data.tokenizer_train_bytes": 1e10,
    },
]


def test_good_specs_are_accepted() -> None:
    found = {str(changes): spec_or_error(changed(changes)) for changes in GOOD}
    assert not {changes: str(spec) for changes, spec in found.items() if isinstance(spec, SpecError)}


def test_falcon_7b_and_its_71_heads_are_refused_at_tp_2_with_the_degrees_that_work() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec({**BASE, "model": {"preset": "falcon-7b"}, "parallel": {"tp": 2}})
    assert str(caught.value).endswith(
        "num_heads (71) must be divisible by tp (2); set parallel.tp to 1 or 71, or parallel.uneven_heads to true"
    )
    for tp in (2, 4, 8):
        spec = parse_spec({**BASE, "model": {"preset": "falcon-7b"}, "parallel": {"tp": tp, "uneven_heads": True}})
        assert spec.transformer.heads_per_rank(tp) == -(-71 // tp)
    with pytest.raises(SpecError, match=r"set parallel\.tp to 1 or 71$"):  # the last of 16 ranks would have none
        parse_spec({**BASE, "model": {"preset": "falcon-7b"}, "parallel": {"tp": 16, "uneven_heads": True}})


def test_fewer_kv_heads_than_tp_ranks_are_shared_by_whole_groups_of_ranks() -> None:
    model = {"num_layers": 2, "hidden_size": 96, "num_heads": 12, "ffn_hidden_size": 96}
    for kv_heads, tp, works in ((1, 4, True), (2, 4, True), (3, 4, False), (4, 4, True), (4, 6, False), (3, 6, True)):
        found = spec_or_error({**BASE, "model": {**model, "num_kv_heads": kv_heads}, "parallel": {"tp": tp}})
        assert isinstance(found, RunSpec) == works, (kv_heads, tp)


def test_what_follows_from_the_fields() -> None:
    spec = parse_spec(changed({"parallel.tp": 2, "parallel.pp": 3, "parallel.dp": 4, "parallel.virtual_stages": 1}))
    assert (spec.world_size, spec.num_microbatches, spec.num_stages, spec.tokens_per_step) == (24, 2, 3, 4096)


def test_model_is_resolved_from_preset_overrides_and_fallbacks() -> None:
    plain = parse_spec(BASE).transformer
    assert (plain.vocab_size, plain.max_seq_len, plain.ffn_hidden_size) == (4096, 128, 3072)
    raw = {**BASE, "model": {"preset": "gpt2-124m", "hidden_dropout": 0.1, "num_layers": 6}}
    changed_preset = parse_spec(raw).transformer
    assert (changed_preset.num_layers, changed_preset.hidden_dropout, changed_preset.vocab_size) == (6, 0.1, 50257)
    assert parse_spec({**BASE, "model": {"preset": "gpt2-124m"}}).transformer.num_parameters() == 124_439_808


def test_model_section_has_every_field_of_the_model() -> None:
    assert list(ModelSection.model_fields) == ["preset", *TransformerConfig.model_fields]


def spec_or_error(raw: dict[str, Any]) -> RunSpec | SpecError:
    try:
        return parse_spec(raw)
    except SpecError as error:
        return error


def counts_by_itself(path: str) -> bool:
    """Whether a field counts in the bound: no section, and not in a record that need not be there."""
    place, holder = place_of(path), place_of(above(path))
    assert place is not None
    assert holder is not None
    return holder.is_section and not place.is_section


def test_every_field_is_described_in_one_line_and_there_are_few() -> None:
    assert len([path for path in known_paths() if counts_by_itself(path)]) <= 165
    for path in known_paths():
        place = place_of(path)
        description = place.field.description if place and place.field else None
        assert description is not None, path
        assert description.endswith("."), path
        assert "\n" not in description, path


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["adamw", "1f1b", "gpt2-124m", "interleaved_1f1b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
PATHS = sorted(known_paths())


def put(value: Any, parts: list[str | int], item: object) -> Any:
    """Return the value with the item at these steps, where what stands on the way can hold it."""
    if not parts:
        return item
    part, *further = parts
    if isinstance(part, int):
        return [*value, put(None, further, item)] if isinstance(value, list) else [put(None, further, item)]
    value = {} if value is None else value
    return {**value, part: put(value.get(part), further, item)} if isinstance(value, dict) else value


@settings(max_examples=150)
@given(changes=st.dictionaries(st.sampled_from(PATHS) | st.text(max_size=8), JUNK | st.integers(1, 64), max_size=5))
def test_whatever_is_written_gives_a_spec_or_readable_errors(changes: dict[str, Any]) -> None:
    raw: dict[str, Any] = copy.deepcopy(BASE)
    for path, value in changes.items():
        raw = put(raw, parts_of(path) if path in PATHS else [path], value)
    result = spec_or_error(raw)
    if isinstance(result, SpecError):
        assert len(str(result).splitlines()) == 1 + len(result.errors) > 1
        assert all(line.isprintable() for line in str(result).splitlines())
    else:
        assert parse_spec(result.model_dump()) == result
        assert describe(result)


def test_experts_are_described_with_what_a_token_uses_and_who_shares_them() -> None:
    spec = parse_spec(
        changed(
            {
                "model.num_experts": 8,
                "parallel.tp": 2,
                "parallel.dp": 4,
                "parallel.ep": 2,
                "train.global_batch_size": 32,
            }
        )
    )
    rows = dict(describe(spec))
    assert "feed-forward 3072, 2 of 8 experts" in rows["model"]
    shape = spec.transformer
    assert (
        rows["parameters"]
        == f"{shape.num_parameters():,}, {shape.num_active_parameters():,} of them used by each token"
    )
    assert rows["layout"].endswith("= 8 ranks, experts shared by 2 dp ranks and 2 tp ranks")


def test_spec_cannot_be_changed() -> None:
    spec = parse_spec(BASE)
    with pytest.raises(ValidationError, match="frozen"):
        spec.parallel.tp = 2


# --- world size


def test_matching_world_size_passes() -> None:
    check_world_size(parse_spec(changed({"parallel.tp": 2, "parallel.dp": 2})), 4)
    with pytest.raises(SpecError, match="start 1 rank, or"):
        check_world_size(parse_spec(changed({})), 4)


@pytest.mark.parametrize(
    ("world_size", "sentence"),
    [
        (
            6,
            (
                "parallel.dp: tp(2) * pp(2) * dp(2) * cp(1) = 8 != WORLD_SIZE 6; start 8 ranks; "
                "with tp(2) * pp(2) * cp(1) the world size must be a multiple of 4, such as 4 or 8"
            ),
        ),
        (16, "parallel.dp: tp(2) * pp(2) * dp(2) * cp(1) = 8 != WORLD_SIZE 16; start 8 ranks, or set parallel.dp to 4"),
    ],
)
def test_wrong_world_size_names_what_fits(world_size: int, sentence: str) -> None:
    spec = parse_spec(changed({"parallel.tp": 2, "parallel.pp": 2, "parallel.dp": 2}))
    with pytest.raises(SpecError) as caught:
        check_world_size(spec, world_size)
    assert [str(error) for error in caught.value.errors] == [sentence]
