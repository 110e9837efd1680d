"""Levels of questions: how long, how deep, how many hops or digits, by which accuracies are shown apart."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ensemw2s.data.shapes import with_column
from ensemw2s.runtime.values import has_surrogates, shown, shown_names

if TYPE_CHECKING:
    from datasets import Dataset

_LONGEST_LEVEL = 40
# A record of a run holds it in words.
LONGEST_RULE = 100


def check_count(count: str) -> re.Pattern[str]:
    """Return the pattern whose matches are counted; one that is too long or no regular expression raises ValueError."""
    if len(count) > LONGEST_RULE:
        raise ValueError(f"count must have at most {LONGEST_RULE} characters, got {len(count)}")
    try:
        return re.compile(count)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"count must be a regular expression, got {shown(count)}: {error}") from error


def with_levels(questions: Dataset, name: str, *, count: str | None = None, column: str | None = None) -> Dataset:
    """Return the questions with a column `level`, a text.

    Args:
        questions: columns `prompt` and `answer`.
        name: begins every error.
        count: a regular expression; the level is the number of its matches in the prompt.
        column: in place of `count`, the column that holds the level, whole numbers or texts of 1 to 40 letters.

    Raises:
        ValueError: no such column, a level of another kind, or a prompt that is no text where matches are counted.
    """
    if count is not None:
        pattern, prompts = check_count(count), list(questions["prompt"])
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"{name}: count is for prompts that are texts, not for conversations: give a column")
        levels = [str(sum(1 for _ in pattern.finditer(prompt))) for prompt in prompts]
    else:
        if column not in questions.column_names:
            raise ValueError(
                f"{name} has no column {shown(column)} (for the level); its columns are "
                f"{shown_names(questions.column_names)}"
            )
        levels = [_level(value, f"{name}, row {row}, column {column}") for row, value in enumerate(questions[column])]
    kept = questions.remove_columns("level") if "level" in questions.column_names else questions
    return with_column(kept, "level", levels)


def _level(value: object, place: str) -> str:
    if type(value) is int:
        return str(value)
    if isinstance(value, str) and 0 < len(value) <= _LONGEST_LEVEL and not has_surrogates(value):
        return value
    raise ValueError(
        f"{place}: a level must be a whole number or a text of 1 to {_LONGEST_LEVEL} letters, got {shown(value)}"
    )


def level_order(level: str) -> tuple[float, str]:
    """Return a sorting key: numbers by their size, then texts."""
    return (int(level), "") if re.fullmatch(r"-?[0-9]{1,15}", level) else (float("inf"), level)
