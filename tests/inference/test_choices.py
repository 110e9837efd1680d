"""Answering by likelihood, against full forward passes in float64, and boosting on one-token answers against SAMME."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from ensemw2s import BoostingConfig, BoostingTrainer, TokenEnsemble
from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.experiments.config import build_config
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.inference.choices import ChoiceSettings, score_choice_mixtures, score_choices
from ensemw2s.inference.decoding import MixtureDecoder, Sampling
from ensemw2s.models.mixture import OneModel
from ensemw2s.runtime.files import read_array
from ensemw2s.student.answers import usable_answers
from tests.experiments.test_experiment import records_of, settings
from tests.tiny import END, FORMAT, gpt2, llama, lora, random_word, saved_adapters, saved_model, tokenizer

ONE_TOKEN = replace(FORMAT, answer_prefix="", end_token=False)


def several_choices(count: int, seed: int, longest: int = 5) -> Dataset:
    """Random questions with 2 to 4 different choices of 1 to `longest` letters."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        sizes = torch.randint(1, longest + 1, (int(torch.randint(2, 5, (1,), generator=generator)),))
        choices = list(dict.fromkeys(random_word(generator, int(size)) for size in sizes))
        choices += [] if len(choices) > 1 else [choices[0] + "x"]
        prompt = random_word(generator, int(torch.randint(1, 12, (1,), generator=generator))) + str(i)
        rows.append({"id": f"q{i}", "prompt": prompt, "answer": choices[0], "choices": choices})
    return Dataset.from_list(rows)


def letter_questions(count: int, answers: str, seed: int = 0) -> Dataset:
    """Random words; the answer is one letter that depends on the last letter of the word, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        word = random_word(generator, 4)
        answer = answers[(ord(word[-1]) - ord("a")) * len(answers) // 26]
        if torch.rand((), generator=generator) < 0.15:
            answer = answers[int(torch.randint(len(answers), (), generator=generator))]
        rows.append({"id": f"q{i}", "prompt": f"{i}{word}", "answer": answer, "choices": list(answers)})
    return Dataset.from_list(rows)


def slow_token_log_probs(model: Any, prompt: list[int], choice: list[int]) -> torch.Tensor:
    """float64 [len(choice), V]: one choice behind one prompt, no cache, no padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + choice])).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


def slow_scores(models: list[Any], weights: list[float], combine: str, row: dict, form: Any) -> np.ndarray:
    """The definition, one choice at a time."""
    tokens = tokenizer()
    prompt = form.prompt(row["prompt"], tokens).ids
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    scores = []
    for text in row["choices"]:
        choice = form.answer_ids(text, tokens) + ([END] if form.end_token else [])
        each = torch.stack([slow_token_log_probs(model, prompt, choice) for model in models])
        if combine == "prob":
            mixed = (shares[:, None, None] * each.exp()).sum(0).log()
        else:
            mixed = (shares[:, None, None] * each).sum(0).log_softmax(-1)
        scores.append(float(mixed[range(len(choice)), choice].sum()))
    return np.array(scores)


@pytest.mark.parametrize("end_token", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_scores_equal_one_full_forward_pass_per_choice(make: Any, end_token: bool) -> None:
    form = replace(FORMAT, end_token=end_token)
    # Without an end token one choice must not begin with another.
    questions = several_choices(25, seed=1, longest=5 if end_token else 1)
    model = make(3)
    scores = score_choices(model, questions, tokenizer(), ChoiceSettings(form, batch_size=9))
    for row, found in zip(questions, scores.log_probs, strict=True):
        np.testing.assert_allclose(found, slow_scores([model], [1.0], "prob", row, form), rtol=1e-4, atol=1e-4)
    picks = [row["choices"][int(values.argmax())] for row, values in zip(questions, scores.log_probs, strict=True)]
    assert scores.correct.tolist() == [pick == row["answer"] for pick, row in zip(picks, questions, strict=True)]
    assert 0 < scores.correct.mean() < 1


def test_the_length_normalised_score_is_the_mean_over_tokens() -> None:
    questions, model = several_choices(25, seed=2), llama(5)
    total = score_choices(model, questions, tokenizer(), ChoiceSettings(FORMAT))
    mean = score_choices(model, questions, tokenizer(), ChoiceSettings(FORMAT, length_normalised=True))
    for row, a, b in zip(questions, total.log_probs, mean.log_probs, strict=True):
        lengths = [len(text) + 2 for text in row["choices"]]  # the space in front and the end token
        np.testing.assert_allclose(a / lengths, b, rtol=1e-6)
    assert (total.chosen != mean.chosen).any()


@pytest.mark.parametrize("combine", ["prob", "logprob"])
@pytest.mark.parametrize("adapters", [True, False])
def test_an_ensemble_is_scored_by_its_mixture(combine: str, adapters: bool, tmp_path: Path) -> None:
    weights = [0.5, 2.0, 1.0]
    if adapters:
        folders = saved_adapters(tmp_path)
        ensemble = TokenEnsemble.from_adapters(llama(0), folders, weights, combine=combine)
        models: list[Any] = [PeftModel.from_pretrained(llama(0), str(folder)).eval() for folder in folders]
    else:
        models = [llama(1), gpt2(2), llama(3)]
        ensemble = TokenEnsemble.from_models([llama(1), gpt2(2), llama(3)], weights, combine=combine)
    questions = several_choices(12, seed=3)
    mixtures = {"all": weights, "second": [0.0, 1.0, 0.0]}
    scores = score_choice_mixtures(ensemble, questions, tokenizer(), mixtures, ChoiceSettings(FORMAT, batch_size=10))
    for i, row in enumerate(questions):
        expected = slow_scores(models, weights, combine, row, FORMAT)
        np.testing.assert_allclose(scores["all"].log_probs[i], expected, rtol=1e-4, atol=1e-4)
        expected = slow_scores(models[1:2], [1.0], combine, row, FORMAT)
        np.testing.assert_allclose(scores["second"].log_probs[i], expected, rtol=1e-4, atol=1e-4)
    alone = score_choices(ensemble, questions, tokenizer(), ChoiceSettings(FORMAT))
    np.testing.assert_array_equal(alone.chosen, scores["all"].chosen)


def test_with_votes_every_expert_votes_for_its_likeliest_choice() -> None:
    models, weights = [llama(1), llama(2), gpt2(4)], [1.0, 0.7, 0.6]
    ensemble = TokenEnsemble.from_models([llama(1), llama(2), gpt2(4)], weights, combine="vote")
    questions = several_choices(30, seed=4)
    scores = score_choices(ensemble, questions, tokenizer(), ChoiceSettings(FORMAT))
    seen = set()
    for row, found in zip(questions, scores.log_probs, strict=True):
        votes = np.zeros(len(row["choices"]))
        for model, weight in zip(models, weights, strict=True):
            votes[slow_scores([model], [1.0], "prob", row, FORMAT).argmax()] += weight
        np.testing.assert_allclose(np.exp(found), votes / sum(weights), atol=1e-12)
        seen.add(int(np.count_nonzero(votes)))
    assert seen == {1, 2, 3}


def test_batches_do_not_change_scores_and_each_prompt_is_run_once() -> None:
    questions, model = several_choices(17, seed=5), llama(6)
    read = 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal read
        read += int(kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :].sum())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    single = score_choices(model, questions, tokenizer(), ChoiceSettings(FORMAT, batch_size=1))
    handle.remove()
    prompts = sum(len(row["prompt"]) + 1 for row in questions)
    # Padded to the longest choice of its question, a choice is read but for its last token.
    choices = sum(len(row["choices"]) * (max(map(len, row["choices"])) + 1) for row in questions)
    assert read == prompts + choices
    many = score_choices(model, questions, tokenizer(), ChoiceSettings(FORMAT, batch_size=50))
    for a, b in zip(single.log_probs, many.log_probs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_that_gives_nan_is_named_by_question() -> None:
    model = llama(0)
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(
        FloatingPointError, match="the model gave NaN, infinity or no finite logit for the question of id q"
    ):
        score_choices(model, several_choices(3, seed=6), tokenizer(), ChoiceSettings(FORMAT))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_expert_without_numbers_is_named_where_choices_are_scored(of_models: TokenEnsemble, value: float) -> None:
    def damage(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output[..., slice(None) if value == -math.inf else 3] = value
        return output

    of_models.experts.carrier(1).get_output_embeddings().register_forward_hook(damage)  # type: ignore[operator]
    asked = several_choices(3, seed=6)
    with pytest.raises(
        FloatingPointError, match=r"^expert 2 gave NaN, infinity or no finite logit for the question of id q"
    ):
        score_choices(of_models, asked, tokenizer(), ChoiceSettings(FORMAT))
    with pytest.raises(
        FloatingPointError, match=r"^expert 2 gave NaN, infinity or no finite logit for the question of id q"
    ):
        of_models.label(asked, tokenizer(), question_format=FORMAT, description=None)
    # One that is not used does no harm.
    scores = score_choice_mixtures(of_models, asked, tokenizer(), {"others": [1, 0, 1]}, ChoiceSettings(FORMAT))
    assert all(np.isfinite(row).all() for row in scores["others"].log_probs)


# Pseudo-labels


def test_pseudo_labels_are_choices_with_their_share_of_the_probability(tmp_path: Path) -> None:
    weights = [0.5, 2.0, 1.0]
    ensemble = TokenEnsemble.from_adapters(llama(0), saved_adapters(tmp_path), weights)
    questions = several_choices(20, seed=7)
    labels = ensemble.label(questions, tokenizer(), question_format=FORMAT, description=None)
    scores = score_choices(ensemble, questions, tokenizer(), ChoiceSettings(FORMAT))
    each = [
        score_choices(ensemble.reweighted([1.0], [t]), questions, tokenizer(), ChoiceSettings(FORMAT)).chosen
        for t in range(3)
    ]
    for i, (row, label) in enumerate(zip(questions, labels, strict=True)):
        assert (label["id"], label["prompt"], label["choices"]) == (row["id"], row["prompt"], row["choices"])
        assert label["answer"] == row["choices"][scores.chosen[i]]
        share = torch.tensor(scores.log_probs[i]).softmax(-1).max()
        assert math.exp(label["confidence"]) == pytest.approx(float(share), rel=1e-4)
        assert label["expert_agreement"] == [float(chosen[i] == scores.chosen[i]) for chosen in each]
        assert label["agreement"] == pytest.approx(np.mean(label["expert_agreement"]))
        assert label["num_tokens"] == len(label["answer"]) + 2
    assert 0 < np.mean(labels["agreement"]) < 1
    assert len(usable_answers(labels, min_confidence=float(np.median(labels["confidence"])))) == 10


def test_labelling_goes_on_behind_a_killed_run(tmp_path: Path) -> None:
    ensemble = TokenEnsemble.from_models([llama(1), llama(2)], [1.0, 1.0])
    questions, file = several_choices(12, seed=8), tmp_path / "labels.jsonl"
    options: dict[str, Any] = {"question_format": FORMAT, "description": None, "batch_size": 5}
    whole = ensemble.label(questions, tokenizer(), output_file=file, **options)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:7]) + lines[7][:9])
    again = ensemble.label(questions, tokenizer(), output_file=file, **options)
    assert again.to_list() == whole.to_list()
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)


def test_what_cannot_be_labelled_is_refused() -> None:
    ensemble = TokenEnsemble.from_models([llama(1)], [1.0])
    questions = several_choices(3, seed=9)
    with pytest.raises(ValueError, match=r"answered by likelihood, with neither sampling .*leave both out"):
        ensemble.label(questions, tokenizer(), question_format=FORMAT, sampling=Sampling(temperature=1.0))
    with pytest.raises(ValueError, match="end_token=False, so that decoded answers would have no end"):
        ensemble.label(questions.remove_columns("choices"), tokenizer(), question_format=ONE_TOKEN)


# Bad input


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "c", "choices": ["a", "b"]}, r"id x: the answer 'c' is not among the choices \['a', 'b'\]"),
        ({"answer": "a", "choices": ["a"]}, r"id x: choices is \['a'\], expected at least 2"),
        ({"answer": "a", "choices": ["a", "b", "a "]}, r"id x: .*expected different texts, none of them empty"),
        ({"answer": "a", "choices": ["a", " "]}, r"id x: .*none of them empty"),
        ({"answer": "a", "choices": None}, r"id x: choices is None, expected a list of texts. Fill it in every row"),
        ({"answer": "a", "choices": "ab"}, r"id x: choices is 'ab', expected a list of texts"),
        ({"answer": "a", "choices": [1, 2]}, r"id x: choices is \[1, 2\], expected a list of texts"),
    ],
)
def test_choices_that_are_none_are_named_at_the_door(row: dict[str, Any], message: str) -> None:
    rows = Dataset.from_list([{"id": "x", "prompt": "p", **row}])
    with pytest.raises(ValueError, match=message):
        tokenize_questions(rows, tokenizer(), FORMAT)
    with pytest.raises(ValueError, match=message):
        score_choices(llama(), rows, tokenizer(), ChoiceSettings(FORMAT))


def test_a_choice_that_begins_with_another_needs_the_end_token() -> None:
    rows = Dataset.from_list([{"id": "x", "prompt": "p", "answer": "a", "choices": ["ab", "a"]}])
    assert len(score_choices(llama(), rows, tokenizer(), ChoiceSettings(FORMAT)).log_probs[0]) == 2
    with pytest.raises(
        ValueError, match=r"id x: .* the choice 'ab' begins with, or is, the choice 'a'.*end_token: true"
    ):
        score_choices(llama(), rows, tokenizer(), ChoiceSettings(ONE_TOKEN))


def test_missing_columns_and_rows_are_said() -> None:
    rows = several_choices(2, seed=0)
    with pytest.raises(ValueError, match="questions has no column 'choices', which answering by likelihood needs"):
        score_choices(llama(), rows.remove_columns("choices"), tokenizer())
    with pytest.raises(ValueError, match="questions is empty"):
        score_choices(llama(), rows.select([]), tokenizer())
    with pytest.raises(ValueError, match=r"questions, id q0: prompt and answer have \d+ tokens"):
        score_choices(llama(), rows, tokenizer(), ChoiceSettings(replace(FORMAT, max_length=7)))


# Boosting on one-token answers is AdaBoost


@pytest.mark.parametrize(("answers", "prior"), [("yn", 0.5), ("xyz", "uniform")])
def test_boosting_on_one_token_answers_is_samme(answers: str, prior: Any, tmp_path: Path) -> None:
    train, test = letter_questions(60, answers), letter_questions(40, answers, seed=1)
    trainer = BoostingTrainer(
        str(saved_model(tmp_path / "model")),
        args=BoostingConfig(
            output_dir=str(tmp_path / "run"), num_rounds=3, recipe="paper", sampling="reweight", combine="vote",
            prior=prior, num_classes=len(answers) if prior == "uniform" else None, num_train_epochs=6,
            learning_rate=2e-2, per_device_train_batch_size=10, disable_tqdm=True, lr_scheduler_type="constant",
        ),
        train_dataset=train,
        processing_class=tokenizer(),
        peft_config=lora(),
        question_format=ONE_TOKEN,
    )  # fmt: skip
    ensemble = trainer.train()
    assert trainer.num_units == len(train)
    assert ensemble.num_experts == 3

    # SAMME (Zhu et al. 2009, algorithm 2) from the wrong bits that were saved.
    weights = np.full(len(train), 1 / len(train))
    alphas = []
    for record in trainer.records:
        folder = tmp_path / "run" / "rounds" / str(record["round"])
        np.testing.assert_allclose(read_array(folder / "weights.npy"), weights, rtol=1e-12)
        wrong = read_array(folder / f"attempt-{record['attempt']}" / "training_scores/token_wrong.npy")
        error = np.average(wrong, weights=weights)
        alpha = np.log((1 - error) / error) + np.log(len(answers) - 1)
        assert record["error"] == pytest.approx(error, rel=1e-12)
        assert record["expert_weight"] == pytest.approx(alpha, rel=1e-12)
        weights = weights * np.exp(alpha * wrong)
        weights /= weights.sum()
        alphas.append(alpha)
    assert np.ptp(weights) > 0
    assert ensemble.config.expert_weights == pytest.approx(alphas)

    votes = np.zeros((len(test), len(answers)))
    letters = tokenizer()(answers)["input_ids"]
    for t, alpha in enumerate(alphas):
        with ensemble.experts.expert(t) as model, torch.no_grad():
            for i, row in enumerate(test):
                ids = torch.tensor([ONE_TOKEN.prompt(row["prompt"], tokenizer()).ids])
                votes[i, int(model(input_ids=ids).logits[0, -1, letters].argmax())] += alpha
    scores = score_choices(ensemble, test, tokenizer(), ChoiceSettings(ONE_TOKEN))
    np.testing.assert_array_equal(scores.chosen, votes.argmax(axis=1))
    assert len({tuple(row) for row in votes > 0}) > len(answers), "the experts never differ"


# The whole experiment


def test_an_experiment_with_choices_is_judged_by_likelihood(tmp_path: Path) -> None:
    changes = settings(tmp_path)
    for name, seed in (("easy", 11), ("hard", 12)):
        several_choices(60, seed=seed, longest=3).remove_columns("id").to_json(tmp_path / f"{name}.jsonl")
    Experiment(build_config(changes)).run()
    run = tmp_path / "run" / "small"
    metrics = {(r["arm"], r["split"], r["metric"]): r["value"] for r in records_of(run, "arm")}
    for arm in ("zero_shot_weak", "expert_1", "ensemble", "student_ensemble", "ceiling"):
        assert metrics[arm, "ood", "accuracy"] >= metrics[arm, "ood", "exact_match"]
    # A random model finds a short answer among choices by chance, but hardly ever among all texts.
    assert metrics["zero_shot_weak", "id", "accuracy"] > 0.1 > metrics["zero_shot_weak", "id", "exact_match"]
    rows = Dataset.from_list([json.loads(line) for line in (run / "data" / "test_id.jsonl").read_text().splitlines()])
    scores = score_choices(TokenEnsemble.from_pretrained(run / "ensemble"), rows, tokenizer(), ChoiceSettings(FORMAT))
    assert metrics["ensemble", "id", "accuracy"] == pytest.approx(scores.correct.mean())
    labels = [json.loads(line) for line in (run / "labels" / "ensemble.jsonl").read_text().splitlines()]
    assert all(label["answer"] in label["choices"] for label in labels)
    assert "Exact OOD, %" in (run / "report.html").read_text()


def test_one_model_is_decoded_as_a_mixture_of_one() -> None:
    model = llama(0)
    prompts = torch.randint(3, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    decoder = MixtureDecoder(OneModel(model), prompts, torch.ones_like(prompts), torch.arange(2), Sampling())
    for _ in range(4):
        choice = decoder.choose(decoder.logits())
        logits = model(input_ids=prompts).logits[:, -1]
        assert choice.tokens.equal(logits.argmax(-1))
        torch.testing.assert_close(choice.log_probs, logits.log_softmax(-1).amax(-1))
        prompts = torch.cat([prompts, choice.tokens[:, None]], dim=1)
        decoder.append(choice.tokens)
