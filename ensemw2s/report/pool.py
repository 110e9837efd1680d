"""What many runs say together: figures over tasks and seeds from tidy records, as pure functions.

`pool_runs` checks and groups the records; the other functions give one figure each. A figure is a mean over tasks,
which all weigh the same, with an interval that resamples seeds and questions within each task (see `evaluate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemw2s.report.arms import BASELINE, CEILING, COMPARISONS, arm_order
from ensemw2s.report.records import TEST_SPLITS, answers_array, of_kind, run_keys
from ensemw2s.report.statistics import (
    Interval,
    PerformanceGapRecovered,
    pooled_accuracy,
    pooled_difference,
    pooled_gap_recovered,
)

# Below this the percentile bootstrap over seeds is clearly too narrow: with n seeds by a factor of sqrt((n-1)/n).
ENOUGH_SEEDS = 5
COST_FIELDS = tuple(f"{use}_{amount}" for use in ("train", "inference") for amount in ("seconds", "tokens", "flops"))

Pair = tuple[str, str]
Records = Iterable[Mapping[str, Any]]
ByTask = Mapping[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class Pool:
    """The measured runs of several tasks and seeds, grouped.

    Attributes:
        name: of the study; "" for runs that belong to none.
        declared: whether the comparisons were declared beforehand, by a study.
        primary_split: "id" or "ood", which the cost of a gain is measured on.
        comparisons: pairs of arms.
        seeds: of each task, in order.
        answers: for (arm, split) and a task, bool `[seeds, n]`: right or wrong. An arm is in a task if all of the
            task's seeds measured it.
        questions: for (task, split), the number of different questions.
        costs: for an arm and a task, the records of kind `cost` of all its seeds.
        remarks: sentences for the reader: what was left out, and what limits the intervals.
    """

    name: str
    declared: bool
    primary_split: str
    comparisons: tuple[Pair, ...]
    seeds: Mapping[str, tuple[int, ...]]
    answers: Mapping[tuple[str, str], ByTask]
    questions: Mapping[tuple[str, str], int]
    costs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
    remarks: tuple[str, ...]

    @property
    def arms(self) -> list[str]:
        """Return the arms that some task measured with all its seeds, in the order of tables."""
        return sorted({arm for arm, _ in self.answers}, key=arm_order)


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def shared_tasks(pool: Pool, split: str, *arms: str) -> list[str]:
    """Return the tasks in which all of the arms answered the split's questions."""
    return [task for task in pool.seeds if all(task in pool.answers.get((arm, split), ()) for arm in arms)]


def accuracy(pool: Pool, arm: str, split: str, task: str | None = None) -> Interval | None:
    """Return an arm's share of right answers: the mean over all tasks, or that of one task.

    None if a task did not measure the arm: a mean over other tasks could not be compared with other arms' means.
    """
    tasks = list(pool.seeds) if task is None else [task]
    if not set(tasks) <= set(shared_tasks(pool, split, arm)):
        return None
    return pooled_accuracy(_answers(pool, arm, split, tasks))


def difference(pool: Pool, pair: Pair, split: str, task: str | None = None) -> Interval | None:
    """Return how much larger the first arm's share of right answers is than the second's.

    The mean over the tasks that measured both arms (`shared_tasks`), or that of one task; None if there is none.
    """
    tasks = [shared for shared in shared_tasks(pool, split, *pair) if task in (None, shared)]
    if not tasks:
        return None
    first, second = (_answers(pool, arm, split, tasks) for arm in pair)
    return pooled_difference(first, second)


def gap_recovered(pool: Pool, arm: str, split: str) -> PerformanceGapRecovered | None:
    """Return a student's PGR over the tasks that measured it, the single expert and the ceiling; None without one."""
    arms = (BASELINE, arm, CEILING)
    tasks = shared_tasks(pool, split, *arms)
    return pooled_gap_recovered(*(_answers(pool, name, split, tasks) for name in arms)) if tasks else None


def mean_cost(pool: Pool, arm: str, field: str, tasks: Sequence[str]) -> float | None:
    """Return what an arm cost per run: the mean over tasks of the mean over seeds.

    Args:
        pool: the runs.
        arm: the arm.
        field: one of `COST_FIELDS`; seconds, tokens or FLOPs.
        tasks: those to average over.

    Returns:
        None without tasks, or where a run does not know.
    """
    by_task = pool.costs.get(arm, {})
    means = []
    for task in tasks:
        known = [record[field] for record in by_task.get(task, ()) if record.get(field) is not None]
        if len(known) < len(pool.seeds[task]):
            return None
        means.append(np.mean(known))
    return float(np.mean(means)) if means else None


def flops_per_point(pool: Pool, arm: str) -> float | None:
    """Return the training FLOPs beyond the single expert's, per percentage point gained over it on the primary split.

    None (undefined) unless the gain's interval is above 0, where the ratio would divide by noise, and unless the arm's
    training costs more, as a student's need not, whose teacher is left out. Also None where costs are unknown.
    """
    gain = difference(pool, (arm, BASELINE), pool.primary_split)
    tasks = shared_tasks(pool, pool.primary_split, arm, BASELINE)
    more, baseline = (mean_cost(pool, name, "train_flops", tasks) for name in (arm, BASELINE))
    if gain is None or gain.low <= 0 or more is None or baseline is None or more <= baseline:
        return None
    return (more - baseline) / (100 * gain.value)


def measured_comparisons(pool: Pool) -> list[Pair]:
    """Return the comparisons of whose arms some task measured both."""
    return [pair for pair in pool.comparisons if _share_a_task(pool.answers, pair)]


def reference_arm(pool: Pool, reference: str | None = None) -> str:
    """Return the arm that the others are measured against: the given one, or the first of the first comparison.

    Raises:
        ValueError: an arm that no task measured, or none given and no comparison.
    """
    if reference is None and not pool.comparisons:
        raise ValueError("no reference arm: the records declare no comparison; name the arm with `reference`")
    return check_arm(pool, reference or pool.comparisons[0][0])


def check_arm(pool: Pool, arm: str) -> str:
    """Return the arm; one that no task measured with all its seeds raises ValueError with those that there are."""
    if arm not in pool.arms:
        raise ValueError(f"no task measured arm {arm!r} with all its seeds; measured are {', '.join(pool.arms)}")
    return arm


def _answers(pool: Pool, arm: str, split: str, tasks: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    return {task: pool.answers[arm, split][task] for task in tasks}


# ----------------------------------------------------------------------------------------------------------------------
# Grouping

# For (arm, split), a task and a seed: the record of kind `answers`.
_Given = dict[tuple[str, str], dict[str, dict[int, Mapping[str, Any]]]]


def pool_runs(records: Records) -> Pool:
    """Group the records of several runs by task and seed.

    Arms that some seed of a task lacks are left out of that task; `remarks` says so.

    Raises:
        ValueError: no answers to test questions; an arm that a run measured twice; arms of one run that answered
            different questions; seeds of one task with different numbers of questions; studies with different primary
            splits.
    """
    rows = list(records)
    given = _given_answers(rows)
    seeds = _seeds(given)
    if not seeds:
        raise ValueError("no record of kind 'answers' on test questions: run evaluate first")
    questions = _count_questions(given, seeds)
    answers = _complete_answers(given, seeds)
    studies = of_kind(rows, "study")
    comparisons = _declared_pairs(studies) if studies else COMPARISONS
    not_measured = [pair for pair in comparisons if studies and not _share_a_task(answers, pair)]
    return Pool(
        name=", ".join(dict.fromkeys(study["name"] for study in studies)),
        declared=bool(studies),
        primary_split=_primary_split(studies),
        comparisons=comparisons,
        seeds=seeds,
        answers=answers,
        questions=questions,
        costs=_costs(rows, seeds),
        remarks=(
            *(f"Not measured: {first} against {second}, which was declared." for first, second in not_measured),
            *_unmeasured_runs(rows, seeds),
            *_left_out(given, seeds),
            *_limits(given, seeds),
        ),
    )


def _given_answers(rows: Records) -> _Given:
    given: _Given = {}
    for record in of_kind(rows, "answers"):
        if record["split"] not in TEST_SPLITS:
            continue
        by_seed = given.setdefault((record["arm"], record["split"]), {}).setdefault(record["task"], {})
        if record["seed"] in by_seed:
            raise ValueError(
                f"{_place(record['task'], record['seed'], record['split'])}: {record['arm']} was measured twice; pool "
                "one run of each task and seed"
            )
        by_seed[record["seed"]] = record
    return given


def _seeds(given: _Given) -> dict[str, tuple[int, ...]]:
    """Return the seeds of each task, tasks in alphabetical order."""
    found: dict[str, set[int]] = {}
    for by_task in given.values():
        for task, by_seed in by_task.items():
            found.setdefault(task, set()).update(by_seed)
    return {task: tuple(sorted(found[task])) for task in sorted(found)}


def _count_questions(given: _Given, seeds: Mapping[str, Sequence[int]]) -> dict[tuple[str, str], int]:
    """Return the number of different questions for (task, split), after checking that arms had the same ones."""
    counts = {}
    for task in seeds:
        for split in TEST_SPLITS:
            runs = [_asked(given, task, seed, split) for seed in seeds[task]]
            sizes = {seed: n for seed, (_, n) in zip(seeds[task], runs, strict=True) if n}
            if len(set(sizes.values())) > 1:
                listed = ", ".join(f"{n} with seed {seed}" for seed, n in sizes.items())
                raise ValueError(f"task {task}, split {split}: seeds must have equally many questions, got {listed}")
            if sizes:
                counts[task, split] = len({digest for digest, n in runs if n}) * next(iter(sizes.values()))
    return counts


def _asked(given: _Given, task: str, seed: int, split: str) -> tuple[str, int]:
    """Return digest and number of the questions of one run's split, ("", 0) if it has none."""
    digest, n, first = "", 0, ""
    for (arm, of_split), by_task in given.items():
        record = by_task.get(task, {}).get(seed)
        if of_split != split or record is None:
            continue
        if not first:
            digest, n, first = record["questions"], len(record["correct"]), arm
        if (record["questions"], len(record["correct"])) != (digest, n):
            raise ValueError(
                f"{_place(task, seed, split)}: {first} and {arm} answered different questions ({n} of digest {digest}, "
                f"{len(record['correct'])} of {record['questions']}); measure both on the same ones to compare them"
            )
    return digest, n


def _complete_answers(given: _Given, seeds: Mapping[str, Sequence[int]]) -> dict[tuple[str, str], ByTask]:
    """Return the answers of each arm as arrays, of the tasks whose seeds all have them."""
    answers: dict[tuple[str, str], ByTask] = {}
    for key, by_task in given.items():
        complete = {
            task: np.stack([answers_array(by_task[task][seed]["correct"]) for seed in seeds[task]])
            for task in seeds
            if len(by_task.get(task, ())) == len(seeds[task])
        }
        if complete:
            answers[key] = complete
    return answers


def _declared_pairs(studies: Sequence[Mapping[str, Any]]) -> tuple[Pair, ...]:
    pairs = [(first, second) for study in studies for first, second in study["comparisons"]]
    return tuple(dict.fromkeys(pairs))


def _share_a_task(answers: Mapping[tuple[str, str], ByTask], pair: Pair) -> bool:
    first, second = ({(split, task) for split in TEST_SPLITS for task in answers.get((arm, split), ())} for arm in pair)
    return bool(first & second)


def _costs(rows: Records, seeds: Mapping[str, Sequence[int]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    costs: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for record in of_kind(rows, "cost"):
        if record["seed"] in seeds.get(record["task"], ()):
            costs.setdefault(record["arm"], {}).setdefault(record["task"], []).append(record)
    return costs


def _primary_split(studies: Sequence[Mapping[str, Any]]) -> str:
    splits = {study["primary_split"]: study["name"] for study in studies} or {"ood": ""}
    if len(splits) > 1:
        listed = ", ".join(f"{split} ({name})" for split, name in splits.items())
        raise ValueError(f"studies that are pooled must have one primary_split, got {listed}")
    return next(iter(splits))


# ----------------------------------------------------------------------------------------------------------------------
# Remarks


def _unmeasured_runs(rows: Records, seeds: Mapping[str, Sequence[int]]) -> list[str]:
    missing = sorted((task, seed) for task, seed in run_keys(rows) if seed not in seeds.get(task, ()))
    return [f"Left out: task {task}, seed {seed}, which has measured no arm yet." for task, seed in missing]


def _left_out(given: _Given, seeds: Mapping[str, Sequence[int]]) -> list[str]:
    """Say which arms some seed of a task lacks."""
    found: dict[tuple[str, str], set[int]] = {}
    for (arm, _), by_task in given.items():
        for task, by_seed in by_task.items():
            missing = set(seeds[task]) - set(by_seed)
            if missing:
                found.setdefault((task, arm), set()).update(missing)
    return [
        f"Left out of task {task}: {arm}, which was not measured with {_listed('seed', sorted(missing))}."
        for (task, arm), missing in sorted(found.items(), key=lambda item: (item[0][0], arm_order(item[0][1])))
    ]


def _limits(given: _Given, seeds: Mapping[str, Sequence[int]]) -> list[str]:
    remarks = []
    alone = [task for task in seeds if len(seeds[task]) == 1]
    if alone:
        remarks.append(
            f"One seed in {_listed('task', alone)}: intervals there cover the choice of questions, not the training."
        )
    few = [task for task in seeds if 1 < len(seeds[task]) < ENOUGH_SEEDS]
    if few:
        remarks.append(
            f"Fewer than {ENOUGH_SEEDS} seeds in {_listed('task', few)}: resampling so few understates how far they "
            "are apart, so that an interval that ends near 0 decides little."
        )
    enough = [task for task in seeds if len(seeds[task]) >= ENOUGH_SEEDS]
    several = [task for task in enough if any(_changes(by_task.get(task, {})) for by_task in given.values())]
    if several:
        remarks.append(
            f"Seeds of {_listed('task', several)} answered different questions, so that intervals are wider than they "
            "need be."
        )
    return remarks


def _changes(by_seed: Mapping[int, Mapping[str, Any]]) -> bool:
    return len({record["questions"] for record in by_seed.values()}) > 1


def _place(task: str, seed: int, split: str) -> str:
    return f"task {task}, seed {seed}, split {split}"


def _listed(noun: str, items: Sequence[Any]) -> str:
    return f"{noun}{'s' if len(items) > 1 else ''} {', '.join(map(str, items))}"
