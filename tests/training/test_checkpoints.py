"""Trainings that are killed, run out of disk or lose a file go on from the last whole checkpoint, to the same bits."""

from __future__ import annotations

import errno
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from ensemw2s.runtime.files import DiskFullError, settle
from ensemw2s.training.checkpoints import discard_checkpoints
from ensemw2s.training.fine_tune import TrainingCost, fine_tune
from ensemw2s.training.trainer import AnswerTrainer
from tests.tiny import PAD, llama
from tests.training.test_trainer import arguments, assert_same_bits, ragged, trained_weights

# 10 examples in batches of 2 are 5 steps an epoch: steps 2, 4, 6, 8 and the last, 10, are kept.
STEPS: dict[str, Any] = {
    "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2, "num_train_epochs": 2,
    "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear", "warmup_steps": 3,
}  # fmt: skip
DROPOUT = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "down_proj"])
HEAD = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj"], modules_to_save=["lm_head"])


class Killed(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


def killed_in(step: int) -> type[AnswerTrainer]:
    class Dying(AnswerTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step + 1 == step:
                raise Killed
            return super().training_step(*args, **kwargs)

    # The class is part of what a run is.
    Dying.__qualname__ = AnswerTrainer.__qualname__
    return Dying


def train(folder: Path, trainer_class: type[AnswerTrainer] = AnswerTrainer, **settings: Any) -> tuple[Any, Any]:
    options = {"peft_config": settings.pop("peft_config", None), "trainer_class": trainer_class}
    examples, weights = ragged(10, seed=21)
    torch.seed()
    return fine_tune(
        llama(0, attention_dropout=0.2), examples, arguments(folder, **(STEPS | settings)), pad_token_id=PAD, seed=4,
        description="training expert", token_weights=weights, **options,
    )  # fmt: skip


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoints/checkpoint-*"))


def first_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the first step that each later training does."""
    seen: list[int] = []
    own = AnswerTrainer.train

    def recorded(self: AnswerTrainer, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        seen.append(int(str(resume_from_checkpoint or "-0").rpartition("-")[2]) + 1)
        return own(self, resume_from_checkpoint, **kwargs)

    monkeypatch.setattr(AnswerTrainer, "train", recorded)
    return seen


def assert_equal_runs(one: tuple[nn.Module, TrainingCost], other: tuple[nn.Module, TrainingCost]) -> None:
    assert_same_bits(trained_weights(one[0]), trained_weights(other[0]))
    assert (one[1].tokens, one[1].flops) == (other[1].tokens, other[1].flops)


@pytest.mark.parametrize(
    ("killed", "peft_config", "strategy"),
    [
        # Before any checkpoint, in each epoch, at an epoch's first step, and in the last step.
        (1, None, "group_by_length"),
        pytest.param(4, DROPOUT, "group_by_length", marks=pytest.mark.slow),
        (6, HEAD, "group_by_length"),
        pytest.param(8, None, "group_by_length", marks=pytest.mark.slow),
        pytest.param(10, DROPOUT, "group_by_length", marks=pytest.mark.slow),
        pytest.param(4, None, "random", marks=pytest.mark.slow),
        (8, DROPOUT, "random"),
    ],
)
def test_a_killed_training_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int, peft_config: LoraConfig | None, strategy: str
) -> None:
    settings = {"peft_config": peft_config, "train_sampling_strategy": strategy}
    whole = train(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        train(tmp_path / "killed", killed_in(killed), **settings)
    first = first_steps(monkeypatch)
    assert_equal_runs(train(tmp_path / "killed", **settings), whole)
    # Step 10 is done after the checkpoint of step 8, step 4 after that of step 2.
    assert first == [(killed - 1) // 2 * 2 + 1]


def test_accumulation_and_mixed_precision_go_on_to_the_same_bits(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "bf16": True, "num_train_epochs": 4}
    whole = train(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        train(tmp_path / "killed", killed_in(8), **settings)
    assert steps_kept(tmp_path / "killed") == [4, 6]
    assert_equal_runs(train(tmp_path / "killed", **settings), whole)


def test_what_is_left_behind_a_checkpoint_is_not_taken_for_all(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-9, "per_device_train_batch_size": 10, "num_train_epochs": 10}
    with pytest.warns(UserWarning, match="next to nothing was learned"):
        train(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        train(tmp_path / "killed", killed_in(8), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(tmp_path / "killed", **settings)


def test_checkpoints_stay_until_the_result_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path)
    assert steps_kept(tmp_path) == [8, 10]
    first = first_steps(monkeypatch)
    assert_equal_runs(train(tmp_path), whole)
    assert first == [11]
    discard_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []
    # Nothing is written where nobody asked for it.
    train(tmp_path, save_strategy="no", save_steps=500)
    assert steps_kept(tmp_path) == []


def test_the_seconds_before_the_kill_count(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, killed_in(8))
    file = tmp_path / "checkpoints/checkpoint-6/complete.json"
    text = file.read_text()
    file.write_text(text.replace('"seconds": ', '"seconds": 1000'))
    settle(file)
    _, cost = train(tmp_path)
    assert cost.seconds > 1000


# A full disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
    ids=["errno", "torch", "torch's last write"],
)
def test_a_disk_that_fills_up_during_a_checkpoint_costs_only_that_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = train(tmp_path / "whole")
    real = torch.save
    writes = 0

    def full(*args: Any, **kwargs: Any) -> None:
        nonlocal writes
        writes += 1
        # Each checkpoint has several such files: in the middle of the third.
        if writes == 10:
            raise error
        real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(DiskFullError, match=r"checkpoint-6\. Nothing that was finished is lost: free some space"):
            train(tmp_path / "full")
    assert steps_kept(tmp_path / "full") == [2, 4]
    first = first_steps(monkeypatch)
    assert_equal_runs(train(tmp_path / "full"), whole)
    assert first == [5]


def test_other_errors_of_writing_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(torch, "save", denied)
    with pytest.raises(PermissionError, match="denied"):
        train(tmp_path)
    assert steps_kept(tmp_path) == []


# Damaged and foreign checkpoints


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder / "optimizer.pt"),
        pytest.param(lambda folder: cut(folder / "model.safetensors"), marks=pytest.mark.slow),
        pytest.param(lambda folder: (folder / "scheduler.pt").unlink(), marks=pytest.mark.slow),
        lambda folder: (folder / "complete.json").unlink(),
        lambda folder: (folder / "complete.json").write_text('{"seco'),
    ],
    ids=["optimizer-cut", "weights-cut", "scheduler-gone", "no-seal", "seal-cut"],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", killed_in(7))
    damage(tmp_path / "killed/checkpoints/checkpoint-6")
    first = first_steps(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert_equal_runs(train(tmp_path / "killed"), whole)
    assert first == [5]
    assert "checkpoint-6 is incomplete (its writing was cut off) and is deleted" in caplog.text


def test_without_a_whole_checkpoint_training_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", killed_in(7))
    for step in (4, 6):
        cut(tmp_path / f"killed/checkpoints/checkpoint-{step}/rng_state.pth")
    first = first_steps(monkeypatch)
    assert_equal_runs(train(tmp_path / "killed"), whole)
    assert first == [1]


@pytest.mark.parametrize(
    ("settings", "differing"),
    [
        ({"learning_rate": 2e-2}, "learning_rate"),
        ({"per_device_train_batch_size": 5}, "per_device_train_batch_size"),
        ({"peft_config": DROPOUT}, "model"),
    ],
    ids=["learning-rate", "batch-size", "adapter"],
)
def test_checkpoints_of_another_training_are_never_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], differing: str
) -> None:
    with pytest.raises(Killed):
        train(tmp_path / "one", killed_in(7))
    fresh = train(tmp_path / "two", **settings)
    with caplog.at_level(logging.WARNING):
        assert_equal_runs(train(tmp_path / "one", **settings), fresh)
    assert f"checkpoints of another training (differing: {differing}): they are deleted" in caplog.text


def test_how_often_checkpoints_are_written_does_not_make_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        train(tmp_path, killed_in(7))
    first = first_steps(monkeypatch)
    train(tmp_path, save_steps=5, save_total_limit=1, logging_steps=3)
    assert first == [7]


# Divergence


def test_a_nan_loss_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Diverging(AnswerTrainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == 4:
                with torch.no_grad():
                    model.model.norm.weight[0] = torch.nan
            return super().training_step(model, *args, **kwargs)

    Diverging.__qualname__ = AnswerTrainer.__qualname__
    with pytest.raises(FloatingPointError, match="nan at step 5, in the batch of row"):
        train(tmp_path / "nan", Diverging)
    assert steps_kept(tmp_path / "nan") == [2, 4]
    # It is good: without the disturbance training goes on from it.
    first = first_steps(monkeypatch)
    assert_equal_runs(train(tmp_path / "nan"), train(tmp_path / "whole"))
    assert first[0] == 5


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    class Diverging(AnswerTrainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(model, *args, **kwargs)
            # The update of step 4 takes the weights out of range; no loss has seen them when they would be kept.
            if self.state.global_step == 3:
                model.lm_head.weight.grad[0, 0] = torch.inf
            return loss

    with pytest.raises(FloatingPointError, match="training expert: the last step made weights NaN or infinite"):
        train(tmp_path, Diverging)
    assert steps_kept(tmp_path) == [2]
