"""The token that ends a document: by its name in the vocabulary, or by the files beside a tokenizer.json."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from trimaran.runtime.data.files import DataError
from trimaran.runtime.files import read_json

END_OF_TEXT: Final = "<|endoftext|>"
# Names in published tokenizers: GPT-2, Llama 3, Llama 1 and 2, Gemma, BERT.
USUAL_NAMES: Final = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_CONFIG: Final = "tokenizer_config.json"
_OURS: Final = "end_of_text"
"""Our own key of tokenizer_config.json; unlike eos_token it is never the end of a turn of a conversation."""


def find_end_of_text(vocabulary: Mapping[str, int], special: Collection[str], folder: Path | None = None) -> str | None:
    """Return the name of the token that ends a document, None where nothing says which.

    The first of: what `keep_end_of_text` wrote, a usual name of a special token, `eos_token` of tokenizer_config.json,
    `eos_token_id` of generation_config.json, a usual name of any token. (Gemma's vocabulary has </s> as plain text, the
    HTML tag.)

    Args:
        vocabulary: token -> id.
        special: the tokens that are marked special.
        folder: where the tokenizer.json lies, None for a tokenizer without files beside it.

    Raises:
        DataError: a file beside the tokenizer is not JSON.
    """
    usual = [name for name in USUAL_NAMES if name in vocabulary]
    config = {} if folder is None else _read(folder / _CONFIG)
    ours = token_text(config.get(_OURS))
    if ours in vocabulary:
        return ours
    by_name = [name for name in usual if name in special]
    if by_name or folder is None:
        return next(iter(by_name or usual), None)
    names = {number: name for name, number in vocabulary.items()}
    ids = _ids(_read(folder / "generation_config.json").get("eos_token_id"))
    named = [token_text(config.get("eos_token")), *(names.get(number) for number in ids), *usual]
    return next((name for name in named if name in vocabulary), None)


def keep_end_of_text(folder: Path, token: str) -> None:
    """Note in `folder`, which has a tokenizer.json, which token ends a document."""
    config = _read(folder / _CONFIG)
    content = {"eos_token": token, **config, _OURS: token}
    (folder / _CONFIG).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def token_text(value: object) -> str | None:
    """Return the text of a special token in tokenizer_config.json: a string, or an object with `content`.

    None otherwise.
    """
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _ids(value: object) -> Iterator[int]:
    """Yield the ids in an eos_token_id, which is one id, a list, or missing."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, int):
            yield each


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON ({error}); put the file of the model there again, or remove it") from error
    return content if isinstance(content, dict) else {}
