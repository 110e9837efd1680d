"""Co-boosting: experts that also learn hard questions, on whose answers a stronger model agrees that never saw them.

Boosting moves weights among the easy questions that have answers. Where experts get these right, weights find nothing
to repair, and what experts get wrong on hard questions they get wrong together. Here each generation of experts answers
the unlabelled questions; students of the strong model, each trained on the answers of the other folds, judge these
answers; those on which both agree join the easy questions, and a new generation is trained from the pre-trained model
on them, with token weights that follow the errors of the mixture so far [choice: ours, no part of the paper].
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from ensemw2s.boosting import algorithm
from ensemw2s.boosting.config import BoostingConfig
from ensemw2s.boosting.trainer import BoostingTrainer
from ensemw2s.data.questions import check_disjoint, check_questions
from ensemw2s.data.shapes import as_dataset, dataset_of
from ensemw2s.experiments.config import LabellingConfig
from ensemw2s.models.identity import describe_model
from ensemw2s.models.own_files import refuse_others, withdraw
from ensemw2s.runtime import processes
from ensemw2s.runtime.claims import Kind, claimed
from ensemw2s.runtime.files import (
    digest_of_files,
    new_folder,
    read_json,
    read_json_lines,
    settle,
    write_json,
    write_json_lines,
)
from ensemw2s.runtime.fingerprint import digest_columns
from ensemw2s.runtime.meter import Ledger, total
from ensemw2s.runtime.store import Store
from ensemw2s.runtime.values import shown
from ensemw2s.student.relabel import enough_agree, enough_in_words
from ensemw2s.student.trainer import StudentConfig, StudentTrainer
from ensemw2s.training.arguments import check_resume, require_arguments
from ensemw2s.training.fine_tune import PRESENTATION, TrainingCost

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ensemw2s.ensemble.model import TokenEnsemble

CO_BOOSTING = Kind("co-boosting", "a co-boosting run", ("generation-*", "answers-*", "agreed-*", "cost.json"))
_COSTS = ("seconds", "tokens", "flops")


@dataclass(frozen=True)
class StrongModel:
    """The model whose students of folds judge the experts' answers.

    Attributes:
        source: a source of `ensemw2s.load_model`, or a model (which is left as it is).
        args: how these students are trained, with `relabel="cross_fit"` and `relabel_folds`; see `StudentConfig`.
        processing_class: its tokenizer; None loads the one of `source`.
        peft_config: train adapters with this configuration; None trains all weights.
        model_init_kwargs: passed on to `ensemw2s.load_model`.

    Raises:
        TypeError: `args` that are no `StudentConfig`.
        ValueError: `args` without `relabel`, or with a variant, a filter or rounds that a judge has no use for.
    """

    source: str | PreTrainedModel
    args: StudentConfig
    processing_class: PreTrainedTokenizerBase | None = None
    peft_config: PeftConfig | None = None
    model_init_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_arguments("StrongModel", self.args, StudentConfig)
        wanted = {"relabel": "cross_fit", "relabel_keep": "agree", "relabel_rounds": 1, "variant": "sft"}
        wanted |= {"min_confidence": None, "keep_fraction": None, "keep_unfinished": False}
        for name, value in wanted.items():
            if getattr(self.args, name) != value:
                raise ValueError(
                    f"args: {name}={getattr(self.args, name)!r}, and students that judge answers need {value!r}: all "
                    "finished answers are judged once, by students of cross entropy"
                )


class GenerationTrainer(BoostingTrainer):
    """Experts of a later generation: their token weights follow the soft error of the mixture so far.

    That mixture is, with equal weights, of the experts of the generation before (`earlier`, folders) and of those that
    this one has so far. Each round's weights start from uniform ones, since the mixture's error already holds what
    earlier rounds left [choice]. With `sampling="all"` all weights are 1.
    """

    earlier: Sequence[Path] = ()

    def _initial_weights(self) -> np.ndarray:
        return algorithm.initial_weights(self.num_units)

    def _first_losses(self) -> tuple[np.ndarray, float] | None:
        if self.args.is_baseline:
            return None
        losses = self._mixture_losses(self.earlier)
        uniform = self._initial_weights()
        error, _ = algorithm.clamp_error(algorithm.weighted_error(uniform, losses), self.num_units)
        weight = algorithm.expert_weight(error, self._prior_error(uniform))
        # A mixture no better than no training has nothing to say.
        return (losses, weight) if weight > 0 else None

    def _blamed(self, number: int, folder: Path, losses: np.ndarray) -> np.ndarray:
        before = [path for path, _ in self._accepted(before=number)]
        return self._mixture_losses([*self.earlier, *before, folder / "expert"])

    def _update(self, unit_weights: np.ndarray, losses: np.ndarray, expert_weight: float, out: np.ndarray) -> float:
        return super()._update(algorithm.initial_weights(len(unit_weights)), losses, expert_weight, out)

    def fingerprint(self) -> dict[str, Any]:
        """Return what the experts depend on."""
        earlier = [digest_of_files(sorted(folder.glob("*.safetensors"))) for folder in self.earlier]
        return {**super().fingerprint(), "earlier": earlier}

    def _mixture_losses(self, folders: Sequence[Path]) -> np.ndarray:
        """Return each unit's soft loss [N], `1 - p(gold)` under the mixture of saved experts with equal weights."""
        equal = [1.0] * len(folders)
        ensemble = self._factory.ensemble(folders, equal, combine="prob")
        scores = self._factory.score(ensemble, self._train, {"mixture": equal}, "error of the mixture so far")
        return self._unit_losses(np.clip(-np.expm1(scores["mixture"].token_log_probs), 0.0, 1.0))


@dataclass(frozen=True)
class Judgement:
    """What students of folds made of the answers of one generation's experts.

    Attributes:
        generation: the generation that is trained on the answers, from 1.
        rows: `id`, `prompt`, `answer`, `teacher_answer`, `agrees` and `kept` of each finished answer.
        used: whether a generation was trained on those that agree.
    """

    generation: int
    rows: list[dict[str, Any]]
    used: bool


class CoBoostingTrainer:
    """Train generations of experts on easy questions and on hard ones whose answers others agree with.

    Generation 0 is T = `args.num_rounds` experts on the easy questions. For each of `args.generations` further ones

    1. the mixture of the generation before answers the unlabelled questions greedily;
    2. these answers are dealt into K folds (`strong.args.relabel_folds`), and the strong model, fine-tuned on the
       answers of the other folds, answers each fold's questions (`StudentTrainer.relabel`);
    3. answers that are the same after `data.answers.normalise_answer`, and finished, count as agreed;
    4. T experts are trained from the pre-trained model on easy questions and agreed answers together, in as many steps
       as those of generation 0, with token weights as `GenerationTrainer` has them.

    The last generation alone is the ensemble, by default with equal weights. Where fewer than 20% of the answers agree,
    or fewer than 32, there is no further generation, and `stop_reason` says so.

    Every step is kept in `args.output_dir`, and the same call after a crash goes on behind the last one, to the same
    bits. Several processes share out the work as in `BoostingTrainer`.

    Args:
        model: the experts' pre-trained model, as in `BoostingTrainer`.
        strong: the model that judges.
        args: see `BoostingConfig`, with `recipe="co_boosted"`.
        train_dataset: easy questions with answers, as in `BoostingTrainer`.
        unlabelled: hard questions, columns `prompt` and optionally `id` and `choices`; any other column, a true
            `answer` above all, is dropped unread.
        labelling: how experts answer; None takes the defaults of `LabellingConfig`.
        on_round: called with each round's record, which has its `generation`; as in `BoostingTrainer`.
        store: where experts, and answers that were judged, are kept for other trainers, and found.
        options: passed on to `BoostingTrainer`: `eval_dataset`, `processing_class`, `peft_config`, `question_format`,
            `model_init_kwargs`, and what it passes on itself.

    Raises:
        TypeError: `strong` or `labelling` of another type.
        TypeError, ValueError: what `BoostingTrainer`, `StudentTrainer` and `check_questions` refuse; another recipe; an
            unlabelled question that is among those with answers.

    `processing_class` and `question_format` are then the experts', and `cost` is what all experts, answers and judges
    took, once trained.
    """

    def __init__(
        self,
        model: Any,
        strong: StrongModel,
        args: BoostingConfig,
        train_dataset: Any,
        unlabelled: Any,
        labelling: LabellingConfig | None = None,
        on_round: Callable[[dict[str, Any]], None] | None = None,
        store: Store | None = None,
        **options: Any,
    ) -> None:
        require_arguments("CoBoostingTrainer", args, BoostingConfig)
        if args.recipe != "co_boosted":
            raise ValueError(f'args.recipe is {args.recipe!r}, expected "co_boosted": others need BoostingTrainer')
        _check_strong(strong)
        if not isinstance(labelling, LabellingConfig | None):
            raise TypeError(
                f"labelling is {shown(labelling)}, expected a LabellingConfig(max_new_tokens=32), for example"
            )
        self.model, self.strong, self.args = model, strong, args
        self.labelling = labelling or LabellingConfig()
        self.store, self._on_round, self._options = store, on_round, options
        self.output_dir = Path(str(args.output_dir))
        hard = as_dataset(unlabelled, "unlabelled")
        # No true answer gets further than this line.
        hard = hard.select_columns([name for name in ("id", "prompt", "choices") if name in hard.column_names])
        self.unlabelled = check_questions(hard, "unlabelled", answered=False)
        first = self._arguments(0, args.num_train_epochs)
        self._trainers: list[BoostingTrainer] = [
            BoostingTrainer(model, first, train_dataset, on_round=self._noted(0), store=store, **options)
        ]
        self.processing_class = self._trainers[0].processing_class
        self.question_format = self._trainers[0].question_format
        known = {"train_dataset": self._trainers[0].train_questions, "eval_dataset": self._trainers[0].eval_questions}
        check_disjoint({name: own for name, own in known.items() if own is not None} | {"unlabelled": self.unlabelled})
        self.judgements: list[Judgement] = []
        self.cost: TrainingCost | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of the `BoostingTrainer` of the ensemble's own generation."""
        return self._trainers[-1].folder

    @property
    def records(self) -> list[dict[str, Any]]:
        """Return one record per attempt of every round of all generations, once trained.

        Rounds are numbered through, and each record has its `generation`, from 0.
        """
        found = []
        for number, trainer in enumerate(self._trainers):
            before, own = number * self.args.num_rounds, {"generation": number}
            found += [{**record, "round": before + record["round"], **own} for record in trainer.records]
        return found

    @property
    def stop_reason(self) -> str | None:
        """Say why there are fewer generations or experts than asked for; None if there are not."""
        last = self.judgements[-1] if self.judgements else None
        if last is None or last.used:
            return self._trainers[-1].stop_reason
        agree = sum(row["agrees"] for row in last.rows)
        return (
            f"there is no generation {last.generation}: {agree} of {len(last.rows)} answers to unlabelled questions "
            f"agree with those of out-of-fold students, too few to learn from ({enough_in_words()} are needed). The "
            f"ensemble is that of generation {last.generation - 1}"
        )

    def expert_folders(self) -> list[Path]:
        """Return where the experts of the ensemble are saved, in their order."""
        return self._trainers[-1].expert_folders()

    def mixture(self) -> dict[str, Any]:
        """Return how many experts the ensemble has, and their weights; see `BoostingTrainer.mixture`."""
        return self._trainers[-1].mixture()

    def record(self) -> dict[str, Any]:
        """Return the run's account, to be saved with the ensemble."""
        own = {name: getattr(self.args, name) for name in ("recipe", "generations", "generation_weights")}
        return self._trainers[-1].record() | own | {"rounds": self.records, "stop_reason": self.stop_reason}

    def train(self, save_to: str | Path | None = None, *, resume_from_checkpoint: bool | None = None) -> TokenEnsemble:
        """Run or continue all generations, save the last one's ensemble with `record()`, and return it.

        Args:
            save_to: the folder; None is `ensemble` in `args.output_dir`.
            resume_from_checkpoint: True says what happens anyway; anything else than None is a ValueError.

        Raises:
            FileExistsError: another model is where the ensemble would be saved; nothing is trained.
            InUseError: another process trains in `args.output_dir`.
            RuntimeError: no expert beat the prior.
            ValueError: `args.output_dir` belongs to another configuration, or holds what is damaged or not ours.
        """
        check_resume(resume_from_checkpoint)
        remedy = "pass overwrite=True to delete that run"
        with claimed(self.output_dir, CO_BOOSTING, self._fingerprint(), overwrite=self.args.overwrite, remedy=remedy):
            place = save_to or self.output_dir / "ensemble"
            processes.on_main(refuse_others, place, "ensemble")
            if not processes.on_main((self.output_dir / "generation-0").exists):
                # That of a run that was overwritten would be taken for this one's.
                processes.on_main(withdraw, self.output_dir / "ensemble", "ensemble")
            del self._trainers[1:]
            self.judgements.clear()
            ensemble = self._trainers[0].train()
            for number in range(1, self.args.generations + 1):
                judged = self._judged(number, ensemble)
                self.judgements.append(judged)
                if not judged.used:
                    break
                self._trainers.append(self._generation(judged))
                ensemble = self._trainers[-1].train()
            processes.on_main(self._keep_cost)
            self.cost = TrainingCost(**processes.on_main(read_json, self.output_dir / "cost.json"))
            saved_with = {"processing_class": self.processing_class, "record": self.record()}
            processes.on_main(ensemble.save_pretrained, place, **saved_with)
            # It is the same.
            processes.on_main(withdraw, self.folder / "ensemble", "ensemble")
            if not judged.used and self._on_round is None and processes.is_main():
                warnings.warn(str(self.stop_reason), stacklevel=2)
            return ensemble

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Return how the ensemble answers questions, as `BoostingTrainer.evaluate` does, once trained."""
        return self._trainers[-1].evaluate(eval_dataset)

    def _arguments(self, number: int, epochs: float) -> BoostingConfig:
        """Return the settings of one generation's rounds."""
        args = copy.copy(self.args)
        args.recipe, args.num_train_epochs = "tempered", epochs
        args.output_dir = str(self.output_dir / f"generation-{number}")
        # What another configuration left is deleted as a whole.
        args.overwrite = False
        if number:
            # With the seeds of generation 0 its experts would be like theirs.
            seeds = np.random.SeedSequence(self.args.seed, spawn_key=(0, number))
            args.seed = int(seeds.generate_state(1)[0])
        if number and self.args.generation_weights == "uniform":
            args.recipe, args.sampling, args.errors = "deep_ensemble", "all", "hard"
        return args

    def _noted(self, number: int) -> Callable[[dict[str, Any]], None] | None:
        tell = self._on_round
        return None if tell is None else lambda record: tell({**record, "generation": number})

    def _generation(self, judged: Judgement) -> BoostingTrainer:
        """Return the trainer of experts on easy questions and agreed answers."""
        easy = self._trainers[0].train_questions
        # Ids are made of the content: easy and hard questions may share some.
        names = [name for name in ("prompt", "answer", "choices") if name in easy.column_names]
        agreed = [{**row, "answer": row["teacher_answer"]} for row in judged.rows if row["agrees"]]
        rows = [*easy.select_columns(names), *({name: row[name] for name in names} for row in agreed)]
        epochs = self.args.num_train_epochs * len(easy) / len(rows)
        trainer = GenerationTrainer(
            self.model,
            self._arguments(judged.generation, epochs),
            dataset_of(rows, "easy questions and agreed answers"),
            on_round=self._noted(judged.generation),
            store=self.store,
            **self._options,
        )
        trainer.earlier = self._trainers[-1].expert_folders()
        return trainer

    def _judged(self, number: int, ensemble: TokenEnsemble) -> Judgement:
        """Return the experts' answers with what students of folds say to them, made or found."""
        kept, place = self.output_dir / f"agreed-{number}", self.output_dir / f"answers-{number}"
        there = processes.on_main(kept.exists)
        if there and self.store is not None:
            self.store.fulfil(kept)
        if not there:
            self._judge(kept, place, self._labelled(place, ensemble))
        rows = processes.on_main(read_json_lines, kept / "answers.jsonl")
        return Judgement(number, rows, enough_agree(sum(row["agrees"] for row in rows), len(rows)))

    def _labelled(self, place: Path, ensemble: TokenEnsemble) -> Dataset:
        """Let experts answer the unlabelled questions, rows going into a file in `place`."""
        file, ledger = place / "labels.jsonl", Ledger(place / "costs.jsonl")
        with ledger.running():
            answers = ensemble.label(
                self.unlabelled,
                self.processing_class,
                question_format=self.question_format,
                output_file=file,
                description=None if self.args.disable_tqdm else "answering unlabelled questions",
                **asdict(self.labelling),
            )
            ledger.note(file)
            spent = processes.on_main(ledger.total)
        processes.on_main(settle, file)
        processes.on_main(write_json, place / "labelled.json", {name: spent[name] for name in _COSTS})
        return answers

    def _judge(self, kept: Path, place: Path, answers: Dataset) -> None:
        """Leave in the folder `kept` what students of folds say to the answers, and what they took."""
        args = copy.copy(self.strong.args)
        args.output_dir = str(place)
        finished = answers.select(np.flatnonzero([row["finished"] and bool(row["answer"].strip()) for row in answers]))
        if len(finished) < args.relabel_folds:
            # Nothing to judge: no folds can be made.
            processes.on_main(_keep_judged, kept, [], [])
            return
        student = StudentTrainer(
            self.strong.source,
            args,
            finished,
            processing_class=self.strong.processing_class,
            peft_config=self.strong.peft_config,
            question_format=self.question_format,
            model_init_kwargs=self.strong.model_init_kwargs,
            description="judging answers",
        )

        def make() -> None:
            judged = student.relabel(fall_back=False)
            processes.on_main(_keep_judged, kept, list(judged), student.relabel_costs)

        if self.store is None:
            make()
        else:
            self.store.obtain(kept, student.relabel_description() | {"num_processes": processes.count()}, make)

    def _keep_cost(self) -> None:
        parts = [{name: record[f"train_{name}"] for name in _COSTS} for record in self.records]
        for judged in self.judgements:
            number = judged.generation
            parts.append(read_json(self.output_dir / f"answers-{number}" / "labelled.json"))
            parts.append(read_json(self.output_dir / f"agreed-{number}" / "cost.json"))
        write_json(self.output_dir / "cost.json", {name: total(part[name] for part in parts) for name in _COSTS})

    def _fingerprint(self) -> dict[str, Any]:
        strong = self.strong
        described = {name: value for name, value in strong.args.to_dict().items() if name not in PRESENTATION}
        return {
            **self._trainers[0].fingerprint(),
            "recipe": self.args.recipe,
            "num_rounds": self.args.num_rounds,
            "unlabelled": digest_columns(self.unlabelled, self.unlabelled.column_names),
            "labelling": {"max_new_tokens": self.labelling.max_new_tokens},
            "strong": {
                **described,
                "model": describe_model(strong.source),
                "model_init_kwargs": dict(strong.model_init_kwargs),
                "peft_config": None if strong.peft_config is None else strong.peft_config.to_dict(),
            },
        }


def _check_strong(strong: Any) -> None:
    if not isinstance(strong, StrongModel):
        raise TypeError(
            f"strong is {shown(strong)}, expected the model with how its students are trained: give "
            'StrongModel(source, StudentConfig(output_dir="unused", relabel="cross_fit"))'
        )


def _keep_judged(folder: Path, rows: Sequence[Mapping[str, Any]], costs: Sequence[Any]) -> None:
    names = ("id", "prompt", "answer", "teacher_answer", "agrees", "kept", "choices")
    known = [asdict(cost) for cost in costs]
    with new_folder(folder) as aside:
        write_json_lines(aside / "answers.jsonl", ({name: row[name] for name in names if name in row} for row in rows))
        write_json(aside / "cost.json", {name: total(cost[name] for cost in known) for name in _COSTS})
