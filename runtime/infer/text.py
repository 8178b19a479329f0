"""From tokens to text while they are generated.

Incomplete characters and possible beginnings of stop strings are held back.
"""

from collections.abc import Sequence

from trimaran.runtime.data.tokens.tokenizer import Tokenizer

# Tokens before the new ones that are decoded with them: some decoders treat the first token of a text specially.
_CONTEXT = 8
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def check_stop_strings(stops: Sequence[str]) -> None:
    """Raise ValueError where a stop string is empty: it would end every text at once."""
    if "" in stops:
        raise ValueError("a stop string must have at least one character")


class TextStream:
    """The text of one continuation. `text` only grows: it never has half a character or the beginning of a stop string.

    Args:
        prompt: token ids before the continuation.
        stops: the text ends before the first of these strings; where two end with the same character, before the longer
            one. Only the continuation is searched; token boundaries don't matter.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        check_stop_strings(stops)
        self.text = ""
        self.is_stopped = False
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._context = list(prompt[-_CONTEXT:])
        self._context_text = tokenizer.decode(self._context)
        self._waiting: list[int] = []  # tokens whose text is not final
        self._held = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> bool:
        """Add the next token; return whether a stop string is complete, after which no token is added."""
        self._waiting.append(token)
        text = self._tokenizer.decode(self._context + self._waiting)
        if not text.endswith(_UNFINISHED):
            self._settle(text)
        return self.is_stopped

    def finish(self) -> None:
        """End the continuation: text that was held back becomes final."""
        if self._waiting and not self.is_stopped:
            self._settle(self._tokenizer.decode(self._context + self._waiting))
        self.text += self._held
        self._held = ""

    def _settle(self, text: str) -> None:
        new = self._held + text[len(self._context_text) :]
        self._context, self._waiting = self._waiting[-_CONTEXT:], []
        self._context_text = self._tokenizer.decode(self._context)
        found = _first_stop(new, self._stops)
        if found is not None:
            self.is_stopped = True
            self.text, self._held = self.text + new[:found], ""
            return
        held = _length_of_beginning(new, self._stops)
        self.text, self._held = self.text + new[: len(new) - held], new[len(new) - held :]


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return the start of the stop string that is complete first; None where there is none."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _length_of_beginning(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of the text are the beginning of a stop string."""
    longest = min(len(text), max((len(stop) for stop in stops), default=1) - 1)
    return next(
        (length for length in range(longest, 0, -1) if any(stop.startswith(text[-length:]) for stop in stops)), 0
    )
