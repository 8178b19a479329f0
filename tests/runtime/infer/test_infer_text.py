"""Text on the screen never holds half a character or part of a stop string, however it is cut into tokens."""

from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.infer.text import TextStream


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat\n", "the dog sat on the log\n"] * 20, 300)


def stream(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str] = ()) -> tuple[str, list[str], int]:
    """The whole text, what was shown after each token, and how many tokens were taken."""
    found = TextStream(tokenizer, tokenizer.encode("a prompt "), stops)
    shown, taken = [], 0
    for token in tokens:
        taken += 1
        stopped = found.add(token)
        shown.append(found.text)
        if stopped:
            break
    found.finish()
    assert all(found.text.startswith(part) for part in shown)
    return found.text, shown, taken


@given(text=st.text(max_size=40))
def test_the_text_of_tokens_is_that_of_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert stream(tokenizer, tokenizer.encode(text))[0] == text


@given(tokens=st.lists(st.integers(0, 299), max_size=20))
def test_the_text_of_any_tokens_is_that_of_the_tokenizer(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Of tokens that make no text, too: bytes that are no character are shown by its replacement."""
    tokens = [token for token in tokens if token < tokenizer.vocab_size]
    assert stream(tokenizer, tokens)[0] == tokenizer.decode(tokens)


def test_bytes_that_make_no_character_yet_wait(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("é🙂")  # two and four bytes, none of which the tokenizer has merged
    assert len(tokens) == 6
    assert stream(tokenizer, tokens)[1] == ["", "é", "é", "é", "é", "é🙂"]
    assert stream(tokenizer, tokens[:4])[0] == "é\N{REPLACEMENT CHARACTER}"


@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 4), max_size=30),
)
def test_a_stop_string_ends_the_text_however_it_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    """Against a search by character: the first stop string to be complete, the longest of those that end together."""
    expected = text
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            expected = text[: min(starts)]
            break
    found, shown = TextStream(Letters(), [0], stops), []
    position = 0
    for cut in [*cuts, *[1] * 30]:
        piece, position = text[position : position + cut], position + cut
        if piece and found.add(Letters.id_of(piece)):
            break
        shown.append(found.text)
    found.finish()
    assert found.text == expected
    assert found.is_stopped == (expected != text)
    assert all(expected.startswith(part) for part in shown), "nothing shown is taken back"


class Letters(Tokenizer):
    """A tokenizer whose tokens are all texts of a and b."""

    def __init__(self) -> None:
        pass

    @staticmethod
    def id_of(token: str) -> int:
        return int("1" + token.replace("a", "0").replace("b", "1"), 2)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(bin(each)[3:].replace("0", "a").replace("1", "b") for each in ids if each)


def test_stop_strings_over_several_tokens_and_what_only_looked_like_one(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the cat\n\nsat on")
    text, shown, taken = stream(tokenizer, tokens, ["\n\nsat"])
    assert text == shown[-1] == "the cat"
    assert taken < len(tokens)
    assert not any("\n" in part for part in shown)
    assert stream(tokenizer, tokens, ["\n\nsun", "zebra"])[0] == "the cat\n\nsat on"
    assert stream(tokenizer, tokenizer.encode("the cat\n"), ["\n\n"])[0] == "the cat\n", (
        "the beginning of a stop string at the end is text"
    )


def test_a_stop_string_of_several_bytes(tokenizer: Tokenizer) -> None:
    assert stream(tokenizer, tokenizer.encode("a🙂b"), ["🙂"])[0] == "a"


def test_the_prompt_is_not_searched(tokenizer: Tokenizer) -> None:
    found = TextStream(tokenizer, tokenizer.encode("User:"), ["User:"])
    for token in tokenizer.encode(" hello"):
        assert not found.add(token)
    found.finish()
    assert found.text == " hello"


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="at least one character"):
        TextStream(tokenizer, [1], [""])


def test_the_first_space_stays_where_a_decoder_drops_it_from_the_first_token() -> None:
    """As LLaMA's does: `▁world` alone would lose its space."""
    vocabulary = {"▁hello": 0, "▁world": 1, "</s>": 2, "<unk>": 3}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = Tokenizer(inner, "a test")
    found = TextStream(tokenizer, [0])
    for token in (1, 0):
        found.add(token)
    found.finish()
    assert found.text == " world hello"
