"""A whole experiment in one folder: questions, experts, pseudo-answers, students, measurements, report.

Each phase reads what the phases before it left in the folder and is skipped if its own records are there.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import GenerationConfig, set_seed

from ensemw2s import ops
from ensemw2s.boosting.trainer import BoostingTrainer, closing_identity
from ensemw2s.data.difficulty import split_by_difficulty
from ensemw2s.data.questions import check_disjoint, exclude_questions, load_questions, split_questions
from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.ensemble.model import TokenEnsemble
from ensemw2s.experiments.config import SPLITS, ExperimentConfig, ModelConfig
from ensemw2s.experiments.rating import rate_difficulty
from ensemw2s.inference.choices import ChoiceScores, score_choice_mixtures, score_choices
from ensemw2s.inference.label_files import read_labels
from ensemw2s.inference.scoring import AnswerScores, score_answers, score_mixtures
from ensemw2s.models.loading import load_model, load_tokenizer
from ensemw2s.report.arms import BASELINE, CEILING, TRUTH
from ensemw2s.report.statistics import accuracy, exact_match, pooled_gap_recovered, token_error
from ensemw2s.runtime import processes
from ensemw2s.runtime.accounts import check, entered
from ensemw2s.runtime.claims import Kind, claimed
from ensemw2s.runtime.files import digest_of_files, read_json, read_json_lines, settle, write_json, write_json_lines
from ensemw2s.runtime.meter import Ledger, measured, peak_memory, total
from ensemw2s.runtime.records import (
    CONFIG_FILE,
    POOLED_KINDS,
    REPORT_FILE,
    RESULTS_FILE,
    TEST_SPLITS,
    AnswersRecord,
    ArmRecord,
    BestExpertRecord,
    CostRecord,
    EnvironmentRecord,
    LabelsRecord,
    PgrRecord,
    PhaseRecord,
    QuestionsRecord,
    answers_text,
    questions_digest,
)
from ensemw2s.runtime.store import Store
from ensemw2s.student.answers import check_same_tokenizer
from ensemw2s.student.trainer import StudentTrainer, load_trained
from ensemw2s.training.checkpoints import discard_checkpoints
from ensemw2s.training.trainer import on_device

PHASES = ("data", "boost", "label", "student", "evaluate", "report")
# The names of splits in records, and those of their files.
MEASURED_SPLITS = {"validation": "validation", "id": "test_id", "ood": "test_ood"}
# All that a run keeps in its folder.
RUN = Kind("run", "a run", (
    CONFIG_FILE, "data", "difficulty", "records", "boosting", "ensembles", "ensemble", "labels", "students", "scores",
    "store", RESULTS_FILE, REPORT_FILE,
), setting="name or output_dir", alone=True)  # fmt: skip


class Experiment:
    """Run an experiment, phase by phase or as a whole.

    Several processes (`accelerate launch`, `torchrun`) share out training, labelling and scoring; each makes the
    experiment and runs the same phases, and the main one writes.

    Args:
        config: what to do; the run's folder is `config.folder`.
        overwrite: delete a run of another configuration that is in the folder, as far as its files are ours.
        say: called with each line meant for the reader, on the main process.

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
        self.folder = config.folder
        self.say = say if processes.is_main() else lambda line: None
        with self._claimed(overwrite):
            processes.on_main(self._keep_config)

    def run(self, phases: tuple[str, ...] = PHASES) -> list[dict[str, Any]]:
        """Run the named phases in their order and return all records so far.

        Raises:
            FileNotFoundError: an earlier phase that is not among `phases` has not been run, or what it left is gone.
            InUseError: another process works in the folder; names it.
            ValueError: what an earlier phase left is damaged, or the folder was given to another configuration.
        """
        with self._claimed():
            return self._run(phases)

    def _run(self, phases: tuple[str, ...]) -> list[dict[str, Any]]:
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
                self._costs = Ledger(self.folder / "records" / f"{phase}.costs.jsonl")
                with peak_memory(), self._costs.running():
                    records = getattr(self, f"_{phase}")()
                    records.append(PhaseRecord(phase=phase, **processes.on_main(self._costs.total)).to_json())
                processes.on_main(write_json_lines, self._records_file(phase), map(self._of_this_run, records))
            processes.on_main(self._collect_results)
        return read_json_lines(self.folder / RESULTS_FILE)

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
        args = self.config.ensemble_config("single_expert", self.folder)
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
        # What else came along is not read any more, and may be nothing that JSON can say (dates, NaN).
        columns = ("id", "prompt", "answer", "choices", *(("difficulty", "fold") if questions is not None else ()))
        for name, split in splits.items():
            kept = [column for column in columns if column in split.column_names]
            write_json_lines(self._data_file(name), list(split.select_columns(kept)))
        self.say("questions: " + ", ".join(f"{name} {len(splits[name])}" for name in SPLITS))
        return records + [QuestionsRecord(split=name, n=len(splits[name])).to_json() for name in SPLITS]

    def _boost(self) -> list[dict[str, Any]]:
        records = []
        for arm in self.expert_arms():
            trainer = self._boosting_trainer(arm)
            ensemble = trainer.train()
            if trainer.stop_reason:
                self.say(f"{arm}: {trainer.stop_reason}")
            processes.on_main(
                ensemble.save_pretrained,
                self._ensemble_folder(arm),
                processing_class=trainer.processing_class,
                record=trainer.record(),
            )
            processes.on_main(settle, self._ensemble_folder(arm))
            experts = [str(folder.relative_to(self.folder)) for folder in trainer.expert_folders()]
            found = [*trainer.records, {**trainer.mixture(), "experts": experts, "combine": trainer.args.combine}]
            found += closing_identity(self._boosting_folder(arm)) if arm == "ensemble" else []
            records += [{**record, "arm": arm} for record in found]
        return records

    def _label(self) -> list[dict[str, Any]]:
        questions = self._questions("unlabelled")
        truth = questions["answer"]
        records = []
        for teacher in self.config.teachers():
            file = self._labels_file(teacher)
            if processes.on_main(file.exists):
                self._check_left("label", file)
            answers = self._teacher(teacher).label(
                questions,
                self._weak_tokenizer(),
                question_format=self.config.data.format,
                output_file=file,
                description=f"{teacher}: answering hard questions",
                **dataclasses.asdict(self.config.labelling),
                **self.config.cache_settings(teacher),
            )
            self._costs.note(file)
            spent = processes.on_main(self._costs.total, file)
            processes.on_main(settle, file)
            right = float(exact_match(answers["answer"], truth).mean())
            self.say(f"{teacher} answered {len(answers)} hard questions, {right:.1%} of them right")
            confidence, agreement = (float(np.mean(answers[name])) for name in ("confidence", "agreement"))
            took = {name: spent[name] for name in ("seconds", "tokens", "flops")}
            record = LabelsRecord(
                teacher=teacher, accuracy=right, n=len(answers), confidence=confidence, agreement=agreement, **took
            )
            records.append(record.to_json())
        return records

    def _student(self) -> list[dict[str, Any]]:
        for arm in self.config.students:
            self._train_student(arm)
        # Those of a process that was killed when the last student was just saved.
        processes.on_main(discard_checkpoints, self.folder / "students")
        return []

    def _evaluate(self) -> list[dict[str, Any]]:
        kept: list[dict[str, Any]] = []
        for arm, model in (("zero_shot_weak", self.config.weak), ("zero_shot_strong", self.config.strong)):
            kept.append(self._scores(arm, partial(self._score_one, arm, model, self._untrained)))
        for arm in self.config.students:
            load = partial(self._trained, arm)
            kept.append(self._scores(arm, partial(self._score_one, arm, self.config.strong, load)))
        kept.append(self._scores("mixtures", self._score_mixtures))
        scores = {arm: outcomes for part in kept for arm, outcomes in part["outcomes"].items()}
        inference = {arm: cost for part in kept for arm, cost in part["inference"].items()}
        best = self._best_expert(scores)
        scores["best_expert"], inference["best_expert"] = scores[best], inference[best]
        order = self._table_order(scores)
        records = [record for arm in order for record in self._arm_records(arm, scores[arm])]
        records.append(BestExpertRecord(arm=best).to_json())
        records += self._recovered(scores)
        records += [self._cost(arm, inference[arm]) for arm in order]
        return [*records, environment()]

    def _report(self) -> None:
        self._collect_results()
        from ensemw2s.report.page import write_report

        write_report([self.folder], self.folder / REPORT_FILE)
        self.say(f"report: {self.folder / REPORT_FILE}")

    # Training and teachers

    def expert_arms(self) -> list[str]:
        """Return the arms whose experts are trained here, in the order in which they can be."""
        last = ["equal_cost"] if self.config.equal_cost else []
        return ["single_expert", "ensemble", *self.config.ensembles, *last]

    def _boosting_trainer(self, arm: str) -> BoostingTrainer:
        settings = {"num_train_epochs": self._equal_epochs()} if arm == "equal_cost" else {}
        args = self.config.ensemble_config(arm, self._boosting_folder(arm), **settings)
        described = arm == "ensemble" and args.validate_rounds
        return BoostingTrainer(
            self.config.weak.source,
            args=args,
            train_dataset=self._questions("train"),
            eval_dataset=self._questions("validation") if described or args.needs_validation else None,
            processing_class=self._weak_tokenizer(),
            peft_config=self.config.peft_config(),
            question_format=self.config.data.format,
            model_init_kwargs=self.config.weak.init_kwargs,
            on_round=lambda record: self.say(f"{arm}: {round_line(record, args.num_rounds)}"),
            store=Store(self.config.store or self.folder / "store"),
        )

    def _equal_epochs(self) -> float:
        """Return for how many epochs one expert sees as many tokens as those of `ensemble` together."""
        spent = {arm: self._boosting_cost(arm)["tokens"] for arm in ("single_expert", "ensemble")}
        epochs = self.config.ensemble_config("single_expert", "").num_train_epochs
        return round(epochs * spent["ensemble"] / spent["single_expert"], 2)

    def _boosting_cost(self, arm: str) -> dict[str, float | None]:
        """Return what training the experts of an arm took: seconds, tokens, FLOPs."""
        files = entered(self._boosting_folder(arm), "rounds/*/attempt-*/record.json")
        rounds = [read_json(file) for file in files]
        return {name: total(record[f"train_{name}"] for record in rounds) for name in ("seconds", "tokens", "flops")}

    def _train_student(self, arm: str) -> None:
        folder = self._student_folder(arm)
        if processes.on_main(folder.exists):
            return
        teacher, model = self.config.students[arm]["teacher"], self.config.strong
        args = self.config.student_arm_config(arm, self.folder / "students")
        questions = self._questions("unlabelled")
        live = teacher != TRUTH and args.variant == "soft" and args.top_logprobs is None
        trainer = StudentTrainer(
            model.source,
            args=args,
            train_dataset=questions if teacher == TRUTH else self._labels(teacher, questions),
            processing_class=load_tokenizer(model.source),
            peft_config=self.config.peft_config(),
            question_format=self.config.data.format,
            model_init_kwargs=model.init_kwargs,
            description=f"training {arm}",
            teacher=self._teacher(teacher) if live else None,
        )
        trainer.train()
        trainer.save_model(folder)
        seconds = self._student_cost(arm)["seconds"]
        self.say(f"{arm}: trained on {len(trainer.train_dataset)} answers in {seconds:.0f} s")

    def _trained(self, arm: str, model: ModelConfig) -> Any:
        self._check_left("student", self._student_folder(arm))
        return self._placed(load_trained(self._student_folder(arm), model.source, **model.init_kwargs))

    def _untrained(self, model: ModelConfig) -> Any:
        return self._placed(load_model(model.source, **model.init_kwargs))

    def _teacher(self, arm: str) -> TokenEnsemble:
        self._check_left("boost", self._ensemble_folder(arm))
        teacher = TokenEnsemble.from_pretrained(self._ensemble_folder(arm))
        # An experiment asks for the mixture itself, whatever the weak model's authors recommend for chats.
        teacher.generation_config = GenerationConfig(eos_token_id=teacher.generation_config.eos_token_id)
        return self._placed(teacher)

    def _placed(self, model: Any) -> Any:
        """Return a model on the device that this process trains on."""
        return on_device(model, self.config.ensemble_config("single_expert", self.folder))

    def _labels(self, teacher: str, questions: Dataset) -> Dataset:
        """Return the teacher's answers to `questions`, which `_label` has left on disk."""
        file = self._labels_file(teacher)
        self._check_left("label", file)
        rows = {row["id"]: row for row in read_labels(file)}
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
            for split, name in MEASURED_SPLITS.items():
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
        experts, mixtures, combine = self._mixtures()
        ensemble = self._placed(self._of_experts(experts))
        tokenizer = self._weak_tokenizer()
        outcomes: dict[str, dict[str, Any]] = {arm: {} for arm in mixtures}
        with measured() as spent:
            for split, name in MEASURED_SPLITS.items():
                shown: dict[str, Any] = {"description": f"experts and ensembles: {split}", "combine": combine}
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
        # Each expert is run once for all mixtures; an arm alone would have taken its experts' shares.
        used = {arm: sum(weight > 0 for weight in weights) / len(experts) for arm, weights in mixtures.items()}
        inference = {
            arm: {name: None if value is None else value * share for name, value in spent.items()}
            for arm, share in used.items()
        }
        return {"outcomes": outcomes, "inference": inference}

    def _mixtures(self) -> tuple[list[Path], dict[str, list[float]], dict[str, str]]:
        """Return all experts, the arms that are mixtures of them (a weight for each expert), and how they combine."""
        found = [r for r in self._records("boost") if r["kind"] == "mixture"]
        # Arms share experts; each is scored once.
        experts: dict[str, Path] = {}
        own: dict[str, list[int]] = {}
        for record in found:
            folders = [self.folder / path for path in record["experts"]]
            names = [digest_of_files(sorted(folder.glob("*.safetensors"))) for folder in folders]
            experts |= dict(zip(names, folders, strict=True))
            own[record["arm"]] = [list(experts).index(name) for name in names]

        def weights(places: Sequence[int], values: Sequence[float]) -> list[float]:
            by_place = dict(zip(places, values, strict=True))
            return [by_place.get(place, 0.0) for place in range(len(experts))]

        mixtures: dict[str, list[float]] = {}
        combine: dict[str, str] = {}
        for record in found:
            arm, places = record["arm"], own[record["arm"]]
            mixtures[arm], combine[arm] = weights(places, record["expert_weights"]), record["combine"]
            if arm == "ensemble":
                mixtures |= {f"expert_{t}": weights([place], [1.0]) for t, place in enumerate(places, start=1)}
                mixtures["uniform_average"] = mixtures["majority_vote"] = weights(places, [1.0] * len(places))
                combine |= {"uniform_average": "prob", "majority_vote": "vote"}
        return list(experts.values()), mixtures, combine

    def _of_experts(self, folders: Sequence[Path]) -> TokenEnsemble:
        for folder in folders:
            self._check_left("boost", folder)
        ones = [1.0] * len(folders)
        if self.config.lora is None:
            return TokenEnsemble.from_models([load_trained(folder) for folder in folders], ones)
        return TokenEnsemble.from_adapters(self._untrained(self.config.weak), list(folders), ones)

    def _best_expert(self, scores: Mapping[str, Mapping[str, Any]]) -> str:
        """Return the expert of `ensemble` that is best on the validation questions, the first of equals."""
        experts = [arm for arm in scores if arm.startswith("expert_")]
        return max(experts, key=lambda arm: float(np.mean(scores[arm]["validation"]["correct"])))

    def _arm_records(self, arm: str, splits: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        for split, outcome in splits.items():
            wrong, correct = outcome["token_wrong"], outcome["correct"]
            estimates = {"accuracy": accuracy(np.array(correct, dtype=bool)), "token_error": token_error(wrong)}
            if outcome["by_likelihood"]:
                estimates["exact_match"] = accuracy(np.array([not any(bits) for bits in wrong]))
            for metric, (value, error) in estimates.items():
                record = ArmRecord(
                    arm=arm, split=split, metric=metric, value=value, standard_error=error, n=len(correct)
                )
                records.append(record.to_json())
            text, digest = answers_text(correct), questions_digest(self._questions(MEASURED_SPLITS[split])["id"])
            records.append(AnswersRecord(arm=arm, split=split, correct=text, questions=digest).to_json())
        return records

    def _recovered(self, scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        records = []
        for arm in self.config.students if CEILING in self.config.students else ():
            for split in TEST_SPLITS:
                # A single run is a pool of one task.
                arms = [{self.config.name: scores[name][split]["correct"]} for name in (BASELINE, arm, CEILING)]
                gap = pooled_gap_recovered(*arms, seed=self.config.seed)
                records.append(PgrRecord(arm=arm, split=split, **dataclasses.asdict(gap)).to_json())
        return records

    def _cost(self, arm: str, inference: Mapping[str, Any]) -> dict[str, Any]:
        """Return what training an arm took, where it was trained, and what answering all test questions took."""
        training: dict[str, Any] = {}
        trained_as = "ensemble" if arm in ("uniform_average", "majority_vote") else arm
        if arm in self.config.students:
            training = self._student_cost(arm)
        elif trained_as in self.expert_arms():
            training = self._boosting_cost(trained_as)
        spent = {f"train_{name}": value for name, value in training.items()}
        spent |= {f"inference_{name}": value for name, value in inference.items()}
        return CostRecord(arm=arm, **spent).to_json()

    def _table_order(self, scores: Mapping[str, Any]) -> list[str]:
        experts = sorted((arm for arm in scores if arm.startswith("expert_")), key=lambda arm: int(arm.split("_")[1]))
        own = ["best_expert", "majority_vote", "uniform_average"]
        return [
            "zero_shot_weak", "zero_shot_strong", *experts, *own, *self.expert_arms(), *self.config.students,
        ]  # fmt: skip

    # The folder

    def _claimed(self, overwrite: bool = False) -> AbstractContextManager[None]:
        """Return the right to work in the run's folder, for a block."""
        remedy = "pass --overwrite to delete that run"
        return claimed(self.folder, RUN, self._description(), overwrite=overwrite, remedy=remedy)

    def _description(self) -> dict[str, Any]:
        """Return what decides the results and, by name, what the records are of, also when the folder is renamed."""
        return {**self.config.results_key(), "task": self._task}

    @property
    def _task(self) -> str:
        return self.config.task or self.config.name

    def _keep_config(self) -> None:
        file = self.folder / CONFIG_FILE
        if not file.exists():
            own = {"name": self.config.name, "output_dir": self.config.output_dir}
            write_json(file, {**own, **self._description()})

    def _require_earlier(self, phase: str) -> None:
        for earlier in PHASES[: PHASES.index(phase)]:
            if not self._records_file(earlier).exists():
                raise FileNotFoundError(
                    f"{phase} needs what {earlier} leaves in {self.folder}, which is not there: run {earlier} first"
                )

    def _of_this_run(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record with this run's task and seed, where a report of many runs tells runs apart by them."""
        run = {"task": self._task, "seed": self.config.seed}
        return {**record, **(run if record["kind"] in POOLED_KINDS else {})}

    def _collect_results(self) -> None:
        done = [phase for phase in PHASES if self._records_file(phase).exists()]
        rows = [row for phase in done for row in self._records(phase)]
        write_json_lines(self.folder / RESULTS_FILE, rows)

    def _records_file(self, phase: str) -> Path:
        return self.folder / "records" / f"{phase}.jsonl"

    def _labels_file(self, teacher: str) -> Path:
        return self.folder / "labels" / f"{teacher}.jsonl"

    def _records(self, phase: str) -> list[dict[str, Any]]:
        return read_json_lines(self._records_file(phase))

    def _check_left(self, phase: str, path: Path) -> None:
        """Refuse a file or folder that a phase left and that is gone or damaged, and say how it is made anew."""
        remedy = f"Delete {path} and {self._records_file(phase)}, and run the same command again: {phase} makes it anew"
        check(path, remedy)

    def _student_cost(self, arm: str) -> dict[str, Any]:
        folder = self._student_folder(arm)
        self._check_left("student", folder)
        return dict(read_json(folder / "cost.json"))

    def _data_file(self, split: str) -> Path:
        return self.folder / "data" / f"{split}.jsonl"

    def _student_folder(self, arm: str) -> Path:
        return self.folder / "students" / arm

    def _boosting_folder(self, arm: str) -> Path:
        return self.folder / ("boosting" if arm == "ensemble" else f"ensembles/{arm}/boosting")

    def _ensemble_folder(self, arm: str) -> Path:
        return self.folder / ("ensemble" if arm == "ensemble" else f"ensembles/{arm}/ensemble")

    def _questions(self, split: str) -> Dataset:
        file = self._data_file(split)
        self._check_left("data", file)
        return Dataset.from_list(read_json_lines(file))

    def _examples(self, split: str, tokenizer: Any) -> Dataset:
        return tokenize_questions(self._questions(split), tokenizer, self.config.data.format, split)

    def _check_tokenizers(self) -> None:
        """Refuse a student that cannot learn its teachers' distributions, before the hours that its teachers take."""
        arms = [arm for arm, student in self.config.students.items() if student["teacher"] != TRUTH]
        if any(self.config.student_arm_config(arm, self.folder).variant == "soft" for arm in arms):
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
    return EnvironmentRecord(
        python=platform.python_version(),
        platform=platform.platform(),
        versions={name: importlib.metadata.version(name) for name in packages},
        device=device,
        threads=torch.get_num_threads(),
        processes=processes.count(),
        backends={op: ops.backend_for(op, device) for op in ("mixture_log_probs", "mixture_sample")},
        build=ops.build_info(),
    ).to_json()


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
