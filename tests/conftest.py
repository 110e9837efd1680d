"""One thread, no hub, and a cache of models that all tests share."""

from __future__ import annotations

import gc
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from ensemw2s import TokenEnsemble
    from tests.boosting_runs import Trainings

# Read by huggingface_hub when it is imported: a test that reaches for the hub fails at once instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the two files whose single tests take longest: at the end, one worker would wait for the other."""
    items.sort(key=lambda item: item.path.name not in ("test_interpreter.py", "test_nvcc.py"))


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections: accelerate makes a whole one at the end of each training."""
    if find_spec("accelerate"):
        import peft
        import transformers

        _ = peft.LoraConfig, transformers.Trainer
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let Python take everything down at its exit as ever: nanobind complains of what is left."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    # `make gpu-check` runs where this package may be missing.
    if find_spec("datasets"):
        import datasets

        datasets.disable_progress_bars()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder for converted and self-made models."""
    monkeypatch.setenv("ENSEMW2S_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def of_adapters(tmp_path: Path) -> TokenEnsemble:
    # Imported here, since the op tests run where transformers is missing.
    from tests.reference import adapter_ensemble

    return adapter_ensemble(tmp_path)


@pytest.fixture
def of_models() -> TokenEnsemble:
    from tests.reference import model_ensemble

    return model_ensemble()


@pytest.fixture
def of_mixed_adapters(tmp_path: Path) -> TokenEnsemble:
    from tests.reference import mixed_ensemble

    return mixed_ensemble(tmp_path)


@pytest.fixture(params=["of_adapters", "of_mixed_adapters", "of_models"])
def ensemble(request: pytest.FixtureRequest) -> TokenEnsemble:
    return request.getfixturevalue(request.param)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    from tests.boosting_runs import record_trainings

    return record_trainings(monkeypatch)
