"""A fastText model: its file checked to the last byte before fastText loads it, and texts as it takes them.

fastText's own loader believes what a file says: one that is cut short or made up ends the process, or reads memory that
is not its own.
"""

import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.files import DataError, unreadable
from trimaran.runtime.files import open_regular

_MAGIC, _VERSION, _SUPERVISED = 793712314, 12, 3
_LABEL_MARK: Final = "__label__"
_CENTROIDS: Final = 256
_ZIP = b"PK\x03\x04"
# A newline ends fastText's text, and so does its own word for the end of one.
_ENDS = re.compile(r"\n|</s>")


class Model(NamedTuple):
    """A loaded model.

    Attributes:
        fasttext: the object of the module fasttext.
        labels: what it tells apart, without __label__.
    """

    fasttext: Any
    labels: tuple[str, ...]

    def scores(self, text: str, count: int = -1) -> dict[str, float]:
        """Return the scores of the `count` likeliest labels of a text, -1 for all, the likeliest first."""
        names, scores = self.fasttext.predict(one_line(text), k=count)
        pairs = zip(names, scores, strict=True)
        return {name.removeprefix(_LABEL_MARK): min(float(score), 1.0) for name, score in pairs}


def load_model(path: Path) -> Model:
    """Return the supervised fastText model of a file.

    Raises:
        DataError: the file can't be read or is no such model, or a package is missing.
    """
    require_extra("fasttext")
    labels = read_labels(path)
    import fasttext

    try:
        return Model(fasttext.load_model(str(path)), labels)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise DataError(f"{path} can't be loaded by fastText: {error}; train or download the model again") from error


def one_line(text: str) -> str:
    """Return a text as fastText reads it to its end: without newlines, </s> and half surrogate pairs."""
    return _ENDS.sub(" ", text).encode("utf-8", "replace").decode("utf-8")


def read_labels(path: Path) -> tuple[str, ...]:
    """Return the labels of a supervised fastText model, without __label__; nothing of it is run.

    Raises:
        DataError: the file can't be read, is no such model, or has more or fewer bytes than it says.
    """
    try:
        with open_regular(path) as file:
            start = file.read(8)
            if start[:1] == b"\x80" or start.startswith(_ZIP):
                raise DataError(f"{path} is a pickle or an archive, which may run code; give a fastText model instead")
            if len(start) < 8 or struct.unpack("<i", start[:4])[0] != _MAGIC:
                raise DataError(f"{path} is no fastText model; give a .bin or .ftz file that fastText has saved")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _check(_Parser(content), path)
    except OSError as error:
        raise unreadable(path, error, "take it out of data.filter.classifiers") from error
    except (struct.error, UnicodeDecodeError, IndexError):
        raise DataError(f"{path} is a damaged fastText model; copy or download it again") from None


class _Parser:
    """Reads numbers and words of a file, one after the other."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place = content, 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self.content, self.place)
        self.skip(struct.calcsize(f"<{form}"))
        return found

    def skip(self, size: int) -> None:
        if size < 0 or self.place + size > len(self.content):
            raise IndexError
        self.place += size

    def entries(self, number: int) -> Iterator[tuple[bytes, int]]:
        """Yield the words of a dictionary, and whether each is a label."""
        for _ in range(number):
            end = self.content.find(b"\0", self.place)
            if end < 0:
                raise IndexError
            word = self.content[self.place : end]
            self.place = end + 1
            yield word, self.numbers("qb")[1]


def _check(file: _Parser, path: Path) -> tuple[str, ...]:
    """Follow a model to its end as FastText::loadModel of fastText 0.9 does."""
    _, version, dim, _, _, _, _, ngrams, _, kind, bucket, _, maxn, _, _ = file.numbers("14id")
    if version > _VERSION:
        raise DataError(f"{path} is of version {version} of fastText's files; versions to {_VERSION} are read")
    if kind != _SUPERVISED:
        raise DataError(f"{path} has word vectors and no labels; give a supervised fastText model")
    size, words, labels, _, pruned = file.numbers("3i2q")
    names = [word.decode("utf-8") for word, is_label in file.entries(size) if is_label]
    has_subwords = maxn != 0 or ngrams > 1  # fastText takes a negative maxn for a huge one
    subwords = _skip_pruned(file, pruned) if pruned >= 0 else bucket if has_subwords else 0
    is_quantized = file.numbers("?")[0]
    rows, columns = _skip_matrix(file, is_quantized)
    is_output_quantized = file.numbers("?")[0]
    output_rows, output_columns = _skip_matrix(file, is_quantized and is_output_quantized)
    fits = size == words + labels and len(names) == labels > 0 and labels == output_rows
    fits &= rows >= words + subwords and dim == columns == output_columns and bucket >= int(has_subwords)
    if not fits or file.place != len(file.content):
        raise IndexError
    return tuple(name.removeprefix(_LABEL_MARK) for name in names)


def _skip_pruned(file: _Parser, number: int) -> int:
    """Pass over the pairs of a subword and its row among those that were kept; return the number of rows."""
    start = file.place
    file.skip(8 * number)
    rows = np.frombuffer(file.content[start : file.place], "<i4")[1::2]
    if len(rows) and (rows.min() < 0 or rows.max() >= number):
        raise IndexError
    return number


def _skip_matrix(file: _Parser, is_quantized: bool) -> tuple[int, int]:
    """Pass over a matrix, plain or product-quantized; return its rows and columns."""
    has_norms = is_quantized and file.numbers("?")[0]
    rows, columns = file.numbers("2q")
    if rows < 0 or columns < 0:
        raise IndexError
    if not is_quantized:
        file.skip(4 * rows * columns)
        return rows, columns
    codes = file.numbers("i")[0]
    file.skip(codes)
    parts = _skip_quantizer(file, columns)
    if codes != rows * parts:
        raise IndexError
    if has_norms:
        file.skip(rows)
        _skip_quantizer(file, 1)
    return rows, columns


def _skip_quantizer(file: _Parser, columns: int) -> int:
    """Pass over a product quantizer of vectors of so many columns; return its number of parts."""
    dim, parts, width, last = file.numbers("4i")
    if dim != columns or min(parts, width, last) < 1 or (parts - 1) * width + last != dim:
        raise IndexError
    file.skip(4 * dim * _CENTROIDS)
    return int(parts)
