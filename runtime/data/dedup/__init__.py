"""Removing copies from a corpus: whole documents by address, by text and by similarity; lines; long substrings.

Each kind works in three steps. *Map*: one part of the corpus becomes arrays (keys, signatures). *Merge*: the arrays of
all parts, in source order, tell what came before. *Apply*: a part loses its copies. The steps are pure functions and
hold at most one part's texts, or the keys of a bounded share of the corpus, in memory.

Documents have numbers over all parts in source order, beginning with those of earlier runs (`index.py`). Whole
documents come before lines and substrings, so that what a cut refers to is not removed later.
"""
