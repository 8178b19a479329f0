"""The README.md of an exported model: what it is, how it was trained, how to load it.

Uses only what the run folder has.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from trimaran.models.config import TransformerConfig
from trimaran.runtime.files import read_json
from trimaran.runtime.finetune.data.account import REASONS
from trimaran.runtime.huggingface.proof import TOLERANCE, Agreement
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.metrics import Row, read_metrics

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
    """Return the card as Markdown with the front matter of a model page on the hub."""
    task = [f"pipeline_tag: {_TASKS[objective]}"] if (objective := card.spec.transformer.objective) in _TASKS else []
    front = ["---", "library_name: transformers", *task, "tags:", "- trimaran", "---", ""]
    parts = [
        *front,
        f"# {card.name}",
        "",
        *_origin(card),
        "",
        *_network(card),
        "",
        *_training(card),
        "",
        *_use(card),
        "",
        *_limits(card),
        "",
    ]
    return "\n".join(parts)


def _origin(card: Card) -> Iterator[str]:
    count = f"{card.spec.transformer.num_parameters():,}"
    yield (
        f"A language model of {count} parameters (`{card.architecture}`, "
        f"weights in {card.dtype}), exported with trimaran."
    )
    yield ""
    imported = f"`{PurePath(str(card.record['source'])).name}`" if "source" in card.record else ""
    if imported and card.step == 0:
        yield (
            f"Its weights were imported from {imported} and not trained further. Whatever holds for that model holds "
            "for this one: its training data, its licence."
        )
    elif imported:
        yield f"It began as {imported}, whose training data and licence are its own, and was trained further, as below."
    elif card.spec.checkpoint.init_from:
        yield (
            f"It began with the weights of another run (`{PurePath(card.spec.checkpoint.init_from).name}`) and "
            "was trained further, as below."
        )
    else:
        yield "It was trained from random weights, on the data below and on nothing else."


def _network(card: Card) -> Iterator[str]:
    yield "## Network"
    yield ""
    yield from _table(_shape_rows(card.spec.transformer))


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


def _training(card: Card) -> Iterator[str]:
    """The training section; empty where the run only imported weights."""
    if card.step == 0:
        return
    train, optimizer = card.spec.train, card.spec.optimizer
    rows = [row for row in _rows(card.run) if (row.get("step") or 0) <= card.step]
    yield "## Training"
    yield ""
    facts = [
        ("steps", f"{card.step:,}"),
        ("tokens", f"{card.tokens_seen:,} ({train.global_batch_size} sequences of {train.seq_len} a step)"),
        (
            "optimizer",
            (
                f"{optimizer.name}, peak learning rate {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}, "
                f"{card.spec.lr_schedule.name} schedule"
            ),
        ),
        ("precision", card.spec.precision.dtype),
    ]
    each = "an example" if any("accuracy" in row for row in rows) else "a token"
    losses = [row["loss"] or 0.0 for row in rows if "loss" in row][-_RECENT_STEPS:]
    if losses:
        mean = sum(losses) / len(losses)
        facts.append(("training loss", f"{mean:.4f} {each} (natural logarithm), mean of the last {len(losses)} steps"))
    held_out = [row for row in rows if "held_out_loss" in row]
    if held_out:
        facts.append(("held-out loss", f"{held_out[-1]['held_out_loss']:.4f} {each}, at step {held_out[-1]['step']}"))
    yield from _table(facts)
    yield ""
    yield from _data(card.run)


def _data(run: Path) -> Iterator[str]:
    yield "## Data"
    yield ""
    manifest = _manifest(run)
    if not manifest:
        yield "The run folder has no data_manifest.json, so what the model was trained on is not known here."
        return
    if manifest.get("kind") == "examples":
        yield from _examples(manifest)
        return
    corpus, splits = manifest.get("corpus", {}), manifest.get("splits", {})
    named = ", ".join(f"`{PurePath(str(name)).name}`" for name in manifest.get("source", {}).get("named", []))
    yield (
        f"Text from {named or 'files that are not named'}: {corpus.get('documents', 0):,} documents, "
        f"{corpus.get('characters', 0):,} characters."
    )
    tokens = splits.get("train", {}).get("tokens", 0)
    yield f"{tokens:,} tokens for training, {splits.get('held_out', {}).get('tokens', 0):,} held out."
    dropped = corpus.get("dropped") or {}
    if dropped:
        yield "Left out: " + ", ".join(f"{count:,} ({reason})" for reason, count in dropped.items()) + "."


def _examples(manifest: Mapping[str, Any]) -> Iterator[str]:
    """The examples that it was finetuned on."""
    account, splits = manifest.get("account", {}), manifest.get("splits", {})
    named = ", ".join(f"`{PurePath(str(name)).name}`" for name in manifest.get("source", {}).get("named", []))
    train, held_out = splits.get("train", {}), splits.get("held_out", {})
    yield (
        f"Examples from {named or 'files that are not named'}: {account.get('used', 0):,} of "
        f"{account.get('records', 0):,} records."
    )
    yield (
        f"{train.get('examples', 0):,} examples for training ({train.get('tokens', 0):,} tokens, "
        f"{train.get('learned', 0):,} of them learned), {held_out.get('examples', 0):,} held out."
    )
    counts = account.get("counts") or {}
    if counts:
        yield "; ".join(f"{count:,} {REASONS[name].words}" for name, count in counts.items() if name in REASONS) + "."


def _use(card: Card) -> Iterator[str]:
    scores = not card.spec.transformer.has_head
    is_causal = card.spec.transformer.is_causal and not scores
    loader = "AutoModelForCausalLM" if is_causal else card.architecture
    loader = "AutoModelForSequenceClassification" if scores else loader
    yield "## Use"
    yield ""
    yield "```python"
    yield f"from transformers import AutoTokenizer, {loader}"
    yield ""
    yield f'model = {loader}.from_pretrained("{card.name}")'
    yield f'tokenizer = AutoTokenizer.from_pretrained("{card.name}")'
    if is_causal and card.spec.finetune is not None:
        yield 'messages = [{"role": "user", "content": "Who are you?"}]'
        yield 'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")'
        yield "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"
    elif is_causal:
        yield 'inputs = tokenizer("The ", return_tensors="pt", add_special_tokens=False)'
        yield "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True)[0]))"
    if scores:
        yield "text = tokenizer.apply_chat_template(conversation, tokenize=False)  # or any text that the run has read"
        yield 'print(model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits)  # the score'
    yield "```"
    yield ""
    if is_causal:
        yield f"or `vllm serve {shlex.quote(card.name)}`, where vLLM has the architecture."
        yield ""
    yield (
        "The export was held against the run it comes from (both in float32, from these weights; "
        f"refused above {TOLERANCE:g} of the logit scale):"
    )
    yield ""
    yield from (f"- {agreement}" for agreement in card.agreements)


def _limits(card: Card) -> Iterator[str]:
    yield "## Limits"
    yield ""
    trained = "" if card.step == 0 else " No evaluation besides the losses above was made."
    if not card.spec.transformer.has_head:
        yield f"The model scores answers as the pairs of its training data do, which may be wrong or unfair.{trained}"
    else:
        what = "continues text with" if card.spec.transformer.is_causal else "puts for hidden tokens"
        yield (
            f"The model {what} what is likely after its training data, which is not the same as "
            f"what is true or harmless.{trained}"
        )
    yield (
        "This card was written by a program from the files of a run. It grants no licence: "
        "whoever publishes the model must state one."
    )


def _table(rows: Sequence[tuple[str, str]] | Iterator[tuple[str, str]]) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    yield from (f"| {name} | {words} |" for name, words in rows)


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
