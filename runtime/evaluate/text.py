"""Perplexity of texts: the windows of lm-eval's rolling likelihood; what a token, word, byte and character cost.

A window predicts each of its tokens from those before it in the window. The first begins with a prefix token
(begin-of-text, or end-of-text where there is none); each further one begins `stride` tokens later and predicts only
what no window before it has predicted.
"""

import bz2
import gzip
import hashlib
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from trimaran.models.fields import counted
from trimaran.runtime.data.corpus import check_is_text, check_nul
from trimaran.runtime.data.files import DataError
from trimaran.runtime.evaluate.answers import Answers
from trimaran.runtime.evaluate.bootstrap import standard_error
from trimaran.runtime.evaluate.engine.requests import Likelihood, LikelihoodScore, ScorerProtocol
from trimaran.runtime.evaluate.results import TEXT
from trimaran.runtime.files import parse_json, read_bytes
from trimaran.runtime.infer.sample_group import NotFiniteError

_MOST_BYTES: Final = 4 << 30
_UNPACK: Final[dict[str, Callable[[bytes], bytes]]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
_COUNTS: Final = {
    "nats_per_token": "tokens",
    "token_perplexity": "tokens",
    "word_perplexity": "words",
    "byte_perplexity": "num_bytes",
    "bits_per_byte": "num_bytes",
    "bits_per_character": "characters",
}
"""Measure of a text -> what its nats are divided by."""
OF_TOKENS: Final = frozenset(name for name, count in _COUNTS.items() if count == "tokens")
"""Measures of a text that depend on the tokenizer."""
_AHEAD, _AGREE = 48, 3  # characters that are searched for where two texts meet again, and that must be equal there


@dataclass(frozen=True)
class TextDocument:
    """A text that is scored on its own: a file, or a line of a .jsonl file.

    Args:
        name: the file, and the line where it has several.
    """

    name: str
    text: str

    @property
    def digest(self) -> str:
        """The sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Difference:
    """How a text differs from what its tokens decode to.

    Args:
        characters: of the text, that are missing or changed there.
        num_bytes: that these have in UTF-8.
        first: place of the first difference, in characters from 0.
    """

    characters: int
    num_bytes: int
    first: int


@dataclass(frozen=True)
class TextCounts:
    """What a text has, and what it costs a model.

    Args:
        nats: minus the log-likelihood of all tokens.
        words: as lm-eval counts them: pieces between white space.
    """

    nats: float
    tokens: int
    words: int
    num_bytes: int
    characters: int

    def __add__(self, other: "TextCounts") -> "TextCounts":
        return TextCounts(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.words + other.words,
            self.num_bytes + other.num_bytes,
            self.characters + other.characters,
        )

    def metrics(self) -> dict[str, float]:
        """Return the measures by name; those that lm-eval has are named as there."""
        bits = self.nats / math.log(2)
        return {
            "nats_per_token": self.nats / self.tokens,
            "token_perplexity": _exp(self.nats / self.tokens),
            "word_perplexity": _exp(self.nats / self.words),
            "byte_perplexity": _exp(self.nats / self.num_bytes),
            "bits_per_byte": bits / self.num_bytes,
            "bits_per_character": bits / self.characters,
        }


def read_documents(files: Sequence[Path]) -> list[TextDocument]:
    """Return the documents of UTF-8 files: a file is one, in a .jsonl file the field `text` of each line.

    Compressed ones (.gz, .bz2, .xz) are unpacked, and a byte order mark is removed. All else stays as it is.

    Raises:
        DataError: a file has no text, or it is not UTF-8; names the place.
        OSError: it can't be read.
    """
    return [document for path in files for document in _documents_of(path)]


def _documents_of(path: Path) -> Iterator[TextDocument]:
    text = _text_of(path)
    if path.name.removesuffix(path.suffix if path.suffix in _UNPACK else "").endswith(".jsonl"):
        places = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        documents = [TextDocument(place, _text_of_line(line, place)) for place, line in places]
    else:
        documents = [TextDocument(str(path), text)]
    for document in documents or [TextDocument(str(path), "")]:
        if not document.text:
            raise DataError(f"{document.name} has no text to score; give a text that has at least one character")
        yield document


def _text_of(path: Path) -> str:
    data = read_bytes(path, _MOST_BYTES)
    if path.suffix in _UNPACK:
        try:
            data = _UNPACK[path.suffix](data)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"{path} is not a whole {path.suffix} file ({error}); copy it again") from error
    check_is_text(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte {error.start:,} (0x{data[error.start]:02x}) is not UTF-8, and a replaced "
            "character would change the perplexity; convert the file to UTF-8"
        ) from error
    check_nul(path, text)
    return text


def _text_of_line(line: str, place: str) -> str:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON ({error}); write one JSON record a line") from error
    text = row.get(TEXT) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{place} must be a record whose field {TEXT} is a text; it is {line[:100]}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place} has half a surrogate pair, which is no character; write the whole pair") from error
    return text


def rolling_windows(
    tokens: Sequence[int], prefix: int, max_seq_len: int, stride: int | None = None
) -> Iterator[Likelihood]:
    """Yield the windows that predict each token once, as lm-eval's `get_rolling_token_windows` cuts them.

    A last window that has less than `stride` tokens to predict begins earlier, so that it is full.

    Args:
        prefix: token before the first.
        stride: tokens that each further window predicts, from 1 to max_seq_len; None for max_seq_len, which makes the
            windows disjoint.
    """
    stride = max_seq_len if stride is None else stride
    whole, first = [prefix, *tokens], min(max_seq_len, len(tokens))
    if tokens:
        yield Likelihood((prefix,), tuple(tokens[:first]))
    for start in range(first, len(tokens), stride):
        end = min(start + stride, len(tokens))
        yield Likelihood(tuple(whole[end - max_seq_len : start + 1]), tuple(tokens[start:end]))


def score_texts(
    texts: Sequence[tuple[TextDocument, Sequence[int]]],
    scorer: ScorerProtocol,
    prefix: int,
    max_seq_len: int,
    stride: int | None = None,
    answers: Answers | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[TextCounts]:
    """Return what each document costs the model of `scorer`.

    Args:
        texts: documents with their tokens.
        prefix: token before the first of each.
        stride: as for `rolling_windows`.
        answers: the journal of windows that are scored already.
        progress: called with (windows scored, of how many).

    Raises:
        NotFiniteError: the logits of a window are not finite; names the document.
    """
    windows = [list(rolling_windows(tokens, prefix, max_seq_len, stride)) for _, tokens in texts]
    names = [document.name for (document, _), each in zip(texts, windows, strict=True) for _ in each]
    scores = iter(_scores([window for each in windows for window in each], names, scorer, answers, progress))
    return [
        TextCounts(
            -math.fsum(islice(scores, len(each))),
            len(tokens),
            len(re.split(r"\s+", document.text)),
            len(document.text.encode()),
            len(document.text),
        )
        for (document, tokens), each in zip(texts, windows, strict=True)
    ]


def _scores(
    windows: Sequence[Likelihood],
    names: Sequence[str],
    scorer: ScorerProtocol,
    answers: Answers | None,
    progress: Callable[[int, int], None],
) -> list[float]:
    """Return the log-likelihood of each window; those in the journal are not asked again."""
    journal = Answers(None, "") if answers is None else answers
    keys = [journal.key(window) for window in windows]
    asked = [number for number, key in enumerate(keys) if journal.get(key) is None]
    done = len(windows) - len(asked)

    def take(number: int, score: LikelihoodScore) -> None:
        nonlocal done
        journal.put(keys[asked[number]], score)
        done += 1
        progress(done, len(windows))

    try:
        scorer.likelihoods([windows[number] for number in asked], take)
    except NotFiniteError as error:
        name = names[asked[error.request]] if error.request is not None else "a text"
        raise NotFiniteError(
            f"{name}: the logits are infinite or NaN, so its perplexity would mean nothing; take an earlier checkpoint "
            "of the run, from before it diverged"
        ) from error
    finally:
        journal.write()
    found = [journal.get(key) for key in keys]
    scores = [score.log_likelihood for score in found if isinstance(score, LikelihoodScore)]
    assert len(scores) == len(windows), "the scorer tells every score as it arrives"
    return scores


def text_results(
    documents: Sequence[TextDocument], counts: Sequence[TextCounts], stride: int | None, max_seq_len: int
) -> dict[str, Any]:
    """Return the results of `--text` as lm-eval's schema has those of a task, with its samples."""
    total = sum(counts[1:], counts[0])
    samples = [
        {
            "doc_id": number,
            "doc": {"name": document.name} | asdict(each),
            "target": "",
            "filter": "none",
            "metrics": list(_COUNTS),
            **dict.fromkeys(("doc_hash", "target_hash"), document.digest),
            "prompt_hash": "",
            **{name: [-each.nats, getattr(each, count)] for name, count in _COUNTS.items()},
        }
        for number, (document, each) in enumerate(zip(documents, counts, strict=True))
    ]
    row: dict[str, Any] = {"name": TEXT, "alias": TEXT, "sample_len": len(documents)}
    for name, value in total.metrics().items():
        row[f"{name},none"] = value
        row[f"{name}_stderr,none"] = standard_error(name, [sample[name] for sample in samples])
    config = {
        "task": TEXT,
        "output_type": "loglikelihood_rolling",
        "stride": max_seq_len if stride is None else stride,
        "max_seq_len": max_seq_len,
    }
    return {
        "results": {TEXT: row},
        "group_subtasks": {},
        "configs": {TEXT: config},
        "versions": {TEXT: 1},
        "n-shot": {TEXT: 0},
        "higher_is_better": {TEXT: dict.fromkeys(_COUNTS, False)},
        "n-samples": {TEXT: {"original": len(documents), "effective": len(documents)}},
        "samples": {TEXT: samples},
    }


def check_stride(stride: int | None, max_seq_len: int) -> None:
    """Raise ValueError for a stride that leaves tokens out."""
    if stride is not None and not 1 <= stride <= max_seq_len:
        raise ValueError(
            f"--stride ({stride}) must be from 1 to the model's context of {max_seq_len} tokens (model.max_seq_len), "
            "or tokens would be left out"
        )


def check_tokens(document: TextDocument, tokens: Sequence[int], vocab_size: int) -> None:
    """Raise DataError where a document has no tokens, or has some that the model does not know."""
    if not tokens:
        raise DataError(f"{document.name}: the tokenizer makes no token of this text; leave the document out")
    if max(tokens) >= vocab_size:
        raise DataError(
            f"{document.name} has the token {max(tokens)}, and the model's vocabulary has {vocab_size}; its tokenizer "
            "is not this one"
        )


def difference(text: str, decoded: str) -> Difference | None:
    """Return how `decoded` differs from the text that was encoded; None where they are equal.

    Where they part, they meet again at the nearest place where a few characters are equal. Linear in their length.
    """
    if text == decoded:
        return None
    i = j = characters = num_bytes = 0
    first = -1
    while i < len(text):
        if j < len(decoded) and text[i] == decoded[j]:
            i, j = i + 1, j + 1
            continue
        first = i if first < 0 else first
        skip, other = _meeting(text, i, decoded, j)
        characters, num_bytes = characters + skip, num_bytes + len(text[i : i + skip].encode())
        i, j = i + skip, j + other
    return Difference(characters, num_bytes, len(text) if first < 0 else first)


def _meeting(text: str, i: int, decoded: str, j: int) -> tuple[int, int]:
    """Return how many characters to pass over in each of the two texts until they agree again."""
    best = (min(_AHEAD, len(text) - i), min(_AHEAD, len(decoded) - j))
    for skip in range(best[0] + 1):
        here = text[i + skip : i + skip + _AGREE]
        at = decoded.find(here, j, j + _AHEAD + _AGREE) if here else len(decoded)
        if at >= 0 and at - j <= _AHEAD and skip + at - j < sum(best):
            best = (skip, at - j)
    return best


def describe_difference(document: TextDocument, found: Difference) -> str:
    """Return a sentence about a text that its tokens don't hold as it is."""
    before = document.text[: found.first]
    line, column = before.count("\n") + 1, found.first - (before.rfind("\n") + 1) + 1
    lost = (
        f"{counted(found.characters, 'character')} ({counted(found.num_bytes, 'byte')}) of {len(document.text):,} "
        "differ"
        if found.characters
        else "characters are added"
    )
    return (
        f"{document.name}: the tokenizer does not return this text as it is: {lost}, first at line {line}, column "
        f"{column}; words, bytes and characters are counted in the text, so compare figures only between models of "
        "this tokenizer"
    )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
