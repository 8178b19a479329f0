"""Of a folder that is no model to import the sentence says what it is, and what to do about it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trimaran.runtime.huggingface.plan import make_plan
from trimaran.runtime.huggingface.refusals import ConversionError
from trimaran.runtime.huggingface.source import ModelFolder

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 7,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4920\n"
PAGE = '\n<!DOCTYPE html>\n<html class="">'
INDEX = "model.safetensors.index.json"
SHARD = "model-0000{}-of-00003.safetensors"
NAMES = {"weight_map": {"a": SHARD.format(1), "b": SHARD.format(2), "c": SHARD.format(3)}}

# Files (None: an empty one; a text; or what becomes JSON), and words of the sentence.
FOLDERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "adapter": (
        {"adapter_config.json": {}, "adapter_model.safetensors": None},
        ("an adapter (LoRA", "merge_and_unload"),
    ),
    "adapter with a config": ({"config.json": LLAMA, "adapter_model.safetensors": None}, ("an adapter (LoRA",)),
    "diffusers": ({"model_index.json": {}, "unet/config.json": {}}, ("is a pipeline of diffusers",)),
    "a run of ours": (
        {"checkpoints/step-00000004/manifest.json": {}},
        ("is a run of trimaran", "checkpoint.init_from"),
    ),
    "a download": (
        {"config.json": LLAMA, ".cache/huggingface/download/x.incomplete": None},
        ("a download that has not ended", "run the same download again"),
    ),
    "Meta's layout": ({"params.json": {}, "consolidated.00.pth": None}, ("consolidated weights", "convert_")),
    "DeepSpeed": ({"config.json": LLAMA, "zero_to_fp32.py": None}, ("checkpoint of DeepSpeed", "zero_to_fp32.py")),
    "torch.distributed": ({"config.json": LLAMA, "__0_0.distcp": None}, ("checkpoint of torch.distributed",)),
    "Megatron": ({"latest_checkpointed_iteration.txt": "9"}, ("checkpoint of Megatron",)),
    "GGUF alone": ({"small.gguf": None}, ("to import the GGUF file in it, give the file", "small.gguf")),
    "GGUF and config": ({"config.json": LLAMA, "small.gguf": None}, ("has no safetensors", "small.gguf")),
    "pickle": ({"config.json": LLAMA, "pytorch_model.bin": None}, ("pickle (pytorch_model.bin)", "save_pretrained")),
    "TensorFlow": ({"config.json": LLAMA, "tf_model.h5": None}, ("for TensorFlow alone (tf_model.h5)",)),
    "ONNX": ({"config.json": LLAMA, "model.onnx": None}, ("for ONNX alone (model.onnx)", "download the safetensors")),
    "another name": ({"config.json": LLAMA, "weights.safetensors": None}, ("it has weights.safetensors", "rename it")),
    "no weights": ({"config.json": LLAMA, "tokenizer.json": {}}, ("without the weights; download them",)),
    "a hub's cache": (
        {"snapshots/abc/config.json": LLAMA, "refs/main": "abc"},
        ("is no model itself", "give one of them, such as", "snapshots/abc"),
    ),
    "a trainer's output": (
        {"checkpoint-10/config.json": LLAMA, "checkpoint-20/config.json": LLAMA},
        ("its folders", "checkpoint-20"),
    ),
    "nothing": ({"notes.md": "x"}, ("has no config.json",)),
    "no index": (
        {"config.json": LLAMA, SHARD.format(1): None, SHARD.format(3): None},
        ("has 2 of 3 shards", f"lacks {INDEX}, {SHARD.format(2)}", "download what is missing"),
    ),
    "no shards": (
        {"config.json": LLAMA, INDEX: NAMES},
        (f"names {SHARD.format(1)}, {SHARD.format(2)}, {SHARD.format(3)}, which are not in", "the missing shards"),
    ),
    "pointer for the config": ({"config.json": LFS}, ("config.json is a pointer of git-lfs", "run `git lfs pull` in")),
    "pointer for the weights": ({"config.json": LLAMA, "model.safetensors": LFS}, ("model.safetensors is a pointer",)),
    "pointer for the index": ({"config.json": LLAMA, INDEX: LFS}, (f"{INDEX} is a pointer of git-lfs",)),
    "page for the weights": ({"config.json": LLAMA, "model.safetensors": PAGE}, ("is a web page", "/resolve/")),
    "bitsandbytes": ({"config.json": {**LLAMA, "quantization_config": {"load_in_4bit": True}}}, ("(bitsandbytes)",)),
    "compressed": (
        {"config.json": {**LLAMA, "compression_config": {"format": "pack-quantized"}}},
        ("quantized (pack-quantized)", "in bfloat16"),
    ),
    "MLX": ({"config.json": {**LLAMA, "quantization": {"group_size": 64, "bits": 4}}}, ("quantized (4 bits)",)),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_is_told_what_it_is_and_what_to_do(case: str, tmp_path: Path) -> None:
    files, words = FOLDERS[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
        (tmp_path / name).write_text(text)
    with pytest.raises(ConversionError) as caught:
        ModelFolder.open(tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("self_attn.q_proj.qweight", "GPTQ or AWQ"),
        ("self_attn.q_proj.weight.quant_map", "bitsandbytes"),
        ("self_attn.q_proj.SCB", "bitsandbytes"),
        ("self_attn.q_proj.weight_scale_inv", "FP8"),
        ("self_attn.q_proj.weight_packed", "compressed-tensors"),
        ("self_attn.q_proj.W_q", "HQQ"),
    ],
)
def test_quantized_weights_are_known_by_their_names_too(name: str, method: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    save_file({f"model.layers.0.{name}": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=rf"quantized \({method}, by the name of model\.layers\.0.*in bfloat16"):
        ModelFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("TokenClassification", "is a LlamaForTokenClassification, and .* only LlamaForCausalLM"),
        ("SequenceClassification", "is a LlamaForSequenceClassification of 2 labels, and only one of 1 label"),
    ],
)
def test_a_model_of_another_task_is_told(task: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "architectures": [f"LlamaFor{task}"]}))
    save_file({"score.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=told):
        make_plan(ModelFolder.open(tmp_path))


def test_an_adapter_beside_a_model_is_refused(tmp_path: Path) -> None:
    """transformers would load both, and the comparison would blame the model."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"score.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"a model and an adapter to it.* move adapter_config.json out"):
        ModelFolder.open(tmp_path)


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(ConversionError, match=r"is a link to .*gone, which is not there; download the file again"):
        ModelFolder.open(tmp_path)
