"""Whether a text reads like the author's: a classifier over character n-grams that knows its own held-out accuracy.

Character n-grams carry spelling, endings, function words and punctuation, and are the steadiest single feature of
authorship (Stamatatos 2009, section 2.2; Koppel, Schler and Argamon 2009, section 3.1). Each text is cut into pieces of
one length, for short ones are harder to tell. The classifier never sees what it is judged on: whole works or chapters
of the author, and whole texts of others, are held out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.twin.report.intervals import Estimate, mean
from trimaran.runtime.twin.report.windows import windows

LEAST_ACCURACY: Final = 0.95
"""Balanced accuracy on held-out pieces below which no answer is judged."""
PIECE: Final = 400
"""Characters of a piece."""
_FEWEST_PIECES: Final = 20  # of the author, and of others, to learn from; a quarter of them to be judged on
_MOST_PIECES: Final = 4000
_NGRAMS: Final = (2, 4)
_MOST_FEATURES: Final = 50_000


class CannotMeasureError(Exception):
    """A figure can't be measured; the message says why and what would do."""


@dataclass(frozen=True, eq=False)
class StyleClassifier:
    """A trained classifier.

    Attributes:
        accuracy: balanced, on held-out pieces: the mean of the share of the author's and of others' that it knows.
        held_out: how many pieces of the author's and of others' that is.
        piece: characters of a piece.
    """

    accuracy: float
    held_out: tuple[int, int]
    piece: int
    _pipeline: Any

    def scores(self, texts: Sequence[str]) -> list[float]:
        """Return of each text that has a piece's length the mean probability that its pieces are the author's."""
        found = []
        for text in texts:
            pieces = list(windows(text, self.piece))
            if pieces:
                chances = self._pipeline.predict_proba(pieces)[:, 1]
                found.append(float(chances.mean()))
        return found

    def judge(self, texts: Sequence[str], name: str) -> Estimate:
        """Return the share of texts that read like the author's.

        Args:
            name: of whose texts these are, for the random numbers.

        Raises:
            CannotMeasureError: fewer than two texts are long enough.
        """
        found = self.scores(texts)
        if len(found) < 2:
            raise CannotMeasureError(
                f"{len(found)} of {len(texts)} texts have the {self.piece} characters that the classifier needs; ask "
                "for longer answers"
            )
        return mean([float(chance > 0.5) for chance in found], name)


def train_style(
    author: Sequence[str],
    others: Sequence[str],
    held_out_author: Sequence[str],
    held_out_others: Sequence[str],
    *,
    piece: int = PIECE,
    seed: int = 0,
) -> StyleClassifier:
    """Return a classifier of the author's pieces against those of others.

    Args:
        author, others: texts to learn from; held_out_*: to be judged on, of other works or chapters.
        piece: characters of a piece; about those of an answer.

    Raises:
        CannotMeasureError: there are too few pieces, or the classifier tells too few of the held-out ones.
        DataError: scikit-learn is not installed.
    """
    require_extra("sklearn", extra="twin")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.pipeline import make_pipeline

    learned = [_pieces(texts, piece, seed) for texts in (others, author)]
    judged = [_pieces(texts, piece, seed) for texts in (held_out_others, held_out_author)]
    for pieces, least in ((learned, _FEWEST_PIECES), (judged, _FEWEST_PIECES // 4)):
        for whose, found in zip(("of others", "of the author"), pieces, strict=True):
            if len(found) < least:
                held_out = " held-out" if pieces is judged else ""
                raise CannotMeasureError(
                    f"style can't be measured: there are {len(found)}{held_out} pieces of {piece} characters {whose}, "
                    f"and it takes {least}; give more texts"
                )
    pipeline = make_pipeline(
        TfidfVectorizer(
            analyzer="char_wb", ngram_range=_NGRAMS, lowercase=False, sublinear_tf=True, max_features=_MOST_FEATURES
        ),
        LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000, random_state=seed),
    )
    pipeline.fit([*learned[0], *learned[1]], [0] * len(learned[0]) + [1] * len(learned[1]))
    truth = [0] * len(judged[0]) + [1] * len(judged[1])
    accuracy = float(balanced_accuracy_score(truth, pipeline.predict([*judged[0], *judged[1]])))
    if accuracy < LEAST_ACCURACY:
        raise CannotMeasureError(
            f"style can't be measured: the classifier knows {accuracy:.1%} of held-out pieces of {piece} characters, "
            f"and below {LEAST_ACCURACY:.0%} its verdict on an answer means nothing; give more texts, or longer answers"
        )
    return StyleClassifier(accuracy, (len(judged[1]), len(judged[0])), piece, pipeline)


def _pieces(texts: Sequence[str], characters: int, seed: int) -> list[str]:
    """Return the pieces of texts; of very many, some that are drawn evenly over all texts."""
    found = [piece for text in texts for piece in windows(text, characters)]
    if len(found) <= _MOST_PIECES:
        return found
    step = len(found) / _MOST_PIECES
    return [found[int((number + seed % 7 / 7) * step)] for number in range(_MOST_PIECES)]
