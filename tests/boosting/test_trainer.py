"""The rounds: what they compute, that they can be killed anywhere, and what they refuse."""

from __future__ import annotations

import re
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from ensemw2s import BoostingConfig, BoostingTrainer, StudentConfig, TokenEnsemble
from ensemw2s.boosting import algorithm
from ensemw2s.boosting.trainer import closing_identity
from ensemw2s.data.tokens import QuestionFormat, tokenize_questions
from ensemw2s.inference.measuring import score_answers
from ensemw2s.inference.scoring import score_examples
from ensemw2s.models.loading import load_tokenizer
from ensemw2s.runtime.files import read_array, read_json, write_array, write_json
from ensemw2s.runtime.store import Store
from ensemw2s.training.trainer import AnswerTrainer
from tests.running import die_before, fork, wait
from tests.tiny import END, FORMAT, Watch, llama, lora, questions, saved_model, tokenizer

FAST: dict[str, Any] = {
    "num_rounds": 3, "num_train_epochs": 2, "learning_rate": 2e-2, "per_device_train_batch_size": 8,
    "disable_tqdm": True, "lr_scheduler_type": "constant",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model"))


def trainer(
    model: Any, folder: Path, *, adapters: bool = True, validate: bool = True, **settings: Any
) -> BoostingTrainer:
    return BoostingTrainer(
        model if not isinstance(model, Path) else str(model),
        args=BoostingConfig(output_dir=str(folder), **(FAST | settings)),
        train_dataset=questions(24),
        eval_dataset=questions(8, seed=9, start=100) if validate else None,
        processing_class=tokenizer(),
        peft_config=lora() if adapters else None,
        question_format=FORMAT,
    )


def kept(folder: Path) -> dict[str, bytes]:
    """Every file of a run that should be the same in another run, by relative name."""
    files = {}
    for path in sorted(folder.rglob("*")):
        timed = path.name in ("cost.json", "costs.jsonl", "boosting.json", "README.md")
        if path.is_dir() or timed or path.name.startswith("ensemw2s."):
            continue
        content = path.read_bytes()
        if path.name == "record.json":
            content = repr({k: v for k, v in read_json(path).items() if "seconds" not in k}).encode()
        files[str(path.relative_to(folder))] = content
    return files


# What the rounds compute


def test_settings_of_adapters_are_written_in_one_order(model: Path, tmp_path: Path) -> None:
    """Not in that of a set, which is another in every process."""
    runner = BoostingTrainer(
        str(model),
        args=BoostingConfig(output_dir=str(tmp_path / "run"), num_rounds=1, max_steps=1, disable_tqdm=True),
        train_dataset=questions(24),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        question_format=FORMAT,
    )
    ensemble = runner.train(save_to=tmp_path / "first")
    TokenEnsemble.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "again")
    del ensemble
    files = sorted(tmp_path.rglob("adapter_config.json"))
    assert len(files) == 3
    for file in files:
        names = read_json(file)["target_modules"]
        assert names == sorted(names) and len(names) >= 7


@pytest.mark.parametrize("boosted", ["all", "informative"])
def test_token_weights_are_those_that_each_round_begins_with(model: Path, tmp_path: Path, boosted: str) -> None:
    runner = trainer(model, tmp_path, num_rounds=2, validate=False, boosted_tokens=boosted)
    with pytest.raises(ValueError, match=r"number=1: .* has no weights of that round, call train\(\) first"):
        runner.token_weights(1)
    ensemble = runner.train()
    examples, words = tokenize_questions(questions(24), tokenizer(), FORMAT), tokenizer()
    answers = [row["input_ids"][row["prompt_length"] :] for row in examples]
    first, second, third = (runner.token_weights(number) for number in (1, 2, 3))
    assert [len(row) for row in first] == [len(row) for row in second] == [len(row) for row in answers]
    assert (np.concatenate(first) == 1).all()
    has_weight = np.array(
        [
            boosted == "all" or words.decode([token], skip_special_tokens=True).strip() != ""
            for row in answers
            for token in row
        ]
    )
    assert runner.num_units == has_weight.sum()
    for left in (np.concatenate(second), np.concatenate(third)):
        assert left[has_weight].mean() == pytest.approx(1, abs=1e-5) and left[has_weight].std() > 0.01
        assert (left[~has_weight] == 1).all()
    # A soft error moves a weight by how unlikely the expert finds the token.
    scores = score_examples(ensemble[:1], examples, pad_token_id=END)
    by_likelihood = np.argsort(scores.token_log_probs[has_weight])
    assert (np.diff(np.concatenate(second)[has_weight][by_likelihood]) <= 1e-5).all()
    with pytest.raises(ValueError, match=r"number=4: .* has no weights of that round, give a number from 1 to 3"):
        runner.token_weights(4)


def test_what_went_wrong_is_said_without_progress_bars_too(model: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="round 1/1: .*no question is answered right.* than 1 epoch, or with a higher"):
        trainer(model, tmp_path / "nothing", num_rounds=1, num_train_epochs=1, learning_rate=1e-6).train()
    runner = trainer(model, tmp_path / "stopped", num_rounds=3, validate=False)
    worst = np.ones(runner.num_units)
    losses = runner._losses
    # From the second round on no token is right.
    runner._losses = lambda number, attempt: losses(number, attempt) if number == 1 else worst  # type: ignore[method-assign]
    with pytest.warns(UserWarning) as said:
        assert len(runner.train()) == 1
    messages = [str(warning.message) for warning in said]
    assert any("round 2/3" in message and "not added (attempt 2)" in message for message in messages)
    assert any(re.search(r"round 2 stopped boosting.*The ensemble has 1 experts", message) for message in messages)


def test_arguments_of_another_kind_are_refused(model: Path, tmp_path: Path) -> None:
    wrong: Any = StudentConfig(output_dir=str(tmp_path))
    with pytest.raises(TypeError, match="BoostingTrainer: args is a StudentConfig, expected a BoostingConfig"):
        BoostingTrainer(str(model), args=wrong, train_dataset=questions(4))
    named: Any = "scratch:char-weak"
    with pytest.raises(TypeError, match=r"processing_class is 'scratch:char-weak', expected a tokenizer: load it with"):
        BoostingTrainer(str(model), BoostingConfig(output_dir=str(tmp_path)), questions(4), processing_class=named)


def test_the_ensemble_is_evaluated_as_its_experts_were_asked(model: Path, tmp_path: Path) -> None:
    runner = trainer(model, tmp_path, num_rounds=2)
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        runner.evaluate()
    ensemble = runner.train()
    assert ensemble.question_format == FORMAT
    assert load_tokenizer(tmp_path / "ensemble").get_vocab() == tokenizer().get_vocab()
    found = runner.evaluate()
    assert found["eval_accuracy"] == runner.records[-1]["validation"]["ensemble"]
    assert found["eval_token_error"] == runner.records[-1]["validation"]["token_error"]
    asked = score_answers(ensemble, questions(24), tokenizer())
    assert runner.evaluate(questions(24))["eval_loss"] == pytest.approx(-asked.token_log_probs.mean())
    with pytest.warns(UserWarning, match="the model was trained on questions in the format .*, and is asked in the"):
        otherwise = score_answers(ensemble, questions(24), tokenizer(), question_format=QuestionFormat())
    assert otherwise.token_log_probs.mean() != pytest.approx(asked.token_log_probs.mean())
    with pytest.raises(ValueError, match=r"evaluate\(\) needs questions with answers"):
        trainer(model, tmp_path, num_rounds=2, validate=False).evaluate()


@pytest.mark.parametrize("recipe", ["tempered", "paper", "bagging"])
@pytest.mark.parametrize("unit", [("token", None), ("window", 2), ("sequence", None)])
def test_records_can_be_recomputed_from_the_saved_experts(
    model: Path, tmp_path: Path, recipe: str, unit: tuple[str, int | None]
) -> None:
    runner = trainer(model, tmp_path, recipe=recipe, unit=unit[0], window=unit[1], num_rounds=2, num_train_epochs=12)
    ensemble = runner.train()
    examples = tokenize_questions(questions(24), tokenizer(), FORMAT)
    lengths = [len(row["input_ids"]) - row["prompt_length"] for row in examples]
    units = algorithm.unit_index(lengths, *unit)

    def losses(model: Any) -> np.ndarray:
        scores = score_examples(model, examples, pad_token_id=END, batch_size=8)
        token_losses = 1 - np.exp(scores.token_log_probs) if recipe == "tempered" else scores.token_wrong
        return algorithm.unit_losses(token_losses, units)

    weights = np.full(units[-1] + 1, 1 / (units[-1] + 1))
    margin = 0.5 / weights.size
    prior = np.clip(np.mean(losses(llama(0))), margin, 1 - margin)
    tolerance = 1e-6 if recipe == "tempered" else 1e-12
    accepted = [record for record in runner.records if record["accepted"]]
    assert len(accepted) == ensemble.num_experts
    for number, record in enumerate(accepted):
        lost = losses(ensemble[number : number + 1])
        error = np.clip(weights @ lost, margin, 1 - margin)
        assert record["error"] == pytest.approx(error, abs=tolerance)
        np.testing.assert_allclose(read_array(tmp_path / f"rounds/{number + 1}/weights.npy"), weights, rtol=tolerance)
        if recipe == "bagging":
            assert record["expert_weight"] == 1.0
            continue
        alpha = np.log((1 - error) / error) + np.log(1 / (1 - prior) - 1)
        assert record["expert_weight"] == pytest.approx(alpha, rel=10 * tolerance)
        # How far a tempered update goes is tested with the other settings.
        weights = weights * np.exp(record["shrinkage"] * record["expert_weight"] * lost)
        weights /= weights.sum()
    assert ensemble.config.expert_weights == [record["expert_weight"] for record in accepted]


def test_the_validation_figures_are_those_of_the_growing_ensemble(model: Path, tmp_path: Path) -> None:
    runner = trainer(model, tmp_path)
    ensemble = runner.train()
    examples = tokenize_questions(questions(8, seed=9, start=100), tokenizer(), FORMAT)
    for number, record in enumerate(r for r in runner.records if r["accepted"]):
        scores = score_examples(ensemble[: number + 1], examples, pad_token_id=END)
        alone = score_examples(ensemble[number : number + 1], examples, pad_token_id=END)
        assert record["validation"] == {
            "expert": alone.accuracy, "ensemble": scores.accuracy, "token_error": scores.token_error,
        }  # fmt: skip


def test_with_choices_the_validation_figures_compare_them(model: Path, tmp_path: Path) -> None:
    asked = [{**row, "choices": [row["answer"], "zz"]} for row in questions(8, seed=9, start=100)]
    args = BoostingConfig(output_dir=str(tmp_path), num_rounds=2, use_cpu=True, disable_tqdm=True)
    runner = BoostingTrainer(str(model), args, questions(24), asked, tokenizer(), lora(), FORMAT)
    ensemble = runner.train()
    for number, record in enumerate(r for r in runner.records if r["accepted"]):
        growing = score_answers(ensemble[: number + 1], asked, tokenizer())
        alone = score_answers(ensemble[[number]], asked, tokenizer())
        # Some answers are likelier than nonsense that no expert would give.
        assert growing.accuracy > 0
        assert record["validation"] == {
            "expert": alone.accuracy, "ensemble": growing.accuracy, "token_error": growing.token_error,
        }  # fmt: skip


def test_what_transformers_train_can_be_told_is_honoured_or_refused(model: Path, tmp_path: Path) -> None:
    runner = trainer(model, tmp_path)
    for asked in (False, str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match=r"resume_from_checkpoint=.*: train\(\) goes on by itself"):
            runner.train(resume_from_checkpoint=asked)
    assert runner.train(resume_from_checkpoint=True).num_experts


@pytest.mark.parametrize("shrinkage", [1.0, 0.3])
def test_the_closing_identity_holds_in_the_run_s_own_files(model: Path, tmp_path: Path, shrinkage: float) -> None:
    runner = trainer(model, tmp_path, shrinkage=shrinkage, errors="hard", validate=False)
    runner.train()
    checks = closing_identity(tmp_path)
    assert [check["round"] for check in checks] == [r["round"] for r in runner.records if r["accepted"]]
    assert all(check["sum_gap"] <= 1e-9 for check in checks)
    gaps = [check["identity_gap"] for check in checks if check["identity_gap"] is not None]
    assert gaps and max(gaps) <= 1e-12
    if shrinkage == 1.0:
        record = runner.records[0]
        scores = tmp_path / "rounds/1/attempt-1/training_scores"
        wrong = algorithm.unit_losses(read_array(scores / "token_wrong.npy"), read_array(tmp_path / "units.npy"))
        after = algorithm.weighted_error(read_array(tmp_path / "rounds/2/weights.npy"), wrong)
        assert after == pytest.approx(record["prior_error"], abs=1e-12)


def test_the_closing_identity_check_notices_a_changed_weight(model: Path, tmp_path: Path) -> None:
    trainer(model, tmp_path, num_rounds=1, errors="hard", validate=False).train()
    file = tmp_path / "rounds/2/weights.npy"
    weights = read_array(file)
    weights[:5] *= 1.01
    write_array(file, weights / weights.sum())
    assert closing_identity(tmp_path)[0]["identity_gap"] > 1e-6


def test_whole_models_and_one_model_per_round_make_an_ensemble_too(model: Path, tmp_path: Path) -> None:
    single = trainer(model, tmp_path / "a", adapters=False, num_rounds=2).train()
    assert single.config.kind == "models"
    several = trainer([llama(0), llama(5)], tmp_path / "b", num_rounds=2).train()
    assert several.config.kind == "models"
    embeddings = [m.get_input_embeddings().weight for m in several.experts.models]
    assert torch.equal(embeddings[0], llama(0).get_input_embeddings().weight)
    assert torch.equal(embeddings[1], llama(5).get_input_embeddings().weight)


def test_whole_models_answer_in_the_dtype_in_which_they_were_trained(tmp_path: Path) -> None:
    ensemble = trainer(llama(0).bfloat16(), tmp_path, adapters=False, num_rounds=1).train()
    assert {model.dtype for model in ensemble.experts.models} == {torch.bfloat16}
    saved = TokenEnsemble.from_pretrained(tmp_path / "ensemble", dtype="auto")
    assert {model.dtype for model in saved.experts.models} == {torch.bfloat16}


# Killed and continued


def run_until(model: Path, folder: Path, stop_at: int) -> int:
    """Run in a process that dies right before the change of the disk with this number; return its exit status."""

    def work() -> None:
        changes = die_before(stop_at)
        trainer(model, folder, num_rounds=2).train()
        print(changes())

    return wait(fork(work, folder.with_suffix(".txt")))


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(model: Path, tmp_path: Path) -> None:
    assert run_until(model, tmp_path / "whole", 0) == 0
    saves = int((tmp_path / "whole.txt").read_text().split()[-1])
    # After the first save, in the middle of a round, and before the last one; each continued in another process.
    for stop_at in (2, saves // 2, saves):
        folder = tmp_path / f"killed-{stop_at}"
        assert run_until(model, folder, stop_at) == -signal.SIGKILL
        assert kept(folder) != kept(tmp_path / "whole")
        assert run_until(model, folder, 0) == 0, folder.with_suffix(".txt").read_text()
        assert kept(folder) == kept(tmp_path / "whole")


@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "whole-models"])
def test_an_expert_whose_training_was_killed_goes_on_from_its_last_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: bool
) -> None:
    settings = {"num_rounds": 2, "save_strategy": "steps", "save_steps": 2, "adapters": adapters}
    steps, stop_at, own = 0, 0, AnswerTrainer.training_step

    def counted(self: AnswerTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    monkeypatch.setattr(AnswerTrainer, "training_step", counted)
    trainer(model, tmp_path / "whole", **settings).train()
    whole = steps
    # In the last step of the second expert, whose last checkpoint is one step old.
    steps, stop_at = 0, whole
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path / "killed", **settings).train()
    steps, stop_at = 0, 0
    # How often checkpoints are written is no other configuration.
    trainer(model, tmp_path / "killed", **(settings | {"save_steps": 3})).train()
    assert steps == 2
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole")
    assert not list(tmp_path.rglob("checkpoint*"))


def test_the_number_of_dataloader_workers_changes_nothing(model: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        trainer(model, tmp_path / str(workers), num_rounds=1, dataloader_num_workers=workers).train()
    # The configuration that is kept leaves the workers out, so it is equal too.
    assert kept(tmp_path / "0") == kept(tmp_path / "2")


def test_another_seed_gives_another_expert(model: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        trainer(model, tmp_path / str(seed), num_rounds=1, seed=seed).train()
    name = "rounds/1/attempt-1/expert/adapter_model.safetensors"
    assert kept(tmp_path / "0")[name] != kept(tmp_path / "1")[name]


def test_more_rounds_continue_a_finished_run(model: Path, tmp_path: Path) -> None:
    one = trainer(model, tmp_path, num_rounds=1).train()
    before = kept(tmp_path)
    two = trainer(model, tmp_path, num_rounds=2).train()
    assert two.config.expert_weights[0] == one.config.expert_weights[0]
    assert two.num_experts == 2
    after = kept(tmp_path)
    before = {name: content for name, content in before.items() if not name.startswith("ensemble/")}
    assert {name: after[name] for name in before} == before


def test_fewer_rounds_replace_a_larger_ensemble_with_a_warning_and_keep_its_rounds(model: Path, tmp_path: Path) -> None:
    trainer(model, tmp_path, num_rounds=3).train()
    before = kept(tmp_path)
    message = (
        rf"the ensemble of 3 experts in {tmp_path}/ensemble is replaced by one of 2\. Rounds 3 to 3 stay in "
        rf"{tmp_path}/rounds: train\(\) with num_rounds=3 finds them there"
    )
    with pytest.warns(UserWarning, match=message):
        assert trainer(model, tmp_path, num_rounds=2).train().num_experts == 2
    assert TokenEnsemble.from_pretrained(tmp_path / "ensemble").num_experts == 2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the ensemble of")
        trainer(model, tmp_path, num_rounds=3).train()
    assert kept(tmp_path) == before


def test_another_runs_larger_ensemble_is_replaced_with_a_warning(model: Path, tmp_path: Path) -> None:
    trainer(model, tmp_path / "a", num_rounds=2).train(save_to=tmp_path / "saved")
    with pytest.warns(UserWarning, match=r"of 2 experts in .*saved is replaced by one of 1$"):
        trainer(model, tmp_path / "b", num_rounds=1).train(save_to=tmp_path / "saved")


# An expert that is no better than the pre-trained model


def test_a_useless_expert_is_retried_once_and_then_ends_boosting(model: Path, tmp_path: Path) -> None:
    runner = trainer(model, tmp_path, num_rounds=3, prior=0.9999)
    runner.train()
    # Rounds from the second on see no training: a learning rate of 0 leaves the pre-trained model.
    runner = trainer(model, tmp_path / "b", num_rounds=3, learning_rate=0.0)
    with pytest.raises(
        RuntimeError, match=r"no expert beats the pre-trained model: round 1 stopped boosting.*not below"
    ):
        runner.train()
    assert [(r["round"], r["attempt"], r["accepted"]) for r in runner.records] == [(1, 1, False), (1, 2, False)]
    assert all(r["expert_weight"] <= 0 for r in runner.records)


def test_boosting_that_stops_early_keeps_the_experts_before(model: Path, tmp_path: Path) -> None:
    runner = trainer(model, tmp_path, num_rounds=2)
    runner.train()
    # As if both experts of round 2 had been no better than the prior.
    for attempt in (1, 2):
        folder = tmp_path / f"rounds/2/attempt-{attempt}"
        record = read_json(tmp_path / "rounds/2/attempt-1/record.json")
        write_json(folder / "record.json", record | {"attempt": attempt, "accepted": False})
    ensemble = runner.train()
    assert ensemble.num_experts == 1
    assert runner.stop_reason.startswith("round 2 stopped boosting")
    assert runner.record()["stop_reason"] == runner.stop_reason


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rounds": 0}, "num_rounds must be from 1 to 10000, got 0"),
        ({"prior": 1.5}, r"prior must be .* a number in \(0, 1\), got 1\.5"),
        ({"prior": "uniform", "unit": "sequence"}, 'prior="uniform" needs unit="token"'),
        (
            {"recipe": "papr"},
            "recipe must be one of paper, tempered, chained, branched, co_boosted, bagging, deep_ensemble, got 'papr'",
        ),
        ({"shrinkage": 0.0}, r"shrinkage must be in \(0, 1\]"),
        ({"uniform_mix": 1.0}, r"uniform_mix must be in \[0, 1\)"),
        ({"sampling": "boot"}, "sampling must be one of draw"),
        ({"unit": "window"}, "needs window >= 1"),
        ({"combine": "mean"}, "combine must be one of prob, logprob, vote"),
    ],
)
def test_a_bad_setting_is_refused_at_once(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        BoostingConfig(output_dir=str(tmp_path), **settings)


def test_a_question_in_both_datasets_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is in both train_dataset and eval_dataset"):
        BoostingTrainer(
            str(model), BoostingConfig(output_dir=str(tmp_path)), questions(3), questions(3), question_format=FORMAT
        )


def test_a_model_from_nowhere_needs_its_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processing_class is missing, and the model was not loaded from a folder"):
        BoostingTrainer(llama(0), BoostingConfig(output_dir=str(tmp_path)), questions(3), question_format=FORMAT)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_before_training(tmp_path: Path) -> None:
    size = len(tokenizer()) - 1
    with pytest.raises(ValueError, match=f"token ids up to {size} .* vocabulary has {size} .*resize_token_embeddings"):
        trainer(llama(0, vocab_size=size), tmp_path)
    saved_model(tmp_path / "model", vocab_size=size)
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        trainer(tmp_path / "model", tmp_path / "run").train()
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


def test_the_number_of_models_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model lists 2 models for 3 rounds"):
        trainer([llama(0), llama(1)], tmp_path)


def test_a_folder_of_another_configuration_is_refused_and_overwritten_on_request(model: Path, tmp_path: Path) -> None:
    trainer(model, tmp_path, num_rounds=1).train()
    with pytest.raises(ValueError, match=r"another configuration; differing: learning_rate, shrinkage\."):
        trainer(model, tmp_path, num_rounds=1, learning_rate=1e-2, shrinkage=0.5).train()
    replaced = trainer(model, tmp_path, num_rounds=1, learning_rate=1e-2, shrinkage=0.5, overwrite=True)
    fresh = trainer(model, tmp_path.parent / "fresh", num_rounds=1, learning_rate=1e-2, shrinkage=0.5)
    assert replaced.train().config.expert_weights == fresh.train().config.expert_weights


def test_the_ensemble_of_a_run_refers_to_its_base(model: Path, tmp_path: Path) -> None:
    ensemble = trainer(model, tmp_path / "run", num_rounds=1).train()
    ensemble.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "base").exists()
    assert TokenEnsemble.from_pretrained(tmp_path / "saved").config.base == {"source": str(model)}


# What train() leaves


def test_the_ensemble_lies_in_the_output_folder(model: Path, tmp_path: Path) -> None:
    runner = trainer(model, tmp_path / "run", num_rounds=1, validate=False)
    for _ in range(2):
        ensemble = runner.train()
        saved = TokenEnsemble.from_pretrained(tmp_path / "run/ensemble")
        assert saved.config.expert_weights == ensemble.config.expert_weights
        assert read_json(tmp_path / "run/ensemble/boosting.json")["rounds"] == runner.records
        assert (tmp_path / "run/ensemble/tokenizer.json").exists()
    runner.train(save_to=tmp_path / "named")
    assert TokenEnsemble.from_pretrained(tmp_path / "named").config.expert_weights == ensemble.config.expert_weights
    trainer(model, tmp_path / "run", num_rounds=1, validate=False, seed=1, overwrite=True).train()
    assert TokenEnsemble.from_pretrained(tmp_path / "run/ensemble")


def test_another_model_where_the_ensemble_would_lie_is_found_before_training(tmp_path: Path) -> None:
    saved_model(tmp_path / "run/ensemble")
    runner = trainer(llama(), tmp_path / "run", num_rounds=1, validate=False)
    with pytest.raises(FileExistsError, match=r"config.json is in the way of the ensemble"):
        runner.train()
    assert runner.records == []


def test_questions_come_in_any_shape(model: Path, tmp_path: Path) -> None:
    rows, others = questions(12).remove_columns("id"), questions(8, seed=9, start=100)
    for name, train, validation in (
        ("a", rows.to_pandas(), others.to_list()),
        ("b", rows.with_format("numpy"), others),
    ):
        args = BoostingConfig(output_dir=str(tmp_path / name), **(FAST | {"num_rounds": 1}))
        BoostingTrainer(str(model), args, train, validation, tokenizer(), lora(), FORMAT).train()
    assert kept(tmp_path / "a") == kept(tmp_path / "b")


# What reaches the training of each expert


def with_options(model: Path, folder: Path, options: dict[str, Any], **settings: Any) -> BoostingTrainer:
    return BoostingTrainer(
        str(model), BoostingConfig(output_dir=str(folder), **(FAST | {"num_rounds": 2} | settings)), questions(12),
        eval_dataset=questions(8, seed=9, start=100), processing_class=tokenizer(), peft_config=lora(),
        question_format=FORMAT, **options,
    )  # fmt: skip


def test_callbacks_and_evaluations_belong_to_every_expert(model: Path, tmp_path: Path) -> None:
    seen = Watch()
    with_options(model, tmp_path, {"callbacks": [seen]}, eval_strategy="epoch", num_train_epochs=2).train()
    assert seen.trainings == 2
    assert len(seen.losses) == 4
    assert all(np.isfinite(loss) for _, loss in seen.losses)


def test_an_optimizer_class_makes_other_experts_and_another_run(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"momentum": 0.5})}
    one = with_options(model, tmp_path / "sgd", options, recipe="deep_ensemble").train()
    other = with_options(model, tmp_path / "adam", {}, recipe="deep_ensemble").train()
    ids = torch.arange(5)[None]
    assert (one(ids).logits - other(ids).logits).abs().max() > 1e-6
    with pytest.raises(ValueError, match="optimizer"):
        with_options(model, tmp_path / "sgd", {}, recipe="deep_ensemble").train()


@pytest.mark.parametrize(
    ("options", "settings", "error", "message"),
    [
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, {}, ValueError, "every expert has weights of its"),
        ({"callbacks": [Watch()], "store": True}, {}, ValueError, "leave out callbacks or store"),
        ({"compute_metrics": len}, {}, TypeError, "BoostingTrainer takes no argument 'compute_metrics'"),
        ({"eval_dataset": None}, {"eval_strategy": "steps"}, ValueError, 'eval_strategy="steps" needs questions'),
    ],
)
def test_what_no_expert_could_be_given_is_refused(
    model: Path, tmp_path: Path, options: dict[str, Any], settings: dict[str, Any], error: Any, message: str
) -> None:
    if "store" in options:
        options = options | {"store": Store(tmp_path / "store")}
    given: dict[str, Any] = {"eval_dataset": questions(8, seed=9, start=100)} | options
    with pytest.raises(error, match=message):
        BoostingTrainer(
            str(model), BoostingConfig(output_dir=str(tmp_path), **settings), questions(12),
            processing_class=tokenizer(), peft_config=lora(), **given,
        )  # fmt: skip


def test_a_script_is_told_what_the_command_line_tells(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_options(model, tmp_path / "shown", {}, disable_tqdm=False).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round")]
    assert [line.split(":")[0] for line in lines] == ["round 1/2", "round 2/2"]
    assert all("ε" in line and "α" in line and "effective sample size" in line for line in lines)
    assert all("validation: expert" in line for line in lines)
    with_options(model, tmp_path / "hidden", {}, disable_tqdm=True).train()
    assert "round" not in capsys.readouterr().out


def test_an_overwritten_run_leaves_no_ensemble_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_options(model, tmp_path, {}).train()
    (tmp_path / "ensemble/notes.txt").write_text("mine")
    other = with_options(model, tmp_path, {}, learning_rate=1e-2, overwrite=True)
    monkeypatch.setattr(other, "_round", lambda number: False)
    with pytest.raises(RuntimeError, match="no expert beats"):
        other.train()
    with pytest.raises((FileNotFoundError, ValueError)):
        TokenEnsemble.from_pretrained(tmp_path / "ensemble")
    assert (tmp_path / "ensemble/notes.txt").read_text() == "mine"
    with_options(model, tmp_path, {}, learning_rate=1e-2).train()
    assert TokenEnsemble.from_pretrained(tmp_path / "ensemble").num_experts == 2
