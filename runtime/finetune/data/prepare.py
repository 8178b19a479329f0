"""From example files to prepared examples, once: parse, apply the chat template, cut, split, write. No torch."""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from trimaran.runtime.data.files import DataError, build_once, hash_file, once_per_change
from trimaran.runtime.data.tokens.shards import dtype_for
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.files import read_json
from trimaran.runtime.finetune.data.account import ExampleAccount
from trimaran.runtime.finetune.data.chat_templates import choose_template
from trimaran.runtime.finetune.data.examples import Document, Example
from trimaran.runtime.finetune.data.formats import find_example_files, read_examples
from trimaran.runtime.finetune.data.packing import Rows, one_a_row, pack
from trimaran.runtime.finetune.data.records import Conversation, Pair, Plain, Prompt, Rated, Record
from trimaran.runtime.finetune.data.store import ExampleSet, write_split
from trimaran.runtime.finetune.data.templates import ConversationEncoder
from trimaran.runtime.folder_lock import NO_JOB

if TYPE_CHECKING:
    from trimaran.runtime.spec import RunSpec

# Raised whenever the same settings would give other examples, so that the cache of an older version is not reused.
_FORMAT: Final = 1
_KIND: Final = "examples"
_SPLITS: Final = ("train", "held_out")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedExamples:
    """Prepared examples: both splits, the tokenizer with the template's tokens, and the manifest, which records how.

    `folder` holds all of it; `account` says what became of the records.
    """

    train: ExampleSet
    held_out: ExampleSet
    tokenizer: Tokenizer
    manifest: dict[str, Any]
    folder: Path
    account: ExampleAccount

    @property
    def end_of_turn(self) -> int:
        """The token that ends most answers."""
        return int(self.manifest["end_of_turn"])


def prepare_examples(
    spec: "RunSpec", model_folder: Path | None, tokenizer_file: Path | None, environment: Mapping[str, str] = NO_JOB
) -> PreparedExamples:
    """Return the examples of a run, from the cache where they were prepared before. Needs spec.finetune.

    Two processes may call this at once. Ranks should `open_examples` the folder instead.

    Args:
        model_folder: run folder of the initial weights, or of the run itself once it has begun, with its chat template.
        tokenizer_file: the tokenizer.json of the weights; None: data.tokenizer.
        environment: see `Holder.here`.

    Raises:
        DataError: a file, a record, the template or the tokenizer can't be used.
        ChatError: the template is wrong.
    """
    assert spec.finetune is not None, "only a run that finetunes has examples"
    cache_dir = Path(spec.data.cache_dir)
    encoder = encoder_of(spec, model_folder, tokenizer_file)
    tokenizer, template = encoder.tokenizer, encoder.template
    files = find_example_files(spec.data.source, cache_dir)
    names = hashlib.sha256("\n".join(str(path.absolute()) for path in files).encode("utf-8", "surrogateescape"))
    hashes = once_per_change(files, cache_dir / "sources" / f"{names.hexdigest()[:16]}.json", hash_file)
    finetune = spec.finetune
    identity = {
        "format": _FORMAT,
        "files": [[path.name, content] for path, content in zip(files, hashes, strict=True)],
        "tokenizer": hashlib.sha256(tokenizer.definition.encode()).hexdigest(),
        "end_of_text": tokenizer.eot_token,
        "template": None if template is None else [template.source, dict(template.names)],
        "data": [spec.data.format, spec.data.text_field, spec.data.held_out_fraction, spec.data.max_lost_fraction],
        "finetune": [finetune.method, finetune.loss_on, finetune.truncation],
        "seq_len": [spec.train.seq_len, _room_for_answers(spec)],
        "adds_tokens": encoder.adds_tokens,
        "seed": spec.seed,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / "examples" / key
    source = {"named": list(spec.data.source), "files": [str(path) for path in files]}
    build_once(folder, lambda temporary: _build(temporary, spec, files, encoder, source), environment)
    return open_examples(folder, verify=True)


def encoder_of(spec: "RunSpec", model_folder: Path | None, tokenizer_file: Path | None) -> ConversationEncoder:
    """Return what turns records into tokens: the tokenizer with the template's tokens, and the template.

    Arguments and errors as of `prepare_examples`.
    """
    assert spec.finetune is not None, "only a run that finetunes has a template"
    file = Path(spec.data.tokenizer) if spec.data.tokenizer else tokenizer_file
    if file is None:
        raise DataError(
            "the examples have no tokenizer: set checkpoint.init_from to a run whose weights are finetuned, or "
            "data.tokenizer to a tokenizer.json"
        )
    tokenizer = Tokenizer.load(file, spec.data.end_of_text if spec.data.tokenizer else None)
    chosen = choose_template(spec.finetune.chat_template, tokenizer, model_folder or file.parent)
    if chosen is not None and chosen.new_tokens:
        tokenizer = tokenizer.with_special_tokens(chosen.new_tokens)
    # A model that came with files of its own has a tokenizer that says which tokens precede a text.
    adds_tokens = model_folder is not None and (model_folder / "import.json").exists()
    return ConversationEncoder(tokenizer, None if chosen is None else chosen.template, adds_tokens)


def open_examples(folder: Path, verify: bool = False) -> PreparedExamples:
    """Open a folder that `prepare_examples` made.

    Args:
        verify: whether to check the content of the files.

    Raises:
        DataError: something is missing or damaged; names it.
    """
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
        sets = {
            name: ExampleSet(folder, name, manifest["splits"][name], manifest["dtype"], manifest["source"]["files"])
            for name in _SPLITS
        }
        account, sha256 = ExampleAccount.read(manifest["account"]), manifest["tokenizer"]["sha256"]
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"the manifest {path} is missing or damaged ({problem}); delete the folder and the examples are prepared "
            "again"
        ) from error
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file() or hash_file(tokenizer_file) != sha256:
        raise DataError(
            f"{tokenizer_file} is missing or differs from its manifest; delete the folder and the examples are "
            "prepared again"
        )
    if verify:
        for each in sets.values():
            each.verify()
    tokenizer = Tokenizer.load(tokenizer_file)
    return PreparedExamples(sets["train"], sets["held_out"], tokenizer, manifest, folder, account)


def holds_examples(folder: Path) -> bool:
    """Return whether a folder of prepared data holds examples, not a text."""
    return folder.parent.name == _KIND


def rows_of(spec: "RunSpec", examples: ExampleSet) -> Rows:
    """Return the examples of each row. Needs spec.finetune."""
    assert spec.finetune is not None, "only a run that finetunes has examples"
    if spec.finetune.packing == "none":
        return one_a_row(examples.num_examples)
    return pack(examples.example_lengths, spec.train.seq_len)


def steps_of_epochs(spec: "RunSpec", examples: ExampleSet) -> int | None:
    """Return the steps of finetune.epochs over the examples; None where the spec does not give them."""
    if spec.finetune is None or spec.finetune.epochs is None:
        return None
    settings = spec.finetune.rl
    if settings is not None:
        rollouts = max(1, math.ceil(spec.finetune.epochs * examples.num_examples / settings.prompts_per_step))
        return rollouts * settings.epochs * settings.minibatches
    return max(1, math.ceil(spec.finetune.epochs * len(rows_of(spec, examples)) / spec.train.global_batch_size))


def example_of(record: Record, encoder: ConversationEncoder, loss_on: Any) -> Example:
    """Return a record as tokens; DataError where the template can't write it."""
    origin = record.origin
    match record:
        case Conversation():
            return Example((encoder.conversation(record.turns, origin, loss_on),), origin)
        case Plain():
            return Example((encoder.plain(record.prompt, record.completion),), origin)
        case Pair():
            answers = (record.chosen, record.rejected)
            documents = tuple(
                encoder.conversation((*record.prompt, *answer), origin, first_turn=len(record.prompt))
                for answer in answers
            )
            return Example(documents, origin, record.margin or 0.0)
        case Rated():
            turns = (*record.prompt, *record.answer)
            document = encoder.conversation(turns, origin, first_turn=len(record.prompt))
            return Example((document,), origin, float(record.good))
        case Prompt():
            fields = json.dumps(dict(record.fields), ensure_ascii=False, default=str)
            return Example((encoder.prompt(record.turns, origin),), origin, fields=fields)


def tokenized(
    spec: "RunSpec", files: Sequence[Path], encoder: ConversationEncoder, account: ExampleAccount
) -> Iterable[Example]:
    """Yield the examples that fit the run's rows, and count the others in `account`. Needs spec.finetune."""
    assert spec.finetune is not None, "only a run that finetunes has examples"
    finetune, most = spec.finetune, spec.train.seq_len - _room_for_answers(spec)
    for record in read_examples(files, spec.data.format, finetune.method, account, spec.data.text_field):
        example = example_of(record, encoder, finetune.loss_on)
        if isinstance(record, Prompt):
            if example.num_tokens > most:
                account.note("long_prompt", record.origin)
                continue
        elif example.num_tokens > most:
            fitted = example.fitted(most, finetune.truncation)
            reason = "cut" if fitted is not None else "too_long" if finetune.truncation == "drop" else "nothing_left"
            account.note(reason, record.origin)
            if fitted is None:
                continue
            example = fitted
        account.used += 1
        yield example


def _room_for_answers(spec: "RunSpec") -> int:
    """Return the tokens of a row that answers need, which are sampled."""
    rl = spec.finetune.rl if spec.finetune is not None else None
    return 0 if rl is None else rl.max_new_tokens


def _build(
    folder: Path, spec: "RunSpec", files: Sequence[Path], encoder: ConversationEncoder, source: dict[str, Any]
) -> None:
    account = ExampleAccount()
    examples = list(tokenized(spec, files, encoder, account))
    account.check(spec.data.max_lost_fraction)
    if not examples:
        raise DataError(
            f"data.source has no example that can be used ({'; '.join(' '.join(row) for row in account.rows())}); "
            "name files with examples"
        )
    is_held_out = held_out_examples(examples, spec.data.held_out_fraction, spec.seed)
    tokenizer = encoder.tokenizer
    tokenizer.save(folder / "tokenizer.json")
    numbers = {str(path): number for number, path in enumerate(files)}
    dtype = dtype_for(tokenizer.vocab_size)
    splits = {
        name: write_split(
            folder,
            name,
            dtype,
            (each for each, held_out in zip(examples, is_held_out, strict=True) if held_out == (name == "held_out")),
            numbers,
        )
        for name in _SPLITS
    }
    ends = encoder.ends
    manifest = {
        "kind": _KIND,
        "format": _FORMAT,
        "dtype": dtype,
        "tokenizer": {"sha256": hash_file(folder / "tokenizer.json"), "vocab_size": tokenizer.vocab_size},
        "splits": splits,
        "account": account.record,
        "source": source,
        "held_out_fraction": spec.data.held_out_fraction,
        "end_of_turn": max(ends, key=ends.__getitem__) if ends else tokenizer.eot_id,
        "chat_template": None if encoder.template is None else encoder.template.source,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def held_out_examples(examples: Sequence[Example], fraction: float, seed: int) -> list[bool]:
    """Return whether each example is held out: those with the smallest hashes of (seed, prompt).

    Examples with the same prompt are on the same side, so that no answer of the training split is evaluated. With a
    fraction above 0 and two prompts both splits get at least one.
    """
    draws = np.array([_draw(example.documents[0], seed) for example in examples], dtype=np.uint64)
    distinct = np.unique(draws)
    if fraction == 0 or len(distinct) < 2:
        return [False] * len(examples)
    count = min(max(1, round(fraction * len(examples))), len(examples) - 1)
    most = np.sort(draws)[count - 1]
    chosen = draws <= min(most, distinct[-2])
    return [bool(each) for each in chosen]


def _draw(document: Document, seed: int) -> int:
    """Return a hash of what precedes the first learned token, or of all tokens where nothing does."""
    first = int(document.learned.argmax()) if document.num_learned else 0
    shown = document.tokens[:first] if first > 1 else document.tokens
    return int.from_bytes(hashlib.sha256(f"{seed} ".encode() + shown.tobytes()).digest()[:8], "little")
