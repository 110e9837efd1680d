"""When two answers are the same."""

from __future__ import annotations

import pytest

from ensemw2s.data.answers import exact_match


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("  Paris. ", "paris", True), ("a\u00a0 b\n c", "A b C", True), ("１２", "12", True), ("ß", "SS", True),
        ("cat dog", "dog cat", False), ("3.5", "35", False), ("", "x", False), ("-3", "3", False),
    ],
)  # fmt: skip
def test_exact_match_ignores_case_and_space_and_nothing_else(answer: str, reference: str, same: bool) -> None:
    assert exact_match([answer], [reference]).tolist() == [same]


def test_unequal_numbers_of_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="1 answers but 0 references"):
        exact_match(["a"], [])
