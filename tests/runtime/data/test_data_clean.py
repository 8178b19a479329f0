"""Each step of cleaning changes what it is for, leaves the rest as it is, and counts what it changes."""

import gzip
import json
import re
import runpy
import sys
import time
from collections import Counter
from functools import cache
from html import escape
from pathlib import Path

import pytest
from emoji import EMOJI_DATA, STATUS
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trimaran.runtime.data import extras
from trimaran.runtime.data.clean.emoji import Emoji
from trimaran.runtime.data.clean.encoding import RepairEncoding, _gate
from trimaran.runtime.data.clean.html import HtmlToText
from trimaran.runtime.data.clean.pii import KINDS, Pii, is_card, is_iban
from trimaran.runtime.data.clean.spelling import ENGLISH, Spelling, codespell, read_list
from trimaran.runtime.data.clean.steps import clean_steps
from trimaran.runtime.data.clean.unicode import Unicode
from trimaran.runtime.data.document import Counts, Document, Removal, Step
from trimaran.runtime.data.files import DataError
from trimaran.runtime.spec.sections.recipe.clean import CleanSection

ROOT = Path(__file__).parents[3]
TURKISH = (
    "Türkiye'nin en kalabalık şehri İstanbul’dur. “Çığ düşmesi”, KAHRAMANMARAŞ’TA ağaç, şoför, kâğıt; Beşiktaş’ta maç "
    "– 25 °C, 5 €… GÜNEŞ™, İŞ’in SONUÇ¹ ve BARIŞ² dipnotu, yarım BEŞ½, «ÇİĞ®»"
)
english = cache(lambda: Spelling(ENGLISH))
listed = cache(codespell)
all_steps = cache(lambda: clean_steps(CleanSection(emoji="remove", spelling=ENGLISH)))
names, removes, masks = Emoji("name"), Emoji("remove"), Pii(list(KINDS))


def run(step: Step, text: str, language: str = "") -> tuple[str, Counts]:
    """The text after a step, and its counts."""
    document, counts = Document("c/f#0", text=text, language=language), Counts()
    assert step(document, counts) is None
    return document.text, counts


def page(raw: bytes, charset: str = "", step: HtmlToText | None = None) -> tuple[str, Counts] | Removal:
    """The text of a page and the counts, or why it is removed."""
    document, counts = Document("c/f#0", raw=raw, charset=charset), Counts()
    removal = (step or HtmlToText("main"))(document, counts)
    if removal is not None:
        assert not counts
        assert document.raw == raw
        return removal
    assert not document.raw
    return document.text, counts


def stays(step: Step, text: str) -> bool:
    """Whether a step leaves a text as it is, without a copy and without a count."""
    after, counts = run(step, text)
    return after is text and not counts


# Of settings


def test_steps_stand_in_their_order_and_each_has_its_switch() -> None:
    everything = CleanSection(emoji="remove", spelling=ENGLISH)
    assert [step.name for step in clean_steps(everything)] == list(CleanSection.model_fields)
    nothing = CleanSection(repair_encoding=False, unicode=False, pii=False)
    assert [step.name for step in clean_steps(nothing)] == ["html"]
    some = clean_steps(CleanSection(repair_encoding=False, unicode=False, pii=["card"]))
    assert run(some[1], "a@b.com 4111 1111 1111 1111")[0] == "a@b.com <CARD>"


@pytest.mark.parametrize("pii", [[], ["email", "email"], ["name"], "email", 1])
def test_kinds_of_personal_data_are_named_once_each(pii: object) -> None:
    with pytest.raises(ValidationError):
        CleanSection.model_validate({"pii": pii})


def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for settings, package in (({}, "ftfy"), ({"emoji": "name"}, "emoji"), ({"spelling": ENGLISH}, "codespell_lib")):
        chosen = CleanSection.model_validate({"repair_encoding": package == "ftfy", **settings})
        with pytest.raises(DataError, match=re.escape(f"this needs {package}; run pip install 'trimaran[data]'")):
            clean_steps(chosen)
    with pytest.raises(DataError, match="resiliparse"):
        page(b"<p>x")
    assert stays(HtmlToText("main"), "text that was no page needs no package")


# Of pages

PAGE = "<html><head><meta charset={}></head><body><p>Çığ düşmesi; İstanbul’da yağmur yağıyor, şoför ağaç dikti.</p>"
SEEN = "Çığ düşmesi; İstanbul’da yağmur yağıyor, şoför ağaç dikti."


@pytest.mark.parametrize(
    ("encoding", "in_page", "header", "wrong"),
    [
        ("utf-8", "utf-8", "utf-8", 0),
        ("utf-8", "", "", 0),
        ("utf-8", "iso-8859-9", "iso-8859-1", 1),
        ("cp1254", "iso-8859-9", "", 0),
        ("cp1254", "", "ISO-8859-9", 0),
        ("cp1254", "utf-8", "windows-1254", 0),
        ("cp1254", "utf-8", "utf-8", 1),
        ("cp1254", "", "no-such-charset", 0),
        ("utf-16", "", "", 0),
        ("utf-16-le", "", "", 0),
        ("utf-16-be", "utf-16", "utf-8", 1),
        ("utf-8-sig", "windows-1254", "", 0),
    ],
)
def test_the_charset_is_that_of_the_bytes_then_of_the_header_then_of_the_page(
    encoding: str, in_page: str, header: str, wrong: int
) -> None:
    result = page(PAGE.format(in_page).encode(encoding), header)
    assert result[0] == SEEN
    assert isinstance(result, tuple)
    assert Counter(result[1])["html.wrong_charset"] == wrong
    assert not Counter(result[1])["html.not_readable"]


@pytest.mark.parametrize(
    ("encoding", "label", "text"),
    [
        ("cp932", "shift_jis", "文字コードのテストです①"),
        ("iso2022_jp", "iso-2022-jp", "文字コードのテスト"),
        ("euc_jp", "", "日本語の文字コードのテストです。"),
        ("gb18030", "gb2312", "中文文本测试，编码检测。€"),
        ("cp1251", "", "Привет мир, это русский текст"),
        ("cp949", "euc-kr", "한국어 텍스트 뷁"),
    ],
)
def test_charsets_of_other_scripts_are_read_in_their_wider_form(encoding: str, label: str, text: str) -> None:
    assert page(f"<html><meta charset='{label}'><p>{text}".encode(encoding))[0] == text


def test_bytes_that_cannot_be_read_are_replaced_and_counted() -> None:
    raw = PAGE.format("utf-8").encode()
    cut = page(raw[:120] + b"\xff" + raw[120:] + "ş".encode()[:1], "utf-8")
    assert isinstance(cut, tuple)
    assert cut[0].replace("\ufffd", "") == SEEN
    assert cut[1]["html.not_readable"] == 2


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "html.binary"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "html.binary"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "html.binary"),
        (bytes(range(256)) * 64, "html.binary"),
        (b"<p>" + b"\x01" * 99, "html.binary"),
        (b'{"html": "<html><p>x</p>"}', "html.not_html"),
        (b"plain text, 1 < 2", "html.not_html"),
        (b"<?xml version='1.0'?><rss><channel/></rss>", "html.not_html"),
        (b"body { color: red }", "html.not_html"),
        (b"<!-- a -->" * 40_000 + b"x", "html.not_html"),
        (b"<html><head><title>x</title></head><body> </body></html>", "html.no_text"),
        (b"<html>" + b"<div>" * 100_000 + b"deep" + b"</div>" * 100_000, "html.too_deep"),
        (b"<html>" + b"<table><tr><td>" * 100_000, "html.too_deep"),
    ],
)
def test_what_is_no_page_is_removed_with_its_reason(raw: bytes, reason: str) -> None:
    removal = page(raw)
    assert isinstance(removal, Removal)
    assert removal.reason == reason
    assert removal.detail


def test_depth_is_that_of_tags_within_tags_and_not_their_number() -> None:
    text, _ = page(b"<html><body>" + b"<div><p>word</p></div>" * 2000)
    assert text.count("word") == 2000
    assert page(b"<html><body>" + b"<div>" * 500 + b"<p>deep enough")[0] == "deep enough"


def test_a_panic_of_the_parser_removes_one_page(monkeypatch: pytest.MonkeyPatch) -> None:
    panic = type("PanicException", (BaseException,), {})

    def fails(*_: object, **__: object) -> str:
        raise panic("index out of bounds")

    monkeypatch.setattr("resiliparse.extract.html2text.extract_plain_text", fails)
    assert page(b"<html><p>x") == Removal("html.failed", "PanicException: index out of bounds")


def test_main_content_or_all() -> None:
    menu = b"<html><body><nav><ul><li><a href=/>Home</a></ul></nav><main><p>The text of the page.</p></main>"
    menu += b"<img src=x alt='A boat'><footer>Imprint</footer>"
    assert page(menu)[0] == "The text of the page."
    text, counts = page(menu, step=HtmlToText("all"))
    assert all(part in text for part in ("Home", "The text of the page.", "A boat", "Imprint"))
    assert counts == {"html.documents": 1, "html.bytes": len(menu), "html.characters": len(text)}


def test_real_pages_become_text_and_cleaning_it_again_changes_nothing() -> None:
    found = [folder / "shared/data/html-sample/pages.jsonl.gz" for folder in (ROOT, ROOT.parent)]
    sample = next((path for path in found if path.exists()), None)
    if sample is None:  # this project's own pages
        texts = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
        body = {name: "".join(f"<p>{escape(part)}</p>" for part in text.split("\n\n")) for name, text in texts.items()}
        pages = [{"id": name, "html": f"<html><body>{each}</body></html>"} for name, each in body.items()]
    else:
        with gzip.open(sample, "rt", encoding="utf-8") as file:
            pages = [json.loads(line) for line in file][::24]
    steps = clean_steps(CleanSection(emoji="name", spelling=ENGLISH))
    counts = Counts()
    for row in pages:
        document = Document(row["id"], raw=row["html"].encode(), charset="utf-8")
        assert [step(document, counts) for step in steps] == [None] * len(steps)
        text, again = document.text, Counts()
        assert [step(document, again) for step in steps] == [None] * len(steps)
        assert document.text is text
        assert not again
    assert counts["html.documents"] == len(pages) > 10
    assert not counts["html.wrong_charset"]
    assert not counts["pii.phone"] + counts["pii.card"] + counts["pii.iban"], "these books have none"
    print(dict(counts))


# Of encodings


@pytest.mark.parametrize("encoding", ["latin-1", "sloppy-windows-1252", "sloppy-windows-1254", "iso-8859-9"])
def test_turkish_that_was_decoded_wrong_is_restored(encoding: str) -> None:
    text = TURKISH.partition("GÜNEŞ™")[0]
    damaged = text.encode().decode(encoding)
    restored, counts = run(RepairEncoding(), f"{damaged}\n{damaged}")
    assert restored == f"{text}\n{text}"
    assert counts["repair_encoding.documents"] == 1
    gone = Counter(f"{damaged}\n{damaged}") - Counter(restored)
    assert counts["repair_encoding.characters"] == gone.total() > 20
    twice = text.encode().decode("latin-1").encode().decode("latin-1")
    assert run(RepairEncoding(), twice)[0] == text


@pytest.mark.parametrize(
    "text",
    [
        TURKISH,
        "plain text",
        "Où êtes-vous allé ? C’est « l’été », cœur, Œuvre, NESCAFÉ® à 5 €",
        "Größe: 10 µm ± 2 × 3, §§ 5–7, STRAßE",
        "Привет «мир», №5 — в «ВГРС»",
        "Ελληνικά «ναι»",
        "NÃO, AÇÃO, Ângela",
        "日本語テキスト、½ と €",
        "Çok GÜZEL° ve 25 ²",
    ],
)
def test_clean_text_is_left_as_it_is(text: str) -> None:
    for each in (text, f"{text}\n日本語\n{text}"):
        assert run(RepairEncoding(), each) == (each, {})


def test_turkish_that_was_read_as_latin_1_gets_its_six_letters() -> None:
    text = "Şişli'de yağmur yağdı ve ağaçlar için çok güzel bir gün oldu; İstanbul'un ışığı gibi."
    damaged = text.encode("cp1254").decode("cp1252")
    assert "Ý" in damaged
    assert "þ" in damaged
    gone = Counter(damaged) - Counter(text)
    assert run(RepairEncoding(), damaged) == (
        text,
        {"repair_encoding.documents": 1, "repair_encoding.characters": gone.total()},
    )
    for clean in (
        "Það er gott að vera í góðu veðri og þú ert hér með mér, en bir er ekki orð.",
        "Dobrý den, krásný dům stojí ve městě a velký pes spí ve stínu.",
        "Sir Gawain and þe Grene Knyȝt, for his auntes ben Þor and Óðinn",
        f"{damaged} ğ",
    ):
        assert run(RepairEncoding(), clean) == (clean, {})


def test_windows_1252_read_as_latin_1_is_found_in_the_whole_document() -> None:
    text = "It’s a “test” – of 25 €…\nplain line\n" * 3
    assert run(RepairEncoding(), text.encode("cp1252").decode("latin-1"))[0] == text
    beside = "It\x92s fine. \x93Ä°stanbul\x94 日本語"
    assert run(RepairEncoding(), beside)[0] == "It’s fine. “İstanbul” 日本語"


ODD = "".join(
    character
    for codes in (range(0x80, 0x2600), (0xFB01, 0xFB02, 0xF8FF, 0xFFFD))
    for character in map(chr, codes)
    if re.match("[" + "".join(MOJIBAKE_CATEGORIES.values()) + "ŒœВГРСβā€]", character)
)


@given(st.text(st.sampled_from(ODD + "aZ. \n,"), min_size=1, max_size=6))
def test_the_gate_passes_all_that_ftfy_finds(text: str) -> None:
    assert _gate_once().search(text) is not None or not is_bad(text)


_gate_once = cache(_gate)
_repair = cache(RepairEncoding)


@given(st.text(st.sampled_from(ODD + "aZ. \nÇĞİŞÜÖ¹²½"), max_size=12))
def test_repair_of_repaired_text_changes_nothing(text: str) -> None:
    once, counts = run(_repair(), text)
    assert run(_repair(), once) == (once, {})
    assert (once != text) == (counts["repair_encoding.documents"] == 1)


# Of Unicode


@pytest.mark.parametrize(
    ("text", "after", "counted"),
    [
        ("a\r\nb\rc\u2028d\x0ce", "a\nb\nc\nd\ne", {"line_ends": 4}),
        ("Cafe\u0301 \u212b", "Café Å", {"not_nfc": 3}),
        ("\ud83d\ude00 \ud800x", "😀 \ufffdx", {"surrogates": 3}),
        ("\ufeffzero\u200bwidth so\xadft", "zerowidth soft", {"invisible": 3}),
        ("bell\x07 \x00\x1b[0m \x9d", "bell [0m ", {"controls": 4}),
        ("e\u200b\u0301", "é", {"invisible": 1, "not_nfc": 2}),
    ],
)
def test_one_form_for_each_character_and_nothing_without_a_look(text: str, after: str, counted: dict[str, int]) -> None:
    assert run(Unicode(), text) == (after, {"unicode.documents": 1} | {f"unicode.{k}": n for k, n in counted.items()})


@pytest.mark.parametrize("text", ["tab\tline\n", "ไทย\u200bไทย", "می\u200cخواهم 👩\u200d🔬", "\u200fעברית", "ﬁ ² Ⅷ"])
def test_what_shapes_words_and_compatible_forms_stay(text: str) -> None:
    assert stays(Unicode(), text)


@given(st.text(st.one_of(st.characters(codec=None), st.sampled_from("\r\n\u200b\u0301\xad\ufeff\u0e01\ud800\udc00e"))))
def test_cleaned_unicode_is_nfc_encodable_and_stays(text: str) -> None:
    once, counts = run(Unicode(), text)
    once.encode()
    assert stays(Unicode(), once)
    assert (once != text) == (counts["unicode.documents"] == 1)


# Of emoji


@pytest.mark.parametrize(
    ("text", "named", "removed", "found"),
    [
        ("a 😀 b", "a :grinning_face: b", "a b", 1),
        ("😀 b", ":grinning_face: b", "b", 1),
        ("a 😀\nb", "a :grinning_face:\nb", "a\nb", 1),
        ("so😀good", "so:grinning_face:good", "so good", 1),
        ("so 👍🏽!", "so :thumbs_up_medium_skin_tone:!", "so!", 1),
        ("👨‍👩‍👧‍👦", ":family_man_woman_girl_boy:", "", 1),
        ("🏃‍♂ 🏃‍♂️", ":man_running: :man_running:", "", 2),
        ("🇹🇷🇩🇪 🇦🇦", ":Türkiye::Germany: 🇦🇦", "🇦🇦", 2),
        ("🏴󠁧󠁢󠁥󠁮󠁧󠁿", ":England:", "", 1),
        ("©️ 1️⃣ ❤️ ☝🏽", ":copyright: :keycap_1: :red_heart: :index_pointing_up_medium_skin_tone:", "", 4),
    ],
)
def test_emoji_are_named_or_removed_whole(text: str, named: str, removed: str, found: int) -> None:
    for step, after in ((names, named), (removes, removed)):
        result, counts = run(step, text)
        assert result == after
        assert counts["emoji.found"] == found
        assert counts["emoji.documents"] == 1
        if step is removes and found == 1:
            assert counts["emoji.characters"] == len(text.replace(" ", "")) - len(after.replace(" ", ""))


@pytest.mark.parametrize("text", ["bare © ™ ® ‼ → ↔ 0 1 # * ❤ ☺ ✔ ★", "☺︎ 😀︎", "क्‍ष می‌خواهم", "1⃣", TURKISH])
def test_what_shows_as_text_stays(text: str) -> None:
    assert stays(names, text)
    assert stays(removes, text)


def test_every_emoji_of_unicodes_list_is_known_and_no_bare_text() -> None:
    lone = {text for text, entry in EMOJI_DATA.items() if entry["status"] == STATUS["unqualified"] and len(text) == 1}
    shown = {text: entry["en"] for text, entry in EMOJI_DATA.items() if entry["status"] != STATUS["unqualified"]}
    assert len(lone) > 200
    assert len(shown) > 4900
    text, counts = run(names, "\n".join(shown))
    assert text.split("\n") == list(shown.values())
    assert counts["emoji.found"] == len(shown)
    assert run(removes, "\n".join(shown))[0] == "\n" * (len(shown) - 1)
    assert stays(removes, "\n".join(lone))


# Of spelling

SENTENCE = "This is the text that you have to read, and it is in English for all of us."


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("I will recieve teh book.", "I will receive the book."),
        ("(recieve), recieve. “recieve it”", "(receive), receive. “receive it”"),
        ("arn't they auto-negotation", "aren't they auto-negotiation"),
    ],
)
def test_words_with_one_correction_are_corrected(text: str, after: str) -> None:
    result, counts = run(english(), f"{SENTENCE} {text}")
    assert result == f"{SENTENCE} {after}"
    wrong = [word for word in re.findall(r"[\w'-]+", text) if word in listed()]
    assert counts == {
        "spelling.documents": 1,
        "spelling.words": len(wrong),
        "spelling.characters": sum(map(len, wrong)),
    }


@pytest.mark.parametrize(
    "text",
    [
        "Teh Recieve RECIEVE",
        "recieve() self.recieve the_recieve recieve2 recieveData x.recieve(1) foo(recieve) std::recieve",
        "recieve.py /usr/recieve C:\\recieve http://a.b/recieve recieve@x.de --recieve -recieve $recieve #recieve",
        "the `recieve` and ``x ` recieve`` and the word \"recieve\" or 'teh'",
        "x = recieve + 1",
        "recieve = 1;",
        "git-recieve-pack dpkg apt",
        "\n```\nrecieve\n```",
        "\n~~~~ python\nrecieve\n~~~\nrecieve",
        "\n\n    recieve it\n    teh end",
        "\nfor recieve in x: foo(recieve)",
        "the film Løse problemer som finde, again",
        "\nEr war als Kind vor dem Haus und ons ser som alles gut war",
        "aas abandonne",
    ],
)
def test_code_addresses_names_quotations_and_other_languages_stay(text: str) -> None:
    assert run(english(), f"{SENTENCE} {text}") == (f"{SENTENCE} {text}", {})


def test_the_english_list_is_for_english_documents() -> None:
    assert len(listed()) == 58_916
    german = "Er war als Kind vor dem Haus, und alles war gut, bis er recieve las."
    assert run(english(), german) == (german, {})
    assert run(english(), f"{SENTENCE} teh", "de")[1] == {}
    assert run(english(), "recieve", "en")[0] == "receive"


def test_a_list_of_ones_own_has_two_columns(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# ours\nherkez->herkes\n\nyanlız\tyalnız\nbirşey,bir şey\nteh  the\n", encoding="utf-8")
    assert run(Spelling(str(path)), "herkez yanlız birşey teh Herkez als")[0] == "herkes yalnız bir şey the Herkez als"
    for content, error in (
        ("alone\n", "line 1: 'alone' is no word in lower case and its correction; write teh -> the"),
        ("Teh the\n", "line 1: 'Teh the' is no word"),
        ("a b\n\na c\n", "line 3: 'a' is corrected to 'b' above; keep one of the two"),
        ("a b\nb c\n", "'a' is corrected to 'b', but 'b' is listed as wrong itself"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=re.escape(error)):
            read_list(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"words\.txt.*data\.clean\.spelling"):
        clean_steps(CleanSection(spelling=str(path)))
    with pytest.raises(DataError, match="No such file"):
        read_list(tmp_path / "missing.txt")


# Of personal data

# Of the registry of ISO 13616 and of the card issuers' pages for testers.
IBANS = [
    *(
        "GB29 NWBK 6016 1331 9268 19",
        "TR33 0006 1005 1978 6457 8413 26",
        "DE89370400440532013000",
        "NO93 8601 1117 947",
    ),
    *(
        "FR1420041010050500013M02606",
        "MT84 MALT 0110 0001 2345 MTLC AST0 01S",
        "SC18 SSCB 1101 0000 0000 0000 1497 USD",
    ),
]
CARDS = [
    *("4111 1111 1111 1111", "4111-1111-1111-1111", "5555555555554444", "2223003122003222", "3782 822463 10005"),
    *("6011111111111117", "30569309025904", "3530111333300000", "6200000000000005", "9792030394440796"),
]
PHONES = [
    *("+90 532 123 45 67", "+905321234567", "0532 123 45 67", "(0212) 123 45 67", "0 532 123 45 67", "+49 30 1234567"),
    *("+1 (212) 555-2368", "212-555-2368", "(212) 555-2368", "1-212-555-2368", "212.555.2368", "01 23 45 67 89"),
    *("020 7946 0958", "+44 (0)20 7946 0958", "+420 123 456 789", "0090 532 123 45 67"),
]
IPS = ["8.8.8.8", "212.27.32.176", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e", "2001:67c:2564:a119:0:1:2:77"]
EMAILS = ["a.b+c@sub.example.com", "müller@x.de", "x_y@z.io", "o'neil@mail.co.uk"]


@pytest.mark.parametrize(
    ("kind", "found"), [("email", EMAILS), ("ip", IPS), ("iban", IBANS), ("card", CARDS), ("phone", PHONES)]
)
def test_personal_data_is_masked_and_counted(kind: str, found: list[str]) -> None:
    for each in found:
        for before, after in (
            ("", ""),
            ("Write (", "), or not."),
            ("bu ", " ve başka"),
            ("请", "。"),
            ("a: x,", ",b"),
            ("it:", ". 2"),
            ("at\n", ", 2 times"),
        ):
            text, counts = run(masks, before + each + after)
            assert text == f"{before}<{kind.upper()}>{after}"
            assert counts == {"pii.documents": 1, f"pii.{kind}": 1, "pii.characters": len(each)}
    text, counts = run(Pii([kind]), " | ".join(found))
    assert text == " | ".join([f"<{kind.upper()}>"] * len(found))
    assert counts[f"pii.{kind}"] == len(found)


@pytest.mark.parametrize(
    "text",
    [
        "logo@2x.png git@github.com:name/project.git x@w.view(1) react@18.2.0 user@host @name a@b",
        "TR33 0006 1005 1978 6457 8413 27 GB29 NWBK 6016 1331 9268 1 XX29 NWBK 6016 1331 9268 19",
        "4111 1111 1111 1112, 1234 5678 9012 3456, 4111 1111-1111 1111, 0.4111111111111111, 4006381333931",
        "v1.2.3.4, version 199.3.2.1, Chrome/120.0.0.0, pkg-101.2.3.4, foo==101.2.3.4, 1.3.6.1.4.1.311, 999.1.1.1",
        "12.3.2.2.\xa0Creating, see Kısım\xa011.1.7.3, “Integrating”, and 3.1.2.4",
        "10.0.0.1 192.168.1.1 127.0.0.1 172.16.5.4 169.254.1.1 192.0.2.7 198.51.100.1 203.0.113.9 100.64.0.1",
        "255.255.255.0 224.0.0.251 0.0.0.0 2001:db8::1 3fff::1 fe80::1 ::1 std::vector a::b dead::beef 2024:12:30",
        "ISBN 978-3-16-148410-0, 9783161484100, 0-306-40615-2, ISSN 2049-3630, RFC 7230-7235",
        "2024-01-31 12:30:45, 31.12.2024, 01.02.2024 13:45, 20240131123045, 1706700000000",
        "order 100-234567-89, #5551234567, $1234567890, 12345678901234567890, 1-2-3-4-5-6-7-8",
        "1 000 000 000, 1,234,567,890, +5 000 000 000, x+1234567, 3.14159265358979, 10^-1234567, 1234567 = 7654321",
        "252.227-7013, seq 0 0.000001 0.000003, [1 0 0 -1 0 410.126007], 69069 + 907133923, cell\n20040508 +35236450.6",
        "01 02 03 04 05, 00 00 00 00 00, 1f 8b 8 1e 0 0 0 0 0 0 1 0 0, /case/5667125715927040, id=5499162606043136",
        "upgrade V8 from 4.2.177.18, patch it to 9.7.106.18, linux 2.6.8.1/2.6.8.1-mm4, Reset from 1.2.0.0",
        "0 1 2 3 4 5 6 7 8 9 10, 1984 1985 1986 1987, 41.0082, 28.9784, 123e4567-e89b-12d3-a456-426614174000",
    ],
)
def test_numbers_and_names_that_are_no_personal_data_stay(text: str) -> None:
    assert stays(masks, text)


def test_words_before_and_ports_after_tell_addresses_and_phone_numbers() -> None:
    assert run(masks, "Tel:+905321234567, phone:5551234")[0] == "Tel:<PHONE>, phone:<PHONE>"
    assert run(masks, "tel: 5551234, Fax (office): 0212-1234567; Tel. 030 12345678, 030 12345678")[0] == (
        "tel: <PHONE>, Fax (office): <PHONE>; Tel. <PHONE>, 030 12345678"
    )
    for text, after in (
        ("host 5.6.7.8", "host <IP>"),
        ("http://5.6.7.8/x", "http://<IP>/x"),
        ("5.6.7.8:8080", "<IP>:8080"),
        ("allow-update { 212.94.201.10 };", "allow-update { <IP> };"),
        ("5.6.7.8", "5.6.7.8"),
    ):
        assert run(masks, text)[0] == after


@given(st.sampled_from(IBANS + CARDS), st.data())
def test_checksums_tell_every_digit_that_is_wrong(number: str, data: st.DataObject) -> None:
    places = [place for place, character in enumerate(number) if character.isdigit() and place > 1]
    place = data.draw(st.sampled_from(places))
    other = data.draw(st.sampled_from([digit for digit in "0123456789" if digit != number[place]]))
    is_one = is_iban if number in IBANS else is_card
    assert is_one(number)
    assert not is_one(number[:place] + other + number[place + 1 :])


PIECES = [*EMAILS, *IPS, *IBANS, *CARDS, *PHONES, "word", "1.2.3", "2024-01-31", "\n", "ş", "@", "+", "0", "::"]


def test_what_is_masked_tells_nothing_of_its_neighbours() -> None:
    for text, after in (
        ("GB29 NWBK 6016 1331 9268 19 212.27.32.176", "<IBAN> <IP>"),
        ("8.8.8.8 +90 532 123 45 67 GB29 NWBK 6016 1331 9268 19 212.27.32.176", "<IP> <PHONE> <IBAN> <IP>"),
        ("package >= 212.27.32.176, package> 212.27.32.176", "package >= 212.27.32.176, package> 212.27.32.176"),
    ):
        assert run(masks, text)[0] == after


@given(st.lists(st.sampled_from(PIECES), max_size=6).map(" ".join))
def test_counts_are_what_was_masked_and_masked_text_stays(text: str) -> None:
    once, counts = run(masks, text)
    tokens = {kind: once.count(f"<{kind.upper()}>") for kind in KINDS}
    assert tokens == {kind: counts[f"pii.{kind}"] for kind in KINDS}
    kept = len(once) - sum(number * len(f"<{kind}>") for kind, number in tokens.items())
    assert counts["pii.characters"] == len(text) - kept
    assert stays(masks, once)


@given(st.text(st.one_of(st.characters(codec=None), st.sampled_from("\ud83dÃ©\udc00 😀1.@\u0301\xad"))))
def test_any_text_comes_through_all_steps_and_can_be_encoded(text: str) -> None:
    document, counts = Document("c/f#0", text=text, language="en"), Counts()
    for step in all_steps():
        assert step(document, counts) is None
    document.text.encode()
    assert all(number > 0 for number in counts.values())
    assert {name.partition(".")[0] for name in counts} <= {step.name for step in all_steps()}


def test_long_runs_take_time_by_their_length() -> None:
    """By the square of it each of these would take seconds."""
    begin = time.process_time()
    for run_of in (
        "a",
        "1",
        "1 ",
        "a.",
        "a@",
        "+1",
        "GB29",
        "1.1.",
        "2000:",
        "(",
        "😀",
        "Ã",
        "ş’",
        "`",
        "re-",
        "teh ",
        "teh,",
    ):
        text = run_of * (15_000 // len(run_of))
        for step in (*all_steps(), names):
            run(step, text, "en")
    assert time.process_time() - begin < 8


def test_the_benchmark_prints_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = tmp_path / "pages.jsonl.gz"
    with gzip.open(pages, "wt", encoding="utf-8") as file:
        file.write(json.dumps({"html": f"<html><p>{SENTENCE} I recieve 😀 mail at a@b.com.</p>"}) + "\n")
    monkeypatch.setattr("sys.argv", ["data_clean.py", str(pages), "--rounds", "1"])
    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    runpy.run_path(str(ROOT / "benchmarks" / "data_clean.py"), run_name="__main__")
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    steps = ["html: all", "html", "repair_encoding", "unicode", "spelling", "pii", "emoji: name", "emoji: remove"]
    assert rows == ["step", "---", *steps, "all but emoji", "Trafilatura"]


def test_no_package_of_the_extra_is_imported_before_it_is_used() -> None:
    source = (ROOT / "runtime/data/clean").glob("*.py")
    at_import = re.compile(r"^(?:from|import) (?:resiliparse|ftfy|emoji|codespell_lib)\b", re.MULTILINE)
    assert not [path.name for path in source if at_import.search(path.read_text(encoding="utf-8"))]
