"""Records of runs and studies: one JSON object a line, of the kinds declared here, checked when they are read.

A run leaves its records in `results.jsonl` in its folder, a study those of many runs in one file of its own, with one
record of kind `study` that names the comparisons declared beforehand. Both hold the same kinds of records; those of
`RunRecord`s say which task and seed they belong to.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypeVar, dataclass_transform, get_args, get_type_hints

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemw2s.runtime.parsing import parse_json, require_file
from ensemw2s.runtime.values import has_surrogates, shown

CONFIG_FILE, RESULTS_FILE, REPORT_FILE = "config.json", "results.jsonl", "report.html"
# Of a study, in its folder.
STUDY_FILE = "records.jsonl"
TEST_SPLITS = {"id": "ID", "ood": "OOD"}
QUANTILE_LEVELS = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
# Why a question is shown token by token, see `experiments.samples`; of a longer answer the beginning is.
SAMPLE_REASONS = ("right", "wrong", "disagree")
MOST_SAMPLE_TOKENS = 40


class Form(NamedTuple):
    """What a field of a record may hold, in the words in which an error asks for it."""

    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any, least: float = -sys.float_info.max, most: float = sys.float_info.max) -> bool:
    # A JSON reader turns 1e999 into infinity.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _is_count(value: Any, least: int) -> bool:
    return _is_number(value, least, 2**63 - 1) and value == int(value)


def _is_text(value: Any) -> bool:
    # It becomes a cell of a table and a label of a figure; half of a character can be in no file.
    return isinstance(value, str) and len(value) <= 200 and not has_surrogates(value)


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_quantiles(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(value.get(str(level))) for level in QUANTILE_LEVELS)


def _is_validation(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(_is_number(value.get(m), 0, 1) for m in ("expert", "ensemble"))
    )


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair)) for pair in value
    )


def _is_passage(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 2000 and not has_surrogates(value)


def _is_weights(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(weight, 0) for weight in value) and any(value)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MOST_SAMPLE_TOKENS and all(map(_is_text, value))


def _is_shares(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(share, 0, 1) for share in value)


def _is_levels(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_choices(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(choice, list) and len(choice) == 3 and _is_text(choice[0])
        and all(_is_number(share, 0, 1) for share in choice[1:])
        for choice in value
    )  # fmt: skip


def _is_lists_of_choices(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_choices, value))


_CHOICE = "a token, its probability and that of the answer's token"
Text = Annotated[str, Form("text of at most 200 characters", _is_text)]
Boolean = Annotated[bool, Form("true or false", lambda value: isinstance(value, bool))]
Number = Annotated[float, Form("a number", _is_number)]
Share = Annotated[float, Form("a number from 0 to 1", functools.partial(_is_number, least=0, most=1))]
Count = Annotated[int, Form("a whole number above 0", functools.partial(_is_count, least=1))]
Index = Annotated[int, Form("a whole number, 0 or above", functools.partial(_is_count, least=0))]
Outcomes = Annotated[str, Form('text of "0" and "1", one for each question', _matches("[01]+"))]
Digest = Annotated[str, Form("16 hex digits", _matches("[0-9a-f]{16}"))]
TestSplit = Annotated[str, Form(f"one of {', '.join(TEST_SPLITS)}", _matches("|".join(TEST_SPLITS)))]
Passage = Annotated[str, Form("text of at most 2000 characters", _is_passage)]
Reason = Annotated[str, Form(f"one of {', '.join(SAMPLE_REASONS)}", _matches("|".join(SAMPLE_REASONS)))]
Weights = Annotated[list[float], Form("a list of numbers, 0 or above and not all 0", _is_weights)]
Tokens = Annotated[list[str], Form(f"a list of 1 to {MOST_SAMPLE_TOKENS} texts", _is_tokens)]
Choices = Annotated[list[list[Any]], Form(f"a list with {_CHOICE} in each place", _is_choices)]
ChoicesOfExperts = Annotated[
    list[list[list[Any]]], Form(f"for each expert a list with {_CHOICE} in each place", _is_lists_of_choices)
]
Shares = Annotated[list[float], Form("a list of numbers from 0 to 1", _is_shares)]
Levels = Annotated[list[str], Form("a list of texts, one for each question", _is_levels)]
Pairs = Annotated[list[list[str]], Form("a list of pairs of arms", _is_pairs)]
Quantiles = Annotated[
    dict[str, float],
    Form(f"an object of numbers by level ({', '.join(map(str, QUANTILE_LEVELS))})", _is_quantiles),
]
Validation = Annotated[
    dict[str, float] | None, Form("null or an object with shares expert and ensemble", _is_validation)
]
Anything = Annotated[Any, Form("anything", lambda value: True)]

KINDS: dict[str, type[Record]] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of a file of records. Fields without a default must be there; other fields pass unread.

    Attributes:
        kind: what the field `kind` of the line says.
        figure: the fields that say which figure a record gives, and a file gives each figure once; None for kinds of
            which a file may hold several alike.
    """

    kind: ClassVar[str]
    figure: ClassVar[tuple[str, ...] | None] = None

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    def to_json(self) -> dict[str, Any]:
        """Return the record as it is written; fields at their defaults are left out."""
        values = ((field, getattr(self, field.name)) for field in fields(self))
        return {"kind": self.kind} | {field.name: value for field, value in values if value != field.default}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Return the record of one line; a missing field or one of another form raises ValueError with its name."""
        forms = _forms(cls.kind)
        missing = [name for name in forms if name not in row and (name in _RUN or not hasattr(cls, name))]
        if missing:
            raise ValueError(f"a record of kind {cls.kind!r} lacks {', '.join(missing)}")
        given = {name: row[name] for name in forms if name in row}
        for name, value in given.items():
            if not forms[name].fits(value):
                raise ValueError(
                    f"{name} of a record of kind {cls.kind!r} must be {forms[name].words}, got {shown(value)}"
                )
        return cls(**given)


class RunRecord(Record):
    """A record that says which run it is of: a file must hold task and seed, which the experiment adds."""

    task: Text = ""
    seed: Index = -1


class RoundRecord(RunRecord):
    """One attempt at a boosting round. Errors are shares of weight; the spread is that of the updated weights.

    Where there are several generations of experts, rounds are numbered through all of them, from `generation` 0 on.
    `chain` is the number of the chain of which only the last expert is in the ensemble; 0 where there are no such.
    """

    kind = "round"
    round: Count
    attempt: Count
    error: Share
    prior_error: Share | None
    expert_weight: Number
    clamped: Boolean
    accepted: Boolean
    num_units: Count
    shrinkage: Number | None
    effective_sample_size: Number
    weight_quantiles: Quantiles
    num_processes: Count
    validation: Validation
    train_seconds: Number | None
    train_tokens: Number | None
    train_flops: Number | None
    seconds: Number
    arm: Text = ""
    generation: Index = 0
    chain: Index = 0


class IdentityRecord(Record):
    """How far a round's files are from the two invariants; the closing identity may have nothing to say (None)."""

    kind = "identity"
    round: Count
    identity_gap: Number | None
    sum_gap: Number
    arm: Text = ""


class MixtureRecord(Record):
    """With which weights an arm mixes its experts; they are not normalised."""

    kind = "mixture"
    expert_weights: Weights
    arm: Text = ""


class LabelsRecord(RunRecord):
    """A teacher's answers to the unlabelled questions, `n` of them: what they are worth and what they took."""

    kind = "labels"
    teacher: Text
    accuracy: Share
    n: Count
    confidence: Number | None = None
    agreement: Share | None = None
    seconds: Number | None = None
    tokens: Number | None = None
    flops: Number | None = None


class ConfidencesRecord(RunRecord):
    """What a teacher thought of each of its answers to the unlabelled questions, and which of them are right.

    `probabilities` are those of whole answers, `agreements` the experts' (see `TokenEnsemble.label`).
    """

    kind, figure = "confidences", ("task", "seed", "teacher")
    teacher: Text
    correct: Outcomes
    probabilities: Shares
    agreements: Shares

    def __post_init__(self) -> None:
        if not len(self.correct) == len(self.probabilities) == len(self.agreements):
            raise ValueError("a record of kind 'confidences' needs a probability and an agreement for each answer")


class RelabelRecord(RunRecord):
    """What out-of-fold students made of an arm's `n` pseudo-answers to hard questions.

    So many `agree`, were `kept` and `replaced`; of the teacher's answers the share `teacher_accuracy` is right, of
    those that were kept `accuracy`. For an ensemble, `generation` is the one that was then trained on them, and `kept`
    0 says that too few agreed for there to be one.
    """

    kind, figure = "relabel", ("task", "seed", "arm", "generation")
    arm: Text
    n: Count
    agree: Index
    kept: Index
    replaced: Index
    teacher_accuracy: Share
    accuracy: Share | None
    generation: Index = 0


class ArmRecord(RunRecord):
    """A measure of an arm on a split: "accuracy", "token_error" or "exact_match"."""

    kind, figure = "arm", ("task", "seed", "arm", "split", "metric")
    arm: Text
    split: Text
    metric: Text
    value: Share
    standard_error: Number
    n: Count


class AnswersRecord(RunRecord):
    """Which questions of a split an arm answered right: one character for each, "0110", and the questions' digest."""

    kind, figure = "answers", ("task", "seed", "arm", "split")
    arm: Text
    split: Text
    correct: Outcomes
    questions: Digest


class PgrRecord(RunRecord):
    """An arm's `ensemw2s.report.statistics.PerformanceGapRecovered` on a test split."""

    kind, figure = "pgr", ("task", "seed", "arm", "split")
    arm: Text
    split: Text
    value: Number | None
    low: Number | None
    high: Number | None
    defined: Boolean
    gap: Number | None = None
    gap_low: Number | None = None
    gap_high: Number | None = None

    def __post_init__(self) -> None:
        if self.defined and None in (self.value, self.low, self.high):
            raise ValueError("a defined pgr needs numbers for value, low and high")


class BestExpertRecord(Record):
    """Which of the experts is best on validation questions."""

    kind = "best_expert"
    arm: Text


class SampleRecord(RunRecord):
    """What the experts of the arm `ensemble` and their mixture make of the answer to one test question.

    Each of the `num_tokens` tokens, of which `tokens` are the first, is judged given the answer's own tokens before it.
    `number` counts the split's questions from 1; `weights` are shares of the mixture, one for each expert; `right` is
    what the ensemble was counted as, by its likeliest choice if `by_likelihood`.
    """

    kind, figure = "sample", ("task", "seed", "split", "reason")
    split: TestSplit
    reason: Reason
    number: Count
    prompt: Passage
    answer: Passage
    right: Boolean
    by_likelihood: Boolean
    num_tokens: Count
    tokens: Tokens
    weights: Weights
    experts: ChoicesOfExperts
    mixture: Choices

    def __post_init__(self) -> None:
        places = {len(choices) for choices in (*self.experts, self.mixture)}
        if len(self.experts) != len(self.weights) or places != {len(self.tokens)}:
            raise ValueError(
                "a record of kind 'sample' needs, for each of its tokens, a choice of the mixture and one of each "
                "expert that it gives a weight"
            )


class CostRecord(RunRecord):
    """What training an arm took, and what answering all test questions did; None is unknown."""

    kind, figure = "cost", ("task", "seed", "arm")
    arm: Text
    train_seconds: Number | None = None
    train_tokens: Number | None = None
    train_flops: Number | None = None
    inference_seconds: Number | None = None
    inference_tokens: Number | None = None
    inference_flops: Number | None = None


class PhaseRecord(Record):
    """What a phase took, in the session that finished it; `peak_memory` is in bytes."""

    kind = "phase"
    phase: Text
    seconds: Number
    tokens: Number | None = None
    flops: Number | None = None
    peak_memory: Number | None = None


class QuestionsRecord(Record):
    """How many questions a split has."""

    kind = "questions"
    split: Text
    n: Count


class LevelsRecord(RunRecord):
    """The level of every question of a split, `train` or a test split, in their order; `rule` says what a level is."""

    kind, figure = "levels", ("task", "seed", "split")
    split: Text
    levels: Levels
    questions: Digest
    rule: Text = ""


class EnvironmentRecord(Record):
    """What ran: versions, machine, threads, and the backend behind each op."""

    kind = "environment"
    python: Anything = None
    platform: Anything = None
    versions: Anything = None
    device: Anything = None
    threads: Anything = None
    processes: Anything = None
    backends: Anything = None
    build: Anything = None


class CellRecord(Record):
    """A finished cell of a study; `key` is a hash of what decided its results, `records` one of its records."""

    kind = "cell"
    task: Text
    seed: Index
    key: Text
    records: Text = ""


class StudyRecord(Record):
    """What a study declared before it was run."""

    kind, figure = "study", ()
    name: Text
    primary_split: TestSplit
    comparisons: Pairs


POOLED_KINDS = tuple(kind for kind, form in KINDS.items() if issubclass(form, RunRecord))
_Kind = TypeVar("_Kind", bound=Record)

_RUN = ("task", "seed")


@functools.cache
def _forms(kind: str) -> dict[str, Form]:
    """Return what each field must be, task and seed last."""
    hints = get_type_hints(KINDS[kind], include_extras=True)
    names = [field.name for field in fields(KINDS[kind])]
    return {name: _form(hints[name]) for name in sorted(names, key=lambda name: name in _RUN)}


def _form(hint: Any) -> Form:
    parts = get_args(hint)
    if type(None) not in parts:
        return parts[1]
    form = _form(parts[0])
    return Form(f"{form.words} or null", lambda value: value is None or form.fits(value))


@dataclass(frozen=True)
class Run:
    """What a report shows of one run: its name, its records and its configuration (None if it has none)."""

    name: str
    records: Sequence[Record]
    config: Mapping[str, Any] | None = None


def of_kind(records: Iterable[Record], kind: type[_Kind], **values: Any) -> list[_Kind]:
    """Return the records of a kind whose fields have the given values."""
    return [
        record
        for record in records
        if isinstance(record, kind) and all(getattr(record, name) == value for name, value in values.items())
    ]


def run_keys(records: Iterable[Record]) -> set[tuple[str, int]]:
    """Return the task and seed of each run that the records are of."""
    return {(record.task, record.seed) for record in of_kind(records, RunRecord)}


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


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read the records of a run or a study from its folder, or those of a study from its own file.

    In a run's folder that is `results.jsonl`, in a study's `records.jsonl`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is no .jsonl; a line is no JSON object, lacks a field, holds a field of another form or
            NaN, or repeats a figure; names file and line.
    """
    path = Path(path)
    remedy = (
        "give the folder of a run or a study (`ensemw2s run` and `ensemw2s study` make them), or a study's .jsonl file"
    )
    if path.is_file() and path.suffix != ".jsonl":
        raise ValueError(f"{path} is no file of records: {remedy}")
    file = path if path.suffix == ".jsonl" else path / RESULTS_FILE
    if not file.exists() and (path / STUDY_FILE).is_file():
        file = path / STUDY_FILE
    require_file(file, remedy)
    records: list[Record] = []
    first_lines: dict[tuple[Any, ...], int] = {}
    # Bytes break at newlines only; text also breaks at U+2028 and the like, which a task's name may hold.
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        place = f"{file}, line {number}"
        row = parse_json(line, place)
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
            raise ValueError(f'{place}: expected a JSON object with a text field "kind"')
        try:
            found = parse_records([row])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        for record in found:
            figure = (record.kind, *(getattr(record, name) for name in record.figure or ()))
            if record.figure is not None and first_lines.setdefault(figure, number) != number:
                raise ValueError(
                    f"{place}: gives the same figure as line {first_lines[figure]}; each task and seed has one run"
                )
        records += found
    if not any(isinstance(record, ArmRecord | RoundRecord) for record in records):
        raise ValueError(f"{file} holds neither rounds nor measured arms: run boost or evaluate first")
    return records


def parse_records(rows: Iterable[Mapping[str, Any]]) -> list[Record]:
    """Return the records of lines that were read as JSON; those of kinds that are not declared here are left out."""
    return [KINDS[row["kind"]].from_json(row) for row in rows if row["kind"] in KINDS]
