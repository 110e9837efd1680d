"""Fine-tune one causal language model on weighted answer tokens.

Experts, the weak baseline, students and the ceiling are all trained here, by transformers' `Trainer` with one
change: the loss is a weighted sum over answer tokens, and the vocabulary-wide head runs on their positions only.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ensemw2s.data.batches import LengthBucketSampler, next_token_mask
from ensemw2s.data.tokens import answer_lengths
from ensemw2s.models.heads import for_product, linear_of, obstacle, only_positions, output_head, replaced_head
from ensemw2s.ops.products import faster_linear_layers
from ensemw2s.runtime.accounts import enter_growing, is_ours
from ensemw2s.runtime.files import DiskFullError, is_disk_full
from ensemw2s.runtime.meter import count, count_before, metered
from ensemw2s.runtime.values import shown_names
from ensemw2s.training.checkpoints import seal_checkpoint, spent_until
from ensemw2s.training.packing import keeps_rows_apart, pack_rows, wants_one_line
from ensemw2s.training.predictions import HiddenPredictions, LogitPredictions, Predictions, smoothed_cross_entropy

if TYPE_CHECKING:
    from datasets import Dataset


_NOT_KNOWN = "not known before the first step"


@dataclass(frozen=True)
class AnswerTokens:
    """The n answer tokens of a batch that carry a loss.

    Attributes:
        mask: bool [B, L], the positions before them, where they are predicted.
        labels: int64 [n], in row-major order.
        token_weights: float32 [n].
        inputs: the whole batch.
    """

    mask: torch.Tensor
    labels: torch.Tensor
    token_weights: torch.Tensor
    inputs: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, inputs: Mapping[str, torch.Tensor]) -> AnswerTokens:
        """Find them in a batch of `ensemw2s.data.batches.AnswerCollator`."""
        mask = next_token_mask(inputs["labels"])
        labels, weights = (inputs[name][:, 1:][mask[:, :-1]] for name in ("labels", "token_weights"))
        return cls(mask, labels, weights, inputs)

    def to(self, device: torch.device) -> AnswerTokens:
        """Return them on a device; the batch stays where it is."""
        return AnswerTokens(self.mask.to(device), self.labels.to(device), self.token_weights.to(device), self.inputs)


class NoStepsError(ValueError):
    """With these settings a training makes no optimiser step."""

    @classmethod
    def of(cls, num_examples: int, args: TrainingArguments) -> NoStepsError:
        """Return the error for a training of `num_examples` examples, which names the settings that decide."""
        return cls(
            f"not one step was made on {num_examples} examples, with num_train_epochs={args.num_train_epochs}, "
            f"max_steps={args.max_steps}, per_device_train_batch_size={args.per_device_train_batch_size} and "
            f"dataloader_drop_last={args.dataloader_drop_last}: train for longer, or in smaller batches"
        )


class AnswerTrainer(Trainer):
    """transformers' `Trainer` with a loss over weighted answer tokens.

    `loss = sum_ij w_ij CE_ij / sum_ij w_ij`, both sums over all answer tokens of one optimiser step: every
    micro-batch of an accumulated step, on every process. Batches come from `ensemw2s.data.batches.AnswerCollator`.
    """

    # `compute_loss` divides by the weight of the whole accumulated step, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True
    # Why the loss needs logits, None if it does not.
    _obstacle: str | None = _NOT_KNOWN
    # Whether the model reads packed rows; None before it was tried.
    _packs: bool | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The loss of each step that this process has made, by the number of steps before it.
        self.step_losses: dict[int, float] = defaultdict(float)

    def get_train_dataloader(self) -> Any:
        """Return the batches of an epoch.

        Raises:
            NoStepsError: there is none, as where `dataloader_drop_last` drops the only one.
        """
        loader = super().get_train_dataloader()
        if len(loader) == 0:
            raise NoStepsError.of(len(self.train_dataset), self.args)
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """Collect one step's micro-batches and the total token weight in them, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.accelerator.gradient_state.end_of_dataloader:
            self._silence_repeated_rows(batches[-1]["token_weights"])
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            total += batch["token_weights"][:, 1:].sum(dtype=torch.float64).cpu()
        return batches, self.accelerator.gather(total.float().to(device)).sum()

    def _silence_repeated_rows(self, token_weights: torch.Tensor) -> None:
        """Give weight 0 to the rows with which accelerate fills up the last batches of an epoch.

        Several processes take a batch each, all of one size; where the rows run out, those of the epoch's beginning
        come again, and would count twice.
        """
        rows, count = len(token_weights), self.accelerator.num_processes
        fresh = len(self.train_dataset) % (rows * count)
        if count > 1 and fresh and not self.args.dataloader_drop_last:
            token_weights[max(0, fresh - rows * self.accelerator.process_index) :] = 0

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
        answers = AnswerTokens.of(inputs)
        loss, outputs = self._summed_loss(model, inputs, answers, with_outputs=return_outputs)
        total = answers.token_weights.sum() if num_items_in_batch is None else num_items_in_batch
        total = torch.as_tensor(total, device=loss.device)
        # A step in which no answer token was drawn has weight 0 and no gradient; dividing by 1 keeps it so.
        loss = loss / torch.where(total > 0, total, torch.ones_like(total))
        # Gradients are averaged over processes while `total` is the sum over them.
        loss = loss * self.accelerator.num_processes
        value = loss.item()
        # Checked here because the Trainer keeps such losses out of its running mean and trains on.
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the training loss is {value} at step {self.state.global_step + 1}{self._batch_names(inputs)}. "
                f"{_remedy(self.args)}"
            )
        self.step_losses[self.state.global_step] += value
        return (loss, outputs) if return_outputs else loss

    def _summed_loss(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], answers: AnswerTokens, *, with_outputs: bool = False
    ) -> tuple[torch.Tensor, Any]:
        """Return the sum of the answer tokens' weighted losses, and the model's outputs if they are wanted."""
        read, mask, positions = self._read(model, inputs, answers)
        plain, outputs = self.accelerator.unwrap_model(model), None
        with faster_linear_layers(plain, mask.numel()):
            if not with_outputs and self._takes_hidden_states(model, read):
                loss = self._loss_in_place_of_logits(model, read, positions, answers)
            else:
                with only_positions(plain, positions):
                    outputs = model(**read)
                loss = self._loss_of(model, LogitPredictions(outputs.logits), answers.to(outputs.logits.device))
        if model.training:
            count(plain, read["input_ids"], mask, len(answers.labels), training=True)
        return loss, outputs

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Measure `eval_loss`, the mean cross entropy of the answer tokens of `eval_dataset` (nats)."""
        self._eval_weight = float(answer_lengths(dataloader.dataset).mean())
        return super().evaluation_loop(dataloader, *args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        """Return a batch's loss, so that the mean of the losses over rows is the mean over answer tokens."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss, _ = self._summed_loss(model, inputs, AnswerTokens.of(inputs))
        return loss.float() / (len(inputs["input_ids"]) * self._eval_weight), None, None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in rows["input_ids"]]
        # The batches of all processes together: with half the batch each, two see the rows that one would.
        sampler = LengthBucketSampler(lengths, self._train_batch_size * self.args.world_size, self.args.seed)
        self.add_callback(_EpochOrder(sampler))
        return sampler

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint; see `transformers.Trainer.train`."""
        self._before = dict.fromkeys(("seconds", "flops", "own_tokens", "own_flops"), 0.0)
        if isinstance(resume_from_checkpoint, str):
            self._before = spent_until(Path(resume_from_checkpoint))
            count_before(self._before["seconds"], self._before["own_tokens"], self._before["own_flops"])
        self._start = time.perf_counter()
        with metered() as self._meter:
            return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def seconds(self) -> float:
        """Return the wall seconds of training so far, those before the checkpoint that it went on from included."""
        return self._before["seconds"] + time.perf_counter() - self._start

    @property
    def flops(self) -> float:
        """Return the FLOPs of all processes so far, NaN if they cannot be counted; every process must ask for them."""
        own = torch.tensor([self._meter.flops], dtype=torch.float64, device=self.args.device)
        return self._before["flops"] + float(self.accelerator.gather(own).sum())

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint that counts only when it is complete.

        Raises:
            DiskFullError: the disk is full; the checkpoints before are untouched.
            FloatingPointError: the last step made weights NaN or infinite; nothing is written.
        """
        check_weights(self.model, self.args)
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            # Ours is what is declared so before it is written.
            if self.args.should_save and not is_ours(folder):
                enter_growing(folder)
            super()._save_checkpoint(model, trial)
            own = {"own_tokens": self._meter.tokens, "own_flops": self._meter.flops}
            spent = {"seconds": self.seconds, "flops": self.flops}
            spent |= {name: self._before[name] + value for name, value in own.items()}
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal_checkpoint(folder, spent)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            if is_disk_full(error) and not isinstance(error, DiskFullError):
                raise DiskFullError(folder) from error
            raise

    def _batch_names(self, inputs: dict[str, Any]) -> str:
        """Name the first examples of a batch, if it says which they are."""
        if "row" not in inputs:
            return ""
        rows = inputs["row"].tolist()
        names = self.train_dataset["id"] if "id" in self.train_dataset.column_names else None
        shown = shown_names((row if names is None else names[row] for row in rows), 5)
        return f", in the batch of {'row' if names is None else 'id'} {shown}"

    def _read(
        self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], answers: AnswerTokens
    ) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        """Return what the model reads, R lines of C tokens: packed rows where that saves padding, or the padded batch.

        First its keyword arguments; then the mask [R, C], 0 on padding; then int64 [n], the positions before the n
        answer tokens in the flattened [R, C].
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if self.args.padding_free and not bool(mask.all()) and self._reads_packed_rows(model):
            packed = pack_rows(ids, mask, one_line=wants_one_line(self.accelerator.unwrap_model(model)))
            read = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "use_cache": False}
            return read, packed.mask, packed.places[answers.mask]
        read = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        return read, mask, answers.mask.flatten().nonzero()[:, 0]

    def _reads_packed_rows(self, model: torch.nn.Module) -> bool:
        if self._packs is None:
            plain = self.accelerator.unwrap_model(model)
            is_mixed = self.accelerator.mixed_precision != "no"
            self._packs = keeps_rows_apart(plain, model, is_mixed=is_mixed)
            if not self._packs:
                warnings.warn(
                    f"{_name(plain)} is trained on padded batches, because it does not keep packed rows apart: "
                    'train_sampling_strategy="group_by_length" saves padding too, padding_free=False silences this',
                    stacklevel=2,
                )
        return self._packs

    def _takes_hidden_states(self, model: torch.nn.Module, inputs: dict[str, Any]) -> bool:
        """Decide, at the first step, whether this model's loss can be had without its logits."""
        if self._obstacle is _NOT_KNOWN:
            plain = self.accelerator.unwrap_model(model)
            one_token = {key: value[:1, :1] if torch.is_tensor(value) else value for key, value in inputs.items()}
            self._obstacle = obstacle(output_head(plain), model, one_token)
            if self._obstacle is not None:
                warnings.warn(
                    f"{_name(plain)} is trained through its logits, which takes more time and memory than its hidden "
                    f"states would: {self._obstacle}",
                    stacklevel=2,
                )
        return self._obstacle is None

    def prediction_loss(self, predictions: Predictions, answers: AnswerTokens) -> torch.Tensor:
        """Return `sum_i w_i loss_i` of the model's predictions for the n answer tokens; here the loss is CE."""
        return self.label_loss(predictions, answers)

    def label_loss(self, predictions: Predictions, answers: AnswerTokens) -> torch.Tensor:
        """Return `sum_i w_i CE_i`, with label smoothing as `args.label_smoothing_factor` says."""
        labels, weights, smoothing = answers.labels, answers.token_weights, self.args.label_smoothing_factor
        if smoothing:
            return smoothed_cross_entropy(predictions.logits, labels, weights, smoothing)
        return predictions.cross_entropy(labels, weights)

    def _loss_of(self, model: torch.nn.Module, predictions: Predictions, answers: AnswerTokens) -> torch.Tensor:
        """Return the loss that is trained; or, in an evaluation, cross entropy, whatever is trained."""
        if model.training:
            return self.prediction_loss(predictions, answers)
        return predictions.cross_entropy(answers.labels, answers.token_weights)

    def _loss_in_place_of_logits(
        self, model: torch.nn.Module, read: dict[str, Any], positions: torch.Tensor, answers: AnswerTokens
    ) -> torch.Tensor:
        head = output_head(self.accelerator.unwrap_model(model))
        linear: Any = linear_of(head)

        def summed(hidden: torch.Tensor) -> torch.Tensor:
            here = answers.to(hidden.device)
            rows = hidden.flatten(0, 1)[positions.to(hidden.device)]
            return self._loss_of(model, HiddenPredictions(*for_product(rows, linear)), here).view(1, 1, 1)

        with replaced_head(head, summed):
            return model(**read).logits.squeeze()


def _name(model: torch.nn.Module) -> str:
    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__


def _remedy(args: TrainingArguments) -> str:
    return f"Lower the learning rate (now {args.learning_rate:g}) or train in float32"


def check_weights(model: Any, args: TrainingArguments) -> None:
    """Raise FloatingPointError unless all trained weights are finite (the last step's update is in no loss)."""
    if not all(bool(weight.isfinite().all()) for weight in model.parameters() if weight.requires_grad):
        raise FloatingPointError(f"the last step made weights NaN or infinite. {_remedy(args)}")


def on_device(model: Any, args: TrainingArguments) -> Any:
    """Return `model` on the device of `args`; one that was spread over devices when it was loaded stays there."""
    return model if getattr(model, "hf_device_map", None) else model.to(args.device)


@dataclass(eq=False)
class _EpochOrder(TrainerCallback):
    """Tells a sampler which epoch it is: accelerate's loaders do not reach it when several processes resume."""

    sampler: LengthBucketSampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))
