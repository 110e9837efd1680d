"""A first configuration: a file of questions and two models become a commented YAML file that runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from ensemw2s.data.difficulty import DifficultySplit, split_by_difficulty
from ensemw2s.data.questions import exclude_questions, load_questions
from ensemw2s.data.tokens import QuestionFormat
from ensemw2s.experiments.config import DifficultyConfig, build_config, merge_settings
from ensemw2s.models.loading import require_source
from ensemw2s.runtime.files import new_file
from ensemw2s.runtime.parsing import parse_yaml

if TYPE_CHECKING:
    from datasets import Dataset

# Of the easy and of the hard questions, the share of each split.
_EASY = {"train": 0.6, "validation": 0.15, "test_id": 0.25}
_HARD = {"unlabelled": 0.6, "test_ood": 0.4}
_FEWEST = 20
# The two halves of a source that is rated first may miss their share by a tenth of all questions.
_SURE_SHARE = 0.4
_FOLDS = 5


def write_configuration(
    path: Path,
    questions: str,
    weak: str,
    strong: str,
    hard: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> None:
    """Write a configuration for one's own questions and models.

    Args:
        path: the new YAML file.
        questions: a file for `load_questions` with columns `prompt` and `answer`; the easy ones, if `hard` is given.
            Otherwise its questions are split by their column `difficulty`, or by how hard the weak model finds them.
        weak: the experts' model, a source of `ensemw2s.load_model`.
        strong: the student's.
        hard: a file of hard questions with their answers, which only measuring reads.
        columns: what our columns are called in the files, where they have other names.

    Raises:
        FileExistsError: `path` is there already.
        FileNotFoundError: a file of questions or a model is not there.
        ValueError: bad questions, too few of them, or a `difficulty` that is the same for all.
    """
    if path.exists():
        raise FileExistsError(f"{path} is there already and stays as it is: name another file, or move it away")
    renamed = {} if columns is None else {"columns": dict(columns)}
    easy = load_questions({"file": questions, **renamed})
    answers = list(easy["answer"])
    share, cut = 0.5, None
    if hard is not None:
        others = exclude_questions(load_questions({"file": hard, **renamed}), [easy])
        counts = {"easy": len(easy), "hard": len(others)}
        answers += others["answer"]
    elif "difficulty" in easy.column_names:
        share, cut = _cut_near_the_middle(easy)
        counts = {"easy": len(cut.easy), "hard": len(cut.hard)}
    else:
        counts = dict.fromkeys(("easy", "hard"), int(_SURE_SHARE * len(easy)))
    for kind, count in counts.items():
        if count < _FEWEST:
            raise ValueError(
                f"{hard if kind == 'hard' and hard else questions} leaves {count} {kind} questions, expected at least "
                f"{_FEWEST}, to learn from and to measure with: add some"
            )
    for source in (weak, strong):
        require_source(source)
    sizes = {split: int(share * counts["easy"]) for split, share in _EASY.items()}
    sizes |= {split: int(share * counts["hard"]) for split, share in _HARD.items()}
    # Models of characters are made on lines such as `dig=gid`, and hardly learn what looks otherwise.
    of_characters = any(source.startswith("scratch:") for source in (weak, strong))
    asked = QuestionFormat("{prompt}=", "") if of_characters else QuestionFormat()
    template = Environment(
        loader=PackageLoader("ensemw2s.experiments"), undefined=StrictUndefined, keep_trailing_newline=True
    ).get_template("config.yaml")  # fmt: skip
    longest = max(map(len, answers))
    text = template.render(
        file=path, name=re.sub(r"\W", "_", path.stem.lower(), flags=re.ASCII), weak=weak, strong=strong,
        lora=not weak.startswith("scratch:"), format=asked, questions={"file": questions, **renamed},
        hard=hard and {"file": hard, **renamed}, sizes=sizes, longest=longest,
        share=share, cut=cut and cut.record, folds=_FOLDS,
        # A token has one character at least, nearly always, and the end is a token. So is what stands in front of the
        # answer, and hard answers may be longer.
        max_new_tokens=min(len(asked.answer_prefix) + longest + longest // 2 + 1, 256),
    )  # fmt: skip
    settings = parse_yaml(text, str(path))
    small = settings.pop("quick")
    for written in (settings, merge_settings(settings, small)):
        build_config(written)
    with new_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _cut_near_the_middle(questions: Dataset) -> tuple[float, DifficultySplit]:
    """Return the share of easy questions to ask for, and what it gives.

    A scale of few values may have no cut near the middle: then the nearest one is asked for.
    """
    try:
        nearest = split_by_difficulty(questions, tolerance=1.0).record["easy_share"]
    except ValueError as error:
        raise ValueError(f"{error}. Without a column `difficulty` the questions are rated by weak models") from error
    usual = DifficultyConfig()
    share = min(max(round(nearest, 2), 0.01), 0.99)
    if abs(nearest - usual.easy) <= usual.tolerance:
        share = usual.easy
    return share, split_by_difficulty(questions, share, round(1 - share, 2))
