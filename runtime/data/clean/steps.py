"""The steps of cleaning that a spec asks for, in their order."""

from typing import get_args

from trimaran.runtime.data.clean.emoji import Emoji
from trimaran.runtime.data.clean.encoding import RepairEncoding
from trimaran.runtime.data.clean.html import HtmlToText
from trimaran.runtime.data.clean.pii import Pii
from trimaran.runtime.data.clean.spelling import Spelling
from trimaran.runtime.data.clean.unicode import Unicode
from trimaran.runtime.data.document import Step
from trimaran.runtime.spec.sections.recipe.clean import CleanSection, PiiKind


def clean_steps(settings: CleanSection) -> list[Step]:
    """Return the steps; what they need is looked for and read now, except resiliparse, at the first page of HTML.

    Raises:
        DataError: a package is missing, or the list of `spelling` can't be used.
    """
    steps: list[Step] = [HtmlToText(settings.html)]
    if settings.repair_encoding:
        steps.append(RepairEncoding())
    if settings.unicode:
        steps.append(Unicode())
    if settings.emoji != "keep":
        steps.append(Emoji(settings.emoji))
    if settings.spelling:
        steps.append(Spelling(settings.spelling))
    if settings.pii:
        steps.append(Pii(get_args(PiiKind) if settings.pii is True else settings.pii))
    return steps
