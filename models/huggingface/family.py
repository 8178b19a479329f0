"""A family of models as data: config map and weight-name map between transformers' models and ours."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.forms import Row
from trimaran.models.huggingface.options import COMMON, Option, Values, shown
from trimaran.models.shape.choices import RotaryScaling

# Fields of training and initialization, which do not change what a model computes; a config.json may lack them.
TRAINING_ONLY: Final = frozenset(
    {
        "embedding_dropout",
        "hidden_dropout",
        "first_hidden_dropout",
        "attention_dropout",
        "z_loss",
        "label_smoothing",
        "router_aux_loss",
        "init",
        "init_std",
        "mup_base_width",
        "mup_base_head_dim",
    }
)


class CannotExpress(ValueError):
    """A family can't express this model; `num_differences` counts what differs."""

    def __init__(self, text: str, num_differences: int) -> None:
        super().__init__(text)
        self.num_differences = num_differences


class _Noting(dict[str, Any]):
    """A config.json that notes which keys are read."""

    def __init__(self, content: Values) -> None:
        super().__init__(content)
        self.keys_read: dict[str, None] = {}  # in order

    def __getitem__(self, key: str) -> Any:
        self.keys_read[key] = None
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read[key] = None
        return super().get(key, default)


@dataclass(frozen=True)
class Family:
    """One family of models.

    Args:
        name: our name of it.
        model_types: the values of `model_type` in config.json; export writes the first.
        architecture: transformers' class of such a model.
        defaults: the defaults of transformers' config class, for keys that a config.json lacks.
        options: the config map.
        weights: the weight-name map.
        aliases: other names of config.json's keys -> the names that the options read.
        prefix: first part of all names in the map but the head's; files of a network without head lack it.
        renamed: other first parts of tensor names -> those in the map.
        endings: other last parts of tensor names -> those in the map.
        ignored: regular expressions for tensors in a file that are no weights.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str
    defaults: Mapping[str, Any]
    options: tuple[Option, ...]
    weights: tuple[Row, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    prefix: str = "model."
    renamed: Mapping[str, str] = field(default_factory=dict)
    endings: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)

    def to_config(self, hf: Mapping[str, Any]) -> Values:
        """Return the values of a TransformerConfig for the content of a config.json.

        Raises:
            ValueError: unsupported options, all of them at once.
        """
        errors: list[str] = []
        values: Values = {}
        full = self._completed(hf, errors)
        given = self._given(hf)
        problems = (_mistyped(given.get(key, key), value, self.defaults.get(key)) for key, value in full.items())
        errors += filter(None, problems)
        for option in (*COMMON, *self.options) if not errors else ():
            noting = _Noting(full)
            try:
                values |= option.read(noting)
            except ValueError as error:
                errors.append(str(error))
            except (TypeError, ArithmeticError, LookupError, AttributeError) as error:
                read = ", ".join(f"{given.get(key, key)} {shown(full.get(key))}" for key in noting.keys_read)
                errors.append(f"{read} can't be read ({error})")
        if errors:
            raise ValueError("\n".join(f"{self.name}: {error}" for error in errors))
        return values

    def in_their_words(self, text: str, hf: Mapping[str, Any]) -> str:
        """Return a sentence about our fields with config.json's keys in their place.

        Where the value of a field is not that of a key, the keys and values stand behind it.
        """
        full, words = self._completed(hf, []), {}
        given = self._given(hf)
        for option in self.options:
            read = {given.get(key, key): full[key] for key in option.keys if full.get(key) is not None}
            said = ", ".join(f"{key} {shown(value)}" for key, value in read.items())
            for name, value in option.read(full).items() if read else ():
                same = [key for key, theirs in read.items() if theirs == value]
                words[name] = same[0] if same else f"{name} ({said})"
        return re.sub(r"\w+", lambda word: words.get(word[0], word[0]), text)

    def from_config(self, config: TransformerConfig) -> Values:
        """Return the content of a config.json for a model of this config, without dtype and ids of special tokens.

        The ids are null. Dropout and initialization are left out where the family has no key for them.

        Raises:
            CannotExpress: this family can't express the model; the text names every difference.
        """
        written: Values = {"architectures": [self.architecture], "model_type": self.model_types[0]}
        written |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        notes: list[str] = []
        for option in self.options:
            try:
                written |= option.write(config)
            except ValueError as error:  # the key keeps its default, which shows as a difference below
                notes.append(str(error))
        try:
            read_again = canonical_config(TransformerConfig.model_validate(self.to_config(written)))
        except ValueError as error:
            raise CannotExpress(f"{self.architecture} can't express this model: {error}", len(notes) + 1) from error
        wanted = canonical_config(config)
        names = [name for name in {**wanted, **read_again} if not _equal(wanted.get(name), read_again.get(name))]
        if names or notes:
            text = (
                ", ".join(f"{name} {shown(wanted.get(name))} (there {shown(read_again.get(name))})" for name in names)
                or "this model"
            )
            raise CannotExpress(
                "; ".join((f"{self.architecture} can't express {text}", *notes)), max(len(names), len(notes))
            )
        return written

    def _completed(self, hf: Mapping[str, Any], errors: list[str]) -> Values:
        """Return config.json with known keys and the defaults of those that it lacks."""
        full = {**self.defaults, **self._with_known_keys(hf, errors)}
        return {key: _whole(value, self.defaults.get(key)) for key, value in full.items()}

    def _given(self, hf: Mapping[str, Any]) -> Mapping[str, str]:
        """Return known key -> the key that a config.json has for it."""
        return {self.aliases.get(key, key): key for key, value in hf.items() if value is not None}

    def _with_known_keys(self, hf: Mapping[str, Any], errors: list[str]) -> Values:
        """Return config.json under the key names that the options read; add contradictions to `errors`."""
        renamed: Values = {}
        for key, value in hf.items():
            name = self.aliases.get(key, key)
            if renamed.get(name) is not None and value is not None and renamed[name] != value:
                errors.append(
                    f"{name} has two values, {shown(renamed[name])} and {shown(value)}, one of them under an older name"
                )
            if value is not None or name not in renamed:
                renamed[name] = value
        return renamed


def _whole(value: Any, default: Any) -> Any:
    """Return 64 for 64.0 where the default is no fraction: programs that know one kind of number write sizes so."""
    return int(value) if isinstance(value, float) and value.is_integer() and not isinstance(default, float) else value


def _mistyped(key: str, value: Any, default: Any) -> str:
    """Return what is wrong with the type of a value, "" for nothing; numbers may stand for switches."""
    if value is None or not isinstance(default, int | float):
        return ""
    if not isinstance(value, int | float):
        return f"{key} {shown(value)} must be {'true or false' if isinstance(default, bool) else 'a number'}"
    is_finite = isinstance(value, int) or math.isfinite(value)
    return "" if is_finite else f"{key} {shown(value)} must be a finite number"


def canonical_config(config: TransformerConfig) -> Values:
    """Return the config reduced to what the network computes.

    Configs that differ only in notation or in unused fields give equal values.
    """
    values = {name: getattr(config, name) for name in type(config).model_fields if name not in TRAINING_ONLY}
    del values["bias"], values["attention_pattern"]  # a shorthand for the other biases; contained in the windows
    windows = tuple(config.window_of(layer) for layer in range(config.num_layers))
    values["attention_window"] = windows if len(set(windows)) > 1 else windows[0]
    values["attention_scale"] = config.attention_scale or config.head_dim**-0.5
    values["rotary_dim"] = config.rotary_dim or config.head_dim
    values["rotary_scaling"] = None if config.rotary_scaling is None else _canonical_scaling(config.rotary_scaling)
    unused: list[str] = [] if config.position == "learned" else ["max_seq_len"]  # only a bound
    if config.position != "rotary":
        unused += [name for name in values if name.startswith("rotary_")]
    if config.position != "alibi":
        unused.append("alibi_scale")
    if config.norm == "rmsnorm":
        unused.append("norm_bias")
    if config.num_experts == 0:
        unused += ["experts_per_token", "renormalize_experts"]
    if config.norm_position == "none":
        unused += ["norm", "norm_weight", "norm_bias"]
    return {name: value for name, value in values.items() if name not in unused}


def _canonical_scaling(scaling: RotaryScaling) -> Values:
    used = {
        "linear": (),
        "ntk": (),
        "dynamic_ntk": ("original_max_position",),
        "yarn": ("original_max_position", "beta_fast", "beta_slow", "attention_factor"),
        "llama3": ("original_max_position", "low_freq_factor", "high_freq_factor"),
    }[scaling.kind]
    values: Values = {name: getattr(scaling, name) for name in ("kind", "factor", *used)}
    if scaling.kind == "yarn" and scaling.attention_factor is None:
        values["attention_factor"] = 0.1 * math.log(scaling.factor) + 1.0
    return values


def _equal(first: object, second: object) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(first[name], second[name]) for name in first)
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-12)
    return first == second
