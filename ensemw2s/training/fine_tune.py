"""One phase of fine-tuning from its settings: begun or gone on with, shown, its cost kept."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ensemw2s.data.batches import AnswerCollator
from ensemw2s.data.shapes import with_column
from ensemw2s.data.tokens import answer_lengths, check_examples
from ensemw2s.models.adapters import sort_settings, without_renamed_properties
from ensemw2s.runtime import processes
from ensemw2s.runtime.meter import Work
from ensemw2s.training.arguments import AnswerTrainingArguments
from ensemw2s.training.checkpoints import FOLDER, claimed_checkpoints, digest
from ensemw2s.training.packing import pack_rows
from ensemw2s.training.trainer import AnswerTokens, AnswerTrainer, NoStepsError, check_weights

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig


@dataclass(frozen=True)
class TrainingCost:
    """What one fine-tuning run took: wall seconds, tokens seen (padding aside), and floating-point operations.

    Both counts are over all processes: `tokens` is transformers' own, `flops` is counted as `ensemw2s.runtime.meter`
    says (None where it cannot be).
    """

    seconds: float
    tokens: int
    flops: float | None


@dataclass(eq=False)
class PhaseProgress(TrainerCallback):
    """A progress bar with a name, the time left, and the loss of the last logged step."""

    description: str

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        hidden = not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, desc=self.description, unit="step", leave=False, disable=hidden)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: D102
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.bar.close()


def fine_tune(
    model: Any,
    examples: Dataset,
    args: AnswerTrainingArguments,
    *,
    pad_token_id: int,
    seed: int,
    description: str,
    token_weights: Sequence[np.ndarray] | None = None,
    peft_config: PeftConfig | None = None,
    trainer_class: type[AnswerTrainer] = AnswerTrainer,
    **trainer_options: Any,
) -> tuple[Any, TrainingCost]:
    """Fine-tune `model` in place (or a new adapter on it) on the answers of `examples`.

    With `args.save_strategy="steps"` checkpoints are kept in `args.output_dir/checkpoints`, and the same call after a
    crash goes on from the last whole one, to the same bits on one machine. They stay until `discard_checkpoints`, so
    that the result can be saved first; another training in the same folder deletes them.

    Args:
        model: the pre-trained model (a transformers `PreTrainedModel`).
        examples: columns `input_ids` and `prompt_length` (`ensemw2s.tokenize_questions`).
        args: how it is trained; its seed is replaced by `seed`.
        pad_token_id: fills short rows; may equal the end token, nothing is masked by token id.
        seed: fixes the adapter's initial values, the order of examples and dropout.
        description: shown beside the progress bar.
        token_weights: for each example one non-negative float per answer token; None means 1 everywhere.
        peft_config: train an adapter with this configuration; None trains all weights.
        trainer_class: a subclass of `AnswerTrainer` with another loss.
        trainer_options: passed on to `trainer_class`, such as `callbacks`, or `eval_dataset` (of the same columns as
            `examples`) for `args.eval_strategy`.

    Returns:
        The trained model in evaluation mode (a `PeftModel` if `peft_config` is given), and its cost.

    Raises:
        DiskFullError: the disk filled up during a checkpoint; the one before is whole, and the same call goes on there.
        FloatingPointError: the loss or a trained weight became NaN or infinite; names step and examples.
        ValueError: `examples` miss a column, or hold an answer without tokens or a token that the model does not know;
            `token_weights` do not fit the examples, or are negative, not finite, or all 0; settings with which no step
            is made.
    """
    examples = check_examples(examples, description, int(model.config.get_text_config(decoder=True).vocab_size))
    if token_weights is not None:
        examples = _with_token_weights(examples, token_weights)
    set_seed(seed)
    if peft_config is not None:
        from peft import get_peft_model

        with without_renamed_properties():
            # peft writes the base model's name into the configuration it is given.
            model = get_peft_model(model, copy.deepcopy(peft_config))
        sort_settings(model)
    args = args.for_training(adapters=hasattr(model, "peft_config"))
    args.seed, args.data_seed = seed, seed
    if "optimizer_cls_and_kwargs" in trainer_options:
        kind, settings = trainer_options["optimizer_cls_and_kwargs"]
        trainer_options["optimizer_cls_and_kwargs"] = kind, {"lr": args.learning_rate} | settings
    args.include_num_input_tokens_seen = "non_padding"
    checkpoints: AbstractContextManager[Path | None] = nullcontext()
    if args.save_strategy != "no":
        owner = _run_description(model, examples, args, trainer_class, trainer_options)
        checkpoints = claimed_checkpoints(args.output_dir, owner)
        args.output_dir = str(Path(str(args.output_dir)) / FOLDER)
    callbacks = [*trainer_options.pop("callbacks", ()), *([] if args.disable_tqdm else [PhaseProgress(description)])]
    trainer = trainer_class(
        model=model,
        args=args,
        # An example's place in the dataset, so that an error can name it.
        train_dataset=with_column(examples, "row", np.arange(len(examples))),
        data_collator=AnswerCollator(pad_token_id),
        callbacks=callbacks,
        **trainer_options,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    try:
        with checkpoints as checkpoint:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        # Whatever setting it was: without a step the model is the untrained one.
        if trainer.state.global_step < 1:
            raise NoStepsError.of(len(examples), args)
        check_weights(model, args)
    except (FloatingPointError, NoStepsError) as error:
        raise type(error)(f"{description}: {error}") from error
    if checkpoint is None:
        # Behind a checkpoint the losses of the beginning are not known.
        _warn_if_idle(trainer.step_losses, args, description)
    flops = None if math.isnan(trainer.flops) else trainer.flops
    cost = TrainingCost(trainer.seconds, trainer.state.num_input_tokens_seen, flops)
    return model.eval(), cost


# Below this loss (nats per answer token) a model has little left to learn.
_LEARNED = 0.1


def _warn_if_idle(step_losses: Mapping[int, float], args: TrainingArguments, description: str) -> None:
    """Warn where the loss at the end of training is about that of its beginning, and not small."""
    losses = list(step_losses.values())
    if len(losses) < 2:
        return
    tenth = max(1, len(losses) // 10)
    first, last = float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
    if last > max(0.95 * first, _LEARNED) and processes.is_main():
        warnings.warn(
            f"{description}: next to nothing was learned. The loss went from {first:.3g} to {last:.3g} in "
            f"{len(losses)} steps at learning_rate={args.learning_rate:g}: train for longer, or with another "
            "learning rate",
            stacklevel=3,
        )


def training_work(lengths: Sequence[int], answers: Sequence[int], args: AnswerTrainingArguments) -> Work:
    """Return the work of training on all batches of all epochs, in the order that `args.seed` gives.

    A model that cannot read packed rows has more padding than is counted with `padding_free`.

    Args:
        lengths: tokens of each example.
        answers: answer tokens of each example.
        args: batch size, accumulation, epochs or steps, and how batches are made.

    Raises:
        NoStepsError: settings with which no step is made.
    """
    from datasets import Dataset

    rows = zip(lengths, answers, strict=True)
    examples = Dataset.from_list([{"input_ids": [0] * int(n), "prompt_length": int(n - own)} for n, own in rows])
    args = copy.copy(args)
    args.data_seed = args.seed
    # The batches are those of a trainer; its model is not asked.
    trainer = AnswerTrainer(torch.nn.Linear(1, 1), args, AnswerCollator(0), examples)
    loader = trainer.get_train_dataloader()
    steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    total = Work()
    for epoch in range(math.ceil(steps / steps_per_epoch)):
        loader.set_epoch(epoch)
        left = (steps - epoch * steps_per_epoch) * args.gradient_accumulation_steps
        for batch in itertools.islice(loader, min(left, len(loader))):
            mask = batch["attention_mask"]
            if args.padding_free and not bool(mask.all()):
                mask = pack_rows(batch["input_ids"], mask).mask
            lines, width = mask.shape
            total += Work.of_pass(lines, width, int(mask.sum()), len(AnswerTokens.of(batch).labels))
    return total


# Arguments that change where a run is kept, how it is shown or when it is saved, but not what it computes.
PRESENTATION = {
    "output_dir", "logging_dir", "disable_tqdm", "report_to", "run_name", "log_level", "logging_steps",
    "logging_strategy", "logging_first_step", "dataloader_num_workers", "dataloader_prefetch_factor",
    "dataloader_persistent_workers", "save_strategy", "save_steps", "save_total_limit",
}  # fmt: skip


def training_settings(args: TrainingArguments) -> dict[str, Any]:
    """Return those of transformers' and our training arguments that decide a training run's result beside the seed."""
    names = {field.name for field in fields(AnswerTrainingArguments)} - PRESENTATION - {"seed", "data_seed"}
    return {name: value for name, value in args.to_dict().items() if name in names}


def _run_description(
    model: Any,
    examples: Dataset,
    args: TrainingArguments,
    trainer_class: type[AnswerTrainer],
    trainer_options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a training run's result depends on; its model is the untrained one."""
    teachers = [option for option in trainer_options.values() if hasattr(option, "parameters")]
    settings = {name: value for name, value in args.to_dict().items() if name not in PRESENTATION}
    return {
        **settings,
        "trainer": trainer_class.__qualname__,
        "teachers": [digest(teacher.parameters()) for teacher in teachers],
        "model": digest(weight for _, weight in sorted(model.named_parameters(), key=lambda item: item[0])),
        "examples": _digest_of(examples),
        "eval_dataset": _digest_of(trainer_options["eval_dataset"]) if "eval_dataset" in trainer_options else None,
        "optimizer": optimizer_described(trainer_options),
    }


def optimizer_described(trainer_options: Mapping[str, Any]) -> str | None:
    """Return what tells the optimizer among a trainer's options from another; None if they hold none."""
    made = trainer_options.get("optimizers", (None, None))[0]
    kind, settings = trainer_options.get("optimizer_cls_and_kwargs", (type(made), getattr(made, "defaults", None)))
    return None if settings is None else f"{kind.__module__}.{kind.__qualname__} {settings}"


def _digest_of(examples: Dataset) -> str:
    columns = [name for name in examples.column_names if name != "id"]
    return digest(np.asarray(row[name]) for row in examples.select_columns(columns) for name in columns)


def _with_token_weights(examples: Dataset, token_weights: Sequence[np.ndarray]) -> Dataset:
    rows = [np.asarray(row, dtype=np.float32) for row in token_weights]
    lengths = answer_lengths(examples)
    if [row.shape for row in rows] != [(length,) for length in lengths]:
        raise ValueError(
            f"token_weights has {len(rows)} rows with {sum(row.size for row in rows)} values for {len(lengths)} "
            f"examples with {lengths.sum()} answer tokens: give each example one weight per answer token, in order"
        )
    values = np.concatenate(rows)
    if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise ValueError(
            f"token_weights must be finite, at least 0 and not all 0; they run from {values.min()} to {values.max()}"
        )
    return with_column(examples, "token_weights", rows)
