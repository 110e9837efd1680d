"""How well teachers know which of their answers are right: calibration, and what answering only the surest gains.

A teacher's *probability* of an answer is that of the whole answer, its end included, under the teacher's own mixture;
its *agreement* is the share of the answer's tokens to which experts give more than half. `TokenEnsemble.label` gives
what both are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

NUM_BINS = 10


@dataclass(frozen=True)
class Confidences:
    """One teacher's answers to N questions: what it thought of each, and whether it was right.

    Attributes:
        correct: bool [N].
        probability: float64 [N], of the whole answer.
        agreement: float64 [N], of the experts.
    """

    correct: NDArray[np.bool_]
    probability: NDArray[np.float64]
    agreement: NDArray[np.float64]


def brier_score(probability: ArrayLike, correct: ArrayLike) -> float:
    """Return the mean of `(probability - correct)^2` (Brier, 1950): 0 is best, 0.25 what saying 1/2 always gets."""
    return float(np.mean((np.asarray(probability, dtype=float) - np.asarray(correct, dtype=float)) ** 2))


def expected_calibration_error(probability: ArrayLike, correct: ArrayLike, bins: int = NUM_BINS) -> float:
    """Return the mean distance of right answers from probability over bins of equal width (Guo et al., 2017).

    Bins weigh as many answers as they hold. Few answers in a bin make the error larger than it is.
    """
    given, right = np.asarray(probability, dtype=float), np.asarray(correct, dtype=float)
    places = np.clip((given * bins).astype(int), 0, bins - 1)
    gaps = np.bincount(places, weights=given - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(given))


def ranking_quality(score: ArrayLike, correct: ArrayLike) -> float | None:
    """Return how often a right answer has a higher score than a wrong one, ties counting half; None without both.

    That is the area under the ROC curve: 1/2 for a score that says nothing.
    """
    right = np.asarray(correct, dtype=bool)
    if right.all() or not right.any():
        return None
    ranks, count = rankdata(score)[right], int(right.sum())
    return float((ranks.sum() - count * (count + 1) / 2) / (count * (len(right) - count)))


def selective_accuracy(score: ArrayLike, correct: ArrayLike) -> NDArray[np.float64]:
    """Return float64 [N]: the share of right ones among the 1, 2, ..., N answers of the highest score.

    Answers of equal score stand in no order, so that each counts as the mean of them.
    """
    given, right = np.asarray(score, dtype=float), np.asarray(correct, dtype=float)
    _, group = np.unique(-given, return_inverse=True)
    means = np.bincount(group, weights=right) / np.bincount(group)
    ordered = np.sort(group)
    return np.cumsum(means[ordered]) / np.arange(1, len(given) + 1)


def right_of_the_surest(score: ArrayLike, correct: ArrayLike, shares: ArrayLike) -> NDArray[np.float64]:
    """Return, for each of the shares, that of right answers among so many of the highest score, at least one."""
    curve = selective_accuracy(score, correct)
    return curve[np.maximum(np.round(np.asarray(shares) * len(curve)).astype(int), 1) - 1]


def mean_over_tasks(figure: Callable[[Confidences], float | None], by_task: Mapping[str, Confidences]) -> float | None:
    """Return the mean of a figure over tasks, which all weigh the same; None where a task has none."""
    values = [figure(found) for found in by_task.values()]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
