"""The student: what it trains on, and that it comes back from disk bit for bit."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from ensemw2s import TokenEnsemble
from ensemw2s.data import QuestionFormat, tokenize_questions
from ensemw2s.files import DiskFullError
from ensemw2s.models import load_model
from ensemw2s.scoring import score_answers
from ensemw2s.student import StudentConfig, StudentTrainer, load_trained, usable_answers
from ensemw2s.training import fine_tune
from tests.tiny import END, FORMAT, VOCAB, llama, lora, questions, saved_model, tokenizer

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
    assert score_answers(llama(1), examples, pad_token_id=END).accuracy == 0
    assert score_answers(trained, examples, pad_token_id=END).accuracy == 1
    truth = tokenize_questions(questions(6), tokenizer(), FORMAT)
    assert score_answers(trained, truth, pad_token_id=END).accuracy == 0


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
    assert usable_answers(answers, min_confidence=-1.5)["id"] == ["q0", "q1", "q2", "q3", "q5", "q6"]
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
            "none of the 1 answers .*: 0 are empty, 0 were cut off .*, 1 are not confident",
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
    with pytest.raises(ValueError, match=r"min_confidence is a mean log-probability and at most 0, got 0.8"):
        config(tmp_path, min_confidence=0.8)


def test_a_model_from_nowhere_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processing_class is missing"):
        StudentTrainer(llama(1), config(tmp_path), pseudo_answers())


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
