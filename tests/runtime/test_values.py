"""What a setting may be: declared types, ranges, settings that do nothing, and how little of a bad value is shown."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

import ensemw2s
from ensemw2s.boosting import algorithm
from ensemw2s.boosting.config import BoostingConfig
from ensemw2s.data import difficulty
from ensemw2s.data.tokens import QuestionFormat
from ensemw2s.ensemble.model import TokenEnsemble
from ensemw2s.experiments import config
from ensemw2s.inference import decoding
from ensemw2s.runtime.values import (
    RANGES,
    IdleSettingError,
    check_fields,
    check_number,
    check_value,
    require_numbers,
    shown,
    shown_names,
)
from ensemw2s.student.trainer import StudentConfig

SETTINGS = (
    BoostingConfig, StudentConfig, QuestionFormat, decoding.Sampling, config.ExperimentConfig, config.DataConfig,
    config.DifficultyConfig, config.LabellingConfig, config.ModelConfig,
)  # fmt: skip


@dataclasses.dataclass
class Knobs:
    """Settings of every kind of declaration."""

    num_rounds: int = 1
    temperature: float = 1.0
    top_logprobs: int | None = None
    on: bool = True
    name: str = "x"
    way: Literal["one", "two"] = "one"
    ranks: list[int] | None = None
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    anything: Any = None


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"num_rounds": True}, TypeError, "num_rounds must be int, got True"),
        ({"num_rounds": "3"}, TypeError, "num_rounds must be int, got '3'"),
        ({"num_rounds": None}, TypeError, "num_rounds must be int, got None"),
        ({"num_rounds": 2.0}, TypeError, "num_rounds must be int, got 2.0"),
        ({"num_rounds": 10**30}, ValueError, r"num_rounds must be from 1 to 10000, got 10+\b"),
        ({"temperature": float("nan")}, ValueError, "temperature must be above 0 and finite, got nan"),
        ({"temperature": float("inf")}, ValueError, "temperature must be above 0 and finite, got inf"),
        ({"temperature": 10**400}, ValueError, "temperature must be at most 2147483647, got 1000"),
        ({"top_logprobs": 0}, ValueError, "top_logprobs must be at least 1, got 0"),
        ({"top_logprobs": 2**31}, ValueError, "top_logprobs must be at most 2147483647, got 2147483648"),
        ({"top_logprobs": []}, TypeError, r"top_logprobs must be int \| None, got \[\]"),
        ({"on": 1}, TypeError, "on must be bool, got 1"),
        ({"name": b"x"}, TypeError, "name must be str, got b'x'"),
        ({"way": "three"}, ValueError, "way must be one of one, two, got 'three'"),
        ({"way": ["one"]}, ValueError, r"way must be one of one, two, got \['one'\]"),
        ({"ranks": [1, "a"]}, TypeError, r"ranks must be list\[int\] \| None, got \[1, 'a'\]"),
        ({"sizes": {"train": "x"}}, TypeError, r"sizes\.train must be int, got 'x'"),
        ({"sizes": [1]}, TypeError, r"sizes must be dict\[str, int\], got \[1\]"),
    ],
)
def test_a_field_is_checked_by_its_declaration(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_fields(Knobs(**values))


def test_good_values_pass() -> None:
    check_fields(Knobs(5, 2, 3, False, "", "two", [1], {"a": 1}, object()))
    check_fields(Knobs(temperature=np.float64(0.5)))


def test_ranges_of_transformers_arguments_hold_and_their_types_are_theirs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps must be -1 or at least 1, got 0"):
        StudentConfig(str(tmp_path), max_steps=0)
    assert StudentConfig(str(tmp_path), max_steps=-1, report_to=None).max_steps == -1
    # Not ours, and none that could void a training.
    check_fields(StudentConfig(str(tmp_path)), inherited=TrainingArguments)


def test_each_end_of_each_range_is_where_it_says() -> None:
    for name in RANGES:
        for part in RANGES[name].split(" or "):
            low, _, high = part.strip("[]()").partition(", ")
            for end, is_in in ((low, part[0] != "("), (high, part[-1] != ")")):
                if end and "inf" not in end:
                    try:
                        check_number(name, float(end))
                        assert is_in, (name, end)
                    except ValueError:
                        assert not is_in, (name, end)
        with pytest.raises(ValueError, match=f"{name} must be"):
            check_number(name, float("nan"))


def test_numbers_of_numpy_are_numbers() -> None:
    require_numbers(whole=True, a=np.int64(3))
    require_numbers(a=np.float32(3))
    for value in (True, np.bool_(True), "3", None, 1j):
        with pytest.raises(TypeError, match="a must be a number"):
            require_numbers(a=value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draw_fraction": 0.2}, 'draw_fraction=0.2 does nothing without sampling="without_replacement"'),
        ({"recipe": "bagging", "shrinkage": 0.5}, "shrinkage=0.5 does nothing without weights that are updated"),
        (
            {"recipe": "deep_ensemble", "effective_sample_size_floor": 0.5},
            "effective_sample_size_floor=0.5 does nothing without weights that are updated",
        ),
        ({"sampling": "all", "prior": 0.5}, "prior=0.5 does nothing without weights that are updated"),
        ({"prior": 0.5, "prior_weights": "current"}, "prior_weights='current' does nothing without prior="),
        ({"num_classes": 5}, 'num_classes=5 does nothing without prior="uniform"'),
    ],
)
def test_a_knob_that_the_recipe_does_not_read_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(IdleSettingError, match=re.escape(message)):
        BoostingConfig(str(tmp_path), **settings)


def test_what_a_recipe_fills_in_by_itself_is_not_held_against_the_user(tmp_path: Path) -> None:
    # "tempered" has a floor, which sampling="all" does not read.
    assert BoostingConfig(str(tmp_path), sampling="all").effective_sample_size_floor == 0.7
    assert BoostingConfig(str(tmp_path), recipe="bagging", shrinkage=1.0).shrinkage == 1.0


def _holders(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner) | st.dictionaries(st.text(), inner)


@given(st.recursive(st.integers() | st.text() | st.none(), _holders))
def test_what_is_shown_is_short(value: Any) -> None:
    assert len(shown(value)) <= 200
    assert len(shown([value] * 1000)) <= 200


def test_large_and_deep_values_are_shown_in_part() -> None:
    bomb: Any = ["x"] * 10
    for _ in range(200):
        bomb = [bomb] * 10
    assert len(shown(bomb)) <= 200
    assert shown(10**10_000) == "a whole number of 33220 bits"
    assert len(shown_names("x" * 999 for _ in range(99))) < 800
    assert shown_names([]) == "none"


def test_every_declared_setting_is_read() -> None:
    """A field that no line of the package reads would be a setting that does nothing."""
    text = "\n".join(path.read_text() for path in Path(ensemw2s.__file__).parent.rglob("*.py"))
    read_whole = {
        config.LabellingConfig: inspect.signature(TokenEnsemble.label).parameters,
        config.DifficultyConfig: inspect.signature(difficulty.split_by_difficulty).parameters,
    }
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    for kind in SETTINGS:
        for field in dataclasses.fields(kind):
            if field.name not in theirs and field.name not in read_whole.get(kind, ()):
                assert re.search(rf"\w\.{field.name}\b(?! = )", text), f"{kind.__name__}.{field.name}"


def test_every_number_of_a_setting_has_a_range() -> None:
    for kind in SETTINGS:
        theirs = {field.name for field in dataclasses.fields(TrainingArguments)} if kind in SETTINGS[:2] else set()
        for field in dataclasses.fields(kind):
            declared = str(field.type)
            if field.name not in theirs and re.match(r"(int|float)\b", declared):
                # The shares of a cut are checked together.
                named = field.name in RANGES or f"{kind.__name__}.{field.name}" in RANGES
                assert named or field.name in ("easy", "hard"), f"{kind.__name__}.{field.name}"


def test_a_value_names_where_it_stands() -> None:
    with pytest.raises(ValueError, match=r"boosting\.num_rounds must be from 1 to 10000"):
        check_value(BoostingConfig, "num_rounds", 0, "boosting.")


def test_boosting_refuses_what_is_no_number_by_its_name() -> None:
    with pytest.raises(TypeError, match="weights must be real numbers, got <U1"):
        algorithm.effective_sample_size(["a"])
    with pytest.raises(TypeError, match="shrinkage must be a number, got '1'"):
        algorithm.update_weights([0.5, 0.5], np.array([True, False]), 1.0, "1")  # type: ignore[arg-type]
