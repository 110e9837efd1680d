"""The strong student (phase 3 of the method): fine-tuned on hard questions with an ensemble's pseudo-answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import PreTrainedModel

from ensemw2s import processes
from ensemw2s.checkpoints import discard_checkpoints
from ensemw2s.data import QuestionFormat, check_questions, tokenize_questions
from ensemw2s.experts import ADAPTER_WEIGHTS
from ensemw2s.files import new_folder, write_json
from ensemw2s.models import load_model, load_tokenizer, source_of
from ensemw2s.training import AnswerTrainingArguments, TrainingCost, fine_tune, on_device

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase


@dataclass
class StudentConfig(AnswerTrainingArguments):
    """What `StudentTrainer` does, on top of transformers' `TrainingArguments`.

    Attributes:
        min_confidence: drop pseudo-answers whose `confidence` (mean log-probability per token, nats, at most 0) is
            lower; None keeps all.
    """

    min_confidence: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_confidence is not None and self.min_confidence > 0:
            raise ValueError(f"min_confidence is a mean log-probability and at most 0, got {self.min_confidence}")


class StudentTrainer:
    """Fine-tune a student on answers that a teacher gave (the paper's way: cross entropy on the pseudo-answers).

    Teachers are compared by training the same student on their answers and on nothing else that differs.

    Args:
        model: source of `models.load_model`, or a model (which is trained in place).
        args: see `StudentConfig`.
        train_dataset: columns `prompt` and `answer`, as `TokenEnsemble.label` returns them; rows whose answer is
            empty are left out, and so are those below `args.min_confidence`.
        processing_class: the student's tokenizer; None loads the one that `model` was loaded with.
        peft_config: train an adapter with this configuration; None trains all weights.
        question_format: how a question becomes tokens.
        model_init_kwargs: passed on to `models.load_model`.
        description: shown beside the progress bar.

    Raises:
        ValueError: no row is left to train on, `min_confidence` without a `confidence` column, or no
            `processing_class` for a model that was not loaded from anywhere.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: StudentConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        question_format: QuestionFormat | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        description: str = "training student",
    ) -> None:
        self.args = args
        self.peft_config = peft_config
        self.description = description
        self.train_dataset = usable_answers(train_dataset, args.min_confidence)
        if isinstance(model, PreTrainedModel):
            self.model: Any = model
        else:
            self.model = on_device(load_model(model, **(model_init_kwargs or {})), args)
        self.processing_class = processing_class or load_tokenizer(source_of(model))
        self._examples = tokenize_questions(
            self.train_dataset, self.processing_class, question_format or QuestionFormat(), "train_dataset"
        )
        self.cost: TrainingCost | None = None

    def train(self) -> Any:
        """Train and return the student, in evaluation mode; `cost` then says what it took.

        Raises:
            FloatingPointError: the loss or a weight became NaN or infinite.
            RuntimeError: it is trained already.
        """
        if self.cost is not None:
            raise RuntimeError("this student is trained already: make a new StudentTrainer to train from the start")
        self.model, self.cost = fine_tune(
            self.model,
            self._examples,
            self.args,
            pad_token_id=self.processing_class.eos_token_id,
            seed=self.args.seed,
            description=self.description,
            peft_config=self.peft_config,
        )
        return self.model

    def save_model(self, folder: str | Path) -> None:
        """Write the student (its adapter alone, if one was trained), tokenizer and cost, whole or not at all.

        Of several processes, all must call this and the main one writes.

        Raises:
            DiskFullError: the disk is full; what was at `folder` before is untouched.
            RuntimeError: the student is not trained yet.
        """
        if self.cost is None:
            raise RuntimeError("this student is not trained yet: call train() before save_model()")
        processes.on_main(self._write, folder)

    def _write(self, folder: str | Path) -> None:
        assert self.cost is not None
        with new_folder(folder) as aside:
            self.model.save_pretrained(aside)
            self.processing_class.save_pretrained(aside)
            write_json(aside / "cost.json", asdict(self.cost))
        discard_checkpoints(self.args.output_dir)


def load_trained(folder: str | Path, source: str | None = None, **model_init_kwargs: Any) -> Any:
    """Load what `StudentTrainer.save_model` wrote, in evaluation mode.

    Args:
        folder: a saved student.
        source: the model that an adapter in `folder` was trained on; not needed for whole weights.
        model_init_kwargs: passed on to `models.load_model`; `keep_layers` matters to an adapter's model only, for whole
            weights are saved without the layers that were left out.

    Raises:
        FileNotFoundError: `folder` holds no weights.
        ValueError: an adapter without `source`.
    """
    if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
        return load_model(folder, **{k: v for k, v in model_init_kwargs.items() if k != "keep_layers"}).eval()
    if source is None:
        raise ValueError(f"{folder} holds an adapter: name the model it was trained on as `source`")
    return PeftModel.from_pretrained(load_model(source, **model_init_kwargs), str(folder)).eval()


def usable_answers(answers: Dataset, min_confidence: float | None = None) -> Dataset:
    """Return the rows with an answer that is not empty and, if asked for, confident enough.

    Raises:
        ValueError: nothing is left, an answer is no text, or there is no `answer` column, or no `confidence` column to
            filter by.
    """
    if "answer" not in answers.column_names:
        raise ValueError(
            f"the dataset to train on has no column 'answer', only {', '.join(answers.column_names) or 'none'}: "
            "label it with TokenEnsemble.label"
        )
    if min_confidence is not None and "confidence" not in answers.column_names:
        raise ValueError(
            f"min_confidence={min_confidence} needs a column `confidence`; the dataset has "
            f"{', '.join(answers.column_names)}. Label it with TokenEnsemble.label, or leave min_confidence out"
        )
    kept = [
        i
        for i, row in enumerate(answers)
        if str(row["answer"] or "").strip() and (min_confidence is None or row["confidence"] >= min_confidence)
    ]
    if not kept:
        raise ValueError(
            f"none of the {len(answers)} answers is left to train on (empty, or confidence below {min_confidence}): "
            "lower min_confidence, or train the teacher longer"
        )
    return check_questions(answers.select(kept), "train_dataset")
