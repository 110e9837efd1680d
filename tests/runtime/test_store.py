"""The store: what was computed once is found again, what only looks alike is not, and nothing in it is half done."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from ensemw2s.runtime.files import new_folder
from ensemw2s.runtime.store import Store
from tests.boosting.test_trainer import kept
from tests.boosting_runs import TRAIN, Trainings, base, boost
from tests.running import die_before, fork, wait
from tests.tiny import questions

Make = Callable[[], None]


def writes(target: Path, text: str = "content") -> Make:
    def make() -> None:
        with new_folder(target) as aside:
            (aside / "inner").mkdir()
            (aside / "inner" / "file").write_text(text)

    return make


def refuse() -> None:
    raise AssertionError("computed again")


# The store alone


def test_a_result_is_computed_once_and_takes_its_space_once(tmp_path: Path) -> None:
    store, key = Store(tmp_path / "store"), {"a": 1, "b": [2.5, None]}
    one, two = tmp_path / "one", tmp_path / "two"
    store.obtain(one, key, writes(one))
    store.obtain(two, {"b": [2.5, None], "a": 1}, refuse)
    assert (one / "inner/file").samefile(two / "inner/file")
    assert (one / "inner/file").stat().st_nlink == 3
    # Where the result is already, nothing is looked up.
    store.obtain(two, {"another": "key"}, refuse)


def test_another_key_is_another_result(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for name in ("one", "two"):
        store.obtain(tmp_path / name, {"name": name}, writes(tmp_path / name, name))
    assert [(tmp_path / name / "inner/file").read_text() for name in ("one", "two")] == ["one", "two"]


def test_deleting_one_place_leaves_the_others_whole(tmp_path: Path) -> None:
    store, one, two, three = Store(tmp_path / "store"), tmp_path / "one", tmp_path / "two", tmp_path / "three"
    store.obtain(one, "key", writes(one))
    store.obtain(two, "key", refuse)
    shutil.rmtree(one)
    assert (two / "inner/file").read_text() == "content"
    shutil.rmtree(store.folder)
    assert (two / "inner/file").read_text() == "content"
    # Without a store it has to be made anew.
    with pytest.raises(AssertionError, match="computed again"):
        store.obtain(three, "key", refuse)


def test_where_links_are_refused_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    store, one, two = Store(tmp_path / "store"), tmp_path / "one", tmp_path / "two"
    store.obtain(one, "key", writes(one))
    store.obtain(two, "key", refuse)
    assert (two / "inner/file").read_text() == "content"
    assert not (one / "inner/file").samefile(two / "inner/file")


def test_an_error_in_the_making_leaves_nothing(tmp_path: Path) -> None:
    store, one = Store(tmp_path / "store"), tmp_path / "one"

    def half() -> None:
        with new_folder(one) as aside:
            (aside / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.obtain(one, "key", half)
    assert not one.exists()
    store.obtain(one, "key", writes(one))
    assert [path.name for path in one.iterdir()] == ["inner"]


@pytest.mark.parametrize("stop_at", [1, 2], ids=["before the folder has its name", "while it is linked into the store"])
def test_a_killed_process_leaves_nothing_under_the_key(tmp_path: Path, stop_at: int) -> None:
    store, one, two = Store(tmp_path / "store"), tmp_path / "one", tmp_path / "two"

    def work() -> None:
        die_before(stop_at)
        store.obtain(one, "key", writes(one))

    assert wait(fork(work, tmp_path / "said.txt")) == -signal.SIGKILL
    with pytest.raises(AssertionError, match="computed again"):
        store.obtain(two, "key", refuse)
    store.obtain(two, "key", writes(two))
    assert (two / "inner/file").read_text() == "content"
    assert one.exists() == (stop_at == 2)


SETS = """
import sys
from pathlib import Path
from ensemw2s.runtime.files import new_folder
from ensemw2s.runtime.store import Store

def make():
    with new_folder(target) as aside:
        (aside / "file").write_text("content")

target, key = Path(sys.argv[1]) / sys.argv[2], {"modules": {"q_proj", "k_proj", "v_proj", "o_proj"}}
Store(Path(sys.argv[1]) / "store").obtain(target, key, make)
"""


def test_a_set_in_a_key_is_the_same_in_every_process(tmp_path: Path) -> None:
    for seed in ("1", "2", "3"):
        # Python orders the texts of a set by a hash of its own in each process, unless it is told.
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", SETS, str(tmp_path), seed], env=environment, check=True, timeout=120)
    assert len([path for path in (tmp_path / "store").iterdir() if path.is_dir()]) == 1


# The store of a trainer


def test_another_recipe_finds_the_first_expert_and_ends_as_without_a_store(
    tmp_path: Path,
    trainings: Trainings,
) -> None:
    store = Store(tmp_path / "store")
    boost(tmp_path / "one", given={"store": store}, shrinkage=0.3).train()
    assert len(trainings) == 2
    boost(tmp_path / "two", given={"store": store}, shrinkage=1.0).train()
    # Round 1 begins with equal weights whatever the recipe, round 2 does not.
    assert len(trainings) == 3
    boost(tmp_path / "alone", shrinkage=1.0).train()
    assert kept(tmp_path / "two") == kept(tmp_path / "alone")
    name = "rounds/1/attempt-1/expert/adapter_model.safetensors"
    assert (tmp_path / "one" / name).samefile(tmp_path / "two" / name)
    name = "rounds/1/attempt-1/training_scores/token_log_probs.npy"
    assert (tmp_path / "one" / name).samefile(tmp_path / "two" / name)
    before = kept(tmp_path / "two")
    shutil.rmtree(tmp_path / "one")
    assert kept(tmp_path / "two") == before
    assert boost(tmp_path / "two", given={"store": store}, shrinkage=1.0).train().num_experts == 2
    assert len(trainings) == 5


def test_the_models_that_judge_out_of_fold_are_found_too(tmp_path: Path, trainings: Trainings) -> None:
    store = Store(tmp_path / "store")
    settings: dict[str, Any] = {"num_rounds": 1, "error_folds": 2, "prior": 0.999}
    boost(tmp_path / "one", given={"store": store}, **settings).train()
    assert len(trainings) == 3
    boost(tmp_path / "two", given={"store": store}, **settings, shrinkage=0.9).train()
    assert len(trainings) == 3
    boost(tmp_path / "alone", **settings, shrinkage=0.9).train()
    assert kept(tmp_path / "two") == kept(tmp_path / "alone")


def late_difference(model: Any) -> Any:
    """The same model but for the last number of its largest weight."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        max(changed.parameters(), key=torch.numel).flatten()[-1] += 1e-3
    return changed


def other_norms(model: Any) -> Any:
    """The same weights, with another constant in the denominator of the norms."""
    changed = copy.deepcopy(model)
    changed.config.rms_norm_eps = 1e-2
    return changed


def adapters(**settings: Any) -> LoraConfig:
    own = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    return LoraConfig(**(own | settings))


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({"seed": 1}, {}),
        ({}, {"train_dataset": questions(12, seed=5)}),
        ({}, {"train_dataset": TRAIN.select(range(11, -1, -1))}),
        ({"learning_rate": 1e-2}, {}),
        ({"num_train_epochs": 1}, {}),
        ({"per_device_train_batch_size": 5}, {}),
        ({"weight_decay": 0.1}, {}),
        ({"sampling": "draw"}, {}),
        ({}, {"model": late_difference}),
        ({}, {"model": other_norms}),
        ({}, {"peft_config": None}),
        ({}, {"peft_config": adapters(r=8)}),
        ({}, {"peft_config": adapters(target_modules=["q_proj", "up_proj"])}),
        ({}, {"peft_config": adapters(lora_alpha=9)}),
        ({}, {"peft_config": adapters(lora_dropout=0.1)}),
    ],
)
def test_what_only_looks_alike_is_not_mistaken(
    tmp_path: Path, trainings: Trainings, settings: dict[str, Any], given: dict[str, Any]
) -> None:
    store, own = {"store": Store(tmp_path / "store")}, {"num_rounds": 1}
    if callable(given.get("model")):
        given = {"model": given["model"](base())}
    boost(tmp_path / "one", given=store, **own).train()
    boost(tmp_path / "two", given=store | given, **(own | settings)).train()
    assert len(trainings) == 2
    attempt, scores = "rounds/1/attempt-1", "token_log_probs.npy"
    different = [f"{attempt}/expert/cost.json", f"{attempt}/training_scores/{scores}"]
    same = f"pretrained_scores/{scores}"
    if {"model", "train_dataset"} & given.keys():
        different.append(same)
    else:
        assert (tmp_path / "one" / same).samefile(tmp_path / "two" / same)
    for name in different:
        assert not (tmp_path / "one" / name).samefile(tmp_path / "two" / name)


def test_an_adapter_is_not_mistaken_for_the_model_that_it_was_merged_into(tmp_path: Path, trainings: Trainings) -> None:
    store = {"store": Store(tmp_path / "store")}
    assert boost(tmp_path / "one", given=store, num_rounds=1).train().config.kind == "adapters"
    several = boost(tmp_path / "two", given={**store, "model": [base(), base()]}, prior=0.999).train()
    assert several.config.kind == "models"
    assert len(trainings) == 3


def test_scores_of_other_batches_are_other_scores(tmp_path: Path, trainings: Trainings) -> None:
    store = {"store": Store(tmp_path / "store")}
    for batch_size in (3, 4):
        boost(tmp_path / str(batch_size), given=store, num_rounds=1, per_device_eval_batch_size=batch_size).train()
    # How many rows share a batch is in the last bits of the scores.
    name = "pretrained_scores/token_log_probs.npy"
    assert not (tmp_path / "3" / name).samefile(tmp_path / "4" / name)
    boost(tmp_path / "alone", num_rounds=1, per_device_eval_batch_size=4).train()
    assert kept(tmp_path / "4") == kept(tmp_path / "alone")
