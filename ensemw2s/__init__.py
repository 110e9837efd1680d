"""EnsemW2S: token-level boosting of weak language-model experts, and stronger students taught by their ensemble.

Names are loaded on first use, so that `ensemw2s.ops` and `ensemw2s.boosting` work without transformers or datasets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "BoostingConfig": "recipes",
    "BoostingTrainer": "trainer",
    "EnsembleConfig": "ensemble",
    "TokenEnsemble": "ensemble",
    "StudentConfig": "student",
    "StudentTrainer": "student",
    "rate_difficulty": "difficulty",
    "split_by_difficulty": "difficulty",
    "QuestionFormat": "data",
    "exclude_questions": "data",
    "load_questions": "data",
    "split_questions": "data",
    "tokenize_questions": "data",
    "load_model": "models",
    "load_tokenizer": "models",
    "score_answers": "scoring",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from ensemw2s.data import QuestionFormat as QuestionFormat
    from ensemw2s.data import exclude_questions as exclude_questions
    from ensemw2s.data import load_questions as load_questions
    from ensemw2s.data import split_questions as split_questions
    from ensemw2s.data import tokenize_questions as tokenize_questions
    from ensemw2s.difficulty import rate_difficulty as rate_difficulty
    from ensemw2s.difficulty import split_by_difficulty as split_by_difficulty
    from ensemw2s.ensemble import EnsembleConfig as EnsembleConfig
    from ensemw2s.ensemble import TokenEnsemble as TokenEnsemble
    from ensemw2s.models import load_model as load_model
    from ensemw2s.models import load_tokenizer as load_tokenizer
    from ensemw2s.recipes import BoostingConfig as BoostingConfig
    from ensemw2s.scoring import score_answers as score_answers
    from ensemw2s.student import StudentConfig as StudentConfig
    from ensemw2s.student import StudentTrainer as StudentTrainer
    from ensemw2s.trainer import BoostingTrainer as BoostingTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ensemw2s' has no attribute {name!r}")
    return getattr(import_module(f"ensemw2s.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
