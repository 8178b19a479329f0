"""The filter section: which documents a recipe removes, by which thresholds."""

from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, Field

from trimaran.models.fields import Count, NonNegative, NonNegativeWhole, Positive
from trimaran.runtime.data.filters.characters import LANGUAGES
from trimaran.runtime.spec.sections.common import SECTION_CONFIG, FilePath, Fraction, switch


def _check_language(code: str) -> str:
    if code not in LANGUAGES:
        meant = code.lower().replace("_", "-").partition("-")[0]
        fix = f"write {meant}" if meant in LANGUAGES else f"it knows {', '.join(LANGUAGES)}"
        raise ValueError(f"must be a language code that the language model knows, got {code!r}; {fix}")
    return code


Language = Annotated[str, AfterValidator(_check_language)]
Share = Fraction | None
_OFF: Final = "(null: not checked)."


class GopherSettings(BaseModel):
    """The quality rules of Gopher (Rae et al. 2021, appendix A.1.1)."""

    model_config = SECTION_CONFIG

    min_words: NonNegativeWhole | None = Field(
        default=50, description=f"Fewest words, without those of punctuation alone {_OFF}"
    )
    max_words: Count | None = Field(
        default=100_000, description=f"Most words, without those of punctuation alone {_OFF}"
    )
    min_mean_word_length: NonNegative | None = Field(
        default=3.0, description=f"Least mean length of a word in characters {_OFF}"
    )
    max_mean_word_length: Positive | None = Field(
        default=10.0, description=f"Greatest mean length of a word in characters {_OFF}"
    )
    max_symbols_per_word: NonNegative | None = Field(
        default=0.1, description=f"Most hash signs, and most ellipses, for each word {_OFF}"
    )
    max_bullet_lines: Share = Field(default=0.9, description=f"Largest share of lines that begin with a bullet {_OFF}")
    max_ellipsis_lines: Share = Field(
        default=0.3, description=f"Largest share of lines that end with an ellipsis {_OFF}"
    )
    min_alphabetic_words: Share = Field(default=0.8, description=f"Least share of words that have a letter {_OFF}")
    min_stop_words: NonNegativeWhole | None = Field(
        default=2, description=f"Fewest different words of stop_words; those of the paper are English {_OFF}"
    )
    stop_words: Annotated[list[str], Field(min_length=1, max_length=1000)] = Field(
        default=["the", "be", "to", "of", "and", "that", "have", "with"],
        description="Words of which a text of this language has some, in the case in which they stand in it.",
    )


class GopherRepetitionSettings(BaseModel):
    """The repetition rules of Gopher (Rae et al. 2021, table A1): largest shares of what stands in a text again."""

    model_config = SECTION_CONFIG

    max_lines: Share = Field(default=0.3, description=f"Lines that stand further up already {_OFF}")
    max_paragraphs: Share = Field(default=0.3, description=f"Paragraphs that stand further up already {_OFF}")
    max_line_characters: Share = Field(default=0.2, description=f"Characters in such lines {_OFF}")
    max_paragraph_characters: Share = Field(default=0.2, description=f"Characters in such paragraphs {_OFF}")
    max_top_2_gram: Share = Field(default=0.2, description=f"Characters of the most frequent run of 2 words {_OFF}")
    max_top_3_gram: Share = Field(default=0.18, description=f"Characters of the most frequent run of 3 words {_OFF}")
    max_top_4_gram: Share = Field(default=0.16, description=f"Characters of the most frequent run of 4 words {_OFF}")
    max_repeated_5_grams: Share = Field(default=0.15, description=f"Characters of repeated runs of 5 words {_OFF}")
    max_repeated_6_grams: Share = Field(default=0.14, description=f"Characters of repeated runs of 6 words {_OFF}")
    max_repeated_7_grams: Share = Field(default=0.13, description=f"Characters of repeated runs of 7 words {_OFF}")
    max_repeated_8_grams: Share = Field(default=0.12, description=f"Characters of repeated runs of 8 words {_OFF}")
    max_repeated_9_grams: Share = Field(default=0.11, description=f"Characters of repeated runs of 9 words {_OFF}")
    max_repeated_10_grams: Share = Field(default=0.1, description=f"Characters of repeated runs of 10 words {_OFF}")


class C4Settings(BaseModel):
    """The rules of C4 (Raffel et al. 2020, section 2.2): which lines are cut, and which documents go."""

    model_config = SECTION_CONFIG

    line_end: bool = Field(
        default=True,
        description="Whether lines without a full stop, exclamation, question or quotation mark at the end are cut "
        "(FineWeb leaves this out).",
    )
    min_words_per_line: Count | None = Field(
        default=3, description="Fewest words of a line; lines with fewer are cut (null: not checked)."
    )
    max_word_length: Count | None = Field(
        default=1000,
        description="Characters of the longest word of a line; lines with longer ones are cut (null: not checked).",
    )
    citations: bool = Field(default=True, description="Whether [1], [edit] and [citation needed] are cut out.")
    javascript: bool = Field(default=True, description="Whether lines that mention JavaScript are cut.")
    policy: bool = Field(default=True, description="Whether lines on cookies, terms of use and privacy are cut.")
    lorem_ipsum: bool = Field(default=True, description="Whether a document with lorem ipsum goes.")
    curly_bracket: bool = Field(default=True, description="Whether a document with an opening curly bracket goes.")
    min_sentences: Count | None = Field(
        default=5,
        description="Fewest sentences in the lines that stay; a document with fewer goes (null: not checked).",
    )


class FineWebSettings(BaseModel):
    """The rules that FineWeb adds (Penedo et al. 2024, section 3.6)."""

    model_config = SECTION_CONFIG

    min_line_ends: Share = Field(
        default=0.12, description=f"Least share of lines that end with a mark that ends a sentence {_OFF}"
    )
    max_short_lines: Share = Field(default=0.67, description=f"Largest share of lines that are short {_OFF}")
    short_line_length: NonNegativeWhole = Field(default=30, description="Characters of a short line, at most.")
    max_repeated_characters: Share = Field(
        default=0.01, description=f"Largest share of characters in lines that stand further up already {_OFF}"
    )
    max_newlines_per_word: NonNegative | None = Field(default=0.3, description=f"Most line ends for each word {_OFF}")


class Lexicon(BaseModel):
    """A file of words that count as hits."""

    model_config = SECTION_CONFIG

    file: FilePath = Field(description="UTF-8 text with a word or phrase a line; # begins a comment.")
    language: Language | None = Field(default=None, description="Language whose texts it is for (null: all).")


class ToxicitySettings(BaseModel):
    """Hits of a lexicon of the document's language. Word lists remove minorities' texts too: read the report."""

    model_config = SECTION_CONFIG

    max_hits_per_1000_words: NonNegative = Field(
        default=10.0, description="Most hits per 1,000 words; 10 is a hit in a hundred words."
    )
    min_hits: Annotated[int, Field(ge=2, le=2**31 - 1)] = Field(
        default=3, description="Fewest hits that remove a document, however short it is."
    )
    bundled: bool = Field(default=True, description="Whether the lexicons of 24 languages in glin-profanity are used.")
    lexicons: Annotated[list[Lexicon], Field(max_length=1000)] = Field(
        default_factory=list, description="Own lexicons beside them."
    )


class ClassifierSettings(BaseModel):
    """A fastText model, and the score of one of its labels that a document needs."""

    model_config = SECTION_CONFIG

    file: FilePath = Field(description="Supervised fastText model, .bin or .ftz.")
    label: Annotated[str, Field(min_length=1)] = Field(description="Label, with or without __label__.")
    min: Fraction = Field(description="Least score of the label; documents with less are removed.")


class FilterSection(BaseModel):
    """Which documents are removed; whatever is removed is counted with its reason."""

    model_config = SECTION_CONFIG

    url_blocklist: Annotated[list[FilePath], Field(min_length=1, max_length=1000)] | None = Field(
        default=None,
        description="Files of domains (subdomains included), addresses and words; pages of which are removed.",
    )
    languages: Annotated[list[Language], Field(min_length=1, max_length=len(LANGUAGES))] | None = Field(
        default=None, description="Codes of the languages to keep, such as [en, tr] (null: all)."
    )
    min_language_score: Fraction = Field(
        default=0.65, description="Least probability of a document's language, where languages are given."
    )
    gopher: Annotated[GopherSettings | None, switch(GopherSettings)] = Field(
        default=None, description="Gopher's quality rules (Rae et al. 2021): true, or thresholds to change."
    )
    gopher_repetition: Annotated[GopherRepetitionSettings | None, switch(GopherRepetitionSettings)] = Field(
        default=None, description="Gopher's repetition rules (Rae et al. 2021): true, or thresholds to change."
    )
    c4: Annotated[C4Settings | None, switch(C4Settings)] = Field(
        default=None, description="C4's rules, which cut lines too (Raffel et al. 2020): true, or rules to change."
    )
    fineweb: Annotated[FineWebSettings | None, switch(FineWebSettings)] = Field(
        default=None, description="FineWeb's own rules (Penedo et al. 2024): true, or thresholds to change."
    )
    toxicity: Annotated[ToxicitySettings | None, switch(ToxicitySettings)] = Field(
        default=None, description="Hits of word lists per 1,000 words: true, or thresholds and lists of one's own."
    )
    classifiers: Annotated[list[ClassifierSettings], Field(max_length=100)] = Field(
        default_factory=list, description="fastText models whose label a document must score: [{file, label, min}]."
    )
