"""The README.md of an exported model: what it is, how it was trained, how to load it.

Uses only what the run folder has. Its text is the template `card.md`.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from trimaran.models.config import TransformerConfig
from trimaran.runtime.files import read_json, read_text
from trimaran.runtime.finetune.data.account import REASONS
from trimaran.runtime.huggingface.proof import TOLERANCE, Agreement
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.metrics import Row, read_metrics

_TEMPLATE = Path(__file__).with_name("card.md")
_RECENT_STEPS = 50  # steps over which the loss is averaged
_TASKS = {"causal_lm": "text-generation", "masked_lm": "fill-mask"}  # of the hub; it has none for other objectives


@dataclass(frozen=True)
class Card:
    """The content of a model card.

    Args:
        run: the run folder; metrics.jsonl and data_manifest.json are read where they exist.
        step: of the exported checkpoint.
        tokens_seen: tokens it was trained on by then.
        record: import.json of an imported run, {} otherwise.
    """

    name: str
    run: Path
    spec: RunSpec
    step: int
    tokens_seen: int
    architecture: str
    dtype: str
    agreements: Sequence[Agreement]
    record: Mapping[str, Any]


def model_card(card: Card) -> str:
    """Return the card as Markdown with the front matter of a model page on the hub, which huggingface_hub validates."""
    from huggingface_hub import ModelCard, ModelCardData  # of the extra huggingface; export has asked for it

    spec, manifest = card.spec, _manifest(card.run)
    model, init_from = spec.transformer, spec.checkpoint.init_from
    splits = manifest.get("splits", {})
    data = ModelCardData(library_name="transformers", pipeline_tag=_TASKS.get(model.objective), tags=["trimaran"])
    made = ModelCard.from_template(
        data, template_str=read_text(_TEMPLATE), name=card.name, quoted=shlex.quote(card.name),
        architecture=card.architecture, dtype=card.dtype, model=model, step=card.step, chats=spec.finetune is not None,
        is_causal=model.is_causal and model.has_head,
        imported=PurePath(str(card.record["source"])).name if "source" in card.record else "",
        init_from=PurePath(init_from).name if init_from else "", shape=list(_shape_rows(model)),
        training=list(_training_rows(card)) if card.step else [], manifest=manifest, named=_named(manifest),
        account=manifest.get("account", {}), corpus=manifest.get("corpus", {}), train=splits.get("train", {}),
        held_out=splits.get("held_out", {}), left_out=_left_out(manifest), loader=_loader(card),
        tolerance=f"{TOLERANCE:g}", agreements=card.agreements,
    )  # fmt: skip
    return f"{made}\n"


def _loader(card: Card) -> str:
    model = card.spec.transformer
    if not model.has_head:
        return "AutoModelForSequenceClassification"
    return "AutoModelForCausalLM" if model.is_causal else card.architecture


def _shape_rows(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    yield "layers", str(config.num_layers)
    yield "hidden size", str(config.hidden_size)
    kv = "" if config.num_kv_heads == config.num_heads else f", {config.num_kv_heads} for keys and values"
    yield "heads", f"{config.num_heads} of {config.head_dim}{kv}"
    experts = (
        f"{config.num_experts} experts, {config.experts_per_token} for a token, each " if config.num_experts else ""
    )
    yield "feed-forward", f"{experts}{config.ffn_hidden_size}, {config.activation}"
    yield "positions", f"{config.position}, up to {config.max_seq_len:,} tokens"
    yield "norm", f"{config.norm}, {config.norm_position}"
    yield "vocabulary", f"{config.vocab_size:,} tokens" + (", embeddings tied" if config.tie_embeddings else "")


def _training_rows(card: Card) -> Iterator[tuple[str, str]]:
    train, optimizer = card.spec.train, card.spec.optimizer
    rows = [row for row in _rows(card.run) if (row.get("step") or 0) <= card.step]
    yield "steps", f"{card.step:,}"
    yield "tokens", f"{card.tokens_seen:,} ({train.global_batch_size} sequences of {train.seq_len} a step)"
    decayed = f"peak learning rate {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}"
    yield "optimizer", f"{optimizer.name}, {decayed}, {card.spec.lr_schedule.name} schedule"
    yield "precision", card.spec.precision.dtype
    each = "an example" if any("accuracy" in row for row in rows) else "a token"
    losses = [row["loss"] or 0.0 for row in rows if "loss" in row][-_RECENT_STEPS:]
    if losses:
        mean = sum(losses) / len(losses)
        yield "training loss", f"{mean:.4f} {each} (natural logarithm), mean of the last {len(losses)} steps"
    held_out = [row for row in rows if "held_out_loss" in row]
    if held_out:
        yield "held-out loss", f"{held_out[-1]['held_out_loss']:.4f} {each}, at step {held_out[-1]['step']}"


def _named(manifest: Mapping[str, Any]) -> str:
    names = [f"`{PurePath(str(name)).name}`" for name in manifest.get("source", {}).get("named", [])]
    return ", ".join(names) or "files that are not named"


def _left_out(manifest: Mapping[str, Any]) -> str:
    """Return what became of documents or examples that were left out or changed; "" where there were none."""
    if manifest.get("kind") == "examples":
        counts = manifest.get("account", {}).get("counts") or {}
        return "; ".join(f"{count:,} {REASONS[name].words}" for name, count in counts.items() if name in REASONS)
    dropped = manifest.get("corpus", {}).get("dropped") or {}
    counted = ", ".join(f"{count:,} ({reason})" for reason, count in dropped.items())
    return f"Left out: {counted}" if counted else ""


def _rows(run: Path) -> list[Row]:
    """The run's metrics; [] where the file is missing or broken.

    The card then shows no loss, and the export continues.
    """
    try:
        return read_metrics(run / "metrics.jsonl")
    except (OSError, ValueError):
        return []


def _manifest(run: Path) -> dict[str, Any]:
    try:
        found = read_json(run / "data_manifest.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
