"""The step `spelling`: misspelt words of a list are corrected, outside code, addresses and names.

A word is corrected only if the list has it with one correction. Nothing is guessed by edit distance, which changes many
right words of technical text.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.files import DataError, unreadable
from trimaran.runtime.files import read_text

ENGLISH: Final = "english"
_WORD: Final = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_BETWEEN_COLUMNS: Final = re.compile(r"\s*(?:->|\t|,)\s*|\s+")
# The commonest English words that are rare in other languages: a sixth of English text.
_COMMON: Final = frozenset(
    ["the", "and", "to", "that", "with", "are", "this", "it", "as", "from", "not", "which", "you"]
)
_LEAST_COMMON: Final = 0.06
_SENTENCE_WORDS: Final = 8
_FENCE: Final = re.compile(r" {0,3}(```+|~~~+)")
_INDENTED: Final = re.compile(r"(?: {4}|\t)\s*\S")
_CODE_LINE: Final = re.compile(
    r"[;{}]\s*\Z|^\s*(?:[$%>]\s|>>>|\.\.\.\s|//|/\*|import\s|from\s+[\w.]+\s+import\s|def\s|class\s\w+[:(]|return\b)"
    r"|=>|->|::|==|!=|:=|\s=\s|\w\(\w*\)|</?\w+>"
)
# A word beside one of these in what stands between two spaces belongs to an address, a path, an option or a program.
_TECHNICAL: Final = re.compile(r"[/\\@_=<>{}\[\]|~^*#$%+&`\d]|\w[.:(]\w|\(\)|[^\W\d_A-Z][A-Z]|^\W*-|^[.:]\w")
_QUOTED: Final = re.compile(r"""(?:["'“”‘’«»„]\S+["'“”‘’«»])\W*""")
_LETTER_BEYOND_ASCII: Final = re.compile(r"[^\W\d_A-Za-z]")
_CLAUSE_END: Final = re.compile(r"""[.,;:!?()"“”]""")
_TO_SPACE: Final = re.compile(r"\S*\Z")
_FROM_SPACE: Final = re.compile(r"\A\S*")
_LOOKED_AT: Final = 200
_INLINE_CODE = r"(`+)(?!`).+?(?<!`)\1(?!`)"


class Spelling:
    """Corrects words in lower case.

    Args:
        words: ENGLISH for codespell's list, which is for English documents alone, or the path of a file.
    """

    name = "spelling"

    def __init__(self, words: str) -> None:
        self._english = words == ENGLISH
        self._corrections = codespell() if self._english else read_list(Path(words))

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Change `document` in place and return None."""
        words = _WORD.findall(document.text)
        wrong = self._corrections.keys() & words
        if not wrong or (self._english and not _is_english(document.language, words)):
            return None
        listed = "|".join(map(re.escape, sorted(wrong, key=len, reverse=True)))
        pattern = re.compile(rf"{_INLINE_CODE}|(?<![\w-])(?<!\w['’])(?P<word>{listed})(?![\w-]|['’]\w)")

        def correct(match: re.Match[str]) -> str:
            word = match["word"]
            if word is None or _is_technical(match) or (self._english and _is_foreign(match)):
                return match[0]
            counts["spelling.words"] += 1
            counts["spelling.characters"] += len(word)
            return self._corrections[word]

        lines = document.text.split("\n")
        for number in _prose(lines):
            if not self._english or _may_be_english(lines[number]):
                lines[number] = pattern.sub(correct, lines[number])
        text = "\n".join(lines)
        if text != document.text:
            counts["spelling.documents"] += 1
            document.text = text
        return None


def codespell() -> dict[str, str]:
    """Return the entries of codespell's dictionary that have one correction."""
    require_extra("codespell_lib")
    with as_file(files("codespell_lib") / "data" / "dictionary.txt") as path:
        lines = read_text(path).splitlines()
    # Several corrections, or a reason not to correct, come after a comma.
    return dict(line.split("->", 1) for line in lines if "," not in line)


def read_list(path: Path) -> Mapping[str, str]:
    """Return wrong word -> correction of a file of two columns, parted by `->`, a tab, a comma or spaces.

    Raises:
        DataError: it can't be read, or a line has something else, contradicts another, or corrects to a wrong word.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error, "name another in data.clean.spelling") from error
    corrections: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        word, _, right = _BETWEEN_COLUMNS.sub("\n", line.strip(), count=1).partition("\n")
        place = f"{path}, line {number}"
        if not right or not _WORD.fullmatch(word) or word != word.lower():
            raise DataError(f"{place}: {line[:80]!r} is no word in lower case and its correction; write teh -> the")
        if corrections.setdefault(word, right) != right:
            raise DataError(f"{place}: {word!r} is corrected to {corrections[word]!r} above; keep one of the two")
    for word, right in corrections.items():
        if wrong := corrections.keys() & _WORD.findall(right):
            raise DataError(f"{path}: {word!r} is corrected to {right!r}, but {min(wrong)!r} is listed as wrong itself")
    return corrections


def _is_english(language: str, words: Sequence[str]) -> bool:
    """Whether a document is English, as a step before has told or by its commonest words.

    The list has right words of other languages: `als`, `vor` and `ser` are German and Spanish.
    """
    return language == "en" if language else _seems_english(words)


def _seems_english(words: Sequence[str]) -> bool:
    return sum(word in _COMMON for word in words) >= _LEAST_COMMON * len(words)


def _may_be_english(line: str) -> bool:
    """Whether a line has its share of common English words, or is too short for one: quotations stay as they are."""
    words = _WORD.findall(line)
    return len(words) < _SENTENCE_WORDS or _seems_english(words)


def _is_foreign(match: re.Match[str]) -> bool:
    """Whether a clause has letters beyond ASCII, as a title in another language within an English sentence."""
    line, start, end = match.string, match.start(), match.end()
    before, after = line[max(0, start - _LOOKED_AT) : start], line[end : end + _LOOKED_AT]
    clause = _CLAUSE_END.split(before)[-1] + _CLAUSE_END.split(after)[0]
    return _LETTER_BEYOND_ASCII.search(clause) is not None


def _prose(lines: list[str]) -> list[int]:
    """Return the numbers of the lines that are no code: not between fences, indented, or with the signs of programs."""
    prose, fence, indented = [], "", False
    for number, line in enumerate(lines):
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not line.strip("`~ \t"):
                fence = ""
            continue
        if mark:
            fence = mark[1]
            continue
        blank_before = number == 0 or not lines[number - 1].strip()
        indented = _INDENTED.match(line) is not None and (indented or blank_before)
        if not indented and line.strip() and not _CODE_LINE.search(line):
            prose.append(number)
    return prose


def _is_technical(match: re.Match[str]) -> bool:
    """Whether what stands around a word, from space to space, is an address, a path, part of a program or quoted."""
    line, start, end = match.string, match.start(), match.end()
    before, after = line[max(0, start - _LOOKED_AT) : start], line[end : end + _LOOKED_AT]
    around = _TO_SPACE.findall(before)[0] + line[start:end] + _FROM_SPACE.findall(after)[0]
    return _TECHNICAL.search(around) is not None or _QUOTED.fullmatch(around) is not None
