"""What each pipeline rank of a run holds at most, by part: state, activations, logits, context. No torch."""

from typing import Final

from trimaran.runtime.pipeline.action import ActionKind
from trimaran.runtime.pipeline.partition import stage_layers
from trimaran.runtime.pipeline.simulate import Costs, peaks_held
from trimaran.runtime.plan.memory.saved import layer_bytes, stage_bytes
from trimaran.runtime.plan.memory.state import state_of
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.pipeline import placement_of, schedule_of

CONTEXT_BYTES: Final = 3 * 2**29
"""Of the device's context and of libraries' buffers: 1.5 GiB."""
_CHUNK_BYTES: Final = {"cpu": 8 << 20, "cuda": 128 << 20}  # of logits that the head computes at once
_CHUNK_ROWS: Final = {"cpu": 256, "cuda": 1024}
_WIDENED_BYTES: Final = 1 << 20  # of narrow logits, whose statistics a CPU computes in float32
_ITEM: Final = {"bfloat16": 2, "float32": 4, "float64": 8}


def memory_of(spec: RunSpec) -> list[dict[str, float]]:
    """Return by pipeline rank the bytes of each part.

    Raises:
        ValueError: the spec's ZeRO is DeepSpeed's, or its schedule file is no schedule.
    """
    held = _activations(spec)
    return [_memory(spec, rank) | {"activations": held[rank]} for rank in range(spec.parallel.pp)]


def _memory(spec: RunSpec, rank: int) -> dict[str, float]:
    state = state_of(spec, rank)
    parts: dict[str, float] = {
        "parameters": state.parameters,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "in transit": state.gradient_buffers + state.gathered,
    }
    logits, work = _head(spec) if placement_of(spec)[-1] == rank else 0.0, _work(spec)
    # The loss is over before the backward pass of the first layer begins.
    parts["logits"] = logits if logits > work else 0.0
    parts["working set"] = 0.0 if logits > work else work
    parts["in transit"] += _sent(spec, rank)
    parts["context"] = float(CONTEXT_BYTES)
    return parts


def _device(spec: RunSpec) -> str:
    return "cpu" if spec.launcher.device == "cpu" else "cuda"


def _stream(spec: RunSpec) -> float:
    """Return the bytes of a microbatch's hidden states, whole."""
    tokens = spec.train.micro_batch_size * spec.train.seq_len
    return float(tokens * spec.transformer.hidden_size * _ITEM[spec.precision.dtype])


def _cut(spec: RunSpec) -> int:
    """Return into how many parts sequence parallelism cuts the hidden states between layers."""
    return spec.parallel.tp if spec.parallel.sequence_parallel else 1


def _head(spec: RunSpec) -> float:
    """Return the bytes while the loss is computed.

    The last norm's input and output, the gradient of its output, a chunk of logits; on a CPU what a narrow chunk's
    statistics, and its product for the weight's gradient, need in float32.
    """
    item, tokens = _ITEM[spec.precision.dtype], spec.train.micro_batch_size * spec.train.seq_len
    row = spec.transformer.padded_vocab_size(spec.parallel.tp) / spec.parallel.tp * item
    kind = _device(spec)
    chunk = min(tokens * row, max(_CHUNK_BYTES[kind], _CHUNK_ROWS[kind] * row))
    wide = 0.0
    if kind == "cpu" and item < 4:
        wide = 4 / item * max(min(chunk, _WIDENED_BYTES), chunk + _stream(spec) * chunk / (tokens * row))
    return chunk + wide + _stream(spec) * (1 + 2 / _cut(spec))


def _sent(spec: RunSpec, rank: int) -> float:
    """Return the bytes of gradients of hidden states that are kept because another rank may not have them yet.

    gloo tells only at the end of the step that they have arrived; NCCL when the next one is sent.
    """
    placement = placement_of(spec)
    sending = sum(stage > 0 and placement[stage - 1] != rank for stage, where in enumerate(placement) if where == rank)
    kept = min(sending, 1) if _device(spec) == "cuda" else max(0, sending * spec.num_microbatches - 1)
    return kept * _stream(spec) / _cut(spec)


def _work(spec: RunSpec) -> float:
    """Return the bytes beside the microbatches' while a layer's backward pass runs.

    Gradients of the inner outputs and of two streams; where the layer is computed again, all that it keeps.
    """
    tokens, config = spec.train.micro_batch_size * spec.train.seq_len, spec.transformer
    inner = (2 if config.is_gated else 1) * config.ffn_hidden_size / spec.parallel.tp
    again = layer_bytes(spec, recomputed=False, selective=False) if spec.train.recompute_every else 0
    return again + float(tokens * _ITEM[spec.precision.dtype] * (inner + 2 * config.hidden_size))


def _activations(spec: RunSpec) -> list[float]:
    """Return by pipeline rank the most bytes that microbatches keep, by the list that will be executed."""
    layers = stage_layers(spec.transformer, spec.train.seq_len, spec.num_stages, spec.parallel.layers_per_stage)
    kept = [float(stage_bytes(spec, held)) for held in layers]
    spec = shortened(spec)
    none = [0.0] * len(kept)
    held = {
        ActionKind.F: kept, ActionKind.B: [-each for each in kept],
        ActionKind.I: none, ActionKind.W: [-each for each in kept],
    }  # fmt: skip
    return peaks_held(schedule_of(spec), Costs(Costs.uniform(len(kept)).times, held))


def shortened(spec: RunSpec) -> RunSpec:
    """Return the spec with no more microbatches than twice its pipeline ranks.

    Each further one adds one round of the steady state: as long as the slowest rank's work, with the same peak. Under
    GPipe every microbatch is held, and a file's list has the microbatches that it has: those stay as they are.
    """
    parallel, train = spec.parallel, spec.train
    most = 2 * parallel.pp
    if parallel.schedule == "gpipe" or parallel.schedule_file is not None or spec.num_microbatches <= most:
        return spec
    batch = most * train.micro_batch_size * parallel.dp
    return spec.model_copy(update={"train": train.model_copy(update={"global_batch_size": batch})})
