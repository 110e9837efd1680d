"""The student: what it trains on, and that it comes back from disk bit for bit."""

from __future__ import annotations

import errno
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from ensemw2s import TokenEnsemble
from ensemw2s.data.batches import AnswerCollator, next_token_mask
from ensemw2s.data.tokens import QuestionFormat, asked_in, tokenize_questions
from ensemw2s.inference.choices import ChoiceSettings, score_choices
from ensemw2s.inference.measuring import score_answers
from ensemw2s.inference.scoring import score_examples
from ensemw2s.models.loading import load_model
from ensemw2s.runtime.files import DiskFullError, write_json
from ensemw2s.student import losses as student_losses
from ensemw2s.student import teacher as student_teacher
from ensemw2s.student.answers import usable_answers
from ensemw2s.student.teacher import cache_teacher
from ensemw2s.student.trainer import StudentConfig, StudentTrainer, load_trained
from ensemw2s.training.fine_tune import fine_tune
from tests.tiny import (
    END,
    FORMAT,
    LETTERS,
    VOCAB,
    Watch,
    llama,
    lora,
    questions,
    saved_adapters,
    saved_model,
    tokenizer,
)

IDS = torch.randint(2, VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def config(folder: Path, **settings: Any) -> StudentConfig:
    defaults = {"use_cpu": True, "num_train_epochs": 1, "learning_rate": 1e-2, "disable_tqdm": True, "seed": 5}
    return StudentConfig(output_dir=str(folder), **(defaults | settings))


def pseudo_answers(count: int = 12) -> Dataset:
    """Answers as a teacher gives them: not the truth, more or less confident, some empty."""
    rows = []
    for i, row in enumerate(questions(count)):
        answer = "" if i % 5 == 4 else f"{i}{row['answer'][::-1]}"
        rows.append({"id": row["id"], "prompt": row["prompt"], "answer": answer, "confidence": -0.25 * i})
    return Dataset.from_list(rows)


def student(folder: Path, model: Any = None, answers: Dataset | None = None, **settings: Any) -> StudentTrainer:
    return StudentTrainer(
        model or llama(1),
        settings.pop("args", None) or config(folder),
        answers or pseudo_answers(),
        processing_class=tokenizer(),
        question_format=FORMAT,
        **settings,
    )


# What it is trained on


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_the_student_is_fine_tuned_on_the_pseudo_answers_alone(tmp_path: Path, peft_config: Any) -> None:
    trainer = student(tmp_path, peft_config=peft_config)
    trained = trainer.train()
    kept = [row for row in pseudo_answers() if row["answer"]]
    examples = tokenize_questions(Dataset.from_list(kept), tokenizer(), FORMAT)
    options: dict[str, Any] = {"pad_token_id": END, "seed": 5, "description": "test", "peft_config": peft_config}
    expected, cost = fine_tune(llama(1), examples, config(tmp_path), **options)
    assert torch.equal(logits(trained), logits(expected))
    assert not torch.allclose(logits(trained), logits(llama(1)), atol=1e-3)
    assert not trained.training
    assert trainer.cost is not None
    assert trainer.cost.tokens == cost.tokens == sum(len(ids) for ids in examples["input_ids"])


def test_a_student_learns_what_its_teacher_says(tmp_path: Path) -> None:
    teacher = TokenEnsemble.from_models([llama(0)], [1.0])
    labelled = teacher.label(questions(6), tokenizer(), question_format=FORMAT, max_new_tokens=4, description=None)
    # Whatever it says counts as an answer.
    labelled = labelled.remove_columns("finished")
    args = config(tmp_path, num_train_epochs=60, per_device_train_batch_size=6, learning_rate=2e-2)
    trained = student(tmp_path, answers=labelled, args=args).train()
    examples = tokenize_questions(usable_answers(labelled), tokenizer(), FORMAT)
    assert score_examples(llama(1), examples, pad_token_id=END).accuracy == 0
    assert score_examples(trained, examples, pad_token_id=END).accuracy == 1
    truth = tokenize_questions(questions(6), tokenizer(), FORMAT)
    assert score_examples(trained, truth, pad_token_id=END).accuracy == 0


def test_a_student_is_evaluated_before_and_after_its_training(tmp_path: Path) -> None:
    truth = questions(6)
    args = config(tmp_path, num_train_epochs=60, per_device_train_batch_size=6, learning_rate=2e-2)
    trainer = student(tmp_path, answers=truth, args=args, eval_dataset=truth)
    before = trainer.evaluate()
    examples = tokenize_questions(truth, tokenizer(), FORMAT)
    scores = score_examples(llama(1), examples, pad_token_id=END)
    assert before == pytest.approx(
        {
            "eval_accuracy": scores.accuracy,
            "eval_token_error": scores.token_error,
            "eval_loss": -scores.token_log_probs.mean(),
        }
    )
    assert before["eval_accuracy"] == 0
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] == 1 and after["eval_token_error"] == 0 and after["eval_loss"] < 0.1
    assert trainer.evaluate(questions(6, seed=9, start=100)) != after
    with pytest.raises(ValueError, match=r"evaluate\(\) needs questions with answers"):
        student(tmp_path).evaluate()


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_saved_student_is_asked_as_it_was_trained(tmp_path: Path, peft_config: Any) -> None:
    saved_model(tmp_path / "strong", seed=1)
    trainer = student(tmp_path / "student", model=str(tmp_path / "strong"), peft_config=peft_config)
    trainer.train()
    loaded = load_trained(tmp_path / "student", None if peft_config is None else str(tmp_path / "strong"))
    scores = score_answers(loaded, questions(6), tokenizer())
    assert -scores.token_log_probs.mean() == pytest.approx(trainer.evaluate(questions(6))["eval_loss"], abs=1e-5)
    if peft_config is None:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
        assert plain.config.question_format == FORMAT.describe()
    write_json(tmp_path / "student" / "question_format.json", {"prompt_template": "none"})
    with pytest.raises(ValueError, match=r"question_format\.json: question_format cannot be .* must contain"):
        load_trained(tmp_path / "student", str(tmp_path / "strong"))


def test_arguments_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="StudentTrainer: args is a TrainingArguments, expected a StudentConfig"):
        student(tmp_path, args=TrainingArguments(str(tmp_path)))


def test_choices_are_evaluated_by_likelihood(tmp_path: Path) -> None:
    data = questions(12)
    data = data.add_column("choices", [[answer, f"{answer}z"] for answer in data["answer"]])
    found = student(tmp_path).evaluate(data)["eval_accuracy"]
    settings = ChoiceSettings(FORMAT)
    assert found == score_choices(llama(1), data, tokenizer(), settings).correct.mean()
    examples = tokenize_questions(data, tokenizer(), FORMAT)
    assert found != score_examples(llama(1), examples, pad_token_id=END).accuracy
    # Whoever scores the model by hand finds the same.
    scores = score_answers(llama(1), data, tokenizer(), question_format=FORMAT)
    assert scores.accuracy == found and scores.correct.dtype == bool
    bare = score_answers(llama(1), data.remove_columns("choices"), tokenizer(), question_format=FORMAT)
    assert bare.accuracy != found and np.array_equal(bare.token_wrong, scores.token_wrong)


def test_a_student_asks_as_the_answers_were_asked_for(tmp_path: Path) -> None:
    odd = QuestionFormat("q {prompt} a", "")
    answers = asked_in(pseudo_answers(), odd).filter(lambda row: len(row["answer"]) < 100)
    for given, expected in ((None, odd), (FORMAT, FORMAT)):
        trainer = StudentTrainer(llama(1), config(tmp_path), answers, tokenizer(), question_format=given)
        assert trainer.question_format == expected
    answers.info.description = "Answers that I found."
    plain = StudentTrainer(llama(1), config(tmp_path), answers, tokenizer())
    assert plain.question_format == QuestionFormat()


def test_the_question_format_reaches_the_student(tmp_path: Path) -> None:
    one = student(tmp_path).train()
    other = StudentTrainer(
        llama(1), config(tmp_path), pseudo_answers(), tokenizer(), question_format=QuestionFormat("q {prompt} a", "")
    ).train()
    assert not torch.equal(logits(one), logits(other))


def test_a_source_is_loaded_with_its_tokenizer_and_settings(tmp_path: Path) -> None:
    source = str(saved_model(tmp_path / "model", seed=1, num_hidden_layers=3))
    trainer = StudentTrainer(
        source, config(tmp_path), pseudo_answers(), question_format=FORMAT, model_init_kwargs={"keep_layers": "0,2"}
    )
    assert trainer.model.config.num_hidden_layers == 2
    assert trainer.processing_class.get_vocab() == tokenizer().get_vocab()
    loaded = StudentTrainer(load_model(source), config(tmp_path), pseudo_answers(), question_format=FORMAT)
    assert loaded.processing_class.get_vocab() == tokenizer().get_vocab()


# Which answers it is trained on


def test_answers_below_the_least_confidence_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    answers = pseudo_answers()
    assert usable_answers(answers)["id"] == [f"q{i}" for i in range(12) if i % 5 != 4]
    # The bound itself is confident enough.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usable_answers(answers, min_confidence=-1.5)["id"] == ["q0", "q1", "q2", "q3", "q5", "q6"]
    with pytest.warns(UserWarning, match=r"9 of the 12 answers are left out .*: min_confidence=0 is above"):
        assert usable_answers(answers, min_confidence=0)["id"] == ["q0"]
    blank = [{"id": str(i), "prompt": "ab", "answer": text} for i, text in enumerate([" ", None, "b", "\n\t"])]
    assert usable_answers(Dataset.from_list(blank))["id"] == ["2"]
    trainer = student(tmp_path, args=config(tmp_path, min_confidence=-1.5))
    assert trainer.train_dataset["id"] == ["q0", "q1", "q2", "q3", "q5", "q6"]
    assert torch.equal(
        logits(trainer.train()), logits(student(tmp_path, answers=answers.select([0, 1, 2, 3, 5, 6])).train())
    )


def test_an_answer_of_unknown_confidence_is_not_confident() -> None:
    answers = Dataset.from_dict({"prompt": ["a", "b"], "answer": ["c", "d"], "confidence": [math.nan, -0.1]})
    assert usable_answers(answers, min_confidence=-1.0)["answer"] == ["d"]


@pytest.mark.parametrize(
    ("columns", "min_confidence", "message"),
    [
        ({"prompt": ["a"], "answer": ["b"]}, -1.0, r"min_confidence=-1.0 needs a column `confidence`.*prompt, answer"),
        (
            {"prompt": ["a"], "answer": ["b"], "confidence": [-3.0]},
            -1.0,
            r"none of the 1 answers .* 1 are not confident enough.* lower min_confidence \(the highest .* is -3\)$",
        ),
        ({"prompt": ["a", "c"], "answer": ["", " "]}, None, "none of the 2 answers is left to train on: 2 are empty"),
        ({"prompt": ["a"]}, None, "has no column 'answer', only prompt"),
        ({"answer": ["a"]}, None, "has no column 'prompt'"),
        ({"prompt": ["a"], "answer": [7]}, None, "answer is 7, expected text"),
    ],
    ids=["no-confidence", "none-confident", "all-empty", "no-answer", "no-prompt", "a-number"],
)
def test_answers_that_cannot_be_trained_on_are_refused(
    tmp_path: Path, columns: Any, min_confidence: float | None, message: str
) -> None:
    args = config(tmp_path, min_confidence=min_confidence)
    with pytest.raises(ValueError, match=message):
        student(tmp_path, answers=Dataset.from_dict(columns), args=args)


def test_a_least_confidence_above_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"min_confidence must be at most 0, got 0.8"):
        config(tmp_path, min_confidence=0.8)


def test_a_model_from_nowhere_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processing_class is missing"):
        StudentTrainer(llama(1), config(tmp_path), pseudo_answers())


@pytest.mark.parametrize(
    ("fraction", "kept"), [(1.0, "0123"), (0.5, "0123"), (0.3, "023"), (0.25, "02"), (0.125, "2"), (0.01, "2")]
)
def test_a_fraction_of_all_rows_is_kept_the_most_confident(fraction: float, kept: str) -> None:
    # The last four cannot be used, however confident.
    answers = Dataset.from_dict({
        "id": list("01234567"), "prompt": ["q"] * 8, "answer": ["a"] * 4 + [""] * 3 + ["a"],
        "confidence": [-0.5, -0.9, -0.1, -0.7, 0.0, 0.0, 0.0, math.nan], "finished": [True] * 8,
    })  # fmt: skip
    assert usable_answers(answers, keep_fraction=fraction)["id"] == list(kept)


def test_equally_confident_answers_are_kept_from_the_front() -> None:
    answers = Dataset.from_dict({"prompt": ["q"] * 4, "answer": list("abcd"), "confidence": [-1.0, -0.5, -1.0, -1.0]})
    assert usable_answers(answers, keep_fraction=0.5)["answer"] == ["a", "b"]


def test_answers_that_were_cut_off_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    answers = (
        pseudo_answers(6).remove_columns("confidence").add_column("finished", [True, False, True, False, True, True])
    )
    assert usable_answers(answers)["id"] == ["q0", "q2", "q5"]
    assert usable_answers(answers, keep_unfinished=True)["id"] == ["q0", "q1", "q2", "q3", "q5"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usable_answers(answers, keep_unfinished=True)
    lone = [{"prompt": str(i), "answer": "a", "finished": i == 0} for i in range(9)] + [{"prompt": "x", "answer": ""}]
    with pytest.warns(UserWarning, match=r"9 of the 10 answers are left out .*: 1 are empty, 8 were cut off"):
        assert len(usable_answers(lone)) == 1
    unfinished = answers.filter(lambda row: not row["finished"])
    with pytest.raises(ValueError, match=r"train on: 2 are cut off before their end\. To do: .*more max_new_tokens"):
        student(tmp_path, answers=unfinished)


def test_the_end_token_that_no_teacher_gave_is_not_taught(tmp_path: Path) -> None:
    answers = pseudo_answers(6).add_column("finished", [True, False] * 3)
    kept = usable_answers(answers, keep_unfinished=True)
    trained = student(tmp_path, answers=answers, args=config(tmp_path, keep_unfinished=True)).train()
    examples = tokenize_questions(kept, tokenizer(), FORMAT)
    lengths = [len(ids) - start for ids, start in zip(examples["input_ids"], examples["prompt_length"], strict=True)]
    weights = [np.ones(length) for length in lengths]
    options: dict[str, Any] = {"pad_token_id": END, "seed": 5, "description": "test"}
    all_taught, _ = fine_tune(llama(1), examples, config(tmp_path), **options)
    for row, finished in zip(weights, kept["finished"], strict=True):
        row[-1] = float(finished)
    expected, _ = fine_tune(llama(1), examples, config(tmp_path), token_weights=weights, **options)
    assert torch.equal(logits(trained), logits(expected))
    assert not torch.equal(logits(trained), logits(all_taught))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "hard"}, "variant must be one of sft, soft, confidence, got 'hard'"),
        ({"temperature": 0.0}, r"temperature must be above 0 and finite, got 0\.0"),
        ({"temperature": math.inf}, "temperature must be above 0 and finite, got inf"),
        ({"soft_weight": 0.0}, r"soft_weight must be in \(0, 1\], got 0\.0"),
        ({"top_logprobs": 0}, "top_logprobs must be at least 1, got 0"),
        ({"confidence_alpha": 1.5}, r"confidence_alpha must be in \[0, 1\], got 1\.5"),
        ({"confidence_warmup": -0.1}, r"confidence_warmup must be in \[0, 1\], got -0\.1"),
        ({"keep_fraction": 0.0}, r"keep_fraction must be in \(0, 1\], got 0\.0"),
        ({"min_confidence": math.nan}, "min_confidence must be at most 0, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_burns_values_are_the_defaults(tmp_path: Path) -> None:
    args = config(tmp_path)
    assert (args.variant, args.confidence_alpha, args.confidence_warmup) == ("sft", 0.5, 0.2)
    assert (args.keep_unfinished, args.keep_fraction, args.temperature, args.soft_weight) == (False, None, 1.0, 1.0)


# Variants


@pytest.fixture
def teacher(tmp_path: Path) -> TokenEnsemble:
    return TokenEnsemble.from_adapters(llama(0), saved_adapters(tmp_path / "experts"), [2.5, 1.25, 0.5])


def labels_of(teacher: TokenEnsemble, count: int = 8, **settings: Any) -> Dataset:
    """What a random teacher says, which seldom ends."""
    options: dict[str, Any] = {"question_format": FORMAT, "max_new_tokens": 5, "description": None}
    return teacher.label(questions(count), tokenizer(), **(options | settings))


def variant(folder: Path, answers: Dataset, teacher: TokenEnsemble | None = None, **settings: Any) -> StudentTrainer:
    peft_config = settings.pop("peft_config", None)
    defaults = {"keep_unfinished": True, "per_device_train_batch_size": 3, "num_train_epochs": 2}
    args = config(folder, **(defaults | settings))
    return student(folder, answers=answers, args=args, teacher=teacher, peft_config=peft_config)


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
# With all tokens but one, that one is the rest. A high temperature leaves more to the rest.
@pytest.mark.parametrize(("temperature", "count"), [(1.0, VOCAB - 4), (2.0, VOCAB - 1)])
def test_a_large_cache_makes_the_student_of_the_live_teacher(
    tmp_path: Path, teacher: TokenEnsemble, peft_config: Any, temperature: float, count: int
) -> None:
    cached = labels_of(teacher, top_logprobs=count, top_temperature=temperature)
    bare = cached.remove_columns(["top_token_ids", "top_log_probs", "top_temperature"])
    options: dict[str, Any] = {"variant": "soft", "temperature": temperature, "peft_config": peft_config}
    # Plain gradient descent: Adam makes a step of full length out of a gradient that is hardly there.
    options |= {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 1.0}
    before = logits(llama(1))
    live = logits(variant(tmp_path, bare, teacher, **options).train())
    from_cache = logits(variant(tmp_path, cached, **options).train())
    made_here = logits(variant(tmp_path, bare, teacher, top_logprobs=count, **options).train())
    moved = float((live - before).abs().max())
    assert moved > 0.1
    torch.testing.assert_close(from_cache, live, rtol=0, atol=0.01 * moved)
    torch.testing.assert_close(made_here, from_cache, rtol=0, atol=1e-3 * moved)
    few = logits(variant(tmp_path, cached, top_logprobs=2, **options).train())
    assert not torch.allclose(few, live, rtol=0, atol=0.01 * moved)


def test_the_work_of_a_live_teacher_is_counted(tmp_path: Path, teacher: TokenEnsemble) -> None:
    cached = labels_of(teacher, top_logprobs=4)
    costs = []
    for live in (None, teacher, teacher[:1]):
        trainer = variant(tmp_path, cached, live, variant="soft")
        trainer.train()
        assert trainer.cost is not None
        costs.append((trainer.cost.tokens, trainer.cost.flops))
    (tokens, cached_flops), (with_three, three), (_, one) = costs
    assert tokens == with_three
    assert (three - cached_flops) == pytest.approx(3 * (one - cached_flops))
    # A student's step is a pass and its gradients, a teacher's a pass alone.
    assert cached_flops / 4 < one - cached_flops < cached_flops / 2


def test_a_soft_student_comes_to_its_teachers_distribution(tmp_path: Path, teacher: TokenEnsemble) -> None:
    cached = labels_of(teacher, 4, top_logprobs=VOCAB)
    trained = variant(
        tmp_path, cached, variant="soft", num_train_epochs=150, per_device_train_batch_size=4, learning_rate=1e-2
    ).train()
    for row in cached:
        prompt = FORMAT.prompt(row["prompt"], tokenizer()).ids
        ids = torch.tensor([prompt + row["answer_ids"]])
        with torch.no_grad():
            found = trained(ids).logits[0, len(prompt) - 1 : -1].softmax(-1)
        expected = torch.zeros_like(found)
        tokens, log_probs = torch.tensor(row["top_token_ids"]), torch.tensor(row["top_log_probs"])
        expected.scatter_(-1, tokens, log_probs.exp())
        assert (found - expected).abs().sum(-1).max() < 0.1


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["soft", "live", "confidence"])
def test_one_seed_makes_one_student(tmp_path: Path, teacher: TokenEnsemble, name: str, peft_config: Any) -> None:
    answers = labels_of(teacher, top_logprobs=8)
    live = name == "live"

    def trained(seed: int) -> Tensor:
        kind = "soft" if live else name
        trainer = variant(
            tmp_path, answers, teacher if live else None, variant=kind, seed=seed, peft_config=peft_config
        )
        return logits(trainer.train())

    assert torch.equal(trained(5), trained(5))
    assert not torch.equal(trained(5), trained(6))


@pytest.mark.parametrize(
    "settings", [{"variant": "soft"}, {"variant": "soft", "soft_weight": 0.5}, {"variant": "confidence"}]
)
def test_prompt_padding_and_tokens_without_weight_carry_no_loss(
    tmp_path: Path, teacher: TokenEnsemble, settings: dict[str, Any]
) -> None:
    trainer = variant(tmp_path, labels_of(teacher, 4, top_logprobs=6), **settings)
    lengths = [
        len(ids) - start
        for ids, start in zip(*(trainer._examples[c] for c in ("input_ids", "prompt_length")), strict=True)
    ]
    weights = [np.linspace(0.0, 1.0, length) for length in lengths]
    examples = student_teacher.with_columns(trainer._examples, {"token_weights": weights})
    options = trainer._loss_options()
    kind = options.pop("trainer_class")

    def loss_of(rows: Dataset) -> float:
        collate = AnswerCollator(END)
        inner = kind(model=trainer.model, args=trainer.args, train_dataset=rows, data_collator=collate, **options)
        inner.state.max_steps, inner.state.global_step = 10, 5
        batch = inner.data_collator(list(rows.with_format("numpy")))
        return float(inner.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1.0)).detach())

    # Alone no row is padded.
    assert loss_of(examples) == pytest.approx(sum(loss_of(examples.select([i])) for i in range(4)), rel=1e-4)
    if settings["variant"] == "soft":
        # The first tokens have weight 0: whatever is kept for them is not read.
        broken = [[[0.5] * 6, *row[1:]] for row in examples["top_log_probs"]]
        spoiled = student_teacher.with_columns(examples, {"top_log_probs": broken})
        assert loss_of(spoiled) == loss_of(examples)


def test_soft_and_hard_labels_can_be_mixed(tmp_path: Path, teacher: TokenEnsemble) -> None:
    answers = labels_of(teacher, top_logprobs=8)
    losses = {}
    for share in (1.0, 0.25):
        trainer = variant(tmp_path, answers, variant="soft", soft_weight=share, temperature=1.0)
        options = trainer._loss_options()
        kind, collate = options.pop("trainer_class"), AnswerCollator(END)
        examples = trainer._examples
        inner = kind(model=trainer.model, args=trainer.args, train_dataset=examples, data_collator=collate, **options)
        batch = inner.data_collator(list(trainer._examples.with_format("numpy")))
        losses[share] = float(inner.compute_loss(trainer.model, batch).detach())
    plain = AnswerCollator(END)(list(trainer._examples))
    mask = next_token_mask(plain["labels"])
    with torch.no_grad():
        predicted = llama(1)(plain["input_ids"], attention_mask=plain["attention_mask"]).logits[mask]
    hard = float(torch.nn.functional.cross_entropy(predicted, plain["labels"][:, 1:][mask[:, :-1]]))
    assert losses[0.25] == pytest.approx(0.25 * losses[1.0] + 0.75 * hard, rel=1e-4)


def test_the_students_certainty_counts_more_and_more(
    tmp_path: Path, teacher: TokenEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    plain = student_losses.confidence_loss

    def recorded(predictions: Any, answers: Any, alpha: float) -> Tensor:
        seen.append(alpha)
        return plain(predictions, answers, alpha)

    monkeypatch.setattr(student_losses, "confidence_loss", recorded)
    answers = labels_of(teacher, 8)
    options = {"variant": "confidence", "per_device_train_batch_size": 4, "num_train_epochs": 5}
    trained = variant(tmp_path, answers, confidence_alpha=0.6, **options).train()
    assert seen == pytest.approx([0.0, 0.3] + [0.6] * 8)
    without = variant(tmp_path, answers, confidence_alpha=0.0, **options).train()
    sft = variant(tmp_path, answers, **(options | {"variant": "sft"})).train()
    assert torch.equal(logits(without), logits(sft))
    assert not torch.allclose(logits(trained), logits(sft), atol=1e-3)


def test_a_soft_student_is_trained_on_the_tokens_that_the_teacher_chose(tmp_path: Path, teacher: TokenEnsemble) -> None:
    answers = labels_of(teacher, 3, top_logprobs=8)
    trainer = variant(tmp_path, answers, variant="soft")
    for example, row in zip(trainer._examples, answers, strict=True):
        assert example["input_ids"][example["prompt_length"] :] == row["answer_ids"]
        # As text the same answer is cut into other tokens.
        assert FORMAT.answer_ids(row["answer"], tokenizer()) != row["answer_ids"]


def test_a_student_with_another_kind_of_head_learns_the_same(tmp_path: Path, teacher: TokenEnsemble) -> None:
    answers = labels_of(teacher, 6, top_logprobs=8)
    options: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "keep_unfinished": True}
    for settings in ({"variant": "soft"}, {"variant": "confidence", "confidence_warmup": 0.0}):
        args = config(tmp_path, **options, **settings)
        plain = student(tmp_path, llama(1), answers, args=args)
        biased_model = llama(1)
        biased_model.lm_head.bias = nn.Parameter(torch.zeros(VOCAB), requires_grad=False)
        biased = student(tmp_path, biased_model, answers, args=args)
        torch.testing.assert_close(logits(plain.train()), logits(biased.train()), rtol=0, atol=1e-4)


class Killed(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


@pytest.mark.parametrize("live", [False, True], ids=["cache", "live"])
def test_a_killed_soft_student_goes_on_only_with_the_same_teacher(
    tmp_path: Path, teacher: TokenEnsemble, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    other = teacher.reweighted([1.0, 5.0, 1.0])
    answers = labels_of(teacher, 8, top_logprobs=8)
    # The same tokens: nothing but their distributions differs.
    answers_of = {
        False: answers,
        True: cache_teacher(other, answers, tokenizer(), top_logprobs=8, question_format=FORMAT),
    }

    def trained(folder: str, changed: bool = False) -> Tensor:
        ensemble = (other if changed else teacher) if live else None
        options: dict[str, Any] = {"variant": "soft", "save_strategy": "steps", "save_steps": 1}
        data = answers_of[changed and not live]
        return logits(variant(tmp_path / folder, data, ensemble, **options).train())

    def dying(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 3:
            raise Killed
        return own(self, *args, **kwargs)

    whole, changed = trained("whole"), trained("changed", True)
    own = student_losses.SoftTrainer.training_step
    for folder in ("killed", "taken over"):
        with monkeypatch.context() as patch:
            patch.setattr(student_losses.SoftTrainer, "training_step", dying)
            with pytest.raises(Killed):
                trained(folder)
    assert torch.equal(trained("killed"), whole)
    assert torch.equal(trained("taken over", True), changed)
    assert not torch.equal(whole, changed)


@pytest.mark.parametrize("name", ["soft", "live", "confidence"])
def test_students_train_in_mixed_precision(tmp_path: Path, teacher: TokenEnsemble, name: str) -> None:
    ensemble, kind = (teacher, "soft") if name == "live" else (None, name)
    options: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.01, "num_train_epochs": 1}
    options |= {"confidence_warmup": 0.0} if name == "confidence" else {}
    answers = labels_of(teacher, 16, top_logprobs=8)
    before = torch.cat([weight.detach().flatten() for weight in llama(1).parameters()])

    def update(bf16: bool) -> Tensor:
        trained = variant(tmp_path, answers, ensemble, variant=kind, bf16=bf16, **options).train()
        return torch.cat([weight.detach().flatten() for weight in trained.parameters()]) - before

    exact, mixed = update(False), update(True)
    assert not torch.equal(exact, mixed)
    # Rounding changes which token the student is surest of, here and there, and with it what that token's loss is.
    least = 0.9 if name == "confidence" else 0.98
    assert torch.nn.functional.cosine_similarity(exact, mixed, dim=0) > least


# What a soft student refuses


def shuffled_tokenizer() -> Any:
    """The same letters under other numbers."""
    vocabulary = {"<pad>": 0, "<end>": 1, **{letter: i + 2 for i, letter in enumerate(reversed(LETTERS))}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


def test_a_soft_student_needs_its_teachers_tokenizer(tmp_path: Path, teacher: TokenEnsemble) -> None:
    answers = labels_of(teacher, 3, top_logprobs=4)
    args = config(tmp_path, variant="soft", keep_unfinished=True)
    message = r"id q0: the student's tokenizer reads the teacher's tokens as .*variant=\"sft\""
    with pytest.raises(ValueError, match=message):
        StudentTrainer(llama(1), args, answers, shuffled_tokenizer(), question_format=FORMAT)
    # Text is text: the other variants don't mind.
    StudentTrainer(
        llama(1), config(tmp_path, keep_unfinished=True), answers, shuffled_tokenizer(), question_format=FORMAT
    )


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    larger = TokenEnsemble.from_models([llama(0, vocab_size=VOCAB + 8)], [1.0])
    message = f"teacher has a vocabulary of {VOCAB + 8} tokens, the student one of {VOCAB}"
    with pytest.raises(ValueError, match=message):
        student(tmp_path, args=config(tmp_path, variant="soft"), teacher=larger)


def test_a_soft_student_needs_a_teacher_that_speaks_in_probabilities(tmp_path: Path, teacher: TokenEnsemble) -> None:
    with pytest.raises(
        ValueError, match=r"needs the teacher's distributions: pass teacher=ensemble, or .*top_logprobs=k"
    ):
        student(tmp_path, args=config(tmp_path, variant="soft"))
    teacher.config.combine = "vote"
    with pytest.raises(ValueError, match=r'"vote" gives one token all the probability'):
        student(tmp_path, args=config(tmp_path, variant="soft"), teacher=teacher)
    for name in ("sft", "confidence"):
        with pytest.raises(ValueError, match=f"teacher is for variant=\"soft\", not for '{name}'"):
            student(tmp_path, args=config(tmp_path, variant=name), teacher=teacher)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda row: {}, {"temperature": 2.0}, r"written at temperature 1\.0, the student is to learn at 2\.0"),
        (lambda row: {}, {"top_logprobs": 9}, "top_logprobs=9, but the cache in train_dataset keeps 4 tokens"),
        (lambda row: {"top_log_probs": row["top_log_probs"][1:]}, {}, r"row 0: top_token_ids .* \(5, 4\) and \(4, 4\)"),
        (
            lambda row: {"top_log_probs": [r[1:] for r in row["top_log_probs"]]}, {},
            r"row 0: .* have shapes \(5, 4\) and \(5, 3\), expected \(5, 4\)",
        ),
    ],
    ids=["temperature", "too-few", "a-token-missing", "ragged"],
)  # fmt: skip
def test_a_cache_that_does_not_fit_is_refused(
    tmp_path: Path, teacher: TokenEnsemble, change: Any, settings: dict[str, Any], message: str
) -> None:
    answers = labels_of(teacher, 3, top_logprobs=4).map(change)
    with pytest.raises(ValueError, match=message):
        variant(tmp_path, answers, variant="soft", **settings)


@pytest.mark.parametrize("column", ["answer_ids", "top_token_ids", "top_temperature"])
def test_a_cache_without_one_of_its_columns_is_refused(tmp_path: Path, teacher: TokenEnsemble, column: str) -> None:
    answers = labels_of(teacher, 3, top_logprobs=4).remove_columns(column)
    with pytest.raises(ValueError, match=f"train_dataset has no column '{column}': a cache of a teacher has"):
        variant(tmp_path, answers, variant="soft")


# Saving


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_saved_student_comes_back_bit_for_bit(tmp_path: Path, peft_config: Any) -> None:
    source = str(saved_model(tmp_path / "model", seed=1, num_hidden_layers=3))
    settings: dict[str, Any] = {"keep_layers": "0,2"}
    trainer = student(tmp_path, source, peft_config=peft_config, model_init_kwargs=settings)
    trained = trainer.train()
    trainer.save_model(tmp_path / "student")
    again = load_trained(tmp_path / "student", source, **settings)
    assert isinstance(again, PeftModel) is (peft_config is not None)
    assert torch.equal(logits(again), logits(trained))
    assert not any(module.training for module in again.modules())
    assert (tmp_path / "student" / "model.safetensors").exists() is (peft_config is None)
    cost = json.loads((tmp_path / "student" / "cost.json").read_text())
    assert cost.keys() == {"seconds", "tokens", "flops"}
    assert cost["tokens"] == trainer.cost.tokens
    assert not list((tmp_path / "student").rglob("*.bin"))
    # The folder is a model source of its own, as far as its tokenizer goes.
    other = StudentTrainer(source, config(tmp_path), pseudo_answers(), question_format=FORMAT)
    assert other.processing_class.get_vocab() == trainer.processing_class.get_vocab()


def test_an_adapter_needs_the_model_it_was_trained_on(tmp_path: Path) -> None:
    trainer = student(tmp_path, peft_config=lora())
    trainer.train()
    trainer.save_model(tmp_path / "student")
    with pytest.raises(ValueError, match="holds an adapter: name the model it was trained on as `source`"):
        load_trained(tmp_path / "student")


def test_a_folder_without_a_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no model weights"):
        load_trained(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_save_that_fails_leaves_the_earlier_student_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    first = student(tmp_path)
    kept = logits(first.train())
    first.save_model(tmp_path / "student")
    second = student(tmp_path, llama(2))
    second.train()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(second.processing_class, "save_pretrained", fail)
    with pytest.raises(DiskFullError if isinstance(error, OSError) else KeyboardInterrupt):
        second.save_model(tmp_path / "student")
    assert torch.equal(logits(load_trained(tmp_path / "student")), kept)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_student_is_trained_once_and_saved_after_that(tmp_path: Path) -> None:
    trainer = student(tmp_path, peft_config=lora())
    with pytest.raises(RuntimeError, match=r"not trained yet: call train\(\)"):
        trainer.save_model(tmp_path / "student")
    assert not (tmp_path / "student").exists()
    trainer.train()
    with pytest.raises(RuntimeError, match="trained already"):
        trainer.train()


def test_a_student_that_is_there_already_is_replaced_with_a_warning_only(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as first:
        warnings.simplefilter("always")
        student(tmp_path, peft_config=lora()).train()
    assert not any("holds a student already" in str(one.message) for one in first)
    with pytest.warns(UserWarning, match=f"{tmp_path} holds a student already, which this one will replace"):
        student(tmp_path, peft_config=lora()).train()


# What train() leaves


def test_a_trained_student_lies_in_the_output_folder(tmp_path: Path) -> None:
    trainer = student(tmp_path / "run", args=config(tmp_path / "run", save_strategy="steps", save_steps=1))
    trained = trainer.train()
    assert torch.equal(logits(load_trained(tmp_path / "run")), logits(trained))
    assert (tmp_path / "run/tokenizer.json").exists() and not (tmp_path / "run/checkpoints").exists()
    other = student(tmp_path / "run", args=config(tmp_path / "run", learning_rate=1e-3))
    assert torch.equal(logits(other.train()), logits(load_trained(tmp_path / "run")))
    elsewhere = student(tmp_path, args=config(tmp_path / "unused"))
    elsewhere.train(save_to=tmp_path / "named")
    assert load_trained(tmp_path / "named") and not (tmp_path / "unused/config.json").exists()
    elsewhere.save_model()
    assert (tmp_path / "unused/config.json").exists()


def test_another_model_in_the_output_folder_is_found_before_training(tmp_path: Path) -> None:
    saved_model(tmp_path / "mine")
    trainer = student(tmp_path, args=config(tmp_path / "mine"))
    with pytest.raises(FileExistsError, match=r"mine/config.json is in the way of the student"):
        trainer.train()
    assert trainer.cost is None


def test_an_unknown_confidence_is_not_confident(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "answer": "ab", "confidence": value} for i, value in enumerate([-1.0, None, -2.0])]
    assert usable_answers(rows, min_confidence=-1.5)["prompt"] == ["q0"]
    assert usable_answers(Dataset.from_list(rows).to_pandas(), keep_fraction=1.0)["prompt"] == ["q0", "q2"]


# What reaches transformers' trainer


VARIANTS = [{}, {"variant": "confidence"}, {"variant": "soft"}, {"variant": "soft", "top_logprobs": 3}]


@pytest.mark.parametrize("settings", VARIANTS)
def test_every_variant_is_evaluated_by_the_same_loss(tmp_path: Path, settings: dict[str, Any]) -> None:
    seen = Watch()
    args = config(tmp_path, eval_strategy="epoch", per_device_eval_batch_size=3, **settings)
    teacher = TokenEnsemble.from_models([llama(2), llama(3)], [1.0, 1.0]) if settings.get("variant") == "soft" else None
    asked = questions(7, seed=8, start=50)
    model = student(tmp_path, args=args, teacher=teacher, eval_dataset=asked, callbacks=[seen]).train()
    examples = tokenize_questions(asked, tokenizer(), FORMAT)
    scores = score_examples(model, examples, pad_token_id=tokenizer().eos_token_id)
    assert [loss for _, loss in seen.losses] == [pytest.approx(-float(scores.token_log_probs.mean()), rel=1e-4)]


def test_an_optimizer_trains_the_model_that_it_was_made_for(tmp_path: Path) -> None:
    model = llama(1)
    before = [p.detach().clone() for p in model.parameters()]
    student(tmp_path, model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None)).train()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer = torch.optim.SGD(llama(1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizers holds an optimizer of weights that are there already"):
        student(tmp_path, peft_config=lora(), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="optimizers holds weights that are not the model's"):
        student(tmp_path, llama(2), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="eval_dataset"):
        student(tmp_path, args=config(tmp_path, eval_strategy="epoch"))
