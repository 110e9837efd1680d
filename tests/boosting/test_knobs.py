"""The settings of `BoostingConfig` beyond the paper's: what each changes, recomputed from the saved experts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from safetensors.torch import load_file
from scipy.optimize import minimize
from transformers import AutoModelForCausalLM

from ensemw2s import BoostingConfig, TokenEnsemble
from ensemw2s.data.tokens import QuestionFormat, tokenize_questions
from ensemw2s.runtime.files import read_array, read_json
from tests.boosting.test_trainer import kept
from tests.boosting_runs import BASE_TRAIN, TRAIN, VALIDATION, Trainings, base, boost
from tests.tiny import END, FORMAT, LETTERS, llama, lora, questions, random_word, tokenizer

# The same by plain transformers, in float64


def rows_of(dataset: Dataset = TRAIN, question_format: QuestionFormat = FORMAT) -> list[tuple[list[int], int]]:
    examples = tokenize_questions(dataset, tokenizer(), question_format)
    return [(row["input_ids"], row["prompt_length"]) for row in examples]


def saved(folder: Path) -> Any:
    """The expert in a folder, in float64."""
    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(copy.deepcopy(base()), str(folder)).double().eval()
    return AutoModelForCausalLM.from_pretrained(folder).double().eval()


def untrained() -> Any:
    return copy.deepcopy(base()).double()


@torch.no_grad()
def answer_log_probs(model: Any, rows: Sequence[tuple[list[int], int]]) -> list[np.ndarray]:
    """Of each answer, log p [its tokens, V]."""
    found = []
    for ids, prompt_length in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0, prompt_length - 1 : -1]
        found.append(logits.double().log_softmax(-1).numpy())
    return found


def gold(model: Any, rows: Sequence[tuple[list[int], int]]) -> np.ndarray:
    """log p of every answer token."""
    pairs = zip(answer_log_probs(model, rows), rows, strict=True)
    return np.concatenate([log_p[np.arange(len(log_p)), ids[start:]] for log_p, (ids, start) in pairs])


def wrong(model: Any, rows: Sequence[tuple[list[int], int]]) -> np.ndarray:
    pairs = zip(answer_log_probs(model, rows), rows, strict=True)
    return np.concatenate([log_p.argmax(-1) != np.array(ids[start:]) for log_p, (ids, start) in pairs])


def soft(model: Any, rows: Sequence[tuple[list[int], int]]) -> np.ndarray:
    return 1.0 - np.exp(gold(model, rows))


def alpha(error: float, prior_error: float) -> float:
    return np.log((1 - error) / error) + np.log(prior_error / (1 - prior_error))


def updated(weights: np.ndarray, losses: np.ndarray, exponent: float) -> np.ndarray:
    following = weights * np.exp(exponent * losses)
    return following / following.sum()


def expert(folder: Path, number: int, attempt: int = 1) -> Path:
    return folder / f"rounds/{number}/attempt-{attempt}/expert"


def weights_of(folder: Path, number: int) -> np.ndarray:
    return read_array(folder / f"rounds/{number}/weights.npy")


# Recipes and sampling


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("paper", ("draw", "hard", 0.0, False, "alpha")),
        ("tempered", ("reweight", "soft", 0.7, False, "alpha")),
        ("chained", ("reweight", "soft", 0.7, True, "validation")),
        ("branched", ("reweight", "soft", 0.7, True, "uniform")),
        ("bagging", ("bagging", "hard", 0.0, False, "alpha")),
        ("deep_ensemble", ("all", "hard", 0.0, False, "alpha")),
    ],
)
def test_a_recipe_fills_in_what_is_not_given(recipe: str, expected: tuple[Any, ...], tmp_path: Path) -> None:
    config = BoostingConfig(output_dir=str(tmp_path), recipe=recipe)
    names = ("sampling", "errors", "effective_sample_size_floor", "warm_start", "mixture_weights")
    assert tuple(getattr(config, name) for name in names) == expected
    assert (config.shrinkage, config.uniform_mix) == (1.0, 0.0)
    assert BoostingConfig(output_dir=str(tmp_path)).recipe == "tempered"
    assert BoostingConfig(output_dir=str(tmp_path), recipe=recipe, errors="soft").errors == "soft"
    assert not BoostingConfig(output_dir=str(tmp_path), recipe=recipe, warm_start=False).warm_start


def test_a_deep_ensemble_trains_on_every_token_with_equal_votes(tmp_path: Path, trainings: Trainings) -> None:
    runner = boost(tmp_path, recipe="deep_ensemble")
    ensemble = runner.train()
    assert ensemble.config.expert_weights == [1.0, 1.0]
    for training in trainings:
        assert all((weights == 1.0).all() for weights in training["weights"])
    assert len({training["seed"] for training in trainings}) == 2
    assert np.ptp(weights_of(tmp_path, 3)) == 0.0
    assert [record["prior_error"] for record in runner.records] == [None, None]


def test_a_draw_without_replacement_takes_its_share_of_the_tokens_once(tmp_path: Path, trainings: Trainings) -> None:
    runner = boost(tmp_path, sampling="without_replacement", draw_fraction=0.25)
    runner.train()
    starts = {tuple(ids): start for ids, start in rows_of()}
    drawn = []
    for training in trainings:
        weights = np.concatenate(training["weights"])
        assert set(weights) == {0.0, 1.0}
        assert weights.sum() == round(0.25 * runner.num_units)
        # A sentence of which no token was drawn is left out.
        assert all(each.any() for each in training["weights"])
        assert all(
            len(w) == len(ids) - starts[ids] for ids, w in zip(training["rows"], training["weights"], strict=True)
        )
        drawn.append([(ids, *w) for ids, w in zip(training["rows"], training["weights"], strict=True)])
    assert drawn[0] != drawn[1]


# Updates


@pytest.mark.parametrize("errors", ["soft", "hard"])
def test_an_update_keeps_the_effective_sample_size_at_the_floor_and_says_how_far_it_went(
    errors: str, tmp_path: Path
) -> None:
    runner = boost(tmp_path, errors=errors, effective_sample_size_floor=0.995, num_rounds=3)
    runner.train()
    records = [record for record in runner.records if record["accepted"]]
    assert any(0 < record["shrinkage"] < 1 for record in records)
    for record in records:
        before, after = (weights_of(tmp_path, record["round"] + more) for more in (0, 1))
        attempt = tmp_path / f"rounds/{record['round']}/attempt-{record['attempt']}"
        losses = read_array(attempt / "losses.npy").astype(float)
        # At the floor, an update that leads further away from it is not made.
        expected = updated(before, losses, record["shrinkage"] * record["expert_weight"])
        np.testing.assert_allclose(after, expected, rtol=1e-9)
        share = 1 / np.sum(after**2) / len(after)
        assert share == pytest.approx(record["effective_sample_size"] / record["num_units"])
        assert share >= 0.995
        # As far as it goes: the floor is reached, or the update was taken whole.
        assert record["shrinkage"] == 1.0 or share == pytest.approx(0.995, abs=1e-4)


def test_without_a_floor_the_update_is_the_paper_s(tmp_path: Path) -> None:
    runner = boost(tmp_path, recipe="paper", sampling="reweight", num_rounds=1)
    runner.train()
    assert runner.records[0]["shrinkage"] == 1.0


# Errors


@pytest.mark.parametrize("combine", ["prob", "vote"])
def test_soft_errors_and_the_weights_that_follow_can_be_recomputed(tmp_path: Path, combine: str) -> None:
    runner = boost(tmp_path, errors="soft", shrinkage=0.6, combine=combine)
    runner.train()
    rows = rows_of()
    prior_error = soft(untrained(), rows).mean()
    weights = np.full(runner.num_units, 1 / runner.num_units)
    for record in runner.records:
        number = record["round"]
        losses = soft(saved(expert(tmp_path, number)), rows)
        error = float(weights @ losses)
        assert record["error"] == pytest.approx(error, abs=1e-5)
        # A hard error would be another number.
        assert abs(error - weights @ wrong(saved(expert(tmp_path, number)), rows)) > 1e-2
        assert record["prior_error"] == pytest.approx(prior_error, abs=1e-5)
        assert record["expert_weight"] == pytest.approx(alpha(error, prior_error), abs=1e-3)
        weights = updated(weights, losses, 0.6 * record["expert_weight"])
        np.testing.assert_allclose(weights_of(tmp_path, number + 1), weights, rtol=1e-4)
    assert [record["accepted"] for record in runner.records] == [True, True]


def test_the_prior_can_be_measured_under_the_current_weights(tmp_path: Path) -> None:
    rows = rows_of()
    before = soft(untrained(), rows)
    for prior_weights, measured_under in (("initial", [1, 1]), ("current", [1, 2])):
        folder = tmp_path / prior_weights
        runner = boost(folder, prior_weights=prior_weights, shrinkage=1.0)
        runner.train()
        for record, number in zip(runner.records, measured_under, strict=True):
            prior_error = float(weights_of(folder, number) @ before)
            assert record["prior_error"] == pytest.approx(prior_error, abs=1e-5)
            assert record["expert_weight"] == pytest.approx(alpha(record["error"], record["prior_error"]), abs=1e-9)
    assert abs(weights_of(tmp_path / "current", 2) @ before - before.mean()) > 1e-3


LETTERS_ONLY = QuestionFormat(prompt_template="{prompt}:", answer_prefix="", end_token=False)


def unrelated(count: int) -> Dataset:
    """Questions whose answers cannot be known: two letters that have nothing to do with the prompt."""
    generator = torch.Generator().manual_seed(3)
    words = [random_word(generator, 6) for _ in range(count)]
    return Dataset.from_list([{"id": w, "prompt": w[:4], "answer": w[4:]} for w in words])


def test_out_of_fold_errors_are_those_of_models_that_did_not_see_the_answer(
    tmp_path: Path, trainings: Trainings
) -> None:
    epochs, folds, questions_ = 25, 3, unrelated(14)
    runner = boost(
        tmp_path, given={"train_dataset": questions_, "question_format": LETTERS_ONLY, "peft_config": None},
        errors="hard", error_folds=folds, num_rounds=1, prior=0.999, learning_rate=1e-2, num_train_epochs=epochs,
        per_device_train_batch_size=5,
    )  # fmt: skip
    runner.train()
    rows = rows_of(questions_, LETTERS_ONLY)
    attempt = tmp_path / "rounds/1/attempt-1"
    assert len(trainings) == 1 + folds
    assert len(trainings[0]["rows"]) == len(rows)
    in_sample = wrong(saved(attempt / "expert"), rows).mean()
    assert in_sample < 0.1
    expected = np.full(2 * len(rows), -1)
    for fold in range(1, folds + 1):
        seen = set(trainings[fold]["rows"])
        mistakes = wrong(saved(attempt / f"fold-{fold}"), rows).reshape(len(rows), 2)
        unseen = np.array([tuple(ids) not in seen for ids, _ in rows])
        assert len(rows) // folds <= unseen.sum() <= len(rows) // folds + 1
        assert mistakes[~unseen].mean() < 0.1
        expected.reshape(len(rows), 2)[unseen] = mistakes[unseen]
    # Every answer is in exactly one fold.
    assert (expected >= 0).all()
    np.testing.assert_array_equal(read_array(attempt / "losses.npy"), expected == 1)
    assert expected.mean() > 0.85
    record, limit = runner.records[0], 1 - 0.5 / expected.size
    assert record["error"] == pytest.approx(min(expected.mean(), limit), abs=1e-12)
    # The expert sees every row, and so do all fold models but one.
    assert record["train_tokens"] == epochs * folds * sum(len(ids) for ids, _ in rows)
    seconds = [read_json(attempt / name / "cost.json")["seconds"] for name in ("expert", "fold-1", "fold-2", "fold-3")]
    assert record["train_seconds"] == pytest.approx(sum(seconds))


def test_out_of_fold_errors_may_be_soft(tmp_path: Path, trainings: Trainings) -> None:
    runner = boost(tmp_path, errors="soft", error_folds=2, num_rounds=1, prior=0.999)
    runner.train()
    rows, attempt = rows_of(), tmp_path / "rounds/1/attempt-1"
    lengths = [len(ids) - start for ids, start in rows]
    expected = np.empty(sum(lengths))
    for fold in (1, 2):
        seen = set(trainings[fold]["rows"])
        unseen = np.repeat([tuple(ids) not in seen for ids, _ in rows], lengths)
        expected[unseen] = soft(saved(attempt / f"fold-{fold}"), rows)[unseen]
    np.testing.assert_allclose(read_array(attempt / "losses.npy"), expected, atol=1e-5)
    assert runner.records[0]["error"] == pytest.approx(expected.mean(), abs=1e-5)


def test_more_folds_than_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"error_folds=13 leaves folds without an answer: train_dataset has 12 quest"):
        boost(tmp_path, error_folds=13)


# Weights


def test_the_cap_holds_in_every_round(tmp_path: Path) -> None:
    settings = {"num_rounds": 3, "recipe": "paper", "sampling": "reweight", "uniform_mix": 0.3, "prior": 0.9}
    boost(tmp_path / "free", **settings).train()
    boost(tmp_path / "capped", **settings, weight_cap=1.5).train()
    for number in (2, 3, 4):
        weights = weights_of(tmp_path / "capped", number)
        assert weights.sum() == pytest.approx(1.0, abs=1e-12)
        assert weights.max() * weights.size <= 1.5 * (1 + 1e-9)
        # It binds.
        assert weights.max() * weights.size == pytest.approx(1.5, rel=1e-9)
    assert weights_of(tmp_path / "free", 2).max() * weights.size > 1.6


def test_boosting_stops_where_too_few_units_count(tmp_path: Path, trainings: Trainings) -> None:
    settings = {"recipe": "paper", "sampling": "reweight", "num_rounds": 2, "uniform_mix": 0.5, "prior": 0.9}
    free = boost(tmp_path / "free", **settings)
    assert free.train().num_experts == 2
    assert free.stop_reason is None
    share = free.records[0]["effective_sample_size"] / free.num_units
    before = len(trainings)
    runner = boost(tmp_path / "stopped", **settings, min_effective_sample_size=share + 0.01)
    ensemble = runner.train()
    assert len(trainings) == before + 1
    assert ensemble.config.expert_weights == [free.records[0]["expert_weight"]]
    assert runner.stop_reason == (
        f"round 1 stopped boosting: it left an effective sample size of {share:.1%} of the units, below "
        "min_effective_sample_size"
    )
    again = boost(tmp_path / "stopped", **settings, min_effective_sample_size=share + 0.01)
    assert again.train().config.expert_weights == ensemble.config.expert_weights
    assert len(trainings) == before + 1
    assert again.stop_reason == runner.stop_reason
    # At the threshold itself it goes on.
    going_on = boost(tmp_path / "on", **settings, min_effective_sample_size=share - 0.01)
    assert going_on.train().num_experts == 2


@pytest.mark.parametrize(("unit", "window"), [("token", None), ("window", 2), ("sequence", None)])
def test_end_tokens_and_white_space_are_trained_on_and_not_boosted(
    tmp_path: Path, trainings: Trainings, unit: Any, window: int | None
) -> None:
    runner = boost(
        tmp_path, boosted_tokens="informative", errors="hard", unit=unit,
        window=window, uniform_mix=0.5, num_train_epochs=4,
    )  # fmt: skip
    runner.train()
    rows = rows_of()
    space = LETTERS.index(" ") + 2
    counted, numbers, units = [], [], 0
    for ids, start in rows:
        answer = ids[start:]
        informative = np.array([token not in (END, space) for token in answer])
        place = np.arange(informative.sum()) // {"token": 1, "window": 2, "sequence": 99}[unit]
        counted.append(informative)
        numbers.append(units + place)
        units += int(place[-1]) + 1
    mask, unit_of = np.concatenate(counted), np.concatenate(numbers)
    assert not mask.all()
    assert runner.num_units == units
    np.testing.assert_array_equal(read_array(tmp_path / "units.npy"), unit_of)
    before = np.array([wrong(untrained(), rows)[mask][unit_of == u].any() for u in range(units)])
    margin = 0.5 / units
    assert runner.records[0]["prior_error"] == pytest.approx(np.clip(before.mean(), margin, 1 - margin), abs=1e-12)
    for training, record in zip(trainings, runner.records, strict=True):
        number = record["round"]
        losses = wrong(saved(expert(tmp_path, number, record["attempt"])), rows)[mask]
        of_units = np.array([losses[unit_of == u].any() for u in range(units)])
        error = np.clip(weights_of(tmp_path, number) @ of_units, margin, 1 - margin)
        assert record["error"] == pytest.approx(error, abs=1e-12)
        in_loss = np.concatenate(training["weights"])
        assert (in_loss[~mask] == 1.0).all()
        np.testing.assert_allclose(in_loss[mask], 0.5 + 0.5 * units * weights_of(tmp_path, number)[unit_of], rtol=1e-6)
    assert np.ptp(weights_of(tmp_path, 2)) > 0


# Where an expert starts


@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "whole-models"])
def test_a_warm_start_goes_on_from_the_expert_before(tmp_path: Path, trainings: Trainings, adapters: bool) -> None:
    given = {"peft_config": lora() if adapters else None}
    ensemble = boost(tmp_path, given=given, warm_start=True, error_folds=2, prior=0.9999).train()
    assert ensemble.num_experts == 2
    assert len(trainings) == 6
    first, second = trainings[:3], trainings[3:]
    assert not any(training["is_adapter"] for training in first)
    for name, training in zip(("expert", "fold-1", "fold-2"), second, strict=True):
        # Each model that judges out of fold goes on from its own: another fold's has seen the answers.
        folder = expert(tmp_path, 1).with_name(name)
        before = load_file(folder / ("adapter_model.safetensors" if adapters else "model.safetensors"))
        assert training["new_adapter"] is None
        assert training["start"].keys() == before.keys()
        assert all(torch.equal(training["start"][key], value) for key, value in before.items())
    for one, two in zip(first, second, strict=True):
        assert one["rows"] == two["rows"]


def test_a_warm_started_run_resumes_to_the_same_bits(tmp_path: Path, trainings: Trainings) -> None:
    boost(tmp_path / "whole", warm_start=True).train()
    trainings.die_at = len(trainings) + 2
    with pytest.raises(KeyboardInterrupt):
        boost(tmp_path / "killed", warm_start=True).train()
    trainings.die_at = 0
    boost(tmp_path / "killed", warm_start=True).train()
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole")


@pytest.mark.parametrize("gain", [0.001, 0.2, 0.9])
def test_a_chain_goes_on_while_it_gains_and_the_ensemble_has_the_ends(
    tmp_path: Path, trainings: Trainings, gain: float
) -> None:
    given = {"eval_dataset": VALIDATION, "peft_config": None}
    settings: dict[str, Any] = {"recipe": "branched", "chain_gain": gain, "num_rounds": 5, "learning_rate": 4e-3}
    runner = boost(tmp_path, given=given, **settings, prior=0.9999, validate_rounds=True)
    ensemble = runner.train()
    rows = rows_of(VALIDATION)
    losses = [-float(gold(saved(expert(tmp_path, number)), rows).mean()) for number in range(1, 6)]
    # By hand: of which chain each expert is, and which of them are ends.
    chains = [1]
    for number in range(1, 5):
        alone = number == 1 or chains[number - 1] != chains[number - 2]
        goes_on = alone or losses[number - 1] < (1 - gain) * losses[number - 2]
        chains.append(chains[-1] + (not goes_on))
    assert [record["chain"] for record in runner.records] == chains
    ends = [number for number in range(1, 6) if number == 5 or chains[number] != chains[number - 1]]
    assert runner.expert_folders() == [expert(tmp_path, number) for number in ends]
    assert ensemble.config.expert_weights == [1.0] * len(ends)
    own = base().state_dict()
    for number, training in enumerate(trainings, start=1):
        begins = number == 1 or chains[number - 1] != chains[number - 2]
        before = own if begins else load_file(expert(tmp_path, number - 1) / "model.safetensors")
        assert all(
            torch.equal(training["start"][key], value) for key, value in before.items() if key in training["start"]
        )
    # What is validated after a round is the ensemble that it would leave.
    last = runner.records[-1]["validation"]["token_error"]
    likely = np.mean(
        [np.concatenate([np.exp(x) for x in answer_log_probs(saved(expert(tmp_path, n)), rows)]) for n in ends], 0
    )
    truth = np.concatenate([np.array(ids[start:]) for ids, start in rows])
    assert last == pytest.approx((likely.argmax(-1) != truth).mean())
    if gain == 0.9:
        assert chains == [1, 1, 2, 2, 3]


def test_a_branched_run_resumes_to_the_same_bits(tmp_path: Path, trainings: Trainings) -> None:
    settings: dict[str, Any] = {
        "given": {"eval_dataset": VALIDATION},
        "recipe": "branched", "chain_gain": 0.9, "num_rounds": 4, "prior": 0.9999,
    }  # fmt: skip
    whole = boost(tmp_path / "whole", **settings)
    weights = whole.train().config.expert_weights
    trainings.die_at = len(trainings) + 3
    with pytest.raises(KeyboardInterrupt):
        boost(tmp_path / "killed", **settings).train()
    trainings.die_at = 0
    assert boost(tmp_path / "killed", **settings).train().config.expert_weights == weights == [1.0, 1.0]
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole")


def test_without_a_warm_start_every_expert_starts_from_the_pretrained_model(
    tmp_path: Path, trainings: Trainings
) -> None:
    boost(tmp_path, given={"peft_config": None}).train()
    own = base().state_dict()
    for training in trainings:
        assert all(torch.equal(training["start"][key], value) for key, value in own.items())


@pytest.mark.parametrize("vary_seed", [True, False])
def test_one_seed_for_all_rounds_gives_equal_experts_of_equal_weights(tmp_path: Path, vary_seed: bool) -> None:
    boost(tmp_path, recipe="deep_ensemble", vary_seed=vary_seed).train()
    one, two = (load_file(expert(tmp_path, number) / "adapter_model.safetensors") for number in (1, 2))
    assert all(torch.equal(one[key], two[key]) for key in one) is not vary_seed


def test_adapters_of_several_ranks_make_one_ensemble(tmp_path: Path) -> None:
    ensemble = boost(tmp_path / "run", lora_ranks=[2, 6]).train()
    own = lora()
    for number, rank in ((1, 2), (2, 6)):
        config = read_json(expert(tmp_path / "run", number) / "adapter_config.json")
        assert config["r"] == rank
        assert config["lora_alpha"] / rank == own.lora_alpha / own.r
        tensors = load_file(expert(tmp_path / "run", number) / "adapter_model.safetensors")
        assert {value.shape[0] for key, value in tensors.items() if "lora_A" in key} == {rank}
    ensemble.save_pretrained(tmp_path / "saved")
    loaded = TokenEnsemble.from_pretrained(tmp_path / "saved")
    weights = np.array(ensemble.config.expert_weights)
    ids, start = rows_of()[0]
    experts = [answer_log_probs(saved(expert(tmp_path / "run", n)), [(ids, start)])[0] for n in (1, 2)]
    expected = np.logaddexp.reduce([lp + np.log(w) for lp, w in zip(experts, weights / weights.sum(), strict=True)])
    for found in (ensemble, loaded):
        log_p = answer_log_probs(found, [(ids, start)])[0]
        np.testing.assert_allclose(log_p, expected, atol=1e-4)


# The mixture


def test_uniform_expert_weights_are_those_of_ensemble_and_validation(tmp_path: Path) -> None:
    runner = boost(
        tmp_path, given={"eval_dataset": VALIDATION}, mixture_weights="uniform", validate_rounds=True, num_rounds=3
    )  # fmt: skip
    ensemble = runner.train()
    assert ensemble.config.expert_weights == [1.0, 1.0, 1.0]
    alphas = [record["expert_weight"] for record in runner.records]
    assert np.ptp(alphas) > 0.1
    rows = rows_of(VALIDATION)
    experts = [answer_log_probs(saved(expert(tmp_path, number)), rows) for number in (1, 2, 3)]
    for count, record in enumerate(runner.records, start=1):
        mistakes = [
            np.mean([np.exp(log_p[row]) for log_p in experts[:count]], axis=0).argmax(-1) != np.array(ids[start:])
            for row, (ids, start) in enumerate(rows)
        ]
        assert record["validation"]["token_error"] == pytest.approx(np.concatenate(mistakes).mean())


def test_rounds_are_validated_only_if_asked_for(tmp_path: Path) -> None:
    runner = boost(tmp_path, given={"eval_dataset": VALIDATION}, validate_rounds=False, num_rounds=1)
    runner.train()
    assert runner.records[0]["validation"] is None


def validation_gold(folder: Path, count: int) -> np.ndarray:
    """log p [count, n] of the validation tokens under each expert."""
    rows = rows_of(VALIDATION)
    return np.stack([gold(saved(expert(folder, number)), rows) for number in range(1, count + 1)])


def test_fitted_expert_weights_are_the_likeliest_on_validation_answers(tmp_path: Path) -> None:
    runner = boost(tmp_path, given={"eval_dataset": VALIDATION}, mixture_weights="validation", num_rounds=3)
    found = np.array(runner.train().config.expert_weights)
    table = np.exp(validation_gold(tmp_path, 3))

    def loss(weights: np.ndarray) -> float:
        return -float(np.log(weights @ table).mean())

    best = minimize(
        loss, np.full(3, 1 / 3), method="SLSQP", bounds=[(0, 1)] * 3, options={"ftol": 1e-14, "maxiter": 1000},
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )  # fmt: skip
    assert best.success
    assert found.sum() == pytest.approx(1.0, abs=1e-9)
    assert loss(found) <= best.fun + 1e-6
    np.testing.assert_allclose(found, best.x, atol=5e-3)
    # Neither the paper's weights nor equal ones.
    alphas = np.array([record["expert_weight"] for record in runner.records])
    assert min(loss(alphas / alphas.sum()), loss(np.full(3, 1 / 3))) > best.fun + 1e-4
    assert read_json(tmp_path / "mixture-of-3.json")["expert_weights"] == found.tolist()


def test_the_number_of_experts_is_the_likeliest_on_validation_answers(tmp_path: Path) -> None:
    # What the second expert knows from before, the first and the third do not.
    validation = BASE_TRAIN.select(range(8))
    given = {"model": [llama(5), base(), llama(6)], "peft_config": None, "eval_dataset": validation}
    runner = boost(tmp_path, given=given, choose_num_experts=True, num_rounds=3, learning_rate=2e-3, prior=0.999)
    ensemble = runner.train()
    alphas, rows = np.array([record["expert_weight"] for record in runner.records]), rows_of(validation)
    assert (alphas > 0).all()
    table = np.exp([gold(saved(expert(tmp_path, number)), rows) for number in (1, 2, 3)])
    expected = [float(np.log(alphas[:t] @ table[:t] / alphas[:t].sum()).mean()) for t in (1, 2, 3)]
    mixture = runner.mixture()
    np.testing.assert_allclose(mixture["log_likelihoods"], expected, atol=1e-4)
    best = int(np.argmax(expected)) + 1
    # Neither one nor all of them, so that a rule of thumb would be found out.
    assert 1 < best < 3
    assert mixture["num_experts"] == ensemble.num_experts == len(runner.expert_folders()) == best
    assert ensemble.config.expert_weights == alphas[:best].tolist()


@pytest.mark.parametrize("settings", [{"mixture_weights": "validation"}, {"choose_num_experts": True}])
def test_a_run_whose_mixture_is_chosen_resumes_to_the_same_bits(
    tmp_path: Path, trainings: Trainings, settings: dict[str, Any]
) -> None:
    settings = settings | {"given": {"eval_dataset": VALIDATION}}
    whole = boost(tmp_path / "whole", **settings)
    expert_weights = whole.train().config.expert_weights
    trainings.die_at = len(trainings) + 2
    with pytest.raises(KeyboardInterrupt):
        boost(tmp_path / "killed", **settings).train()
    trainings.die_at = 0
    again = boost(tmp_path / "killed", **settings)
    assert again.train().config.expert_weights == expert_weights
    assert again.mixture() == whole.mixture()
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole")
    assert "mixture-of-2.json" in kept(tmp_path / "whole")


def test_validation_questions_that_decide_belong_to_the_run(tmp_path: Path) -> None:
    others = {"eval_dataset": questions(8, seed=10, start=200)}
    boost(tmp_path / "a", given={"eval_dataset": VALIDATION}, choose_num_experts=True).train()
    with pytest.raises(ValueError, match=r"another configuration; differing: eval_dataset\."):
        boost(tmp_path / "a", given=others, choose_num_experts=True).train()
    # Where they only measure, others may come later.
    boost(tmp_path / "b", given={"eval_dataset": VALIDATION}, num_rounds=1).train()
    assert boost(tmp_path / "b", given=others).train().num_experts == 2


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"recipe": "stable"},
            "recipe must be one of paper, tempered, chained, branched, co_boosted, .*deep_ensemble, got 'stable'",
        ),
        ({"errors": "harsh"}, "errors must be one of hard, soft, got 'harsh'"),
        ({"prior_weights": "last"}, "prior_weights must be one of initial, current, got 'last'"),
        ({"boosted_tokens": "some"}, "boosted_tokens must be one of all, informative, got 'some'"),
        ({"mixture_weights": "beta"}, "mixture_weights must be one of alpha, uniform, validation, got 'beta'"),
        ({"combine": "sum"}, "combine must be one of prob, logprob, vote, got 'sum'"),
        (
            {"mixture_weights": "validation", "choose_num_experts": True},
            r'choose_num_experts has no use with mixture_weights="validation" .*: leave it out, or set mixture_weights',
        ),
        (
            {"mixture_weights": "validation", "combine": "logprob"},
            r'mixture_weights="validation" \(which .*\) fits a mixture of probabilities, .* is \'logprob\': set',
        ),
        (
            {"choose_num_experts": True, "combine": "vote"},
            'choose_num_experts compares likelihoods, which combine="vote" does not give',
        ),
        (
            {"min_effective_sample_size": 1.0},
            r"min_effective_sample_size must be in \[0, 1\), got 1\.0",
        ),
        ({"min_effective_sample_size": -0.1}, r"min_effective_sample_size must be in \[0, 1\), got -0\.1"),
        ({"error_folds": 1}, "error_folds must be at least 2, got 1"),
        ({"num_rounds": 0}, "num_rounds must be from 1 to 10000, got 0"),
        ({"lora_ranks": [4]}, r"lora_ranks must list a rank of at least 1 for each of 2 rounds, got \[4\]"),
        ({"lora_ranks": [4, 0]}, r"lora_ranks must list a rank of at least 1 for each of 2 rounds, got \[4, 0\]"),
        (
            {"lora_ranks": [4, 8], "warm_start": True},
            "lora_ranks gives every round a new adapter, and warm_start .* goes on with the one before: leave it out",
        ),
        ({"weight_cap": 0.5}, r"weight_cap must be at least 1, got 0\.5"),
        (
            {"sampling": "without_replacement", "draw_fraction": 0.0},
            r"draw_fraction must be in \(0, 1\], got 0\.0",
        ),
        ({"sampling": "without_replacement", "draw_fraction": 1.1}, r"draw_fraction must be in \(0, 1\], got 1\.1"),
        ({"deduplicate": True, "sampling": "reweight"}, "deduplicate only applies to draws"),
        ({"sampling": "half"}, "sampling must be one of draw, without_replacement, reweight, bagging, all, got 'half'"),
        ({"shrinkage": 1.1}, r"shrinkage must be in \(0, 1\], got 1\.1"),
        ({"uniform_mix": -0.1}, r"uniform_mix must be in \[0, 1\), got -0\.1"),
        ({"unit": "word"}, "unit must be one of token, window, sequence, got 'word'"),
        ({"window": 2}, 'window=2 only applies to unit="window"'),
        ({"prior": "none"}, r"prior must be 'pretrained' \| 'uniform' \| float, got 'none'"),
        ({"prior": "uniform", "num_classes": 1}, 'num_classes must be at least 2, got 1'),
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_before_anything_is_trained(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        BoostingConfig(output_dir=str(tmp_path), **({"num_rounds": 2} | settings))


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"mixture_weights": "validation"}, {}, 'mixture_weights="validation" needs validation questions: pass eval_d'),
        ({"choose_num_experts": True}, {}, "choose_num_experts needs validation questions: pass eval_dataset"),
        ({"recipe": "branched"}, {}, "chain_gain=0.01 needs validation questions"),
        ({"chain_gain": 0.1}, {"eval_dataset": VALIDATION}, "chain_gain=0.1 does nothing without warm_start=True"),
        (
            {"recipe": "branched", "chain_gain": 1.0},
            {"eval_dataset": VALIDATION},
            r"chain_gain must be in \(0, 1\), got 1",
        ),
        (
            {"warm_start": True},
            {"model": [llama(0), llama(1)]},
            r"warm_start \(.*\) goes on from the expert before, so it needs one model for all rounds, not a list: pass",
        ),
        (
            {"lora_ranks": [2, 4]},
            {"peft_config": None},
            r"lora_ranks needs a LoRA configuration: pass peft_config=LoraConfig\(\.\.\.\)",
        ),
    ],
)
def test_a_setting_that_does_not_fit_the_rest_is_refused(
    tmp_path: Path, settings: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        boost(tmp_path, given=given, **settings)


def test_questions_that_are_in_tokens_already_are_not_tokenised_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boost(tmp_path / "text").train()
    tokens = tokenize_questions(TRAIN, tokenizer(), FORMAT).select_columns(["input_ids", "prompt_length"])
    monkeypatch.setattr("ensemw2s.boosting.trainer.tokenize_questions", None)
    both = concatenate_datasets([TRAIN, tokens], axis=1)
    boost(tmp_path / "tokens", given={"train_dataset": both}).train()
    assert kept(tmp_path / "tokens") == kept(tmp_path / "text")
