"""Markdown to blocks: headings, paragraphs, plays with their speakers; the marks themselves go and are counted."""

import re
from typing import Final

from trimaran.runtime.twin.casing import upper
from trimaran.runtime.twin.texts.work import Block, Source, Tally

_FRONT: Final = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_FIELD: Final = re.compile(r"^(title|author)\s*:\s*[\"']?(.+?)[\"']?\s*$", re.IGNORECASE | re.MULTILINE)
_COMMENT: Final = re.compile(r"<!--.*?-->", re.DOTALL)
_FENCE: Final = re.compile(r" {0,3}(```+|~~~+)")
_HEADING: Final = re.compile(r" {0,3}(#{1,6})\s+(.+?)\s*#*\s*$")
_RULE: Final = re.compile(r" {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$")
_UNDERLINE: Final = re.compile(r" {0,3}(=+|-+)\s*$")
_QUOTE: Final = re.compile(r"^ {0,3}(?:> ?)+")
_IMAGE: Final = re.compile(r"!\[([^\]]*)\]\([^)]*\)")
_LINK: Final = re.compile(r"\[([^\]]+)\]\([^)]*\)")
_TAG: Final = re.compile(r"</?[A-Za-z][^<>]{0,200}>")
_EMPHASIS: Final = re.compile(r"(?<![\\\w*_])(\*{1,3}|_{1,3})(?=[^\s*_])(.+?)(?<=[^\s\\])\1(?![\w*])", re.DOTALL)
_ESCAPE: Final = re.compile(r"\\([!-/:-@\[-`{-~])")
_SPEAKER: Final = re.compile(r"^(?:\*\*|__)([^*_\n]{1,80})(?:\*\*|__)[.:]?(?: {2}|\\)?$")
_DIRECTION: Final = re.compile(r"^[_*]([^_*]+)[_*](?: {2}|\\)?$", re.MULTILINE)
_LEAST_SPEECHES: Final = 10


def read_markdown(text: str, tally: Tally, language: str) -> Source:
    """Return the blocks of a Markdown text.

    Where at least ten paragraphs begin with a line that is bold as a whole, the text is a play: such a line becomes
    `NAME.`, and a line in italics as a whole (a stage direction) `[...]`, as plays are printed without Markdown.

    Args:
        language: for the capitals of speakers' names.
    """
    source = Source([])
    if front := _FRONT.match(text):
        fields = {name.lower(): value for name, value in _FIELD.findall(front[1])}
        source.title, source.author = fields.get("title", ""), fields.get("author", "")
        text = text[front.end() :]
        tally.note("markdown.front_matter", front[0])
    for comment in _COMMENT.findall(text):
        tally.note("markdown.comment", comment)
    raw = _raw_blocks(_COMMENT.sub("", text), tally)
    is_play = sum(not level and bool(_SPEAKER.match(lines[0])) for lines, level in raw) >= _LEAST_SPEECHES
    for lines, level in raw:
        paragraph = _join(_as_play(lines, tally, language)) if is_play and not level else _join(lines)
        if plain := _without_marks(paragraph, tally):
            source.blocks.append(Block(" ".join(plain.split()) if level else plain, level))
    if source.blocks and source.blocks[0].level == 1 and not source.title:
        source.title = source.blocks.pop(0).text
    return source


def _raw_blocks(text: str, tally: Tally) -> list[tuple[list[str], int]]:
    """Return the lines of each paragraph (level 0) and heading, with their ends: two spaces are a hard break."""
    blocks: list[tuple[list[str], int]] = []
    lines: list[str] = []
    fence = ""

    def close(level: int = 0) -> None:
        if lines:
            blocks.append((lines.copy(), level))
            lines.clear()

    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if fence or mark:
            is_edge = mark is not None and mark[1].startswith(fence)
            if is_edge:
                fence = "" if fence else mark[1]  # type: ignore[index]
                close()
            elif line.strip():
                lines.append(line.rstrip() + "  ")
        elif heading := _HEADING.match(line):
            close()
            blocks.append(([heading[2]], len(heading[1])))
        elif lines and (under := _UNDERLINE.match(line)):
            close(1 if under[1][0] == "=" else 2)
        elif _RULE.match(line):
            close()
            tally.note("text.rule", line)
        elif not line.strip():
            close()
        else:
            lines.append(_QUOTE.sub("", line))
    close()
    return blocks


def _as_play(lines: list[str], tally: Tally, language: str) -> list[str]:
    speaker = _SPEAKER.match(lines[0])
    if speaker and len(lines) > 1:
        tally.note("markdown.speaker", times=1)
        lines = [upper(speaker[1].strip(" .:"), language) + ".  ", *lines[1:]]
    text, count = _DIRECTION.subn(lambda match: f"[{_inside(match[1])}]  ", "\n".join(lines))
    tally.note("markdown.stage_direction", times=count)
    return text.split("\n")


def _inside(direction: str) -> str:
    """Return a stage direction without brackets of its own."""
    return " ".join(_ESCAPE.sub(r"\1", direction).strip("[] \n").split())


def _join(lines: list[str]) -> str:
    """Return a paragraph: a line goes on in the next one unless it ends in a hard break."""
    text = ""
    for line in lines:
        is_hard = line.endswith(("  ", "\\")) and not line.endswith("\\\\")
        text += " ".join(line.removesuffix("\\").split()) + ("\n" if is_hard else " ")
    return "\n".join(line.strip() for line in text.strip().split("\n") if line.strip())


def _without_marks(text: str, tally: Tally) -> str:
    for reason, pattern, instead in (
        ("markdown.image", _IMAGE, ""),
        ("markdown.link", _LINK, r"\1"),
        ("markdown.tag", _TAG, ""),
        ("markdown.emphasis", _EMPHASIS, r"\2"),
    ):
        text, count = pattern.subn(instead, text)
        tally.note(reason, times=count)
    text = _ESCAPE.sub(r"\1", text)
    return "\n".join(line.strip() for line in text.split("\n") if line.strip())
