"""The options of which a family's config map is made: each converts some keys of config.json in both directions.

An option reads keys of a config.json, completed with the defaults of transformers' config class, and returns values of
TransformerConfig; it writes the same keys from a TransformerConfig. Every key of the config class that changes the
network belongs to an option of the family; tests/models/test_families.py compares the two. As in transformers, null
means "none" or "derive it".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import one_of

Values = dict[str, Any]


@dataclass(frozen=True)
class Option:
    """One piece of a config map.

    Args:
        keys: the keys of config.json that it reads.
        read: config.json -> values of TransformerConfig. Raises ValueError for unsupported values.
        write: TransformerConfig -> values of config.json. Raises ValueError for values that the family can't express.
            `Family.from_config` also reads the result again and finds what got lost.
    """

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Values]
    write: Callable[[TransformerConfig], Values]


def shown(value: object) -> str:
    """Return a value of a config.json in JSON's notation, shortened."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def unsupported(key: str, found: object, known: object) -> ValueError:
    """Return the error for an unsupported value; `known`: the supported ones, as text."""
    return ValueError(f"{key} {shown(found)} is not supported; this runtime has {known}")


def value(ours: str, theirs: str) -> Option:
    """Return the option that copies a value; null leaves ours to TransformerConfig's default."""

    def read(hf: Mapping[str, Any]) -> Values:
        return {} if hf[theirs] is None else {ours: hf[theirs]}

    return Option((theirs,), read, lambda config: {theirs: getattr(config, ours)})


def flag(theirs: str, *ours: str) -> Option:
    """Return the option of a switch that sets several of ours; null is false."""
    return Option(
        (theirs,),
        lambda hf: dict.fromkeys(ours, bool(hf[theirs])),
        lambda config: {theirs: all(getattr(config, name) for name in ours)},
    )


def choice(ours: str, theirs: str, table: Mapping[Any, Any]) -> Option:
    """Return the option of a value with different names on the two sides.

    Args:
        table: theirs -> ours; of several names for one of ours the first is written.
    """

    def read(hf: Mapping[str, Any]) -> Values:
        for name, known in table.items():
            if name == hf[theirs]:
                return {ours: known}
        raise unsupported(theirs, hf[theirs], one_of(shown(name) for name in table))

    def write(config: TransformerConfig) -> Values:
        wanted = getattr(config, ours)
        for name, known in table.items():
            if known == wanted:
                return {theirs: name}
        raise ValueError(
            f"{theirs} has no word for {ours} {shown(wanted)}; "
            f"it knows {one_of(shown(known) for known in dict.fromkeys(table.values()))}"
        )

    return Option((theirs,), read, write)


def only(theirs: str, *allowed: Any) -> Option:
    """Return the option of a key that must have one of the values that change nothing; absent it has the first."""

    def read(hf: Mapping[str, Any]) -> Values:
        found = hf.get(theirs, allowed[0])
        if found not in allowed and not (found is None and False in allowed):
            raise unsupported(theirs, found, one_of(shown(known) for known in allowed))
        return {}

    return Option((theirs,), read, lambda config: {})


def fixed(**ours: Any) -> Option:
    """Return the option of values that are the same in every model of the family."""
    return Option((), lambda hf: dict(ours), lambda config: {})


def harmless(*theirs: str) -> Option:
    """Return the option of keys that do not change the network's output."""
    return Option(theirs, lambda hf: {}, lambda config: {})


# Names of activations in transformers; the tanh ones are implementations of one function.
ACTIVATIONS: Final = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}
GATED_ACTIVATIONS: Final = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_python": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "gelu_fast": "geglu_tanh",
}

# The keys of transformers' base class. The tokenizer has the ids of special tokens.
COMMON: Final = (
    harmless("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
    only("is_encoder_decoder", False),
    only("add_cross_attention", False),
    only("is_causal", True),
    only("quantization_config", None),
    only("per_layer_config", None),
)

# The sizes of a model under LLaMA's names, which most families use.
SIZES: Final = (
    value("vocab_size", "vocab_size"),
    value("hidden_size", "hidden_size"),
    value("ffn_hidden_size", "intermediate_size"),
    value("num_layers", "num_hidden_layers"),
    value("num_heads", "num_attention_heads"),
    value("max_seq_len", "max_position_embeddings"),
)
KV_HEADS: Final = value("num_kv_heads", "num_key_value_heads")
TIED: Final = flag("tie_word_embeddings", "tie_embeddings")


def head_width(*, is_field: bool) -> Option:
    """Return the option of `head_dim`, by default hidden_size / num_attention_heads.

    Args:
        is_field: whether the config class has the field; some networks read it although it has not.
    """

    def read(hf: Mapping[str, Any]) -> Values:
        return {} if hf.get("head_dim") is None else {"head_dim": hf["head_dim"]}

    def write(config: TransformerConfig) -> Values:
        return (
            {"head_dim": config.head_dim}
            if is_field or config.head_dim * config.num_heads != config.hidden_size
            else {}
        )

    return Option(("head_dim",), read, write)


def attention_window(theirs: str = "sliding_window") -> Option:
    """Return the option of one window for all layers; null is none."""
    return Option((theirs,), value("attention_window", theirs).read, lambda config: {theirs: config.window_of(0)})


_KINDS: Final = {"sliding_attention": "window", "full_attention": "full"}


def layer_windows(kind_of: Callable[[int, Mapping[str, Any]], str], *, switch: bool) -> Option:
    """Return the option of `layer_types`, one word for every layer, with `sliding_window`.

    Args:
        kind_of: (layer, config.json) -> the config class's word for the layer where layer_types is null.
        switch: whether windows apply only if `use_sliding_window` is true (Qwen), and without layer_types from layer
            `max_window_layers` on.
    """

    def read(hf: Mapping[str, Any]) -> Values:
        num_layers, is_on = hf["num_hidden_layers"], not switch or bool(hf["use_sliding_window"])
        window = hf["sliding_window"] if is_on else None
        words = hf["layer_types"]
        if words is None:
            words = [
                "full_attention" if switch and window is None else kind_of(layer, hf) for layer in range(num_layers)
            ]
        for word in words:
            if word not in _KINDS:
                raise unsupported("layer_types", word, one_of(shown(known) for known in _KINDS))
        if len(words) != num_layers:
            raise ValueError(f"layer_types has {len(words)} entries, and num_hidden_layers is {num_layers}")
        if "sliding_attention" not in words:
            return {}
        if window is None:
            reason = "sliding_window is null" if is_on else "use_sliding_window is false"
            raise ValueError(f"layer_types has layers with sliding_attention, and {reason}")
        return {"attention_window": window, "attention_pattern": shortest_pattern([_KINDS[word] for word in words])}

    def write(config: TransformerConfig) -> Values:
        windows = [config.window_of(layer) for layer in range(config.num_layers)]
        used = [window for window in windows if window is not None]
        words = ["full_attention" if window is None else "sliding_attention" for window in windows]
        written: Values = {"sliding_window": used[0] if used else None, "layer_types": words}
        if switch:
            written |= {
                "use_sliding_window": bool(used),
                "max_window_layers": words.index("sliding_attention") if used else config.num_layers,
            }
        return written

    keys = ("sliding_window", "layer_types", *(("use_sliding_window", "max_window_layers") if switch else ()))
    return Option(keys, read, write)


def shortest_pattern(kinds: list[str]) -> tuple[str, ...] | None:
    """Return the shortest `attention_pattern` whose repetition gives these kinds; None where all have a window."""
    if "full" not in kinds:
        return None
    lengths = range(1, len(kinds) + 1)
    length = next(
        length for length in lengths if all(kind == kinds[layer % length] for layer, kind in enumerate(kinds))
    )
    return tuple(kinds[:length])
