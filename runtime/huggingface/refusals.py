"""Folders and files that are no model to import: what they are instead, and what to do, in one sentence each."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from trimaran.runtime.files import open_regular

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.bin.index.json")
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_MOST_SHOWN = 3


class ConversionError(ValueError):
    """A model that can't be imported or exported. The message names the file or tensor, the rule and what to do."""


# Files that give a folder away -> what it is, and what to do; the first that is there counts.
_KINDS: Final[Mapping[tuple[str, ...], str]] = {
    ("adapter_config.json", "adapter_model.*"): "holds an adapter (LoRA or the like), not a model; import the "
    "model it changes, and then the adapter with --base RUN, or merge it (peft: merge_and_unload) and import what that "
    "saves",
    ("model_index.json",): "is a pipeline of diffusers, not a language model; give the folder of a language model",
    ("checkpoints/step-*",): "is a run of trimaran already; train on from it with checkpoint.init_from",
    ("*.incomplete", ".cache/huggingface/download/*.incomplete", ".cache/huggingface/download/**/*.incomplete"): "is "
    "the folder of a download that has not ended; run the same download again, which goes on where it stopped",
    ("consolidated.*", "params.json"): "is in the layout of the model's maker (consolidated weights), not of Hugging "
    "Face; download the Hugging Face version, or convert it with the script of that family in transformers "
    "(convert_*_weights_to_hf.py)",
    ("zero_to_fp32.py", "global_step*", "*zero_pp_rank_*"): "is a checkpoint of DeepSpeed; run its zero_to_fp32.py, "
    "load the result into the model in transformers and call save_pretrained",
    (
        "*.distcp",
        "*/*.distcp",
    ): "is a checkpoint of torch.distributed; load it into the model in the program that saved "
    "it and call save_pretrained",
    ("latest_checkpointed_iteration.txt", "iter_*"): "is a checkpoint of Megatron; convert it to Hugging Face's layout "
    "with the tools of the program that saved it",
}
# Weights that are no safetensors -> the program that reads them.
_OTHER_WEIGHTS: Final[Mapping[str, str]] = {
    "*.h5": "TensorFlow",
    "*.msgpack": "Flax",
    "*.onnx": "ONNX",
    "*.npz": "MLX",
    "*.tflite": "TensorFlow Lite",
    "*.mlmodel": "Core ML",
}
# Last parts of tensor names that only quantized files have -> the format.
_QUANTIZED: Final[Mapping[str, str]] = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "FP8",
    "weight_scale": "compressed-tensors or FP8",
    "weight_zero_point": "compressed-tensors",
    "input_scale": "FP8",
    "scales": "GPTQ, AWQ or MLX",
    "q_weight": "EXL2",
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "qs": "GGML",
}
_QUANTIZED_CONFIGS: Final = ("quantization_config", "compression_config", "quantization")


def no_config(path: Path) -> ConversionError:
    """Return the error for a folder without config.json."""
    if found := _kind_of(path):
        return found
    if files := sorted(path.glob("*.gguf")):
        return ConversionError(f"{path} has no config.json; to import the GGUF file in it, give the file: {files[0]}")
    return _inner_folder(path) or ConversionError(
        f"{path} has no config.json, so what its weights mean is not known; give the folder of a saved model"
    )


def no_safetensors(path: Path) -> ConversionError:
    """Return the error for a folder with config.json and neither of the files that name its weights."""
    for name in (WEIGHTS, INDEX):
        if (path / name).is_symlink():
            return ConversionError(
                f"{path / name} is a link to {(path / name).readlink()}, which is not there; download the file again"
            )
    if found := _incomplete_shards(path) or _kind_of(path):
        return found
    pickles = sorted(
        file.name for pattern in PICKLES for file in path.glob(pattern) if not file.name.startswith("training_args")
    )
    if pickles:
        return pickle_refused(path, pickles[0])
    for pattern, program in _OTHER_WEIGHTS.items():
        if files := sorted(path.glob(pattern)):
            return ConversionError(
                f"{path} holds its weights for {program} alone ({files[0].name}); download the safetensors of the "
                "model, or load it in that program's class of transformers and call save_pretrained"
            )
    if files := sorted(path.glob("*.gguf")):
        return ConversionError(f"{path} has no safetensors; to import the GGUF file in it, give the file: {files[0]}")
    if files := sorted(path.glob("*.safetensors")):
        names = _listed(file.name for file in files)
        return ConversionError(
            f"{path} has neither {WEIGHTS} nor {INDEX}; it has {names}: if that is the whole model, rename it {WEIGHTS}"
        )
    return _inner_folder(path) or ConversionError(
        f"{path} has neither {WEIGHTS} nor {INDEX}: it is a model's folder without the weights; download them into it"
    )


def missing_shards(index: Path, files: Iterable[str]) -> ConversionError:
    """Return the error for an index that names files which are not there."""
    names = sorted(files)
    which = f"{names[0]}, which is" if len(names) == 1 else f"{_listed(names)}, which are"
    return ConversionError(
        f"{index} names {which} not in {index.parent}, so the model is incomplete; "
        f"copy the missing shard{'s' * (len(names) > 1)} there"
    )


def pickle_refused(folder: Path, name: str) -> ConversionError:
    """Return the error for a file of pickled weights."""
    return ConversionError(
        f"{folder} holds its weights as pickle ({name}), and loading a pickle can run any code its maker put in, "
        "so trimaran never does; where you trust the maker, convert it: "
        "transformers.AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors"
    )


def refuse_stand_in(file: Path) -> None:
    """Raise ConversionError for a file that stands for another: a pointer of git-lfs, or a web page saved in its place.

    A file that can't be read passes: whoever reads it tells why.
    """
    try:
        with open_regular(file) as opened:
            start = opened.read(64).lstrip().lower()
    except OSError:
        return
    if start.startswith(b"version https://git-lfs"):
        raise ConversionError(
            f"{file} is a pointer of git-lfs, not the file itself, because the repository was cloned without git-lfs; "
            f"install git-lfs and run `git lfs pull` in {file.parent}"
        )
    if start.startswith((b"<!doctype html", b"<html")):
        raise ConversionError(
            f"{file} is a web page, not the file itself; download it again from the address with /resolve/ in it "
            "(not /blob/), or with `hf download`"
        )


def refuse_quantized(path: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ConversionError where config.json or the names of the tensors are those of quantized weights."""
    method = next((_method(config[key]) for key in _QUANTIZED_CONFIGS if config.get(key)), None)
    if method is None:
        found = ((name, _QUANTIZED.get(name.rsplit(".", 1)[-1])) for name in names)
        method, example = next(((kind, name) for name, kind in found if kind is not None), (None, ""))
        method = None if method is None else f"{method}, by the name of {example}"
    if method is not None:
        raise ConversionError(
            f"the weights in {path} are quantized ({method}), and quantized weights can't be trained; "
            "import the model they were made from, or a copy of it in bfloat16"
        )


def _method(described: object) -> str:
    """Return the name of the format in a config.json's record of it."""
    if not isinstance(described, Mapping):
        return "in an unknown way"
    named = described.get("quant_method") or described.get("format") or described.get("quant_type")
    if named is None and any(str(key).startswith("bnb_") or str(key).startswith("load_in_") for key in described):
        named = "bitsandbytes"
    bits = described.get("bits")
    return str(named or (f"{bits} bits" if bits else "in an unknown way"))


def _kind_of(path: Path) -> ConversionError | None:
    for patterns, sentence in _KINDS.items():
        if any(True for pattern in patterns for _ in path.glob(pattern)):
            return ConversionError(f"{path} {sentence}")
    return None


def _incomplete_shards(path: Path) -> ConversionError | None:
    """Return the error for shards without their index; None where there are no shards."""
    found = [match for file in path.iterdir() if (match := _SHARD.fullmatch(file.name))]
    if not found:
        return None
    total, there = int(found[0][2]), {int(match[1]) for match in found}
    missing = [
        f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1) if number not in there
    ]
    return ConversionError(
        f"{path} has {len(there)} of {total} shards of a model and lacks {_listed([INDEX, *missing])}; "
        "download what is missing"
    )


def _inner_folder(path: Path) -> ConversionError | None:
    """Return the error for a folder whose subfolders are models, such as a hub's cache or the output of a trainer."""
    inner = [file.parent for pattern in ("*/config.json", "snapshots/*/config.json") for file in path.glob(pattern)]
    if not inner:
        return None
    newest = max(inner, key=lambda folder: (folder.stat().st_mtime, folder.name))
    return ConversionError(
        f"{path} is no model itself, but its folder{'s' * (len(inner) > 1)} {_listed(map(str, sorted(inner)))} may be; "
        f"give one of them, such as {newest}"
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more
