"""The model section: every field of TransformerConfig, or a published shape by name."""

import re
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, create_model

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import Derived
from trimaran.models.presets import check_preset_name
from trimaran.runtime.spec.sections.common import SECTION_CONFIG

# Where the rest of a run knows a number of the model that it does not give.
FALLBACKS: Final = {"vocab_size": "data.tokenizer_vocab_size", "max_seq_len": "train.seq_len"}


def _overrides() -> dict[str, Any]:
    """Every field of TransformerConfig as one that may be left out: documented as there, null by default."""
    overrides: dict[str, Any] = {}
    for name, field in TransformerConfig.model_fields.items():
        instead = ["the preset's"]
        if name in FALLBACKS:
            instead.append(FALLBACKS[name])
        elif isinstance(field.default_factory, Derived):
            instead.append(field.default_factory.words)
        elif not field.is_required() and field.default is not None:
            instead.append(f"{field.default:g}" if type(field.default) is float else str(field.default).lower())
        description = re.sub(r" \(null: [^()]*\)", "", (field.description or "").rstrip("."))
        annotation: Any = field.rebuild_annotation()
        overrides[name] = (
            annotation | None,
            Field(default=None, description=f"{description} (null: {', or '.join(instead)})."),
        )
    return overrides


_PRESET: Any = (
    Annotated[str, AfterValidator(check_preset_name)] | None,
    Field(default=None, description="Published shape to start from, such as gpt2-124m; the fields below override it."),
)


class ModelSection(
    create_model("ModelFields", __config__=SECTION_CONFIG, preset=_PRESET, **_overrides())  # type: ignore[misc]
):
    """The network: a published shape by name, a shape in numbers, or a preset with some numbers changed."""
