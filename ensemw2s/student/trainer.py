"""The strong student (phase 3 of the method): fine-tuned on hard questions with an ensemble's pseudo-answers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from transformers import GenerationConfig, PreTrainedModel

from ensemw2s.data.questions import check_questions, question_key
from ensemw2s.data.shapes import with_column
from ensemw2s.data.tokens import (
    QuestionFormat,
    answer_lengths,
    checked_format,
    described_format,
    end_tokens,
    format_of_answers,
    tokenize_questions,
)
from ensemw2s.ensemble.model import TokenEnsemble
from ensemw2s.inference.label_files import TOP_COLUMNS
from ensemw2s.inference.labelling import require_probabilities
from ensemw2s.inference.measuring import measure
from ensemw2s.models.adapters import ADAPTER_WEIGHTS, attach_adapter, check_peft_config
from ensemw2s.models.identity import describe_experts, describe_model, digest_tokenizer
from ensemw2s.models.loading import load_model, load_saved_model, require_model, tokenizer_for
from ensemw2s.models.own_files import own_files, refuse_others, whole
from ensemw2s.models.saved import read_settings
from ensemw2s.runtime import processes
from ensemw2s.runtime.console import no_model_bars
from ensemw2s.runtime.files import write_json
from ensemw2s.runtime.fingerprint import digest_columns, digest_examples
from ensemw2s.runtime.values import Uses, check_in_use
from ensemw2s.student.answers import check_answer_ids, check_cache, gold_rows, usable_answers
from ensemw2s.student.losses import ConfidenceTrainer, SoftTrainer
from ensemw2s.student.relabel import FoldStudents, longest_answer, sum_of
from ensemw2s.student.teacher import LiveTeacher, top_columns, with_columns
from ensemw2s.training.arguments import (
    AnswerTrainingArguments,
    check_resume,
    check_trainer_options,
    questions_to_evaluate,
    require_arguments,
    require_eval_dataset,
)
from ensemw2s.training.checkpoints import discard_checkpoints
from ensemw2s.training.fine_tune import PRESENTATION, TrainingCost, fine_tune, optimizer_described
from ensemw2s.training.trainer import on_device

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

    from ensemw2s.models.mixture import ExpertMixture


Variant = Literal["sft", "soft", "confidence"]
# How a student was asked in its training.
_FORMAT_FILE = "question_format.json"
# Settings that act beside some others only.
USES_OF_SETTINGS: Uses = {
    **dict.fromkeys(
        ("relabel_folds", "relabel_keep", "relabel_rounds"),
        (lambda args: args.relabel is not None, 'relabel="cross_fit"'),
    ),
    **dict.fromkeys(
        ("temperature", "soft_weight", "top_logprobs"), (lambda args: args.variant == "soft", 'variant="soft"')
    ),
    **dict.fromkeys(
        ("confidence_alpha", "confidence_warmup"),
        (lambda args: args.variant == "confidence", 'variant="confidence"'),
    ),
    "label_smoothing_factor": (
        lambda args: args.variant == "sft" or (args.variant == "soft" and args.soft_weight < 1),
        'cross entropy on labels alone (variant="sft", or variant="soft" with soft_weight below 1)',
    ),
}


@dataclass
class StudentConfig(AnswerTrainingArguments):
    """What `StudentTrainer` does, on top of transformers' `TrainingArguments`.

    Attributes:
        variant: what is learned (method, phase 3): "sft" (the paper's: cross entropy on the pseudo-answers), "soft"
            (KL from the teacher's distribution at every answer token) or "confidence" (Burns et al. 2023: cross entropy
            on the pseudo-answers and on the student's own likeliest tokens).
        temperature: for "soft", divides the logits of student and teachers; the KL is multiplied by its square.
        soft_weight: for "soft", the share of the KL in the loss, in (0, 1]; the rest is cross entropy.
        top_logprobs: for "soft", learn from the teacher's k likeliest tokens, kept beforehand; None runs the teacher at
            every step, or takes all that the dataset's cache keeps.
        confidence_alpha: for "confidence", the largest share of the student's own tokens in the loss, in [0, 1]. The
            default is that of Burns et al., who give 0.75 to their largest students.
        confidence_warmup: for "confidence", the share of the steps over which that share rises from 0, in [0, 1];
            Burns et al. say 0.2.
        min_confidence: drop pseudo-answers whose `confidence` (mean log-probability per token, nats, at most 0) is
            lower; None keeps all.
        keep_fraction: keep this share of the dataset's rows, in (0, 1], the most confident ones; None keeps all.
            Unusable rows count as rows, so that the students of two teachers see equally many answers [choice].
        keep_unfinished: train also on answers that were cut off before their end token. Otherwise they are dropped
            [choice]: the teacher had not ended there, and a student would learn to stop, or to go on, at a place that
            `max_new_tokens` chose. Answers that are kept in this way get no end token.
        relabel: "cross_fit" puts every question to a student that never saw a label for it, before the student itself
            is trained [choice: ours, no part of the paper]. The usable answers are dealt into `relabel_folds` folds, by
            a hash of seed and question; for each, a student like this one is trained on the answers of the other folds,
            with a seed of its own, and answers the fold's questions greedily. Every one of them, and the student itself
            at the end, sees as many answers as a plain student sees in `num_train_epochs`, so that it takes as many
            steps (up to a last batch that is not full; with `max_steps`, exactly those). None trains on the teacher's
            answers as they are.
        relabel_folds: how many folds, at least 2.
        relabel_keep: "agree" trains on the answers that the fold's student gave as well (after
            `data.answers.normalise_answer`), and finished; where these are fewer than 20% or fewer than 32, it warns
            and does as "all" [choice]. "all" trains on the folds' students' answers, wherever they finished, in place
            of the teacher's.
        relabel_rounds: 1, or 2: a second round begins with the answers that the first one left.

    Raises:
        TypeError: a value of another type than is declared; names it.
        ValueError: a value outside its range, or a setting that the variant does not read; names it.
    """

    variant: Variant = "sft"
    temperature: float = 1.0
    soft_weight: float = 1.0
    top_logprobs: int | None = None
    confidence_alpha: float = 0.5
    confidence_warmup: float = 0.2
    min_confidence: float | None = None
    keep_fraction: float | None = None
    keep_unfinished: bool = False
    relabel: Literal["cross_fit"] | None = None
    relabel_folds: int = 2
    relabel_keep: Literal["agree", "all"] = "agree"
    relabel_rounds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_in_use(self, USES_OF_SETTINGS)

    @property
    def on_truth(self) -> dict[str, Any]:
        """Return the settings with which the same student is taught ground truth, which has no teacher."""
        return {"variant": "sft", "min_confidence": None, "keep_fraction": None, "relabel": None}


class StudentTrainer:
    """Fine-tune a student on answers that a teacher gave, in one of the ways of `StudentConfig.variant`.

    To compare teachers, train the same student in the same way on the answers of each.

    "sft" and "confidence" take any tokenizer: answers are tokenised by the student's own. "soft" compares distributions
    token by token, so student and teacher must share one; it trains on the tokens that the teacher chose (`answer_ids`)
    where the dataset has them [choice], and on the answers as the tokenizer cuts them otherwise. What the teacher says
    comes with `teacher` and no `top_logprobs` from running it at every step; with both, from a cache that `train` makes
    by running `teacher` once over the answers; and without `teacher` from the cache that is in the dataset
    (`TokenEnsemble.label(..., top_logprobs=k)`, `ensemw2s.student.teacher.cache_teacher`). Answers end with the
    student's own end token, whichever of several the teacher chose.

    Rows whose column `gold` is true (`answers.with_gold`) are taught as they are: they are neither left out nor
    relabelled, and training on them takes no steps of its own: epochs are cut so that as many answers are seen as
    without them [choice]. With `args.relabel` the folds' students and their answers lie in `args.output_dir/relabel`;
    the same call after a crash goes on there, to the same bits.

    Args:
        model: source of `ensemw2s.load_model`, or a model (which is trained in place).
        args: see `StudentConfig`.
        train_dataset: questions with answers, as `TokenEnsemble.label` returns them or in any other shape that
            `ensemw2s.data.shapes.as_dataset` takes; see `usable_answers` for the rows that are left out.
        processing_class: the student's tokenizer; None loads the one that `model` was loaded with.
        peft_config: train an adapter with this configuration; None trains all weights.
        question_format: how a question becomes tokens; None is the format in which the answers were asked for, if the
            dataset comes from `TokenEnsemble.label`, and else the default.
        model_init_kwargs: passed on to `ensemw2s.load_model`.
        description: shown beside the progress bar.
        teacher: for "soft", the ensemble whose distributions are learned.
        eval_dataset: questions with answers for `evaluate`, on which `args.eval_strategy` measures the loss (cross
            entropy, nats per answer token) during training as well.
        trainer_options: passed on to `transformers.Trainer`: `callbacks`, `optimizer_cls_and_kwargs`, and `optimizers`
            where all weights of a given model are trained.

    Raises:
        TypeError: a `trainer_options` that is not passed on; says why. A `question_format` that is none.
        ValueError: a `peft_config` that changes the base model; no row is left to train on; a filter by confidence
            without a `confidence` column; no `processing_class` for a model that was not loaded from anywhere; for
            "soft", neither teacher nor cache, a teacher that votes or has another vocabulary, a cache of another
            temperature or with fewer tokens than asked for, or teacher's tokens that the student's tokenizer reads
            otherwise; a `teacher` for another variant; gold answers for "soft"; with `args.relabel`, fewer questions
            than folds, `optimizers`, or replaced answers (`relabel_keep="all"`) beside a cache of the teacher's.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: StudentConfig,
        train_dataset: Any,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        question_format: QuestionFormat | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        description: str = "training student",
        teacher: ExpertMixture | None = None,
        eval_dataset: Any = None,
        **trainer_options: Any,
    ) -> None:
        require_arguments("StudentTrainer", args, StudentConfig)
        self._options = check_trainer_options("StudentTrainer", trainer_options, args)
        if "optimizers" in self._options:
            _check_optimizer(self._options["optimizers"][0], model if peft_config is None else None)
        require_eval_dataset(args, eval_dataset)
        self.args = args.for_training(adapters=peft_config is not None)
        if peft_config is not None:
            check_peft_config(peft_config, "peft_config")
        self.peft_config = peft_config
        self.description = description
        self.train_dataset = usable_answers(
            train_dataset,
            min_confidence=args.min_confidence,
            keep_fraction=args.keep_fraction,
            keep_unfinished=args.keep_unfinished,
        )
        self.teacher = teacher
        self._check_teacher()
        self.model: Any = model
        if not isinstance(model, PreTrainedModel):
            self.model = on_device(load_model(model, **(model_init_kwargs or {})), args)
        self.processing_class = tokenizer_for(model, processing_class)
        if teacher is not None and teacher.config.vocab_size != len(self.model.get_output_embeddings().weight):
            raise ValueError(
                f"the teacher has a vocabulary of {teacher.config.vocab_size} tokens, the student one of "
                f'{len(self.model.get_output_embeddings().weight)}: variant="soft" compares them token by token and '
                'needs the same; use variant="sft" with this teacher'
            )
        if question_format is None:
            question_format = format_of_answers(train_dataset, self.train_dataset.column_names)
        self.question_format = checked_format(question_format)
        self._examples = self._tokenized(self.train_dataset)
        # Gold answers take no steps of their own.
        self._plain = int((~gold_rows(self.train_dataset)).sum()) or len(self.train_dataset)
        self.eval_questions = None if eval_dataset is None else check_questions(eval_dataset, "eval_dataset")
        if self.eval_questions is not None and args.eval_strategy != "no":
            self._options["eval_dataset"] = tokenize_questions(
                self.eval_questions, self.processing_class, self.question_format, "eval_dataset"
            )
        if args.relabel is not None:
            self._check_relabelling()
        self._relabelled: tuple[Dataset, list[TrainingCost]] | None = None
        self.cost: TrainingCost | None = None

    @property
    def _reads_cache(self) -> bool:
        """Whether the dataset's own cache is what a "soft" student learns from."""
        cached = "top_log_probs" in self.train_dataset.column_names
        return cached and (self.teacher is None or self.args.top_logprobs is not None)

    def _check_relabelling(self) -> None:
        if "optimizers" in self._options:
            raise ValueError(
                "optimizers holds an optimizer of one model's weights, and with relabel every fold's student has "
                "weights of its own: give optimizer_cls_and_kwargs=(class, settings)"
            )
        if self.args.relabel_keep == "all" and self.args.variant == "soft" and self._reads_cache:
            raise ValueError(
                'relabel_keep="all" replaces answers, and the cache in train_dataset (top_log_probs) goes along the '
                'teacher\'s: use relabel_keep="agree", or pass teacher and a dataset without a cache'
            )
        if not self.question_format.end_token and "choices" not in self.train_dataset.column_names:
            raise ValueError(
                "relabel lets students answer, and the format has end_token=False, so that their answers would have no "
                "end: use end_token=True, or give the questions a column `choices`"
            )
        asked = {question_key(row["prompt"]) for row in self.train_dataset.select_columns("prompt")}
        if self.args.relabel_folds > min(len(asked), self._plain):
            raise ValueError(
                f"relabel_folds={self.args.relabel_folds} leaves folds without a question: {self._plain} answers to "
                f"{len(asked)} questions can be used, give at most as many folds"
            )

    def _check_teacher(self) -> None:
        if self.args.variant != "soft":
            if self.teacher is not None:
                raise ValueError(
                    f'a teacher is for variant="soft", not for {self.args.variant!r}, which learns from answers alone: '
                    "leave it out"
                )
        elif gold_rows(self.train_dataset).any():
            raise ValueError(
                'variant="soft" learns distributions, which gold answers do not have: leave out the rows whose `gold` '
                'is true, or use variant="sft" or "confidence"'
            )
        elif self._reads_cache:
            if self.teacher is not None:
                raise ValueError(
                    "train_dataset has a cache (top_log_probs) already, which may be another teacher's: leave out "
                    "teacher to learn from it, remove its columns to have teacher make one, or leave out top_logprobs "
                    "to have teacher run at every step"
                )
            check_cache(self.train_dataset, self.args.temperature, self.args.top_logprobs)
        elif self.teacher is None:
            raise ValueError(
                'variant="soft" needs the teacher\'s distributions: pass teacher=ensemble, or a dataset from '
                "TokenEnsemble.label(..., top_logprobs=k)"
            )
        else:
            require_probabilities(self.teacher)

    def _tokenized(self, answers: Dataset) -> Dataset:
        """Return answers as examples, with the columns that the variant reads."""
        soft = self.args.variant == "soft"
        known = None
        if soft and "answer_ids" in answers.column_names:
            stops = end_tokens(self.processing_class, getattr(self.model, "generation_config", None))
            check_answer_ids(answers, self.processing_class, self.question_format, stops, "the student's tokenizer")
            end = self.processing_class.eos_token_id
            known = [[*ids[:-1], end] if ids[-1] in stops else list(ids) for ids in answers["answer_ids"]]
        examples = tokenize_questions(
            answers, self.processing_class, self.question_format, "train_dataset", answer_ids=known
        )
        if soft and self._reads_cache:
            cache = answers.with_format("arrow")
            return with_columns(examples, {name: cache[name] for name in TOP_COLUMNS})
        if known is None and not all(answers["finished"] if "finished" in answers.column_names else ()):
            # No teacher gave the end token that tokenising adds.
            ends = zip(answer_lengths(examples), answers["finished"], strict=True)
            weights = [np.append(np.ones(length - 1), float(finished)) for length, finished in ends]
            return with_column(examples, "token_weights", weights)
        return examples

    def train(self, save_to: str | Path | None = None, *, resume_from_checkpoint: bool | None = None) -> Any:
        """Train the student, save it as `save_model(save_to)` does, and return it, in evaluation mode.

        With `args.relabel` the answers are relabelled first, as `relabel` does, and `train_dataset` then holds those
        that the student was trained on. `cost` counts the student's own tokens, those of the folds' students and of
        their answering among them; a live teacher's work is in the seconds and FLOPs. `resume_from_checkpoint=True`
        says what happens anyway: with what an interrupted call left, training goes on.

        Raises:
            FileExistsError: another model is where the student would be saved; nothing is trained.
            FloatingPointError: the loss or a weight became NaN or infinite, or the teacher gives NaN.
            RuntimeError: it is trained already.
            ValueError: with `args.relabel`, `args.output_dir` holds a relabelling of another configuration; or
                `resume_from_checkpoint` is False or a folder.
        """
        check_resume(resume_from_checkpoint)
        if self.cost is not None:
            raise RuntimeError("this student is trained already: make a new StudentTrainer to train from the start")
        place = save_to or str(self.args.output_dir)
        if processes.on_main(refuse_others, place, "student"):
            warnings.warn(f"{place} holds a student already, which this one will replace once trained", stacklevel=2)
        if self.args.relabel is not None:
            judged = self.relabel()
            self.train_dataset = judged.select(np.flatnonzero(judged["kept"]))
            self._examples = self._tokenized(self.train_dataset)
        self.model, cost = self._taught(self.model, self._examples, self.args, self.description)
        self.cost = sum_of([*self.relabel_costs, cost])
        self.save_model(save_to)
        return self.model

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Return `eval_accuracy`, `eval_token_error` and `eval_loss` of the student; see
        `ensemw2s.inference.measuring.measure`.

        Before `train` that is the model as it was given.

        Args:
            eval_dataset: questions with answers; None takes the `eval_dataset` that the trainer was given.

        Raises:
            ValueError: no questions, or questions that `check_questions` refuses.
        """
        questions = questions_to_evaluate(eval_dataset, self.eval_questions)
        batch_size = self.args.per_device_eval_batch_size
        return measure(self.model.eval(), questions, self.processing_class, self.question_format, batch_size)

    def relabel(self, fall_back: bool = True) -> Dataset:
        """Judge the usable answers by students that never saw a label for them, as `args.relabel` says.

        `train` does this first. What is made lies in `args.output_dir/relabel`, with `answers.jsonl` for a reader, and
        a later call finds it there.

        Args:
            fall_back: with `relabel_keep="agree"`, False keeps the answers that agree however few they are.

        Returns:
            The rows that a plain student would be trained on, with `answer` replaced where `args.relabel_keep` says so,
            and the columns `teacher_answer` (text), `agrees` (bool: the fold's student gave the answer that it judged,
            and finished; true for gold answers) and `kept` (bool: the student is trained on the row).

        Raises:
            FloatingPointError: a training diverged, or a fold's student gives NaN.
            RuntimeError: the student is trained already.
            ValueError: `args.relabel` is None; `args.output_dir` holds a relabelling of another configuration, or a
                damaged one.
        """
        if self.args.relabel is None:
            raise ValueError('relabel is None: make the trainer with StudentConfig(relabel="cross_fit")')
        if self._relabelled is None:
            if self.cost is not None:
                raise RuntimeError("this student is trained already: make a new StudentTrainer to relabel answers")
            window = getattr(self.model.config, "max_position_embeddings", None)
            folds = FoldStudents(
                self.args,
                teach=self._fold_student,
                load=self._as_ensemble,
                processing_class=self.processing_class,
                question_format=self.question_format,
                max_new_tokens=longest_answer(self._examples, window),
                falls_back=fall_back,
                replaces=self.args.variant != "soft" or not self._reads_cache,
                name=self.description,
            )
            self._relabelled = folds.relabel(self.train_dataset, self.relabel_description())
        return self._relabelled[0]

    @property
    def relabel_costs(self) -> list[TrainingCost]:
        """Return what the students of folds, and their answering, took each; none before `relabel`."""
        return [] if self._relabelled is None else self._relabelled[1]

    def _fold_student(self, answers: Dataset, args: StudentConfig, description: str) -> tuple[Any, TrainingCost]:
        return self._taught(copy.deepcopy(self.model), self._tokenized(answers), args, description)

    def _as_ensemble(self, folder: Path) -> TokenEnsemble:
        """Return the student of a fold, which decodes greedily whatever the model's authors recommend for chats."""
        if self.peft_config is not None:
            ensemble = TokenEnsemble.from_adapters(copy.deepcopy(self.model), [folder], [1.0])
        else:
            model = load_saved_model(folder, "the student of a fold", dtype=self.model.dtype)
            ensemble = TokenEnsemble.from_models([on_device(model, self.args)], [1.0])
        ensemble.generation_config = GenerationConfig(eos_token_id=ensemble.generation_config.eos_token_id)
        return ensemble

    def relabel_description(self) -> dict[str, Any]:
        """Return what decides the outcome of `relabel`, as plain JSON but for what `fingerprint.plain` knows."""
        columns = ("id", "prompt", "answer", "choices", "answer_ids", "finished", "gold", *TOP_COLUMNS)
        evaluated = self._options.get("eval_dataset")
        teacher = None
        if self.teacher is not None:
            mixture = {"weights": list(self.teacher.config.expert_weights), "combine": self.teacher.config.combine}
            teacher = describe_experts(self.teacher.experts) | mixture
        return {
            **{name: value for name, value in self.args.to_dict().items() if name not in PRESENTATION},
            "model": describe_model(self.model),
            "peft_config": None if self.peft_config is None else self.peft_config.to_dict(),
            "question_format": self.question_format.describe(),
            "tokenizer": digest_tokenizer(self.processing_class),
            "answers": digest_columns(self.train_dataset, [n for n in columns if n in self.train_dataset.column_names]),
            "teacher": teacher,
            "eval_dataset": None if evaluated is None else digest_examples(evaluated),
            "optimizer": optimizer_described(self._options),
        }

    def _taught(self, model: Any, examples: Dataset, args: StudentConfig, description: str) -> tuple[Any, TrainingCost]:
        """Return a model that was trained on examples for the steps of a plain student, and what that took."""
        if len(examples) != self._plain:
            args = copy.copy(args)
            args.num_train_epochs = args.num_train_epochs * self._plain / len(examples)
        return fine_tune(
            model,
            self._with_cache(examples),
            args,
            pad_token_id=self.processing_class.eos_token_id,
            seed=args.seed,
            description=description,
            peft_config=self.peft_config,
            **self._options,
            **self._loss_options(),
        )

    def _with_cache(self, examples: Dataset) -> Dataset:
        """Return examples with what the teacher says along them, if a student is to learn from a cache made here."""
        args = self.args
        if args.variant != "soft" or args.top_logprobs is None or self._reads_cache:
            return examples
        columns = top_columns(
            LiveTeacher(on_device(self.teacher, args)),
            examples,
            pad_token_id=self.processing_class.eos_token_id,
            top_logprobs=args.top_logprobs,
            temperature=args.temperature,
            batch_size=args.per_device_eval_batch_size,
            description=None if args.disable_tqdm else "keeping the teacher's likeliest tokens",
        )
        return with_columns(examples, columns)

    def _loss_options(self) -> dict[str, Any]:
        """Return the trainer class of the variant, and what it takes."""
        args = self.args
        if args.variant == "confidence":
            return {
                "trainer_class": ConfidenceTrainer,
                "alpha": args.confidence_alpha,
                "warmup": args.confidence_warmup,
            }
        if args.variant == "sft":
            return {}
        cached = self._reads_cache or args.top_logprobs is not None
        return {
            "trainer_class": SoftTrainer,
            "teacher": None if cached else LiveTeacher(on_device(self.teacher, args)),
            "temperature": args.temperature,
            "soft_weight": args.soft_weight,
            "top_logprobs": args.top_logprobs,
        }

    def save_model(self, folder: str | Path | None = None) -> None:
        """Write the student (its adapter alone, if one was trained), tokenizer and cost, whole or not at all.

        None is `args.output_dir`, where `train` has saved it already unless it was told otherwise.
        Of several processes, all must call this and the main one writes. What a student that was saved there before
        consists of is replaced; everything else in the folder stays.

        Raises:
            DiskFullError: the disk is full; what was at `folder` before is untouched.
            FileExistsError: another model, or a file that no student of ours wrote, is in the way.
            PermissionError: the folder cannot be written.
            RuntimeError: the student is not trained yet.
        """
        if self.cost is None:
            raise RuntimeError("this student is not trained yet: call train() before save_model()")
        processes.on_main(self._write, folder or str(self.args.output_dir))

    def _write(self, folder: str | Path) -> None:
        assert self.cost is not None
        # With whole weights, what transformers loads says by itself how it is asked.
        self.model.config.question_format = self.question_format.describe()
        with own_files(folder, "student") as aside, no_model_bars():
            self.model.save_pretrained(aside)
            write_json(aside / _FORMAT_FILE, self.question_format.describe())
            self.processing_class.save_pretrained(aside)
            write_json(aside / "cost.json", asdict(self.cost))
        discard_checkpoints(self.args.output_dir)


def _check_optimizer(optimizer: Any, model: Any) -> None:
    """Raise ValueError unless `optimizer` is one of weights of `model` (None has none yet)."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            "optimizers holds an optimizer of weights that are there already, and these are only loaded or made "
            "here: give optimizer_cls_and_kwargs=(class, settings), or a model and no peft_config"
        )
    groups = [] if optimizer is None else optimizer.param_groups
    if not {id(weight) for group in groups for weight in group["params"]} <= {id(own) for own in model.parameters()}:
        raise ValueError(
            "optimizers holds weights that are not the model's, which would stay as they are: make the optimizer of "
            "model.parameters()"
        )


def load_trained(folder: str | Path, source: str | None = None, **model_init_kwargs: Any) -> Any:
    """Load what `StudentTrainer.save_model` wrote, in evaluation mode; `score_answers` asks it as it was trained.

    Args:
        folder: a saved student.
        source: the model that an adapter in `folder` was trained on; not needed for whole weights.
        model_init_kwargs: passed on to `ensemw2s.load_model`; `keep_layers` matters to an adapter's model only, for
            whole weights are saved without the layers that were left out.

    Raises:
        FileNotFoundError: weights, or settings beside them, are missing.
        OSError: a file cannot be read.
        ValueError: damaged weights or settings; an adapter without `source`, or one that does not fit it.
    """
    files = whole(Path(folder))
    if not (files / ADAPTER_WEIGHTS).exists():
        require_model(files)
        kwargs = {name: value for name, value in model_init_kwargs.items() if name != "keep_layers"}
        return _asked_as_trained(load_saved_model(files, "the student", **kwargs), files)
    if source is None:
        raise ValueError(f"{folder} holds an adapter: name the model it was trained on as `source`")
    return _asked_as_trained(attach_adapter(load_model(source, **model_init_kwargs), files, "the student"), files)


def _asked_as_trained(model: Any, files: Path) -> Any:
    if (files / _FORMAT_FILE).exists():
        settings = read_settings(files / _FORMAT_FILE, "the student")
        model.config.question_format = described_format(settings, str(files / _FORMAT_FILE))
    return model.eval()
