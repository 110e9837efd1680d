"""Every setting that is inherited from transformers is honoured, or refused by name."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainingArguments

from ensemw2s import BoostingConfig, StudentConfig
from ensemw2s.models.adapters import attach_adapter
from ensemw2s.training.arguments import REFUSED, AnswerTrainingArguments, check_trainer_options, require_eval_dataset
from ensemw2s.training.fine_tune import fine_tune
from ensemw2s.training.predictions import HiddenPredictions, LogitPredictions, smoothed_cross_entropy
from ensemw2s.training.trainer import AnswerTrainer
from tests.tiny import Watch
from tests.training.test_trainer import PAD, llama, ragged, slow_loss, trained_weights

# Values that are not the default, and change what is computed.
CHANGING: dict[str, dict[str, Any]] = {
    name: {name: value}
    for name, value in {
        "per_device_train_batch_size": 3, "num_train_epochs": 2.0, "max_steps": 3, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "warmup_steps": 2, "optim": "sgd", "weight_decay": 0.5, "adam_beta1": 0.5,
        "adam_beta2": 0.5, "adam_epsilon": 0.1, "gradient_accumulation_steps": 2, "max_grad_norm": 1e-3,
        "label_smoothing_factor": 0.2, "bf16": True, "train_sampling_strategy": "group_by_length",
    }.items()
} | {
    "lr_scheduler_kwargs": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 3.0}},
    "dataloader_drop_last": {"per_device_train_batch_size": 3, "dataloader_drop_last": True},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0, "padding_free": False},
}  # fmt: skip
# Values that are not the default, and change how it is computed but not what.
KEEPING: dict[str, dict[str, Any]] = {
    name: {name: value}
    for name, value in {
        "gradient_checkpointing": True, "activation_checkpointing": True, "dataloader_num_workers": 1,
        "dataloader_in_order": False, "full_determinism": False, "logging_strategy": "no", "skip_memory_metrics": False,
        "per_device_eval_batch_size": 2, "auto_find_batch_size": True, "torch_empty_cache_steps": 1,
        "logging_nan_inf_filter": False, "dataloader_pin_memory": False,
    }.items()
} | {
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
}  # fmt: skip
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}  # of the release that is installed


def train(folder: Path, evaluated: bool = False, callbacks: Any = (), peft: Any = None, **settings: Any) -> Any:
    examples, weights = ragged(10, seed=4)
    defaults = {"use_cpu": True, "num_train_epochs": 1, "per_device_train_batch_size": 2, "disable_tqdm": True,
                "learning_rate": 3e-3}  # fmt: skip
    args = AnswerTrainingArguments(output_dir=str(folder), **(defaults | settings))
    options: dict[str, Any] = {"eval_dataset": ragged(7, seed=5)[0]} if evaluated else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = fine_tune(
            llama(0), examples, args, pad_token_id=PAD, seed=3, description="test", token_weights=weights,
            peft_config=peft, callbacks=callbacks, **options,
        )  # fmt: skip
    return model


def distance(left: Any, right: Any) -> float:
    pairs = zip(trained_weights(left).values(), trained_weights(right).values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", CHANGING)
def test_a_setting_of_transformers_changes_the_training(tmp_path: Path, plain: Any, name: str) -> None:
    changed = train(tmp_path, **CHANGING[name])
    without = {key: value for key, value in CHANGING[name].items() if key != name}
    assert distance(changed, train(tmp_path, **without) if without else plain) > 1e-6


@pytest.mark.parametrize("name", [name for name in KEEPING if name in FIELDS])
def test_a_setting_that_is_about_how_leaves_the_result(tmp_path: Path, plain: Any, name: str) -> None:
    assert distance(train(tmp_path, **KEEPING[name]), plain) < 1e-5


@pytest.mark.parametrize("adapters", [False, True])
def test_gradient_checkpointing_trains_weights_and_adapters(tmp_path: Path, adapters: bool) -> None:
    peft = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]) if adapters else None
    plain, saving = (train(tmp_path, peft=peft, gradient_checkpointing=on) for on in (False, True))
    assert distance(plain, saving) < 1e-5
    assert distance(saving, train(tmp_path, peft=peft, learning_rate=0.0)) > 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path, name: str) -> None:
    given: dict[str, Any] = {
        "include_for_metrics": ["inputs"], "include_num_input_tokens_seen": "all", "hub_strategy": "end",
        "eval_accumulation_steps": 2, "data_seed": 1, "ddp_timeout": 5, "length_column_name": "n", "label_names": ["x"],
        "fsdp_config": {"version": 2},
    }  # fmt: skip
    default = next(field.default for field in dataclasses.fields(AnswerTrainingArguments) if field.name == name)
    value = given.get(name, not default if isinstance(default, bool) else "something")
    with pytest.raises(ValueError, match=rf"^{name}=.* cannot be honoured: .*Leave it out"):
        StudentConfig(output_dir=str(tmp_path), **{name: value})


def test_float16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fp16=True does nothing on a CPU"):
        StudentConfig(output_dir=str(tmp_path), fp16=True, use_cpu=True)


@pytest.mark.parametrize("settings", [{"split_batches": True}, {"dispatch_batches": True}, {"even_batches": False}])
def test_a_setting_of_accelerate_that_would_change_batches_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^accelerator_config.{next(iter(settings))}=.* cannot be honoured"):
        StudentConfig(output_dir=str(tmp_path), accelerator_config=settings)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"save_steps": 5}, "save_strategy"),
        ({"save_total_limit": 5}, "save_strategy"),
        ({"eval_steps": 5}, "eval_strategy"),
        ({"load_best_model_at_end": True}, "eval_strategy"),
        ({"neftune_noise_alpha": 1.0}, "padding_free=False"),
        ({"variant": "confidence", "label_smoothing_factor": 0.1}, "cross entropy"),
        ({"variant": "soft", "label_smoothing_factor": 0.1}, "cross entropy"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(tmp_path: Path, settings: dict[str, Any], needed: str) -> None:
    with pytest.raises(ValueError, match=rf"does nothing without .*{needed}"):
        StudentConfig(output_dir=str(tmp_path), **settings)


# How many of its settings transformers reads for other ends than the result: where it runs, what is shown or reported.
ELSEWHERE = {
    "output_dir", "seed", "use_cpu", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "log_level", "log_level_replica", "log_on_each_node", "logging_dir",
    "logging_steps", "logging_first_step", "debug", "tf32", "fp16", "use_liger_kernel",
    "liger_kernel_config", "use_cache", "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs", "optim_args", "optim_target_modules", "accelerator_config", "local_rank",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph",
    "dataloader_multiprocessing_context", "warmup_ratio", "logging_nan_inf_filter",
    # Evaluations and checkpoints: below, and in test_checkpoints.
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "save_strategy", "save_steps", "save_total_limit", "ignore_data_skip",
    "restore_callback_states_from_checkpoint",
}  # fmt: skip


def test_no_setting_of_transformers_is_forgotten() -> None:
    known = set(CHANGING) | set(KEEPING) | set(REFUSED) | ELSEWHERE
    assert known >= FIELDS
    assert not set(REFUSED) & (set(CHANGING) | set(KEEPING) | ELSEWHERE)


# Defaults


def test_batch_sizes_are_those_of_transformers_and_adapters_learn_faster(tmp_path: Path) -> None:
    ours, theirs = StudentConfig(output_dir=str(tmp_path)), TrainingArguments(output_dir=str(tmp_path))
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.for_training(adapters=False).learning_rate == theirs.learning_rate
    assert ours.for_training(adapters=True).learning_rate == 10 * theirs.learning_rate
    assert BoostingConfig(output_dir="", learning_rate=0.25).for_training(adapters=True).learning_rate == 0.25


def test_the_learning_rate_of_adapters_is_used(tmp_path: Path) -> None:
    peft = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    assert distance(train(tmp_path, peft=peft, learning_rate=None), train(tmp_path, peft=peft, learning_rate=5e-4)) == 0


# Label smoothing


@pytest.mark.parametrize("smoothing", [0.05, 0.5, 1.0])
def test_label_smoothing_mixes_in_the_mean_over_the_vocabulary(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(int(100 * smoothing))
    states, head = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((7, 5), (11, 5)))
    labels, weights = torch.randint(11, (7,), generator=generator), torch.rand(7, generator=generator).double()
    log_probs = (states @ head.T).log_softmax(-1)
    expected = -(weights * ((1 - smoothing) * log_probs[range(7), labels] + smoothing * log_probs.mean(-1))).sum()
    for predictions in (HiddenPredictions(states.float(), head.float()), LogitPredictions((states @ head.T).float())):
        found = smoothed_cross_entropy(predictions.logits, labels, weights.float(), smoothing)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


# Evaluations during training


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_of_an_evaluation_is_the_mean_over_answer_tokens(tmp_path: Path, size: int, smoothing: float) -> None:
    watch = Watch()
    settings = {"eval_strategy": "epoch", "per_device_eval_batch_size": size, "label_smoothing_factor": smoothing}
    model = train(tmp_path, evaluated=True, callbacks=[watch], **settings)
    examples, weights = ragged(7, seed=5)
    with torch.no_grad():
        expected = slow_loss(model.double(), examples, [np.ones(len(row)) for row in weights])
    assert dict(watch.losses) == {5: pytest.approx(expected.item(), rel=1e-5)}


def test_evaluations_come_when_they_were_asked_for_and_leave_the_result(tmp_path: Path, plain: Any) -> None:
    watch = Watch()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 2, "eval_on_start": True}
    assert distance(train(tmp_path, evaluated=True, callbacks=[watch], **settings), plain) == 0
    # transformers adds one at the end.
    assert {step for step, _ in watch.losses} == {0, 2, 4, 5}


def test_the_best_checkpoint_comes_back_at_the_end(tmp_path: Path) -> None:
    watch = Watch()
    # The answers are random: what is learned of some is wrong for others.
    steps = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 2e-2,
    }
    model = train(tmp_path, evaluated=True, callbacks=[watch], load_best_model_at_end=True, **steps)
    losses = dict(watch.losses)
    best = min(losses, key=lambda step: losses[step])
    assert watch.best == str(tmp_path / f"checkpoints/checkpoint-{best}")
    assert best != 30
    examples, weights = ragged(7, seed=5)
    with torch.no_grad():
        found = slow_loss(model.double(), examples, [np.ones(len(row)) for row in weights])
    assert found.item() == pytest.approx(losses[best], rel=1e-5)


def test_an_evaluation_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'eval_strategy="epoch" needs questions .* pass eval_dataset'):
        require_eval_dataset(StudentConfig(output_dir=str(tmp_path), eval_strategy="epoch"), None)


# What a trainer passes on


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"compute_metrics": len},
            TypeError,
            r"StudentTrainer takes no argument 'compute_metrics': .* call evaluate\(\)",
        ),
        ({"data_collator": len}, TypeError, "no argument 'data_collator': batches are made"),
        ({"callback": []}, TypeError, "no argument 'callback': there is no such .* passes on callbacks"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})}, ValueError, "are two learning rates"),
    ],
)
def test_an_option_that_is_not_passed_on_is_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_trainer_options("StudentTrainer", options, StudentConfig(output_dir=str(tmp_path), learning_rate=0.1))


def test_an_optimizer_is_given_once(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}
    with pytest.raises(ValueError, match="optim='adafactor' and optimizer_cls_and_kwargs are two ways"):
        check_trainer_options("StudentTrainer", options, StudentConfig(output_dir=str(tmp_path), optim="adafactor"))
    options["optimizers"] = (torch.optim.SGD([Tensor([1.0])]), None)
    with pytest.raises(ValueError, match="two ways to give the optimizer"):
        check_trainer_options("StudentTrainer", options, StudentConfig(output_dir=str(tmp_path)))


def test_an_optimizer_class_takes_the_learning_rate(tmp_path: Path) -> None:
    examples, weights = ragged(10, seed=4)
    models = []
    for options in ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, {}):
        settings = {} if options else {"optim": "sgd"}
        args = AnswerTrainingArguments(
            output_dir=str(tmp_path), learning_rate=0.1, disable_tqdm=True, num_train_epochs=1, **settings
        )
        models.append(
            fine_tune(
                llama(0), examples, args, pad_token_id=PAD, seed=3, description="x", token_weights=weights, **options
            )[0]
        )
    assert distance(*models) == 0


# Nothing learned


def test_a_training_that_teaches_nothing_says_so(tmp_path: Path) -> None:
    examples, _ = ragged(10, seed=4)
    options: dict[str, Any] = {"pad_token_id": PAD, "seed": 3, "description": "round 1"}
    args = AnswerTrainingArguments(output_dir=str(tmp_path), learning_rate=1e-9, disable_tqdm=True, num_train_epochs=4)
    with pytest.warns(UserWarning, match=r"round 1: next to nothing was learned. The loss went from .* learning_rate="):
        fine_tune(llama(0), examples, args, **options)
    args = AnswerTrainingArguments(output_dir=str(tmp_path), learning_rate=3e-2, disable_tqdm=True, num_train_epochs=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fine_tune(llama(0), examples, args, **options)


def test_an_accumulated_step_counts_once(tmp_path: Path) -> None:
    examples, weights = ragged(8, seed=2)
    args = {"use_cpu": True, "num_train_epochs": 1, "disable_tqdm": True, "learning_rate": 0.0}
    found = []
    for size, accumulated in ((8, 1), (2, 4)):
        arguments = AnswerTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, **args
        )
        kept: list[AnswerTrainer] = []

        class Kept(AnswerTrainer):
            def train(self, *given: Any, **named: Any) -> Any:
                kept.append(self)  # noqa: B023
                return super().train(*given, **named)

        fine_tune(
            llama(0), examples, arguments, pad_token_id=PAD, seed=1, description="x", token_weights=weights,
            trainer_class=Kept,
        )  # fmt: skip
        found.append(kept[0].step_losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_an_adapter_is_made_without_a_warning_that_the_user_could_do_nothing_about(tmp_path: Path) -> None:
    examples, _ = ragged(10, seed=4)
    args = AnswerTrainingArguments(output_dir=str(tmp_path), learning_rate=3e-2, disable_tqdm=True, max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        peft = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        made, _ = fine_tune(llama(0), examples, args, pad_token_id=PAD, seed=3, description="x", peft_config=peft)
        made.save_pretrained(tmp_path / "adapter")
        attach_adapter(llama(0), tmp_path / "adapter", "the adapter")


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (BoostingConfig, {"rounds": 3}, r"BoostingConfig: unknown key rounds: did you mean num_rounds or "),
        (BoostingConfig, {"num_ronds": 3}, r"BoostingConfig: unknown key num_ronds: did you mean num_rounds\?"),
        (StudentConfig, {"lr": 1e-3}, r"StudentConfig: unknown key lr: did you mean learning_rate or "),
        (StudentConfig, {"group_by_length": True}, 'no group_by_length; .* train_sampling_strategy="group_by_length"'),
        (BoostingConfig, {"evaluation_strategy": "epoch"}, "no evaluation_strategy; the setting is eval_strategy"),
        (StudentConfig, {"teacher": None}, r"StudentConfig: unknown key teacher: (did you mean|valid keys are)"),
    ],
)
def test_a_setting_that_there_is_not_is_answered_with_the_one_that_may_be_meant(
    tmp_path: Path, kind: type, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        kind(output_dir=str(tmp_path), **given)
