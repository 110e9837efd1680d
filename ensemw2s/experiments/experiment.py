"""A whole experiment in one folder: questions, experts, pseudo-answers, students, measurements, report.

Each phase reads what the phases before it left in the folder and is skipped if its own records are there.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from transformers import set_seed

from ensemw2s.boosting.trainer import BoostingTrainer, closing_identity, round_line
from ensemw2s.data.answers import exact_match
from ensemw2s.data.difficulty import split_by_difficulty
from ensemw2s.data.questions import load_questions
from ensemw2s.experiments.co_boosting import CoBoostingTrainer, StrongModel
from ensemw2s.experiments.config import SPLITS, ExperimentConfig
from ensemw2s.experiments.evaluation import evaluate
from ensemw2s.experiments.folder import PHASES, RunFolder
from ensemw2s.experiments.questions import easy_and_hard, levels_records, splits_of
from ensemw2s.experiments.rating import rate_difficulty
from ensemw2s.models.loading import require_source
from ensemw2s.report.arms import TRUTH
from ensemw2s.runtime import processes
from ensemw2s.runtime.accounts import digest_of
from ensemw2s.runtime.files import read_json_lines, settle, write_json_lines
from ensemw2s.runtime.meter import Ledger, peak_memory
from ensemw2s.runtime.records import (
    REPORT_FILE,
    RESULTS_FILE,
    ConfidencesRecord,
    LabelsRecord,
    PhaseRecord,
    QuestionsRecord,
    RelabelRecord,
    answers_text,
)
from ensemw2s.runtime.store import Store
from ensemw2s.student.answers import check_same_tokenizer, gold_rows, with_gold
from ensemw2s.student.trainer import StudentTrainer
from ensemw2s.training.checkpoints import discard_checkpoints


def relabel_record(
    arm: str, rows: Sequence[Mapping[str, Any]], questions: Dataset, generation: int = 0, *, used: bool = True
) -> dict[str, Any]:
    """Return the record of a relabelling, whose answers are compared with the true ones here alone.

    Args:
        arm: whose answers it judged, or who was trained on what it left.
        rows: `id`, `answer`, `teacher_answer`, `agrees` and `kept`; rows of ground truth (`gold`) are left out.
        questions: `id` and `answer`, the true one.
        generation: see `RelabelRecord`.
        used: whether anything was trained on what is `kept`.
    """
    judged = [row for row in rows if not row.get("gold")]
    truth = dict(zip(questions["id"], questions["answer"], strict=True))
    kept = [row for row in judged if row["kept"]] if used else []

    def right(of: Sequence[Mapping[str, Any]], name: str) -> float:
        return float(exact_match([row[name] for row in of], [truth[row["id"]] for row in of]).mean())

    return RelabelRecord(
        arm=arm, generation=generation, n=len(judged), agree=sum(row["agrees"] for row in judged), kept=len(kept),
        replaced=sum(row["answer"] != row["teacher_answer"] for row in kept),
        teacher_accuracy=right(judged, "teacher_answer"), accuracy=right(kept, "answer") if kept else None,
    ).to_json()  # fmt: skip


def confidences_record(teacher: str, answers: Dataset, correct: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the record of what a teacher thought of its answers, to four digits.

    Args:
        teacher: its arm.
        answers: what `TokenEnsemble.label` returns.
        correct: [N], which of them are right.
    """
    # Of a choice the confidence is the log of its share of the choices, whatever its number of tokens.
    powers = np.ones(len(answers)) if "choices" in answers.column_names else np.array(answers["num_tokens"])
    probabilities = np.exp(np.minimum(np.array(answers["confidence"]) * powers, 0.0))
    return ConfidencesRecord(
        teacher=teacher, correct=answers_text(correct), probabilities=probabilities.round(4).tolist(),
        agreements=np.array(answers["agreement"]).round(4).tolist(),
    ).to_json()  # fmt: skip


class Experiment:
    """Run an experiment, phase by phase or as a whole.

    Several processes (`accelerate launch`, `torchrun`) share out training, labelling and scoring; each makes the
    experiment and runs the same phases, and the main one writes, and calls `say` with each line meant for the reader.
    With `overwrite`, a run of another configuration in `config.folder` is deleted, as far as its files are ours.

    Raises:
        InUseError: another process works in the folder; names it.
        ValueError: the folder holds a run of another configuration (names the differing keys), or files that are not
            ours.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        overwrite: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config = config
        self.files = RunFolder(config)
        self.folder = self.files.path
        self.say = say if processes.is_main() else lambda line: None
        if not processes.on_main(self.folder.exists):
            # Or the folder would be one of a configuration that cannot be run.
            processes.on_main(self._require_models, PHASES)
        with self.files.claimed(overwrite):
            processes.on_main(self.files.keep_config)

    def run(self, phases: tuple[str, ...] = PHASES) -> list[dict[str, Any]]:
        """Run the named phases in their order and return all records so far.

        Raises:
            FileNotFoundError: an earlier phase that is not among `phases` has not been run, or what it left is gone.
            InUseError: another process works in the folder; names it.
            ValueError: what an earlier phase left is damaged, or the folder was given to another configuration.
        """
        with self.files.claimed():
            threads = self.config.threads or processes.fair_threads()
            if threads is not None:
                torch.set_num_threads(threads)
            processes.on_main(self._require_models, phases)
            processes.on_main(self._require_same_questions)
            for phase in phases:
                processes.on_main(self.files.require_earlier, phase)
                if phase == "report":
                    processes.on_main(self._report)
                elif not processes.on_main(self.files.records_file(phase).exists):
                    # Whatever global generator a library uses, a phase that is run alone sees the same one.
                    set_seed(self.config.seed)
                    self._costs = Ledger(self.folder / "records" / f"{phase}.costs.jsonl")
                    with peak_memory(), self._costs.running():
                        records = getattr(self, f"_{phase}")()
                        records.append(PhaseRecord(phase=phase, **processes.on_main(self._costs.total)).to_json())
                    processes.on_main(self.files.write_records, phase, records)
                processes.on_main(self.files.collect_results)
            return read_json_lines(self.folder / RESULTS_FILE)

    def _require_models(self, phases: Sequence[str]) -> None:
        """Refuse models that cannot be loaded, before the hours that the phases in front of theirs take."""
        left = {phase for phase in phases if phase != "report" and not self.files.records_file(phase).exists()}
        models = {"weak": self.config.weak} if left else {}
        if left & {"student", "evaluate"}:
            models["strong"] = self.config.strong
        for name, model in models.items():
            try:
                require_source(model.source, model.keep_layers)
            except (ValueError, ImportError, FileNotFoundError) as error:
                raise type(error)(f"{name}: {error}") from error

    def _question_files(self) -> dict[str, Path]:
        """Return the files that the configuration takes questions from, by the keys that name them."""
        sources = {name: getattr(self.config.data, name) for name in ("easy", "hard", "questions")}
        files = {name: source["file"] for name, source in sources.items() if source and "file" in source}
        return {name: Path(file) for name, file in files.items() if isinstance(file, str)}

    def _require_same_questions(self) -> None:
        """Refuse to go on where a file of questions was changed since the run took its own copy of them."""
        if not self.files.records_file("data").exists():
            return
        taken = {row["name"]: row["digest"] for row in self.files.records("data") if row["kind"] == "source"}
        for name, file in self._question_files().items():
            if file.is_file() and taken.get(name) not in (None, digest_of(file)):
                raise ValueError(
                    f"data.{name}: {file} was changed since this run took its questions from it, and {self.folder} "
                    "goes on with the old ones. Give the run of the changed questions another name, or delete that "
                    "folder"
                )

    def _data(self) -> list[dict[str, Any]]:
        self._check_tokenizers()
        data, questions = self.config.data, None
        files = {name: file for name, file in self._question_files().items() if file.is_file()}
        sources = [{"kind": "source", "name": name, "digest": digest_of(file)} for name, file in files.items()]
        if data.questions is not None:
            questions = processes.on_main(load_questions, data.questions)
            if data.difficulty.folds is not None:
                questions = self._rated(questions, data.difficulty.folds)
        records = processes.on_main(self._write_questions, questions)
        processes.on_main(self._warn_of_long_answers)
        return sources + records

    def _warn_of_long_answers(self) -> None:
        """Warn where teachers have no room for answers like those that they learn from."""
        if "choices" in self.files.questions("train").column_names:
            return
        train, most = self.files.examples("train", self.config.weak), self.config.labelling.max_new_tokens
        lengths = [len(ids) - start for ids, start in zip(train["input_ids"], train["prompt_length"], strict=True)]
        longer = sum(length > most for length in lengths)
        if longer:
            warnings.warn(
                f"labelling.max_new_tokens={most}: {longer} of the {len(lengths)} training answers have more tokens, "
                f"up to {max(lengths)} with the end token, and teachers' answers of such a length would be cut off",
                stacklevel=2,
            )

    def _rated(self, questions: Dataset, folds: int) -> Dataset:
        """Return `questions` with the difficulty that models trained like the weak baseline find in them."""
        args = self.config.ensemble_config("single_expert", self.folder)
        args.output_dir = str(self.folder / "difficulty")
        return rate_difficulty(
            self.config.weak.source,
            questions,
            args,
            folds=folds,
            processing_class=self.files.tokenizer(self.config.weak),
            peft_config=self.config.peft_config(),
            question_format=self.config.data.format,
            model_init_kwargs=self.config.weak.init_kwargs,
        )

    def _write_questions(self, questions: Dataset | None) -> list[dict[str, Any]]:
        """Write the splits of two sources, or of the one source's `questions`."""
        data = self.config.data
        records = []
        if questions is None:
            easy, hard = easy_and_hard(data)
        else:
            settings = dataclasses.asdict(data.difficulty)
            folds = settings.pop("folds")
            try:
                parts = split_by_difficulty(questions, **settings, min_values=folds or 2)
            except ValueError as error:
                raise ValueError(f"data.difficulty: {error}") from error
            easy, hard, records = parts.easy, parts.hard, [{**parts.record, "folds": folds}]
            self.say(
                "difficulty: {easy_share:.0%} are easy, up to {easy_up_to:.4g}; {hard_share:.0%} are hard, from "
                "{hard_from:.4g}".format(**parts.record)
            )
        splits = splits_of(data, easy, hard, self.config.seed)
        # What else came along is not read any more, and may be nothing that JSON can say (dates, NaN).
        columns = ("id", "prompt", "answer", "choices", *(("difficulty", "fold") if questions is not None else ()))
        for name, split in splits.items():
            kept = [column for column in columns if column in split.column_names]
            write_json_lines(self.files.data_file(name), list(split.select_columns(kept)))
        self.say("questions: " + ", ".join(f"{name} {len(splits[name])}" for name in SPLITS))
        records += [QuestionsRecord(split=name, n=len(splits[name])).to_json() for name in SPLITS]
        return records + levels_records(data, splits)

    def _boost(self) -> list[dict[str, Any]]:
        records = []
        for arm in self.config.expert_arms():
            trainer = self._boosting_trainer(arm)
            trainer.train(save_to=self.files.ensemble(arm))
            if trainer.stop_reason:
                self.say(f"{arm}: {trainer.stop_reason}")
            processes.on_main(settle, self.files.ensemble(arm))
            experts = [str(folder.relative_to(self.folder)) for folder in trainer.expert_folders()]
            found = [*trainer.records, {**trainer.mixture(), "experts": experts, "combine": trainer.args.combine}]
            found += closing_identity(trainer.folder) if arm == "ensemble" else []
            if isinstance(trainer, CoBoostingTrainer):
                truth = self.files.questions("unlabelled")
                found += [
                    relabel_record(arm, judged.rows, truth, judged.generation, used=judged.used)
                    for judged in trainer.judgements
                    if judged.rows
                ]
            records += [{**record, "arm": arm} for record in found]
        return records

    def _label(self) -> list[dict[str, Any]]:
        questions = self.files.questions("unlabelled")
        truth = questions["answer"]
        records = []
        for teacher in self.config.teachers():
            file = self.files.labels_file(teacher)
            if processes.on_main(file.exists):
                self.files.check_left("label", file)
            answers = self.files.teacher(teacher).label(
                questions,
                self.files.tokenizer(self.config.weak),
                question_format=self.config.data.format,
                output_file=file,
                description=f"{teacher}: answering hard questions",
                **dataclasses.asdict(self.config.labelling),
                **self.config.cache_settings(teacher),
            )
            self._costs.note(file)
            spent = processes.on_main(self._costs.total, file)
            processes.on_main(settle, file)
            correct = exact_match(answers["answer"], truth)
            right = float(correct.mean())
            self.say(f"{teacher} answered {len(answers)} hard questions, {right:.1%} of them right")
            confidence, agreement = (float(np.mean(answers[name])) for name in ("confidence", "agreement"))
            took = {name: spent[name] for name in ("seconds", "tokens", "flops")}
            record = LabelsRecord(
                teacher=teacher, accuracy=right, n=len(answers), confidence=confidence, agreement=agreement, **took
            )
            records += [record.to_json(), confidences_record(teacher, answers, correct)]
        return records

    def _student(self) -> list[dict[str, Any]]:
        for arm in self.config.students:
            self._train_student(arm)
        # Those of a process that was killed when the last student was just saved.
        processes.on_main(discard_checkpoints, self.folder / "students")
        truth = self.files.questions("unlabelled")
        relabelling = [arm for arm in self.config.students if self._relabels(arm)]
        return [relabel_record(arm, processes.on_main(self.files.relabelled, arm), truth) for arm in relabelling]

    def _relabels(self, arm: str) -> bool:
        return self.config.student_arm_config(arm, self.folder).relabel is not None

    def _evaluate(self) -> list[dict[str, Any]]:
        return evaluate(self.files)

    def _report(self) -> None:
        self.files.collect_results()
        from ensemw2s.report.page import write_report

        write_report([self.folder], self.folder / REPORT_FILE)
        self.say(f"report: {self.folder / REPORT_FILE}")

    def _tokenized(self, split: str) -> Dataset:
        """Return the questions of a split with their tokens for the experts, which all arms share."""
        examples = self.files.examples(split, self.config.weak).select_columns(["input_ids", "prompt_length"])
        return concatenate_datasets([self.files.questions(split), examples], axis=1)

    def _boosting_trainer(self, arm: str) -> BoostingTrainer | CoBoostingTrainer:
        settings = {"num_train_epochs": self._equal_epochs()} if arm == "equal_cost" else {}
        args = self.config.ensemble_config(arm, self.files.boosting(arm), **settings)
        described = arm == "ensemble" and args.validate_rounds
        told = args.for_training(adapters=self.config.lora is not None)
        options: dict[str, Any] = {
            "args": args,
            "train_dataset": self._tokenized("train"),
            "eval_dataset": self._tokenized("validation") if described or args.needs_validation else None,
            "processing_class": self.files.tokenizer(self.config.weak),
            "peft_config": self.config.peft_config(),
            "question_format": self.config.data.format,
            "model_init_kwargs": self.config.weak.init_kwargs,
            "on_round": lambda record: self.say(f"{arm}: {round_line(record, told)}"),
            "store": Store(self.config.store or self.folder / "store"),
        }
        if args.recipe != "co_boosted":
            return BoostingTrainer(self.config.weak.source, **options)
        return CoBoostingTrainer(
            self.config.weak.source,
            self._judges(),
            unlabelled=self.files.questions("unlabelled"),
            labelling=self.config.labelling,
            **options,
        )

    def _judges(self) -> StrongModel:
        """Return the strong model with the settings of all students, as far as judges have a use for them."""
        model = self.config.strong
        return StrongModel(
            model.source,
            self.config.judge_config(self.folder),
            processing_class=self.files.tokenizer(model),
            peft_config=self.config.peft_config(),
            model_init_kwargs=model.init_kwargs,
        )

    def _equal_epochs(self) -> float:
        """Return for how many epochs one expert sees as many tokens as those of `ensemble` together.

        Where models of other sizes have a part in `ensemble`, it is as many FLOPs, as far as these are known.
        """
        arms = ("single_expert", "ensemble")
        costs = {arm: self.files.boosting_cost(arm) for arm in arms}
        co_boosted = self.config.ensemble_config("ensemble", "").recipe == "co_boosted"
        unit = "flops" if co_boosted and None not in [cost["flops"] for cost in costs.values()] else "tokens"
        spent = {arm: cost[unit] for arm, cost in costs.items()}
        epochs = self.config.ensemble_config("single_expert", "").num_train_epochs
        return round(epochs * spent["ensemble"] / spent["single_expert"], 2)

    def _train_student(self, arm: str) -> None:
        folder = self.files.student(arm)
        if processes.on_main(self.files.has_student, arm):
            # Those of a process that was killed when it was just saved.
            processes.on_main(discard_checkpoints, folder)
            return
        teacher, model = self.config.students[arm]["teacher"], self.config.strong
        # Students of folds lie beside the one that they judge for.
        args = self.config.student_arm_config(arm, folder if self._relabels(arm) else self.folder / "students")
        questions = self.files.questions("unlabelled")
        live = teacher != TRUTH and args.variant == "soft" and args.top_logprobs is None
        answers = questions if teacher == TRUTH else self.files.labels(teacher, questions)
        easy = self.config.learns_easy_answers(arm)
        try:
            trainer = StudentTrainer(
                model.source,
                args=args,
                train_dataset=with_gold(answers, self.files.questions("train")) if easy else answers,
                processing_class=self.files.tokenizer(model),
                peft_config=self.config.peft_config(),
                question_format=self.config.data.format,
                model_init_kwargs=model.init_kwargs,
                description=f"training {arm}",
                teacher=self.files.teacher(teacher) if live else None,
            )
        except ValueError as error:
            raise ValueError(f"{arm}, taught by {teacher}: {error}") from error
        trainer.train(save_to=folder)
        seconds = self.files.student_cost(arm)["seconds"]
        used = int((~gold_rows(trainer.train_dataset)).sum())
        beside = f" and {len(trainer.train_dataset) - used} true ones to easy questions" if easy else ""
        self.say(f"{arm}: trained on {used} of {len(answers)} answers{beside} in {seconds:.0f} s")

    def _check_tokenizers(self) -> None:
        """Refuse a student that cannot learn its teachers' distributions, before the hours that its teachers take."""
        arms = [arm for arm, student in self.config.students.items() if student["teacher"] != TRUTH]
        if any(self.config.student_arm_config(arm, self.folder).variant == "soft" for arm in arms):
            check_same_tokenizer(self.files.tokenizer(self.config.weak), self.files.tokenizer(self.config.strong))
