"""The step `emoji`: what shows as emoji becomes its `:name:` or goes, by the emoji package's copy of Unicode's list."""

import re
from collections.abc import Iterable
from typing import Final, Literal

from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.extras import require_extra

_TONE: Final = "[\U0001f3fb-\U0001f3ff]"
_REGION: Final = "\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f"
_KEYCAP: Final = "[0-9#*]\ufe0f\u20e3"
_UNNAMED: Final = re.compile("[\u200d\ufe0f\U000e0020-\U000e007f]")


class Emoji:
    """Names or removes emoji: whole sequences of skin tones, flags, keycaps and joined figures.

    Characters that show as text stay, such as ©, ™, ‼, →, digits, # and *, unless U+FE0F after them makes them emoji;
    so do those that U+FE0E makes text.

    Args:
        action: `name` for `:grinning_face:`, `remove` for nothing; of the spaces around what is removed one stays, and
            words without a space between get one.
    """

    name = "emoji"

    def __init__(self, action: Literal["name", "remove"]) -> None:
        require_extra("emoji")
        self._begin, one = _patterns()
        self._one = re.compile(one)
        run = f"(?:{one})(?: ?(?:{one}))*"
        self._run = re.compile(rf"^{run}[ \t]?|[ \t]?{run}(?=[\s.,;:!?)\]]|\Z)|{run}")
        self._names = action == "name"

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Change `document` in place and return None."""
        text = document.text
        if text.isascii() or not self._begin.search(text):
            return None
        lines = text.split("\n")
        for number, line in enumerate(lines):
            if self._begin.search(line) and (found := self._one.findall(line)):
                counts["emoji.found"] += len(found)
                counts["emoji.characters"] += sum(map(len, found))
                lines[number] = self._one.sub(_name, line) if self._names else self._run.sub(_gap, line)
        changed = "\n".join(lines)
        if changed != text:
            counts["emoji.documents"] += 1
            document.text = changed
        return None


def _name(match: re.Match[str]) -> str:
    from emoji import demojize

    return _UNNAMED.sub("", demojize(match[0]))


def _gap(match: re.Match[str]) -> str:
    line, start, end = match.string, match.start(), match.end()
    before, after = line[start - 1 : start], line[end : end + 1]
    return " " if before.isalnum() and after.isalnum() else ""


def _patterns() -> tuple[re.Pattern[str], str]:
    """Return a quick pattern that is found in every text with emoji, and that of one emoji.

    Of UTS 51 (Unicode Emoji), ED-14 to ED-17: a flag, keycap, tagged flag, or figures with joiners between them. What
    is `unqualified` in Unicode's list shows as text by itself.
    """
    from emoji import EMOJI_DATA, STATUS

    single = {text: entry["status"] for text, entry in EMOJI_DATA.items() if len(text) == 1}
    shown = _ranges(text for text, status in single.items() if status != STATUS["unqualified"])
    as_text = _ranges(text for text, status in single.items() if status == STATUS["unqualified"])
    with_tone = _ranges(text for text in single if re.match(f"[{as_text}]", text) and f"{text}\U0001f3fd" in EMOJI_DATA)
    flags = "|".join(text for text in EMOJI_DATA if re.fullmatch("[\U0001f1e6-\U0001f1ff]{2}", text))
    any_figure = f"[{shown}{as_text}]"
    by_itself = f"[{shown}](?!\ufe0e)\ufe0f?{_TONE}?"
    marked = f"[{as_text}]\ufe0f{_TONE}?|[{with_tone}]{_TONE}|[{as_text}](?=\u200d{any_figure})"
    joined = f"(?:{by_itself}|{marked})(?:\u200d{any_figure}\ufe0f?{_TONE}?)*"
    begin = "".join(text for text in single if text < "\U00010000" and re.match(f"[{shown}]", text))
    # Most characters begin none of the alternatives; one look at few ranges tells.
    one = f"(?=[#*0-9©®\u203c-\u3299\U0001f000-\U0001faff])(?:{_REGION}|{flags}|{_KEYCAP}|{joined})"
    return re.compile(f"[{begin}\ufe0f\u200d\U0001f000-\U0001faff]"), one


def _ranges(characters: Iterable[str]) -> str:
    """Return the inside of a set in a pattern; `re` compares those beyond U+FFFF one by one if they are no ranges."""
    codes = sorted(map(ord, characters))
    begins = [code for code, before in zip(codes, [-1, *codes], strict=False) if code != before + 1]
    ends = [code for code, after in zip(codes, [*codes[1:], -1], strict=True) if code + 1 != after]
    return "".join(f"{chr(begin)}-{chr(end)}" for begin, end in zip(begins, ends, strict=True))
