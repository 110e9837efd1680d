"""Fine-tune one causal language model on weighted answer tokens.

Experts, the weak baseline, students and the ceiling are all trained here, by transformers' `Trainer` with one
change: the loss is a weighted sum over answer tokens, and the vocabulary-wide head runs on their positions only.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ensemw2s.cost import count, metered
from ensemw2s.data import AnswerCollator, answer_lengths

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig


@dataclass
class AnswerTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the defaults that training on short answers wants."""

    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 32
    logging_steps: float = 10
    report_to: str | list[str] | None = "none"
    # Whole phases are kept by their own atomic saves; the columns go to our own collator.
    save_strategy: str = "no"
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    # transformers would turn the bars off together with its log messages.
    disable_tqdm: bool | None = False


@dataclass(frozen=True)
class TrainingCost:
    """What one fine-tuning run took: wall seconds, tokens seen (padding aside), and floating-point operations.

    Both counts are over all processes: `tokens` is transformers' own, `flops` is counted as `ensemw2s.cost` says (None
    where it cannot be).
    """

    seconds: float
    tokens: int
    flops: float | None


@contextmanager
def only_positions(model: torch.nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Within the block, `model(...).logits` holds the rows of `positions` alone.

    The output head is a large share of a small model's work, and most positions are never looked at. Selecting in
    front of the head, by a hook, leaves the model's own forward pass (and any wrapper for several processes) intact.

    Args:
        model: a causal language model, wrapped by peft or not.
        positions: bool [batch, length]; the n true entries are kept, in row-major order.

    Raises:
        TypeError: the model has no output embeddings to select in front of.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise TypeError(
            f"{type(model).__name__} has no output embeddings (`get_output_embeddings()` is None): "
            "expected a causal language model whose last layer maps hidden states to the vocabulary"
        )
    handle = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][positions.to(inputs[0].device)],))
    try:
        yield
    finally:
        handle.remove()


def next_token_mask(labels: torch.Tensor) -> torch.Tensor:
    """Return bool [batch, length]: the positions whose next token has a label other than -100."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    return mask


class AnswerTrainer(Trainer):
    """transformers' `Trainer` with a loss over weighted answer tokens.

    `loss = sum_ij w_ij CE_ij / sum_ij w_ij`, both sums over all answer tokens of one optimiser step: every
    micro-batch of an accumulated step, on every process. Batches come from `data.AnswerCollator`.
    """

    # `compute_loss` divides by the weight of the whole accumulated step, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """Collect one step's micro-batches and the total token weight in them, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            total += batch["token_weights"][:, 1:].sum(dtype=torch.float64).cpu()
        return batches, self.accelerator.gather(total.float().to(device)).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the step's loss; `num_items_in_batch` is the step's token weight.

        Raises:
            FloatingPointError: the loss is NaN or infinite; the weights are still those of the step before.
        """
        mask = next_token_mask(inputs["labels"])
        unwrapped = self.accelerator.unwrap_model(model)
        with only_positions(unwrapped, mask):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        if model.training:
            head = outputs.logits.shape[0]
            count(unwrapped, inputs["input_ids"], inputs["attention_mask"], head, training=True)
        weights = inputs["token_weights"][:, 1:][mask[:, :-1]]
        loss = weighted_cross_entropy(outputs.logits, inputs["labels"][:, 1:][mask[:, :-1]], weights)
        total = torch.as_tensor(weights.sum() if num_items_in_batch is None else num_items_in_batch, device=loss.device)
        # A step in which no answer token was drawn has weight 0 and no gradient; dividing by 1 keeps it so.
        loss = loss / torch.where(total > 0, total, torch.ones_like(total))
        # Gradients are averaged over processes while `total` is the sum over them.
        loss = loss * self.accelerator.num_processes
        # Checked here because the Trainer keeps such losses out of its running mean and trains on.
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss.item()} at step {self.state.global_step + 1}. {_remedy(self.args)}"
            )
        return (loss, outputs) if return_outputs else loss


def weighted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
    """Return `sum_i w_i CE(logits_i, labels_i)` in float32.

    Args:
        logits: [n, V], any float dtype.
        labels: int64 [n].
        token_weights: float [n].
    """
    return (functional.cross_entropy(logits.float(), labels, reduction="none") * token_weights).sum()


def _remedy(args: TrainingArguments) -> str:
    return f"Lower the learning rate (now {args.learning_rate:g}) or train in float32"


def on_device(model: Any, args: TrainingArguments) -> Any:
    """Return `model` on the device of `args`; one that was spread over devices when it was loaded stays there."""
    return model if getattr(model, "hf_device_map", None) else model.to(args.device)


class PhaseProgress(TrainerCallback):
    """A progress bar with a name, the time left, and the loss of the last logged step."""

    def __init__(self, description: str) -> None:
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]  # noqa: D102
        self.bar = tqdm(total=state.max_steps, desc=self.description, unit="step", leave=False)

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]  # noqa: D102
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]  # noqa: D102
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]  # noqa: D102
        self.bar.close()


def fine_tune(
    model: Any,
    examples: Dataset,
    args: TrainingArguments,
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

    Args:
        model: the pre-trained model (a transformers `PreTrainedModel`).
        examples: columns `input_ids` and `prompt_length` (`data.tokenize_questions`).
        args: transformers' training arguments; its seed is replaced by `seed`.
        pad_token_id: fills short rows; may equal the end token, nothing is masked by token id.
        seed: fixes the adapter's initial values, the order of examples and dropout.
        description: shown beside the progress bar.
        token_weights: for each example one non-negative float per answer token; None means 1 everywhere.
        peft_config: train an adapter with this configuration; None trains all weights.
        trainer_class: a subclass of `AnswerTrainer` with another loss.
        trainer_options: passed on to `trainer_class`.

    Returns:
        The trained model in evaluation mode (a `PeftModel` if `peft_config` is given), and its cost.

    Raises:
        FloatingPointError: the loss or a trained weight became NaN or infinite.
        ValueError: `token_weights` do not fit the examples, or are negative, not finite, or all 0.
    """
    if token_weights is not None:
        examples = _with_token_weights(examples, token_weights)
    set_seed(seed)
    if peft_config is not None:
        from peft import get_peft_model

        # peft writes the base model's name into the configuration it is given.
        model = get_peft_model(model, copy.deepcopy(peft_config))
    args = copy.copy(args)
    args.seed, args.data_seed = seed, seed
    args.include_num_input_tokens_seen = "non_padding"
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=examples,
        data_collator=AnswerCollator(pad_token_id),
        callbacks=[] if args.disable_tqdm else [PhaseProgress(description)],
        **trainer_options,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    start = time.perf_counter()
    try:
        with metered() as meter:
            trainer.train()
    except FloatingPointError as error:
        raise FloatingPointError(f"{description}: {error}") from error
    seconds = time.perf_counter() - start
    # The last step's update is in no loss.
    if not all(bool(weight.isfinite().all()) for weight in model.parameters() if weight.requires_grad):
        raise FloatingPointError(f"{description}: the last step made weights NaN or infinite. {_remedy(args)}")
    flops = float(
        trainer.accelerator.gather(torch.tensor([meter.flops], dtype=torch.float64, device=args.device)).sum()
    )
    return model.eval(), TrainingCost(
        seconds, trainer.state.num_input_tokens_seen, None if math.isnan(flops) else flops
    )


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
    return examples.add_column("token_weights", rows)
