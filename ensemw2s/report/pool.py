"""What runs say together: figures over tasks and seeds from records. A single run is a pool of one.

`pool_runs` checks and groups the records; the methods of `Pool` give one figure each, as `statistics` defines it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ensemw2s.data.levels import level_order
from ensemw2s.report.arms import BASELINE, CEILING, COMPARISONS, arm_order
from ensemw2s.report.calibration import Confidences
from ensemw2s.report.statistics import (
    Interval,
    PerformanceGapRecovered,
    pooled_accuracy,
    pooled_difference,
    pooled_gap_recovered,
)
from ensemw2s.runtime.records import (
    TEST_SPLITS,
    AnswersRecord,
    ArmRecord,
    ConfidencesRecord,
    CostRecord,
    LevelsRecord,
    PgrRecord,
    Record,
    RunRecord,
    StudyRecord,
    answers_array,
    of_kind,
    run_keys,
)

# Below this the percentile bootstrap over seeds is clearly too narrow: with n seeds by a factor of sqrt((n-1)/n).
ENOUGH_SEEDS = 5
COST_FIELDS = [f"{use}_{amount}" for use in ("train", "inference") for amount in ("seconds", "tokens", "flops")]

Pair = tuple[str, str]


class Subset(NamedTuple):
    """Some of a split's questions: those of one level, or of all levels that training had, or had not; None is any."""

    split: str
    level: str | None = None
    seen: bool | None = None


@dataclass(frozen=True)
class Pool:
    """The measured runs of one or several tasks and seeds, grouped.

    Attributes:
        name: of the study; "" for runs that belong to none.
        declared: whether the comparisons were declared beforehand, by a study.
        primary_split: "id" or "ood", which the cost of a gain is measured on.
        comparisons: pairs of arms.
        seeds: of each task, in order.
        answers: for (arm, split) and a task, bool `[seeds, n]`: right or wrong. An arm is in a task if all of the
            task's seeds measured it.
        questions: for (task, split), the number of different questions.
        levels: for (task, split), the level of each question, text `[seeds, n]`, where all of the task's seeds say it.
        trained: for a task with levels, those that each seed's experts were trained on.
        level_rules: what levels are, in words, by task.
        confidences: for each teacher, by task, what it thought of its answers with all of the task's seeds, one behind
            the other.
        students: the arms whose share of the gap the runs give.
        costs: of each of `COST_FIELDS`, for (arm, task), the mean over seeds; NaN where a seed does not know.
        exact: for (arm, split, task), the mean over seeds of the share of exact answers, where choices decide.
        remarks: sentences for the reader: what was left out, and what limits the intervals.
    """

    name: str
    declared: bool
    primary_split: str
    comparisons: tuple[Pair, ...]
    seeds: Mapping[str, tuple[int, ...]]
    answers: Mapping[tuple[str, str], Mapping[str, NDArray[np.bool_]]]
    questions: Mapping[tuple[str, str], int]
    levels: Mapping[tuple[str, str], NDArray[np.str_]]
    trained: Mapping[str, Sequence[frozenset[str]]]
    level_rules: Mapping[str, str]
    confidences: Mapping[str, Mapping[str, Confidences]]
    students: frozenset[str]
    costs: Mapping[str, Mapping[tuple[str, ...], float]]
    exact: Mapping[tuple[str, ...], float]
    remarks: tuple[str, ...]

    @property
    def arms(self) -> list[str]:
        """Return the arms that some task measured with all its seeds, in the order of tables."""
        return sorted({arm for arm, _ in self.answers}, key=arm_order)

    def shared_tasks(self, split: str, *arms: str) -> list[str]:
        """Return the tasks in which all of the arms answered the split's questions."""
        return [task for task in self.seeds if all(task in self.answers.get((arm, split), ()) for arm in arms)]

    def tasks_of(self, subset: str | Subset) -> list[str]:
        """Return the tasks that have questions of a subset; of a whole split, all tasks."""
        return [task for task in self.seeds if isinstance(subset, str) or self.share(subset, task) > 0]

    def levels_of(self, task: str, split: str) -> list[str]:
        """Return the levels of a task's questions in order; [] where they are not known."""
        found = self.levels.get((task, split))
        return [] if found is None else sorted(set(found.ravel().tolist()), key=level_order)

    def share(self, subset: Subset, task: str) -> float:
        """Return the share of a split's questions that a subset has, over all seeds; 0 where levels are not known."""
        return float(self._is_in(subset, task).mean()) if (task, subset.split) in self.levels else 0.0

    def seen_share(self, task: str, level: str) -> float:
        """Return the share of seeds whose experts were trained on questions of a level."""
        return float(np.mean([level in trained for trained in self.trained[task]]))

    def _is_in(self, subset: Subset, task: str) -> NDArray[np.bool_]:
        """Return which questions are of a subset, bool `[seeds, n]`."""
        levels = self.levels[task, subset.split]
        found = np.ones(levels.shape, dtype=bool) if subset.level is None else levels == subset.level
        if subset.seen is None:
            return found
        seen = [np.isin(row, list(trained)) for row, trained in zip(levels, self.trained[task], strict=True)]
        return found & (np.stack(seen) == subset.seen)

    def accuracy(self, arm: str, subset: str | Subset, task: str | None = None) -> Interval | None:
        """Return an arm's share of right answers: the mean over all tasks, or that of one task.

        `subset` is a split, or some of its questions: then the mean is over the tasks that have any.
        None if a task did not measure the arm: a mean over other tasks could not be compared with other arms' means.
        """
        tasks = [found for found in self.tasks_of(subset) if task in (None, found)]
        if not tasks or not set(tasks) <= set(self.shared_tasks(_split_of(subset), arm)):
            return None
        return pooled_accuracy(self._answers(arm, _split_of(subset), tasks), among=self._among(subset, tasks))

    def exact_match(self, arm: str, split: str) -> float | None:
        """Return an arm's share of exact answers, the mean over all tasks; None where a run has none."""
        return _mean(self.exact, [(arm, split, task) for task in self.seeds])

    def difference(self, pair: Pair, subset: str | Subset, task: str | None = None) -> Interval | None:
        """Return how much larger the first arm's share of right answers is than the second's.

        The mean over the tasks that measured both arms (`shared_tasks`) and have questions of the subset, or that of
        one task; None if there is none.
        """
        shared = self.shared_tasks(_split_of(subset), *pair)
        tasks = [found for found in self.tasks_of(subset) if found in shared and task in (None, found)]
        if not tasks:
            return None
        first, second = (self._answers(arm, _split_of(subset), tasks) for arm in pair)
        return pooled_difference(first, second, among=self._among(subset, tasks))

    def gap_recovered(self, arm: str, split: str) -> PerformanceGapRecovered | None:
        """Return a student's PGR over the tasks that measured it, single expert and ceiling; None without one."""
        arms = (BASELINE, arm, CEILING)
        tasks = self.shared_tasks(split, *arms)
        return pooled_gap_recovered(*(self._answers(name, split, tasks) for name in arms)) if tasks else None

    def mean_cost(self, arm: str, field: str, tasks: Sequence[str]) -> float | None:
        """Return what an arm cost per run: the mean over `tasks` of the mean over seeds of one of `COST_FIELDS`.

        None without tasks, or where a run does not know.
        """
        return _mean(self.costs[field], [(arm, task) for task in tasks])

    def flops_per_point(self, arm: str) -> float | None:
        """Return the training FLOPs beyond the single expert's, per point gained over it on the primary split.

        None (undefined) unless the gain's interval is above 0, where the ratio would divide by noise, and unless the
        arm's training costs more, as a student's need not, whose teacher is left out. Also None where costs are
        unknown.
        """
        gain = self.difference((arm, BASELINE), self.primary_split)
        tasks = self.shared_tasks(self.primary_split, arm, BASELINE)
        more, baseline = (self.mean_cost(name, "train_flops", tasks) for name in (arm, BASELINE))
        if gain is None or gain.low <= 0 or more is None or baseline is None or more <= baseline:
            return None
        return (more - baseline) / (100 * gain.value)

    def measured_comparisons(self) -> list[Pair]:
        """Return the comparisons of whose arms some task measured both."""
        return [pair for pair in self.comparisons if any(self.shared_tasks(split, *pair) for split in TEST_SPLITS)]

    def reference_arm(self, reference: str | None = None) -> str:
        """Return the given arm, or the first of the first comparison; without one, or as `check_arm`, ValueError."""
        if reference is None and not self.comparisons:
            raise ValueError("no reference arm: the records declare no comparison; name the arm with `reference`")
        return self.check_arm(reference or self.comparisons[0][0])

    def check_arm(self, arm: str) -> str:
        """Return the arm; one that no task measured with all its seeds raises ValueError with those that there are."""
        if arm not in self.arms:
            raise ValueError(f"no task measured arm {arm!r} with all its seeds; measured are {', '.join(self.arms)}")
        return arm

    def _answers(self, arm: str, split: str, tasks: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
        return {task: self.answers[arm, split][task] for task in tasks}

    def _among(self, subset: str | Subset, tasks: Sequence[str]) -> dict[str, NDArray[np.bool_]] | None:
        return None if isinstance(subset, str) else {task: self._is_in(subset, task) for task in tasks}


def _split_of(subset: str | Subset) -> str:
    return subset if isinstance(subset, str) else subset.split


def _mean(means: Mapping[tuple[str, ...], float], rows: Sequence[tuple[str, ...]]) -> float | None:
    """Return the mean over rows; None without rows, or where one is missing or unknown."""
    values = [means.get(row, math.nan) for row in rows]
    return None if not values or np.isnan(values).any() else float(np.mean(values))


def pool_runs(records: Iterable[Record]) -> Pool:
    """Group the records of one or several runs by task and seed.

    Arms that some seed of a task lacks are left out of that task; `remarks` says so.

    Raises:
        ValueError: no answers to test questions; an arm that a run measured twice; arms of one run that answered
            different questions; seeds of one task with different numbers of questions; studies with different primary
            splits.
    """
    rows = list(records)
    given = _frame(rows, AnswersRecord)
    given = given[given["split"].isin(TEST_SPLITS)].assign(n=given["correct"].str.len())
    if given.empty:
        raise ValueError("no record of kind 'answers' on test questions: run evaluate first")
    _check_same_questions(given)
    seeds = {task: tuple(sorted(found.tolist())) for task, found in given.groupby("task")["seed"].unique().items()}
    answers, left_out = _complete_answers(given, seeds)
    studies = of_kind(rows, StudyRecord)
    splits = {study.primary_split: study.name for study in studies} or {"ood": ""}
    if len(splits) > 1:
        listed = ", ".join(f"{split} ({name})" for split, name in splits.items())
        raise ValueError(f"studies that are pooled must have one primary_split, got {listed}")
    declared = dict.fromkeys((first, second) for study in studies for first, second in study.comparisons)
    exact, sets = _frame(rows, ArmRecord), given.groupby(["task", "split"])
    levels, trained, rules = _levels(of_kind(rows, LevelsRecord), given, seeds)
    unmeasured = sorted((task, seed) for task, seed in run_keys(rows) if seed not in seeds.get(task, ()))
    pool = Pool(
        name=", ".join(dict.fromkeys(study.name for study in studies)),
        declared=bool(studies),
        primary_split=next(iter(splits)),
        comparisons=tuple(declared) if studies else COMPARISONS,
        seeds=seeds,
        answers=answers,
        questions=(sets["questions"].nunique() * sets["n"].first()).to_dict(),
        levels=levels,
        trained=trained,
        level_rules=rules,
        confidences=_confidences(of_kind(rows, ConfidencesRecord), seeds),
        students=frozenset(record.arm for record in of_kind(rows, PgrRecord)) - {CEILING},
        costs=_means(_frame(rows, CostRecord), ["arm", "task"], COST_FIELDS, seeds),
        exact=_means(exact[exact["metric"] == "exact_match"], ["arm", "split", "task"], ["value"], seeds)["value"],
        remarks=(
            *(f"Left out: task {task}, seed {seed}, which has measured no arm yet." for task, seed in unmeasured),
            *left_out,
            *_limits(given, seeds),
        ),
    )
    not_measured = [pair for pair in declared if pair not in pool.measured_comparisons()]
    said = [f"Not measured: {first} against {second}, which was declared." for first, second in not_measured]
    return dataclasses.replace(pool, remarks=(*said, *pool.remarks))


def _frame(records: Iterable[Record], kind: type[RunRecord]) -> pd.DataFrame:
    return pd.DataFrame(of_kind(records, kind), columns=[field.name for field in dataclasses.fields(kind)])


def _means(
    frame: pd.DataFrame, keys: Sequence[str], values: Sequence[str], seeds: Mapping[str, Sequence[int]]
) -> dict[str, dict[tuple[str, ...], float]]:
    """Return means of `values` over the seeds of each task, by `keys`; NaN where one is missing or unknown."""
    measured = [seed in seeds.get(task, ()) for task, seed in zip(frame["task"], frame["seed"], strict=True)]
    groups = frame[np.array(measured, dtype=bool)].astype(dict.fromkeys(values, float)).groupby(keys)[values]
    counts = groups.count()
    wanted = counts.index.get_level_values("task").map(lambda task: len(seeds[task]))
    means: dict[str, dict[tuple[str, ...], float]] = groups.mean().where(counts.eq(wanted, axis="index")).to_dict()
    return means


def _check_same_questions(given: pd.DataFrame) -> None:
    """Refuse arms of one run that were measured twice or on different questions, and seeds with more than others."""
    for (task, seed, split), run in given.groupby(["task", "seed", "split"], sort=False):
        place, first = f"task {task}, seed {seed}, split {split}", run.iloc[0]
        for arm in run["arm"][run["arm"].duplicated()]:
            raise ValueError(f"{place}: {arm} was measured twice; pool one run of each task and seed")
        other = run[(run["questions"] != first["questions"]) | (run["n"] != first["n"])]
        if len(other):
            raise ValueError(
                f"{place}: {first['arm']} and {other['arm'].iloc[0]} answered different questions ({first['n']} of "
                f"digest {first['questions']}, {other['n'].iloc[0]} of {other['questions'].iloc[0]}); measure both on "
                "the same ones to compare them"
            )
    for (task, split), runs in given.groupby(["task", "split"]):
        if runs["n"].nunique() > 1:
            listed = ", ".join(f"{n} with seed {seed}" for seed, n in runs.groupby("seed")["n"].first().items())
            raise ValueError(f"task {task}, split {split}: seeds must have equally many questions, got {listed}")


def _complete_answers(
    given: pd.DataFrame, seeds: Mapping[str, Sequence[int]]
) -> tuple[dict[tuple[str, str], dict[str, NDArray[np.bool_]]], list[str]]:
    """Return the answers of each arm as arrays, of the tasks whose seeds all have them, and remarks on the others."""
    answers: dict[tuple[str, str], dict[str, NDArray[np.bool_]]] = {}
    lacking: dict[tuple[str, str], set[int]] = {}
    for (arm, split, task), runs in given.sort_values("seed").groupby(["arm", "split", "task"]):
        missing = set(seeds[task]) - set(runs["seed"])
        if missing:
            lacking.setdefault((task, arm), set()).update(missing)
        else:
            answers.setdefault((arm, split), {})[task] = np.stack(runs["correct"].map(answers_array).tolist())
    return answers, [
        f"Left out of task {task}: {arm}, which was not measured with {_listed('seed', sorted(missing))}."
        for (task, arm), missing in sorted(lacking.items(), key=lambda item: (item[0][0], arm_order(item[0][1])))
    ]


def _levels(
    records: Sequence[LevelsRecord], given: pd.DataFrame, seeds: Mapping[str, Sequence[int]]
) -> tuple[dict[tuple[str, str], NDArray[np.str_]], dict[str, list[frozenset[str]]], dict[str, str]]:
    """Return `Pool.levels`, `Pool.trained` and `Pool.level_rules` of the tasks whose seeds all have them.

    Levels of other questions than those that were answered raise ValueError.
    """
    found = {(record.task, record.seed, record.split): record for record in records}
    asked = given.groupby(["task", "seed", "split"]).first()
    for place, row in asked.iterrows():
        record = found.get(place)
        if record and (record.questions != row["questions"] or len(record.levels) != row["n"]):
            task, seed, split = place
            raise ValueError(f"task {task}, seed {seed}, split {split}: the levels are those of other questions")
    levels, trained, rules = {}, {}, {}
    for task, numbers in seeds.items():
        known = {split: [found.get((task, seed, split)) for seed in numbers] for split in ("train", *TEST_SPLITS)}
        told = [record for of_split in known.values() for record in of_split if record]
        # Seeds by whose rules levels mean different things have none in common.
        if len({record.rule for record in told}) != 1 or not all(known["train"]):
            continue
        trained[task] = [frozenset(record.levels) for record in known["train"] if record]
        rules[task] = told[0].rule
        for split in TEST_SPLITS:
            if all(known[split]):
                levels[task, split] = np.array([record.levels for record in known[split] if record])
    return levels, trained, rules


def _confidences(
    records: Sequence[ConfidencesRecord], seeds: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Confidences]]:
    found: dict[str, dict[str, Confidences]] = {}
    for teacher, task in sorted({(record.teacher, record.task) for record in records}, key=lambda x: arm_order(x[0])):
        own = {record.seed: record for record in records if (record.teacher, record.task) == (teacher, task)}
        if set(seeds.get(task, ())) == set(own):
            found.setdefault(teacher, {})[task] = Confidences(
                np.concatenate([answers_array(record.correct) for record in own.values()]),
                np.concatenate([record.probabilities for record in own.values()]),
                np.concatenate([record.agreements for record in own.values()]),
            )
    return found


def _limits(given: pd.DataFrame, seeds: Mapping[str, Sequence[int]]) -> list[str]:
    sets = given.groupby(["task", "arm", "split"])["questions"].nunique().groupby("task").max()
    alone = [task for task in seeds if len(seeds[task]) == 1]
    few = [task for task in seeds if 1 < len(seeds[task]) < ENOUGH_SEEDS]
    several = [task for task in seeds if len(seeds[task]) >= ENOUGH_SEEDS and sets[task] > 1]
    remarks = (
        (alone, "One seed in {}: intervals there cover the choice of questions, not the training."),
        (few, f"Fewer than {ENOUGH_SEEDS} seeds in {{}}: resampling so few understates how far they are apart, so that "
         "an interval that ends near 0 decides little."),
        (several, "Seeds of {} answered different questions, so that intervals are wider than they need be."),
    )  # fmt: skip
    return [remark.format(_listed("task", tasks)) for tasks, remark in remarks if tasks]


def _listed(noun: str, items: Sequence[Any]) -> str:
    return f"{noun}{'s' if len(items) > 1 else ''} {', '.join(map(str, items))}"
