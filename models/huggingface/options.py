"""What a config.json says, option by option and in both directions: the pieces that a family's config map is put together from.

An option reads some keys of a config.json, filled up with the defaults of transformers' config class, and gives values
of TransformerConfig; it writes the same keys from a TransformerConfig. Every key of the config class that changes the
network belongs to an option of the family (tests/models/test_families.py holds them against each other), so that none
is overlooked. As in transformers, null means "none" or "derive it".
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
        keys: what it reads of a config.json.
        read: config.json -> values of TransformerConfig. Raises ValueError for what we do not have.
        write: a TransformerConfig -> values of config.json. Raises ValueError where the family has no word for it. What
            a family cannot say and does not write comes back different when it is read again, which
            `Family.from_config` notices.
    """

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Values]
    write: Callable[[TransformerConfig], Values]


def shown(value: object) -> str:
    """Return a value of a config.json about as it stands there, shortened."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def unsupported(key: str, found: object, known: object) -> ValueError:
    """Return the error for a value that we do not have; `known`: those that we have, as words."""
    return ValueError(f"{key} {shown(found)} is not supported; this runtime has {known}")


def value(ours: str, theirs: str) -> Option:
    """A value that is copied; null leaves ours at what TransformerConfig derives."""

    def read(hf: Mapping[str, Any]) -> Values:
        return {} if hf[theirs] is None else {ours: hf[theirs]}

    return Option((theirs,), read, lambda config: {theirs: getattr(config, ours)})


def flag(theirs: str, *ours: str) -> Option:
    """A switch that sets several of ours together; null is false."""
    return Option(
        (theirs,),
        lambda hf: dict.fromkeys(ours, bool(hf[theirs])),
        lambda config: {theirs: all(getattr(config, name) for name in ours)},
    )


def choice(ours: str, theirs: str, table: Mapping[Any, Any]) -> Option:
    """A value that has another name on each side.

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
            f"{theirs} has no word for {ours} {shown(wanted)}; it knows {one_of(shown(known) for known in dict.fromkeys(table.values()))}"
        )

    return Option((theirs,), read, write)


def only(theirs: str, *allowed: Any) -> Option:
    """An option of which we have the given settings alone, and these change nothing. Absent it is the first of them."""

    def read(hf: Mapping[str, Any]) -> Values:
        found = hf.get(theirs, allowed[0])
        if found not in allowed and not (found is None and False in allowed):
            raise unsupported(theirs, found, one_of(shown(known) for known in allowed))
        return {}

    return Option((theirs,), read, lambda config: {})


def fixed(**ours: Any) -> Option:
    """What is the same in every model of the family."""
    return Option((), lambda hf: dict(ours), lambda config: {})


def harmless(*theirs: str) -> Option:
    """Keys that change nothing in the network's output."""
    return Option(theirs, lambda hf: {}, lambda config: {})


# Names of activations in transformers; the tanh ones differ in how they are computed, not in the function.
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

# What transformers' base class knows of every family. The ids of special tokens are the tokenizer's affair.
COMMON: Final = (
    harmless("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
    only("is_encoder_decoder", False),
    only("add_cross_attention", False),
    only("is_causal", True),
    only("quantization_config", None),
    only("per_layer_config", None),
)

# The sizes of a model of LLaMA's kind, under names that most families have taken over.
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
    """`head_dim`, by default hidden_size / num_attention_heads. Without `is_field` the config class has none, yet its network looks for one."""

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
    """The window of all layers; null is none."""
    return Option((theirs,), value("attention_window", theirs).read, lambda config: {theirs: config.window_of(0)})


_KINDS: Final = {"sliding_attention": "window", "full_attention": "full"}


def layer_windows(kind_of: Callable[[int, Mapping[str, Any]], str], *, switch: bool) -> Option:
    """`layer_types`, one word for every layer, with `sliding_window`.

    Args:
        kind_of: (layer, config.json) -> the word that the config class gives a layer that has a window, where there are
            no layer_types.
        switch: whether windows count only where `use_sliding_window` is true (Qwen), and without layer_types from layer
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
    """Return the shortest `attention_pattern` that gives these kinds of layers when it is repeated; None where all have a window."""
    if "full" not in kinds:
        return None
    lengths = range(1, len(kinds) + 1)
    length = next(
        length for length in lengths if all(kind == kinds[layer % length] for layer, kind in enumerate(kinds))
    )
    return tuple(kinds[:length])
