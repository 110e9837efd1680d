"""Questions of BIG-bench (Srivastava et al., 2022), from the reader's own installation of its package."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ensemw2s.runtime.parsing import parse_json, read_text, require_file
from ensemw2s.runtime.values import shown

_TASKS, _FILE = "bigbench/benchmark_tasks", "task.json"


def bigbench_questions(task: str) -> list[dict[str, Any]]:
    """Return the questions of a task as `prompt`, `answer` and, of multiple choice, `choices`.

    Where an example has a `target`, that is the answer (of several the first), and the task is asked for text; else the
    answer is the choice of the highest score. A `comment` is kept, as a column of that name: some tasks say there of
    what kind an example is.

    Args:
        task: a folder of the package `bigbench` below `benchmark_tasks`, such as
            "linguistic_mappings/past_tense_regular_json", or the path of a task's own `.json` file.

    Raises:
        FileNotFoundError: no such file.
        ImportError: `bigbench` is not installed.
        ValueError: no such task (names the nearest ones), one without examples, or an example without an answer.
    """
    file = require_file(Path(task), "name a task of BIG-bench") if task.endswith(".json") else _installed(task)
    content = parse_json(read_text(file), str(file))
    examples = content.get("examples") if isinstance(content, Mapping) else None
    if not isinstance(examples, list) or not examples:
        raise ValueError(
            f"bigbench {task}: {file.name} has no list `examples` (a task of subtasks has none: name a subtask)"
        )
    return [_question(example, f"bigbench {task}, example {number}") for number, example in enumerate(examples)]


def _installed(task: str) -> Path:
    package = find_spec("bigbench")
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "questions from bigbench need that package: pip install --no-deps bigbench (its task files are enough)"
        )
    root = Path(package.submodule_search_locations[0]).parent / _TASKS
    file = root / task / _FILE
    if not file.is_file():
        known = [path.parent.relative_to(root).as_posix() for path in root.rglob(_FILE)]
        near = difflib.get_close_matches(task, known, n=3, cutoff=0.4)
        raise ValueError(f"bigbench has no task {shown(task)} in JSON; the nearest are {', '.join(near) or 'none'}")
    return file


def _question(example: Any, place: str) -> dict[str, Any]:
    if not isinstance(example, Mapping) or not isinstance(example.get("input"), str):
        raise ValueError(f"{place}: expected an object with a text `input`, got {shown(example)}")
    row: dict[str, Any] = {"prompt": example["input"].strip()}
    target, scores = example.get("target"), example.get("target_scores")
    if target is not None:
        answer = target[0] if isinstance(target, list) and target else target
        row |= {"answer": answer.strip() if isinstance(answer, str) else answer}
    elif isinstance(scores, Mapping) and scores and all(isinstance(score, int | float) for score in scores.values()):
        row |= {"answer": max(scores, key=lambda choice: scores[choice]).strip()}
        row |= {"choices": [choice.strip() for choice in scores]}
    if not isinstance(row.get("answer"), str):
        raise ValueError(f"{place}: expected a text `target`, or `target_scores` by choice, got {shown(example)}")
    return row | ({"comment": example["comment"]} if isinstance(example.get("comment"), str) else {})
