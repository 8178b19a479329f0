"""PEFT's folders of adapters in and out: logits, names and ranks of several families, and what is refused."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.models.huggingface_models import SMALL_MODELS
from tests.runtime.huggingface.huggingface_folders import llama, logits_of, saved
from trimaran.models.parallel.shard import cut_evenly
from trimaran.runtime.adapters.merged import open_whole
from trimaran.runtime.adapters.peft_export import export_adapter
from trimaran.runtime.adapters.peft_import import import_adapter, is_adapter
from trimaran.runtime.checkpoint.folder import latest
from trimaran.runtime.checkpoint.manifest import CheckpointError
from trimaran.runtime.huggingface.exporting import ExportOptions, export_model
from trimaran.runtime.huggingface.importing import import_model
from trimaran.runtime.huggingface.refusals import ConversionError
from trimaran.runtime.train.state import spec_of

TOKENS = torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(3))
RANK, ALPHA = 3, 7.0
# Module within a layer -> (out, in), as its nn.Linear or Conv1D computes.
LLAMA = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.down_proj": (32, 48)}
GPT2 = {"attn.c_attn": (96, 32), "mlp.c_proj": (32, 128)}
FALCON = {"self_attention.query_key_value": (64, 32), "self_attention.dense": (32, 32)}


def write_adapter(
    folder: Path, layers: str, modules: Mapping[str, tuple[int, int]], number: int = 3, **config: Any
) -> dict[str, Tensor]:
    """Write a folder as PEFT does; return module -> what it adds to the matrix [out, in]."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(9)
    tensors, added = {}, {}
    for layer in range(number):
        for name, (out, width) in modules.items():
            module = f"{layers}.{layer}.{name}"
            a = torch.randn(RANK, width, generator=generator) * 0.3
            b = torch.randn(out, RANK, generator=generator) * 0.3
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
            added[module] = ALPHA / RANK**0.5 * b @ a
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    written = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": True, "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(written | config))
    return added


def logits_with(folder: Path, added: Mapping[str, Tensor]) -> Tensor:
    """Logits of transformers with matrices added to those of the model in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, change in added.items():
            weight = model.get_submodule(name).weight
            is_conv = type(model.get_submodule(name)).__name__ == "Conv1D"
            weight.add_(change.t() if is_conv else change)
        found: Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.mark.parametrize(
    ("model", "layers", "modules"),
    [("llama-grouped-biases", "model.layers", LLAMA), ("gpt2", "transformer.h", GPT2),
     ("falcon-40b", "transformer.h", FALCON)],
)  # fmt: skip
def test_a_folder_of_peft_has_its_logits_here_and_again_after_export(
    model: str, layers: str, modules: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    modules = {name: (out, 44 if width == 48 else width) for name, (out, width) in modules.items()}
    import_model(saved(SMALL_MODELS[model](), tmp_path / "model"), base)
    added = write_adapter(tmp_path / "peft", layers, modules)
    assert is_adapter(tmp_path / "peft")
    import_adapter(tmp_path / "peft", tmp_path / "run", base)
    expected = logits_with(tmp_path / "model", added)
    assert float((expected - logits_of(tmp_path / "model", TOKENS)).abs().max()) > 0.5
    export_model(tmp_path / "run", tmp_path / "merged", ExportOptions(dtype="float32"))
    torch.testing.assert_close(logits_of(tmp_path / "merged", TOKENS), expected, rtol=0, atol=5e-5)
    exported = export_adapter(tmp_path / "run", tmp_path / "again", ExportOptions())
    assert exported.base == str((tmp_path / "model").resolve())
    again = logits_with(tmp_path / "model", read_adapter(tmp_path / "again"))
    torch.testing.assert_close(again, expected, rtol=0, atol=5e-5)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Module -> what it adds, by PEFT's rules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    added = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            (target,) = [each for each in config["target_modules"] if module.endswith(f".{each}")]
            rank = config["rank_pattern"].get(target, config["r"])
            assert rank == len(a)
            alpha = config["alpha_pattern"].get(target, config["lora_alpha"])
            b = tensors[name.replace("lora_A", "lora_B")]
            added[module] = alpha / (rank**0.5 if config["use_rslora"] else rank) * b @ a
    return added


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
def test_peft_itself_loads_what_is_exported(tmp_path: Path) -> None:
    for number, (model, layers, modules) in enumerate(
        [("llama", "model.layers", {"self_attn.k_proj": (32, 32)}), ("gpt2", "transformer.h", GPT2)]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        import_model(saved(SMALL_MODELS[model](), place / "model"), place / "base")
        added = write_adapter(place / "peft", layers, modules, fan_in_fan_out=model == "gpt2")
        import_adapter(place / "peft", place / "run", place / "base")
        export_adapter(place / "run", place / "again", ExportOptions())
        for folder in ("peft", "again"):
            whole = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
            with torch.no_grad():
                found = peft.PeftModel.from_pretrained(whole, place / folder).eval()(input_ids=TOKENS).logits
            torch.testing.assert_close(found, logits_with(place / "model", added), rtol=0, atol=5e-5)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA's run `base`, an adapter's folder `peft`, and its run `run`."""
    place = tmp_path_factory.mktemp("adapter")
    import_model(saved(llama(), place / "model", tokenizer=True), place / "base")
    write_adapter(place / "peft", "model.layers", LLAMA)
    import_adapter(place / "peft", place / "run", place / "base")
    return place


def test_a_stacked_layer_gets_zeros_for_the_part_that_has_none(imported: Path) -> None:
    path = latest(imported / "run" / "checkpoints")
    assert path is not None
    whole = open_whole(path)
    settings = spec_of(whole).finetune.adapter  # type: ignore[union-attr]
    assert settings is not None
    assert (settings.rank, settings.alpha, settings.scaling) == (RANK, ALPHA, "rslora")
    assert settings.targets == ["attention.q", "attention.kv", "mlp.down"]
    merged = whole.read_global("layers.1.attention.kv.weight", "weight")
    base = open_whole(latest(imported / "base" / "checkpoints")).read_global(  # type: ignore[arg-type]
        "layers.1.attention.kv.weight", "weight"
    )
    assert torch.equal(merged[0], base[0])
    assert not torch.equal(merged[1], base[1])


def test_merged_weights_are_read_alike_at_every_cut(imported: Path) -> None:
    path = latest(imported / "run" / "checkpoints")
    assert path is not None
    opened = open_whole(path)
    for name, dim in (("0.attention.q", 0), ("0.attention.kv", 1), ("2.mlp.down", 1)):
        name = f"layers.{name}.weight"
        expected = opened.read_global(name, "weight")
        for index in range(2):
            spec, shape = cut_evenly(tuple(expected.shape), "tp", dim, index, 2)
            part = opened.read(name, "weight", spec, shape)
            torch.testing.assert_close(part, expected.chunk(2, dim)[index], rtol=0, atol=1e-6)
            flat = opened.read_range(name, "weight", spec, shape, 5, 25)
            assert torch.equal(flat, part.flatten()[5:25])


def test_the_base_is_found_where_it_was_and_no_other_is_taken(imported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(imported / "run", run)
    path = latest(run / "checkpoints")
    assert path is not None
    shutil.copytree(imported / "base", tmp_path / "copy")
    assert torch.equal(
        open_whole(path, str(tmp_path / "copy")).read_global("layers.0.mlp.down.weight", "weight"),
        open_whole(path).read_global("layers.0.mlp.down.weight", "weight"),
    )
    import_model(saved(llama(initializer_range=0.1), tmp_path / "model"), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"other holds other weights .* set checkpoint.init_from to a folder"):
        open_whole(path, str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"no longer there; put that checkpoint back"):
        open_whole(path, str(tmp_path / "nowhere"))


def test_an_adapter_of_another_model_is_refused(imported: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "wide", "model.layers", {"self_attn.q_proj": (64, 64)})
    with pytest.raises(ConversionError, match=r"self_attn.q_proj of 64 x 64, and that of .* is 32 x 32: it is another"):
        import_adapter(tmp_path / "wide", tmp_path / "run", imported / "base")
    write_adapter(tmp_path / "gpt", "transformer.h", GPT2)
    with pytest.raises(ConversionError, match=r"c_attn.lora_A.weight, and the model of .* has no linear layer"):
        import_adapter(tmp_path / "gpt", tmp_path / "run", imported / "base")
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_of_equal_shapes_is_refused_or_told(imported: Path, tmp_path: Path) -> None:
    export_adapter(imported / "run", tmp_path / "ours", ExportOptions())
    export_model(imported / "base", tmp_path / "narrow", ExportOptions(dtype="bfloat16"))
    import_model(tmp_path / "narrow", tmp_path / "again")
    for number, base in enumerate((imported / "base", tmp_path / "again")):  # the same weights, also rounded
        assert import_adapter(tmp_path / "ours", tmp_path / f"run-{number}", base).notes == []
    import_model(saved(llama(initializer_range=0.1), tmp_path / "model", tokenizer=True), tmp_path / "other")
    with pytest.raises(
        ConversionError, match=r"beside other weights \(sha256 \w{12}, of .*model\) than those of .*other"
    ):
        import_adapter(tmp_path / "ours", tmp_path / "run", tmp_path / "other")
    assert not (tmp_path / "run").exists()
    named = {
        "nothing": ({}, r"does not name its base: that it was trained beside .*other can't be known"),
        "another": (
            {"base_model_name_or_path": "org/large", "revision": "v2"},
            r"names org/large at revision v2 as its base, and .*other is of .*model: whether they are one model can't",
        ),
        "same": (
            {"base_model_name_or_path": "org/Model"},
            r"org/Model as its base, as .*other is called; weights can't",
        ),
    }
    for name, (config, said) in named.items():
        write_adapter(tmp_path / name, "model.layers", LLAMA, **config)
        note, *_ = import_adapter(tmp_path / name, tmp_path / f"{name}-run", tmp_path / "other").notes
        assert re.search(said, note)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "has use_dora true, which plain LoRA does not have"),
        ({"peft_type": "IA3"}, 'has peft_type "IA3"'),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa', which changes the base's weights"),
        ({"lora_alpha": "much"}, 'has lora_alpha "much" where a number is wanted'),
        ({"alpha_pattern": {"q_proj": None}}, "has alpha_pattern.q_proj null where a number is wanted"),
    ],
)
def test_other_kinds_of_adapters_are_refused(config: dict[str, Any], said: str, imported: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "peft", "model.layers", LLAMA, **config)
    with pytest.raises(ConversionError) as error:
        import_adapter(tmp_path / "peft", tmp_path / "run", imported / "base")
    assert said in str(error.value)


def test_damaged_folders_are_refused(imported: Path, tmp_path: Path) -> None:
    for number, (change, said) in enumerate(
        [
            (
                {"model.layers.0.mlp.down_proj.lora_B.weight": None},
                "only one of the two matrices of model.layers.0.mlp",
            ),
            ({"model.layers.0.mlp.down_proj.lora_B.weight": torch.full((32, 3), torch.nan)}, "infinite values or NaN"),
            ({"model.layers.0.mlp.down_proj.lora_B.weight": torch.zeros(32, 2)}, "can't be multiplied"),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(imported / "peft", folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, tensor in change.items():
            del tensors[f"base_model.model.{name}"]
            tensors |= {} if tensor is None else {f"base_model.model.{name}": tensor}
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(ConversionError, match=said):
            import_adapter(folder, tmp_path / "run", imported / "base")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConversionError, match="as pickle"):
        import_adapter(folder, tmp_path / "run", imported / "base")


def test_a_run_of_all_weights_has_no_adapter_to_export(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="has no adapters, for it trained all weights"):
        export_adapter(imported / "base", tmp_path / "adapter", ExportOptions())
