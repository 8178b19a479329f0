"""All use of transformers: logits of its model, GGUF to a model folder, fast tokenizers.

The only file that imports it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimaran.models.huggingface.weights import WRAPPERS
from trimaran.runtime.huggingface.refusals import ConversionError
from trimaran.runtime.huggingface.source import read_json

_NEEDED = ("transformers", "accelerate")
_INSTALL = "in trimaran's own folder: pip install -c constraints.txt -e '.[huggingface]'"
_MOST_SHOWN = 500  # characters of an error of transformers
# WeightRenaming replaces one match for each key; a name may have a wrapper's part in front and two inside.
_WITHOUT_WRAPPERS = {f"{WRAPPERS}(?#{number})": "" for number in range(3)}


def require_transformers(*more: str) -> None:
    """Raise ConversionError where transformers or one of `more` is not installed; call before any work."""
    missing = [name for name in (*_NEEDED, *more) if find_spec(name) is None]
    if missing:
        raise ConversionError(f"this needs {' and '.join(missing)}; install what is missing {_INSTALL}")


def has_class(name: str) -> bool:
    """Return whether transformers has a class of that name."""
    import transformers

    return hasattr(transformers, name)


def their_config(content: Mapping[str, Any], architecture: str) -> Any:
    """Return transformers' config object for the content of a config.json, each value in the type that it wants there.

    Transformers itself refuses 0 for 0.0, 64.0 for 64 and null for false, which other programs write.

    Raises:
        ConversionError: transformers refuses a value, or has no such architecture.
    """
    import transformers

    with _quiet(transformers):
        try:
            config_class: Any = getattr(transformers, architecture).config_class
            return config_class.from_dict({**_as_meant(content, config_class), "experts_implementation": "eager"})
        except Exception as error:  # huggingface_hub raises classes of its own, which derive from Exception alone
            raise ConversionError(
                f"transformers refuses the config.json ({_in_one_line(error)}); correct the value, or leave the key out"
            ) from error


def _as_meant(content: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    """Return the content with each value that the class refuses replaced by the same value of another type."""
    checks = getattr(config_class, "__validators__", {})  # of huggingface_hub's strict dataclasses
    names = getattr(config_class, "attribute_map", {})
    return {
        key: next((each for each in _readings(value) if _fits(each, checks.get(names.get(key, key), ()))), value)
        for key, value in content.items()
    }


def _readings(value: Any) -> Iterator[Any]:
    """Yield the value, and then what equals it in other types."""
    yield value
    if value is None:
        yield False
    elif isinstance(value, int):
        yield float(value)
    elif isinstance(value, float) and value.is_integer():
        yield int(value)
    if value in (0, 1) and not isinstance(value, bool):
        yield bool(value)


def _fits(value: Any, checks: Sequence[Callable[[Any], None]]) -> bool:
    try:
        for check in checks:
            check(value)
    except (ValueError, TypeError):
        return False
    return True


def _in_one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


@torch.no_grad()
def their_logits(
    folder: Path,
    architecture: str,
    inputs: Sequence[Tensor],
    *,
    described: Mapping[str, Any] | None = None,
    weight_bytes: int,
    memory_bytes: int,
    scratch: Path,
    on_input: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """Return the logits [batch, seq, vocab] float32 that transformers computes for each input [batch, seq].

    Args:
        folder: the model folder; computed in float32.
        architecture: name of the class in transformers.
        described: the content of config.json, None for that in the folder.
        weight_bytes: bytes of the weights in float32. Above `memory_bytes` the rest stays on disk, and each module
            reads its weights when it runs.
        memory_bytes: maximum bytes of weights held at once.
        scratch: folder for the weights that transformers offloads to disk; made if missing.
        on_input: called with the number of inputs done.

    Raises:
        ConversionError: transformers can't load the folder, or can't compute with it.
    """
    import transformers

    config = their_config(read_json(folder / "config.json") if described is None else described, architecture)
    # Use transformers' default attention: of the implementations that can be selected, each is wrong for some model.
    # Of the experts only the eager implementation computes any width.
    options: dict[str, Any] = {"config": config, "dtype": torch.float32, "use_safetensors": True}
    options |= {"key_mapping": _WITHOUT_WRAPPERS}
    if weight_bytes > memory_bytes:
        scratch.mkdir(parents=True, exist_ok=True)
        options |= {"device_map": "auto", "max_memory": {"cpu": memory_bytes}, "offload_folder": str(scratch)}
    with _quiet(transformers), _falcons_alibi_in_float32(architecture):
        doing = "load"
        try:
            model: Any = getattr(transformers, architecture).from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **options
            )
            model.eval()
            doing, logits = "compute with", []
            for tokens in inputs:
                logits.append(model(input_ids=tokens, use_cache=False).logits.float())
                on_input(len(logits))
        except Exception as error:  # it raises errors of many classes, some of them of other packages
            raise ConversionError(
                f"transformers can't {doing} {folder} as {architecture}, so nothing can be compared: "
                f"{_in_one_line(error)}"
            ) from error
        return logits


@contextmanager
def _falcons_alibi_in_float32(architecture: str) -> Iterator[None]:
    """Compute Falcon's ALiBi by BLOOM's function, which does not round to bfloat16: that would show in the logits."""
    if architecture != "FalconForCausalLM":
        yield
        return
    from transformers.models.bloom import modeling_bloom
    from transformers.models.falcon import modeling_falcon

    rounding = modeling_falcon.build_alibi_tensor
    modeling_falcon.build_alibi_tensor = modeling_bloom.build_alibi_tensor
    try:
        yield
    finally:
        modeling_falcon.build_alibi_tensor = rounding


def folder_of_gguf(file: Path, folder: Path, config: Any) -> None:
    """Write the model of a GGUF file as a folder: config.json, float32 safetensors, generation_config.json, tokenizer.

    Holds the whole model in memory.

    Args:
        config: what `gguf_config` returned: transformers takes seconds to read the file's header, each time.

    Raises:
        ConversionError: transformers can't read the file.
    """
    import transformers

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    with _silent(transformers):
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(file.parent), config=config, dtype=torch.float32, **where
            )
            # The weights are plain float32 now; save_pretrained would refuse a model marked as quantized.
            model.hf_quantizer = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(str(folder), max_shard_size="1GB")
            transformers.AutoTokenizer.from_pretrained(str(file.parent), **where).save_pretrained(str(folder))
        except Exception as error:  # a damaged file raises all kinds of errors in numpy, gguf and transformers
            raise ConversionError(
                f"{file} can't be read by transformers ({_in_one_line(error)}); see that it is whole"
            ) from error


def gguf_config(file: Path) -> Any:
    """Return the config that transformers gives a GGUF file, without reading its weights.

    Raises:
        ConversionError: the file is damaged, or of an architecture that transformers can't read from GGUF.
    """
    import transformers

    with _silent(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(
                str(file.parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # as above
            raise ConversionError(
                f"{file} can't be read by transformers ({_in_one_line(error)}); see that it is whole"
            ) from error
    # A GGUF file has its numbers in float32. 1e-5, say, is meant, which is 9.999999747378752e-06 there.
    for name, value in vars(config).items():
        if isinstance(value, float) and float(np.float32(value)) == value:
            setattr(config, name, float(str(np.float32(value))))
    return config


def save_fast_tokenizer(source: Path, folder: Path) -> bool:
    """Convert older tokenizer files of `source` to tokenizer.json and its config in `folder`; False if that fails."""
    import transformers

    with _quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(source), local_files_only=True, trust_remote_code=False
            )
            tokenizer.save_pretrained(str(folder))
        except Exception:  # noqa: BLE001 - without sentencepiece or tiktoken it fails in many ways; the caller warns
            return False
    return (folder / "tokenizer.json").is_file()


def text_tokens(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text by the folder's tokenizer.json, with nothing added before or after.

    Raises:
        ConversionError: transformers can't read it.
    """
    import transformers

    with _quiet(transformers):
        try:
            tokenizer_class: Any = transformers.PreTrainedTokenizerFast
            tokenizer = tokenizer_class(tokenizer_file=str(folder / "tokenizer.json"))
            return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        except Exception as error:  # the tokenizers package raises plain Exception
            raise ConversionError(
                f"{folder / 'tokenizer.json'} is not a tokenizer that transformers can read ({_in_one_line(error)}); "
                "take the file of the model from where it was published"
            ) from error


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Like `_quiet`, and discard all other output.

    Reading GGUF prints a progress bar, and saving a model imports the packages that accelerate finds.
    """
    with _quiet(transformers), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Suppress progress bars and advice of transformers and accelerate inside the block."""
    settings, accelerate = transformers.utils.logging, logging.getLogger("accelerate")
    verbosity, has_bars, level = settings.get_verbosity(), settings.is_progress_bar_enabled(), accelerate.level
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    accelerate.setLevel(logging.ERROR)
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if has_bars:
            settings.enable_progress_bar()
        accelerate.setLevel(level)
