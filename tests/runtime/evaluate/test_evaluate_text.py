"""Perplexity of texts: lm-eval's windows and sums, a hand sum word by word, strides, and texts a tokenizer changes."""

import gzip
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from trimaran.models.config import TransformerConfig
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.evaluate.engine.requests import Likelihood, LikelihoodScore, ignore
from trimaran.runtime.evaluate.engine.score import check_causal
from trimaran.runtime.evaluate.text import (
    Difference,
    TextDocument,
    check_stride,
    check_tokens,
    describe_difference,
    difference,
    read_documents,
    rolling_windows,
    score_texts,
    text_results,
)

SMALL = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "vocab_size": 9, "max_seq_len": 8}


@dataclass(frozen=True)
class Bigrams:
    """A model that knows the token before: p(b | a) = 1 / (a + b + 2)."""

    @staticmethod
    def log_probability(before: int, token: int) -> float:
        return -math.log(before + token + 2)

    def likelihoods(
        self, requests: Sequence[Likelihood], done: Callable[[int, LikelihoodScore], None] = ignore
    ) -> list[LikelihoodScore]:
        found = []
        for number, request in enumerate(requests):
            whole = (*request.context, *request.continuation)[len(request.context) - 1 :]
            each = [self.log_probability(a, b) for a, b in itertools.pairwise(whole)]
            found.append(LikelihoodScore(sum(each), False))
            done(number, found[-1])
        return found

    def continuations(self, requests: Sequence[object], done: Callable[[int, str], None] = ignore) -> list[str]:
        raise NotImplementedError


@given(count=st.integers(0, 40), length=st.integers(1, 9), data=st.data())
def test_windows_are_those_of_lm_eval(count: int, length: int, data: st.DataObject) -> None:
    lm_eval = pytest.importorskip("lm_eval.utils")
    stride = data.draw(st.none() | st.integers(1, length))
    tokens = list(range(100, 100 + count))
    expected = map(
        lm_eval.make_disjoint_window,
        lm_eval.get_rolling_token_windows(tokens, 7, length, 1 if stride is None else length - stride + 1),
    )
    windows = list(rolling_windows(tokens, 7, length, stride))
    assert [(list(each.context), list(each.continuation)) for each in windows] == list(expected)
    assert [token for each in windows for token in each.continuation] == tokens
    assert all(len(each.context) + len(each.continuation) <= length + 1 for each in windows)


def test_perplexities_are_a_hand_sum_word_by_word() -> None:
    """The text has three words and seven characters in nine bytes; each token is summed on its own."""
    text = "ağ ab ş"
    tokens = {"ağ": [3, 4], " ab": [5], " ş": [6, 2]}
    by_word = {
        "ağ": math.log(0 + 3 + 2) + math.log(3 + 4 + 2),
        " ab": math.log(4 + 5 + 2),
        " ş": math.log(5 + 6 + 2) + math.log(6 + 2 + 2),
    }
    nats = sum(by_word.values())
    ids = [token for each in tokens.values() for token in each]
    (counts,) = score_texts([(TextDocument("file", text), ids)], Bigrams(), prefix=0, max_seq_len=2)
    expected = {
        "nats_per_token": nats / 5,
        "token_perplexity": math.exp(nats / 5),
        "word_perplexity": math.exp(nats / 3),
        "byte_perplexity": math.exp(nats / 9),
        "bits_per_byte": nats / math.log(2) / 9,
        "bits_per_character": nats / math.log(2) / 7,
    }
    assert counts.metrics() == pytest.approx(expected, rel=1e-12)
    found = text_results([TextDocument("file", text)], [counts], None, 2)
    assert found["results"]["text"]["bits_per_byte,none"] == pytest.approx(expected["bits_per_byte"], rel=1e-12)
    assert found["results"]["text"]["bits_per_byte_stderr,none"] == "N/A", "one document has no spread"


def test_several_documents_are_summed_and_have_a_standard_error() -> None:
    texts = [(TextDocument(str(n), "ab " * n), list(range(n, 2 * n))) for n in range(2, 30)]
    counts = score_texts(texts, Bigrams(), prefix=1, max_seq_len=8, stride=3)
    row = text_results([document for document, _ in texts], counts, 3, 8)["results"]["text"]
    nats, characters = sum(each.nats for each in counts), sum(len(document.text) for document, _ in texts)
    assert row["bits_per_character,none"] == pytest.approx(nats / math.log(2) / characters)
    assert 0 < row["bits_per_character_stderr,none"] < row["bits_per_character,none"]


def test_files_of_texts_and_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "çay"}\n\n{"text": " "}\n')
    documents = read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl.gz"])
    assert [each.text for each in documents] == ["one\r\ntwo\n", "çay", " "]
    assert documents[2].name == f"{tmp_path}/b.jsonl.gz, line 3"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"abc\nd\xe7f\n", r"a\.txt, line 2: byte 5 \(0xe7\) is not UTF-8"),
        ("a.txt", b"", "has no text to score"),
        ("a.jsonl", b"\n\n", "has no text to score"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ""}\n', r"a\.jsonl, line 2 has no text to score"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"line 2 must be a record whose field text is a text"),
        ("a.jsonl", b"{\n", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "half a surrogate pair"),
        ("a.gz", b"plain", r"is not a whole \.gz file"),
        ("a.txt", gzip.compress(b"text", mtime=0), "holds gzip data"),
    ],
)
def test_a_file_that_has_no_text_is_refused_by_its_place(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_documents([tmp_path / name])


def test_a_text_that_the_tokenizer_changes_is_told_with_the_first_place(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_str(Tokenizer.train(["the cat sat\n" * 9], 300).definition)
    inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("ß", "ss")])
    tokenizer = Tokenizer(inner, "test")
    document = TextDocument("f.txt", "the cat\nsat on Çeşme Straße.")
    found = difference(document.text, tokenizer.decode(tokenizer.encode(document.text)))
    assert found == Difference(characters=3, num_bytes=5, first=15)
    assert "3 characters (5 bytes) of 28 differ, first at line 2, column 8" in describe_difference(document, found)


@given(text=st.text(alphabet="abc ", max_size=60), start=st.integers(0, 60), count=st.integers(0, 5))
def test_a_text_that_lost_or_won_characters_is_followed_again(text: str, start: int, count: int) -> None:
    assert difference(text, text) is None
    shorter = text[:start] + text[start + count :]
    found = difference(text, shorter)
    assert (found is None) == (shorter == text)
    if found is not None:
        assert 1 <= found.characters <= len(text)
        assert found.first == sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, shorter, strict=False))
        )
    marked = "".join(f"{i:04}" for i in range(40))
    assert difference(marked, marked[:50] + marked[53:]) == Difference(3, 3, 50)
    assert difference(marked, marked[:50] + "xyz" + marked[50:]) == Difference(0, 0, 50)


def test_what_can_not_be_scored_is_refused_with_the_reason() -> None:
    for objective, position in (("masked_lm", "learned"), ("permutation_lm", "relative")):
        config = TransformerConfig.model_validate(SMALL | {"objective": objective, "position": position})
        with pytest.raises(ValueError, match=f"objective {objective} .* likelihood of a text.*; evaluate a causal_lm"):
            check_causal(config)
    for stride in (0, 9):
        with pytest.raises(ValueError, match=rf"--stride \({stride}\) must be from 1 to the model's context of 8"):
            check_stride(stride, 8)
    document = TextDocument("f.txt", "text")
    with pytest.raises(DataError, match=r"f\.txt has the token 9, and the model's vocabulary has 9; its tokenizer is"):
        check_tokens(document, [1, 9], 9)
    with pytest.raises(DataError, match="makes no token of this text"):
        check_tokens(document, [], 9)
