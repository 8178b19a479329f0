"""The proof of a conversion: our network and transformers' compute the same logits in float32 from the weights on disk.

Ours runs layer by layer: a stage of one layer is built, filled from the checkpoint, run on every input and dropped, so
that it takes the memory of one layer (or of the embedding) and not of the model.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.group import single
from trimaran.models.parallel.parameter import LayerContext
from trimaran.models.parallel.shard import ShardSpec
from trimaran.models.transformer import Stage
from trimaran.runtime.huggingface.progress import Progress
from trimaran.runtime.huggingface.refusals import ConversionError
from trimaran.runtime.huggingface.transformers_adapter import text_tokens, their_logits

TOLERANCE = 1e-4
"""Largest difference allowed, as a share of the largest logit.

Both sides compute in float32, so it holds for weights of any dtype. Another order of sums gives differences of about
1e-6 in a few layers and of about 1e-5 in a hundred.
"""
_RANDOM_TOKENS = 64
_MOST_TOKENS = 256  # maximum of one input, even where a sliding window needs more
_TEXT_TOKENS = 48  # of one sentence
# Prose, numbers, code, another alphabet and symbols: texts that tokenizers cut in different ways.
SENTENCES = (
    "The harbour was quiet in the morning, and three boats lay side by side at the pier.",
    "In 1931 the bridge carried 12,480 people a day; by 1958 it was 40% more.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values)\n",
    "Über den Dächern lag Schnee, и река ещё не замёрзла. 海は静かだった。",
)

ReadWeight = Callable[[str], Tensor]
"""Parameter name -> the whole tensor, [*global shape], any float dtype."""
OnLayer = Callable[[int, int], None]
"""Called with (layers done, total layers)."""


class ProofError(ConversionError):
    """The logits differ: the converted model is not the same."""


@dataclass(frozen=True)
class Agreement:
    """The difference between the logits of one kind of input.

    Attributes:
        what: the kind of input.
        tokens: number of positions compared, each over the whole vocabulary.
        max_error: largest absolute difference of two logits.
        scale: largest absolute logit of transformers.
    """

    what: str
    tokens: int
    max_error: float
    scale: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within TOLERANCE of the scale.

        False where a logit is not finite, or where all are zero, which proves nothing.
        """
        return 0 < self.scale < math.inf and self.max_error <= TOLERANCE * self.scale

    def __str__(self) -> str:
        share = self.max_error / self.scale if self.scale else float("inf")
        return (
            f"{self.what}, {self.tokens} positions: max abs error {self.max_error:.2g} at a logit scale of "
            f"{self.scale:.3g} ({share:.1g} of it)"
        )

    def record(self) -> dict[str, Any]:
        """Return the comparison as plain JSON."""
        return asdict(self)


def proof_inputs(config: TransformerConfig, tokenizer_folder: Path | None) -> dict[str, list[Tensor]]:
    """Return the inputs [1, seq] int64 of the proof by kind: random tokens, and text where there is a tokenizer.

    Tokens that the model's vocabulary lacks are left out of the text.
    """
    wanted = max(_RANDOM_TOKENS, min(_MOST_TOKENS, (config.attention_window or 0) + _RANDOM_TOKENS // 2))
    generator = torch.Generator().manual_seed(20260101)
    inputs = {
        "random tokens": [torch.randint(config.vocab_size, (1, min(wanted, config.max_seq_len)), generator=generator)]
    }
    if tokenizer_folder is not None:
        most = min(_TEXT_TOKENS, config.max_seq_len)
        texts = [
            [token for token in ids if token < config.vocab_size][:most]
            for ids in text_tokens(tokenizer_folder, SENTENCES)
        ]
        inputs["real text"] = [torch.tensor([ids]) for ids in texts if ids]
    return {kind: tensors for kind, tensors in inputs.items() if tensors}


@torch.no_grad()
def our_logits(
    config: TransformerConfig, read: ReadWeight, inputs: Sequence[Tensor], on_layer: OnLayer = lambda done, total: None
) -> list[Tensor]:
    """Return our logits [batch, seq, vocab] float32 for each input [batch, seq], with one layer in memory at a time.

    Of a reward model the scores at the last tokens [batch, 1].

    Args:
        read: parameter name -> weights.
        on_layer: called after each layer.
    """
    context = LayerContext(single("tp"), sequence_parallel=False, dtype=torch.float32, device=torch.device("cpu"))

    def stage(layers: range, *, is_first: bool = False, is_last: bool = False) -> Stage:
        built = Stage(config, layers, context, is_first=is_first, is_last=is_last, seed=0).eval()
        built.load(_as_reader(read))
        return built

    with _only_new_garbage():
        built = stage(range(0), is_first=True)
        hidden = [built.run_layers(None, tokens) for tokens in inputs]
        for layer in range(config.num_layers):
            del built
            gc.collect()  # a module has a reference cycle, so its weights would stay in memory until the next one
            built = stage(range(layer, layer + 1))
            hidden = [built.run_layers(each, tokens) for each, tokens in zip(hidden, inputs, strict=True)]
            on_layer(layer + 1, config.num_layers)
        del built
        gc.collect()
        last = stage(range(0), is_last=True)
        logits = [_outputs(last, last.run_layers(each, tokens)) for each, tokens in zip(hidden, inputs, strict=True)]
        del last
        gc.collect()
    return logits


def _outputs(last: Stage, hidden: Tensor) -> Tensor:
    if last.config.has_head:
        return last.logits(hidden)
    batch, seq, _ = hidden.shape
    return last.scores(hidden, torch.arange(1, batch + 1) * seq - 1).unsqueeze(1)


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Let collections look at new objects alone: those of transformers would take most of a second, each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def compare(
    inputs: Mapping[str, Sequence[Tensor]], ours: Sequence[Tensor], theirs: Sequence[Tensor]
) -> list[Agreement]:
    """Return the difference of the logits, by kind of input.

    Args:
        ours, theirs: logits [batch, seq, vocab] of the inputs in their order.
    """
    agreements, start = [], 0
    for kind, tensors in inputs.items():
        pairs = list(zip(ours[start : start + len(tensors)], theirs[start : start + len(tensors)], strict=True))
        start += len(tensors)
        error = max(_largest(mine - other) for mine, other in pairs)
        agreements.append(
            Agreement(
                kind, sum(tensor.numel() for tensor in tensors), error, max(_largest(other) for _, other in pairs)
            )
        )
    return agreements


def _largest(x: Tensor) -> float:
    """The largest absolute value; infinity where a value is not finite, so that every comparison fails."""
    value = float(x.abs().max())
    return value if math.isfinite(value) else math.inf


@dataclass(frozen=True)
class Proof:
    """The two sides compared: our network with weights from `read`, and transformers' from `folder`.

    Args:
        read: parameter name -> our weights.
        folder: config.json and safetensors.
        architecture: name of the class in transformers.
        tokenizer_folder: folder of tokenizer.json; None compares random tokens alone.
        memory_bytes: bytes of weights that transformers may hold; the rest stays on disk, or goes to `scratch`.
        described: the content of config.json for transformers, None for that in the folder.
    """

    config: TransformerConfig
    read: ReadWeight
    folder: Path
    architecture: str
    tokenizer_folder: Path | None
    memory_bytes: int
    scratch: Path
    described: Mapping[str, Any] | None = None

    def run(self, progress: Progress = Progress()) -> list[Agreement]:  # noqa: B008 - it is frozen
        """Compute both sides and return their differences.

        Raises:
            ProofError: a difference is above TOLERANCE of the logit scale, on any kind of input.
        """
        inputs = proof_inputs(self.config, self.tokenizer_folder)
        flat = [tensor for tensors in inputs.values() for tensor in tensors]
        ours = our_logits(
            self.config, self.read, flat, lambda done, total: progress.advance("our logits, layer", done, total)
        )
        progress.advance("their logits, input", 0, len(flat))
        theirs = their_logits(
            self.folder,
            self.architecture,
            flat,
            described=self.described,
            weight_bytes=4 * self.config.num_parameters(),
            memory_bytes=self.memory_bytes,
            scratch=self.scratch,
            on_input=lambda done: progress.advance("their logits, input", done, len(flat)),
        )
        agreements = compare(inputs, ours, theirs)
        if not all(agreement.holds for agreement in agreements):
            shown = "; ".join(str(agreement) for agreement in agreements)
            raise ProofError(
                f"the logits of transformers ({self.architecture}) and of this runtime differ by more than "
                f"{TOLERANCE:g} of their scale: {shown}. Nothing was written; one of the two misreads the model, "
                "so neither its weights nor its config.json can be trusted to mean the same"
            )
        return agreements


def _as_reader(read: ReadWeight) -> Callable[[str, str, ShardSpec, tuple[int, ...]], Tensor]:
    return lambda name, key, shard, shape: read(name)
