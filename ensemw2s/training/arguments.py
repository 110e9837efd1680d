"""transformers' `TrainingArguments` as our trainers read them: what is honoured, and what is refused by name."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from transformers import IntervalStrategy, TrainingArguments

from ensemw2s.runtime import processes
from ensemw2s.runtime.values import Uses, check_fields, check_in_use, check_names, shown

# Adapters start from nothing and take about ten times the learning rate that is usual for all weights, which is
# transformers' default (Schulman et al. 2025, "LoRA without regret") [choice].
ADAPTER_LEARNING_RATE, LEARNING_RATE = 5e-4, 5e-5

_SHARDED = "every process holds a whole model; sharded training is not supported"
_HUB = "nothing is uploaded during training: call push_to_hub() on the ensemble or the student that train() returns"
_SCRIPT = "transformers' own trainer does not read it: it is for scripts"
_EVALUATION = "an evaluation during training measures the loss alone, in the precision of training"
_GROUP = "the processes find each other before settings are read, with the backend that fits their device"
_COMPILED = "the loss is taken in place of the output head, and torch.compile does not follow that"
_CHECKPOINTS = "a checkpoint always holds what training needs to go on to the same bits, written by the main process"
# Settings of transformers that would be ignored or break a promise of ours, and why they cannot have their effect.
REFUSED: Mapping[str, str] = {
    "average_tokens_across_devices": "a step's loss is always divided by the token weights of all processes together",
    "batch_eval_metrics": _EVALUATION,
    "bf16_full_eval": _EVALUATION,
    "data_seed": "`seed` decides the order of examples too",
    "ddp_backend": _GROUP,
    "ddp_timeout": f"{_GROUP}, and wait {processes.TIMEOUT.seconds // 60} minutes for each other",
    "deepspeed": _SHARDED,
    "do_eval": f"{_SCRIPT}; set eval_strategy",
    "do_predict": _SCRIPT,
    "do_train": _SCRIPT,
    "enable_jit_checkpoint": f'{_CHECKPOINTS}: set save_strategy="steps"',
    "eval_accumulation_steps": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "fp16_full_eval": _EVALUATION,
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "hub_always_push": _HUB,
    "hub_model_id": _HUB,
    "hub_private_repo": _HUB,
    "hub_revision": _HUB,
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "include_for_metrics": _EVALUATION,
    "include_num_input_tokens_seen": "tokens are always counted, padding aside",
    "label_names": "batches are made by this package, and their labels are called `labels`",
    "length_column_name": "lengths are counted from `input_ids`",
    "parallelism_config": _SHARDED,
    "prediction_loss_only": _EVALUATION,
    "push_to_hub": _HUB,
    "remove_unused_columns": "batches are made by this package, which reads the columns that it needs",
    "resume_from_checkpoint": f"{_SCRIPT}; train() in the same output_dir goes on by itself",
    "save_on_each_node": _CHECKPOINTS,
    "save_only_model": _CHECKPOINTS,
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
}
_REFUSED_OF_ACCELERATOR: Mapping[str, str] = {
    "split_batches": "a batch size is always that of one process",
    "dispatch_batches": "every process reads its own batches",
    "even_batches": "all processes take part in every step",
}
# What older releases of transformers took, and what it has become.
_RENAMED: Mapping[str, str] = {
    "group_by_length": 'train_sampling_strategy="group_by_length"',
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
}
_EVALUATED = 'an evaluation during training (eval_strategy="steps" or "epoch", and an eval_dataset)'
_SAVED = 'checkpoints (save_strategy="steps", "epoch" or "best")'
_USES_OF_SETTINGS: Uses = {
    "eval_steps": (lambda args: args.eval_strategy == "steps", 'eval_strategy="steps"'),
    **dict.fromkeys(
        ("eval_delay", "eval_on_start", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        (lambda args: args.eval_strategy != "no", _EVALUATED),
    ),
    "save_steps": (lambda args: args.save_strategy == "steps", 'save_strategy="steps"'),
    "save_total_limit": (lambda args: args.save_strategy != "no", _SAVED),
    **dict.fromkeys(
        ("ignore_data_skip", "restore_callback_states_from_checkpoint"),
        (lambda args: args.save_strategy != "no", _SAVED),
    ),
    "neftune_noise_alpha": (
        lambda args: not args.padding_free,
        "padding_free=False (the noise depends on the length of the rows that the model reads)",
    ),
}


def check_resume(resume_from_checkpoint: bool | str | None) -> None:
    """Raise ValueError for what transformers' `train()` can be told and ours cannot honour."""
    if resume_from_checkpoint not in (None, True):
        raise ValueError(
            f"resume_from_checkpoint={shown(resume_from_checkpoint)}: train() goes on by itself with what an earlier "
            "call left in output_dir; to begin anew, give another output_dir"
        )


@dataclass
class AnswerTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the defaults that training on short answers wants.

    Every setting of theirs acts as it does in transformers, or is refused by name (`REFUSED`).

    `learning_rate` is 5e-5 where all weights are trained, as in transformers, and 5e-4 for adapters, unless it is
    given. `train_sampling_strategy="group_by_length"` puts rows of similar length into a batch, by
    `ensemw2s.data.batches.LengthBucketSampler`. It saves the time that padding takes and costs accuracy where training
    is short, so transformers' default, "random", is ours too [choice]. `padding_free` (True) lays the rows of a batch
    behind one another instead of padding them (`ensemw2s.training.packing`), which changes neither batches nor loss; a
    model that cannot read them so is trained on padded batches, with one warning. With `eval_strategy` the loss on the
    `eval_dataset` of the trainer is measured during training and given to its callbacks as `eval_loss`.

    Raises:
        TypeError: a value of another type than is declared; names it.
        ValueError: a value outside its range, or a setting that cannot be honoured or would do nothing; names it and
            says why.
    """

    learning_rate: float | None = None
    logging_steps: float = 10
    report_to: str | list[str] | None = "none"
    # Whole phases are kept by their own atomic saves; "steps" keeps checkpoints within one as well. Two, so that one is
    # there while the next is written.
    save_strategy: str = "no"
    save_total_limit: int | None = 2
    train_sampling_strategy: Literal["random", "sequential", "group_by_length", "batch_rebalance"] = "random"
    padding_free: bool = True
    # The columns go to our own collator.
    remove_unused_columns: bool = False
    # With several processes: every weight that is trained has a part in the loss, so none need be searched for.
    ddp_find_unused_parameters: bool | None = False
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    # transformers would turn the bars off together with its log messages.
    disable_tqdm: bool | None = False

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Refuse a setting that there is not before Python does, whose message says nothing of what may be meant."""
        for name in given.keys() & _RENAMED.keys():
            raise TypeError(f"{cls.__name__}: there is no {name}; the setting is {_RENAMED[name]}")
        try:
            check_names(given, (setting.name for setting in dataclasses.fields(cls) if setting.init))
        except ValueError as error:
            raise TypeError(f"{cls.__name__}: {error}") from None
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self, inherited=TrainingArguments)
        check_in_use(self, _USES_OF_SETTINGS)
        # Before transformers fills in what follows from other settings.
        _refuse(self, REFUSED)
        # Before transformers asks for a device: it would overlook several processes without a GPU.
        processes.start()
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16=True does nothing on a CPU, where no product is made in float16: leave it out")
        _refuse(self.accelerator_config, _REFUSED_OF_ACCELERATOR, "accelerator_config.")

    @property
    def duration(self) -> str:
        """Return in words how long is trained."""
        count, unit = (self.max_steps, "step") if self.max_steps > 0 else (self.num_train_epochs, "epoch")
        return f"{count:g} {unit}{'s' * (count != 1)}"

    def for_training(self, *, adapters: bool) -> AnswerTrainingArguments:
        """Return a copy with the learning rate for adapters or for all weights, where none was given."""
        args = copy.copy(self)
        if args.learning_rate is None:
            args.learning_rate = ADAPTER_LEARNING_RATE if adapters else LEARNING_RATE
        return args


# Arguments of `transformers.Trainer` that ours pass on, and why the others cannot be.
_PASSED_ON = ("callbacks", "optimizers", "optimizer_cls_and_kwargs")
_OWN_METRICS = "an evaluation during training measures the loss alone; call evaluate() of the trainer afterwards"
_REFUSED_OPTIONS: Mapping[str, str] = {
    "compute_loss_func": "the loss is that over weighted answer tokens; a subclass of AnswerTrainer may have another",
    "compute_metrics": _OWN_METRICS,
    "preprocess_logits_for_metrics": _OWN_METRICS,
    "data_collator": "batches are made by this package",
    "model_init": "give the model, or where to load it from",
    "tokenizer": "it is called processing_class, as in transformers",
}


def check_trainer_options(trainer: str, options: Mapping[str, Any], args: AnswerTrainingArguments) -> dict[str, Any]:
    """Return those arguments of `transformers.Trainer` that the trainer called `trainer` passes on, checked.

    Raises:
        TypeError: an argument that is not passed on; says why if it is one of transformers'.
        ValueError: an optimizer that is given in two ways.
    """
    for name in options.keys() - set(_PASSED_ON):
        reason = _REFUSED_OPTIONS.get(name, "there is no such argument")
        raise TypeError(f"{trainer} takes no argument {name!r}: {reason}. It passes on {', '.join(_PASSED_ON)}")
    options = {name: value for name, value in options.items() if value not in (None, (None, None))}
    own = [name for name in _PASSED_ON[1:] if name in options]
    default = dataclasses.fields(TrainingArguments)
    if own and args.optim != next(known.default for known in default if known.name == "optim"):
        raise ValueError(
            f"optim={str(args.optim.value)!r} and {own[0]} are two ways to name the optimizer: leave one out"
        )
    if len(own) > 1:
        raise ValueError("optimizers and optimizer_cls_and_kwargs are two ways to give the optimizer: leave one out")
    if "lr" in options.get("optimizer_cls_and_kwargs", (None, {}))[1] and args.learning_rate is not None:
        raise ValueError(
            f"learning_rate={args.learning_rate:g} and the lr in optimizer_cls_and_kwargs are two learning rates: "
            "leave one out"
        )
    return options


def require_eval_dataset(args: TrainingArguments, eval_dataset: Any) -> None:
    """Raise ValueError if evaluations during training are asked for, and there is nothing to evaluate on."""
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ValueError(
            f'eval_strategy="{IntervalStrategy(args.eval_strategy).value}" needs questions with answers to measure the '
            'loss on: pass eval_dataset, or leave eval_strategy at "no"'
        )


def require_arguments(trainer: str, args: Any, kind: type) -> None:
    """Raise TypeError unless `args` are those of the trainer called `trainer`."""
    if not isinstance(args, kind):
        raise TypeError(
            f"{trainer}: args is a {type(args).__name__}, expected a {kind.__name__}, which takes the settings of "
            "transformers' TrainingArguments as well"
        )


def questions_to_evaluate(given: Any, own: Any) -> Any:
    """Return the questions given to a trainer's `evaluate`, or else its own; ValueError if there are none."""
    if given is None and own is None:
        raise ValueError("evaluate() needs questions with answers: pass them, or give the trainer an eval_dataset")
    return own if given is None else given


def _refuse(settings: Any, reasons: Mapping[str, str], prefix: str = "") -> None:
    for known in dataclasses.fields(settings):
        make: Any = known.default_factory
        default = known.default if make is dataclasses.MISSING else make()
        value = getattr(settings, known.name)
        if known.name in reasons and value != default:
            raise ValueError(
                f"{prefix}{known.name}={shown(value)} cannot be honoured: {reasons[known.name]}. Leave it out"
            )
