"""Questions to which the author's own sentences are the answer. The word that is asked about is the author's too."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from trimaran.runtime.twin.casing import lower
from trimaran.runtime.twin.persona.examples import Example
from trimaran.runtime.twin.persona.paragraphs import Part, Words
from trimaran.runtime.twin.persona.phrases import Phrases
from trimaran.runtime.twin.persona.sentences import sentences_of

_WORD: Final = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_ASKS: Final = re.compile(r"\?[\"'”’»]*$")
_SHORTEST_WORD: Final = 4
_SHORTEST, _LONGEST_ANSWER = 40, 400
_MOST_SHARE: Final = 0.02
"""A word that more of the texts have says too little of what the answer shall be about."""
_WORDS_PER_QUESTION: Final = 120


def ask(texts: Sequence[Words], phrases: Phrases, language: str) -> Iterator[Example]:
    """Yield questions about words of the texts, about one for every 120 words, none twice.

    The word of a question is one that few of the texts have, as it stands in the sentence that the answer begins with.
    A question of the author's own that the author answers in the same paragraph is asked as it stands.

    Args:
        texts: paragraphs of narration, or what a character says.
    """
    have = Counter(word for words in texts for word in {lower(each, language) for each in _WORD.findall(words.text)})
    most = max(2, math.ceil(_MOST_SHARE * len(texts)))
    asked: set[str] = set()
    for words in texts:
        wanted = max(1, len(_WORD.findall(words.text)) // _WORDS_PER_QUESTION)
        sentences = _sentences(words)
        yield from _own_questions(sentences, words.keeps_lines)
        candidates = []
        for number, sentence in enumerate(sentences):
            answer = _answer(sentences[number:], words.keeps_lines)
            is_whole = sentence.raw.lstrip("\"'“‘«_(—–-").lstrip()[:1].isupper() and not _ASKS.search(sentence.raw)
            if is_whole and _SHORTEST <= len(answer.text) <= _LONGEST_ANSWER:
                rarest = _rarest(sentence, have, most, phrases, language)
                if rarest is not None:
                    candidates.append((rarest, answer))
        candidates.sort(key=lambda found: (have[lower(found[0].raw, language)], found[0].start))
        for part, answer in candidates:
            key = lower(part.raw, language)
            if wanted and key not in asked:
                asked.add(key)
                wanted -= 1
                template = phrases.about[_draw(key, len(phrases.about))]
                yield Example("question", answer, template.format(word=part.raw), Words((part,)))


def begin(chapter: str, words: Words, phrases: Phrases) -> Example:
    """Return the question how a chapter begins, with its first sentences as the answer."""
    return Example("question", words.head(_LONGEST_ANSWER), phrases.chapter.format(chapter=chapter))


def _sentences(words: Words) -> list[Part]:
    return [
        Part(part.passage, part.start + start, part.start + end)
        for part in words.parts
        for start, end in sentences_of(part.raw)
    ]


def _answer(sentences: Sequence[Part], keeps_lines: bool) -> Words:
    """Return a sentence, and those that follow as long as all are short together."""
    parts = [sentences[0]]
    for part in sentences[1:]:
        if part.end - parts[0].start > _LONGEST_ANSWER or part.passage.id != parts[0].passage.id:
            break
        parts.append(part)
    return Words(tuple(parts), keeps_lines)


def _own_questions(sentences: Sequence[Part], keeps_lines: bool) -> Iterator[Example]:
    for number, sentence in enumerate(sentences[:-1]):
        after = sentences[number + 1]
        is_answered = sentence.raw.endswith("?") and not after.raw.endswith("?")
        if is_answered and _SHORTEST // 2 <= len(sentence.raw) <= _LONGEST_ANSWER:
            answer = _answer(sentences[number + 1 :], keeps_lines)
            if _SHORTEST <= len(answer.text) <= _LONGEST_ANSWER:
                question = Words((sentence,), keeps_lines)
                yield Example("question", answer, question.text, question)


def _rarest(sentence: Part, have: Counter[str], most: int, phrases: Phrases, language: str) -> Part | None:
    """Return the rarest word of a sentence that more than one text has, else one of one text; no stop word."""
    best: tuple[tuple[bool, int, int], Part] | None = None
    for match in _WORD.finditer(sentence.raw):
        key = lower(match[0], language)
        count = have[key]
        is_name = match[0][0].isupper() and match.start() == 0
        if (
            len(key) < _SHORTEST_WORD
            or key in phrases.stop_words
            or count > most
            or is_name
            or "'" in key
            or "’" in key
        ):
            continue
        rank = (count == 1, count, -len(key))
        if best is None or rank < best[0]:
            best = (rank, Part(sentence.passage, sentence.start + match.start(), sentence.start + match.end()))
    return None if best is None else best[1]


def _draw(key: str, count: int) -> int:
    """Return a number below `count` that depends on a word alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % count
