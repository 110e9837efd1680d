"""The strong student (phase 3 of the method): fine-tuned on hard questions with an ensemble's pseudo-answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from transformers import PreTrainedModel

from ensemw2s.data.questions import check_questions
from ensemw2s.data.tokens import (
    QuestionFormat,
    answer_lengths,
    check_processing_class,
    described_format,
    end_tokens,
    tokenize_questions,
)
from ensemw2s.inference.label_files import TOP_COLUMNS
from ensemw2s.inference.labelling import require_probabilities
from ensemw2s.inference.measuring import measure
from ensemw2s.models.adapters import ADAPTER_WEIGHTS, attach_adapter, check_peft_config
from ensemw2s.models.loading import load_model, load_saved_model, load_tokenizer, require_model, source_of
from ensemw2s.models.own_files import own_files, refuse_others, whole
from ensemw2s.models.saved import read_settings
from ensemw2s.runtime import processes
from ensemw2s.runtime.console import no_model_bars
from ensemw2s.runtime.files import write_json
from ensemw2s.runtime.values import Uses, check_in_use
from ensemw2s.student.answers import check_answer_ids, check_cache, usable_answers
from ensemw2s.student.losses import ConfidenceTrainer, SoftTrainer
from ensemw2s.student.teacher import LiveTeacher, top_columns, with_columns
from ensemw2s.training.arguments import (
    AnswerTrainingArguments,
    check_trainer_options,
    require_arguments,
    require_eval_dataset,
    require_questions,
)
from ensemw2s.training.checkpoints import discard_checkpoints
from ensemw2s.training.fine_tune import TrainingCost, fine_tune
from ensemw2s.training.trainer import on_device

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

    from ensemw2s.models.mixture import ExpertMixture


Variant = Literal["sft", "soft", "confidence"]
# How a student was asked in its training.
_FORMAT_FILE = "question_format.json"
# Settings that act on one variant only.
USES_OF_SETTINGS: Uses = {
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_in_use(self, USES_OF_SETTINGS)

    @property
    def on_truth(self) -> dict[str, Any]:
        """Return the settings with which the same student is taught ground truth, which has no teacher."""
        return {"variant": "sft", "min_confidence": None, "keep_fraction": None}


class StudentTrainer:
    """Fine-tune a student on answers that a teacher gave, in one of the ways of `StudentConfig.variant`.

    To compare teachers, train the same student in the same way on the answers of each.

    "sft" and "confidence" take any tokenizer: answers are tokenised by the student's own. "soft" compares distributions
    token by token, so student and teacher must share one; it trains on the tokens that the teacher chose (`answer_ids`)
    where the dataset has them [choice], and on the answers as the tokenizer cuts them otherwise. What the teacher says
    comes with `teacher` and no `top_logprobs` from running it at every step; with both, from a cache that `train` makes
    by running `teacher` once over the answers; and without `teacher` from the cache that is in the dataset
    (`TokenEnsemble.label(..., top_logprobs=k)`, `teacher.cache_teacher`). Answers end with the student's own end
    token, whichever of several the teacher chose.

    Args:
        model: source of `loading.load_model`, or a model (which is trained in place).
        args: see `StudentConfig`.
        train_dataset: questions with answers, as `TokenEnsemble.label` returns them or in any other shape that
            `shapes.as_dataset` takes; see `usable_answers` for the rows that are left out.
        processing_class: the student's tokenizer; None loads the one that `model` was loaded with.
        peft_config: train an adapter with this configuration; None trains all weights.
        question_format: how a question becomes tokens.
        model_init_kwargs: passed on to `loading.load_model`.
        description: shown beside the progress bar.
        teacher: for "soft", the ensemble whose distributions are learned.
        eval_dataset: questions with answers for `evaluate`, on which `args.eval_strategy` measures the loss (cross
            entropy, nats per answer token) during training as well.
        trainer_options: passed on to `transformers.Trainer`: `callbacks`, `optimizer_cls_and_kwargs`, and `optimizers`
            where all weights of a given model are trained.

    Raises:
        TypeError: a `trainer_options` that is not passed on; says why.
        ValueError: a `peft_config` that changes the base model; no row is left to train on; a filter by confidence
            without a `confidence` column; no `processing_class` for a model that was not loaded from anywhere; for
            "soft", neither teacher nor cache, a teacher that votes or has another vocabulary, a cache of another
            temperature or with fewer tokens than asked for, or teacher's tokens that the student's tokenizer reads
            otherwise; a `teacher` for another variant.
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
        check_processing_class(processing_class)
        self.processing_class = processing_class or load_tokenizer(source_of(model))
        if teacher is not None and teacher.config.vocab_size != len(self.model.get_output_embeddings().weight):
            raise ValueError(
                f"the teacher has a vocabulary of {teacher.config.vocab_size} tokens, the student one of "
                f'{len(self.model.get_output_embeddings().weight)}: variant="soft" compares them token by token and '
                'needs the same; use variant="sft" with this teacher'
            )
        self.question_format = question_format or QuestionFormat()
        self._examples = self._tokenized(self.question_format)
        self.eval_questions = None if eval_dataset is None else check_questions(eval_dataset, "eval_dataset")
        if self.eval_questions is not None and args.eval_strategy != "no":
            self._options["eval_dataset"] = tokenize_questions(
                self.eval_questions, self.processing_class, self.question_format, "eval_dataset"
            )
        self.cost: TrainingCost | None = None

    @property
    def _reads_cache(self) -> bool:
        """Whether the dataset's own cache is what a "soft" student learns from."""
        cached = "top_log_probs" in self.train_dataset.column_names
        return cached and (self.teacher is None or self.args.top_logprobs is not None)

    def _check_teacher(self) -> None:
        if self.args.variant != "soft":
            if self.teacher is not None:
                raise ValueError(
                    f'a teacher is for variant="soft", not for {self.args.variant!r}, which learns from answers alone: '
                    "leave it out"
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

    def _tokenized(self, question_format: QuestionFormat) -> Dataset:
        """Return the examples, with the columns that the variant reads."""
        answers = self.train_dataset
        soft = self.args.variant == "soft"
        known = None
        if soft and "answer_ids" in answers.column_names:
            stops = end_tokens(self.processing_class, getattr(self.model, "generation_config", None))
            check_answer_ids(answers, self.processing_class, question_format, stops, "the student's tokenizer")
            end = self.processing_class.eos_token_id
            known = [[*ids[:-1], end] if ids[-1] in stops else list(ids) for ids in answers["answer_ids"]]
        examples = tokenize_questions(
            answers, self.processing_class, question_format, "train_dataset", answer_ids=known
        )
        if soft and self._reads_cache:
            cache = answers.with_format("arrow")
            return with_columns(examples, {name: cache[name] for name in TOP_COLUMNS})
        if known is None and not all(answers["finished"] if "finished" in answers.column_names else ()):
            # No teacher gave the end token that tokenising adds.
            ends = zip(answer_lengths(examples), answers["finished"], strict=True)
            weights = [np.append(np.ones(length - 1), float(finished)) for length, finished in ends]
            return examples.add_column("token_weights", weights)
        return examples

    def train(self, save_to: str | Path | None = None) -> Any:
        """Train the student, save it as `save_model(save_to)` does, and return it, in evaluation mode.

        `cost` then counts the student's own tokens; a live teacher's work is in the seconds and FLOPs.

        Raises:
            FileExistsError: another model is where the student would be saved; nothing is trained.
            FloatingPointError: the loss or a weight became NaN or infinite, or the teacher gives NaN.
            RuntimeError: it is trained already.
        """
        if self.cost is not None:
            raise RuntimeError("this student is trained already: make a new StudentTrainer to train from the start")
        processes.on_main(refuse_others, save_to or str(self.args.output_dir), "student")
        options = self._loss_options()
        self.model, self.cost = fine_tune(
            self.model,
            self._examples,
            self.args,
            pad_token_id=self.processing_class.eos_token_id,
            seed=self.args.seed,
            description=self.description,
            peft_config=self.peft_config,
            **self._options,
            **options,
        )
        self.save_model(save_to)
        return self.model

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Return `eval_accuracy`, `eval_token_error` and `eval_loss` of the student; see `measuring.measure`.

        Before `train` that is the model as it was given.

        Args:
            eval_dataset: questions with answers; None takes the `eval_dataset` that the trainer was given.

        Raises:
            ValueError: no questions, or questions that `check_questions` refuses.
        """
        questions = self.eval_questions if eval_dataset is None else eval_dataset
        require_questions(questions)
        batch_size = self.args.per_device_eval_batch_size
        return measure(self.model.eval(), questions, self.processing_class, self.question_format, batch_size)

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
        teacher = None if self._reads_cache else LiveTeacher(on_device(self.teacher, args))
        if teacher is not None and args.top_logprobs is not None:
            columns = top_columns(
                teacher,
                self._examples,
                pad_token_id=self.processing_class.eos_token_id,
                top_logprobs=args.top_logprobs,
                temperature=args.temperature,
                batch_size=args.per_device_eval_batch_size,
                description=None if args.disable_tqdm else "keeping the teacher's likeliest tokens",
            )
            self._examples, teacher = with_columns(self._examples, columns), None
        return {
            "trainer_class": SoftTrainer,
            "teacher": teacher,
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
        model_init_kwargs: passed on to `loading.load_model`; `keep_layers` matters to an adapter's model only, for
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
