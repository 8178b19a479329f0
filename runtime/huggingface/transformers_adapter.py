"""All use of transformers: logits of its model, GGUF to a model folder, fast tokenizers.

The only file that imports it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimaran.runtime.huggingface.source import ConversionError

_NEEDED = ("transformers", "accelerate")
_INSTALL = "pip install 'trimaran[huggingface]'"


def require_transformers(*more: str) -> None:
    """Raise ConversionError where transformers or one of `more` is not installed; call before any work."""
    missing = [name for name in (*_NEEDED, *more) if find_spec(name) is None]
    if missing:
        raise ConversionError(f"this needs {' and '.join(missing)}, which is not installed: {_INSTALL}")


@torch.no_grad()
def their_logits(
    folder: Path,
    architecture: str,
    inputs: Sequence[Tensor],
    *,
    weight_bytes: int,
    memory_bytes: int,
    scratch: Path,
    on_input: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """Return the logits [batch, seq, vocab] float32 that transformers computes for each input [batch, seq].

    Args:
        folder: the model folder; computed in float32.
        architecture: name of the class in transformers.
        weight_bytes: bytes of the weights in float32. Above `memory_bytes` the rest stays on disk, and each module
            reads its weights when it runs.
        memory_bytes: maximum bytes of weights held at once.
        scratch: folder for the weights that transformers offloads to disk; made if missing.
        on_input: called with the number of inputs done.

    Raises:
        ConversionError: transformers can't load the folder.
    """
    import transformers

    # Use transformers' default attention: of the implementations that can be selected, each is wrong for some model.
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
    if weight_bytes > memory_bytes:
        scratch.mkdir(parents=True, exist_ok=True)
        options |= {"device_map": "auto", "max_memory": {"cpu": memory_bytes}, "offload_folder": str(scratch)}
    with _quiet(transformers), _falcons_alibi_in_float32(architecture):
        try:
            model_class = getattr(transformers, architecture)
            model = model_class.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **options
            ).eval()
        except (ValueError, OSError, RuntimeError, KeyError, AttributeError, TypeError) as error:
            raise ConversionError(
                f"transformers can't load {folder} as {architecture}, so nothing can be compared: {error}"
            ) from error
        logits = []
        for tokens in inputs:
            logits.append(model(input_ids=tokens, use_cache=False).logits.float())
            on_input(len(logits))
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


def folder_of_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a folder: config.json, float32 safetensors, generation_config.json, tokenizer.

    Holds the whole model in memory.

    Raises:
        ConversionError: transformers can't read the file.
    """
    import transformers

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    with _silent(transformers):
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(file.parent), dtype=torch.float32, **where
            )
            # The weights are plain float32 now; save_pretrained would refuse a model marked as quantized.
            model.hf_quantizer = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(str(folder), max_shard_size="1GB")
            transformers.AutoTokenizer.from_pretrained(str(file.parent), **where).save_pretrained(str(folder))
        except Exception as error:  # a damaged file raises all kinds of errors in numpy, gguf and transformers
            raise ConversionError(
                f"{file} can't be read by transformers ({type(error).__name__}: {error}); see that it is whole"
            ) from error


def gguf_config(file: Path) -> dict[str, Any]:
    """Return the config.json that transformers gives a GGUF file, without reading its weights.

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
                f"{file} can't be read by transformers ({type(error).__name__}: {error}); see that it is whole"
            ) from error
        found: dict[str, Any] = config.to_dict()
        return found


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
                f"{folder / 'tokenizer.json'} is not a tokenizer that transformers can read: {error}"
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
