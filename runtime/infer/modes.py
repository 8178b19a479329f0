"""What is asked of a model with a text: to continue it, answer, translate or summarize. Pure text: no model, no torch.

With a chat template a mode is a fixed instruction in the user's turn. Without one, a summary is asked for by the words
"TL;DR:" after the text (Radford et al. 2019, section 3.6), a translation by a heading, and an answer is refused. A text
that is too long for the model's context goes in passages, cut between paragraphs, else between sentences, else between
words; their translations are put together again, and the summaries of passages are summarized.
"""

import difflib
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

from trimaran.runtime.infer.chat import ChatError
from trimaran.runtime.infer.prompts import Prompt, RunText, conversation

ModeName = Literal["continue", "answer", "translate", "summarize"]
MODES: Final[tuple[str, ...]] = get_args(ModeName)
LANGUAGES: Final = MappingProxyType(
    {
        "af": "Afrikaans", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali",
        "bs": "Bosnian", "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek",
        "en": "English", "eo": "Esperanto", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian",
        "fi": "Finnish", "fr": "French", "ga": "Irish", "gl": "Galician", "he": "Hebrew", "hi": "Hindi",
        "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian",
        "ja": "Japanese", "ka": "Georgian", "kk": "Kazakh", "ko": "Korean", "ku": "Kurdish", "ky": "Kyrgyz",
        "la": "Latin", "lt": "Lithuanian", "lv": "Latvian", "mk": "Macedonian", "ms": "Malay", "nl": "Dutch",
        "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak",
        "sl": "Slovenian", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil",
        "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese",
        "zh": "Chinese",
    }
)  # fmt: skip
"""ISO 639-1 code -> the language's name in English."""
_INSTRUCTIONS: Final = MappingProxyType(
    {
        "translate": "Translate the following text into {language}. Write only the translation.\n\n{text}",
        "summarize": "Summarize the following text in a few sentences. Write only the summary.\n\n{text}",
    }
)
_PLAIN: Final = MappingProxyType(
    {"translate": "{text}\n\nTranslation into {language}:\n", "summarize": "{text}\n\nTL;DR:"}
)
_SMALLEST_SHARE: Final = 0.9  # that summaries may have of their text: without a bound the rounds might never end
# Where a text may be cut, the best first: after a blank line, a line, a sentence, a word. Each keeps what follows it.
_CUTS: Final = (r"\n[^\S\n]*\n\s*", r"\n\s*", r"(?<=[.!?…。！？])[\"'»”’)\]]*\s+|(?<=[。！？])", r"\s+")


@dataclass(frozen=True)
class Mode:
    """A mode, valid.

    Args:
        language: code of the language to translate into; None for other modes.
    """

    name: ModeName
    language: str | None = None

    @property
    def is_by_passages(self) -> bool:
        """Whether each text stands for itself, and a long one goes in passages."""
        return self.name in _INSTRUCTIONS

    def stop_strings(self, *, has_template: bool) -> tuple[str, ...]:
        """Return what ends an answer to a plain prompt: a model that only continues texts would begin another one."""
        return ("\n\n",) if self.is_by_passages and not has_template else ()

    def may_be_passage(self, text: str, *, has_template: bool) -> bool:
        """Whether a passage, if it is short enough, may stand before one answer.

        The answer to a plain prompt ends at a blank line, so it translates one paragraph.
        """
        return has_template or self.name != "translate" or "\n\n" not in text.strip()


CONTINUE: Final = Mode("continue")
ANSWER: Final = Mode("answer")


def mode_of(name: str, to: str | None = None) -> Mode:
    """Return the mode of the options --mode and --to.

    Raises:
        ValueError: a mode or language is unknown (the nearest is told), or the two don't go together.
    """
    if name not in MODES:
        raise ValueError(f"--mode ({name}) must be one of {', '.join(MODES)}{did_you_mean(name, MODES)}")
    if name != "translate":
        if to is not None:
            raise ValueError(f"--to is for --mode translate, and the mode is {name}; leave --to out")
        return Mode(name)  # type: ignore[arg-type]  # it is one of MODES
    if to is None:
        raise ValueError("--mode translate needs --to, the code of a language such as tr or de")
    return Mode("translate", language_of(to))


def language_of(text: str) -> str:
    """Return the code of a language from its code or English name; ValueError with the nearest for an unknown one."""
    by_name = {name.lower(): code for code, name in LANGUAGES.items()}
    asked = text.strip().lower()
    if asked in LANGUAGES:
        return asked
    if asked in by_name:
        return by_name[asked]
    close = difflib.get_close_matches(asked, by_name, n=1, cutoff=0.5) if len(asked) > 2 else []
    # Two letters differ by one: the beginning of a name is the likelier slip (tu for tr, Turkish).
    codes = [by_name[each] for each in close] or [
        code for name, code in by_name.items() if name.startswith(asked) and asked
    ]
    codes = codes or difflib.get_close_matches(asked, LANGUAGES, n=1, cutoff=0.5)
    near = " or ".join(f"{code} ({LANGUAGES[code]})" for code in codes[:3])
    advice = f"did you mean {near}?" if near else "give a code of ISO 639-1, such as tr or de"
    raise ValueError(f"--to ({text}) is no language known here; {advice}")


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """Return the end of a sentence that names the nearest of `names`, "" where none is near."""
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def prompt_in_mode(mode: Mode, text: str, *, has_template: bool, system: str | None = None) -> Prompt:
    """Return what a model is given for one text, which fits its context.

    Args:
        has_template: whether the model has a chat template.
        system: what the model is told before.

    Raises:
        ChatError: the mode can't do without what is missing; a sentence.
    """
    if mode.name == "continue":
        if system is not None:
            raise ChatError("a text that is continued has no system message: put it into the text, or leave it out")
        return Prompt(text)
    language = LANGUAGES.get(mode.language or "", "")
    if has_template:
        asked = _INSTRUCTIONS.get(mode.name, "{text}").replace("{language}", language)
        return conversation(asked.replace("{text}", text), system)
    if mode.name == "answer":
        raise ChatError(
            "this model has no chat template: it was not tuned for conversations and only continues texts; use "
            "--mode continue, or write its template to chat_template.jinja in the run folder"
        )
    if system is not None:
        raise ChatError("this model has no chat template, so there is no system message to give it; leave --system out")
    return Prompt(_PLAIN[mode.name].replace("{language}", language).replace("{text}", text.rstrip()))


def passage_test(
    mode: Mode, encode: Callable[[str], Sequence[int]], context: int, max_new_tokens: int, text: RunText
) -> Callable[[str], bool]:
    """Return what tells whether a passage leaves room in the context for its answer.

    An answer has at most half of the context. A translation may have twice the tokens of its text, since a tokenizer
    knows the one language better than the other.

    Args:
        encode: makes the prompt of a passage.
        context: of the model, in tokens.
    """
    answer_tokens = min(max_new_tokens, context // 2)

    def fits(passage: str) -> bool:
        if not mode.may_be_passage(passage, has_template=text.template is not None):
            return False
        if mode.name == "translate" and 2 * len(text.tokenizer.encode(passage)) > answer_tokens:
            return False
        return len(encode(passage)) + answer_tokens <= context

    return fits


def split_passages(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Return a text in passages that fit, as long as possible, cut at the best places: put together they are the text.

    Args:
        fits: whether a passage is short enough; what fits still does with less.
    """
    return list(_passages(text, fits, 0))


def _passages(text: str, fits: Callable[[str], bool], level: int) -> Iterator[str]:
    """Yield the passages of a text that has no better place to cut than those of `level`."""
    if fits(text) or len(text) <= 1:
        yield text
        return
    if level == len(_CUTS):
        size = _largest(range(1, len(text)), lambda size: fits(text[:size]))
        yield text[: size or 1]
        yield from _passages(text[size or 1 :], fits, level)
        return
    pieces = _pieces(text, _CUTS[level])
    while pieces:
        count = _longest_beginning(pieces, fits)
        if count:
            yield "".join(pieces[:count])
        else:
            yield from _passages(pieces[0], fits, level + 1)
        del pieces[: count or 1]


def _longest_beginning(pieces: Sequence[str], fits: Callable[[str], bool]) -> int:
    """Return how many of the first pieces fit together; no text much longer than those is looked at."""
    step = 1
    while step <= len(pieces) and fits("".join(pieces[:step])):
        step *= 2
    return _largest(range(step // 2 + 1, min(step, len(pieces) + 1)), lambda count: fits("".join(pieces[:count])))


def _pieces(text: str, cut: str) -> list[str]:
    """Return a text cut after each match."""
    ends = [match.end() for match in re.finditer(cut, text) if 0 < match.end() < len(text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def _largest(sizes: range, holds: Callable[[int], bool]) -> int:
    """Return the largest size for which `holds`, or what comes before them; one that holds does so for smaller ones."""
    low, high = sizes.start - 1, sizes.stop - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Round:
    """Passages that a model is given next, each for itself.

    Args:
        ends: the white space after each, which belongs after its answer.
        is_last: whether their answers are the result.
        note: a sentence for the user, "" for none.
    """

    passages: tuple[str, ...]
    ends: tuple[str, ...]
    is_last: bool
    note: str = ""


def rounds(mode: Mode, text: str, fits: Callable[[str], bool]) -> Generator[Round, Sequence[str], str]:
    """Yield what a model is given for a text, round after round; the answers of each are sent in. Returns the result.

    A translation has one round. Summaries have further ones until a single passage holds all of them, or until they
    get no shorter; then they are the result as they stand.

    Args:
        fits: whether a passage leaves room for its answer.

    Raises:
        ValueError: not even an empty passage fits.
    """
    if not fits(""):
        raise ValueError(
            "the model's context has no room for a passage beside the instruction and the answer; lower "
            "max_new_tokens, or shorten the system message"
        )
    verb = "translated" if mode.name == "translate" else "summarized"
    while True:
        passages = [each for each in split_passages(text, lambda each: fits(each.rstrip())) if each.strip()] or [text]
        ends = tuple(each[len(each.rstrip()) :] for each in passages)
        is_last = mode.name != "summarize" or len(passages) == 1
        then = "" if is_last else ", then their summaries"
        note = f"the text is {verb} in {len(passages)} passages, each for itself{then}" if len(passages) > 1 else ""
        answers = yield Round(tuple(each.rstrip() for each in passages), ends, is_last, note)
        if is_last:
            return "".join(answer.strip() + end for answer, end in zip(answers, ends, strict=True)).rstrip()
        summaries = "\n\n".join(each.strip() for each in answers)
        if len(summaries) > _SMALLEST_SHARE * len(text):
            return summaries
        text = summaries
