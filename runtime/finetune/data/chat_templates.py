"""The chat templates that come with trimaran, and the choice of a run's template."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.files import read_text
from trimaran.runtime.infer.chat import ChatTemplate

# OpenAI's chat markup, 2023; as in SmolLM2 and Qwen 2, without a system message of its own.
_CHATML: Final = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
# Llama 3 (Dubey et al. 2024), without tools.
_LLAMA3: Final = """{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
BUILT_IN: Final = {"chatml": _CHATML, "llama3": _LLAMA3}
_TOKEN: Final = re.compile(r"<\|[a-z][a-z0-9_]*\|>")
_MOST_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class ChosenTemplate:
    """The template of a run.

    Args:
        new_tokens: special tokens that it writes and the tokenizer has not yet.
        is_own: whether the spec names it; else it comes with the model.
    """

    template: ChatTemplate
    new_tokens: tuple[str, ...]
    is_own: bool


def choose_template(name: str | None, tokenizer: Tokenizer, folder: Path | None) -> ChosenTemplate | None:
    """Return the chat template that a spec names, or that of the model; None where there is none.

    Args:
        name: finetune.chat_template: chatml, llama3, a Jinja file, or None.
        folder: with the model's tokenizer, which may have a template, and names special tokens; None where there is
            no model.

    Raises:
        DataError: the file can't be read.
        ChatError: a file of the model can't be read.
    """
    found = None if folder is None else ChatTemplate.find(folder)
    if name is None:
        return None if found is None else ChosenTemplate(found, (), is_own=False)
    source, origin = BUILT_IN.get(name), f"finetune.chat_template {name}"
    if source is None:
        try:
            source, origin = read_text(Path(name).expanduser(), _MOST_BYTES), name
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(
                f"finetune.chat_template {name!r} can't be read: {reason}; write chatml, llama3 or the path of a Jinja "
                "file"
            ) from error
    names = {} if folder is None else ChatTemplate.names_in(folder)
    new = dict.fromkeys(token for token in _TOKEN.findall(source) if tokenizer.id_of(token) is None)
    return ChosenTemplate(ChatTemplate(source, origin, names), tuple(new), is_own=True)
