"""A passage of an author's texts with its provenance."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Passage:
    """Consecutive paragraphs of one chapter of one work.

    Args:
        id: number among all passages of the twin, from 0, in the order of works.
        work: number of the work; its cleaned text is `works/NUMBER.txt` (five digits) in the twin's folder.
        file: the source as the user has named it.
        title: of the work.
        chapter: its heading, or act and scene; "" where the work has none.
        start, end: characters of the cleaned text of the work, end exclusive.
        first_line, last_line: lines of the cleaned text, counted from 1.
        text: exactly the cleaned text's characters [start, end).
        is_held_out: whether no training example and no index may use it.
    """

    id: int
    work: int
    file: str
    title: str
    chapter: str
    start: int
    end: int
    first_line: int
    last_line: int
    text: str
    is_held_out: bool
