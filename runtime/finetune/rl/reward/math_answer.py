"""Whether the final answer of a worked solution is the expected one: numbers by value, anything else by its letters."""

import re
from fractions import Fraction

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d[\d,]*(?:\.\d+)?)?")
_MARK = "####"  # before the final answer in GSM8K (Cobbe et al. 2021)
_BOXED = "\\boxed"  # around it in MATH (Hendrycks et al. 2021)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_LAYOUT = re.compile(r"\\(?:left|right|text|mathrm|!|,|;|\s)|[${}\s]|\\%|%")


def is_right(answer: str, expected: str) -> bool:
    """Return whether both texts end with the same answer.

    That is what stands in the last \\boxed{...}, else after the last ####, else the last number; of the expected text
    the whole, where it has neither mark.
    """
    theirs = _marked(expected) or expected
    ours = _marked(answer)
    if ours is None:
        numbers = _NUMBER.findall(answer)
        ours = numbers[-1] if numbers and _value(theirs) is not None else answer
    left, right = _value(ours), _value(theirs)
    if left is not None and right is not None:
        return left == right
    return _letters(ours) == _letters(theirs) != ""


def _marked(text: str) -> str | None:
    """Return what stands in the last box, or on the line after the last mark; None without either."""
    start = text.rfind(_BOXED + "{")
    if start >= 0:
        begin, depth = start + len(_BOXED) + 1, 1
        for index in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[begin:index]
    if _MARK in text:
        return text.rpartition(_MARK)[2].strip().partition("\n")[0]
    return None


def _value(text: str) -> Fraction | None:
    """Return the number that the text is, None where it is none. Commas group digits; units of money and % are left."""
    plain = _FRACTION.sub(r"\1/\2", text)
    plain = _LAYOUT.sub("", plain).rstrip(".").replace("\\", "")
    if not _NUMBER.fullmatch(plain):
        return None
    top, _, bottom = plain.replace(",", "").partition("/")
    try:
        divisor = Fraction(bottom) if bottom else Fraction(1)
        return Fraction(top) / divisor if divisor else None
    except ValueError:  # more digits than Python turns into a number: such answers are compared by their letters
        return None


def _letters(text: str) -> str:
    return _LAYOUT.sub("", text).rstrip(".").casefold()
