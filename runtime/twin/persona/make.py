"""The examples of a twin out of its passages: what a character says, what an author writes, no word of it invented."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.persona.examples import Example, Kind, Persona
from trimaran.runtime.twin.persona.names import labels_of, tokens_of
from trimaran.runtime.twin.persona.paragraphs import Paragraph, Part, Utterance, Words, joined, stretches
from trimaran.runtime.twin.persona.phrases import Phrases, phrases_of
from trimaran.runtime.twin.persona.plays import Directions, Play
from trimaran.runtime.twin.persona.prose import Prose
from trimaran.runtime.twin.persona.questions import ask, begin

_MOST_SAID = 1200
"""Characters of an answer: about 300 tokens, so that a pair goes into a row of 512."""
_MOST_BEFORE = 600
_SHORTEST_CONTINUED = 240
_LEAST_LETTERS = 2


@dataclass
class Spoken:
    """What is spoken in the texts.

    Args:
        scenes: utterances in their order; none of a scene answers one of another.
        narration: paragraphs in which nobody speaks.
        directions: what the plays hold beside.
    """

    scenes: list[list[Utterance]]
    narration: list[Paragraph]
    directions: Directions

    @property
    def labels(self) -> Counter[str]:
        """How often each speaker, as the texts write them, speaks alone."""
        return Counter(each.speakers[0] for scene in self.scenes for each in scene if len(each.speakers) == 1)


def read_spoken(passages: Sequence[Passage], language: str, character: str | None = None) -> Spoken:
    """Return what is spoken in the passages that are not held out, each work read in its own form.

    Args:
        character: whose name may stand abbreviated in a play.
    """
    spoken = Spoken([], [], Directions())
    for _, group in groupby(sorted(passages, key=lambda each: (each.work, each.start)), key=lambda each: each.work):
        parts = list(stretches(list(group)))
        paragraphs = [paragraph for stretch in parts for paragraph in stretch]
        play = Play.find(paragraphs, language, character)
        prose = None if play is not None else Prose.find(paragraphs, language)
        scenes: list[list[Utterance]] = []
        for stretch in parts:
            if play is not None:
                scenes += play.scenes(stretch, spoken.directions)
            elif prose is not None:
                scenes += prose.scenes(stretch)
        if play is None:
            said = {(part.passage.id, part.start) for scene in scenes for each in scene for part in each.words.parts}
            spoken.narration += [each for each in paragraphs if not _speaks(each, said)]
        spoken.scenes += [scene for scene in scenes if scene]
    return spoken


def make_persona(passages: Sequence[Passage], character: str | None, language: str, *, talks: bool = True) -> Persona:
    """Return the examples of a twin.

    Args:
        passages: all of the twin; those held out give no example, neither an answer nor what is answered.
        character: whose voice it is; None for the author's.
        language: of the texts, which the questions are asked in.
        talks: whether the model takes turns; else it gets the passages as texts to continue.

    Raises:
        UnknownCharacter: nobody of that name speaks in the passages.
    """
    persona = Persona(language)
    used = [each for each in passages if not each.is_held_out]
    persona.count("passages held out", len(passages) - len(used))
    phrases = phrases_of(language)
    if character is not None:
        found = _works_naming(used, character, language)
        persona.count("works that do not name the character", len({each.work for each in used}) - len(found))
        used = [each for each in used if each.work in found]
        passages = [each for each in passages if each.work in found]
    spoken = read_spoken(passages, language, character)
    for reason, number in vars(spoken.directions).items():
        persona.count(reason.replace("_", " "), number)
    if not talks:
        if character is not None:
            labels_of(character, spoken.labels, language)
        persona.examples += [Example("text", Words((_whole(each),), keeps_lines=True)) for each in used]
    elif character is None:
        persona.examples += _of_author(spoken, used, phrases, language)
    else:
        labels = labels_of(character, spoken.labels, language)
        persona.count("speaker not told", sum(not each.speakers for scene in spoken.scenes for each in scene))
        persona.examples += _of_character(spoken, labels, phrases, persona)
    return persona


def _works_naming(passages: Sequence[Passage], character: str, language: str) -> set[int]:
    """Return the works that have a full name of several words as it stands, all works where none has it.

    Elizabeth of another novel is not Elizabeth Bennet.
    """
    works = {each.work for each in passages}
    wanted = f" {' '.join(tokens_of(character, language))} "
    naming = {each.work for each in passages if wanted in f" {' '.join(tokens_of(each.text, language))} "}
    return naming if naming and len(wanted.split()) > 1 else works


def _of_author(spoken: Spoken, passages: Sequence[Passage], phrases: Phrases, language: str) -> Iterator[Example]:
    """Yield what the author's voice is learned from: the narration, or in a play what all its people say."""
    texts = [Words((_part(paragraph),), keeps_lines="\n" in paragraph.text) for paragraph in spoken.narration]
    if not texts:
        texts = [each.words for scene in spoken.scenes for each in scene]
    yield from ask(texts, phrases, language)
    chapter: tuple[int, str] | None = None
    for passage in passages:
        if (passage.work, passage.chapter) != chapter and passage.chapter:
            chapter = (passage.work, passage.chapter)
            yield begin(passage.chapter, Words((_whole(passage),), keeps_lines=True), phrases)
        yield from _continued(Words((_whole(passage),), keeps_lines=True), phrases)


def _of_character(spoken: Spoken, labels: set[str], phrases: Phrases, persona: Persona) -> Iterator[Example]:
    """Yield what a character's voice is learned from: every answer is what the character alone says or thinks."""
    own: list[Words] = []
    for scene in spoken.scenes:
        before: Utterance | None = None
        for utterance in _merged(scene):
            if not labels.intersection(utterance.speakers):
                before = utterance
                continue
            if len(utterance.speakers) > 1:
                persona.count("said together with others")
                before = utterance
                continue
            own.append(utterance.words)
            kind: Kind = "thought" if utterance.kind == "thought" else "dialogue"
            persona.count("turns of the character")
            if before is None:
                persona.count("nothing is said before")
            elif sum(map(str.isalpha, utterance.text)) >= _LEAST_LETTERS:
                answer, question = utterance.words.head(_MOST_SAID), before.words.tail(_MOST_BEFORE)
                persona.count("answers cut to their first sentences", answer.text != utterance.text)
                yield Example(kind, answer, question.text, question)
            before = None
    for words in own:
        yield from _continued(words, phrases)
    yield from ask(own, phrases, persona.language)


def _merged(scene: Sequence[Utterance]) -> Iterator[Utterance]:
    """Yield the turns of a scene: what one speaker says on after a stage direction, or a page, is one turn."""
    last: Utterance | None = None
    for utterance in scene:
        is_same = last is not None and last.speakers == utterance.speakers and last.kind == utterance.kind
        if last is not None and is_same and utterance.speakers:
            words = replace(last.words, parts=joined((*last.words.parts, *utterance.words.parts)))
            last = replace(last, words=words)
            continue
        if last is not None:
            yield last
        last = utterance
    if last is not None:
        yield last


def _continued(words: Words, phrases: Phrases) -> Iterator[Example]:
    """Yield the first part of a text as a question, and what follows as its answer, where both are long enough."""
    text = words.text
    if len(text) < _SHORTEST_CONTINUED:
        return
    question = words.head(min(len(text) // 2, _MOST_BEFORE))
    last = question.parts[-1]
    rest = [
        replace(part, start=max(part.start, last.end)) if part.passage.id == last.passage.id else part
        for part in words.parts
        if (part.passage.id, part.end) > (last.passage.id, last.end)
    ]
    answer = Words(tuple(rest), words.keeps_lines).head(_MOST_SAID)
    if len(answer.text) >= _SHORTEST_CONTINUED // 3:
        yield Example("continuation", answer, phrases.go_on.format(text=question.text), question)


def _speaks(paragraph: Paragraph, said: set[tuple[int, int]]) -> bool:
    end = paragraph.start + len(paragraph.text)
    return any(number == paragraph.passage.id and paragraph.start <= start < end for number, start in said)


def _part(paragraph: Paragraph) -> Part:
    return Part(paragraph.passage, paragraph.start, paragraph.start + len(paragraph.text))


def _whole(passage: Passage) -> Part:
    return Part(passage, passage.start, passage.end)
