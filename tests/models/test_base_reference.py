"""The base model that an ensemble refers to: found where it was, never taken for another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemw2s import TokenEnsemble
from ensemw2s.models.base_reference import check_base, reference_to
from ensemw2s.models.loading import load_model
from tests.reference import ragged_prompts
from tests.tiny import llama, saved_adapters, saved_model


@torch.no_grad()
def logits(ensemble: TokenEnsemble) -> torch.Tensor:
    return ensemble(input_ids=ragged_prompts(2)[0].clamp_min(2)).logits


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whoever asks the hub is noted and refused."""
    asked: list[str] = []

    def download(name: str, **_: Any) -> None:
        asked.append(name)
        raise OSError("there is no hub here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def saved(folder: Path, source: str, **settings: Any) -> TokenEnsemble:
    reference = {"source": source, **settings}
    ensemble = TokenEnsemble.from_adapters(
        load_model(source), saved_adapters(folder.parent / "adapters", 2), [1.0, 2.0], base_reference=reference
    )
    ensemble.save_pretrained(folder)
    return ensemble


def source_in(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["base"]["source"]


def test_a_relative_base_is_found_from_anywhere_and_never_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: list[str]
) -> None:
    saved_model(tmp_path / "project" / "weak")
    monkeypatch.chdir(tmp_path / "project")
    ensemble = saved(tmp_path / "project" / "ensemble", "weak")
    assert source_in(tmp_path / "project" / "ensemble") == "../weak"
    # A stranger's model of that name where it is loaded from.
    (tmp_path / "elsewhere").mkdir()
    saved_model(tmp_path / "elsewhere" / "weak", 9)
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = TokenEnsemble.from_pretrained(tmp_path / "project" / "ensemble")
    assert torch.equal(logits(loaded), logits(ensemble))
    # Moved together.
    shutil.move(tmp_path / "project", tmp_path / "moved")
    moved = TokenEnsemble.from_pretrained(tmp_path / "moved" / "ensemble")
    assert torch.equal(logits(moved), logits(ensemble))
    # Saved again elsewhere, it still means the same base.
    loaded = TokenEnsemble.from_pretrained(tmp_path / "moved" / "ensemble")
    loaded.save_pretrained(tmp_path / "far" / "away")
    assert source_in(tmp_path / "far" / "away") == str(tmp_path / "moved" / "weak")
    assert torch.equal(logits(TokenEnsemble.from_pretrained(tmp_path / "far" / "away")), logits(ensemble))
    # Parted from it.
    shutil.rmtree(tmp_path / "moved" / "weak")
    expected = rf"saved as the folder {tmp_path}/moved/weak, which does not exist: put it there, or pass source="
    for folder in ("moved/ensemble", "far/away"):
        with pytest.raises(FileNotFoundError, match=expected):
            TokenEnsemble.from_pretrained(tmp_path / folder)
    assert not no_hub
    again = TokenEnsemble.from_pretrained(tmp_path / "far" / "away", source="weak")
    assert again.config.base == {"source": str(tmp_path / "elsewhere" / "weak")}


def test_a_base_that_changes_place_between_building_and_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model(tmp_path / "here" / "weak")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ensemble = TokenEnsemble.from_adapters(
        llama(0), saved_adapters(tmp_path, 1), [1.0], base_reference={"source": "weak"}
    )
    monkeypatch.chdir(tmp_path / "there")
    ensemble.save_pretrained("ensemble")
    assert source_in(tmp_path / "there" / "ensemble") == str(tmp_path / "here" / "weak")
    assert torch.equal(logits(TokenEnsemble.from_pretrained("ensemble")), logits(ensemble))
    assert torch.equal(logits(TokenEnsemble.from_pretrained("ensemble")[:1]), logits(ensemble))


def test_a_base_inside_the_ensembles_folder(tmp_path: Path) -> None:
    saved_model(tmp_path / "ensemble" / "weak")
    ensemble = saved(tmp_path / "ensemble", str(tmp_path / "ensemble" / "weak"))
    assert source_in(tmp_path / "ensemble") == "./weak"
    shutil.move(tmp_path / "ensemble", tmp_path / "moved")
    assert torch.equal(logits(TokenEnsemble.from_pretrained(tmp_path / "moved")), logits(ensemble))


@pytest.mark.parametrize("source", ["weak", "gpt2", "models/weak/7b", "", "C:\\weak", "hub:weak", "package:a.b"])
def test_a_name_that_could_be_anything_is_refused(source: str, tmp_path: Path, no_hub: list[str]) -> None:
    saved_model(tmp_path / "weak")
    saved(tmp_path / "ensemble", str(tmp_path / "weak"))
    config = tmp_path / "ensemble" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"base": {"source": source}}))
    expected = r"config\.json: base: .* is neither a path|config\.json: base must be null or hold|source must name"
    with pytest.raises((FileNotFoundError, ValueError), match=expected):
        TokenEnsemble.from_pretrained(tmp_path / "ensemble")
    assert not no_hub


def test_a_hub_id_is_asked_of_the_hub_and_never_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: list[str]
) -> None:
    saved_model(tmp_path / "weak")
    ensemble = TokenEnsemble.from_adapters(
        llama(0), saved_adapters(tmp_path, 1), [1.0], base_reference={"source": "someone/weak", "dtype": torch.bfloat16}
    )
    ensemble.save_pretrained(tmp_path / "ensemble")
    assert json.loads((tmp_path / "ensemble" / "config.json").read_text())["base"] == {
        "source": "someone/weak", "dtype": "bfloat16",
    }  # fmt: skip
    saved_model(tmp_path / "someone" / "weak", 9)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"config\.json: the experts' base model cannot be had: someone/weak is"
    ):
        TokenEnsemble.from_pretrained(tmp_path / "ensemble")
    assert no_hub == ["someone/weak"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / "weak"))
    loaded = TokenEnsemble.from_pretrained(tmp_path / "ensemble")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.base == {"source": "someone/weak", "dtype": "bfloat16"}


def test_a_reference_holds_three_keys_alone(tmp_path: Path) -> None:
    (folder,) = saved_adapters(tmp_path, 1)
    for key, value in (("trust_remote_code", True), ("quantization_config", {}), ("revision", "main")):
        with pytest.raises(
            ValueError, match=f"base_reference: base may hold source, keep_layers, dtype alone, got '{key}'"
        ):
            TokenEnsemble.from_adapters(llama(0), [folder], [1.0], base_reference={"source": "weak", key: value})
    with pytest.raises(ValueError, match='keep_layers must look like "0-11,22-29", got 3'):
        check_base({"source": "weak", "keep_layers": 3}, "x")
    with pytest.raises(ValueError, match="x: base: dtype must be"):
        check_base({"source": "weak", "dtype": "load"}, "x")


def test_what_a_reference_cannot_say_is_saved_with_the_ensemble() -> None:
    plain = {"source": "weak", "dtype": "float32"}
    assert reference_to("weak", {"dtype": "float32", "device_map": {"": "cpu"}, "token": "x"}) == plain
    assert reference_to("weak", {"keep_layers": None}) == {"source": "weak"}
    for key in ("quantization_config", "revision", "trust_remote_code", "subfolder"):
        assert reference_to("weak", {"dtype": "float32", key: "x"}) is None


def test_an_ensemble_whose_base_nobody_has_is_not_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model(tmp_path / "weak")
    ensemble = saved(tmp_path / "ensemble", str(tmp_path / "weak"))
    pushed: list[str] = []
    monkeypatch.setattr("transformers.PreTrainedModel.push_to_hub", lambda self, repo_id, **_: pushed.append(repo_id))
    with pytest.raises(ValueError, match=rf"is the folder {tmp_path}/weak, which nobody else has: build the ensemble"):
        ensemble.push_to_hub("me/ensemble")
    alone = TokenEnsemble.from_adapters(llama(0), saved_adapters(tmp_path, 1), [1.0])
    alone.push_to_hub("me/ensemble")
    assert pushed == ["me/ensemble"]
