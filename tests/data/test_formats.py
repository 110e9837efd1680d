"""How a question becomes tokens is told by a `QuestionFormat`, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ensemw2s import (
    BoostingConfig,
    BoostingTrainer,
    CoBoostingTrainer,
    StrongModel,
    StudentConfig,
    StudentTrainer,
    TokenEnsemble,
    rate_difficulty,
    score_answers,
    to_prompt_completion,
    tokenize_questions,
)
from ensemw2s.inference.choices import ChoiceSettings
from ensemw2s.inference.labelling import LabelSettings
from ensemw2s.student.teacher import cache_teacher
from tests.tiny import llama, questions, tokenizer


def taking_formats(folder: Path) -> list[Callable[[Any], Any]]:
    model, rows = llama(), questions(12)
    ensemble = TokenEnsemble.from_models([model], [1.0])
    boosting = BoostingConfig(output_dir=str(folder), recipe="co_boosted")
    strong = StrongModel(model, StudentConfig(output_dir=str(folder), relabel="cross_fit"), tokenizer())
    given: dict[str, Any] = {"processing_class": tokenizer()}
    return [
        lambda own: BoostingTrainer(model, BoostingConfig(output_dir=str(folder)), rows, question_format=own, **given),
        lambda own: CoBoostingTrainer(
            model, strong, boosting, rows, questions(4, start=100), question_format=own, **given
        ),
        lambda own: StudentTrainer(model, StudentConfig(output_dir=str(folder)), rows, question_format=own, **given),
        lambda own: ensemble.label(rows, tokenizer(), question_format=own),
        lambda own: setattr(ensemble, "question_format", own),
        lambda own: score_answers(model, rows, tokenizer(), question_format=own),
        lambda own: rate_difficulty(model, rows, BoostingConfig(output_dir=str(folder)), question_format=own, **given),
        lambda own: tokenize_questions(rows, tokenizer(), own),
        ChoiceSettings,
        LabelSettings,
        lambda own: to_prompt_completion(rows, own),
        lambda own: cache_teacher(ensemble, rows, tokenizer(), top_logprobs=2, question_format=own),
    ]


def test_a_text_is_no_format_wherever_one_is_taken(tmp_path: Path) -> None:
    message = (
        r"question_format is '\{prompt\}=', expected a QuestionFormat: give QuestionFormat\(prompt_template='\{pro"
    )
    for take in taking_formats(tmp_path):
        with pytest.raises(TypeError, match=message):
            take("{prompt}=")
        with pytest.raises(TypeError, match=r"question_format is \{'prompt_template'"):
            take({"prompt_template": "{prompt}="})
        with pytest.raises(TypeError, match="question_format is '', expected"):
            take("")
