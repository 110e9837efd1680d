"""Online weights: their arithmetic against float64 references, their regret against its bound, their log."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemw2s.online import OnlineWeights, regret_bound

STREAMS = settings(max_examples=60, deadline=None)


def adversarial(weights: OnlineWeights, generator: np.random.Generator) -> np.ndarray:
    """The worst loss for whoever leads, with a little chance."""
    losses = np.zeros(len(weights))
    losses[int(np.argmax(weights.expert_weights))] = 1.0
    return losses if generator.random() < 0.9 else generator.random(len(weights))


@given(st.integers(1, 6), st.integers(1, 60), st.integers(0, 2**32 - 1))
@STREAMS
def test_bayes_rule_gives_the_mixture_of_whole_answers_and_keeps_its_bound(experts: int, answers: int, seed: int):
    generator = np.random.default_rng(seed)
    start = generator.random(experts) + 0.01
    log_probs = np.log(generator.random((answers, experts)))
    weights = OnlineWeights(start)
    lost = sum(weights.learn_answer(row) for row in log_probs)
    joint = np.log(start / start.sum()) + log_probs.sum(0)
    assert lost == pytest.approx(-np.logaddexp.reduce(joint), abs=1e-9)
    np.testing.assert_allclose(weights.expert_weights, np.exp(joint - np.logaddexp.reduce(joint)), atol=1e-12)
    for expert in range(experts):
        bound = regret_bound(start[expert] / start.sum(), answers)
        assert lost - -log_probs[:, expert].sum() <= bound + 1e-9


@pytest.mark.parametrize("is_adversarial", [False, True])
@given(st.integers(2, 6), st.integers(1, 80), st.floats(0.01, 3), st.integers(0, 2**32 - 1))
@STREAMS
def test_hedge_keeps_its_bound(is_adversarial: bool, experts: int, answers: int, rate: float, seed: int):
    generator = np.random.default_rng(seed)
    weights = OnlineWeights([1.0] * experts, learning_rate=rate)
    lost, of_experts, reference = 0.0, np.zeros(experts), np.ones(experts) / experts
    for _ in range(answers):
        losses = adversarial(weights, generator) if is_adversarial else generator.random(experts)
        step = weights.learn_losses(losses)
        assert step == pytest.approx(reference @ losses, abs=1e-9)
        reference = reference * np.exp(-rate * losses)
        reference /= reference.sum()
        lost, of_experts = lost + step, of_experts + losses
    np.testing.assert_allclose(weights.expert_weights, reference, atol=1e-9)
    assert lost - of_experts.min() <= regret_bound(1 / experts, answers, learning_rate=rate) + 1e-9


@pytest.mark.parametrize("rate", [None, 0.5])
@given(st.integers(2, 5), st.integers(2, 60), st.floats(0.001, 0.3), st.data())
@STREAMS
def test_fixed_share_keeps_its_bound_against_experts_that_change(rate, experts: int, answers: int, share: float, data):
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    switches = data.draw(st.integers(0, min(4, answers - 1)))
    weights = OnlineWeights([1.0] * experts, learning_rate=rate, share=share)
    places = np.sort(generator.choice(np.arange(1, answers), size=switches, replace=False)) if switches else []
    best = int(generator.integers(experts))
    lost = of_sequence = 0.0
    changed = 0
    for number in range(answers):
        if number in places:
            best = (best + int(generator.integers(1, experts))) % experts
            changed += 1
        losses = generator.random(experts)
        losses[best] *= 0.05
        lost += weights.learn_answer(-3 * losses) if rate is None else weights.learn_losses(losses)
        of_sequence += 3 * losses[best] if rate is None else losses[best]
        assert sum(weights.expert_weights) == pytest.approx(1, abs=1e-12)
        assert min(weights.expert_weights) >= share / experts - 1e-12
    options = {"learning_rate": rate, "share": share, "num_experts": experts, "switches": changed}
    assert lost - of_sequence <= regret_bound(1 / experts, answers, **options) + 1e-9


@pytest.mark.parametrize("rate", [None, 0.7])
@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 2**32 - 1))
@STREAMS
def test_experts_that_sleep_keep_their_weight_and_the_bound_holds_while_they_are_awake(
    rate, experts: int, answers: int, seed: int
):
    generator = np.random.default_rng(seed)
    weights = OnlineWeights([1.0] * experts, learning_rate=rate)
    regret, awake_times = np.zeros(experts), np.zeros(experts, dtype=int)
    for _ in range(answers):
        awake = generator.random(experts) < 0.6
        awake[generator.integers(experts)] = True
        before, losses = np.array(weights.expert_weights), generator.random(experts)
        learn = weights.learn_losses if rate else lambda values, **who: weights.learn_answer(-values, **who)
        step = learn(np.where(awake, losses, np.nan), awake=awake)
        np.testing.assert_allclose(np.array(weights.expert_weights)[~awake], before[~awake], atol=1e-12)
        regret += np.where(awake, step - losses, 0.0)
        awake_times += awake
    for expert in range(experts):
        if awake_times[expert]:
            bound = regret_bound(1 / experts, int(awake_times[expert]), learning_rate=rate)
            assert regret[expert] <= bound + 1e-9


def test_verdicts_alone_find_the_expert_that_is_right() -> None:
    generator = np.random.default_rng(7)
    # What three experts answer, with which probability; answer 0 is right.
    answers = np.array([[0.2, 0.8, 0.0], [0.7, 0.1, 0.2], [0.3, 0.3, 0.4]])
    count, rate = 4000, math.sqrt(2 * math.log(3) / (3 * 4000))
    weights = OnlineWeights([1.0] * 3, learning_rate=rate)
    wrong = 0.0
    with np.errstate(divide="ignore"):
        for _ in range(count):
            mixture = np.array(weights.expert_weights) @ answers
            wrong += 1 - mixture[0]
            given_answer = int(generator.choice(3, p=mixture / mixture.sum()))
            weights.learn_verdict(given_answer == 0, np.log(answers[:, given_answer]))
    assert weights.expert_weights[1] > 0.9
    bound = regret_bound(1 / 3, count, learning_rate=rate, num_experts=3, verdicts=True)
    assert 0 < wrong - count * 0.3 <= bound


def test_the_cost_of_a_verdict_is_on_average_the_share_of_wrong_answers() -> None:
    answers = np.array([[0.2, 0.8, 0.0], [0.7, 0.1, 0.2]])
    start = np.array([0.3, 0.7])
    mixture = start @ answers
    costs = np.zeros(2)
    for answer in (1, 2):
        weights = OnlineWeights(start.tolist(), learning_rate=1.0)
        with np.errstate(divide="ignore"):
            weights.learn_verdict(False, np.log(answers[:, answer]))
        moved = np.log(np.array(weights.expert_weights) / start)
        costs += mixture[answer] * answers[:, answer] / mixture[answer]
        assert moved[0] - moved[1] == pytest.approx(-(answers[0] - answers[1])[answer] / mixture[answer])
    np.testing.assert_allclose(costs, [0.8, 0.3])


def test_a_right_answer_moves_nothing() -> None:
    weights = OnlineWeights([1.0, 3.0], learning_rate=0.5)
    weights.learn_verdict(True, [-1.0, -2.0])
    assert weights.expert_weights == pytest.approx([0.25, 0.75])


def test_after_damage_the_share_finds_the_best_within_thirty_answers() -> None:
    generator = np.random.default_rng(0)
    weights = OnlineWeights([1.0] * 3, share=0.01)
    for number in range(330):
        log_probs = -generator.gamma(2.0, 0.5, size=3)
        log_probs[0 if number < 300 else 1] += log_probs[0 if number < 300 else 1] * -0.8
        log_probs[2] -= 1
        if number >= 300:
            log_probs[0] -= 3  # damaged
        weights.learn_answer(log_probs)
    assert sum(abs(np.array(weights.expert_weights) - [0, 1, 0])) / 2 < 0.05


def test_experts_join_and_leave() -> None:
    weights = OnlineWeights([1.0, 3.0])
    weights.join(0.5)
    assert weights.expert_weights == pytest.approx([0.125, 0.375, 0.5])
    weights.leave(1)
    assert weights.expert_weights == pytest.approx([0.2, 0.8])
    with pytest.raises(IndexError, match="there is no expert 2: 2 experts"):
        weights.leave(2)
    weights.leave(0)
    with pytest.raises(ValueError, match="expert 0 has all the weight"):
        weights.leave(0)


def run(weights: OnlineWeights, generator: np.random.Generator, steps: int) -> None:
    for _ in range(steps):
        losses = generator.random(len(weights))
        kind = generator.integers(5)
        if kind == 0:
            losses[0] = np.inf
            weights.learn_answer(-losses)
        elif kind == 1:
            weights.learn_losses(losses)
        elif kind == 2:
            weights.learn_verdict(bool(generator.integers(2)), -losses, awake=[True] * (len(weights) - 1) + [False])
        elif kind == 3:
            weights.join(0.1)
        elif len(weights) > 3:
            weights.leave(int(generator.integers(1, len(weights))))


def test_a_log_is_continued_to_the_same_bits(tmp_path: Path) -> None:
    file = tmp_path / "weights.jsonl"
    settings = {"learning_rate": 0.3, "share": 0.02}
    whole = OnlineWeights([1, 2, 3], **settings)
    run(whole, np.random.default_rng(1), 60)
    generator = np.random.default_rng(1)
    run(OnlineWeights([1, 2, 3], **settings, log_file=file), generator, 25)
    with file.open("a") as torn:
        torn.write('{"step": "ans')
    resumed = OnlineWeights.resume(file)
    run(resumed, generator, 35)
    assert resumed.expert_weights == whole.expert_weights
    assert OnlineWeights.resume(file).expert_weights == whole.expert_weights
    with pytest.raises(FileExistsError, match=r"go on with it by OnlineWeights\.resume"):
        OnlineWeights([1.0], log_file=file)


def test_a_log_that_was_changed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.jsonl"
    run(OnlineWeights([1, 2, 3], learning_rate=0.3, log_file=file), np.random.default_rng(1), 10)
    lines = file.read_text().splitlines()
    row = json.loads(lines[4])
    row["log_weights"][0] -= 1e-9
    file.write_text("\n".join([*lines[:4], json.dumps(row), *lines[5:], ""]))
    with pytest.raises(ValueError, match=r"line 5: these weights do not follow from the lines before"):
        OnlineWeights.resume(file)
    for line in ('{"step": "fly", "log_weights": []}', '{"step": 3}', '{"step": "join", "weight": "1"}', "{}"):
        file.write_text("\n".join([lines[0], line, ""]))
        with pytest.raises(ValueError, match=r"line 2 is damaged"):
            OnlineWeights.resume(file)
    file.write_text("")
    with pytest.raises(ValueError, match="holds no step"):
        OnlineWeights.resume(file)
    with pytest.raises(FileNotFoundError, match=r"begin with OnlineWeights"):
        OnlineWeights.resume(tmp_path / "other.jsonl")


def test_many_threads_lose_no_answer(tmp_path: Path) -> None:
    weights = OnlineWeights([1.0, 1.0], log_file=tmp_path / "weights.jsonl")

    def learn() -> None:
        for _ in range(50):
            weights.learn_answer([-0.02, -0.01])

    threads = [threading.Thread(target=learn) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    odds = weights.expert_weights[1] / weights.expert_weights[0]
    assert math.log(odds) == pytest.approx(400 * 0.01)
    assert OnlineWeights.resume(tmp_path / "weights.jsonl").expert_weights == weights.expert_weights


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: OnlineWeights([]), ValueError, "expert_weights must be one number for each expert"),
        (lambda: OnlineWeights([0, 0]), ValueError, "not all 0"),
        (lambda: OnlineWeights([1, -1]), ValueError, "at least 0"),
        (lambda: OnlineWeights([1, math.nan]), ValueError, "finite"),
        (lambda: OnlineWeights(["x"]), TypeError, "must be numbers"),
        (lambda: OnlineWeights([1], share=1), ValueError, "share must be at least 0 and below 1"),
        (lambda: OnlineWeights([1], learning_rate=0), ValueError, "learning_rate must be above 0"),
        (lambda: OnlineWeights([1, 1]).learn_losses([0, 1]), ValueError, "need a learning_rate"),
        (lambda: OnlineWeights([1, 1]).learn_answer([-1]), ValueError, "must be 2 numbers"),
        (lambda: OnlineWeights([1, 1]).learn_answer([-1, 0.1]), ValueError, "at most 0"),
        (lambda: OnlineWeights([1, 1]).learn_answer([-1, math.nan]), ValueError, "at most 0"),
        (lambda: OnlineWeights([1, 1]).learn_answer([-math.inf] * 2), ValueError, "gives this answer a probability"),
        (lambda: OnlineWeights([1, 0]).learn_answer([-math.inf, -1]), ValueError, "gives this answer a probability"),
        (lambda: OnlineWeights([1, 1]).learn_answer([-1, -1], awake=[False] * 2), ValueError, "not all false"),
        (lambda: OnlineWeights([1, 1]).learn_answer([-1, -1], awake=[1, 0]), ValueError, "2 times true or false"),
        (lambda: OnlineWeights([1, 1], learning_rate=1).learn_losses([0, 1.1]), ValueError, "between 0 and 1"),
        (lambda: OnlineWeights([1, 1], learning_rate=1).learn_verdict(1, [-1, -1]), TypeError, "True or False"),
        (lambda: OnlineWeights([1, 1]).join(1.0), ValueError, "above 0 and below 1"),
        (lambda: regret_bound(0.5, 10, switches=1), ValueError, "give `share`"),
        (lambda: regret_bound(0.5, 10, verdicts=True), ValueError, "need the learning_rate"),
        (lambda: regret_bound(0, 10), ValueError, "above 0 and at most 1"),
        (lambda: regret_bound(0.5, 0), ValueError, "at least 1"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(act, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()


def test_a_refused_step_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "weights.jsonl"
    weights = OnlineWeights([1, 3], log_file=file)
    for bad in ([-math.inf] * 2, [1, 1], [-1]):
        with pytest.raises(ValueError):
            weights.learn_answer(bad)
    assert weights.expert_weights == pytest.approx([0.25, 0.75])
    assert len(file.read_text().splitlines()) == 1
