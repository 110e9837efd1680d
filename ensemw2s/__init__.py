"""EnsemW2S: token-level boosting of weak language-model experts, and stronger students taught by their ensemble.

Names are loaded on first use, so that `ensemw2s.ops` and `ensemw2s.boosting` work without transformers or datasets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "BoostingConfig": "boosting.config",
    "BoostingTrainer": "boosting.trainer",
    "EnsembleConfig": "ensemble.config",
    "TokenEnsemble": "ensemble.model",
    "StudentConfig": "student.trainer",
    "with_gold": "student.answers",
    "StudentTrainer": "student.trainer",
    "CoBoostingTrainer": "experiments.co_boosting",
    "StrongModel": "experiments.co_boosting",
    "LabellingConfig": "experiments.config",
    "rate_difficulty": "experiments.rating",
    "split_by_difficulty": "data.difficulty",
    "QuestionFormat": "data.tokens",
    "check_questions": "data.questions",
    "exclude_questions": "data.questions",
    "load_questions": "data.questions",
    "split_questions": "data.questions",
    "to_prompt_completion": "data.tokens",
    "tokenize_questions": "data.tokens",
    "load_model": "models.loading",
    "load_tokenizer": "models.loading",
    "Sampling": "inference.decoding",
    "score_answers": "inference.measuring",
    "OnlineWeights": "online.weights",
    "answer_log_probs": "online.feedback",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from ensemw2s.boosting.config import BoostingConfig as BoostingConfig
    from ensemw2s.boosting.trainer import BoostingTrainer as BoostingTrainer
    from ensemw2s.data.difficulty import split_by_difficulty as split_by_difficulty
    from ensemw2s.data.questions import check_questions as check_questions
    from ensemw2s.data.questions import exclude_questions as exclude_questions
    from ensemw2s.data.questions import load_questions as load_questions
    from ensemw2s.data.questions import split_questions as split_questions
    from ensemw2s.data.tokens import QuestionFormat as QuestionFormat
    from ensemw2s.data.tokens import to_prompt_completion as to_prompt_completion
    from ensemw2s.data.tokens import tokenize_questions as tokenize_questions
    from ensemw2s.ensemble.config import EnsembleConfig as EnsembleConfig
    from ensemw2s.ensemble.model import TokenEnsemble as TokenEnsemble
    from ensemw2s.experiments.co_boosting import CoBoostingTrainer as CoBoostingTrainer
    from ensemw2s.experiments.co_boosting import StrongModel as StrongModel
    from ensemw2s.experiments.config import LabellingConfig as LabellingConfig
    from ensemw2s.experiments.rating import rate_difficulty as rate_difficulty
    from ensemw2s.inference.decoding import Sampling as Sampling
    from ensemw2s.inference.measuring import score_answers as score_answers
    from ensemw2s.models.loading import load_model as load_model
    from ensemw2s.models.loading import load_tokenizer as load_tokenizer
    from ensemw2s.online.feedback import answer_log_probs as answer_log_probs
    from ensemw2s.online.weights import OnlineWeights as OnlineWeights
    from ensemw2s.student.answers import with_gold as with_gold
    from ensemw2s.student.trainer import StudentConfig as StudentConfig
    from ensemw2s.student.trainer import StudentTrainer as StudentTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ensemw2s' has no attribute {name!r}")
    return getattr(import_module(f"ensemw2s.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
