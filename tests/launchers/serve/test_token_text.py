"""The bytes of single tokens, of every kind of tokenizer: together they are the text, to the byte."""

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from trimaran.launchers.serve.token_text import TokenText
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.infer.prompts import RunText


@settings(max_examples=60, deadline=None)
@given(written=st.text(max_size=40))
def test_tokens_of_a_byte_level_text_are_its_bytes(text: RunText, written: str) -> None:
    tokens = TokenText(text.tokenizer)
    ids = text.tokenizer.encode(written)
    assert b"".join(map(tokens.bytes_of, ids)) == written.encode()
    assert all(map(tokens.is_spelled, ids))


def test_special_tokens_have_their_name(text: RunText) -> None:
    tokens = TokenText(text.tokenizer)
    assert tokens.bytes_of(text.tokenizer.eot_id) == b"<|endoftext|>"
    assert tokens.name_of(text.tokenizer.eot_id) == "<|endoftext|>"
    assert not tokens.is_spelled(text.tokenizer.eot_id)
    half = text.tokenizer.encode("\N{SLIGHTLY SMILING FACE}")[0]
    assert tokens.name_of(half) == "bytes:\\xf0"


def test_byte_tokens_and_spaces_of_sentencepiece() -> None:
    names = ["<unk>", "</s>", "▁", "a", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: number for number, name in enumerate(names)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(inner, "a test")
    tokens = TokenText(tokenizer)
    written = "a a\N{SLIGHTLY SMILING FACE} é"
    ids = tokenizer.encode(written)
    assert b"".join(map(tokens.bytes_of, ids)) == written.encode()
    assert tokens.name_of(vocabulary["<0xF0>"]) == "bytes:\\xf0"
    assert tokens.bytes_of(vocabulary["▁a"]) == b" a"
    assert tokens.bytes_of(1) == b"</s>"


def test_a_tokenizer_of_words_has_words() -> None:
    inner = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "boat": 2, "##s": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(["[SEP]"])
    tokens = TokenText(Tokenizer(inner, "a test", "[SEP]"))
    assert tokens.bytes_of(2) == b"boat"
    assert tokens.bytes_of(1) == b"[SEP]"
