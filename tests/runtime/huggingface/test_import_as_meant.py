"""Folders that other programs wrote otherwise than transformers does are read as they were meant, and that is said."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from tests.runtime.huggingface.huggingface_folders import (
    gpt2,
    llama,
    parameters_of,
    reconfigure,
    rewrite,
    saved,
    weights_of,
)
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.huggingface.importing import Limits, import_model
from trimaran.runtime.huggingface.plan import make_plan
from trimaran.runtime.huggingface.progress import Progress
from trimaran.runtime.huggingface.source import ModelFolder
from trimaran.runtime.huggingface.transformers_adapter import their_config
from trimaran.runtime.infer.prompts import RunText


def test_numbers_of_another_type_are_read_as_meant(folder: Path) -> None:
    plan = make_plan(ModelFolder.open(folder))
    meant = their_config(plan.folder.config, "LlamaForCausalLM")
    reconfigure(
        folder,
        initializer_range=0,
        attention_bias=None,
        mlp_bias=0,
        max_position_embeddings=96.0,
        num_hidden_layers=3.0,
    )
    again = make_plan(ModelFolder.open(folder))
    assert again.config == plan.config
    read = their_config(again.folder.config, "LlamaForCausalLM")
    assert {**read.to_dict(), "initializer_range": 0.2} == meant.to_dict()


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name.replace('mlp.', '_fsdp_wrapped_module.mlp.')}",
    ],
    ids=["compiled", "ddp-compiled-fsdp"],
)
def test_names_of_wrapped_modules_are_read_without_the_wrappers(
    folder: Path, tmp_path: Path, wrapped: Callable[[str], str]
) -> None:
    before, said = weights_of(folder), []
    save_file(
        {wrapped(name): tensor for name, tensor in before.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    run = import_model(folder, tmp_path / "run", Limits(memory_bytes=60_000), Progress(said.append)).run
    assert torch.equal(parameters_of(run)["head.weight"], before["lm_head.weight"])
    assert any("are read without what torch.compile, DDP or FSDP has added" in text for text in said)


@pytest.mark.parametrize("is_tied", [True, False])
def test_what_config_json_does_not_say_of_the_head_the_weights_say(tmp_path: Path, is_tied: bool) -> None:
    """LLaMA is untied by default, GPT-2 tied; each is stored as the other is, and its config.json says nothing."""
    said: list[str] = []
    model = (llama if is_tied else gpt2)(tie_word_embeddings=is_tied)
    folder = saved(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    imported = import_model(folder, tmp_path / "run", progress=Progress(said.append))
    assert imported.spec.transformer.tie_embeddings == is_tied
    assert any("config.json does not say whether" in text for text in said)


def test_experts_of_any_width_are_compared(tmp_path: Path) -> None:
    """Of transformers' implementations only the eager one takes rows that are no multiple of 16 bytes."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 54, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 32}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, initializer_range=0.2))
    assert import_model(saved(model, tmp_path / "model"), tmp_path / "run").agreements[0].holds


def test_tensors_that_are_not_read_are_told(tmp_path: Path) -> None:
    said: list[str] = []
    folder = saved(gpt2(), tmp_path / "model")
    rewrite(folder, transformer__h__0__attn__bias=torch.ones(2))
    make_plan(ModelFolder.open(folder))
    import_model(folder, tmp_path / "run", progress=Progress(said.append))
    assert "not read, because the network has no place for them: transformer.h.0.attn.bias" in said


def test_the_end_of_text_may_stand_in_config_json_alone(folder: Path, tmp_path: Path) -> None:
    inner = json.loads((folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<end>"))
    (folder / "tokenizer.json").write_text(json.dumps(inner))
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    reconfigure(folder, eos_token_id=0, bos_token_id=0)
    run = import_model(folder, tmp_path / "run").run
    assert Tokenizer.load(run / "tokenizer.json").eot_token == "<end>"
    assert RunText.open(run).stop_tokens == (0,)


def test_a_tokenizer_without_an_end_of_text_is_told_by_where_it_will_be(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    inner = json.loads((folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<end>"))
    (folder / "tokenizer.json").write_text(json.dumps(inner))
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    reconfigure(folder, eos_token_id=None)
    import_model(folder, tmp_path / "run", progress=Progress(said.append))
    (told,) = [text for text in said if "can't be used to train or to generate" in text]
    assert f"{tmp_path}/run/tokenizer.json does not say which token ends a text" in told
