"""Questions of BIG-bench, from a package and from a task's own file, in the forms that its tasks have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ensemw2s import load_questions

TEXTS = [
    {"input": "arise ", "target": " arose", "comment": "irregular"},
    {"input": "walk", "target": ["walked", "did walk"], "comment": "regular"},
]
CHOICES = [{"input": "2 + 2?", "target_scores": {"5": 0, " 4": 1, "banana": 0}}]


def write_task(folder: Path, examples: Any, name: str = "mappings/past_tense") -> Path:
    file = folder / "bigbench" / "benchmark_tasks" / name / "task.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    (folder / "bigbench" / "__init__.py").touch()
    file.write_text(json.dumps({"name": "past_tense", "examples": examples}))
    return file


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `bigbench` with two tasks."""
    write_task(tmp_path, TEXTS)
    write_task(tmp_path, CHOICES, "arithmetic")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_task_of_the_package_gives_its_questions(package: Path) -> None:
    rows = list(load_questions({"bigbench": "mappings/past_tense"}).remove_columns("id"))
    assert rows == [
        {"prompt": "arise", "answer": "arose", "comment": "irregular"},
        {"prompt": "walk", "answer": "walked", "comment": "regular"},
    ]


def test_multiple_choice_is_answered_by_the_choice_of_the_highest_score(package: Path) -> None:
    (row,) = load_questions({"bigbench": "arithmetic"})
    assert (row["prompt"], row["answer"], row["choices"]) == ("2 + 2?", "4", ["5", "4", "banana"])


def test_a_task_may_be_named_by_its_file(tmp_path: Path) -> None:
    file = write_task(tmp_path, TEXTS)
    assert load_questions({"bigbench": str(file)})["answer"][:] == ["arose", "walked"]


def test_what_is_not_there_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no task 'past_tense' in JSON; the nearest are mappings/past_tense"):
        load_questions({"bigbench": "past_tense"})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        load_questions({"bigbench": str(package / "nowhere.json")})
    with pytest.raises(ValueError, match="unknown setting size of a bigbench source"):
        load_questions({"bigbench": "arithmetic", "size": 3})
    monkeypatch.setattr("ensemw2s.data.bigbench.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps bigbench"):
        load_questions({"bigbench": "arithmetic"})


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "has no list `examples`"),
        ("none", "has no list `examples`"),
        ([3], "example 0: expected an object with a text `input`, got 3"),
        ([{"input": "a"}], "example 0: expected a text `target`"),
        ([{"input": "a", "target": 3}], "expected a text `target`"),
        ([{"input": "a", "target": []}], "expected a text `target`"),
        ([{"input": "a", "target_scores": {"b": "high"}}], "expected a text `target`"),
        ([{"input": "a", "target_scores": {}}], "expected a text `target`"),
    ],
)
def test_tasks_of_another_form_are_refused(examples: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_questions({"bigbench": str(write_task(tmp_path, examples))})


def test_only_the_prompts_that_a_filter_finds_are_kept(tmp_path: Path) -> None:
    rows = [{"prompt": "a b"}, {"prompt": "a b c"}, {"prompt": "b"}]
    file = tmp_path / "them.jsonl"
    file.write_text("".join(json.dumps(row | {"answer": "x"}) + "\n" for row in rows))
    kept = load_questions({"file": str(file), "prompt_filter": r"^\S+( \S+){1,2}$", "prompt_regex": r"(\S+)$"})
    assert kept["prompt"][:] == ["b", "c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_filter": "z"}, "prompt_filter 'z' finds nothing in any prompt, so no question is left"),
        ({"prompt_filter": "("}, r"prompt_filter '\(' is no regular expression"),
        ({"prompt_filter": 3}, "prompt_filter 3 is no regular expression"),
    ],
)
def test_a_filter_that_leaves_nothing_or_is_none_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write_task(tmp_path, TEXTS)
    with pytest.raises(ValueError, match=message):
        load_questions({"bigbench": str(file), **options})


def test_a_generator_takes_no_filter() -> None:
    with pytest.raises(ValueError, match="its own settings say which questions it makes"):
        load_questions({"characters": "copy", "size": 3, "min_length": 3, "max_length": 4, "prompt_filter": "a"})
