"""Records of runs and studies: one JSON object a line, checked when they are read.

A run leaves its records in `results.jsonl` in its folder, a study those of many runs in one file of its own, with one
record of kind `study` that names the comparisons declared beforehand. Both hold the same kinds of records; those in
`POOLED_KINDS` say which task and seed they belong to.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemw2s.report.arms import arm_order
from ensemw2s.runtime.parsing import parse_json, require_file
from ensemw2s.runtime.values import has_surrogates, shown

RESULTS_FILE = "results.jsonl"
TEST_SPLITS = {"id": "ID", "ood": "OOD"}
POOLED_KINDS = ("arm", "answers", "pgr", "cost", "labels", "round")


@dataclass(frozen=True)
class Run:
    """What a report shows of one run: its name, its records and its configuration (None if it has none)."""

    name: str
    records: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any] | None = None


def answers_text(correct: ArrayLike) -> str:
    """Return right (1) and wrong (0) answers `[n]` as a record holds them: one character per question, "0110"."""
    return "".join("1" if right else "0" for right in np.asarray(correct, dtype=bool).tolist())


def answers_array(text: str) -> NDArray[np.bool_]:
    """Return the answers that a record holds as text, as bool `[n]`."""
    return np.frombuffer(text.encode("ascii"), dtype=np.uint8) == ord("1")


def questions_digest(ids: Iterable[Any]) -> str:
    """Return 16 hex digits that are equal exactly if two arms answered the same questions in the same order.

    It is BLAKE2b, of 8 bytes, over the ids as text in a JSON list.
    """
    text = json.dumps([str(question) for question in ids], ensure_ascii=True)
    return blake2b(text.encode("ascii"), digest_size=8).hexdigest()


def of_kind(records: Iterable[Mapping[str, Any]], kind: str, **fields: Any) -> list[Mapping[str, Any]]:
    """Return the records of a kind whose fields have the given values."""
    return [
        record
        for record in records
        if record["kind"] == kind and all(record.get(name) == value for name, value in fields.items())
    ]


def find(records: Iterable[Mapping[str, Any]], kind: str, **fields: Any) -> Mapping[str, Any] | None:
    """Return the first record of a kind whose fields have the given values, or None."""
    return next(iter(of_kind(records, kind, **fields)), None)


def run_keys(records: Iterable[Mapping[str, Any]]) -> set[tuple[str, int]]:
    """Return the task and seed of each run that the records are of."""
    return {(record["task"], record["seed"]) for record in records if record["kind"] in POOLED_KINDS}


def measured_arms(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the measured arms in the order of tables."""
    return sorted({record["arm"] for record in of_kind(records, "arm")}, key=arm_order)


# ----------------------------------------------------------------------------------------------------------------------
# Reading and checking

QUANTILE_LEVELS = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)


def _is_number(value: Any) -> bool:
    # A JSON reader turns 1e999 into infinity.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_quantiles(value: Any) -> bool:
    if not isinstance(value, dict) or not all(_is_number(number) for number in value.values()):
        return False
    return all(str(level) in value for level in QUANTILE_LEVELS)


def _is_validation(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(_is_share(value.get(m)) for m in ("expert", "ensemble")))


def _is_count(value: Any, least: int) -> bool:
    return _is_number(value) and least <= value < 2**63 and value == int(value)


def _is_text(value: Any) -> bool:
    # It becomes a cell of a table and a label of a figure; half of a character can be in no file.
    return isinstance(value, str) and len(value) <= 200 and not has_surrogates(value)


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(_is_text(arm) for arm in pair) for pair in value
    )


# The forms that a field may have, by the words in which an error asks for them.
FORMS: dict[str, Callable[[Any], bool]] = {
    "text of at most 200 characters": _is_text,
    "true or false": lambda value: isinstance(value, bool),
    "a number": _is_number,
    "a number or null": lambda value: value is None or _is_number(value),
    "a number from 0 to 1": _is_share,
    "a number from 0 to 1 or null": lambda value: value is None or _is_share(value),
    "a whole number above 0": lambda value: _is_count(value, 1),
    "a whole number, 0 or above": lambda value: _is_count(value, 0),
    'text of "0" and "1", one for each question': lambda value: (
        isinstance(value, str) and re.fullmatch("[01]+", value) is not None
    ),
    "16 hex digits": lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None,
    f"one of {', '.join(TEST_SPLITS)}": lambda value: isinstance(value, str) and value in TEST_SPLITS,
    "a list of pairs of arms": _is_pairs,
    f"an object of numbers by level ({', '.join(map(str, QUANTILE_LEVELS))})": _is_quantiles,
    "null or an object with shares expert and ensemble": _is_validation,
}
(TEXT, BOOLEAN, NUMBER, NUMBER_OR_NULL, SHARE, SHARE_OR_NULL, COUNT, INDEX, OUTCOMES, DIGEST, TEST_SPLIT, PAIRS,
 QUANTILES, VALIDATION) = FORMS  # fmt: skip
_RUN: dict[str, str] = {"task": TEXT, "seed": INDEX}
# What a record of each kind must hold to be shown, and what it may; other kinds and other fields pass unread.
REQUIRED_FIELDS: dict[str, dict[str, str]] = {
    "round": {"round": COUNT, "error": SHARE, "prior_error": SHARE_OR_NULL, "expert_weight": NUMBER,
              "accepted": BOOLEAN, "effective_sample_size": NUMBER, "num_units": COUNT, "validation": VALIDATION,
              "weight_quantiles": QUANTILES, "seconds": NUMBER},
    "arm": {"arm": TEXT, "split": TEXT, "metric": TEXT, "value": SHARE, "standard_error": NUMBER, "n": COUNT},
    "answers": {"arm": TEXT, "split": TEXT, "correct": OUTCOMES, "questions": DIGEST},
    "pgr": {"arm": TEXT, "split": TEXT, "value": NUMBER_OR_NULL, "low": NUMBER_OR_NULL, "high": NUMBER_OR_NULL,
            "defined": BOOLEAN},
    "cost": {"arm": TEXT},
    "phase": {"phase": TEXT, "seconds": NUMBER},
    "identity": {"round": COUNT, "identity_gap": NUMBER_OR_NULL, "sum_gap": NUMBER},
    "labels": {"teacher": TEXT, "accuracy": SHARE, "n": COUNT},
    "questions": {"split": TEXT, "n": COUNT},
    "study": {"name": TEXT, "primary_split": TEST_SPLIT, "comparisons": PAIRS},
}  # fmt: skip
OPTIONAL_FIELDS: dict[str, dict[str, str]] = {
    "round": {"attempt": COUNT, "clamped": BOOLEAN, "arm": TEXT},
    "cost": {
        **{f"train_{name}": NUMBER_OR_NULL for name in ("seconds", "tokens", "flops")},
        **{f"inference_{name}": NUMBER_OR_NULL for name in ("seconds", "tokens", "flops")},
    },
    "phase": dict.fromkeys(("tokens", "flops", "peak_memory"), NUMBER_OR_NULL),
    "labels": {"confidence": NUMBER_OR_NULL, "agreement": SHARE_OR_NULL},
}
# The fields that say which figure a record gives; of other kinds a run may hold several alike.
KEY_FIELDS: dict[str, tuple[str, ...]] = {
    "arm": ("task", "seed", "arm", "split", "metric"), "answers": ("task", "seed", "arm", "split"),
    "pgr": ("task", "seed", "arm", "split"), "cost": ("task", "seed", "arm"), "study": (),
}  # fmt: skip


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the records of a run from `results.jsonl` in its folder, or those of a study from its own file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON object, lacks a field, holds a field of another form or NaN, or repeats a figure;
            names file and line.
    """
    path = Path(path)
    file = path if path.is_file() or path.suffix == ".jsonl" else path / RESULTS_FILE
    require_file(file, "give the folder of a run (`ensemw2s run` makes one), or the .jsonl file of a study")
    records: list[dict[str, Any]] = []
    first_lines: dict[tuple[Any, ...], int] = {}
    # Bytes break at newlines only; text also breaks at U+2028 and the like, which a task's name may hold.
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            record = _parse_record(line, f"{file}, line {number}")
            first = first_lines.setdefault(_figure_key(record, number), number)
            if first != number:
                raise ValueError(f"gives the same figure as line {first}; each task and seed has one run")
        except ValueError as error:
            place = f"{file}, line {number}"
            raise ValueError(str(error) if place in str(error) else f"{place}: {error}") from error
        records.append(record)
    if not any(record["kind"] in ("arm", "round") for record in records):
        raise ValueError(f"{file} holds neither rounds nor measured arms: run boost or evaluate first")
    return records


def _parse_record(line: bytes, place: str) -> dict[str, Any]:
    record = parse_json(line, place)
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError('expected a JSON object with a text field "kind"')
    _check_fields(record)
    return record


def _check_fields(record: Mapping[str, Any]) -> None:
    kind = record["kind"]
    required, optional = REQUIRED_FIELDS.get(kind, {}), OPTIONAL_FIELDS.get(kind, {})
    required = required | _RUN if kind in POOLED_KINDS else required
    missing = [name for name in required if name not in record]
    if missing:
        raise ValueError(f"a record of kind {shown(kind)} lacks {', '.join(missing)}")
    for name, form in (required | optional).items():
        if name in record and not FORMS[form](record[name]):
            raise ValueError(f"{name} of a record of kind {shown(kind)} must be {form}, got {shown(record[name])}")
    if kind == "pgr" and record["defined"] and None in (record["value"], record["low"], record["high"]):
        raise ValueError("a defined pgr needs numbers for value, low and high")


def _figure_key(record: Mapping[str, Any], line: int) -> tuple[Any, ...]:
    """Say which figure a record gives; records that may repeat are told apart by their line."""
    if record["kind"] not in KEY_FIELDS:
        return (line,)
    return (record["kind"], *(record[name] for name in KEY_FIELDS[record["kind"]]))
