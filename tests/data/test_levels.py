"""Levels of questions: how they are read from prompts and columns, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from ensemw2s.data.levels import check_count, level_order, with_levels

ROWS = [{"prompt": prompt, "answer": "x", "hops": hops} for prompt, hops in (("ab c", 2), ("", 10), ("abc\nd", 2))]


@pytest.mark.parametrize(
    ("count", "levels"), [(r"\w", ["3", "0", "4"]), (r"\w+", ["2", "0", "2"]), ("(?m)^", ["1", "1", "2"])]
)
def test_matches_are_counted(count: str, levels: list[str]) -> None:
    assert with_levels(Dataset.from_list(ROWS), "them", count=count)["level"][:] == levels


def test_a_column_holds_them_and_an_earlier_column_of_the_name_gives_way() -> None:
    assert with_levels(Dataset.from_list(ROWS), "them", column="hops")["level"][:] == ["2", "10", "2"]
    named = Dataset.from_list([{**row, "level": f"level {i}"} for i, row in enumerate(ROWS)])
    assert with_levels(named, "them", column="level")["level"][:] == ["level 0", "level 1", "level 2"]
    assert with_levels(named, "them", count="b")["level"][:] == ["1", "0", "1"]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (ROWS, {"column": "depth"}, "them has no column 'depth' .*its columns are"),
        ([{**ROWS[0], "hops": 1.5}], {"column": "hops"}, "them, row 0, column hops: .*whole number or a text.*1.5"),
        ([{**ROWS[0], "hops": True}], {"column": "hops"}, "whole number or a text"),
        ([{**ROWS[0], "hops": None}], {"column": "hops"}, "got None"),
        ([{**ROWS[0], "hops": ""}], {"column": "hops"}, "1 to 40 letters"),
        ([{**ROWS[0], "hops": "a" * 41}], {"column": "hops"}, "1 to 40 letters"),
        (
            [{"prompt": [{"role": "user", "content": "hi"}], "answer": "x"}],
            {"count": "a"},
            "not for conversations: give a column",
        ),
    ],
)
def test_what_is_no_level_is_refused(rows: list[dict[str, Any]], settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_levels(Dataset.from_list(rows), "them", **settings)


@pytest.mark.parametrize("count", ["(", "a" * 101, "(?P<a", "a{2,1}"])
def test_what_is_no_regular_expression_is_refused(count: str) -> None:
    with pytest.raises(ValueError, match="count must"):
        check_count(count)


def test_levels_stand_in_order() -> None:
    given = ["10", "b", "9", "-3", "a", "007", "1" * 30]
    assert sorted(given, key=level_order) == ["-3", "007", "9", "10", "1" * 30, "a", "b"]
