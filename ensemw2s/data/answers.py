"""When two answers are the same."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def normalise_answer(text: str) -> str:
    """Return the form in which answers are compared.

    Unicode compatibility forms are unified (NFKC), case is folded, white space becomes single spaces, and closing
    full stops are dropped. So answers that differ in white space alone, as in the indentation of code, count as equal;
    scored token by token (`ensemw2s.inference.scoring.score_examples`), they do not.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(". ")


def exact_match(answers: Sequence[str], references: Sequence[str]) -> NDArray[np.bool_]:
    """Compare answers with as many true ones after `normalise_answer`: bool `[n]`; unequal numbers: ValueError."""
    if len(answers) != len(references):
        raise ValueError(f"there are {len(answers)} answers but {len(references)} references")
    pairs = zip(map(normalise_answer, answers), map(normalise_answer, references), strict=True)
    return np.array([answer == reference for answer, reference in pairs], dtype=np.bool_)
