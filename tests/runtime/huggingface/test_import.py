"""A Hugging Face model becomes a run bit for bit; wrong models are refused with a sentence and leave nothing behind."""

import json
import shutil
import struct
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.launchers.runs import run_code
from tests.runtime.huggingface.huggingface_folders import (
    HIDDEN,
    LAYERS,
    TEMPLATE,
    VOCAB,
    gpt2,
    llama,
    parameters_of,
    reconfigure,
    rewrite,
    saved,
    weights_of,
)
from trimaran.models.parallel.shard import cut_evenly
from trimaran.models.transformer import parameter_shapes
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.huggingface.importing import Limits, import_model, write_checkpoint
from trimaran.runtime.huggingface.plan import Plan, make_plan
from trimaran.runtime.huggingface.progress import Progress
from trimaran.runtime.huggingface.proof import (
    TOLERANCE,
    Agreement,
    Proof,
    ProofError,
    compare,
    our_logits,
    proof_inputs,
)
from trimaran.runtime.huggingface.refusals import ConversionError
from trimaran.runtime.huggingface.source import ModelFolder
from trimaran.runtime.spec import load_spec
from trimaran.runtime.train.state import read_state, spec_of


def assert_nothing_left(place: Path) -> None:
    """Neither a run nor the hidden folder that one is made in."""
    assert [path.name for path in place.iterdir() if path.name not in ("model", "model.gguf")] == []


# --- what arrives


def test_every_weight_arrives_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    imported = import_model(folder, tmp_path / "run")
    theirs, ours = weights_of(folder), parameters_of(imported.run)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == parameter_shapes(imported.spec.transformer)
    assert torch.equal(ours["embedding.weight"], theirs["model.embed_tokens.weight"])
    assert torch.equal(ours["head.weight"], theirs["lm_head.weight"])
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        assert torch.equal(ours[f"layers.{layer}.attention.q.weight"], theirs[prefix + "self_attn.q_proj.weight"])
        pair = [theirs[prefix + f"mlp.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(ours[f"layers.{layer}.mlp.up.weight"], torch.stack(pair))


def test_the_run_has_all_that_training_and_generation_read(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    imported = import_model(folder, tmp_path / "run", progress=Progress(said.append))
    run = imported.run
    assert sorted(path.name for path in run.iterdir()) == sorted(
        [
            "checkpoints",
            "chat_template.jinja",
            "generation_config.json",
            "import.json",
            "spec.yaml",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    assert (run / "chat_template.jinja").read_text() == TEMPLATE
    spec = load_spec(run / "spec.yaml")
    assert spec == imported.spec == spec_of(Checkpoint.open(run / "checkpoints" / "step-00000000"))
    assert spec.checkpoint.init_from == str(run)
    assert spec.data.tokenizer == str(run / "tokenizer.json")
    assert spec.train.output_dir != str(run)
    assert (spec.transformer.num_layers, spec.transformer.num_kv_heads, spec.transformer.vocab_size) == (
        LAYERS,
        2,
        VOCAB,
    )
    state = read_state(run / "checkpoints" / "step-00000000")
    assert (state.step, state.tokens_seen, state.consumed_samples) == (0, 0, 0)
    record = json.loads((run / "import.json").read_text())
    assert record["family"] == "llama"
    assert record["source"] == str(folder)
    assert any("27,968 parameters" in text or "parameters, stored as F32" in text for text in said)


def test_the_proof_compares_random_tokens_and_real_text(folder: Path, tmp_path: Path) -> None:
    agreements = import_model(folder, tmp_path / "run").agreements
    assert [agreement.what for agreement in agreements] == ["random tokens", "real text"]
    for agreement in agreements:
        assert agreement.tokens >= 60
        assert 0 < agreement.max_error <= TOLERANCE * agreement.scale
        assert agreement.scale > 1, "logits near zero would agree by themselves"


@pytest.mark.parametrize(
    ("dtype", "kept", "precision"),
    [
        (torch.float32, torch.float32, "float32"),
        (torch.bfloat16, torch.bfloat16, "bfloat16"),
        (torch.float16, torch.float32, "float32"),
    ],
)
def test_dtypes_are_kept_but_float16(tmp_path: Path, dtype: torch.dtype, kept: torch.dtype, precision: str) -> None:
    said: list[str] = []
    folder = saved(gpt2().to(dtype), tmp_path / "model")
    imported = import_model(folder, tmp_path / "run", progress=Progress(said.append))
    ours, theirs = parameters_of(imported.run), weights_of(folder)
    assert {tensor.dtype for tensor in ours.values()} == {kept}
    assert torch.equal(ours["embedding.weight"], theirs["transformer.wte.weight"].to(kept))
    assert imported.spec.precision.dtype == precision
    assert any("float16 is kept as float32" in text for text in said) == (dtype == torch.float16)


def test_tensors_of_different_dtypes_are_kept_in_their_own(folder: Path, tmp_path: Path) -> None:
    weights = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in weights_of(folder).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    ours = parameters_of(import_model(folder, tmp_path / "run").run)
    assert {tensor.dtype for name, tensor in ours.items() if "norm" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in ours.items() if "norm" not in name} == {torch.bfloat16}


def test_shards_with_an_index_give_the_same_checkpoint(folder: Path, tmp_path: Path) -> None:
    sharded = saved(llama(), tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    one, many = (
        parameters_of(import_model(source, tmp_path / f"run-{source.name}").run) for source in (folder, sharded)
    )
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_model_saved_without_its_head_is_imported(tmp_path: Path) -> None:
    whole = gpt2()
    folder = saved(whole.transformer, tmp_path / "model")
    assert "wte.weight" in weights_of(folder)
    ours = parameters_of(import_model(folder, tmp_path / "run").run)
    assert torch.equal(ours["embedding.weight"], whole.transformer.wte.weight)


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(tmp_path: Path) -> None:
    folder = saved(gpt2(), tmp_path / "model")
    embedding = weights_of(folder)["transformer.wte.weight"]
    rewrite(folder, lm_head__weight=embedding.clone())
    import_model(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    rewrite(folder, lm_head__weight=embedding + 1)
    with pytest.raises(ConversionError, match=r"lm_head.weight .* differ; set tie_word_embeddings to false"):
        import_model(folder, tmp_path / "run")
    assert_nothing_left(tmp_path)


def test_files_of_the_checkpoint_have_a_bounded_size_and_any_layout_reads_them(folder: Path, tmp_path: Path) -> None:
    """A tensor that is larger than a file lies in several; a shard of it is read across them."""
    plan = make_plan(ModelFolder.open(folder))
    spec = import_model(folder, tmp_path / "run").spec
    path = write_checkpoint(plan, spec, tmp_path / "checkpoints", shard_bytes=5000)
    files = sorted(path.glob("rank-*.safetensors"))
    assert len(files) > 20
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 5000 for file in files)
    checkpoint, whole = Checkpoint.open(path), weights_of(folder)["model.embed_tokens.weight"]
    for tp in (1, 2, 3, 7):
        for rank in range(tp):
            spec_, shape = cut_evenly((VOCAB, HIDDEN), "tp", 0, rank, tp)
            local = checkpoint.read("embedding.weight", "weight", spec_, shape)
            rows = spec_.real_length(shape)
            assert torch.equal(local[:rows], whole[spec_.offset : spec_.offset + rows])


def test_a_model_without_tokenizer_is_imported_and_that_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    imported = import_model(saved(gpt2(), tmp_path / "model"), tmp_path / "run", progress=Progress(said.append))
    assert not imported.has_tokenizer
    assert [agreement.what for agreement in imported.agreements] == ["random tokens"]
    assert any("has no tokenizer.json" in text for text in said)


def test_an_older_tokenizer_is_converted(tmp_path: Path) -> None:
    """GPT-2's vocab.json and merges.txt alone."""
    folder = saved(gpt2(), tmp_path / "model", tokenizer=True)
    content = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in content["merges"]))
    imported = import_model(folder, tmp_path / "run")
    assert imported.has_tokenizer
    assert json.loads((imported.run / "tokenizer.json").read_text())["model"]["vocab"] == content["vocab"]


# --- what is refused


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:20] = b"x" * 12
    file.write_bytes(bytes(content))


def claim_huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def make_pickle(folder: Path) -> None:
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def point_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model" / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(weights_of(folder), "../model/model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_shard(folder: Path) -> None:
    names = {name: f"model-0000{1 + (index % 2)}-of-00002.safetensors" for index, name in enumerate(weights_of(folder))}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def misplace_in_index(folder: Path) -> None:
    names = dict.fromkeys([*weights_of(folder), "model.extra"], "model-00001-of-00001.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def quantize_config(folder: Path) -> None:
    reconfigure(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def set_text(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


NORM = "model__layers__1__input_layernorm__weight"
BAD: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("does not exist", "config.json")),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("has no config.json",)),
    "config is no JSON": (set_text("config.json", "{"), ("config.json is not JSON",)),
    "config is no object": (set_text("config.json", "[]"), ("holds a list",)),
    "no architecture": (lambda folder: reconfigure(folder, model_type=None), ("model_type", "llama")),
    "unknown architecture": (lambda folder: reconfigure(folder, model_type="mamba"), ("mamba", "llama")),
    "unknown option": (lambda folder: reconfigure(folder, hidden_act="laplace"), ("hidden_act", "laplace")),
    "nonsense in config": (
        lambda folder: reconfigure(folder, num_hidden_layers="three"),
        ("config.json: llama: num_hidden_layers 'three' must be a number",),
    ),
    "half a layer": (
        lambda folder: reconfigure(folder, num_hidden_layers=2.5),
        ("config.json describes no network that can be built: num_hidden_layers 2.5: Input should be a valid integer",),
    ),
    "a switch in words": (
        lambda folder: reconfigure(folder, mlp_bias="false"),
        ("config.json: llama: mlp_bias 'false' must be true or false",),
    ),
    "infinity": (
        lambda folder: reconfigure(folder, model_type="gpt_neox", hidden_act="gelu", rotary_pct=float("inf")),
        ("config.json: gpt_neox: rotary_pct inf must be a finite number",),
    ),
    "a slip in the layers": (
        lambda folder: reconfigure(folder, num_hidden_layers=10**8),
        ("num_hidden_layers is 100000000", "tensors"),
    ),
    "a slip in the experts": (
        lambda folder: reconfigure(folder, model_type="mixtral", num_local_experts=10**9),
        ("num_local_experts is 1000000000", "tensors"),
    ),
    "a slip in the width": (lambda folder: reconfigure(folder, hidden_size=2 * 10**9), ("config.json", "2000000000")),
    "impossible shape": (
        lambda folder: reconfigure(folder, num_key_value_heads=3),
        ("num_attention_heads (4) must be divisible by num_key_value_heads (3)", "set num_key_value_heads to"),
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("neither model.safetensors nor",)),
    "no number": (
        lambda folder: reconfigure(folder, initializer_range="small"),
        ("config.json", "initializer_range", "'small'", "float"),
    ),
    "pickle": (make_pickle, ("pickle (pytorch_model.bin)", "can run any code", "save_pretrained")),
    "truncated": (truncate, ("model.safetensors is not a whole safetensors file", "copy it again")),
    "header damaged": (damage_header, ("not a whole safetensors file",)),
    "header too large": (claim_huge_header, ("not a whole safetensors file",)),
    "empty file": (set_text("model.safetensors", ""), ("not a whole safetensors file",)),
    "tensor missing": (
        lambda folder: rewrite(folder, **{NORM: None}),
        ("model.layers.1.input_layernorm.weight", "lack"),
    ),
    "tensor too many": (lambda folder: rewrite(folder, model__spare=torch.ones(2)), ("model.spare", "no place")),
    "wrong shape": (
        lambda folder: rewrite(folder, **{NORM: torch.ones(5)}),
        ("model.layers.1.input_layernorm.weight is [5], not [32]",),
    ),
    "integers": (lambda folder: rewrite(folder, **{NORM: torch.ones(HIDDEN, dtype=torch.int8)}), ("quantized", "(I8)")),
    "quantized": (quantize_config, ("quantized (gptq)",)),
    "index outside the folder": (
        point_outside,
        ("'../model/model-00001-of-00001.safetensors'", "in the folder itself"),
    ),
    "shard missing": (lose_a_shard, ("model-00002-of-00002.safetensors", "copy the missing shard")),
    "index names too many": (misplace_in_index, ("model.extra", "it is not")),
    "index is empty": (
        lambda folder: (
            (folder / "model.safetensors").unlink() or set_text("model.safetensors.index.json", "{}")(folder)
        ),  # type: ignore[func-returns-value]
        ("no weight_map",),
    ),
    "adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        ("adapter", "merge"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_sentence_before_anything_is_written(
    folder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, words = BAD[case]
    damage(folder)
    monkeypatch.setattr(
        "trimaran.runtime.huggingface.importing.new_folder", None
    )  # whoever calls it has not checked first
    with pytest.raises(ConversionError) as caught:
        import_model(folder, tmp_path / "run")
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n\n" not in str(caught.value)
    assert_nothing_left(tmp_path)


def test_a_tokenizer_that_links_out_of_the_folder_is_not_copied(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "model.gguf"  # a name that may stay
    secret.write_text("private")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(ConversionError, match=r"is a link to .* outside of the model's folder"):
        import_model(folder, tmp_path / "run")
    assert_nothing_left(tmp_path)


def test_a_hub_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "hub" / "snapshots" / "abc", tokenizer=True)
    (tmp_path / "hub" / "blobs").mkdir()
    for file in list(folder.iterdir()):
        file.rename(tmp_path / "hub" / "blobs" / file.name)
        file.symlink_to(tmp_path / "hub" / "blobs" / file.name)
    assert import_model(folder, tmp_path / "run").has_tokenizer


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ConversionError, match="not a GGUF file"):
        import_model(tmp_path / "model.gguf", tmp_path / "run")
    assert_nothing_left(tmp_path)


def test_a_damaged_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ConversionError, match="can't be read by transformers"):
        import_model(tmp_path / "model.gguf", tmp_path / "run")
    assert_nothing_left(tmp_path)


def test_a_run_that_is_there_is_spared(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("keep me")
    with pytest.raises(ConversionError, match="is there already"):
        import_model(folder, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_full_disk_is_told_before_it_is_full(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConversionError, match=r"0\.0 GiB left"):
        import_model(folder, tmp_path / "run")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_nothing_is_left_of_an_import_that_ends_in_the_middle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    real, reads = Plan.read, 0

    def fail(plan: Plan, unit: Any) -> dict[str, Tensor]:
        nonlocal reads
        reads += 1
        if reads == 8:
            raise error
        return real(plan, unit)

    monkeypatch.setattr(Plan, "read", fail)
    with pytest.raises(error):
        import_model(folder, tmp_path / "run", Limits(shard_bytes=4000))
    assert reads == 8
    assert_nothing_left(tmp_path)


def test_transformers_that_is_not_installed_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimaran.runtime.huggingface.transformers_adapter.find_spec", lambda name: None)
    remedy = r"transformers and accelerate.*pip install -c constraints.txt -e '.\[huggingface\]'"
    with pytest.raises(ConversionError, match=remedy):
        import_model(folder, tmp_path / "run")
    assert_nothing_left(tmp_path)


# --- the proof


def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, **{NORM: torch.full((HIDDEN,), torch.nan)})
    with pytest.raises(
        ConversionError, match=r"tensor model.layers.1.input_layernorm.weight holds infinite values or NaN"
    ):
        import_model(folder, tmp_path / "run")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("where", ["__init__", "forward"])
def test_whatever_transformers_raises_is_a_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    class Strange(Exception):
        """An error of no class that anyone would catch."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise Strange("a\n   b")

    monkeypatch.setattr(LlamaForCausalLM, where, fail)
    with pytest.raises(ConversionError, match=r"transformers can't .* so nothing can be compared: Strange: a b"):
        import_model(folder, tmp_path / "run")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    "name", ["layers.1.attention.q.weight", "layers.2.mlp.down.weight", "final_norm.weight", "head.weight"]
)
def test_one_changed_number_makes_the_import_refuse(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The proof can fail: a single element of a single weight, wrong by one, is seen in the logits."""
    real = Plan.read

    def wrong(plan: Plan, unit: Any) -> dict[str, Tensor]:
        found = real(plan, unit)
        if name in found:
            found[name] = found[name].clone()
            found[name].view(-1)[7] += 1.0
        return found

    monkeypatch.setattr(Plan, "read", wrong)
    with pytest.raises(ProofError, match=r"differ by more than 0.0001 of their scale: random tokens, .* max abs error"):
        import_model(folder, tmp_path / "run")
    assert_nothing_left(tmp_path)


def test_swapped_norms_make_the_proof_refuse(folder: Path, tmp_path: Path) -> None:
    imported = import_model(folder, tmp_path / "run")
    parameters = parameters_of(imported.run)
    names = ["layers.0.attention_norm.weight", "layers.0.mlp_norm.weight"]
    swapped = parameters | dict(zip(names, [parameters[name] for name in reversed(names)], strict=True))
    arguments = (folder, "LlamaForCausalLM", None, 2**30, tmp_path / "offload")
    Proof(imported.spec.transformer, parameters.__getitem__, *arguments).run()
    with pytest.raises(ProofError):
        Proof(imported.spec.transformer, swapped.__getitem__, *arguments).run()


def test_logits_that_are_not_numbers_never_agree() -> None:
    good, bad = torch.ones(1, 2, 3), torch.full((1, 2, 3), torch.nan)
    inputs = {"random tokens": [torch.zeros(1, 2, dtype=torch.int64)]}
    for ours, theirs in ((bad, good), (good, bad), (bad, bad)):
        (agreement,) = compare(inputs, [ours], [theirs])
        assert not agreement.holds
    assert compare(inputs, [good], [good])[0].holds
    assert not Agreement("text", 1, 1.01e-4, 1.0).holds
    assert Agreement("text", 1, 0.99e-4, 1.0).holds


def test_layer_by_layer_is_the_whole_network(folder: Path, tmp_path: Path) -> None:
    from trimaran.models.parallel.group import single
    from trimaran.models.parallel.parameter import LayerContext
    from trimaran.models.transformer import Stage

    imported = import_model(folder, tmp_path / "run")
    config, parameters = imported.spec.transformer, parameters_of(imported.run)
    context = LayerContext(single("tp"), False, torch.float32, torch.device("cpu"))
    stage = Stage(config, range(LAYERS), context, is_first=True, is_last=True, seed=0).eval()
    stage.load(lambda name, key, shard, shape: parameters[name])
    (tokens,) = proof_inputs(config, None)["random tokens"]
    with torch.no_grad():
        expected = stage.logits(stage.run_layers(None, tokens))
    (found,) = our_logits(config, parameters.__getitem__, [tokens])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_sliding_window_is_reached_by_the_random_tokens(folder: Path) -> None:
    config = make_plan(ModelFolder.open(folder)).config
    windowed = config.model_copy(update={"attention_window": 60, "max_seq_len": 500})
    (tokens,) = proof_inputs(windowed, None)["random tokens"]
    assert tokens.shape[1] > 60


# --- memory

_MEASURE = """
    import resource, sys
    from pathlib import Path
    import torch
    from trimaran.runtime.huggingface.importing import Limits, import_model

    small, large, runs = (Path(argument) for argument in sys.argv[1:])
    limits = Limits(shard_bytes=6 << 20, memory_bytes=12 << 20)
    import_model(small, runs / "small", limits)  # what importing packages and a first run take
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    imported = import_model(large, runs / "large", limits)
    print(before << 10, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""


@pytest.mark.slow
def test_importing_takes_far_less_memory_than_the_model(tmp_path: Path) -> None:
    """Weights, checkpoint and the proof stream: the peak above Python and torch is a fraction of the model."""
    shape = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "vocab_size": 2000,
        "initializer_range": 0.02,
    }
    large = saved(llama(**shape, num_hidden_layers=8), tmp_path / "large", max_shard_size="20MB")
    small = saved(llama(**shape, num_hidden_layers=2), tmp_path / "small")
    size = ModelFolder.open(large).num_bytes
    assert size > 95e6
    done = run_code(tmp_path, textwrap.dedent(_MEASURE), str(small), str(large), str(tmp_path / "runs"))
    assert done.code == 0, done.err
    before, peak = (int(number) for number in done.out.split())
    assert peak - before < 0.35 * size, (
        f"{(peak - before) / 1e6:.0f} MB above {before / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
    )
