"""Prompts from a text's first words: cut between words, never within a letter, in any script."""

import pytest

from trimaran.runtime.data.opening import opening_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        (
            "\n \n***\nBir gün Nasreddin Hoca pazara giderken komşusuna rastlamış.",
            "Bir gün Nasreddin Hoca pazara giderken",
        ),
        ("KING HENRY.\nOnce more unto the breach", "KING HENRY."),
        ("\ufffd\ufffdnd the rest", "nd the rest"),
        (
            "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈",
            "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜",
        ),
        ("e\u0301" * 30, "e\u0301" * 20),
        ("x" * 39 + "e\u0301", "x" * 39),
        ("👩\u200d🚀", ""),
    ],
)
def test_the_first_words_of_a_text(text: str, words: str) -> None:
    assert opening_words(text) == words
