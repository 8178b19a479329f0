"""C4's rules (Raffel et al. 2020, section 2.2), each judged as datatrove's C4QualityFilter does.

They cut lines as well, so a document that stays is changed. Lines that are cut are counted by their rule, of documents
that stay alone: those of the others go with the document.
"""

import re
from collections import Counter

from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.filters.words import lines_of, split_sentences
from trimaran.runtime.spec.sections.recipe.filter import C4Settings

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_LINE_ENDS = (".", "?", "!", '"', "'")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


class C4Filter:
    """Cuts lines that are no sentences, and removes documents of which too little stays."""

    name = "c4"

    def __init__(self, settings: C4Settings) -> None:
        self._settings = settings

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Cut lines, or return why the document goes."""
        rules, text = self._settings, document.text
        cites = rules.citations and "[" in text
        phrases = self._phrases(_CITATION.sub("", text) if cites else text)
        cut: Counts = Counter()
        kept: list[str] = []
        sentences = 0
        cuts_empty = rules.line_end or rules.min_words_per_line is not None
        for line in map(str.strip, lines_of(text)):
            if cuts_empty and not line:
                continue
            line, rule, citations = self._judge_line(line, cites, phrases)
            if rule in ("lorem_ipsum", "curly_bracket"):
                return Removal(f"c4.{rule}", line)
            if rule:
                cut[f"c4.line_{rule}"] += 1
            else:
                cut["c4.citation"] += citations
                kept.append(line)
                if rules.min_sentences is not None and sentences < rules.min_sentences:
                    sentences += len(split_sentences(line))
        if rules.min_sentences is not None and sentences < rules.min_sentences:
            return Removal("c4.few_sentences", f"{sentences} sentences stay, below {rules.min_sentences}")
        counts.update(+cut)
        document.text = "\n".join(kept).strip()
        return None

    def _phrases(self, text: str) -> frozenset[str]:
        """Return which rules' phrases are in the text at all, so that its lines need not be searched for others."""
        lowered = text.lower()
        there = {
            "lorem_ipsum": self._settings.lorem_ipsum and "lorem ipsum" in lowered,
            "javascript": self._settings.javascript and "javascript" in lowered,
            "curly_bracket": self._settings.curly_bracket and "{" in text,
            "policy": self._settings.policy and any(policy in lowered for policy in _POLICIES),
        }
        return frozenset(rule for rule, is_there in there.items() if is_there)

    def _judge_line(self, line: str, cites: bool, phrases: frozenset[str]) -> tuple[str, str, int]:
        """Return the line without citations, the rule that it breaks or "", and how many citations were cut out."""
        rules, citations = self._settings, 0
        longest, fewest = rules.max_word_length, rules.min_words_per_line
        if longest is not None and len(line) > longest and any(len(word) > longest for word in line.split()):
            return line, "long_word", 0
        few_words = fewest is not None and len(line.split(None, fewest - 1)) < fewest
        if cites:
            line, citations = _CITATION.subn("", line)
        if rules.line_end and (not line.endswith(_LINE_ENDS) or line.endswith("...")):
            return line, "end", citations
        if few_words:
            return line, "few_words", citations
        lowered = line.lower() if phrases else ""
        if "lorem_ipsum" in phrases and "lorem ipsum" in lowered:
            return line, "lorem_ipsum", citations
        if "javascript" in phrases and "javascript" in lowered:
            return line, "javascript", citations
        if "curly_bracket" in phrases and "{" in line:
            return line, "curly_bracket", citations
        if "policy" in phrases and any(policy in lowered for policy in _POLICIES):
            return line, "policy", citations
        return line, "", citations
