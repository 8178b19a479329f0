"""The smallest vocabularies of a byte-level tokenizer, for the tokenizer and for the rules of the run spec."""

from typing import Final

# Every byte has a token, so that any text can be written, and one more ends a document.
SMALLEST_VOCABULARY: Final = 256 + 1
# One more stands for a hidden token.
SMALLEST_MASKING_VOCABULARY: Final = SMALLEST_VOCABULARY + 1
