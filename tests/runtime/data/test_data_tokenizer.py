"""The byte-level BPE tokenizer: lossless, deterministic, and clear about a file that isn't one."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.tokens import build
from trimaran.runtime.data.tokens.end_of_text import END_OF_TEXT
from trimaran.runtime.data.tokens.fast_encode import FastEncoder, why_not
from trimaran.runtime.data.tokens.tokenizer import MASK, Tokenizer
from trimaran.runtime.data.tokens.vocabulary import SMALLEST_VOCABULARY

TEXTS = ["the cat sat on the mat\n", "the dog sat on the log\n"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@given(text=st.text(max_size=60))
def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_deterministic_and_encoding_survives_saving(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a.json")
    Tokenizer.train(iter(TEXTS), 300).save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    loaded = Tokenizer.load(tmp_path / "a.json")
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert (loaded.vocab_size, loaded.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)


def test_frequent_words_become_single_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" sat on the")) == 3


def test_a_small_corpus_gives_a_smaller_vocabulary() -> None:
    assert SMALLEST_VOCABULARY <= Tokenizer.train(["aa aa"], 4096).vocab_size < 270


def test_text_that_spells_the_end_of_text_token_stays_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for each in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")):
        ids = each.encode(f"a {END_OF_TEXT} b")
        assert each.eot_id not in ids
        assert each.decode(ids) == f"a {END_OF_TEXT} b"


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match=r"tokenizer_vocab_size \(256\) must be at least 257"):
        Tokenizer.train(TEXTS, 256)


def test_a_tokenizer_file_that_is_missing_or_not_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read tokenizer .*tokenizer\.json: No such file"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="cannot read tokenizer /dev/zero: it is a device"):
        Tokenizer.load(Path("/dev/zero"))
    for content in (b"", b"{", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json"):
            Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"does not say which token ends a text.* name the token in data.end_of_text"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"has no token 'b'; name one of its tokens in data.end_of_text"):
        Tokenizer.load(tmp_path / "tokenizer.json", "b")


# Special tokens, files beside tokenizer.json, and the token that then ends a text.
ENDS: list[tuple[list[str], dict[str, object], str]] = [
    (["<end>"], {"tokenizer_config.json": {"eos_token": "<end>"}}, "<end>"),
    (["<end>"], {"tokenizer_config.json": {"eos_token": {"content": "<end>"}}}, "<end>"),
    (["<end>"], {"generation_config.json": {"eos_token_id": [3, 2]}}, "<end>"),
    (
        ["<x>", "<end>"],
        {"tokenizer_config.json": {"eos_token": "<gone>"}, "generation_config.json": {"eos_token_id": 3}},
        "<end>",
    ),
    (
        ["</s>", "<turn>"],
        {"tokenizer_config.json": {"eos_token": "<turn>"}},
        "</s>",
    ),  # documents end otherwise than turns
    ([], {"generation_config.json": []}, "<eos>"),
    (["<end>"], {"tokenizer_config.json": {"end_of_text": "a", "eos_token": "<end>"}}, "a"),
]


@pytest.mark.parametrize(("special", "files", "end"), ENDS)
def test_the_files_beside_a_tokenizer_name_the_end_of_text(
    special: list[str], files: dict[str, object], end: str, tmp_path: Path
) -> None:
    inner = tokenizers.Tokenizer(models.BPE({"a": 0, "<eos>": 1}, []))
    inner.add_special_tokens(special)
    inner.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (tokenizer.eot_token, tokenizer.eot_id) == (end, inner.token_to_id(end))
    assert Tokenizer.load(tmp_path / "tokenizer.json", "a").eot_token == "a"
    # Wherever it is saved, the same token ends a text.
    (tmp_path / "other").mkdir()
    tokenizer.save(tmp_path / "other" / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "other" / "tokenizer.json").eot_token == end
    assert (tmp_path / "other" / "tokenizer_config.json").exists() == (end not in ("</s>", "<eos>"))


def test_a_broken_file_beside_a_tokenizer_is_named(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_published_names_of_the_end_of_text_token_are_known(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))
    inner.add_special_tokens(["</s>"])
    inner.enable_truncation(1)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (tokenizer.eot_token, tokenizer.eot_id, tokenizer.vocab_size) == ("</s>", 2, 3)
    # A file that was saved with truncation on must not cut documents short.
    assert tokenizer.encode("aaa") == [0, 0, 0]


def test_a_name_that_is_a_special_token_comes_before_one_that_is_plain_text(tmp_path: Path) -> None:
    """Gemma's vocabulary has </s> for HTML."""
    inner = tokenizers.Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    inner.add_special_tokens(["<eos>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path / "tokenizer.json").eot_token == "<eos>"


def test_a_mask_token_is_one_of_the_vocabulary_and_never_comes_from_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(TEXTS, 300, with_mask=True)
    tokenizer.save(tmp_path / "tokenizer.json")
    for each in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")):
        assert each.mask_id is not None
        assert each.mask_id == each.required_mask_id() == each.id_of(MASK) < each.vocab_size
        assert each.mask_id not in each.encode(f"a {MASK} b")
        assert each.decode(each.encode(f"a {MASK} b")) == f"a {MASK} b"
    with pytest.raises(
        DataError, match=r"must be at least 258: 256 bytes and <\|endoftext\|> and \[MASK\]; set it to 258 or more"
    ):
        Tokenizer.train(TEXTS, 257, with_mask=True)


def _trained(text: str, vocab_size: int = 700) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(Tokenizer.train([text], vocab_size).definition)


def test_the_faster_engine_gives_the_same_ids() -> None:
    sources = sorted(Path(build.__file__).parent.glob("*.py"))
    inner = _trained("\n".join(path.read_text(encoding="utf-8") for path in sources))
    inner.encode_special_tokens = True
    assert why_not(inner) == ""
    fast = FastEncoder(inner)
    texts = [" " * 5000, "a" * 5000, "\n\n \t x\r\n", "", "it's we'LL <|endoftext|> caf\u00e9 \U0001f600\u200d"]
    # Every code point between letters, digits, spaces and signs, few of the many ideographs: both engines of regular
    # expressions agree.
    many = ("CJK UNIFIED", "CJK COMPAT", "HANGUL SYLL", "TANGUT", "EGYPTIAN", "NUSHU", "KHITAN", "CUNEIFORM")
    for first in range(0, 0x110000, 0x400):
        names = [(chr(at), unicodedata.name(chr(at), "")) for at in range(first, first + 0x400)]
        chosen = [each for at, (each, name) in enumerate(names) if name and (at % 97 == 0 or not name.startswith(many))]
        texts.append("".join(f"a{each} {each}{each}1{each}.\n" for each in chosen))
    expected = [encoding.ids for encoding in inner.encode_batch(texts, add_special_tokens=False)]
    assert fast.encode_batch(texts) == expected
    assert fast._encode_long(texts[0]) == expected[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda it: it.update(normalizer={"type": "NFC"}), "it normalizes texts"),
        (lambda it: it["pre_tokenizer"].update(add_prefix_space=True), "it splits texts otherwise than GPT-2"),
        (lambda it: it["model"].update(dropout=0.1), "it has dropout"),
        (lambda it: it["model"]["merges"].reverse(), "its ids do not grow in the order of its merges"),
        (lambda it: it["model"]["vocab"].update({"zqzq": 9000}), "its token 'zqzq' is not encoded as itself"),
        (
            lambda it: it["added_tokens"].append(
                {**it["added_tokens"][0], "id": 700, "content": "#!", "special": False}
            ),
            "it has the added token '#!'",
        ),
    ],
)
def test_the_faster_engine_is_not_taken_where_ids_could_differ(
    change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    definition = json.loads(_trained("the cat that sat on the mat\n" * 9, 300).to_str())
    change(definition)
    assert why_not(tokenizers.Tokenizer.from_str(json.dumps(definition))) == reason
