"""GPT, GPT-2, GPT-3, and the shapes that follow them: Megatron-LM, OPT, BLOOM."""

from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.presets.record import Preset, gpt

# The paper's own counts (117M, 345M, 762M, 1542M) do not follow from its table; the released weights have these.
_GPT2: Final = "Radford et al. 2019 (GPT-2), table 2; head counts from the released weights"
_GPT3: Final = "Brown et al. 2020 (GPT-3), table 2.1; counts from table D.1"
_GPT3_NOTE: Final = (
    "attends densely; the paper alternates dense and banded layers, of a band it does not give: attention_pattern: "
    "[full, window] and attention_window: TOKENS do that, and change no parameter"
)
_MEGATRON: Final = "Narayanan et al. 2021 (Megatron-LM), table 1"
_OPT: Final = "Zhang et al. 2022 (OPT), table 1"
_OPT_NOTE: Final = "the released position table has two more rows, which no token reads"
_BLOOM: Final = "BigScience 2022 (BLOOM), table 3"


def _gpt2(num_layers: int, hidden_size: int, num_heads: int, published: str) -> Preset:
    return Preset(gpt(num_layers, hidden_size, num_heads, max_seq_len=1024), _GPT2, published)


def _gpt3(num_layers: int, hidden_size: int, num_heads: int, published: str, **changes: Any) -> Preset:
    return Preset(gpt(num_layers, hidden_size, num_heads, **changes), _GPT3, published, note=_GPT3_NOTE)


def _megatron(num_layers: int, hidden_size: int, num_heads: int, published: str) -> Preset:
    return Preset(gpt(num_layers, hidden_size, num_heads, vocab_size=51200), _MEGATRON, published)


def _opt(num_layers: int, hidden_size: int, num_heads: int, published: str) -> Preset:
    shape = gpt(num_layers, hidden_size, num_heads, vocab_size=50272, activation="relu")
    return Preset(shape, _OPT, published, besides=2 * hidden_size, note=_OPT_NOTE)


def _bloom(num_layers: int, hidden_size: int, num_heads: int, published: str) -> Preset:
    shape = gpt(num_layers, hidden_size, num_heads, vocab_size=250880, position="alibi", embedding_norm=True)
    return Preset(shape, _BLOOM, published)


GPT_LIKE: Final[Mapping[str, Preset]] = {
    "gpt-117m": Preset(
        gpt(12, 768, 12, vocab_size=40478, max_seq_len=512, norm_position="post"),
        "Radford et al. 2018 (GPT), section 4.1",
        "116,534,784",
    ),
    "gpt2-124m": _gpt2(12, 768, 12, "124,439,808"),
    "gpt2-355m": _gpt2(24, 1024, 16, "354,823,168"),
    "gpt2-774m": _gpt2(36, 1280, 20, "774,030,080"),
    "gpt2-1.5b": _gpt2(48, 1600, 25, "1,557,611,200"),
    # Two rows of table 2.1 do not multiply out (1.3B: 24 heads of 128 at width 2048; 13B: width 5140); the shapes here
    # give the counts of table D.1. Table 2.1 prints 350M, 13.0B and 175.0B for the counts of three rows that D.1 gives
    # as 356M, 12,850M and 174,600M.
    "gpt3-125m": _gpt3(12, 768, 12, "125M"),
    "gpt3-350m": _gpt3(24, 1024, 16, "356M"),
    "gpt3-760m": _gpt3(24, 1536, 16, "760M"),
    "gpt3-1.3b": _gpt3(24, 2048, 16, "1.32B"),
    "gpt3-2.7b": _gpt3(32, 2560, 32, "2.65B"),
    "gpt3-6.7b": _gpt3(32, 4096, 32, "6.66B"),
    "gpt3-13b": _gpt3(40, 5120, 40, "12.85B"),
    "gpt3-175b": _gpt3(96, 12288, 96, "174.6B"),
    "megatron-1.7b": _megatron(24, 2304, 24, "1.7B"),
    "megatron-3.6b": _megatron(30, 3072, 32, "3.6B"),
    "megatron-7.5b": _megatron(36, 4096, 32, "7.5B"),
    "megatron-18.4b": _megatron(40, 6144, 48, "18.4B"),
    "megatron-39.1b": _megatron(48, 8192, 64, "39.1B"),
    "megatron-76.1b": _megatron(60, 10240, 80, "76.1B"),
    "megatron-145.6b": _megatron(80, 12288, 96, "145.6B"),
    "megatron-310.1b": _megatron(96, 16384, 128, "310.1B"),
    "megatron-529.6b": _megatron(105, 20480, 128, "529.6B"),
    "megatron-1008b": _megatron(128, 25600, 160, "1008.0B"),
    # OPT-350M is left out: its norms stand after the sum, and its embeddings are 512 wide with projections to 1024,
    # which is not ours.
    "opt-125m": _opt(12, 768, 12, "125,239,296"),
    "opt-1.3b": _opt(24, 2048, 32, "1,315,758,080"),
    "opt-2.7b": _opt(32, 2560, 32, "2,651,596,800"),
    "opt-6.7b": _opt(32, 4096, 32, "6,658,473,984"),
    "opt-13b": _opt(40, 5120, 40, "12,853,473,280"),
    "opt-30b": _opt(48, 7168, 56, "29,974,540,288"),
    "opt-66b": _opt(64, 9216, 72, "66B"),
    "opt-175b": _opt(96, 12288, 96, "175B"),
    "bloom-560m": _bloom(24, 1024, 16, "559,214,592"),
    "bloom-1.1b": _bloom(24, 1536, 16, "1,065,314,304"),
    "bloom-1.7b": _bloom(24, 2048, 16, "1,722,408,960"),
    "bloom-3b": _bloom(30, 2560, 32, "3,002,557,440"),
    "bloom-7.1b": _bloom(30, 4096, 32, "7,069,016,064"),
    "bloom-176b": _bloom(70, 14336, 112, "176,247,271,424"),
}
