"""Answers re-made by students of folds: each question is put to a student that never saw a label for it.

A student of some answers repeats their errors where it learned them. One that was trained on the other answers alone
(cross-fitting) does not know these errors, and has another bias than the teacher: where the two agree, an answer is far
more often right [choice: ours, no part of the paper].
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemw2s.data.answers import exact_match
from ensemw2s.data.difficulty import assign_folds
from ensemw2s.data.tokens import QuestionFormat, answer_lengths
from ensemw2s.inference.label_files import TOP_COLUMNS, read_labels
from ensemw2s.runtime import processes
from ensemw2s.runtime.accounts import check
from ensemw2s.runtime.claims import Kind, claimed
from ensemw2s.runtime.console import no_model_bars
from ensemw2s.runtime.files import new_folder, read_json, settle, write_json, write_json_lines
from ensemw2s.runtime.meter import Ledger, total
from ensemw2s.student.answers import gold_rows
from ensemw2s.student.teacher import with_columns
from ensemw2s.training.checkpoints import discard_checkpoints
from ensemw2s.training.fine_tune import TrainingCost

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ensemw2s.ensemble.model import TokenEnsemble

RELABELLING = Kind("relabelling", "a relabelling", ("round-*", "answers.jsonl"))
FOLDER, RESULT_FILE = "relabel", "answers.jsonl"
# With fewer answers that agree, agreement says that two models have little in common [choice].
LEAST_SHARE, LEAST_ROWS = 0.2, 32
# What of a labelled row describes its answer, and what describes the teacher that gave it.
_OF_ANSWER = ("answer", "answer_ids", "num_tokens", "finished", "confidence")
_OF_TEACHER = ("agreement", "expert_agreement", *TOP_COLUMNS, "top_temperature")


@dataclass(frozen=True)
class FoldStudents:
    """How the students of folds are made and asked; all processes make the same calls.

    Attributes:
        args: the settings of the student that all of them are like (a `StudentConfig`).
        teach: trains a fresh student; called with answers, their number in a plain training, arguments that have the
            fold's own seed, and what to show beside the progress bar. Returns the student and its cost.
        load: returns a student that was saved in a folder, as an ensemble of one.
        processing_class: the student's tokenizer.
        question_format: how a question becomes tokens.
        max_new_tokens: the longest answer that a fold's student may give.
        falls_back: whether too few answers that agree are worth no more than all.
        replaces: whether an answer can take the place of the teacher's, which a cache of the teacher forbids.
        name: what the whole training is called beside progress bars and in warnings.
    """

    args: Any
    teach: Callable[[Dataset, Any, str], tuple[Any, TrainingCost]]
    load: Callable[[Path], TokenEnsemble]
    processing_class: PreTrainedTokenizerBase
    question_format: QuestionFormat
    max_new_tokens: int
    falls_back: bool
    replaces: bool
    name: str

    @property
    def folder(self) -> Path:
        """Return where everything is kept."""
        return Path(str(self.args.output_dir)) / FOLDER

    def relabel(self, answers: Dataset, description: Mapping[str, Any]) -> tuple[Dataset, list[TrainingCost]]:
        """Judge all answers but gold ones in `args.relabel_rounds` rounds, or read what an earlier call has found.

        Args:
            answers: the rows that a plain student would be trained on.
            description: what decides the result, as plain JSON; a folder of another description is refused.

        Returns:
            `answers` with the columns `teacher_answer` (text), `agrees` and `kept` (bool), and `answer` replaced where
            `relabel_keep` says so; and what each student, and its answering, took.
        """
        given = {"teacher_answer": list(answers["answer"]), "agrees": [True] * len(answers)}
        judged = with_columns(answers, given | {"kept": [True] * len(answers)})
        costs: list[TrainingCost] = []
        with claimed(self.folder, RELABELLING, description):
            for number in range(1, self.args.relabel_rounds + 1):
                judged, spent = self._round(number, judged)
                costs += spent
            processes.on_main(self._keep, judged)
        return judged, costs

    def _round(self, number: int, judged: Dataset) -> tuple[Dataset, list[TrainingCost]]:
        """Put each question that is left to a student of the other folds, and act on what it says."""
        answers = judged.select(np.flatnonzero(judged["kept"]))
        seeds = np.random.SeedSequence(self.args.seed, spawn_key=(number,)).generate_state(1 + self.args.relabel_folds)
        asked = np.flatnonzero(~gold_rows(answers))
        # Gold answers belong to no fold: every student learns them, none is asked.
        fold = np.full(len(answers), -1)
        fold[asked] = assign_folds(answers.select(asked), self.args.relabel_folds, int(seeds[0]))
        made: dict[str, Mapping[str, Any]] = {}
        costs: list[TrainingCost] = []
        for index in range(self.args.relabel_folds):
            rows, spent = self._ask(number, index, answers, fold, int(seeds[1 + index]))
            made |= {row["id"]: row for row in rows}
            costs += spent
        return self._decided(judged, [made.get(row_id) for row_id in judged["id"]]), costs

    def _ask(
        self, number: int, index: int, answers: Dataset, fold: np.ndarray, seed: int
    ) -> tuple[list[dict[str, Any]], list[TrainingCost]]:
        """Return what the student of all folds but one answers to that one's questions, made or found."""
        place, name = self.folder / f"round-{number}", f"fold-{index + 1}"
        student, file, done = place / name, place / f"{name}.jsonl", place / f"{name}.json"
        shown = f"{self.name}: fold {index + 1} of {self.args.relabel_folds}, round {number}"
        if not processes.on_main(student.exists):
            args = copy.copy(self.args)
            args.seed, args.output_dir = seed, str(self.folder)
            trained, cost = self.teach(answers.select(np.flatnonzero(fold != index)), args, shown)
            processes.on_main(_keep_student, student, trained, cost)
        processes.on_main(check, student)
        processes.on_main(discard_checkpoints, self.folder)
        if not processes.on_main(done.exists):
            spent = self._label(student, answers.select(np.flatnonzero(fold == index)), file, shown)
            processes.on_main(settle, file)
            processes.on_main(write_json, done, spent)
        processes.on_main(check, file)
        costs = [TrainingCost(**processes.on_main(read_json, cost)) for cost in (student / "cost.json", done)]
        return processes.on_main(read_labels, file), costs

    def _label(self, student: Path, answers: Dataset, file: Path, shown: str) -> dict[str, Any]:
        """Let a saved student answer greedily, rows going into `file`; return what it took."""
        questions = answers.select_columns([n for n in ("id", "prompt", "choices") if n in answers.column_names])
        ledger = Ledger(file.with_suffix(".costs.jsonl"))
        with ledger.running():
            self.load(student).label(
                questions,
                self.processing_class,
                question_format=self.question_format,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.args.per_device_eval_batch_size,
                output_file=file,
                description=None if self.args.disable_tqdm else f"{shown}: answering",
            )
            ledger.note(file)
            spent = processes.on_main(ledger.total)
        return {name: spent[name] for name in ("seconds", "tokens", "flops")}

    def _decided(self, judged: Dataset, found: list[Mapping[str, Any] | None]) -> Dataset:
        """Return the rows with what students of folds (None: was not asked) lead to."""
        asked = np.array([row is not None for row in found])
        said = [row["answer"] if row is not None and row["finished"] else "" for row in found]
        usable = np.array([bool(text.strip()) for text in said])
        same = exact_match(said, judged["answer"]) & usable
        agrees = np.where(asked, same, judged["agrees"])
        if self.args.relabel_keep == "agree" and self._is_enough(int(same.sum()), int(asked.sum())):
            kept = np.where(asked, same, judged["kept"])
            return with_columns(judged, {"agrees": agrees.tolist(), "kept": kept.tolist()})
        judged = with_columns(judged, {"agrees": agrees.tolist()})
        return _replaced(judged, found, usable.tolist()) if self.replaces else judged

    def _is_enough(self, same: int, asked: int) -> bool:
        """Say whether so many answers agree that they can stand for all, and warn if not."""
        if enough_agree(same, asked) or not self.falls_back:
            return True
        if processes.is_main():
            instead = "those of the folds' students" if self.replaces else "the teacher's, as they are"
            warnings.warn(
                f"{self.name}: {same} of {asked} answers agree with those of the folds' students, and "
                f'relabel_keep="agree" needs {enough_in_words()}: all answers are used, '
                f"{instead}. Where teacher and student hardly agree, they have not learned the task, or there are too "
                "few questions",
                stacklevel=2,
            )
        return False

    def _keep(self, judged: Dataset) -> None:
        """Write for a reader which answers were kept and which were replaced."""
        names = [
            name for name in ("id", "answer", "teacher_answer", "agrees", "kept", "gold") if name in judged.column_names
        ]
        write_json_lines(self.folder / RESULT_FILE, list(judged.select_columns(names)))


def enough_agree(same: int, asked: int) -> bool:
    """Say whether so many of the answers that were judged agree that they can stand for all."""
    return same >= LEAST_ROWS and same >= LEAST_SHARE * asked


def enough_in_words() -> str:
    """Return how many answers `enough_agree` asks for."""
    return f"at least {LEAST_ROWS} and {LEAST_SHARE:.0%}"


def _keep_student(folder: Path, trained: Any, cost: TrainingCost) -> None:
    with new_folder(folder) as aside, no_model_bars():
        trained.save_pretrained(aside)
        write_json(aside / "cost.json", asdict(cost))


def _replaced(judged: Dataset, found: list[Mapping[str, Any] | None], usable: list[bool]) -> Dataset:
    """Return the rows with the answers of folds' students in place of those before, where they are usable."""
    columns: dict[str, list[Any]] = {}
    for name in _OF_ANSWER:
        if name in judged.column_names:
            rows = zip(judged[name], found, usable, strict=True)
            columns[name] = [row[name] if row is not None and use else before for before, row, use in rows]
    if "answer_ids" in columns:
        columns["answer_ids"] = [[int(token) for token in ids] for ids in columns["answer_ids"]]
    stale = [name for name in _OF_TEACHER if name in judged.column_names]
    return with_columns(judged.remove_columns(stale), columns)


def longest_answer(examples: Dataset, window: int | None) -> int:
    """Return how many tokens a fold's student may answer with: twice the longest answer [choice].

    A teacher may stop early where its students do not. No more than fit into the model's context of `window` tokens
    behind the longest prompt.
    """
    longest = 2 * int(answer_lengths(examples).max())
    return longest if window is None else max(1, min(longest, window - max(examples["prompt_length"])))


def sum_of(costs: Iterable[TrainingCost]) -> TrainingCost:
    """Return what several trainings and answerings took together."""
    known = [asdict(cost) for cost in costs]
    seconds, tokens, flops = (total(cost[name] for cost in known) for name in ("seconds", "tokens", "flops"))
    return TrainingCost(seconds or 0.0, int(tokens or 0), flops)
