"""The sentences of a page: each follows from its figures, and none says more than they do."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from ensemw2s.report.findings import (
    boosting_weights,
    headline,
    mixture_sentences,
    opposite_moves,
    share_text,
    shares_of,
)
from ensemw2s.report.pool import Pool, pool_runs
from ensemw2s.runtime.records import MixtureRecord, RoundRecord, parse_records, questions_digest
from tests.many_runs import answer_records
from tests.report.test_page import Page, make_records, make_run, page_of, round_records

QUESTIONS = questions_digest(str(i) for i in range(200))


def pool(**right: tuple[int, int]) -> Pool:
    """One run in which each arm answers so many of 200 easy and of 200 hard questions, the first ones."""
    records = [
        record
        for arm, counts in right.items()
        for split, count in zip(("id", "ood"), counts, strict=True)
        for record in answer_records(np.arange(200) < count, QUESTIONS, task="t", seed=0, arm=arm, split=split)
    ]
    return pool_runs(parse_records(records))


def mixture(*weights: float) -> MixtureRecord:
    return MixtureRecord(expert_weights=list(weights), arm="ensemble")


def accepted(*alphas: float) -> list[RoundRecord]:
    first = next(record for record in round_records(np.random.default_rng(0)) if record["kind"] == "round")
    records = [
        first | {"round": i + 1, "expert_weight": a, "arm": "ensemble", "task": "t", "seed": 0}
        for i, a in enumerate(alphas)
    ]
    return list(parse_records(records))


@pytest.mark.parametrize(
    ("ensemble", "single", "said"),
    [
        (120, 60, "On hard questions, the ensemble is ahead of the single weak expert: 60.0% against 30.0% right"),
        (60, 120, "On hard questions, the ensemble is behind the single weak expert: 30.0% against 60.0% right"),
        (60, 59, "On hard questions, no difference was found between the ensemble and the single weak expert"),
    ],
)
def test_the_first_sentence_follows_the_interval(ensemble: int, single: int, said: str) -> None:
    text = headline(pool(ensemble=(100, ensemble), single_expert=(100, single)))
    assert text.startswith(said)
    assert re.search(rf"a difference of [+−]{abs(ensemble - single) / 2:.1f} points \(95% interval ", text)
    assert "200 questions, one training seed" in text


def test_without_figures_the_first_sentence_says_so() -> None:
    assert "Nothing was measured" in headline(None)
    assert "No comparison can be made on hard questions" in headline(pool(ensemble=(1, 2)))


def test_a_table_of_zeros_comes_with_a_hint() -> None:
    assert headline(pool(ensemble=(0, 0), single_expert=(0, 0))).startswith(
        "No arm answers a single test question right"
    )
    assert "single test question" not in headline(pool(ensemble=(0, 0), single_expert=(1, 0)))


def test_large_opposite_moves_are_commented() -> None:
    [said] = opposite_moves(pool(single_expert=(120, 40), ensemble=(80, 80)))
    assert "moves in opposite directions: −20.0 points on easy questions and +20.0 points on hard questions" in said
    assert "A mean over both kinds of questions would hide it" in said
    both = pool(single_expert=(120, 40), student_ensemble=(80, 80))
    [said] = opposite_moves(dataclasses.replace(both, students=frozenset({"student_ensemble"})))
    assert "can lose on easy ones what they gain on hard ones" in said
    for unremarkable in ((121, 80), (119, 41)):
        assert opposite_moves(pool(single_expert=(120, 40), ensemble=unremarkable)) == []


@pytest.mark.parametrize("weights", [[6e-300, 0.96, 0.04], [1e308, 1e308], [5e-324, 5e-324, 5e-324], [0.0, 2.0]])
def test_shares_of_extreme_weights_sum_to_one(weights: list[float]) -> None:
    shares = shares_of(weights)
    assert sum(shares) == pytest.approx(1.0, abs=1e-12)
    assert np.argmax(shares) == np.argmax(weights)


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100%"), (0.384, "38%"), (0.04, "4%"), (0.0, "0%"), (6e-300, "6e−298%")]
)
def test_a_share_can_be_read_at_any_size(share: float, text: str) -> None:
    assert share_text(share) == text


def test_an_expert_without_weight_is_said_to_cost_compute_for_nothing() -> None:
    first, useless, unused = mixture_sentences(mixture(6e-300, 0.96, 0.04), accepted(2.0, 1.0, 0.5))
    assert first == "The ensemble mixes 3 experts, with 6e−298%, 96% and 4% of the weight."
    assert "Expert 1 has next to no weight" in useless
    assert "`ensemble.without(0)` runs 2, which saves 1 of 3" in useless
    assert "α are not used in the mixture" in unused


def test_of_chains_the_weights_of_the_ends_count() -> None:
    rounds = accepted(4.0, 3.0, 2.0, 1.0)
    chained = [dataclasses.replace(record, chain=chain) for record, chain in zip(rounds, (1, 1, 2, 3), strict=True)]
    assert boosting_weights(mixture(1.0, 1.0, 1.0), chained) == [3.0, 2.0, 1.0]
    assert boosting_weights(mixture(1.0, 1.0, 1.0), rounds) == [4.0, 3.0, 2.0]


def test_an_ensemble_by_its_boosting_weights_needs_no_remark() -> None:
    assert mixture_sentences(mixture(2.0, 1.0), accepted(2.0, 1.0)) == [
        "The ensemble mixes 2 experts, with 67% and 33% of the weight."
    ]
    assert mixture_sentences(mixture(1.0, 1.0), accepted(1.0, 1.0))[0].endswith("with the same weight each.")


@pytest.mark.parametrize(("spreads", "said"), [((99, 96, 10), True), ((99, 94, 99), False), ((99,), False)])
def test_boosting_that_moved_no_weights_is_said_to_have_done_nothing(spreads: tuple[int, ...], said: bool) -> None:
    rounds = accepted(*[1.0] * len(spreads))
    rounds = [
        dataclasses.replace(each, effective_sample_size=2.0 * spread, num_units=200)
        for each, spread in zip(rounds, spreads, strict=True)
    ]
    sentences = mixture_sentences(mixture(*[1.0] * len(spreads)), rounds)
    assert any("in effect a deep ensemble" in sentence for sentence in sentences) == said


def test_two_arms_without_a_right_answer_are_not_called_alike() -> None:
    text = headline(pool(ensemble=(100, 0), single_expert=(90, 0)))
    assert text.startswith("Neither the ensemble nor the single weak expert answers one of the hard questions right")
    assert "200 questions" in text and "interval" not in text


# Answers token by token


HOSTILE = "</script><img src=x onerror=alert(1)>\u202e&\n\t'\""


def sample(split: str, reason: str) -> dict[str, object]:
    return {
        "kind": "sample", "task": "demo", "seed": 0, "split": split, "reason": reason, "number": 3,
        "prompt": f"Reverse {HOSTILE}", "answer": HOSTILE, "right": reason == "right", "by_likelihood": False,
        "num_tokens": 2, "tokens": [" a", HOSTILE], "weights": [0.75, 0.25],
        "experts": [[["x", 0.5, 0.125], ["y", 1.0, 1.0]], [[" a", 0.9, 0.9], [HOSTILE, 0.6, 0.6]]],
        "mixture": [[" a", 0.4, 0.4], ["y", 0.9, 0.05]],
    }  # fmt: skip


def test_samples_show_every_choice_and_nothing_of_them_is_markup(tmp_path: Path) -> None:
    records = [*make_records(), sample("id", "right"), sample("ood", "wrong"), sample("ood", "disagree")]
    text = page_of([make_run(tmp_path / "demo", records)], tmp_path)
    page = Page(text)
    assert page.open == []
    assert "<img src=x" not in text
    assert text.count("</script>") == text.count("<script")
    for shown in ("75%", "25%", "␣a"):
        assert shown in page.text


def test_headings_descend_one_by_one_and_figures_and_tables_have_titles(tmp_path: Path) -> None:
    records = [*make_records(), sample("ood", "wrong")]
    for folders in ([make_run(tmp_path / "one", records)], [tmp_path / "one", make_run(tmp_path / "two", records)]):
        text = page_of(folders, tmp_path)
        levels = [int(level) for level in re.findall(r"<h([1-6])", text)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        assert len(re.findall(r"<table", text)) == len(re.findall(r"<caption|<table[^>]*aria-label", text))
        ids = Page(text).ids
        assert len(ids) == len(set(ids))
        assert text == page_of(folders, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"reason": "nice"}, {"tokens": []}, {"tokens": ["a"] * 41}, {"weights": [0.0, 0.0]}, {"weights": [1.0]},
        {"mixture": [["a", 0.5, 0.5]]}, {"mixture": [["a", 1.5, 0.5]] * 2}, {"prompt": "x" * 2001},
    ],
)  # fmt: skip
def test_a_damaged_sample_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="sample"):
        parse_records([sample("id", "right") | changes])
