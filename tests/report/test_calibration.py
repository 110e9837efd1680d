"""Calibration figures, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score

from ensemw2s.report.calibration import (
    brier_score,
    expected_calibration_error,
    ranking_quality,
    right_of_the_surest,
    selective_accuracy,
)
from ensemw2s.report.page import figures, tables
from tests.many_runs import pool_of, study_records


def answers(seed, n=300):
    generator = np.random.default_rng(seed)
    # Rounded, so that there are ties.
    probability = generator.beta(0.7, 0.9, n).round(2)
    return probability, generator.random(n) < probability**1.5


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_an_independent_library(seed):
    probability, correct = answers(seed)
    assert brier_score(probability, correct) == pytest.approx(brier_score_loss(correct, probability))
    assert ranking_quality(probability, correct) == pytest.approx(roc_auc_score(correct, probability))
    # Its bins leave out the lower edge, so that no probability lies on an edge here.
    probability = np.clip(probability + 0.003, 0, 1)
    reached, said = calibration_curve(correct, probability, n_bins=10)
    weights = np.bincount((probability * 10).astype(int).clip(0, 9), minlength=10)
    expected = np.abs(reached - said) @ weights[weights > 0] / len(correct)
    assert expected_calibration_error(probability, correct) == pytest.approx(expected)


def test_figures_by_hand():
    probability, correct = [0.0, 0.05, 1.0, 0.95], [0, 0, 1, 1]
    assert brier_score(probability, correct) == pytest.approx(0.005 / 4)
    assert expected_calibration_error(probability, correct) == pytest.approx((0.05 + 0.05) / 4)
    assert ranking_quality(probability, correct) == 1.0
    assert ranking_quality([0.3, 0.3], [0, 1]) == 0.5
    assert ranking_quality([0.3, 0.4], [1, 1]) is None and ranking_quality([0.3], [0]) is None
    assert selective_accuracy([0.9, 0.5, 0.5, 0.1], [1, 0, 1, 0]) == pytest.approx([1, 0.75, 2 / 3, 0.5])
    assert right_of_the_surest([0.9, 0.5, 0.5, 0.1], [1, 0, 1, 0], 0.5) == pytest.approx(0.75)
    assert right_of_the_surest([0.9, 0.5], [1, 0], 0.01) == 1.0


@given(arrays(float, st.integers(1, 40), elements=st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0])), st.randoms())
def test_the_curve_ends_at_the_mean_and_does_not_depend_on_the_order(score, random):
    correct = np.array([random.random() < 0.5 for _ in score])
    curve = selective_accuracy(score, correct)
    assert curve[-1] == pytest.approx(correct.mean())
    order = np.array(random.sample(range(len(score)), len(score)))
    assert selective_accuracy(score[order], correct[order]) == pytest.approx(curve)
    assert (curve >= 0).all() and (curve <= 1 + 1e-12).all()
    assert 0 <= expected_calibration_error(score, correct) <= 1


def with_confidences(records, tasks=("sums", "sorting")):
    """The records with what two teachers thought of their answers, in some tasks."""
    found = []
    for task in tasks:
        for seed in range(3):
            for teacher in ("single_expert", "ensemble"):
                probability, correct = answers(seed + 10 * len(teacher), 40)
                found.append({
                    "kind": "confidences", "task": task, "seed": seed, "teacher": teacher,
                    "correct": "".join(map(str, correct.astype(int))), "probabilities": probability.tolist(),
                    "agreements": (probability.round(1) if teacher == "ensemble" else np.ones(40)).tolist(),
                })  # fmt: skip
    return [*records, *found]


def test_the_table_gives_means_over_tasks_of_all_seeds_together():
    pool = pool_of(with_confidences(study_records()))
    headers, rows = tables.calibration(pool)
    assert [row[0] for row in rows] == ["Single weak expert", "Ensemble"] and [row[-1] for row in rows] == ["240"] * 2
    probability, correct = (np.concatenate(x) for x in zip(*(answers(s + 80, 40) for s in range(3)), strict=True))
    shown = dict(zip(headers, rows[1], strict=True))
    assert shown["Brier score"] == f"{brier_score(probability, correct):.3f}"
    assert shown["Calibration error, points"] == f"{100 * expected_calibration_error(probability, correct):.1f}"
    # One expert agrees with itself.
    assert dict(zip(headers, rows[0], strict=True))["Ranking by agreement"] == ""
    panels = figures.selective_figure(pool.confidences)
    assert len(panels) == 2 and "Single weak expert" in panels[0] and "Single weak expert" not in panels[1]


def test_seeds_that_lack_them_leave_the_task_out_and_without_any_there_is_no_section(tmp_path):
    records = with_confidences(study_records())
    lacking = [r for r in records if r["kind"] != "confidences" or r["task"] != "sums" or r["seed"]]
    assert all(set(by_task) == {"sorting"} for by_task in pool_of(lacking).confidences.values())
    assert not tables.calibration(pool_of(study_records()))[1]


@pytest.mark.parametrize("changes", [{"probabilities": [0.5] * 39}, {"agreements": [2.0] * 40}, {"correct": "01"}])
def test_records_that_do_not_fit_are_refused(changes):
    records = with_confidences(study_records(), ("sums",))
    records[-1] |= changes
    with pytest.raises(ValueError, match="of kind 'confidences'"):
        pool_of(records)
