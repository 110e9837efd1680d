"""Figures and tables of many runs, against figures worked out by hand from the same records."""

import numpy as np
import pytest

from ensemw2s.report.findings import levels_outside
from ensemw2s.report.page import tables
from ensemw2s.report.pool import Subset
from ensemw2s.report.statistics import pooled_accuracy, pooled_difference, pooled_gap_recovered
from ensemw2s.runtime.records import questions_digest
from tests.many_runs import COMPARISONS, EASE, SKILL, answer_records, outcomes, pool_of, study_records, with_levels

TASKS = sorted(EASE)
FEW = (
    "Fewer than 5 seeds in tasks reversal, sorting, sums: resampling so few understates how far they are apart, so "
    "that an interval that ends near 0 decides little."
)


@pytest.fixture(scope="module")
def records():
    return study_records()


@pytest.fixture(scope="module")
def pool(records):
    return pool_of(records)


def without(records, **fields):
    """The records without those that have all of the given fields."""
    return [record for record in records if any(record.get(name) != value for name, value in fields.items())]


def column(rows, header):
    """A column of a table by its rows' first cells."""
    headers, body = rows
    return {row[0]: row[headers.index(header)] for row in body}


# Grouping


def test_runs_are_grouped_by_task_and_seed(records, pool):
    assert dict(pool.seeds) == dict.fromkeys(TASKS, (0, 1, 2))
    assert list(pool.seeds) == TASKS
    assert (pool.name, pool.primary_split, pool.comparisons) == ("small_pair", "ood", COMPARISONS)
    assert set(pool.arms) == set(SKILL)
    for (arm, split), by_task in pool.answers.items():
        for task, expected in outcomes(records, arm, split).items():
            np.testing.assert_array_equal(by_task[task], expected)
    assert pool.remarks == (FEW,)


def test_the_order_of_records_does_not_matter(records, pool):
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    again = pool_of(shuffled)
    assert again.arms == pool.arms
    assert tables.ablation(again) == tables.ablation(pool)


def test_differences_found_are_the_true_ones():
    """With many questions and seeds the known differences come out, whatever the tasks' own ease."""
    large = pool_of(study_records(seeds=12, n=1000, seed=5))
    for first, second in COMPARISONS:
        for column_, split in enumerate(("id", "ood")):
            found = large.difference((first, second), split)
            truth = SKILL[first][column_] - SKILL[second][column_]
            assert found.value == pytest.approx(truth, abs=0.02)
            assert found.low - 0.01 < truth < found.high + 0.01


# Levels


@pytest.fixture(scope="module")
def levelled(records):
    return pool_of(with_levels(records, ["4", "5", "10", "5"] * 20, ["3", "4", "4"]))


def test_figures_by_level_are_those_of_its_questions_alone(records, levelled):
    level = np.array(["4", "5", "10", "5"] * 20)
    assert levelled.levels_of("sums", "ood") == ["4", "5", "10"]
    assert levelled.share(Subset("ood", "5"), "sums") == 0.5
    parts = {
        Subset("ood", "5"): level == "5",
        Subset("ood", seen=True): level == "4",
        Subset("ood", seen=False): level != "4",
    }
    for part, inside in parts.items():
        for task in TASKS:
            answers = outcomes(records, "ensemble", "ood")[task][:, inside]
            assert levelled.accuracy("ensemble", part, task).value == pytest.approx(answers.mean())
        first, second = (outcomes(records, arm, "ood") for arm in COMPARISONS[0])
        moves = [first[task][:, inside].mean() - second[task][:, inside].mean() for task in TASKS]
        assert levelled.difference(COMPARISONS[0], part).value == pytest.approx(np.mean(moves))
    assert levelled.accuracy("ensemble", Subset("ood", "6")) is None
    assert levelled.accuracy("ensemble", Subset("id", "5")) is None


def test_tables_show_levels(levelled):
    headers, rows = tables.levels(levelled)
    assert [row[:4] for row in rows[:3]] == [
        [TASKS[0], "4", "25%", "yes"], [TASKS[0], "5", "50%", "no"], [TASKS[0], "10", "25%", "no"],
    ]  # fmt: skip
    headers, rows = tables.by_level(levelled, arms=["ensemble"])
    assert headers[1:4] == [f"{TASKS[0]}: {level}" for level in ("4", "5", "10")]
    found = levelled.accuracy("ensemble", Subset("ood", "5"), TASKS[0]).value
    assert rows == [["Ensemble", *rows[0][1:]]] and rows[0][2] == f"{100 * found:.1f}"
    assert tables.differences_by_level(levelled)[0][1:] == [
        "OOD, points", "OOD, levels seen, points", "OOD, levels never seen, points",
    ]  # fmt: skip
    assert tables.accuracies(levelled)[0][1:5] == [
        "ID, %", "OOD, %", "OOD, levels seen, %", "OOD, levels never seen, %",
    ]  # fmt: skip


def test_without_levels_tables_have_no_room_for_them(pool):
    assert not tables.levels(pool)[1] and not tables.by_level(pool)[1]
    assert "levels" not in " ".join(tables.accuracies(pool)[0])
    assert tables.differences_by_level(pool)[0] == ["Comparison", "OOD, points"]


def test_levels_of_some_seeds_alone_or_of_other_rules_do_not_count(records):
    some = [
        r for r in with_levels(records, ["4"] * 80, ["4"]) if r["kind"] != "levels" or r["seed"] or r["task"] != "sums"
    ]
    assert ("sums", "ood") not in pool_of(some).levels and ("sorting", "ood") in pool_of(some).levels
    mixed = with_levels(records, ["4"] * 80, ["4"])
    mixed[-1]["rule"] = "words"
    assert len(pool_of(mixed).levels) == 2


@pytest.mark.parametrize("changes", [{"questions": "1" * 16}, {"levels": ["4"] * 79}])
def test_levels_of_other_questions_are_refused(records, changes):
    with pytest.raises(ValueError, match=r"task .*, seed 0, split ood: the levels are those of other questions"):
        pool_of(with_levels(records, ["4"] * 80, ["4"], **changes))


@pytest.mark.parametrize(
    ("single", "ceiling", "inside"),
    [(0.0, 1.0, "no: single expert below 10%"), (1.0, 1.0, "no: single expert above 90%"), (0.5, 1.0, "yes"),
     (0.5, 0.6, "no: ceiling less than 15 points above"), (0.1, 0.25, "yes"), (0.9, 1.0, "no: ceiling less than")],
)  # fmt: skip
def test_the_band_in_which_arms_can_differ(single, ceiling, inside):
    digest = questions_digest(range(20))
    records = []
    for arm, share in (("single_expert", single), ("ceiling", ceiling)):
        right = np.arange(20) < round(20 * share)
        records += answer_records(right, digest, task="sums", seed=0, arm=arm, split="ood")
    pool = pool_of(with_levels(records, ["4"] * 20, ["4"]))
    assert tables.levels(pool)[1][0][-1].startswith(inside)
    assert bool(levels_outside(pool)) == (inside != "yes")
    if inside != "yes":
        assert levels_outside(pool).startswith(
            "100% of the hard questions"
        ) and f"sums 4 ({inside[4:]}" in levels_outside(pool)


# Figures


def test_figures_are_those_of_evaluate_on_the_same_answers(records, pool):
    weak, student, ceiling = (outcomes(records, arm, "ood") for arm in ("single_expert", "student_ensemble", "ceiling"))
    by_name = [{task: arm[task] for task in TASKS} for arm in (weak, student, ceiling)]
    assert pool.accuracy("ceiling", "ood") == pooled_accuracy(by_name[2])
    assert pool.difference(("student_ensemble", "single_expert"), "ood") == pooled_difference(by_name[1], by_name[0])
    assert pool.gap_recovered("student_ensemble", "ood") == pooled_gap_recovered(*by_name)
    one = pool.difference(("student_ensemble", "single_expert"), "ood", "sums")
    assert one == pooled_difference({"sums": student["sums"]}, {"sums": weak["sums"]})
    assert pool.accuracy("ceiling", "ood", "sums") == pooled_accuracy({"sums": ceiling["sums"]})


def test_costs_are_means_over_tasks_of_means_over_seeds(records):
    # One task with a single seed weighs as much as one with three.
    fewer = [r for r in records if not (r.get("task") == "sums" and r["seed"] > 0)]
    pool = pool_of(fewer)
    assert pool.mean_cost("ensemble", "train_flops", TASKS) == pytest.approx(3e12 * (1.1 + 1.1 + 1.0) / 3)
    gain = pool.difference(("ensemble", "single_expert"), "ood")
    assert gain.low > 0
    extra = 2e12 * (1.1 + 1.1 + 1.0) / 3
    assert pool.flops_per_point("ensemble") == pytest.approx(extra / (100 * gain.value))


def test_a_cost_that_one_run_does_not_know_is_unknown(records):
    def place(record):
        return (record["kind"], record.get("arm"), record.get("task"), record.get("seed"))

    target = ("cost", "ensemble", "sums", 1)
    for changed in (
        [record for record in records if place(record) != target],
        [record | ({"train_flops": None} if place(record) == target else {}) for record in records],
    ):
        pool = pool_of(changed)
        assert pool.mean_cost("ensemble", "train_flops", TASKS) is None
        assert pool.flops_per_point("ensemble") is None
        assert column(tables.cost(pool), "Training, TFLOP")["Ensemble"] == ""
        assert column(tables.cost(pool), "Extra TFLOP per point")["Ensemble"] == ""


def test_a_gain_that_took_no_more_training_has_no_price(records):
    cheap = [r | {"train_flops": 1.0} if (r["kind"], r.get("arm")) == ("cost", "ensemble") else r for r in records]
    pool = pool_of(cheap)
    assert pool.difference(("ensemble", "single_expert"), "ood").low > 0
    assert pool.flops_per_point("ensemble") is None
    assert column(tables.cost(pool), "Extra TFLOP per point")["Ensemble"] == "undefined"


def test_no_gain_no_price(pool):
    per_point = column(tables.cost(pool), "Extra TFLOP per point")
    assert pool.difference(("no_shrinkage", "single_expert"), "ood").low < 0
    assert pool.flops_per_point("no_shrinkage") is None
    assert per_point["No shrinkage"] == "undefined"
    assert per_point["Recipe as published"] == "undefined", "a loss has no price either"
    assert per_point["Ensemble"] == f"{pool.flops_per_point('ensemble') / 1e12:.3g}"
    assert per_point["Single weak expert"] == ""


def test_the_reference_is_the_first_arm_of_the_first_comparison_unless_given(pool):
    assert pool.reference_arm() == "ensemble"
    assert pool.reference_arm("paper") == "paper"


# Arms that are missing


def test_an_arm_that_one_seed_lacks_is_left_out_of_the_task_and_said_so(records):
    pool = pool_of(without(records, kind="answers", task="sums", seed=1, arm="paper"))
    assert pool.remarks == ("Left out of task sums: paper, which was not measured with seed 1.", FEW)
    assert pool.shared_tasks("ood", "paper") == ["reversal", "sorting"]
    assert pool.accuracy("paper", "ood") is None, "a mean over other tasks compares with no other arm's"
    assert pool.accuracy("paper", "ood", "sums") is None
    assert pool.accuracy("paper", "ood", "sorting") is not None
    table = tables.differences(pool)
    assert column(table, "Tasks")["Ensemble against recipe as published"] == "2"
    assert column(table, "Tasks")["Ensemble against deep ensemble"] == "3"
    first, second = (
        {task: outcomes(records, arm, "ood")[task] for task in ("reversal", "sorting")} for arm in ("ensemble", "paper")
    )
    assert pool.difference(("ensemble", "paper"), "ood") == pooled_difference(first, second)


def test_an_arm_of_one_task_has_figures_there_alone(records):
    only = [r for r in records if r.get("arm") != "no_shrinkage" or r["task"] == "sums"]
    pool = pool_of(only)
    assert pool.remarks == (FEW,)
    assert column(tables.ablation(pool), "Tasks")["No shrinkage"] == "1"
    assert column(tables.accuracies(pool), "OOD, %")["No shrinkage"] == ""
    row = column(tables.by_task(pool), "sums")
    assert row["No shrinkage"] and column(tables.by_task(pool), "sorting")["No shrinkage"] == ""


def test_a_declared_comparison_that_nothing_measured_is_said(records):
    pool = pool_of(without(records, arm="paper"))
    assert ("ensemble", "paper") not in pool.measured_comparisons()
    assert pool.remarks == ("Not measured: ensemble against paper, which was declared.", FEW)


def test_a_run_that_has_not_been_measured_is_said(records):
    begun = {"kind": "cost", "task": "sums", "seed": 9, "arm": "ensemble", "train_flops": 1e20}
    pool = pool_of([*records, begun])
    assert pool.remarks == ("Left out: task sums, seed 9, which has measured no arm yet.", FEW)
    assert pool.mean_cost("ensemble", "train_flops", TASKS) == pytest.approx(3.3e12)


def test_one_seed_is_said(records):
    pool = pool_of([record for record in records if record.get("seed", 0) == 0])
    assert pool.remarks == (
        "One seed in tasks reversal, sorting, sums: intervals there cover the choice of questions, not the training.",
    )


def test_seeds_with_questions_of_their_own_are_said_and_counted():
    changed = [
        r | ({"questions": questions_digest([r["seed"]])} if r["kind"] == "answers" and r["task"] == "sums" else {})
        for r in study_records(seeds=5)
    ]
    pool = pool_of(changed)
    assert pool.remarks == (
        "Seeds of task sums answered different questions, so that intervals are wider than they need be.",
    )
    assert pool.questions["sums", "ood"] == 400
    assert column(tables.differences(pool), "Questions")["Ensemble against deep ensemble"] == "80–400 / 80–400"


# Refused


def change_first(records, kind, **fields):
    """The records with `fields` changed in the first of `kind` on split ood that is not of the first arm."""
    position = next(
        i for i, r in enumerate(records) if (r["kind"], r.get("arm"), r.get("split")) == (kind, "deep_ensemble", "ood")
    )
    return [*records[:position], records[position] | fields, *records[position + 1 :]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: change_first(r, "answers", questions="0" * 16),
            "task reversal, seed 0, split ood: single_expert and deep_ensemble answered different questions .* "
            "measure both on the same ones",
        ),
        (lambda r: change_first(r, "answers", correct="01"), "single_expert and deep_ensemble answered different"),
        (lambda r: [*r, r[1]], "task reversal, seed 0, split id: single_expert was measured twice; pool one run of"),
        (
            lambda r: [*r, *answer_records(np.ones(3), "0" * 16, task="sums", seed=9, arm="paper", split="id")],
            "task sums, split id: seeds must have equally many questions, got 80 with seed 0, .* 3 with seed 9",
        ),
        (
            lambda r: [*r, {"kind": "study", "name": "other", "primary_split": "id", "comparisons": []}],
            r"one primary_split, got ood \(small_pair\), id \(other\)",
        ),
        (lambda r: [r[-1]], "no record of kind 'answers' on test questions: run evaluate first"),
    ],
)
def test_records_that_cannot_be_pooled_are_refused(records, change, message):
    with pytest.raises(ValueError, match=message):
        pool_of(change(records))


def test_unknown_arms_and_splits_are_refused(pool):
    with pytest.raises(ValueError, match="no task measured arm 'papre' with all its seeds; measured are single_expert"):
        tables.accuracies(pool, arms=["papre"])
    with pytest.raises(ValueError, match="no task measured arm 'nothing'"):
        tables.ablation(pool, reference="nothing")
    with pytest.raises(ValueError, match="split must be one of id, ood, got 'validation'"):
        tables.by_task(pool, split="validation")


def test_an_ablation_without_comparisons_needs_a_reference(records):
    study = records[-1] | {"comparisons": []}
    pool = pool_of([*records[:-1], study])
    with pytest.raises(ValueError, match=r"no reference arm: .* name the arm with `reference`"):
        tables.ablation(pool)
    assert len(tables.ablation(pool, reference="paper")[1]) == len(SKILL) - 1


# Tables


def test_differences_say_figures_sizes_and_a_verdict(pool):
    table = tables.differences(pool)
    assert table[0] == ["Comparison", "ID, points", "OOD, points", "Tasks", "Seeds", "Questions"]
    names = [row[0] for row in table[1]]
    assert names == [
        "Ensemble against deep ensemble", "Student of ensemble against student of single expert",
        "Ensemble against recipe as published",
    ]  # fmt: skip
    value, low, high = pool.difference(("ensemble", "paper"), "ood")
    assert low > 0
    assert table[1][2][2] == f"+{100 * value:.1f} (+{100 * low:.1f} to +{100 * high:.1f}): better"
    assert table[1][2][3:] == ["3", "3", "80 / 80"]


def test_the_ablation_mirrors_the_comparisons(pool):
    forth = column(tables.differences(pool), "OOD, points")["Ensemble against recipe as published"]
    back = column(tables.ablation(pool), "OOD, points")["Recipe as published"]
    value, low, high = pool.difference(("paper", "ensemble"), "ood")
    assert forth == f"+{-100 * value:.1f} (+{-100 * high:.1f} to +{-100 * low:.1f}): better"
    assert back == f"−{-100 * value:.1f} (−{-100 * low:.1f} to −{-100 * high:.1f}): worse"


def test_every_arm_but_the_reference_is_in_the_ablation(pool):
    assert {row[0] for row in tables.ablation(pool, reference="paper")[1]} == {
        "Single weak expert", "Deep ensemble", "Ensemble", "No shrinkage", "Student of single expert",
        "Student of ensemble", "Ceiling: taught by truth",
    }  # fmt: skip
    assert [row[0] for row in tables.ablation(pool, arms=["no_shrinkage"])[1]] == ["No shrinkage"]


def test_accuracies_by_task_are_means_over_seeds(records, pool):
    cells = column(tables.by_task(pool), "sums")
    right = [100 * outcomes(records, "ensemble", split)["sums"].mean() for split in ("id", "ood")]
    assert cells["Ensemble"] == f"{right[0]:.1f} / {right[1]:.1f}"
    value, low, high = (100 * x for x in pool.accuracy("ensemble", "ood", "sums"))
    table = tables.by_task(pool, split="ood", arms=["ensemble"])
    assert table[0] == ["Arm, OOD in %", *TASKS]
    assert column(table, "sums") == {"Ensemble": f"{value:.1f} ({low:.1f} to {high:.1f})"}


def test_differences_by_task_are_on_the_primary_split_unless_said(pool):
    ood, id_ = (tables.differences_by_task(pool, split=split) for split in (None, "id"))
    assert (ood[0][0], id_[0][0]) == ("Comparison, OOD in points", "Comparison, ID in points")
    value = pool.difference(("ensemble", "paper"), "ood", "sums").value
    assert column(ood, "sums")["Ensemble against recipe as published"].startswith(f"+{100 * value:.1f} (")
    assert ood[1] != id_[1]


def test_a_choice_of_arms_chooses_the_comparisons_between_them(pool):
    chosen = tables.differences(pool, arms=["ensemble", "paper", "ceiling"])
    assert [row[0] for row in chosen[1]] == ["Ensemble against recipe as published"]
    assert tables.differences_by_task(pool, arms=["paper"])[1] == []


def test_pgr_is_that_of_students_unless_arms_are_given(pool):
    table = tables.pgr(pool)
    assert [row[0] for row in table[1]] == ["Student of single expert", "Student of ensemble"]
    found = pool.gap_recovered("student_ensemble", "ood")
    assert column(table, "PGR OOD")["Student of ensemble"] == f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
    assert column(table, "Gap OOD, points")["Student of ensemble"].startswith(f"+{100 * found.gap:.1f} (")
    assert [row[0] for row in tables.pgr(pool, arms=["ensemble"])[1]] == ["Ensemble"]


def test_an_undefined_pgr_is_a_word():
    flat = dict.fromkeys(("single_expert", "student_ensemble", "ceiling"), (0.5, 0.5))
    table = tables.pgr(pool_of(study_records(skill=flat, seeds=2, n=20)))
    assert column(table, "PGR OOD") == {"Student of ensemble": "undefined"}


def test_how_much_was_measured(records, pool):
    assert tables.extent(pool) == "3 tasks × 3 seeds × 80 ID and 80 OOD questions"
    fewer = [r for r in records if r["kind"] == "study" or (r["task"] == "sums" and r["seed"] == 0)]
    assert tables.extent(pool_of(fewer)) == "1 task × 1 seed × 80 ID and 80 OOD questions"


def test_every_table_has_a_note():
    assert tables.NOTES.keys() == tables.TABLES.keys()
