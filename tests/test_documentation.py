"""Every block of README.md, CONTRIBUTING.md and docs/ runs; hubs, hours and GPUs have tiny stand-ins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemw2s import TokenEnsemble
from ensemw2s.config import load_config, read_settings
from tests.documents import PAGES, ROOT, require_alike, run_page
from tests.boosting_runs import base
from tests.tiny import FORMAT, llama, questions, saved_adapters, tokenizer

# A run of seconds, in place of each example that takes minutes on a real model.
TRAINING = {"num_train_epochs": 1, "learning_rate": 2e-2, "per_device_train_batch_size": 16, "disable_tqdm": True}
SMALL = {
    "weak": {"source": "path-or-hub-id"},
    "strong": {"source": "bigger"},
    "lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "data": {
        "format": {"prompt_template": FORMAT.prompt_template, "answer_prefix": FORMAT.answer_prefix},
        "easy": {"file": "easy.jsonl"},
        "hard": {"file": "hard.jsonl"},
        "sizes": {"train": 12, "validation": 6, "test_id": 6, "unlabelled": 12, "test_ood": 6},
    },
    "boosting": {"num_rounds": 2, **TRAINING},
    "student": TRAINING,
    "labelling": {"max_new_tokens": 6},
}
LONG_RUNS = ("reverse_words.yaml", "syllogisms.yaml")


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a page may take for granted, under the names that it uses."""
    folder = tmp_path_factory.mktemp("documentation")
    for name in ("examples", "docs/results"):
        shutil.copytree(ROOT / name, folder / name)
    for name in LONG_RUNS:
        settings = {"name": Path(name).stem, **SMALL}
        (folder / "examples" / name).write_text(yaml.safe_dump(settings | {"quick": {"seed": 1}}))
    for name in ("path-or-hub-id", "bigger"):
        base().save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    questions(120).to_json(folder / "easy.jsonl")
    questions(40, seed=8, start=300).to_json(folder / "hard.jsonl")
    saved_adapters(folder / "adapters", count=3)
    return folder


@pytest.fixture
def names(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Go to a desk of one's own with all that, and return the objects that a page may take for granted."""
    desk = shutil.copytree(stand_ins, tmp_path / "desk")
    monkeypatch.chdir(desk)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    adapters = [desk / "adapters" / f"adapter-{t}" for t in range(3)]
    ensemble = TokenEnsemble.from_adapters(llama(0), adapters, [2.0, 1.0, 0.5])
    ensemble.save_pretrained("run/ensemble", processing_class=tokenizer())
    return {"ensemble": ensemble, "tokenizer": tokenizer(), "hard": questions(12, seed=8, start=300)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page: Path, names: dict[str, Any]) -> None:
    run_page(page, names)
