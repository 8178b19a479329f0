"""Small Hugging Face folders on disk, made by transformers with random weights, and what tests read from them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.data.tokens.tokenizer import Tokenizer

VOCAB, HIDDEN, LAYERS = 300, 32, 3
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def llama(**options: Any) -> PreTrainedModel:
    """A LLaMA whose every parameter differs from what a fresh model has."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.2}
    return _made(LlamaForCausalLM, LlamaConfig(**{**sizes, **options}))


def gpt2(**options: Any) -> PreTrainedModel:
    """A GPT-2, tied and with biases."""
    sizes = {
        "vocab_size": VOCAB,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 80,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return _made(GPT2LMHeadModel, GPT2Config(**{**sizes, "initializer_range": 0.2, **options}))


def _made(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        model = model_class(config)
        for parameter in model.parameters():  # norms start as ones and biases as zeros: a swap of two would not show
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def saved(model: PreTrainedModel, folder: Path, *, tokenizer: bool = False, **options: Any) -> Path:
    """Save a model, with a tokenizer of VOCAB tokens and what stands beside it where asked."""
    model.save_pretrained(folder, **options)
    if tokenizer:
        tokenizer_of(VOCAB).save(folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
        )
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def tokenizer_of(vocab_size: int) -> Tokenizer:
    return Tokenizer.train(corpus().splitlines(keepends=True), vocab_size)


def corpus(num_lines: int = 2000, seed: int = 0) -> str:
    """Text with some repetition for a tokenizer to find and a model to learn."""
    draw = random.Random(seed)
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 7))) for _ in range(200)]
    return "".join(" ".join(draw.choice(words) for _ in range(10)) + "\n" for _ in range(num_lines))


def logits_of(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).logits
    return found


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Every stored tensor of a model folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Change, add or (None) take away tensors of a folder with one file; `__` stands for a dot."""
    tensors = weights_of(folder) | {
        name.replace("__", "."): tensor for name, tensor in changes.items() if tensor is not None
    }
    gone = {name.replace("__", ".") for name, tensor in changes.items() if tensor is None}
    save_file(
        {name: tensor for name, tensor in tensors.items() if name not in gone},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def parameters_of(run: Path) -> dict[str, Tensor]:
    """Every parameter of a run's newest checkpoint."""
    checkpoint = Checkpoint.open(max((run / "checkpoints").iterdir()))
    return {name: checkpoint.read_global(name, "weight") for name in checkpoint.names()}
