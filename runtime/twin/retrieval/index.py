"""The index of a twin's passages: BM25 by bm25s over Snowball stems, in a folder of JSON and arrays, no pickle."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from trimaran.models.fields import counted
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.files import DataError, unreadable
from trimaran.runtime.files import check_regular, read_json, write_text
from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.retrieval.terms import Terms

VERSION: Final = 1
K1: Final = 1.5
B: Final = 0.75
"""Of BM25 in the form of Lucene (Robertson, Zaragoza, "The Probabilistic Relevance Framework", 2009); bm25s' own."""
_ARRAYS: Final = ("data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy")
_FILES: Final = (*_ARRAYS, "vocab.index.json", "params.index.json")
_OWN: Final = "index.json"
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Found:
    """A passage that was found.

    Args:
        score: BM25's, of all terms of the question.
        coverage: share of the question's terms that the passage has, each weighed by how rare it is; 0 to 1.
    """

    passage: Passage
    score: float
    coverage: float


@dataclass(frozen=True, slots=True)
class Silence:
    """From which coverage on the texts speak of something, and how that was measured.

    Args:
        threshold: the least coverage of the best of the first passages for the texts not to be silent.
        absent: questions about absent topics that it was set on; 0 where there are none in the texts' language.
        refused: share of those that are below.
        present: queries of the texts' own sentences that it was held against.
        kept: share of those that are not below.
    """

    threshold: float = 0.0
    absent: int = 0
    refused: float = 0.0
    present: int = 0
    kept: float = 1.0


class Index:
    """Finds passages for a question. Not for several threads at once.

    Args:
        passages: those that are indexed, none held out.
        terms: for the language of the texts.
        ranker: bm25s' index over them.
        silence: when nothing is found.
    """

    def __init__(self, passages: Sequence[Passage], terms: Terms, ranker: Any, silence: Silence) -> None:
        self.passages = tuple(passages)
        self.terms, self.silence = terms, silence
        self._ranker = ranker
        indptr: Int64Array = np.asarray(ranker.scores["indptr"], np.int64)
        self._indptr, self._indices = indptr, ranker.scores["indices"]
        counts = np.diff(indptr)
        # Robertson's idf as Lucene has it, which is never negative; a term that no passage has is the rarest.
        self._idf = np.log1p((len(passages) - counts + 0.5) / (counts + 0.5))
        self._rarest = float(np.log1p((len(passages) + 0.5) / 0.5))

    @classmethod
    def build(cls, passages: Sequence[Passage], language: str, silence: Silence | None = None) -> Self:
        """Return the index of all passages that are not held out; titles and chapters count as their text.

        Args:
            language: ISO 639-1 code of the texts.

        Raises:
            DataError: no passage has a word, or bm25s or PyStemmer is missing.
        """
        terms = Terms(language)
        import bm25s

        chosen = [each for each in passages if not each.is_held_out]
        lists = [terms.of(f"{each.title}\n{each.chapter}\n{each.text}") for each in chosen]
        if not any(lists):
            raise DataError(
                f"none of the {counted(len(chosen), 'passage')} to answer from has a word besides stop words, so "
                "nothing can be found in them; give texts that are written in words"
            )
        vocabulary = {term: number for number, term in enumerate(sorted({term for each in lists for term in each}))}
        ranker = bm25s.BM25(k1=K1, b=B, method="lucene", csc_backend="numpy")
        ranker.index(([[vocabulary[term] for term in each] for each in lists], vocabulary), show_progress=False)
        return cls(chosen, terms, ranker, silence or Silence())

    def search(self, question: str, k: int = 5) -> tuple[Found, ...]:
        """Return the k passages of the highest scores, the best first; none where the texts are silent.

        The texts are silent where no passage has a term of the question, or the greatest coverage of the k is below
        `silence.threshold`.
        """
        found = self.rank(question, k)
        return found if max((each.coverage for each in found), default=0.0) >= self.silence.threshold else ()

    def rank(self, question: str, k: int = 5) -> tuple[Found, ...]:
        """Return the same without regard to silence: passages that have any term of the question."""
        terms = sorted(set(self.terms.of(question)))
        ids = self._ranker.get_tokens_ids(terms)
        if not ids or k < 1:
            return ()
        scores = self._ranker.get_scores_from_ids(ids)
        best = _greatest(scores, k)
        best = best[scores[best] > 0]
        has = np.array([np.isin(best, self._indices[self._indptr[each] : self._indptr[each + 1]]) for each in ids])
        weights = self._idf[ids]
        total = float(weights.sum()) + self._rarest * (len(terms) - len(ids))
        coverages = (weights @ has) / total
        return tuple(
            Found(self.passages[place], float(scores[place]), float(coverage))
            for place, coverage in zip(best.tolist(), coverages, strict=True)
        )

    @property
    def vocabulary(self) -> dict[str, int]:
        """The terms of the passages and their numbers."""
        found: dict[str, int] = self._ranker.vocab_dict
        return found

    def says(self, words: str) -> bool:
        """Return whether a passage has some words in a row, by their terms; what is all stop words, none has."""
        terms = self.terms.of(words)
        ids = self._ranker.get_tokens_ids(terms)
        if not terms or len(ids) < len(terms):
            return False
        columns = [self._indices[self._indptr[each] : self._indptr[each + 1]] for each in ids]
        places = [place for place in columns[0].tolist() if all(place in column for column in columns[1:])]
        return len(terms) == 1 or any(_is_in(terms, self.terms.of(self.passages[place].text)) for place in places)

    def rarity(self, term: str) -> float:
        """Return the inverse document frequency of a term, that of an unseen one where no passage has it."""
        number = self.vocabulary.get(term)
        return self._rarest if number is None else float(self._idf[number])

    def save(self, folder: Path) -> None:
        """Write the index into a folder of its own.

        Raises:
            OSError: it can't be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._ranker.save(folder, show_progress=False, allow_pickle=False)
        own = {
            "version": VERSION,
            "language": self.terms.language,
            "passages": [each.id for each in self.passages],
            "silence": {name: getattr(self.silence, name) for name in Silence.__slots__},
        }
        write_text(folder / _OWN, json.dumps(own))

    @classmethod
    def load(cls, folder: Path, passages: Sequence[Passage]) -> Self:
        """Return the index of a folder.

        Args:
            passages: all of the twin, by number.

        Raises:
            DataError: a file is missing or damaged, or the index is not of these passages, or has a held-out one.
        """
        require_extra("bm25s", "Stemmer", extra="twin")
        import bm25s

        try:
            own = read_json(folder / _OWN)
            for name in _FILES:
                check_regular(folder / name)
            if own["version"] != VERSION:
                raise ValueError(f"it is of version {own['version']}, not {VERSION}")
            chosen = [passages[number] for number in own["passages"]]
            silence = Silence(**own["silence"])
            params = read_json(folder / "params.index.json")
            ranker = bm25s.BM25(k1=K1, b=B, method="lucene", csc_backend="numpy")
            ranker.nonoccurrence_array = None  # of other forms of BM25 than Lucene's
            ranker.vocab_dict = _vocabulary(read_json(folder / "vocab.index.json"))
            ranker.load_scores(folder, num_docs=params["num_docs"], allow_pickle=False)
            ranker.scores = _checked(ranker.scores, len(chosen), len(ranker.vocab_dict))
        except (ValueError, KeyError, IndexError, TypeError, EOFError) as error:
            raise DataError(f"{folder} has no whole index of this twin ({error}); build it again") from None
        except OSError as error:
            raise unreadable(folder, error, "run trimaran twin build again, which makes it anew") from error
        if held := [each.id for each in chosen if each.is_held_out]:
            raise DataError(f"{folder} has the held-out passage {held[0]}, which no index may have; build it again")
        return cls(chosen, Terms(str(own["language"])), ranker, silence)


def _vocabulary(values: Any) -> dict[str, int]:
    if not isinstance(values, dict) or sorted(values.values()) != list(range(len(values))):
        raise ValueError("its vocabulary does not number terms from 0")
    return values


def _checked(scores: dict[str, Any], num_passages: int, num_terms: int) -> dict[str, Any]:
    """Return arrays whose numbers all name a passage; bm25s itself reads them unchecked."""
    data, indices, indptr = (scores[name] for name in ("data", "indices", "indptr"))
    if data.dtype.kind != "f" or indices.dtype.kind != "i" or indptr.dtype.kind != "i":
        raise ValueError("its arrays are of other types")
    # bm25s adds a term "" that no passage has.
    if len(indptr) - 1 > num_terms or len(indptr) < num_terms or indptr[0] != 0 or indptr[-1] != len(indices):
        raise ValueError("its arrays are of other lengths")
    if len(data) != len(indices) or (np.diff(indptr) < 0).any() or not np.isfinite(data).all():
        raise ValueError("its arrays are damaged")
    if scores["num_docs"] != num_passages or (len(indices) and not 0 <= indices.min() <= indices.max() < num_passages):
        raise ValueError(f"it is not of {num_passages:,} passages")
    return scores


def _is_in(terms: Sequence[str], text: Sequence[str]) -> bool:
    count = len(terms)
    return any(text[start : start + count] == terms for start in range(len(text) - count + 1))


def _greatest(scores: npt.NDArray[np.float32], k: int) -> Int64Array:
    """Return the places of the k greatest scores, the greatest first, the earliest of equal ones first."""
    if k < len(scores):
        least = np.partition(scores, -k)[-k]
        places = np.flatnonzero(scores >= least)
    else:
        places = np.arange(len(scores))
    return places[np.argsort(-scores[places], kind="stable")][:k]
