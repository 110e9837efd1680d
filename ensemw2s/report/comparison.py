"""Two runs side by side: in which settings they differ, and what every arm reached in each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ensemw2s.report.arms import arm_name, arm_order
from ensemw2s.report.pool import Pool, pool_runs
from ensemw2s.report.runs import flatten, load_runs
from ensemw2s.report.statistics import Interval, pooled_difference
from ensemw2s.report.tables import Rows, difference_text, terminal_table
from ensemw2s.runtime.records import TEST_SPLITS, AnswersRecord, Run, of_kind

if TYPE_CHECKING:
    from rich.table import Table

_MISSING = "-"


def compare_runs(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> tuple[Rows, Rows]:
    """Return headers and rows of two tables on two runs: the settings that differ, and the accuracies of all arms.

    Where both runs asked the same questions with as many seeds, the second table has the difference of each arm, the
    second run minus the first, in points with its 95% interval, question by question.

    Raises:
        FileNotFoundError: a folder without results.
        ValueError: a corrupt record, or a run that measured no arm; names the run.
    """
    runs = load_runs([first, second])
    names = [run.name for run in runs]
    return _settings(runs, names), _accuracies(runs, names)


def comparison_tables(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> list[Table]:
    """Return `compare_runs` for a terminal."""
    (headers, differing), right = compare_runs(first, second)
    settings = headers, differing or [["none", "", ""]]
    return [terminal_table("Settings that differ", settings), terminal_table("Right answers", right)]


def _settings(runs: list[Run], names: list[str]) -> Rows:
    flat = [dict(flatten(_told(run.config or {}))) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [[key, *(settings.get(key, _MISSING) for settings in flat)] for key in keys]
    return ["Setting", *names], [row for row in rows if row[1] != row[2]]


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what follows from its other keys, and without where the run is kept."""
    untold = {"resolved", "name", "output_dir", "store"}
    if config.get("task") == config.get("name"):
        untold.add("task")
    return {key: value for key, value in config.items() if key not in untold}


def _accuracies(runs: list[Run], names: list[str]) -> Rows:
    pools = list(map(_pool, runs))
    arms = sorted({arm for pool in pools for arm in pool.arms}, key=arm_order)
    headers, columns = ["Arm"], []
    for split in TEST_SPLITS:
        alike = _asked(runs[0], split) == _asked(runs[1], split) != set()
        gained = f"{split.upper()}, points gained by {names[1]}{'' if alike else ' (not compared: other questions)'}"
        headers += [*(f"{split.upper()}, {name}" for name in names), gained]
        columns += [[_percent(pool.accuracy(arm, split)) for arm in arms] for pool in pools]
        columns.append([_difference(pools, arm, split) if alike else "" for arm in arms])
    return headers, [list(row) for row in zip(map(arm_name, arms), *columns, strict=True)]


def _pool(run: Run) -> Pool:
    try:
        return pool_runs(run.records)
    except ValueError as error:
        raise ValueError(f"{run.name}: {error}") from error


def _asked(run: Run, split: str) -> set[str]:
    return {record.questions for record in of_kind(run.records, AnswersRecord, split=split)}


def _percent(accuracy: Interval | None) -> str:
    return _MISSING if accuracy is None else f"{100 * accuracy.value:.1f}%"


def _difference(pools: list[Pool], arm: str, split: str) -> str:
    # Whatever the runs call their task.
    answers = [list(pool.answers.get((arm, split), {}).values()) for pool in pools]
    before, after = answers
    if len(before) != len(after) or not before or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        return ""
    paired = ({str(i): right for i, right in enumerate(found)} for found in (after, before))
    return difference_text(pooled_difference(*paired))
