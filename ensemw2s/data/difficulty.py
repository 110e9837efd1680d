"""The cut between easy and hard questions, and the folds that rate them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemw2s.data.questions import check_disjoint, check_questions, question_key, row_name
from ensemw2s.runtime.fingerprint import digest_json
from ensemw2s.runtime.values import check_number, is_finite_number, shown, shown_names

if TYPE_CHECKING:
    from datasets import Dataset


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_REMEDY = (
    "If the scale is your own, use a finer one; if models rated them, train those longer (if all seem hard) or shorter "
    "(if all seem easy); or lower `resolution` if smaller differences mean something"
)


def assign_folds(questions: Dataset, folds: int, seed: int = 0) -> np.ndarray:
    """Return int64 [N], the fold of each question, by a hash of seed and prompt.

    Folds differ by at most one in their number of distinct questions; rows that repeat a question share its fold.

    Raises:
        ValueError: `folds` is below 2 or above the number of distinct questions.
    """
    check_number("folds", folds, whole=True)
    keys = [question_key(prompt) for prompt in questions["prompt"]]
    ranked = sorted(set(keys), key=lambda key: random_rank(seed, key))
    if folds > len(ranked):
        raise ValueError(f"folds must be between 2 and the number of distinct questions, {len(ranked)}; got {folds}")
    fold = {key: rank % folds for rank, key in enumerate(ranked)}
    return np.array([fold[key] for key in keys], dtype=np.int64)


def random_rank(seed: int, *text: str) -> str:
    """Return a key whose order is random and depends on the seed and the text alone."""
    return digest_json(["difficulty", seed, *text])


@dataclass(frozen=True)
class DifficultySplit:
    """Easy and hard questions of one dataset, in its order, and where they were cut.

    Attributes:
        easy: the easiest questions.
        hard: the hardest ones, each harder than every easy one.
        record: plain JSON: `easy_share` and `hard_share` of all `num_questions`, the highest difficulty `easy_up_to` in
            the one and the lowest `hard_from` in the other, and `quantiles` of all ("0.5" is the median).
    """

    easy: Dataset
    hard: Dataset
    record: dict[str, Any]


def split_by_difficulty(
    questions: Any,
    easy: float = 0.5,
    hard: float = 0.5,
    *,
    tolerance: float = 0.1,
    resolution: float = 0.01,
    min_values: int = 2,
) -> DifficultySplit:
    """Cut questions into an easy part, the lower quantile of their difficulty, and a hard one, the upper.

    A cut falls between two values, never among questions of the same difficulty: of all such places the nearest to the
    wanted share is taken [choice]. So a scale of few values (grades, hops, numbers of digits) gives other shares than
    the wanted ones, and is refused if they are too far off.

    Args:
        questions: columns `prompt`, `answer` and `difficulty` (numbers, also as text, as CSV files have them).
        easy: the share of the easiest questions that count as easy, above 0.
        hard: the share of the hardest ones that count as hard, above 0; what is between belongs to neither.
        tolerance: how far off a share may be, in [0, 1], besides half a question [choice].
        resolution: difficulties are rounded to its multiples before they are compared, so that differences which mean
            nothing count as ties; 0 compares them as they are [choice].
        min_values: the fewest distinct values that make a scale, at least 2. A rating from k folds with fewer
            than k values can at best tell the folds apart.

    Raises:
        ValueError: no column `difficulty`, a difficulty that is no finite number (names the row), fewer than
            `min_values` values, no cut between two values within the tolerance (says how many questions are tied
            there), a question in both parts, or a setting outside its range.
    """
    check_cut(easy, hard, tolerance, resolution)
    check_number("min_values", min_values, whole=True)
    questions = check_questions(questions, "questions")
    values = _difficulties(questions)
    levels = np.round(values / resolution) if resolution else values
    distinct = len(np.unique(levels))
    if distinct < min_values:
        raise ValueError(
            f"the difficulties of {len(values)} questions have {distinct} distinct values (to within {resolution:g}), "
            f"expected at least {min_values}. {_REMEDY}"
        )
    # One cut where nothing is left between: two roundings could choose two.
    shares = {"easy": easy, "hard": easy if math.isclose(easy + hard, 1) else 1 - hard}
    ordered = np.sort(levels)
    sizes = {part: _nearest_cut(ordered, share) for part, share in shares.items()}
    for part, share in shares.items():
        wanted = _wanted(share, len(values))
        if abs(sizes[part] - wanted) > tolerance * len(values) + 0.5:
            tied = values[levels == ordered[int(wanted)]]
            raise ValueError(
                f"the difficulty is degenerate: {len(tied) / len(values):.0%} of {len(values)} questions have a "
                f"difficulty of {np.median(tied):.4g} (to within {resolution:g}), and the {part} part would have to "
                f"end among them. No cut between two values is within tolerance={tolerance:g} of the wanted share. "
                f"Set {_shares_that_fit(sizes, len(values))}, which fits, with splits of such sizes. {_REMEDY}"
            )
    ranks = np.argsort(np.argsort(levels, kind="stable"), kind="stable")
    rows = [np.flatnonzero(ranks < sizes["easy"]), np.flatnonzero(ranks >= sizes["hard"])]
    parts = {name: questions.select(chosen) for name, chosen in zip(("easy", "hard"), rows, strict=True)}
    check_disjoint(parts)
    return DifficultySplit(**parts, record={
        "kind": "difficulty", "easy_share": len(rows[0]) / len(values), "hard_share": len(rows[1]) / len(values),
        "easy_up_to": float(values[rows[0]].max()), "hard_from": float(values[rows[1]].min()),
        "quantiles": {str(q): float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)},
        "num_questions": len(values),
    })  # fmt: skip


def _wanted(below: float, count: int) -> float:
    """Return how many of `count` questions are to be below a cut, for a share; each part gets a question at least."""
    return min(max(below * count, 1), count - 1)


def _nearest_cut(ordered: np.ndarray, below: float) -> int:
    """Return how many questions are below the cut between two values that is nearest to the share `below`."""
    places = np.flatnonzero(np.diff(ordered)) + 1
    return int(places[np.abs(places - _wanted(below, len(ordered))).argmin()])


def _shares_that_fit(sizes: Mapping[str, int], count: int) -> str:
    easy = min(max(sizes["easy"] / count, 0.01), 0.99)
    hard = min(max(1 - sizes["hard"] / count, 0.01), 0.99)
    # Two roundings could make more than all of it.
    return f"easy={easy:.2f} and hard={min(round(hard, 2), 1 - round(easy, 2)):.2f}"


def check_cut(easy: float, hard: float, tolerance: float, resolution: float) -> None:
    """Raise ValueError or TypeError, naming it, if a setting of `split_by_difficulty` is outside its range."""
    for name, value in (("easy", easy), ("hard", hard)):
        check_number(name, value, "share")
    if not easy + hard <= 1 + 1e-9:
        raise ValueError(f"easy and hard must be shares above 0, at most 1 together; got easy={easy} and hard={hard}")
    check_number("tolerance", tolerance)
    check_number("resolution", resolution)


def _difficulties(questions: Dataset) -> np.ndarray:
    """Return float64 [N], the column `difficulty`."""
    if "difficulty" not in questions.column_names:
        raise ValueError(
            f"the questions have no column 'difficulty', only {shown_names(questions.column_names)}: rate them with "
            "rate_difficulty (in an experiment: data.difficulty.folds=5), or map yours with check_questions"
        )
    for index, row in enumerate(questions.select_columns(["id", "prompt", "difficulty"])):
        if not is_finite_number(row["difficulty"]):
            raise ValueError(
                f"questions, {row_name(row, index)}: difficulty is {shown(row['difficulty'])}, expected a finite "
                "number. Fill it in, or leave the row out"
            )
    return np.array(questions["difficulty"], dtype=np.float64)
