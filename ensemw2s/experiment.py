"""A whole experiment in one folder: questions, experts, pseudo-answers, students, measurements, report.

Each phase reads what the phases before it left in the folder and is skipped if its own records are there.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import set_seed

from ensemw2s import ops, processes
from ensemw2s.choices import ChoiceScores, score_choice_mixtures, score_choices
from ensemw2s.config import SPLITS, ExperimentConfig, ModelConfig
from ensemw2s.cost import measured, measured_with_memory
from ensemw2s.data import (
    check_disjoint,
    exclude_questions,
    load_questions,
    split_questions,
    tokenize_questions,
)
from ensemw2s.difficulty import rate_difficulty, split_by_difficulty
from ensemw2s.distillation import check_same_tokenizer, read_labels
from ensemw2s.ensemble import TokenEnsemble
from ensemw2s.evaluate import accuracy, exact_match, performance_gap_recovered, token_error
from ensemw2s.files import read_complete_lines, read_json, write_json, write_json_lines
from ensemw2s.models import load_model, load_tokenizer
from ensemw2s.report import write_report
from ensemw2s.scoring import AnswerScores, score_answers, score_mixtures
from ensemw2s.student import StudentConfig, StudentTrainer, load_trained
from ensemw2s.trainer import BoostingTrainer, closing_identity
from ensemw2s.training import on_device

PHASES = ("data", "boost", "label", "student", "evaluate", "report")
TEST_SPLITS = {"validation": "validation", "id": "test_id", "ood": "test_ood"}
TEACHERS = ("single_expert", "ensemble")
STUDENTS = {"student_single": "single_expert", "student_ensemble": "ensemble", "ceiling": None}
RESULTS_FILE = "results.jsonl"


class Experiment:
    """Run an experiment, phase by phase or as a whole.

    Several processes (`accelerate launch`, `torchrun`) share out training, labelling and scoring; each makes the
    experiment and runs the same phases, and the main one writes.

    Args:
        config: what to do; the run's folder is `config.folder`.
        overwrite: delete a run of another configuration that is in the folder.
        say: called with each line meant for the reader, on the main process.

    Raises:
        ValueError: the folder holds a run of another configuration; names the differing keys.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        overwrite: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config = config
        self.folder = config.folder
        self.say = say if processes.is_main() else lambda line: None
        processes.on_main(self._claim_folder, overwrite)

    def run(self, phases: tuple[str, ...] = PHASES) -> list[dict[str, Any]]:
        """Run the named phases in their order and return all records so far.

        Raises:
            FileNotFoundError: an earlier phase that is not among `phases` has not been run.
        """
        threads = self.config.threads or processes.fair_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        for phase in phases:
            processes.on_main(self._require_earlier, phase)
            if phase == "report":
                processes.on_main(self._report)
            elif not processes.on_main(self._records_file(phase).exists):
                # Whatever global generator a library uses, a phase that is run alone sees the same one.
                set_seed(self.config.seed)
                with measured_with_memory() as spent:
                    records = getattr(self, f"_{phase}")()
                records.append({"kind": "phase", "phase": phase, **spent})
                processes.on_main(write_json_lines, self._records_file(phase), records)
            processes.on_main(self._collect_results)
        return read_complete_lines(self.folder / RESULTS_FILE)

    # Phases: each returns its records

    def _data(self) -> list[dict[str, Any]]:
        self._check_tokenizers()
        data, questions = self.config.data, None
        if data.questions is not None:
            questions = processes.on_main(load_questions, data.questions)
            if data.difficulty.folds is not None:
                questions = self._rated(questions, data.difficulty.folds)
        return processes.on_main(self._write_questions, questions)

    def _rated(self, questions: Dataset, folds: int) -> Dataset:
        """Return `questions` with the difficulty that models trained like the weak baseline find in them."""
        args = self._single_args()
        args.output_dir = str(self.folder / "difficulty")
        return rate_difficulty(
            self.config.weak.source,
            questions,
            args,
            folds=folds,
            processing_class=self._weak_tokenizer(),
            peft_config=self.config.peft_config(),
            question_format=self.config.data.format,
            model_init_kwargs=self.config.weak.init_kwargs,
        )

    def _write_questions(self, questions: Dataset | None) -> list[dict[str, Any]]:
        """Write the splits of two sources, or of the one source's `questions`."""
        data, sizes = self.config.data, self.config.data.sizes
        records = []
        if questions is None:
            assert data.easy is not None and data.hard is not None
            easy = load_questions(data.easy)
            hard = exclude_questions(load_questions(data.hard), [easy])
        else:
            settings = dataclasses.asdict(data.difficulty)
            folds = settings.pop("folds")
            parts = split_by_difficulty(questions, **settings, min_values=folds or 2)
            easy, hard, records = parts.easy, parts.hard, [{**parts.record, "folds": folds}]
            self.say(
                "difficulty: {easy_share:.0%} are easy, up to {easy_up_to:.4g}; {hard_share:.0%} are hard, from "
                "{hard_from:.4g}".format(**parts.record)
            )
        splits = dict(split_questions(easy, {name: sizes[name] for name in SPLITS[:3]}, self.config.seed))
        splits |= split_questions(hard, {name: sizes[name] for name in SPLITS[3:]}, self.config.seed)
        check_disjoint(splits)
        for name, questions in splits.items():
            write_json_lines(self._data_file(name), list(questions))
        self.say("questions: " + ", ".join(f"{name} {len(splits[name])}" for name in SPLITS))
        return records + [{"kind": "questions", "split": name, "n": len(splits[name])} for name in SPLITS]

    def _boost(self) -> list[dict[str, Any]]:
        self._train("single_expert", self.config.weak, self._questions("train"), self._single_args())
        trainer = BoostingTrainer(
            self.config.weak.source,
            args=self.config.boosting_config(self.folder / "boosting"),
            train_dataset=self._questions("train"),
            eval_dataset=self._questions("validation"),
            processing_class=self._weak_tokenizer(),
            peft_config=self.config.peft_config(),
            question_format=self.config.data.format,
            model_init_kwargs=self.config.weak.init_kwargs,
            on_round=lambda record: self.say(round_line(record, trainer.args.num_rounds)),
        )
        ensemble = trainer.train()
        if trainer.stop_reason:
            self.say(trainer.stop_reason)
        processes.on_main(
            ensemble.save_pretrained,
            self.folder / "ensemble",
            processing_class=trainer.processing_class,
            record=trainer.record(),
        )
        return trainer.records + closing_identity(self.folder / "boosting")

    def _label(self) -> list[dict[str, Any]]:
        questions = self._questions("unlabelled")
        truth = questions["answer"]
        cache = self.config.cache_settings()
        records = []
        for teacher in TEACHERS:
            with measured() as spent:
                answers = self._teacher(teacher).label(
                    questions,
                    self._weak_tokenizer(),
                    question_format=self.config.data.format,
                    output_file=self.folder / "labels" / f"{teacher}.jsonl",
                    description=f"{teacher}: answering hard questions",
                    **dataclasses.asdict(self.config.labelling),
                    **cache,
                )
            right = float(exact_match(answers["answer"], truth).mean())
            self.say(f"{teacher} answered {len(answers)} hard questions, {right:.1%} of them right")
            records.append({
                "kind": "labels", "teacher": teacher, "accuracy": right, "n": len(answers),
                "confidence": float(np.mean(answers["confidence"])), "agreement": float(np.mean(answers["agreement"])),
                **spent,
            })  # fmt: skip
        return records

    def _student(self) -> list[dict[str, Any]]:
        questions = self._questions("unlabelled")
        args = self.config.student_config(self.folder / "students")
        for arm, teacher in STUDENTS.items():
            if teacher is None:
                self._train(arm, self.config.strong, questions, dataclasses.replace(args, **args.on_truth))
                continue
            live = args.variant == "soft" and args.top_logprobs is None
            asked = self._teacher(teacher) if live else None
            self._train(arm, self.config.strong, self._labels(teacher, questions), args, asked)
        return []

    def _evaluate(self) -> list[dict[str, Any]]:
        kept: list[dict[str, Any]] = []
        for arm, model in (("zero_shot_weak", self.config.weak), ("zero_shot_strong", self.config.strong)):
            kept.append(self._scores(arm, partial(self._score_one, arm, model, self._untrained)))
        for arm in ("single_expert", *STUDENTS):
            model = self.config.weak if arm == "single_expert" else self.config.strong
            kept.append(self._scores(arm, partial(self._score_one, arm, model, partial(self._trained, arm))))
        kept.append(self._scores("mixtures", self._score_mixtures))
        scores = {arm: outcomes for part in kept for arm, outcomes in part["outcomes"].items()}
        records = [record for arm in _table_order(scores) for record in self._arm_records(arm, scores[arm])]
        records += self._recovered(scores)
        inference = {arm: cost for part in kept for arm, cost in part["inference"].items()}
        records += [self._cost(arm, inference[arm]) for arm in _table_order(scores)]
        return [*records, environment()]

    def _report(self) -> None:
        self._collect_results()
        write_report([self.folder], self.folder / "report.html")
        self.say(f"report: {self.folder / 'report.html'}")

    # Training and teachers

    def _train(
        self,
        arm: str,
        model: ModelConfig,
        answers: Dataset,
        args: StudentConfig,
        teacher: TokenEnsemble | None = None,
    ) -> None:
        folder = self._model_folder(arm)
        if processes.on_main(folder.exists):
            return
        trainer = StudentTrainer(
            model.source,
            args=args,
            train_dataset=answers,
            processing_class=load_tokenizer(model.source),
            peft_config=self.config.peft_config(),
            question_format=self.config.data.format,
            model_init_kwargs=model.init_kwargs,
            description=f"training {arm}",
            teacher=teacher,
        )
        trainer.train()
        trainer.save_model(folder)
        seconds = read_json(folder / "cost.json")["seconds"]
        self.say(f"{arm}: trained on {len(trainer.train_dataset)} answers in {seconds:.0f} s")

    def _single_args(self) -> StudentConfig:
        """The weak baseline's arguments: the experts' own, without what belongs to boosting."""
        shared = {field.name for field in dataclasses.fields(StudentConfig)}
        settings = {key: value for key, value in self.config.boosting.items() if key in shared}
        return StudentConfig(output_dir=str(self.folder / "students"), seed=self.config.seed, **settings)

    def _trained(self, arm: str, model: ModelConfig) -> Any:
        return self._placed(load_trained(self._model_folder(arm), model.source, **model.init_kwargs))

    def _untrained(self, model: ModelConfig) -> Any:
        return self._placed(load_model(model.source, **model.init_kwargs))

    def _teacher(self, name: str) -> TokenEnsemble:
        if name == "ensemble":
            return self._placed(TokenEnsemble.from_pretrained(self.folder / "ensemble"))
        folder = self._model_folder(name)
        if self.config.lora is None:
            return self._placed(TokenEnsemble.from_models([load_trained(folder)], [1.0]))
        return TokenEnsemble.from_adapters(self._untrained(self.config.weak), [folder], [1.0])

    def _placed(self, model: Any) -> Any:
        """Return a model on the device that this process trains on."""
        return on_device(model, self._single_args())

    def _labels(self, teacher: str, questions: Dataset) -> Dataset:
        """Return the teacher's answers to `questions`, which `_label` has left on disk."""
        rows = {row["id"]: row for row in read_labels(self.folder / "labels" / f"{teacher}.jsonl")}
        return Dataset.from_list([rows[row_id] for row_id in questions["id"]])

    # Measuring

    def _scores(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Per arm, `outcomes` (per split what `_outcomes` returns) and the cost of `inference`; kept once computed."""
        file = self.folder / "scores" / f"{name}.json"
        if not processes.on_main(file.exists):
            scores = compute()
            processes.on_main(write_json, file, scores)
        return read_json(file)

    def _score_one(
        self, arm: str, config: ModelConfig, load: Callable[[ModelConfig], torch.nn.Module]
    ) -> dict[str, Any]:
        model, tokenizer = load(config), load_tokenizer(config.source)
        outcomes = {}
        with measured() as spent:
            for split, name in TEST_SPLITS.items():
                shown: dict[str, Any] = {"description": f"{arm}: {split}"}
                answers = score_answers(
                    model, self._examples(name, tokenizer), pad_token_id=tokenizer.eos_token_id, **shown
                )
                choices, questions = None, self._questions(name)
                if "choices" in questions.column_names:
                    choices = score_choices(
                        model, questions, tokenizer, question_format=self.config.data.format, **shown
                    )
                outcomes[split] = _outcomes(answers, choices)
        return {"outcomes": {arm: outcomes}, "inference": {arm: spent}}

    def _score_mixtures(self) -> dict[str, Any]:
        ensemble = self._teacher("ensemble")
        count = ensemble.num_experts
        mixtures = {f"expert_{t + 1}": np.eye(count)[t].tolist() for t in range(count)}
        mixtures |= {"uniform_average": [1.0] * count, "ensemble": ensemble.config.expert_weights}
        tokenizer = self._weak_tokenizer()
        outcomes: dict[str, dict[str, Any]] = {arm: {} for arm in mixtures}
        with measured() as spent:
            for split, name in TEST_SPLITS.items():
                shown: dict[str, Any] = {"description": f"experts and ensemble: {split}"}
                answers = score_mixtures(
                    ensemble, self._examples(name, tokenizer), mixtures, pad_token_id=tokenizer.eos_token_id, **shown
                )
                choices, questions = None, self._questions(name)
                if "choices" in questions.column_names:
                    choices = score_choice_mixtures(
                        ensemble, questions, tokenizer, mixtures, question_format=self.config.data.format, **shown
                    )
                for arm in mixtures:
                    outcomes[arm][split] = _outcomes(answers[arm], None if choices is None else choices[arm])
        # The experts are run once for all mixtures; one alone would have taken its share.
        share = {name: None if value is None else value / count for name, value in spent.items()}
        alone = [f"expert_{t + 1}" for t in range(count)]
        return {"outcomes": outcomes, "inference": {arm: share if arm in alone else spent for arm in mixtures}}

    def _arm_records(self, arm: str, splits: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        for split, outcome in splits.items():
            shared = {"arm": arm, "split": split, "seed": self.config.seed}
            wrong, correct = outcome["token_wrong"], outcome["correct"]
            estimates = {"accuracy": accuracy(np.array(correct, dtype=bool)), "token_error": token_error(wrong)}
            if outcome["by_likelihood"]:
                estimates["exact_match"] = accuracy(np.array([not any(bits) for bits in wrong]))
            for metric, estimate in estimates.items():
                records.append({
                    "kind": "arm", **shared, "metric": metric, **estimate._asdict(), "n": len(correct),
                })  # fmt: skip
            ids = self._questions(TEST_SPLITS[split])["id"]
            records.append({"kind": "answers", **shared, "correct": correct, "ids": list(ids)})
        return records

    def _recovered(self, scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        records = []
        for arm in STUDENTS:
            for split in ("id", "ood"):
                weak, student, ceiling = (
                    np.array(scores[name][split]["correct"], dtype=bool) for name in ("single_expert", arm, "ceiling")
                )
                gap = performance_gap_recovered(weak, student, ceiling, seed=self.config.seed)
                records.append({
                    "kind": "pgr", "arm": arm, "split": split, "seed": self.config.seed, **dataclasses.asdict(gap),
                })  # fmt: skip
        return records

    def _cost(self, arm: str, inference: Mapping[str, Any]) -> dict[str, Any]:
        """Return what training an arm took, where it was trained, and what answering all test questions took."""
        training: dict[str, Any] = {}
        if arm in ("single_expert", *STUDENTS):
            training = read_json(self._model_folder(arm) / "cost.json")
        elif arm in ("ensemble", "uniform_average"):
            rounds = [r for r in read_complete_lines(self._records_file("boost")) if r["kind"] == "round"]
            training = {name: _total(r[f"train_{name}"] for r in rounds) for name in ("seconds", "tokens", "flops")}
        return {
            "kind": "cost", "arm": arm,
            **{f"train_{name}": value for name, value in training.items()},
            **{f"inference_{name}": value for name, value in inference.items()},
        }  # fmt: skip

    # The folder

    def _claim_folder(self, overwrite: bool) -> None:
        file = self.folder / "config.json"
        mine = self.config.results_key()
        if file.exists():
            theirs = read_json(file)
            differing = sorted(_differing(mine, {key: theirs.get(key) for key in mine}))
            if differing and not overwrite:
                raise ValueError(
                    f"{self.folder} holds a run of another configuration; differing: {', '.join(differing)}. "
                    "Set another name or output_dir, or pass --overwrite to delete that run"
                )
            if differing:
                shutil.rmtree(self.folder)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} is not empty and holds no run of ours (no config.json): set another name or output_dir"
            )
        write_json(file, {"name": self.config.name, "output_dir": self.config.output_dir, **mine})

    def _require_earlier(self, phase: str) -> None:
        for earlier in PHASES[: PHASES.index(phase)]:
            if not self._records_file(earlier).exists():
                raise FileNotFoundError(
                    f"{phase} needs what {earlier} leaves in {self.folder}, which is not there: run {earlier} first"
                )

    def _collect_results(self) -> None:
        rows = [row for phase in PHASES for row in read_complete_lines(self._records_file(phase))]
        write_json_lines(self.folder / RESULTS_FILE, rows)

    def _records_file(self, phase: str) -> Path:
        return self.folder / "records" / f"{phase}.jsonl"

    def _data_file(self, split: str) -> Path:
        return self.folder / "data" / f"{split}.jsonl"

    def _model_folder(self, arm: str) -> Path:
        return self.folder / ("single_expert" if arm == "single_expert" else f"students/{arm}")

    def _questions(self, split: str) -> Dataset:
        return Dataset.from_list(read_complete_lines(self._data_file(split)))

    def _examples(self, split: str, tokenizer: Any) -> Dataset:
        return tokenize_questions(self._questions(split), tokenizer, self.config.data.format, split)

    def _check_tokenizers(self) -> None:
        """Refuse a student that cannot learn its teachers' distributions, before the hours that its teachers take."""
        if self.config.student_config(self.folder).variant == "soft":
            check_same_tokenizer(self._weak_tokenizer(), load_tokenizer(self.config.strong.source))

    def _weak_tokenizer(self) -> Any:
        return load_tokenizer(self.config.weak.source)


def round_line(record: Mapping[str, Any], num_rounds: int) -> str:
    """Return one line on a boosting round, for a reader."""
    share = record["effective_sample_size"] / record["num_units"]
    prior = "" if record["prior_error"] is None else f" (before training {record['prior_error']:.3f})"
    line = (
        f"round {record['round']}/{num_rounds}: ε {record['error']:.3f}{prior}, α {record['expert_weight']:.2f}, "
        f"effective sample size {record['effective_sample_size']:.0f} of {record['num_units']} ({share:.0%})"
    )
    if record["validation"]:
        values = record["validation"]
        line += f"; validation: expert {values['expert']:.1%}, ensemble {values['ensemble']:.1%}"
    if not record["accepted"]:
        line += f"; not added (attempt {record['attempt']}): no better than before training"
    return line


def environment() -> dict[str, Any]:
    """Return what ran: versions, machine, threads, and the backend behind each op."""
    packages = ("ensemw2s", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "kind": "environment",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "backends": {op: ops.backend_for(op, device) for op in ("mixture_log_probs", "mixture_sample")},
        "build": ops.build_info(),
    }


def _outcomes(answers: AnswerScores, choices: ChoiceScores | None) -> dict[str, Any]:
    """Return what is kept of one arm on one split, as plain JSON.

    `token_wrong` (0 or 1 per answer token, a list per question) and `correct` (0 or 1 per question): whether the
    likeliest choice is right where there are choices (`by_likelihood`), else whether every token is.
    """
    pieces = np.split(answers.token_wrong.astype(int), np.cumsum(answers.lengths)[:-1])
    correct = answers.correct if choices is None else np.asarray(choices.correct)
    return {
        "token_wrong": [piece.tolist() for piece in pieces],
        "correct": correct.astype(int).tolist(),
        "by_likelihood": choices is not None,
    }


def _table_order(scores: Mapping[str, Any]) -> list[str]:
    experts = sorted((arm for arm in scores if arm.startswith("expert_")), key=lambda arm: int(arm.split("_")[1]))
    first = ["zero_shot_weak", "zero_shot_strong", "single_expert", *experts, "uniform_average", "ensemble"]
    return first + list(STUDENTS)


def _total(values: Iterable[float | None]) -> float | None:
    """Return a sum that is unknown if one of its parts is."""
    parts = list(values)
    return None if None in parts else sum(part for part in parts if part is not None)


def _differing(mine: Any, theirs: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys in which two nested mappings differ."""
    if not (isinstance(mine, Mapping) and isinstance(theirs, Mapping)):
        return [] if mine == theirs else [prefix.rstrip(".")]
    return [
        found
        for key in mine.keys() | theirs.keys()
        for found in _differing(mine.get(key), theirs.get(key), f"{prefix}{key}.")
    ]
